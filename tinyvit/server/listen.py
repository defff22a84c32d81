"""The socket of the server, and the loop that serves an application on it."""

import errno
import ipaddress
import os
import socket

import uvicorn

from tinyvit.server.guard import PatientProtocol


def listen(host, port):
    """Return a listening socket. Raise `ValueError` with what to do if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
        reason = reason.partition(" (while")[0]  # socket appends the address
        hint = "give another --port, or 0 for any free port"
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            hint = "give the --host of this computer, such as 127.0.0.1"
        raise ValueError(f"cannot listen on {host}, port {port} ({reason}): {hint}") from error
    # Connections inherit this option. With Nagle's algorithm every answer would be 40 ms later.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_of(listener):
    """Return the address of the page for a browser on this computer."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app, listener):
    """Serve `app` on a listening socket until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_level="error",  # many bad requests must not fill a log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run([listener])
