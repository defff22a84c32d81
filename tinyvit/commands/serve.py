"""Serve a web page to draw digits on, and a JSON API.

    tinyvit serve                    opens http://127.0.0.1:8000
    tinyvit serve --model MODEL      with another model
    tinyvit serve --host 0.0.0.0     for every computer in the network

The command needs fastapi and uvicorn, which the extra "app" installs. It stores
nothing, and the page loads nothing from other servers. Ctrl-C and SIGTERM stop
the server, with exit status 0.
"""

import contextlib
import ipaddress
import threading
import webbrowser

from tinyvit import console
from tinyvit.commands import CommandError, integer, load_digit_model, path, require_range
from tinyvit.data import load_mnist
from tinyvit.gpu.diagnosis import pip_install
from tinyvit.pretrained import pretrained_card

NEEDED = {"fastapi", "uvicorn", "pydantic", "starlette", "h11"}


def add_arguments(parser):
    text = "address to listen on; 0.0.0.0 for every computer in the network (default: 127.0.0.1, this computer only)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    text = "port to listen on; 0 for any free port (default: 8000)"
    parser.add_argument("--port", type=integer, default=8000, metavar="N", help=text)
    text = "do not open the page in a browser (default: open it)"
    parser.add_argument("--no-browser", action="store_true", help=text)
    text = "model file or folder of a run, for 28 x 28 pixels and ten digits (default: the model in the package)"
    parser.add_argument("--model", type=path, metavar="MODEL", help=text)
    text = "largest number of digits that the model reads at once (default: 16)"
    parser.add_argument("--batch", type=integer, default=16, metavar="N", help=text)
    text = "largest number of digits that wait to be read (default: 256)"
    parser.add_argument("--queue", type=integer, default=256, metavar="N", help=text)


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
        text = f"error: the server needs {error.name}, which is not installed: type {pip_install('app')}"
        raise CommandError(text, 2) from error
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
    # Ctrl-C and SIGTERM stop the server, so that they are no errors.
    stopping = contextlib.suppress(KeyboardInterrupt)
    with listen.listen(options.host, options.port) as listener, stopping, console.cleanup_after_signals():
        address = listen.address_of(listener)
        print(f"the page is at {address}, and Ctrl-C stops the server", flush=True)
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print("every computer in the network can open it at the address of this computer", flush=True)
        if not options.no_browser:  # the socket listens already, so that the browser waits for the first answer
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        listen.serve(app, listener)
