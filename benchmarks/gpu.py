"""What training takes on an NVIDIA GPU, beside PyTorch, and how far every kernel is from what the card can do.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json    all of it, within eight minutes
    python benchmarks/gpu.py --quick                               a look: batch 64, few rounds, no torch.compile
    python benchmarks/gpu.py --recorded FILE                       prints again what --json has kept

First ten epochs of the technical note's training, images changed in every step, at each precision. Then steps of this
library in one CUDA graph, in launches and in plain CuPy operations, and of PyTorch on batches that lie ready on the
device, which is less work. All take turns, round by round, and a ratio is the median (and the quartiles) of what two
took in the same round, each between two synchronisations. Then every kernel of a step alone, many times in one CUDA
graph on the buffers of a real step, against the larger of two times: its bytes at the speed of a large copy, and its
operations at the speed of a large matrix product of cuBLAS at that precision, both measured here as well.

Every contestant is a process of its own. A contestant that is missing, fails or has no time left is named, and
stops no other. The card's settings are read and never changed.
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

CONTESTANTS = {  # name: class in gpu_work.py, way, what the tables call it
    "graph": ("Ours", "graph", "tinyvit, a CUDA graph a step"),
    "launches": ("Ours", "launches", "tinyvit, the same kernels launched one by one"),
    "plain": ("Ours", "off", "tinyvit, plain CuPy operations"),
    "torch": ("TorchSteps", "eager", "PyTorch eager"),
    "torch-graph": ("TorchSteps", "graph", "PyTorch eager, the whole step in one CUDA graph"),
    "torch-compiled": ("TorchSteps", "compiled", 'PyTorch, torch.compile(mode="max-autotune")'),
}
GOALS = {"torch": (3, 10), "torch-compiled": (1.2, 2)}  # times tinyvit's step: at least, aim
START, BUILD, TURN, TRAIN = 180, 150, 60, 120  # seconds that a process may take, before it is ended
COMPILE = 240  # and torch.compile
SMI = (
    "name,driver_version,memory.total,compute_mode,persistence_mode,power.limit,power.draw,temperature.gpu,"
    "utilization.gpu,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
)
ENVIRONMENT = ("CUDA_", "CUPY_", "NVIDIA_TF32", "TORCH", "PYTORCH")
BETWEEN = 0.5  # seconds a case takes for each contestant beside its turns, roughly
NO_GPU = ("DeviceError", "CuPyMissing")


def say(text):
    print(text, file=sys.stderr, flush=True)


class Crew:
    """The processes, one a contestant, each started when it is first needed and again after a failure."""

    def __init__(self):
        self._remotes, self._absent = {}, {}
        self.about = {}  # what they say of their libraries

    def ask(self, name, method, *arguments, seconds):
        """Return what a contestant's method returns; raises `RemoteError`."""
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
                say("\n".join(f"  | {line}" for line in error.log.splitlines()))
            raise

    def _start(self, name):
        kind, way, _ = CONTESTANTS.get(name, ("KernelTimes", None, None))
        given = {} if way is None else {"way": way}
        self._remotes[name] = Remote("gpu_work", kind, seconds=START, **given)
        self.about |= self._remotes[name].call("about", seconds=TURN)

    def close(self):
        for remote in self._remotes.values():
            remote.close()


def trouble(error):
    """Return what a record says in the place of figures."""
    return {"absent" if error.kind == "absent" else "failed": str(error)}


class Benchmark:
    """All measurements of one run; `found` has them, and is kept after each."""

    def __init__(self, options):
        self.options, self.crew = options, Crew()
        self.began = time.monotonic()
        self.compiling = 60.0  # seconds that torch.compile takes, as far as is known
        self.found = {"training": [], "steps": [], "ceilings": {}, "kernels": []}

    def left(self):
        """Return the seconds that are left of the time given."""
        return 60 * self.options.minutes - (time.monotonic() - self.began)

    def run(self):
        """Measure all there is to measure."""
        options = self.options
        card = self.crew.ask("graph", "about", seconds=TURN)  # DeviceError, if there is no GPU
        say(f"{card['card']}, {options.minutes:g} minutes at most")
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "recorded")}
        environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}
        self.found = {"conditions": conditions("torch"), "settings": settings, **self.found}
        self.found["conditions"]["environment"] |= environment
        self.found["conditions"]["nvidia_smi"] = {"before": ask_card()}

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
        """Write down what is known by now."""
        conditions = self.found["conditions"]
        conditions |= self.crew.about
        conditions["nvidia_smi"]["after"] = ask_card()
        self.found["minutes"] = round((time.monotonic() - self.began) / 60, 2)
        if self.options.json:
            write_atomically(self.options.json, json.dumps(self.found, indent=2) + "\n")

    def train(self, precision):
        """Time whole trainings: after a short one, which compiles, as often as the time allows."""
        options = self.options
        record = {"precision": precision, "epochs": options.epochs}
        few = min(3 * 64 + 32, options.limit or 60_000)
        try:
            began = time.monotonic()
            self.crew.ask("graph", "train", precision, 1, options.depth, few, seconds=BUILD)
            record["first_seconds"] = time.monotonic() - began
            seconds = []
            while len(seconds) < options.trainings and (not seconds or sum(seconds) < 15):
                given = precision, options.epochs, options.depth, options.limit
                figures = self.crew.ask("graph", "train", *given, seconds=TRAIN)
                seconds.append(figures.pop("seconds"))
            record |= figures | {"seconds": seconds}
        except RemoteError as error:
            record |= trouble(error)
        self.found["training"].append(record)
        self.keep()
        print(training_line(record), flush=True)

    def steps(self, batch, precision, after):
        """Let all contestants take turns at steps of `batch` images; `after`: how many cases come later."""
        options, record, entries = self.options, {}, {}
        names = [name for name in options.only if name != "plain" or precision == "float32"]
        for name in names:
            limit = BUILD
            if name == "torch-compiled":
                case = len(names) * (options.rounds + 2) * options.seconds + len(names) * BETWEEN
                spare = self.left() - (after + 1) * (case + 4) - 20
                if spare < 1.2 * self.compiling:
                    record[name] = {"left_out": f"no time for it in {options.minutes:g} minutes"}
                    continue
                limit = min(COMPILE, spare)
            try:
                given = batch, precision, options.depth, options.limit
                building = self.crew.ask(name, "build", *given, seconds=limit)
            except RemoteError as error:
                record[name] = trouble(error)
                if error.kind != "absent":
                    say(f"batch {batch}, {precision}: {CONTESTANTS[name][2]}: {error}")
                continue
            if name == "torch-compiled":
                self.compiling = max(building, 20.0)
            entries[name] = {"building": building, "seconds": [], "loss": None}
            say(f"batch {batch}, {precision}: {CONTESTANTS[name][2]} is ready after {building:.1f} s")
        self.rounds(entries, record)
        for name, entry in entries.items():
            record[name] = self.figures(name, entry, entries.get("graph"))
        record = {"batch": batch, "precision": precision, "contestants": {n: record[n] for n in names}}
        self.found["steps"].append(record)
        self.keep()
        print(steps_table(record), flush=True)

    def rounds(self, entries, record):
        """Let the entries run in turns, every other round backwards; the first round is not kept."""
        for number in range(self.options.rounds + 1):
            for name in list(entries) if number % 2 == 0 else list(reversed(entries)):
                entry = entries[name]
                last = entry["seconds"][-1] if entry["seconds"] else None
                count = 10 if last is None else min(20_000, max(3, round(self.options.seconds / last)))
                try:
                    seconds, entry["loss"] = self.crew.ask(name, "turn", count, seconds=TURN)
                    if not 0 <= entry["loss"] < 20:
                        raise RemoteError("diverged", f"the loss is {entry['loss']}: what it computes is wrong")
                except RemoteError as error:
                    record[name] = trouble(error)
                    say(f"{CONTESTANTS[name][2]}: {error}")
                    del entries[name]
                    continue
                entry["seconds"].append(seconds)
        for entry in entries.values():
            del entry["seconds"][0]

    def figures(self, name, entry, ours):
        """Return what a record keeps of a contestant that has come through."""
        seconds = entry["seconds"]
        found = {"milliseconds": [1e3 * value for value in quartiles(seconds)], "times_tinyvit": None}
        if ours is not None:
            ratios = [mine / theirs for mine, theirs in zip(seconds, ours["seconds"], strict=True)]
            found["times_tinyvit"] = quartiles(ratios)
        try:
            found["megabytes"] = self.crew.ask(name, "megabytes", seconds=TURN)
        except RemoteError:  # the figures are good all the same
            found["megabytes"] = None
        return found | {"building_seconds": entry["building"], "loss": entry["loss"]}

    def ceilings(self):
        """Measure what the card can do at best."""
        options = self.options
        try:
            given = options.side, options.copy
            self.found["ceilings"] = self.crew.ask("kernels", "ceilings", *given, seconds=TURN)
        except RemoteError as error:
            self.found["ceilings"] = trouble(error)
        self.keep()
        print(ceilings_table(self.found["ceilings"]), flush=True)

    def kernels(self, batch, precision):
        """Time every kernel of a step alone."""
        record = {"batch": batch, "precision": precision}
        if self.left() < 10:
            record["left_out"] = f"no time for it in {self.options.minutes:g} minutes"
        else:
            try:
                given = batch, precision, self.options.depth, self.options.limit
                record["rows"] = self.crew.ask("kernels", "kernels", *given, seconds=BUILD)
            except RemoteError as error:
                record |= trouble(error)
        self.found["kernels"].append(record)
        self.keep()
        print(kernels_table(record, self.found), flush=True)


def ask_card():
    """Return what nvidia-smi says of each card, a list of dicts, or a text that says why it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not there"
    command = [program, f"--query-gpu={SMI}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer: {error}"
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(SMI.split(","), row, strict=False)) for row in rows]


# ---- the tables ----


def spread(values, form):
    """Return quartiles as a text: the median, and the others in brackets."""
    low, median, high = (format(value, form) for value in values)
    return f"{median} ({low}-{high})"


def without_figures(record):
    """Return why a record has no figures, or None if it has them."""
    for state, words in (("absent", "not there"), ("left_out", "left out"), ("failed", "failed")):
        if state in record:
            return f"{words}: {record[state]}"
    return None


def training_line(record):
    """Return a line on the time of whole trainings."""
    start = f"{record['epochs']} epochs, {record['precision']}:"
    missing = without_figures(record)
    if missing:
        return f"{start} {missing}"
    seconds = spread(quartiles(record["seconds"]), ".2f")
    return (
        f"{start} {seconds} s, {len(record['seconds'])} times, {record['images']:,} images in batches of "
        f"{record['batch']}, {100 * record['train_accuracy']:.2f} % right in the last epoch; before that "
        f"{record['first_seconds']:.1f} s to compile and to load"
    )


def steps_table(record):
    """Return the table of a case's contestants."""
    lines = [f"\nbatch {record['batch']}, {record['precision']}"]
    lines.append(f"{'':50} {'ms a step':>24} {'times tinyvit':>24} {'peak MB':>8} {'ready in':>9}")
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
    """Return what the card can do at best, a line each."""
    lines = ["\nwhat this card can do"]
    if without_figures(ceilings):
        return f"{lines[0]}: {without_figures(ceilings)}"
    units = {"copy": (1e12, "TB/s"), "copy_within_the_cache": (1e12, "TB/s"), "gap": (1e-6, "us a launch in a graph")}
    for name, value in ceilings.items():
        unit, words = units.get(name, (1e12, "TFLOP/s in a large product"))
        found = value if isinstance(value, str) else f"{value / unit:.2f} {words}"
        lines.append(f"  {name.replace('_', ' '):24} {found}")
    return "\n".join(lines)


def floor(row, precision, ceilings):
    """Return a kernel's floor in seconds and what makes it, "bytes" or "operations"; (None, "") if not known."""
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
    """Return the table of a step's kernels against their floors, and of what is left of the step."""
    batch, precision, ceilings = record["batch"], record["precision"], found["ceilings"]
    lines = [f"\nthe kernels of a step, batch {batch}, {precision}"]
    missing = without_figures(record)
    if missing:
        return f"{lines[0]}: {missing}"
    lines.append(
        f"{'':22} {'of':42} {'launches':>8} {'blocks':>7} {'us each':>8} {'floor':>7} {'times it':>8} {'a step':>8}"
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
            f"a step of the graph takes {1e6 * step:.0f} us: {1e6 * inside:.0f} in kernels, and "
            f"{1e6 * (step - inside):.0f} between them, where {count} launches of an empty kernel would take "
            f"{1e6 * count * gap:.0f}"
        )
    return "\n".join(lines)


def goals_table(found):
    """Return how the run stands to what was to be reached."""
    lines = ["\nthe goals: 10 epochs in 10 s (aim: 3 s, then 1 s); PyTorch 3 (10) times as long, compiled 1.2 (2)"]
    first = found["settings"]["batches"][0]
    for training in found["training"]:
        precision = training["precision"]
        missing = without_figures(training)
        parts = [missing or f"{training['epochs']} epochs {quartiles(training['seconds'])[1]:.2f} s"]
        for record in found["steps"]:
            if (record["batch"], record["precision"]) != (first, precision):
                continue
            for name, (least, aim) in GOALS.items():
                figures = record["contestants"].get(name, {"left_out": "not asked for"})
                times = figures.get("times_tinyvit")
                words = without_figures(figures) or "no ratio"
                if times is not None:
                    reached = "aim" if times[1] >= aim else "goal" if times[1] >= least else "below the goal"
                    words = f"{spread(times, '.2f')}x, {reached}"
                parts.append(f"{name} {words}")
        lines.append(f"{precision:9} " + "; ".join(parts))
    return "\n".join(lines)


def show(found):
    """Print everything that a run has found."""
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
    add("--json", type=Path, metavar="FILE", help="write what was measured here too, after each part")
    add("--recorded", type=Path, metavar="FILE", help="measure nothing, print what FILE has")
    add("--quick", action="store_true", help="a look in a minute or two")
    text = "images a step (64 256 1024); the first is the goal's"
    add("--batches", type=int, nargs="+", metavar="N", help=text)
    precisions = floors.PRECISIONS
    text = f"of {', '.join(precisions)} (all)"
    add("--precisions", nargs="+", choices=precisions, default=list(precisions), metavar="NAME", help=text)
    text = f"of {', '.join(CONTESTANTS)} (all)"
    add("--only", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help=text)
    add("--epochs", type=int, metavar="N", help="of a whole training (10)")
    add("--trainings", type=int, metavar="N", help="whole trainings that are timed (3, as long as they are short)")
    add("--rounds", type=int, metavar="N", help="rounds that count (7)")
    add("--seconds", type=float, metavar="S", help="a contestant's turn (0.2)")
    add("--minutes", type=float, default=7.5, metavar="M", help="what no time is left for is left out (7.5)")
    add("--depth", type=int, default=4, metavar="N", help="blocks of the model (4)")
    add("--limit", type=int, metavar="N", help="use the first N training images only")
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
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.recorded and not options.recorded.is_file():
        parser.error(f"--recorded: there is no file {options.recorded}")
    if min(options.batches) < 1 or (options.limit or 60_000) < 2 * max(options.batches):
        parser.error(f"--batches must be at least 1 and twice in the images, not {options.batches}")
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
        print(f"gpu.py measures on a GPU: {reason}", file=sys.stderr)
        return 2
    finally:
        benchmark.crew.close()
    print(goals_table(benchmark.found))
    print(f"\n{benchmark.found['minutes']:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
