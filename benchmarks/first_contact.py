"""Check a machine with an NVIDIA GPU for the first time, in two parts of at most nine minutes each.

    python benchmarks/first_contact.py 1 --out DIR    machine, doctor, a step, tests, checkers, a short benchmark
    python benchmarks/first_contact.py 2 --out DIR    the full benchmark, and counters of some kernels
    python benchmarks/first_contact.py --step tf32    only the step of the checkers, at one precision

Each check is a process with a time limit. If a check fails or takes too long, the others still run. A check that
needs a missing tool is skipped, and one line names the tool. After every check, DIR/part1.json or DIR/part2.json has
the results so far and DIR/NAME.txt has the output. The script needs Linux and works without an installation.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from checkout import ROOT, environment

MINUTES = 9.0  # length of a part; the limits below are for this length and shrink with it
PRECISIONS = ("float32", "tf32", "bfloat16")
CHECKERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BATCH, LAST, EPOCHS = 16, 5, 3  # an epoch of the step is two batches and a smaller one
HERE = Path(__file__).resolve()
CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute")


# ---- the step ----


def check_step(precision, model_config=None):
    """Take the same steps as launches and as a graph, and compare their results bit for bit.

    Every array is a separate allocation, so that a checker can find accesses outside it. precision: the precision of
    the matrix products; model_config: a `ViTConfig`, by default the default model with two blocks. Returns the mean
    loss of the last epoch. Raises `AssertionError` if the two differ, a number is not finite or no weight changed.
    """
    import numpy as np

    from tinyvit.backend import to_host
    from tinyvit.gpu import get_backend
    from tinyvit.model import ViTConfig
    from tinyvit.training import TUNED
    from tinyvit.training.state import new_state
    from tinyvit.training.step import make_step

    backend = get_backend("gpu")
    model_config = model_config or ViTConfig(depth=2)
    # This recipe uses every feature of a step: clipping, weight decay, smoothing, averages and augmentation.
    config = replace(TUNED, epochs=EPOCHS, batch_size=BATCH)
    count = 2 * BATCH + LAST
    images = np.random.default_rng(1).integers(0, 256, (count, *model_config.image_shape), dtype=np.uint8)
    labels = np.arange(count) % model_config.classes
    results = []
    with backend.xp.cuda.using_allocator(None):  # CuPy's pool would place several arrays in one allocation
        for kernels in ("launches", "graph"):
            state = new_state(model_config, config, backend)
            first = to_host(state.parameters.flat).copy()
            step = make_step(
                state,
                images,
                labels,
                model_config,
                config,
                backend,
                precision=precision,
                kernels=kernels,
            )
            with step:
                for epoch in range(EPOCHS):
                    step.begin_epoch(epoch)
                    counts = [step() for _ in range(step.steps)]
                    totals = step.totals()
            if counts != [BATCH, BATCH, LAST]:
                raise AssertionError(f"the batches of an epoch must be {[BATCH, BATCH, LAST]}, not {counts}")
            arrays = {name: to_host(array).copy() for name, array in state.arrays().items()}
            results.append({**arrays, "totals": np.array(totals)})
            if np.array_equal(first, arrays["parameters"]):
                raise AssertionError(f"{kernels}: no weight has changed")
    for name, launched in results[0].items():
        if not np.isfinite(launched).all():
            raise AssertionError(f"{name} has elements that are not finite")
        if not np.array_equal(launched, results[1][name]):
            raise AssertionError(f"graph and launches differ in {name}")
    return float(results[0]["totals"][0]) / count


def print_machine():
    """Print the known properties of the machine, the libraries and the card as JSON."""
    import gpu
    import gpu_work
    from turns import conditions

    properties = {"conditions": conditions("torch"), "nvidia_smi": gpu.read_card()}
    print(json.dumps(properties, indent=2), flush=True)
    print(json.dumps(gpu_work.Ours("graph").about(), indent=2))


# ---- the checks ----


@dataclass(frozen=True)
class Check:
    """A command that checks one thing. Its seconds are for a part of `MINUTES`."""

    name: str  # its output is NAME.txt
    about: str
    command: list
    most: float  # time limit in seconds
    least: float  # seconds that earlier checks must leave
    expects: str = ""  # a regular expression that the output must contain
    lines: int = 4  # number of last lines of the output to print
    missing: str = ""  # the reason if it cannot run here
    start: float | None = None  # for gpu.py: the seconds that it needs in addition to its --minutes


def first_part(options):
    """Return the checks of the first part."""
    script, out = str(HERE), options.out
    checks = [
        Check("machine", "the machine and the versions", python(script, "--machine"), most=30, least=10, lines=14),
        Check(
            "torch",
            "PyTorch, for the comparison",
            python("-c", "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"),
            most=30,
            least=10,
            missing=without("torch"),
        ),
        Check(
            "doctor",
            "driver, NVRTC, cuBLAS, a kernel, a training",
            python("-m", "tinyvit", "doctor", "--device", "gpu"),
            most=90,
            least=40,
            lines=10,
        ),
    ]
    for precision in PRECISIONS:
        about = f"a step as launches and as a graph, {precision}"
        command = python(script, "--step", precision)
        checks.append(Check(f"step-{precision}", about, command, most=60, least=20, expects="equal bit for bit"))
    checks.append(
        Check(
            "tests",
            "the tests marked gpu on the card",
            tests_command(options.tests),
            most=240,
            least=110,
            expects=r"\d+ passed",
            lines=12,
            missing=without("pytest") or without("hypothesis"),
        )
    )
    sanitizer, missing = program("compute-sanitizer")
    for checker in CHECKERS:
        command = [sanitizer, "--tool", checker, "--error-exitcode", "9", *python(script, "--step", "tf32")]
        about = f"{checker} on the step"
        checks.append(Check(checker, about, command, most=60, least=25, expects="SUMMARY: 0 ", missing=missing))
    command = benchmark_command(out / "quick.json", options.benchmark, "--quick")
    checks.append(Check("quick", "a short benchmark", command, most=150, least=90, lines=60, start=30))
    return checks


def second_part(options):
    """Return the checks of the second part."""
    profiler, missing = program("ncu")
    counters = [profiler, "--clock-control", "none", "--set", "basic", "-k", "regex:linear|attention|cross"]
    counters += ["-s", "60", "-c", "10", *python(str(HERE), "--step", "tf32")]
    command = benchmark_command(options.out / "gpu.json", options.benchmark)
    return [
        Check("gpu", "the full benchmark", command, most=490, least=300, lines=120, start=100),
        Check(
            "ncu",
            "counters of ten kernels",
            counters,
            most=60,
            least=50,
            expects="PROF.*Profiling",
            missing=missing,
        ),
    ]


def python(*arguments):
    """Return a command that runs this Python with these arguments."""
    return [sys.executable, *arguments]


def tests_command(paths):
    """Return the command of the tests marked `gpu`, in at most eight processes, with one line per result."""
    command = python("-m", "pytest", "--device", "gpu", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider")
    command += ["-o", "filterwarnings=default"]  # warnings of CuPy and PyTorch are no failures
    if not without("xdist"):
        command += ["-n", str(min(8, os.cpu_count()))]
    return [*command, *paths]


def benchmark_command(record, more, *flags):
    """Return the command of gpu.py. more: further flags in one text."""
    return python(str(HERE.parent / "gpu.py"), *flags, *shlex.split(more), "--json", str(record))


def without(module):
    """Return a text if a module is not installed, or "" if it is installed."""
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def program(name):
    """Return the path of a CUDA program and "", or its name and the reason if it is missing."""
    folders = [os.path.join(os.environ.get("CUDA_PATH", ""), "bin"), *CUDA_FOLDERS]
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    return (path, "") if path else (name, f"{name} is missing: install the CUDA toolkit")


# ---- a part ----


def run_part(number, checks, out, minutes):
    """Run the checks one after the other and return their records. Write all records after each check."""
    scale, began = minutes / MINUTES, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for place, check in enumerate(checks):
        later = sum(other.least for other in checks[place + 1 :] if not other.missing)
        left = 60 * minutes - (time.monotonic() - began)
        limit = min(scale * check.most, left - scale * later)
        print(f"== {check.about} ({time.monotonic() - began:.0f} s)", flush=True)
        record = {"name": check.name, "about": check.about}
        if check.missing:
            record |= {"state": "missing", "why": check.missing}
            print(f"   skipped: {check.missing}", flush=True)
        elif limit < 1:
            record |= {"state": "left out", "why": f"no time left in {minutes:g} minutes"}
            print(f"   left out: {record['why']}", flush=True)
        else:
            command = list(check.command)
            if check.start is not None:
                command += ["--minutes", f"{max(0.05, (limit - scale * check.start) / 60):.2f}"]
            record |= run(command, limit, out / f"{check.name}.txt", check.expects)
            for line in record["end"][-check.lines :]:
                print(f"   {line}")
            print(f"   {record['state']}: {record['seconds']:.0f} of {limit:.0f} s", flush=True)
        records.append(record)
        write(out / f"part{number}.json", {"part": number, "minutes": minutes, "checks": records})
    return records


def run(command, limit, output, expects=""):
    """Run a command for at most `limit` seconds with its output in the file `output`. Return the record, a dict."""
    began = time.monotonic()
    variables = environment() | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    record = {"command": shlex.join(command), "limit": round(limit, 1), "output": output.name, "exit_status": None}
    with open(output, "wb") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group, which is killed with all its children
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            state = "failed"
        else:
            try:
                record["exit_status"] = process.wait(limit)
                state = "failed" if process.returncode else "ok"
            except subprocess.TimeoutExpired:
                state = "timed out"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    text = output.read_text(encoding="utf-8", errors="replace")
    if state == "ok" and not re.search(expects, text):
        state = "failed"
    end = [line.rstrip()[:200] for line in text.splitlines() if line.strip()][-120:]
    return record | {"state": state, "seconds": round(time.monotonic() - began, 1), "end": end}


def write(path, found):
    """Write a record as JSON. It replaces the file in one step, as the machine may stop at any moment."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="?", type=int, choices=[1, 2], help="the part, 1 or 2")
    add("--out", type=Path, default=ROOT / "runs" / "first_contact", metavar="DIR",
        help="folder for the records (runs/first_contact)")  # fmt: skip
    add("--minutes", type=float, default=MINUTES, metavar="M", help=f"length of the part ({MINUTES:g})")
    add("--tests", nargs="+", default=["tests"], metavar="PATH", help="the tests to run (all)")
    add("--benchmark", default="", metavar="FLAGS", help="flags for gpu.py, in one text")
    add("--step", choices=PRECISIONS, metavar="NAME", help=f"only the step, at {', '.join(PRECISIONS)}")
    add("--machine", action="store_true", help="only print the properties of the machine")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.step:
        loss = check_step(options.step)
        print(f"{options.step}: launches and graph are equal bit for bit, mean loss {loss:.4f}")
        return 0
    if options.machine:
        print_machine()
        return 0
    if options.part is None or options.minutes <= 0:
        parser.error(f"give the part, 1 or 2, and --minutes above 0, not {options.part} and {options.minutes:g}")
    checks = first_part(options) if options.part == 1 else second_part(options)
    records = run_part(options.part, checks, options.out, options.minutes)
    good, skipped = (sum(record["state"] == state for record in records) for state in ("ok", "missing"))
    bad = [record["name"] for record in records if record["state"] not in ("ok", "missing")]
    print(f"== part {options.part}: {good} ok, {skipped} skipped, not ok: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
