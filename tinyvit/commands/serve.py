"""Serve a page to draw digits on, and a JSON API.

    tinyvit serve                    opens http://127.0.0.1:8000
    tinyvit serve --model FILE       with your own model
    tinyvit serve --host 0.0.0.0     for every computer in the network

It needs fastapi and uvicorn, the extra "app". It stores nothing, and the page
loads nothing from other servers.
"""

import contextlib
import ipaddress
import threading
import webbrowser
from pathlib import Path

from tinyvit.commands import CommandError, load_digit_model, require_range
from tinyvit.data import load_mnist
from tinyvit.pretrained import pretrained_card

NEEDED = {"fastapi", "uvicorn", "pydantic", "starlette", "h11"}


def add_arguments(parser):
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this computer only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on, 0 for any (8000)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    text = "a trained model for 28 x 28 pixels and ten digits (the one in the package)"
    parser.add_argument("--model", type=Path, metavar="FILE", help=text)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="digits that are read at once (16)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="digits that may wait to be read (256)")


def memory_advice(options):
    return f"try a smaller --batch than {options.batch}"


def run(options):
    require_range(options, "port", 0, 65535)
    require_range(options, "batch", 1, 1024)
    require_range(options, "queue", 1, 100_000)
    try:
        from tinyvit.server import listen
        from tinyvit.server.app import choose_samples, create_app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        raise CommandError(f"error: the page needs {error.name}: type 'pip install fastapi uvicorn'", 2) from error
    card, model = pretrained_card(), load_digit_model(options.model)
    samples = choose_samples(load_mnist(), card.misread, card.barely_read)
    app = create_app(
        model,
        name=options.model.name if options.model else "the model in the package",
        test_accuracy=None if options.model else card.test_accuracy,
        samples=samples,
        most_at_once=options.batch,
        most_waiting=options.queue,
    )
    # Ctrl-C is the way to stop the server.
    with listen.listen(options.host, options.port) as listener, contextlib.suppress(KeyboardInterrupt):
        address = listen.address_of(listener)
        print(f"the page is at {address}, until you press Ctrl-C", flush=True)
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print("every computer in the network can open it, at this computer's address", flush=True)
        if not options.no_browser:  # the socket already listens: the browser waits until the server answers
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        listen.serve(app, listener)
