"""The commands `tinyvit COMMAND`, or `python -m tinyvit COMMAND`. Each is a file with `add_arguments` and `run`."""

import argparse
import importlib.metadata
import logging
import os
import sys
from pathlib import Path

from tinyvit import __version__
from tinyvit.classifier import VisionTransformer, load_pretrained
from tinyvit.gpu import DeviceError
from tinyvit.gpu.diagnosis import is_out_of_memory, one_line

COMMANDS = {
    "train": "train a model on MNIST, or on another data set in the same format",
    "evaluate": "test a trained model again",
    "predict": "read the digit in a picture",
    "serve": "serve a web page to draw digits on, and a JSON API",
    "doctor": "check whether this machine can train, on the CPU and on a GPU",
}
DESCRIPTION = "A Vision Transformer whose every forward and backward pass is written by hand.\n\ncommands:\n"
DESCRIPTION += "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it notes when its own folder cannot be written
MODEL = "model.safetensors"  # the model's file in the folder of a run


class CommandError(Exception):
    """An error that ends a command with this message and this exit status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def main(arguments=None):
    """Run a command and return its exit status.

    arguments: a list of strings, by default those of the shell. The status is 0 after success, 1 if the work failed,
    2 if the input is wrong, and 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser("tinyvit", DESCRIPTION)
    parser.usage, parser.epilog = "tinyvit COMMAND [options]", "tinyvit COMMAND --help lists a command's options."
    parser.add_argument("--version", action="version", version=f"tinyvit {version()}", help="print the version")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.print_help()
        return 0
    from tinyvit.commands import doctor, evaluate, predict, serve, train  # imported here so that --help is quick

    command = {"train": train, "evaluate": evaluate, "predict": predict, "serve": serve, "doctor": doctor}[name]
    parser = make_parser(f"tinyvit {name}", command.__doc__)
    command.add_arguments(parser)
    options = parser.parse_args(arguments[1:])
    try:
        return command.run(options) or 0
    except KeyboardInterrupt:
        return report("interrupted", 130)
    except CommandError as error:
        return report(str(error), error.status)
    except OSError as error:
        return report(f"error: {in_words(error)}", 2)
    except (DeviceError, ArithmeticError, ValueError) as error:
        return report(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:  # a GPU without free memory raises either
        if not is_out_of_memory(error):
            raise
        return report(f"error: not enough memory: {command.memory_advice(options)} ({one_line(error)})", 2)


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
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


# ---- what options accept ----


def integer(text):
    """Return the integer that an option gives."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, not {text!r}") from None


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


def make_folder(option, folder):
    """Create the folder that an option gives, unless it exists. Raise `ValueError` with what to do if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        reason = f"{file} is a file" if file else in_words(error)
        raise ValueError(f"{option} {folder}: cannot create this folder ({reason}): give another folder") from error


def require_new_file(option, file):
    """Raise `ValueError` with what to do unless the file that an option gives can be written."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: expected a file, found a folder: add a file name")
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
        raise ValueError(f"{source}: this folder has no {MODEL}: give a model file, or the folder of a finished run")
    return source / MODEL


def load_digit_model(source):
    """Return the model of a file or of a run's folder, or the model in the package for None.

    Raises `ValueError` unless the model is for 28 x 28 pixels and ten classes.
    """
    model = load_pretrained() if source is None else VisionTransformer.load(model_file(source))
    side, classes = model.config.image_size, model.config.classes
    if (side, classes) != (28, 10):
        expected, found = "28 x 28 pixels and 10 classes", f"{side} x {side} pixels and {classes} classes"
        raise ValueError(f"{source}: expected a model for {expected}, found {found}")
    return model
