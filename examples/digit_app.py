"""Draw a digit in the browser and watch the transformer read it.

    pip install -e ".[app]"
    python examples/digit_app.py                       opens http://127.0.0.1:8000
    python examples/digit_app.py --model runs/tuned-seed0/model.safetensors      your own model
    python examples/digit_app.py --host 0.0.0.0        for all who can reach this computer, a classroom for example

Nothing is stored, nothing is sent to anybody else, and the page loads nothing from anywhere else.
"""

import argparse
import contextlib
import errno
import ipaddress
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from tinyvit.checkpoint import CheckpointError, load_model
from tinyvit.data import DataError, load_mnist
from tinyvit.pretrained import load_pretrained, pretrained_card

NEEDED = {"fastapi", "uvicorn", "pydantic", "starlette", "h11"}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this computer alone)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on, 0 for any (8000)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    text = "a trained model for 28 x 28 pixels and ten digits (the one in the package)"
    parser.add_argument("--model", type=Path, metavar="FILE", help=text)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="digits that are read at once (16)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="digits that may wait to be read (256)")
    options = parser.parse_args(arguments)
    for name, least, most in (("port", 0, 65535), ("batch", 1, 1024), ("queue", 1, 100_000)):
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name} must be from {least} to {most:,}, not {getattr(options, name)}")
    return options


def load(path):
    """Return what `create_app` wants to know: the model, its name and accuracy, and the samples."""
    from digit_web.app import choose_samples

    card = pretrained_card()
    samples = choose_samples(load_mnist(), card.misread, card.barely_read)
    if path is None:
        name, accuracy = "the model in the package", card.test_accuracy
        return {"model": load_pretrained(), "name": name, "test_accuracy": accuracy, "samples": samples}
    model = load_model(path)
    if (model.config.image_size, model.config.classes) != (28, 10):
        found = f"{model.config.image_size} x {model.config.image_size} pixels and {model.config.classes} classes"
        raise ValueError(f"{path}: the page wants a model for 28 x 28 pixels and 10 classes, found {found}")
    return {"model": model, "name": path.name, "samples": samples}


def listen(host, port):
    """Return a socket that listens. Raises `ValueError` with what to do if it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # without its protocol asyncio leaves Nagle's algorithm on, and every answer comes 40 ms late
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share the port
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


def serve(app, listener, on_start):
    """Serve until Ctrl-C or SIGTERM; on_start() is called when the first request can be answered."""
    import uvicorn
    from digit_web.guard import PatientProtocol

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            if self.started:
                on_start()

    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_level="error",  # a flood of nonsense is to fill no log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=3,
    )
    Server(config).run([listener])


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        from digit_web.app import create_app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        print(f"error: the page needs {error.name}: install it with 'pip install -e \".[app]\"'", file=sys.stderr)
        return 2
    try:
        app = create_app(**load(options.model), most_at_once=options.batch, most_waiting=options.queue)
        listener = listen(options.host, options.port)
    except (CheckpointError, DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def say_so():
        address = address_of(listener)
        print(f"the page is at {address}, until you press Ctrl-C", flush=True)
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print("others reach it at this computer's address, and so does anybody in its network", flush=True)
        if not options.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    with listener, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how one stops it
        serve(app, listener, say_so)
    return 0


if __name__ == "__main__":
    sys.exit(main())
