"""The commands `tinyvit COMMAND`, or `python -m tinyvit COMMAND`. Each is a file with `add_arguments` and `run`."""

import argparse
import errno
import importlib.metadata
import logging
import os
import re
import shlex
import sys
from pathlib import Path

from tinyvit import __version__, console
from tinyvit.checkpoint import CHECKPOINT, MODEL
from tinyvit.classifier import VisionTransformer, load_pretrained
from tinyvit.files import make_folder
from tinyvit.gpu import DeviceError
from tinyvit.gpu.diagnosis import is_out_of_memory, one_line

COMMANDS = {
    "train": "train a model on MNIST, or on another data set",
    "evaluate": "test a trained model again",
    "predict": "read the digit in a picture, or classify the images of a CSV file",
    "serve": "serve a web page to draw digits on, and a JSON API",
    "doctor": "check whether this machine can train, on the CPU and on a GPU",
}
DESCRIPTION = "A Vision Transformer whose every forward and backward pass is written by hand.\n\ncommands:\n"
DESCRIPTION += "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it notes when its own folder cannot be written
# What the errors of the system, of threads and of imports say when there is no memory.
NO_MEMORY = "Cannot allocate memory|can't start new thread|failed to map segment|cannot allocate memory"


class CommandError(Exception):
    """An error that ends a command with this message and this exit status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def main(arguments=None):
    """Run a command and return its exit status.

    arguments: a list of strings. By default they are those of the shell, and the command takes over the process. The
    status is 0 after success, 1 if the work failed or there is too little memory, 2 if the input is wrong, 130 after
    Ctrl-C and 143 after SIGTERM.
    """
    if arguments is not None:
        return run(list(arguments))
    console.take_over()
    try:
        status = run(sys.argv[1:])
    except SystemExit as error:  # argparse has printed the help or an error
        status = error.code
        try:
            print(end="", flush=True)
        except OSError as failure:
            status = report(f"error: {in_words(failure)}", 2)
    return console.end_with(status)


def run(arguments):
    """Run a command, print its errors, and return the exit status of `main`."""
    parser = make_parser("tinyvit", DESCRIPTION)
    parser.usage, parser.epilog = "tinyvit COMMAND [options]", "tinyvit COMMAND --help lists a command's options."
    parser.add_argument("--version", action="version", version=f"tinyvit {version()}", help="print the version")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.print_help()
        return 0
    options, advice = None, None
    try:
        from tinyvit.commands import doctor, evaluate, predict, serve, train  # imported here so that --help is quick

        command = {"train": train, "evaluate": evaluate, "predict": predict, "serve": serve, "doctor": doctor}[name]
        parser = make_parser(f"tinyvit {name}", command.__doc__)
        command.add_arguments(parser)
        options, unknown = parser.parse_known_args(arguments[1:])
        if unknown:
            parser.error(f"unknown argument {unknown[0]}: tinyvit {name} --help lists the options")
        advice = command.memory_advice
        if console.memory_is_limited() and name in ("train", "evaluate"):
            import sklearn.metrics  # needed at the end; too little memory must show before hours of training
        status = command.run(options) or 0
        print(end="", flush=True)  # an error of the standard output is reported here, not when Python ends
        return status
    except KeyboardInterrupt:
        return report(*console.interruption())
    except CommandError as error:
        return report(str(error), error.status)
    except (DeviceError, ArithmeticError, ValueError) as error:
        return report(f"error: {error}", 2)
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if is_out_of_memory(error) or re.search(NO_MEMORY, str(error)):
            if console.memory_is_limited():
                advice = "raise the limit of ulimit, or give --workers 1"
            else:
                advice = "close other programs" if advice is None else advice(options)
            return report(f"error: not enough memory: {advice} ({one_line(error)})", 1)
        if not isinstance(error, OSError):
            raise
        todo = ": type ulimit -n 256" if error.errno == errno.EMFILE else ""
        return report(f"error: {in_words(error)}{todo}", 2)


def version():
    """Return the version of tinyvit, and whether it is not installed."""
    try:
        importlib.metadata.version("tinyvit")
    except importlib.metadata.PackageNotFoundError:
        return f"{__version__} (not installed)"
    return __version__


def make_parser(name, description):
    """Return a parser for the command `name` that prints `description` unchanged and accepts no abbreviated flags."""
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def report(message, status):
    """Print an error and return the exit status."""
    print(message, file=sys.stderr)
    return status


def in_words(error):
    """Return the text of an `OSError` as "FILE: reason", without its number."""
    name = error.filename
    if name is None and error.errno == errno.EPIPE:
        name = "standard output"
    elif name is None:
        try:
            print(end="", flush=True)
        except OSError:  # the text that could not be printed is still in the buffer
            name = "standard output"
    reason = error.strerror or str(error)
    return reason if name is None else f"{name}: {reason}"


# ---- what options accept ----


def integer(text):
    """Return the integer that an option gives."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, not {text!r}") from None


def size(text):
    """Return the side, or the pair of rows and columns, that an option gives as N or NxM."""
    try:
        rows, *columns = map(int, text.lower().split("x"))
    except ValueError:
        rows, columns = 0, [0, 0]
    if len(columns) > 1:
        raise argparse.ArgumentTypeError(f"expected an integer, or two as in 4x7, not {text!r}")
    return (rows, *columns) if columns else rows


def number(text):
    """Return the number that an option gives."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}") from None


def path(text):
    """Return the path that an option gives."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, not an empty text")
    return Path(text)


def require_range(options, name, least, most=None):
    """Raise `ValueError` if the option `name`, an integer or None, is below `least` or above `most`."""
    value = getattr(options, name.replace("-", "_"))
    if value is not None and not least <= value <= (value if most is None else most):
        expected = f"at least {least}" if most is None else f"from {least} to {most:,}"
        raise ValueError(f"--{name} must be {expected}, not {value}")


def make_option_folder(option, folder):
    """Create the folder that an option gives, or raise `ValueError` with what to do."""
    try:
        make_folder(folder)
    except OSError as error:
        raise ValueError(f"{option} {folder}: {error.strerror}") from error


def require_new_file(option, file):
    """Raise `ValueError` with what to do unless the file that an option gives can be written."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: expected a file, found a folder: add a file name")
    if file.exists() and not file.is_file():
        raise ValueError(f"{option} {file}: expected a file, found a device or a pipe: give another name")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: {file.parent} is not a folder: create it, or give another file")
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ValueError(f"{option} {file}: no permission to write this file: give another file")


def model_file(source):
    """Return the model file that `source`, a model file or the folder of a run, names.

    Raises `ValueError` with what to do if it is missing.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder: give a model file, or the folder of a finished run")
    if not source.is_dir():
        return source
    if not (source / MODEL).exists():
        advice = "give a model file, or the folder of a finished run"
        if (source / CHECKPOINT).exists():
            advice = f"its run has not ended: continue it with tinyvit train --resume {shlex.quote(str(source))}"
        raise ValueError(f"{source}: this folder has no {MODEL}: {advice}")
    return source / MODEL


def load_digit_model(source):
    """Return the model of a file or of a run's folder, or the model in the package for None.

    Raises `ValueError` unless the model is for 28 x 28 pixels and ten classes.
    """
    model = load_pretrained() if source is None else VisionTransformer.load(model_file(source))
    config = model.config
    if (config.image_size, config.channels, config.classes) != (28, 1, 10):
        found = f"{size_of_images(config)} and {config.classes} classes"
        raise ValueError(f"{source}: expected a model for 28 x 28 pixels and 10 classes, found {found}")
    return model


def size_of_images(config):
    """Return the size of a model's images in words."""
    rows, columns = config.image_shape
    return f"{rows} x {columns} pixels" + (f" of {config.channels} numbers" if config.channels > 1 else "")


def require_size(source, images, config):
    """Raise `ValueError` with the name of the data unless the images (N, R, C) or (N, R, C, 3) fit the model."""
    rows, columns, *channels = images.shape[1:]
    if (rows, columns) != config.image_shape or (channels or [1]) != [config.channels]:
        found = f"{rows} x {columns} pixels" + (f" of {channels[0]} numbers" if channels else "")
        raise ValueError(f"{source}: the model expects images of {size_of_images(config)}, found {found}")
