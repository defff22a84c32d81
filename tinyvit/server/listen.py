"""The server's socket, and the loop that serves an application on it."""

import errno
import ipaddress
import os
import socket

import uvicorn

from tinyvit.server.guard import PatientProtocol


def listen(host, port):
    """Return a socket that listens. Raises `ValueError` with what to do if it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        hint = " (give --port another number, or 0 for any)" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}, port {port}: {reason}{hint}") from error
    # Connections inherit this. With Nagle's algorithm every answer comes 40 ms late.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_of(listener):
    """Return the address to open in a browser on this computer."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app, listener):
    """Serve `app` on a socket that listens, until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_level="error",  # a flood of bad requests fills no log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run([listener])
