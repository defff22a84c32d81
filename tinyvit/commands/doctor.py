"""Check whether this machine can train, on the CPU and on a GPU.

Prints one line per check. A line about a fault says what to type.
"""

from tinyvit import doctor


def add_arguments(parser):
    text = "cpu: ignore GPUs; gpu: fail unless a GPU works; auto: report on a GPU if there is one (default: auto)"
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help=text)


def memory_advice(options):
    return "close other programs"


def run(options):
    return doctor.main(options.device)
