"""Measure training on an NVIDIA GPU, compare it with PyTorch, and compare every kernel with its floor.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json    everything, within eight minutes
    python benchmarks/gpu.py --quick                               batch 64, few rounds, no torch.compile
    python benchmarks/gpu.py --recorded FILE                       print the results of an earlier run

The first part trains ten epochs with the technical note's recipe and its augmentation, at each precision.

The second part compares training steps. tinyvit runs a step as a CUDA graph, as single launches and as plain CuPy
operations. PyTorch takes steps on batches that are ready on the device, which is less work. All take turns, round by
round. A ratio is the median, with quartiles, of the ratio of two times from the same round. Each time is taken
between two synchronisations.

The third part runs every kernel of a step many times in one CUDA graph, on the buffers of a real step. It compares
the time with the larger of two floors: the kernel's bytes at the speed of a large copy, and its operations at the
speed of a large matrix product of cuBLAS in the same precision. Both speeds are measured, too.

Every contestant is a separate process. If one is missing, fails or has no time left, the report says so and the
others continue. The benchmark reads the settings of the card and never changes them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import floors
from turns import Remote, RemoteError, conditions, quartiles

from tinyvit.files import write_atomically

CONTESTANTS = {  # the class in gpu_work.py, its mode, and the label in tables
    "graph": ("Ours", "graph", "tinyvit, one CUDA graph per step"),
    "launches": ("Ours", "launches", "tinyvit, the same kernels launched one by one"),
    "plain": ("Ours", "off", "tinyvit, plain CuPy operations"),
    "torch": ("TorchSteps", "eager", "PyTorch eager"),
    "torch-graph": ("TorchSteps", "graph", "PyTorch eager, the whole step in one CUDA graph"),
    "torch-compiled": ("TorchSteps", "compiled", 'PyTorch, torch.compile(mode="max-autotune")'),
}
GOALS = {"torch": (3, 10), "torch-compiled": (1.2, 2)}  # the goal and the aim for the ratio to tinyvit's step
START, BUILD, TURN, TRAIN = 180, 150, 60, 120  # time limits of a process in seconds
COMPILE = 240  # the time limit of torch.compile in seconds
SMI = (
    "name,driver_version,memory.total,compute_mode,persistence_mode,power.limit,power.draw,temperature.gpu,"
    "utilization.gpu,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
)
ENVIRONMENT = ("CUDA_", "CUPY_", "NVIDIA_TF32", "TORCH", "PYTORCH")
BETWEEN = 0.5  # approximate seconds per case and contestant outside its turns
NO_GPU = ("DeviceError", "CuPyMissing")


def log(text):
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


class Processes:
    """The processes, one per contestant. Each starts at its first call and again after a failure."""

    def __init__(self):
        self._remotes, self._absent = {}, {}
        self.about = {}  # the versions of their libraries

    def call(self, name, method, *arguments, seconds):
        """Return the result of a contestant's method. Raises `RemoteError`."""
        if name in self._absent:
            raise RemoteError("absent", self._absent[name])
        try:
            if name not in self._remotes:
                self._start(name)
            return self._remotes[name].call(method, *arguments, seconds=seconds)
        except RemoteError as error:
            self._remotes.pop(name, None)
            if error.kind == "absent":
                self._absent[name] = str(error)
            elif error.kind not in NO_GPU and error.log:
                log("\n".join(f"  | {line}" for line in error.log.splitlines()))
            raise

    def _start(self, name):
        kind, mode, _ = CONTESTANTS.get(name, ("KernelTimes", None, None))
        arguments = {} if mode is None else {"mode": mode}
        self._remotes[name] = Remote("gpu_work", kind, seconds=START, **arguments)
        self.about |= self._remotes[name].call("about", seconds=TURN)

    def close(self):
        for remote in self._remotes.values():
            remote.close()


def failure(error):
    """Return the entry of a record that replaces its figures."""
    return {"absent" if error.kind == "absent" else "failed": str(error)}


class Benchmark:
    """All measurements of one run. They are in `found`, which is written to a file after each."""

    def __init__(self, options):
        self.options, self.processes = options, Processes()
        self.began = time.monotonic()
        self.compiling = 60.0  # the expected seconds of torch.compile
        self.found = {"training": [], "steps": [], "ceilings": {}, "kernels": []}

    def left(self):
        """Return the remaining seconds."""
        return 60 * self.options.minutes - (time.monotonic() - self.began)

    def run(self):
        """Take all measurements."""
        options = self.options
        card = self.processes.call("graph", "about", seconds=TURN)  # DeviceError without a GPU
        log(f"{card['card']}, at most {options.minutes:g} minutes")
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "recorded")}
        environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}
        self.found = {"conditions": conditions("torch"), "settings": settings, **self.found}
        self.found["conditions"]["environment"] |= environment
        self.found["conditions"]["nvidia_smi"] = {"before": read_card()}

        first, *others = options.batches
        for precision in options.precisions:
            self.train(precision)
        cases = [(first, precision) for precision in options.precisions]
        later = [(batch, precision) for batch in others for precision in options.precisions]
        for done, (batch, precision) in enumerate(cases, 1):
            self.steps(batch, precision, after=len(cases) + len(later) - done)
        self.ceilings()
        for batch, precision in cases:
            self.kernels(batch, precision)
        for done, (batch, precision) in enumerate(later, 1):
            self.steps(batch, precision, after=len(later) - done)
        for batch, precision in later:
            self.kernels(batch, precision)
        self.keep()

    def keep(self):
        """Write the results so far."""
        conditions = self.found["conditions"]
        conditions |= self.processes.about
        conditions["nvidia_smi"]["after"] = read_card()
        self.found["minutes"] = round((time.monotonic() - self.began) / 60, 2)
        if self.options.json:
            write_atomically(self.options.json, json.dumps(self.found, indent=2) + "\n")

    def train(self, precision):
        """Time whole trainings. A short one comes first, which compiles."""
        options = self.options
        record = {"precision": precision, "epochs": options.epochs}
        few = min(3 * 64 + 32, options.limit or 60_000)
        try:
            began = time.monotonic()
            self.processes.call("graph", "train", precision, 1, options.depth, few, seconds=BUILD)
            record["first_seconds"] = time.monotonic() - began
            seconds = []
            while len(seconds) < options.trainings and (not seconds or sum(seconds) < 15):
                arguments = precision, options.epochs, options.depth, options.limit
                figures = self.processes.call("graph", "train", *arguments, seconds=TRAIN)
                seconds.append(figures.pop("seconds"))
            record |= figures | {"seconds": seconds}
        except RemoteError as error:
            record |= failure(error)
        self.found["training"].append(record)
        self.keep()
        print(training_line(record), flush=True)

    def steps(self, batch, precision, after):
        """Let all contestants take turns with steps of `batch` images. after: the number of later cases."""
        options, record, entries = self.options, {}, {}
        names = [name for name in options.only if name != "plain" or precision == "float32"]
        for name in names:
            limit = BUILD
            if name == "torch-compiled":
                case = len(names) * (options.rounds + 2) * options.seconds + len(names) * BETWEEN
                spare = self.left() - (after + 1) * (case + 4) - 20
                if spare < 1.2 * self.compiling:
                    record[name] = {"left_out": f"no time left in {options.minutes:g} minutes"}
                    continue
                limit = min(COMPILE, spare)
            try:
                arguments = batch, precision, options.depth, options.limit
                building = self.processes.call(name, "build", *arguments, seconds=limit)
            except RemoteError as error:
                record[name] = failure(error)
                if error.kind != "absent":
                    log(f"batch {batch}, {precision}: {CONTESTANTS[name][2]}: {error}")
                continue
            if name == "torch-compiled":
                self.compiling = max(building, 20.0)
            entries[name] = {"building": building, "seconds": [], "loss": None}
            log(f"batch {batch}, {precision}: {CONTESTANTS[name][2]} is ready after {building:.1f} s")
        self.rounds(entries, record)
        for name, entry in entries.items():
            record[name] = self.figures(name, entry, entries.get("graph"))
        record = {"batch": batch, "precision": precision, "contestants": {n: record[n] for n in names}}
        self.found["steps"].append(record)
        self.keep()
        print(steps_table(record), flush=True)

    def rounds(self, entries, record):
        """Let the entries take turns, in reverse order every other round. The first round is a warm-up."""
        for number in range(self.options.rounds + 1):
            for name in list(entries) if number % 2 == 0 else list(reversed(entries)):
                entry = entries[name]
                last = entry["seconds"][-1] if entry["seconds"] else None
                count = 10 if last is None else min(20_000, max(3, round(self.options.seconds / last)))
                try:
                    seconds, entry["loss"] = self.processes.call(name, "turn", count, seconds=TURN)
                    if not 0 <= entry["loss"] < 20:
                        raise RemoteError("diverged", f"the loss must be from 0 to 20, not {entry['loss']}")
                except RemoteError as error:
                    record[name] = failure(error)
                    log(f"{CONTESTANTS[name][2]}: {error}")
                    del entries[name]
                    continue
                entry["seconds"].append(seconds)
        for entry in entries.values():
            del entry["seconds"][0]

    def figures(self, name, entry, ours):
        """Return the figures of a contestant for the record."""
        seconds = entry["seconds"]
        found = {"milliseconds": [1e3 * value for value in quartiles(seconds)], "times_tinyvit": None}
        if ours is not None:
            ratios = [mine / theirs for mine, theirs in zip(seconds, ours["seconds"], strict=True)]
            found["times_tinyvit"] = quartiles(ratios)
        try:
            found["megabytes"] = self.processes.call(name, "megabytes", seconds=TURN)
        except RemoteError:  # the times are valid without it
            found["megabytes"] = None
        return found | {"building_seconds": entry["building"], "loss": entry["loss"]}

    def ceilings(self):
        """Measure the highest speeds of the card."""
        options = self.options
        try:
            arguments = options.side, options.copy
            self.found["ceilings"] = self.processes.call("kernels", "ceilings", *arguments, seconds=TURN)
        except RemoteError as error:
            self.found["ceilings"] = failure(error)
        self.keep()
        print(ceilings_table(self.found["ceilings"]), flush=True)

    def kernels(self, batch, precision):
        """Time every kernel of a step by itself."""
        record = {"batch": batch, "precision": precision}
        if self.left() < 10:
            record["left_out"] = f"no time left in {self.options.minutes:g} minutes"
        else:
            try:
                arguments = batch, precision, self.options.depth, self.options.limit
                record["rows"] = self.processes.call("kernels", "kernels", *arguments, seconds=BUILD)
            except RemoteError as error:
                record |= failure(error)
        self.found["kernels"].append(record)
        self.keep()
        print(kernels_table(record, self.found), flush=True)


def read_card():
    """Return the output of nvidia-smi for each card, a list of dicts, or a text with the reason for none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is missing"
    command = [program, f"--query-gpu={SMI}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(SMI.split(","), row, strict=False)) for row in rows]


# ---- the tables ----


def spread(values, form):
    """Return quartiles as a text: the median, with the other two in brackets."""
    low, median, high = (format(value, form) for value in values)
    return f"{median} ({low}-{high})"


def without_figures(record):
    """Return the reason why a record has no figures, or None if it has figures."""
    for state, words in (("absent", "not installed"), ("left_out", "left out"), ("failed", "failed")):
        if state in record:
            return f"{words}: {record[state]}"
    return None


def training_line(record):
    """Return a line with the time of whole trainings."""
    start = f"{record['epochs']} epochs, {record['precision']}:"
    missing = without_figures(record)
    if missing:
        return f"{start} {missing}"
    seconds = spread(quartiles(record["seconds"]), ".2f")
    return (
        f"{start} {seconds} s in {len(record['seconds'])} runs, {record['images']:,} images in batches of "
        f"{record['batch']}, training accuracy {100 * record['train_accuracy']:.2f} % in the last epoch; compiling "
        f"and loading took {record['first_seconds']:.1f} s"
    )


def steps_table(record):
    """Return the table of the contestants of a case."""
    lines = [f"\nbatch {record['batch']}, {record['precision']}"]
    lines.append(f"{'':50} {'ms per step':>24} {'times tinyvit':>24} {'peak MB':>8} {'build':>9}")
    for name, figures in record["contestants"].items():
        label = CONTESTANTS[name][2]
        missing = without_figures(figures)
        if missing:
            lines.append(f"{label:50} {missing}")
            continue
        ratio = "" if figures["times_tinyvit"] is None else spread(figures["times_tinyvit"], ".2f")
        memory = "" if figures["megabytes"] is None else f"{figures['megabytes']:.0f}"
        lines.append(
            f"{label:50} {spread(figures['milliseconds'], '.3f'):>24} {ratio:>24} {memory:>8} "
            f"{figures['building_seconds']:7.1f} s"
        )
    return "\n".join(lines)


def ceilings_table(ceilings):
    """Return one line per measured speed of the card."""
    lines = ["\nthe highest speeds of this card"]
    if without_figures(ceilings):
        return f"{lines[0]}: {without_figures(ceilings)}"
    units = {
        "copy": (1e12, "TB/s"),
        "copy_within_the_cache": (1e12, "TB/s"),
        "gap": (1e-6, "us per launch in a graph"),
    }
    for name, value in ceilings.items():
        unit, words = units.get(name, (1e12, "TFLOP/s in a large product"))
        found = value if isinstance(value, str) else f"{value / unit:.2f} {words}"
        lines.append(f"  {name.replace('_', ' '):24} {found}")
    return "\n".join(lines)


def floor(row, precision, ceilings):
    """Return the floor of a kernel in seconds and its cause, "bytes" or "operations", or (None, "")."""
    ceiling = {name: value for name, value in ceilings.items() if not isinstance(value, str)}
    times = {}
    if "copy" in ceiling:
        times["bytes"] = row["bytes"] / ceiling["copy"]
    parts = (row["operations"], precision), (row["float32_operations"], "float32")
    if all(count == 0 or name in ceiling for count, name in parts):
        times["operations"] = sum(count / ceiling[name] for count, name in parts if count)
    if len(times) < 2:
        return None, ""
    reason = max(times, key=times.get)
    return times[reason], reason


def graph_step(found, batch, precision):
    """Return the seconds of a step in a CUDA graph, or None."""
    for record in found["steps"]:
        if (record["batch"], record["precision"]) == (batch, precision):
            figures = record["contestants"].get("graph", {})
            return figures["milliseconds"][1] / 1e3 if "milliseconds" in figures else None
    return None


def kernels_table(record, found):
    """Return the table of the kernels of a step with their floors, and the time between the kernels."""
    batch, precision, ceilings = record["batch"], record["precision"], found["ceilings"]
    lines = [f"\nthe kernels of a step, batch {batch}, {precision}"]
    missing = without_figures(record)
    if missing:
        return f"{lines[0]}: {missing}"
    lines.append(
        f"{'':22} {'part':42} {'launches':>8} {'blocks':>7} {'us each':>8} {'floor':>7} {'ratio':>8} {'per step':>8}"
    )
    total, least = 0.0, 0.0
    for row in record["rows"]:
        seconds, launches = row["seconds"], row["launches"]
        lowest, reason = floor(row, precision, ceilings)
        total += launches * seconds
        least = None if lowest is None or least is None else least + launches * lowest
        against = f"{'':>7} {'':>8}" if lowest is None else f"{1e6 * lowest:7.2f} {seconds / lowest:8.1f}"
        lines.append(
            f"{row['kernel']:22} {', '.join(row['what']):42} {launches:8} {row['blocks']:7} {1e6 * seconds:8.2f} "
            f"{against} {1e6 * launches * seconds:8.1f}  {reason}"
        )
    count = sum(row["launches"] for row in record["rows"])
    lines.append(f"{count} launches, together {1e6 * total:.0f} us" + (
        "" if least is None else f", their floors {1e6 * least:.0f} us"
    ))  # fmt: skip
    step, gap = graph_step(found, batch, precision), ceilings.get("gap")
    if step is not None and not isinstance(gap, str | None):
        inside = total - count * gap
        lines.append(
            f"a step of the graph takes {1e6 * step:.0f} us: {1e6 * inside:.0f} in kernels and "
            f"{1e6 * (step - inside):.0f} between them; {count} launches of an empty kernel take "
            f"{1e6 * count * gap:.0f}"
        )
    return "\n".join(lines)


def goals_table(found):
    """Return the table that compares the run with its goals."""
    lines = [
        "\nthe goals: 10 epochs in 10 s (aim 3 s, then 1 s); PyTorch takes 3 (aim 10) times as long, "
        "torch.compile 1.2 (aim 2) times"
    ]
    first = found["settings"]["batches"][0]
    for training in found["training"]:
        precision = training["precision"]
        missing = without_figures(training)
        parts = [missing or f"{training['epochs']} epochs {quartiles(training['seconds'])[1]:.2f} s"]
        for record in found["steps"]:
            if (record["batch"], record["precision"]) != (first, precision):
                continue
            for name, (least, aim) in GOALS.items():
                figures = record["contestants"].get(name, {"left_out": "not selected"})
                times = figures.get("times_tinyvit")
                words = without_figures(figures) or "no ratio"
                if times is not None:
                    reached = "aim" if times[1] >= aim else "goal" if times[1] >= least else "below the goal"
                    words = f"{spread(times, '.2f')}x, {reached}"
                parts.append(f"{name} {words}")
        lines.append(f"{precision:9} " + "; ".join(parts))
    return "\n".join(lines)


def show(found):
    """Print all results of a run."""
    for record in found["training"]:
        print(training_line(record))
    for record in found["steps"]:
        print(steps_table(record))
    print(ceilings_table(found["ceilings"]))
    for record in found["kernels"]:
        print(kernels_table(record, found))
    print(goals_table(found))


# ---- the command ----


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE after every part")
    add("--recorded", type=Path, metavar="FILE", help="measure nothing and print the results in FILE")
    add("--quick", action="store_true", help="a short version of one or two minutes")
    text = "batch sizes (64 256 1024); the goals are for the first"
    add("--batches", type=int, nargs="+", metavar="N", help=text)
    precisions = floors.PRECISIONS
    text = f"precisions: {', '.join(precisions)} (all)"
    add("--precisions", nargs="+", choices=precisions, default=list(precisions), metavar="NAME", help=text)
    text = f"contestants: {', '.join(CONTESTANTS)} (all)"
    add("--only", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help=text)
    add("--epochs", type=int, metavar="N", help="epochs of a whole training (10)")
    add("--trainings", type=int, metavar="N", help="timed whole trainings (3, or fewer if they take long)")
    add("--rounds", type=int, metavar="N", help="rounds after the warm-up (7)")
    add("--seconds", type=float, metavar="S", help="length of a turn (0.2)")
    add("--minutes", type=float, default=7.5, metavar="M", help="time limit; later parts may be left out (7.5)")
    add("--depth", type=int, default=4, metavar="N", help="blocks of the model (4)")
    add("--limit", type=int, metavar="N", help="use only the first N training images")
    add("--side", type=int, default=8192, metavar="N", help="rows of the large matrix product (8192)")
    add("--copy", type=int, default=512, metavar="MB", help="megabytes of the large copy (512)")
    options = parser.parse_args()
    usual = {"batches": [64, 256, 1024], "only": list(CONTESTANTS), "epochs": 10, "trainings": 3, "rounds": 7}
    usual["seconds"] = 0.2
    if options.quick:
        usual |= {"batches": [64], "trainings": 1, "rounds": 3, "seconds": 0.1}
        usual["only"] = [name for name in CONTESTANTS if name != "torch-compiled"]
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("epochs", "trainings", "rounds", "depth", "side", "copy"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}; create it first")
    if options.recorded and not options.recorded.is_file():
        parser.error(f"--recorded: there is no file {options.recorded}; give a file written with --json")
    if min(options.batches) < 1 or (options.limit or 60_000) < 2 * max(options.batches):
        parser.error(f"--batches must be from 1 to half the number of images, not {options.batches}")
    return options


def main():
    options = parse_arguments()
    if options.recorded:
        show(json.loads(options.recorded.read_text()))
        return 0
    benchmark = Benchmark(options)
    try:
        benchmark.run()
    except RemoteError as error:
        if error.kind not in NO_GPU:
            raise
        reason = str(error).partition(": ")[2].replace(", or use --device cpu", "")
        print(f"gpu.py needs a GPU: {reason}", file=sys.stderr)
        return 2
    finally:
        benchmark.processes.close()
    print(goals_table(benchmark.found))
    print(f"\n{benchmark.found['minutes']:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
