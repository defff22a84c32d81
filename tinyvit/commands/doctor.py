"""Check whether this machine can train, on the CPU and on a GPU.

Prints one line per check, with what to type where something is wrong.
"""

from tinyvit import doctor


def add_arguments(parser):
    text = "cpu: check no GPU; gpu: fail if no GPU computes; auto: check both (auto)"
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help=text)


def memory_advice(options):
    return "close other programs"


def run(options):
    return doctor.main(options.device)
