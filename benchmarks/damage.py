"""Damage files at random, and count what their readers do with them.

    python benchmarks/damage.py --count 100000 --format checkpoint --json damage.json
    python benchmarks/damage.py --count 1 --first 1234 --format checkpoint      one case again

The formats are the checkpoint of a run, a model file, idx files raw and compressed, pictures, and data sets of twelve
forms, such as npz and CSV. The kinds of damage and the right outcomes are in tests/support/damaged_files.py. A case
follows from the seed and its number. The exit status is 1 if a file was read with other content, a reader crashed, a
reader took over 0.1 s of processor time (1 s for a data set, and 0.5 s for a picture, whose damaged size may be
millions of pixels), or a data set needed over 300 MB of memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from checkout import ROOT

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each process has one core
sys.path.insert(0, str(ROOT / "tests" / "support"))

from damaged_files import FINDINGS, FORMATS, run_cases
from turns import conditions

from tinyvit.files import write_atomically

PIECE = 500  # cases per task
MEMORY = 4 << 30  # bytes that one process may use, so that a wrong size is an error and not a slow machine


def limit_memory():
    """Limit the memory of this process, if the system can."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_piece(format_name, first, count, seed):
    with tempfile.TemporaryDirectory(prefix="tinyvit-") as folder:
        return run_cases(format_name, first=first, count=count, seed=seed, folder=folder)


def measure(format_name, options):
    """Return the record of one format."""
    began, total, findings, slowest = time.monotonic(), Counter(), [], 0.0
    stop = options.first + options.count
    pieces = [(start, min(PIECE, stop - start)) for start in range(options.first, stop, PIECE)]
    with ProcessPoolExecutor(options.processes, initializer=limit_memory) as pool:
        tasks = [pool.submit(run_piece, format_name, first, count, options.seed) for first, count in pieces]
        for number, task in enumerate(tasks, 1):
            found = task.result()
            total.update(found["outcomes"])
            findings += found["findings"]
            slowest = max(slowest, found["slowest"])
            if number % 20 == 0:
                print(f"{format_name}: {sum(total.values()):,} of {options.count:,}", file=sys.stderr, flush=True)
    return {
        "format": format_name,
        "count": options.count,
        "first": options.first,
        "seed": options.seed,
        "outcomes": dict(total),
        "slowest_seconds": round(slowest, 4),
        "seconds": round(time.monotonic() - began, 1),
        "findings": findings[:20],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="damaged files per format (2000)")
    parser.add_argument("--format", choices=FORMATS, action="append", help="format; may be repeated (all)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all cases (0)")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes (one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.first < 0:
        parser.error(f"--count must be at least 1 and --first at least 0, not {options.count} and {options.first}")
    records = []
    for name in options.format or FORMATS:
        record = measure(name, options)
        records.append(record)
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in record["outcomes"].items())
        print(f"{name}: {counts}; slowest {1e3 * record['slowest_seconds']:.0f} ms; {record['seconds']:.0f} s")
        for finding in record["findings"]:
            print("    {case}: {outcome} after {damage}: {error}".format(**finding))
        if options.json:
            found = {"conditions": conditions("pillow"), "records": records}
            write_atomically(options.json, json.dumps(found, indent=2) + "\n")
    return int(any(record["outcomes"][outcome] for record in records for outcome in FINDINGS))


if __name__ == "__main__":
    sys.exit(main())
