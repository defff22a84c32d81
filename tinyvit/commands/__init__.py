"""The commands: `tinyvit COMMAND` or `python -m tinyvit COMMAND`. Each is a file with `add_arguments` and `run`."""

import argparse
import sys

from tinyvit.classifier import VisionTransformer, load_pretrained
from tinyvit.gpu import DeviceError
from tinyvit.gpu.diagnosis import is_out_of_memory, one_line

COMMANDS = {
    "train": "train a model on MNIST, or on any data set of the same form",
    "evaluate": "test a trained model again",
    "predict": "read the digit in a picture",
    "serve": "serve a page to draw digits on, and a JSON API",
    "doctor": "check whether this machine can train, on the CPU and on a GPU",
}
DESCRIPTION = "A Vision Transformer whose every forward and backward pass is written by hand.\n\ncommands:\n"
DESCRIPTION += "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())


class CommandError(Exception):
    """A command ends with this message and this exit status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def main(arguments=None):
    """Run a command and return its exit status.

    arguments: a list of strings, by default those of the shell. The status is 0 if all is well, 1 if the work failed,
    2 if the input is wrong, and 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser("tinyvit", DESCRIPTION)
    parser.usage, parser.epilog = "tinyvit COMMAND [options]", "tinyvit COMMAND --help lists a command's options."
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.print_help()
        return 0
    from tinyvit.commands import doctor, evaluate, predict, serve, train  # here, so that --help is quick

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
    except (DeviceError, ArithmeticError, ValueError, OSError) as error:
        return report(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:  # a GPU without memory raises either
        if not is_out_of_memory(error):
            raise
        return report(f"error: not enough memory: {command.memory_advice(options)} ({one_line(error)})", 2)


def make_parser(name, description):
    """Return a parser for the command `name` that prints `description` as it is and takes no abbreviated flags."""
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


def require_range(options, name, least, most=None):
    """Raise `ValueError` if the option `name`, an integer or None, is below `least` or above `most`."""
    value = getattr(options, name.replace("-", "_"))
    if value is not None and not least <= value <= (value if most is None else most):
        expected = f"at least {least}" if most is None else f"from {least} to {most:,}"
        raise ValueError(f"--{name} must be {expected}, not {value}")


def load_digit_model(path):
    """Return the model of a file, or the one in the package if `path` is None.

    Raises `ValueError` unless it reads 28 x 28 pixels and has ten classes.
    """
    if path is not None and path.is_dir():  # of a run
        path = path / "model.safetensors"
    model = load_pretrained() if path is None else VisionTransformer.load(path)
    side, classes = model.config.image_size, model.config.classes
    if (side, classes) != (28, 10):
        expected, found = "28 x 28 pixels and 10 classes", f"{side} x {side} pixels and {classes} classes"
        raise ValueError(f"{path}: expected a model for {expected}, found {found}")
    return model
