"""What can be done with tinyvit from a shell: `python -m tinyvit --help`."""

import argparse
import sys

from tinyvit import doctor

DESCRIPTION = """\
A Vision Transformer that learns MNIST with no framework under it.

From the folder of the project:
    python examples/train_mnist.py           trains it, in about five minutes on two cores
    python examples/evaluate_mnist.py RUN    evaluates a trained model again
Each of them says with --help what it can do.
"""


def main(arguments=None):
    """Run a command of `python -m tinyvit`; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyvit", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    text = "say whether this machine can train, on the CPU and on a GPU, and what to type if not"
    command = commands.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument(
        "--device",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="cpu looks at no GPU; gpu fails if none computes; auto says how it is (auto)",
    )
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return doctor.main(options.device)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
