"""Kill training runs at random moments of every phase, resume them, and compare the results bit for bit.

    python benchmarks/kills.py                               200 kills, about 15 minutes on two cores
    python benchmarks/kills.py --count 10 --seed 3 --json FILE

Each kill sends SIGKILL, SIGTERM or SIGINT to a small run with two workers, which writes a checkpoint after almost
every step. The phases follow each other in turn, and so do the signals. The moment within a phase is random. Then the
run is resumed to its end, or started again if it had no checkpoint. Its model and its history must equal those of a
run that was never killed. No process, temporary file or shared memory may be left, and the exit status must be right.

This needs Linux, because it looks for processes in /proc. The exit status is 1 if anything was wrong.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkout import ROOT, environment
from turns import conditions

PHASES = ("start", "steps", "checkpoint", "validation", "final files", "resume")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MODEL = ["--width", "32", "--depth", "2", "--heads", "2", "--mlp-width", "64"]
RUN = [*MODEL, "--train-limit", "1320", "--test-limit", "500", "--workers", "2", "--epochs", "3"]
LONGEST = {  # seconds that a kill waits after the beginning of a phase
    "start": 1.5,
    "steps": 0.1,
    "checkpoint": 0.02,
    "validation": 0.05,
    "final files": 1.5,
    "resume": 1.0,
}
RESULTS = {
    "augmentation.png",
    "checkpoint.safetensors",
    "classification_report.txt",
    "confusion_matrix.png",
    "history.csv",
    "metrics.json",
    "misclassified.png",
    "model.safetensors",
    "training_curves.png",
}
LIMIT = 300  # seconds for one command
PROGRAM = """
import os, sys
sys.argv[0] = "tinyvit"  # the command answers signals from its first import on
sys.path.insert(0, {root!r})
from tinyvit import commands
from tinyvit.commands import train
from tinyvit.training import loop

loop.CHECKPOINT_SECONDS = 0.01
current = []

def mark(owner, name, phase):
    function = getattr(owner, name)
    def marked(*arguments, **keywords):
        current.append(phase)
        print(phase, file=sys.stderr, flush=True)
        try:
            return function(*arguments, **keywords)
        finally:
            current.pop()
            if current:
                print(current[-1], file=sys.stderr, flush=True)
    setattr(owner, name, marked)

mark(train, "resume", "resume")
mark(train, "finish", "final files")
mark(loop.Training, "_run_epoch", "steps")
mark(loop.Training, "save", "checkpoint")
mark(loop, "evaluate", "validation")
sys.exit(commands.main())
"""


def start(folder, *flags):
    """Start the command `train` in `folder`. Its standard error has one line per phase that begins."""
    (folder / "temporary").mkdir(exist_ok=True)
    program = PROGRAM.format(root=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", *flags],
        cwd=folder,
        env=environment() | {"TMPDIR": str(folder / "temporary")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts():
    """Answer Ctrl-C, also if a shell started this script in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(folder):
    """Resume the run in `folder`/run to its end, or start it if it has no checkpoint. Return an error or None."""
    begun = (folder / "run" / "checkpoint.safetensors").exists()
    process = start(folder, *(["--resume", "run"] if begun else [*RUN, "--out", "run"]))
    _, err = process.communicate(timeout=LIMIT)
    return None if process.returncode == 0 else f"resuming ended with status {process.returncode}: {err[-300:]}"


def results(folder):
    """Return the bytes of the model, and the history without its times."""
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    history = [{name: value for name, value in record.items() if name != "seconds"} for record in metrics["history"]]
    return (folder / "run" / "model.safetensors").read_bytes(), history


def children(pid):
    """Return the processes that a process has started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, path.read_text().split())
    return found


def alive(pid):
    """Return whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def leftovers(folder):
    """Return the files in the folder of a run that are no results, and the files of the shared memory."""
    files = (folder / "run").iterdir()
    strange = [path.name for path in files if path.name not in RESULTS]
    strange += [path.name for path in (folder / "temporary").iterdir()]
    return strange + [path.name for path in Path("/dev/shm").glob("tmp*")]  # as `tempfile` names them


def kill(template, phase, number, rng):
    """Kill one run, resume it, and return (the phase that the signal met, the outcome)."""
    expected, before = results(template), set(leftovers(template))
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        if phase == "resume":
            shutil.copytree(template / "stopped", folder / "run")
        process = start(folder, *(["--resume", "run"] if phase == "resume" else [*RUN, "--out", "run"]))
        met = "start"
        if phase != "start":
            times = {"steps": 6, "checkpoint": 30, "validation": 3}.get(phase, 1)  # it begins at least so often
            waits = rng.randrange(times)
            for line in process.stderr:
                met = line.strip() if line.strip() in PHASES else met
                if met == phase and (waits := waits - 1) < 0:
                    break
        time.sleep(rng.uniform(0.05 if phase == "start" else 0, LONGEST[phase]))  # Python itself needs 0.05 s
        workers = children(process.pid)
        process.send_signal(number)
        err = process.communicate(timeout=LIMIT)[1]
        met = next((line for line in reversed(err.splitlines()) if line in PHASES), met)
        wrong = []
        if process.returncode == 0:
            met = "ended before"
        elif process.returncode != (-number if number == signal.SIGKILL else 128 + number):
            wrong.append(f"status {process.returncode}")
        if "Traceback" in err:
            wrong.append(f"traceback: {err[-300:]}")
        deadline = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        wrong += ["a process is left"] * any(map(alive, workers))
        if error := finish(folder):
            wrong.append(error)
        elif results(folder) != expected:
            wrong.append("other bits")
        wrong += [f"left: {path}" for path in set(leftovers(folder)) - before]
    return met, "; ".join(wrong) or "same bits"


def measure(count, seed, jobs):
    """Return the counts of all kills by phase, signal and outcome."""
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        template = Path(name)
        process = start(template, *RUN, "--out", "run", "--stop-after", "1")
        _, err = process.communicate(timeout=LIMIT)
        if process.returncode:
            raise SystemExit(f"the run that is never killed ended with status {process.returncode}: {err}")
        shutil.copytree(template / "run", template / "stopped")
        if error := finish(template):
            raise SystemExit(error)

        def one(index):
            phase = PHASES[index % len(PHASES)]
            number = SIGNALS[index // len(PHASES) % len(SIGNALS)]
            return number.name, kill(template, phase, number, random.Random(f"{seed}, kill {index}"))

        counts = Counter()
        with ThreadPoolExecutor(jobs) as pool:
            for done, (name, (phase, outcome)) in enumerate(pool.map(one, range(count)), 1):
                counts[phase, name, outcome] += 1
                if outcome != "same bits" or done % 20 == 0:
                    print(f"{done} of {count}: {name} in {phase}: {outcome}", flush=True)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=int, default=200, metavar="N", help="number of kills (200)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the moments (0)")
    add("--jobs", type=int, default=2, metavar="N", help="number of runs at the same time (2)")
    add("--json", type=Path, metavar="FILE", help="also write the counts to FILE")
    options = parser.parse_args()
    if not Path("/proc/self/task").is_dir():
        parser.error("kills.py reads /proc, which only Linux has; run it on Linux")
    if options.count < 1 or options.jobs < 1:
        parser.error("--count and --jobs must be at least 1")
    began = time.monotonic()
    counts = measure(options.count, options.seed, options.jobs)
    rows = [
        {"phase": phase, "signal": name, "outcome": outcome, "count": number}
        for (phase, name, outcome), number in sorted(counts.items())
    ]
    for row in rows:
        print("{phase:<13} {signal:<8} {outcome:<10} {count:4}".format_map(row))
    if options.json:
        record = {
            "conditions": conditions("numba"),
            "seconds": round(time.monotonic() - began),
            "kills": options.count,
            "seed": options.seed,
            "counts": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(row["outcome"] != "same bits" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
