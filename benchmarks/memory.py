"""The most memory that a whole training run takes: imports, data, all its processes, evaluation and pictures.

    python benchmarks/memory.py                                       one epoch of the default recipe
    python benchmarks/memory.py --json FILE -- --epochs 2 --workers 1    what follows -- goes to the training command

Linux only. The memory of all processes is read twenty times a second and added up; pages that they share count for
each. A peak between two readings is not missed where it is one process's own: the system keeps that, and the larger
of the two figures is reported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkout import ROOT, environment
from turns import conditions, processes


def measure(flags):
    """Train once and return the figures, a dict."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(ROOT / "examples" / "train_mnist.py"), "--out", f"{scratch}/run", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
        together, each = 0.0, {}
        while process.poll() is None:
            now = processes(str(process.pid))
            together = max(together, sum(rss for rss, _ in now.values()))
            each |= {name: max(most, each.get(name, 0)) for name, (_, most) in now.items()}
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(process.returncode)
    return {
        "peak_megabytes": round(max(together, *each.values())),
        "processes": sorted((round(most) for most in each.values()), reverse=True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here too")
    parser.add_argument("flags", nargs="*", default=["--epochs", "1"], help="for examples/train_mnist.py")
    options = parser.parse_args()
    if not Path("/proc/self/task").is_dir():
        parser.error("this reads /proc, which only Linux has")
    figures = measure(options.flags)
    print(f"{figures['peak_megabytes']} MB together at most; each process at most {figures['processes']} MB")
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
