"""Measure the peak memory of a whole training run: imports, data, all processes, evaluation and pictures.

    python benchmarks/memory.py                                          one epoch of the default recipe, twice
    python benchmarks/memory.py --json FILE -- --epochs 2 --workers 1    flags after -- go to the training command

This needs Linux. It reads the memory of all processes twenty times per second and adds it up. Shared pages count once
per process. The system also records the peak of each process, which catches a peak between two readings. The result
is the larger of the sum and the largest of these peaks. The first run uses NumPy only. If Numba is installed, a
second run uses compiled loops.
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

from tinyvit.backend import compiled_loops


def measure(flags):
    """Train once and return the memory of all processes in megabytes, a dict."""
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
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    add("flags", nargs="*", default=["--epochs", "1"], help="flags for examples/train_mnist.py (--epochs 1)")
    options = parser.parse_args()
    if not Path("/proc/self/task").is_dir():
        parser.error("memory.py reads /proc, which only Linux has; run it on Linux")
    figures = measure([*options.flags, "--loops", "off"])
    if compiled_loops() is not None:
        figures["compiled_loops"] = measure([*options.flags, "--loops", "on"])
    for name, found in (("NumPy only", figures), ("compiled loops", figures.get("compiled_loops"))):
        if found:
            print(f"{name}: {found['peak_megabytes']} MB together, {found['processes']} MB per process")
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions("numba"), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
