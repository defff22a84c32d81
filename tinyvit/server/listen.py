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
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # Without the protocol asyncio leaves Nagle's algorithm on, and every answer comes 40 ms late.
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere two servers could then share the port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        hint = " (give --port another number, or 0 for any)" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}{hint}") from error
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
