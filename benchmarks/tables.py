"""Write the generated parts of README.md and of docs/: tables of results, and the maps of the code.

    python benchmarks/tables.py                          all tables, from benchmarks/results/ and the source
    python benchmarks/tables.py --picture runs/RUN       and the picture of the README, from a trained run

Each part is between two markers, `<!-- NAME -->` and `<!-- /NAME -->`. A test fails if a part is not what its
sources say.
"""

import argparse
import ast
import io
import json
import os
import re
import statistics
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = RESULTS / "learning_and_looking.png"

# ---- results ----


def record(name):
    """Return what benchmarks/results/NAME.json holds, or None if there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head, rows, left=1):
    """Return a Markdown table whose first `left` columns are aligned left and the others right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def measured(conditions, *libraries):
    """Return the sentences that say how and where a record was made."""
    names = {"numpy": "NumPy", "numba": "Numba", "torch": "PyTorch", "jax": "JAX", "onnxruntime": "ONNX Runtime"}
    names |= {"cupy": "CuPy", "fastapi": "FastAPI", "uvicorn": "Uvicorn"}
    found = [f"Python {conditions['python']}"]
    for library in ("numpy", "numba", *libraries):
        if _has(conditions, library):
            blas = f" ({conditions['blas']})" if library == "numpy" and conditions.get("blas") else ""
            found.append(f"{names[library]} {conditions[library]}{blas}")
    command = f"Command:\n\n    {conditions['command']}\n\n" if "command" in conditions else ""
    return f"{command}Measured on {conditions['cpu']}, {conditions['machine']}, with {', '.join(found)}."


RECIPES = {  # name in benchmarks/results/accuracy.json: description, flags
    "tuned": ("the default", "`--recipe tuned`"),
    "note": ("the technical note's training, one image in ten mirrored", "`--recipe note`"),
    "note-flip-half": ("the same, every second image mirrored", "`--recipe note --flip 0.5`"),
}


def accuracy_table():
    """Return the table of test accuracies per recipe."""
    rows = []
    for name, (description, flags) in RECIPES.items():
        figures = record("accuracy")[name]
        deviation = figures["test_accuracy_deviation"]
        spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
        rows.append(
            [
                f"{description}, {flags}",
                f"**{100 * figures['test_accuracy_mean']:.2f} %**{spread}",
                ", ".join(f"{100 * value:.2f}" for value in figures["test_accuracy"]),
                f"{100 * figures['validation_accuracy_mean']:.2f} %",
            ]
        )
    rows.append(["the technical note's report", "97.77 %", "", ""])
    seeds = ", ".join(map(str, record("accuracy")["tuned"]["seeds"]))
    head = ["10 epochs, batch 64", "test accuracy", f"seeds {seeds}, %", "validation accuracy"]
    figures = record("accuracy")
    where = [f"`{name}`: {measured(figures[name]['versions'])}" for name in RECIPES]
    return "\n".join([table(head, rows), "", *(f"* {line}" for line in where)])


def time_table():
    """Return the table of seconds to an accuracy."""
    found = record("time_to_accuracy")
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in found["runs"]}))
    rows = []
    for target in found["summary"]:
        best = next((length for length in target["lengths"] if length["epochs"] == target["best_epochs"]), None)
        if best is None:
            rows.append([f"{target['target']:g} %", "not reached by most seeds", "", ""])
            continue
        low, high = best["range"]
        reached = sum(value is not None for value in best["seconds"])
        some = "" if reached == len(best["seconds"]) else f" ({reached} of {len(best['seconds'])} seeds)"
        length = f"{best['epochs']:g} {'epoch' if best['epochs'] == 1 else 'epochs'}"
        times = [f"**{best['median']:.0f} s**", f"{low:.0f}-{high:.0f} s{some}"]
        rows.append([f"{target['target']:g} %", *times, length])
    rows.append(["97.77 %, the technical note", "1,200 s", "", "10 epochs"])
    head = ["test accuracy", f"training time, median of seeds {seeds}", "range", "length of the run"]
    speeds = [64 * run["steps"] / run["seconds"] for run in found["runs"]]
    whole = (
        f"These runs train on {statistics.median(speeds):,.0f} images per second with {found['workers']} workers "
        f"(median), so ten epochs take {550_000 / statistics.median(speeds) / 60:.1f} minutes. The technical note "
        "reports 20 minutes."
    )
    return "\n".join([table(head, rows), "", whole, "", measured(found["conditions"])])


STEPS = {  # contestants of train_step.py
    "numpy": "tinyvit with NumPy only",
    "own-products": "the matrix products of tinyvit's step only",
    "products": "the matrix products of a step that computes all tokens",
    "torch": "PyTorch, eager",
    "torch-compiled": "PyTorch, `torch.compile`",
    "torch-shortcut": "PyTorch, `torch.compile`, last block for the class token only",
    "jax": "JAX, `jit`",
}


def step_tables():
    """Return a table of a training step's time for each record train_step-*.json, with where it was measured."""
    parts = []
    for path in sorted(RESULTS.glob("train_step-*.json")):
        found = record(path.stem)
        records = found["records"]
        head = [f"time of a step, {records[0]['threads']} cores"]
        for case in records:
            head.append(f"batch {case['batch']}" + (f", MLP {case['mlp_width']}" if case["mlp_width"] != 512 else ""))
        ours = [f"**{case['contestants']['tinyvit']['milliseconds'][1]:.1f} ms**" for case in records]
        loops = ", compiled loops" if "numpy" in records[0]["contestants"] else ""
        rows = [[f"**tinyvit{loops}**", *ours]]
        for name, description in STEPS.items():
            if all(name in case["contestants"] for case in records):
                rows.append([description, *(times_tinyvit(case["contestants"][name]) for case in records)])
        parts += [table(head, rows), "", measured(found["conditions"], "torch", "jax"), ""]
    return "\n".join(parts[:-1])


# What was wanted before it was measured, with the extra `fast`: a record, a batch size or None, a contestant, and the
# required and aimed-at multiple of tinyvit's time, by vendor of the processor. An upper limit is a negative number.
GOALS = {
    "AMD": [
        ("train_step", 64, "torch", 2.5, 2.8),
        ("train_step", 64, "torch-shortcut", 2, 2.2),
        ("train_step", 64, "own-products", -1.25, -1.15),
        ("train_step", 16, "torch", 2.2, 2.2),
        ("inference", None, "torch", 2, 2.4),
        ("inference", None, "onnx", 1.2, 1.2),
    ],
    "Intel": [
        ("train_step", 64, "torch", 1.5, 1.7),
        ("train_step", 64, "torch-shortcut", 1.2, 1.35),
        ("train_step", 64, "own-products", -1.3, -1.15),
        ("train_step", 16, "torch", 1.45, 1.45),
        ("inference", None, "torch", 1.15, 1.3),
        ("inference", None, "onnx", 1.05, 1.05),
    ],
}


def goals_table():
    """Return the table of goals for the processors that have records, and which of them are reached."""
    rows = []
    for path in sorted(RESULTS.glob("train_step-*.json")):
        cpu = record(path.stem)["conditions"]["cpu"]
        if not _has(record(path.stem)["conditions"], "numba"):
            continue  # the goals are for the compiled loops
        processor = path.stem.removeprefix("train_step-")
        for kind, batch, name, least, aim in GOALS[next(vendor for vendor in GOALS if vendor in cpu)]:
            cases = (record(f"{kind}-{processor}") or {"records": []})["records"]
            cases = [case for case in cases if case["mlp_width"] == 512 and batch in (None, case.get("batch"))]
            if not cases or name not in cases[0]["contestants"]:
                continue
            case = cases[0]
            median = case["contestants"][name]["times_tinyvit"][1]
            what = f"a step, batch {batch}" if batch else "inference"
            if least > 0:
                row = [f"{STEPS.get(name) or INFERENCE[name]} takes", f"{least:g}x", f"{aim:g}x", f"{median:.2f}x"]
                rows.append([cpu, what, *row, reached(median >= least, median >= aim)])
            else:
                over = 1 / median
                row = ["tinyvit takes, of its products", f"at most {-least:g}x", f"{-aim:g}x", f"{over:.2f}x"]
                rows.append([cpu, what, *row, reached(over <= -least, over <= -aim)])
    return table(["processor", "", "", "required", "aimed at", "measured", "reached"], rows, left=3)


def reached(required, aim):
    """Return which of two goals is reached, in words."""
    return "both" if aim else "the required one" if required else "neither"


def times_tinyvit(figures):
    """Return a contestant's time as a multiple of tinyvit's: median and quartiles."""
    low, median, high = figures["times_tinyvit"]
    return f"{median:.2f}x ({low:.2f}-{high:.2f})"


INFERENCE = {name: STEPS[name] for name in ("numpy", "torch", "torch-compiled", "jax")} | {"onnx": "ONNX Runtime"}


def inference_tables():
    """Return a table of the time of 10,000 images for each record inference-*.json."""
    parts = []
    for path in sorted(RESULTS.glob("inference-*.json")):
        found = record(path.stem)
        for case in found["records"]:
            contestants = case["contestants"]
            ours = contestants["tinyvit"]
            name = "tinyvit, compiled loops" if "numpy" in contestants else "tinyvit"
            rows = [[f"**{name}**", f"**{ours['milliseconds'][1] / 1e3:.2f} s**", str(ours["batch"])]]
            for name, description in INFERENCE.items():
                if "times_tinyvit" in contestants.get(name, {}):
                    figures = contestants[name]
                    rows.append([description, times_tinyvit(figures), str(figures["batch"])])
            head = [f"{case['images']:,} test images, {case['threads']} cores", "time", "batch size"]
            parts += [table(head, rows), ""]
        parts += [measured(found["conditions"], "torch", "jax", "onnxruntime"), ""]
    return "\n".join(parts[:-1])


def memory_text():
    """Return the peak of memory of a training run."""
    found = record("memory")
    main, *helpers = found["processes"]
    loops = ""
    if "compiled_loops" in found:
        loops = f" With compiled loops the run peaks at **{found['compiled_loops']['peak_megabytes']} MB**."
    return (
        f"A whole training run peaks at **{found['peak_megabytes']} MB**. That includes all imports, the helper "
        f"process, the evaluation and the pictures. Peak per process: {main} MB for the main one, "
        f"{' and '.join(map(str, helpers))} MB for its helper.{loops}\n\n{measured(found['conditions'])}"
    )


FACTORS = {"batch": "batch size", "width": "width", "depth": "blocks", "patch": "patch side", "workers": "workers"}


def scaling_table():
    """Return the table of a step's time and memory as one setting changes."""
    found = record("scaling")
    rows = []
    for case in found["records"]:
        low, median, high = case["times_default"]
        value = case[case["factor"]]
        more = f" ({case['tokens']} tokens)" if case["factor"] == "patch" else ""
        rows.append(
            [
                f"{FACTORS[case['factor']]} {value:,}{more}",
                f"{case['milliseconds'][1]:.1f} ms",
                f"{median:.2f}x ({low:.2f}-{high:.2f})",
                f"{case['gflop_per_second']:.0f}",
                f"{case['megabytes']} MB",
            ]
        )
    head = ["setting", "time of a step", "times the default", "GFLOP/s", "memory"]
    return "\n".join([table(head, rows), "", measured(found["conditions"])])


def server_table():
    """Return the table of the server's load test."""
    found = record("serve")
    rows = []
    for case in found["records"]:
        times = case["milliseconds"]
        rows.append(
            [
                f"{case['clients']:,}",
                str(case["batch"]),
                f"{case['predictions']:,}",
                str(case["errors"]),
                f"{times['median']:.0f} ms, {times['p90']:.0f} ms, {times['p99']:.0f} ms",
                f"{case['milliseconds_of_a_core_each']['server']:.1f} ms",
                f"{case['cores_had']['server']:.2f}",
                f"{case['server_megabytes']['most']} MB",
            ]
        )
    head = ["clients", "`--batch`", "predictions in a minute", "errors", "answer (median, 90th, 99th percentile)"]
    head += ["core time per prediction", "cores available", "memory"]
    page = found["page"]
    times = page["milliseconds"]
    browser = (
        f"From a movement of the pen to the answer on the page: median {times['median']:.0f} ms, 90 % within "
        f"{times['p90']:.0f} ms, 99 % within {times['p99']:.0f} ms, over {page['answers']:,} answers in headless "
        f"Chromium. {page['read_rightly']} of {page['drawings']} drawings were read correctly."
    )
    where = measured(found["conditions"], "fastapi", "uvicorn")
    return "\n".join([table(head, rows, left=0), "", browser, "", where])


GPU_NAMES = {  # contestants of gpu.py
    "torch": "PyTorch eager",
    "torch-compiled": '`torch.compile`, "max-autotune"',
    "torch-graph": "PyTorch, a CUDA graph a step",
}


def gpu_table(found):
    """Return the table of a GPU's speed.

    Parameters
    ----------
    found : dict or None
        The record of gpu.py, or None if there is none.

    Returns
    -------
    str
        Markdown.
    """
    if found is None:
        return (
            "On an NVIDIA GPU: **not measured on a real card yet**. `python benchmarks/gpu.py --json "
            "benchmarks/results/gpu.json` measures\nit within eight minutes, and `python benchmarks/tables.py` then "
            "writes the table here."
        )
    trained = {}
    for case in found["training"]:
        if "seconds" in case and case["epochs"] == 10:
            trained[case["batch"], case["precision"]] = f"{statistics.median(case['seconds']):.1f} s"
    rows = []
    for case in found["steps"]:
        contestants, ours = case["contestants"], case["contestants"].get("graph", {})
        step = f"**{ours['milliseconds'][1]:.3f} ms**" if "milliseconds" in ours else _missing(ours)
        cells = [_gpu_cell(contestants.get(name, {})) for name in GPU_NAMES]
        label = f"batch {case['batch']}, {case['precision']}"
        rows.append([label, trained.get((case["batch"], case["precision"]), ""), step, *cells])
    conditions = found["conditions"]
    cards = conditions["nvidia_smi"]["before"]
    driver = f", driver {cards[0]['driver_version']}" if isinstance(cards, list) and cards else ""
    runtime = conditions.get("cuda_runtime")
    cuda = f", CUDA {runtime // 1000}.{runtime % 1000 // 10}" if runtime else ""
    torch = f", PyTorch {conditions['torch']}" if conditions.get("torch") else ""
    text = (
        "All contestants run at the same precision, in turns in one run. A step of tinyvit gathers and augments its "
        "images, while the images of PyTorch are ready on the device. In the last block tinyvit computes only the "
        f"class token. {conditions['card']}{driver}, CuPy {conditions['cupy']}{cuda}{torch}: "
        "`python benchmarks/gpu.py`."
    )
    head = ["on a GPU", "10 epochs", "tinyvit, a step", *GPU_NAMES.values()]
    return "\n".join([table(head, rows), "", text])


def _gpu_cell(figures):
    if figures.get("times_tinyvit") is None:
        return f"{figures['milliseconds'][1]:.3f} ms" if "milliseconds" in figures else _missing(figures)
    return times_tinyvit(figures)


def _missing(figures):
    words = {"absent": "not there", "failed": "failed"}
    return next((word for state, word in words.items() if state in figures), "not measured")


def numbers():
    """Return the README's table of numbers, each with a link to the page of its results."""
    figures = record("accuracy")["tuned"]
    accuracy, deviation = 100 * figures["test_accuracy_mean"], 100 * figures["test_accuracy_deviation"]
    timed = record("time_to_accuracy")
    first = timed["summary"][0]
    best = next(length for length in first["lengths"] if length["epochs"] == first["best_epochs"])
    low, high = best["range"]
    steps = []
    for path in sorted(RESULTS.glob("train_step-*.json")):
        found = record(path.stem)
        case = next(case for case in found["records"] if (case["batch"], case["mlp_width"]) == (64, 512))
        milliseconds = case["contestants"]["tinyvit"]["milliseconds"][1]
        text = f"{milliseconds:.1f} ms; PyTorch (eager) takes {times_tinyvit(case['contestants']['torch'])}"
        steps.append((text, processor(found["conditions"])))
    rows = [
        [
            "[Test accuracy](docs/results/accuracy.md) of the default recipe, ten epochs",
            f"**{accuracy:.2f} %** ± {deviation:.2f}",
            f"{len(figures['seeds'])} seeds",
        ],
        [
            f"[Training time](docs/results/accuracy.md#time-to-an-accuracy) to {first['target']:g} % test accuracy",
            f"**{best['median']:.0f} s** ({low:.0f}-{high:.0f})",
            processor(timed["conditions"]),
        ],
        *(["[A training step](docs/results/speed.md) of 64 images", text, where] for text, where in steps),
    ]
    return table(["what", "result", "measured with"], rows, left=3)


# ---- what was tried to break it ----


def not_recorded(name, options=""):
    """Return the text in place of a table whose record is missing, with the command that makes it if it exists."""
    script = f"benchmarks/{name}.py"
    if not (ROOT / script).exists():
        return "Not recorded yet."
    return f"Not recorded yet. Command:\n\n    python {script} {options}--json benchmarks/results/{name}.json"


def kills_table():
    """Return the table of kills by phase and signal."""
    found = record("kills")
    if found is None:
        return not_recorded("kills")
    signals = sorted({row["signal"] for row in found["counts"]})
    phases = list(dict.fromkeys(row["phase"] for row in found["counts"]))

    def count(phase, name):
        rows = [row for row in found["counts"] if (row["phase"], row["signal"]) == (phase, name)]
        return str(sum(row["count"] for row in rows) or "")

    rows = [[phase, *(count(phase, name) for name in signals)] for phase in phases]
    wrong = [row for row in found["counts"] if row["outcome"] != "same bits"]
    good = found["kills"] - sum(row["count"] for row in wrong)
    text = (
        f"{good:,} of {found['kills']:,} runs ended with the same bits as a run that was never killed. "
        'The table counts a signal in the phase that it met. "ended before" counts runs that ended before the signal.'
    )
    lines = [f"* {row['count']} x {row['signal']} in {row['phase']}: {row['outcome']}" for row in wrong]
    lines = ["", "The others:", "", *lines] if wrong else []
    head = ["phase of the run", *signals]
    return "\n".join([text, *lines, "", table(head, rows), "", measured(found["conditions"])])


FORMATS = {  # names in damage.json
    "checkpoint": "checkpoint of a run",
    "model": "model file",
    "idx": "idx file, raw or compressed",
    "picture": "picture of a digit",
    "mnist": "data set: raw idx files",
    "mnist-gzip": "data set: compressed idx files",
    "emnist": "data set: EMNIST",
    "qmnist": "data set: QMNIST",
    "npz": "data set: npz",
    "medmnist": "data set: MedMNIST",
    "kuzushiji": "data set: Kuzushiji's npz",
    "csv": "data set: CSV",
    "csv-words": "data set: CSV with words",
    "cifar": "data set: CIFAR",
    "png": "data set: PNG pictures",
    "jpeg": "data set: JPEG pictures",
}
GOOD = ("refused", "identical", "as the file says")  # other outcomes of damaged files are errors of the library


def damage_table():
    """Return the table of damaged files by format and outcome."""
    found = record("damage")
    if found is None:
        return not_recorded("damage", "--count 100000 ")
    rows = []
    for case in found["records"]:
        outcomes = case["outcomes"]
        cells = [outcomes.get(name, 0) for name in GOOD]
        cells.append(sum(outcomes.values()) - sum(cells))
        name = FORMATS.get(case["format"], case["format"])
        rows.append([name, *(f"{cell:,}" for cell in (case["count"], *cells))])
    head = ["damaged file", "files", "refused with one error", "read, same content", "read as another valid file"]
    return "\n".join([table([*head, "wrong, crashed, slow or too large"], rows), "", measured(found["conditions"])])


def mutants_table():
    """Return the table of mutants of the library by kind of change."""
    found = record("mutants")
    if found is None:
        return not_recorded("mutants", "--count 600 ")
    total = found["summary"]

    def cells(counts):
        killed = counts.get("killed", 0) + counts.get("timeout", 0)
        rest = [counts.get("equivalent", 0), counts.get("survived", 0)]
        return [f"{value:,}" for value in (sum((killed, *rest)), killed, *rest)]

    rows = [[kind, *cells(counts)] for kind, counts in total["kinds"].items()]
    rows.append(["**all**", *cells(total)])
    head = ["kind of change", "mutants", "detected", "equivalent", "not detected"]
    share = (
        f"The tests detect **{total['killed_percent']:.1f} %** of the {total['mutants']:,} mutants (seed "
        f"{found['seed']}). For {total['timeout']} of them the tests did not end in time, which counts as detected."
    )
    return "\n".join([share, "", table(head, rows), "", measured(found["conditions"])])


def environments_table():
    """Return the table of the environments in which the tests ran."""
    found = record("environments")
    if found is None:
        return not_recorded("environments")
    rows = []
    for name, figures in found["environments"].items():
        if "missing" in figures:
            rows.append([f"`{name}`", "could not be made", *[""] * 5])
            continue
        versions = figures["versions"]
        counts = [f"{figures[key]:,}" for key in ("tests", "failed", "skipped")]
        result = "passed" if figures["passed"] else "**failed**"
        rows.append([f"`{name}`", result, *(versions.get(key, "") for key in ("python", "numpy")), *counts])
    head = ["environment", "result", "Python", "NumPy", "tests", "failed", "skipped"]
    command = found["command"].replace("--json ", "--json benchmarks/results/")
    return "\n".join([table(head, rows, left=4), "", f"Command:\n\n    {command}"])


def other_data_table():
    """Return the table of test accuracies on other data sets."""
    found = record("other_data")
    if found is None:
        return not_recorded("other_data")
    rows, commands = [], []
    for row in found["rows"]:
        accuracy, each = mean_and_spread(row["test_percent"])
        validation, _ = mean_and_spread(row["validation_percent"])
        what = f"{row['parameters']:,}", f"{row['epochs']}"
        rows.append([row["data"], row["settings"], *what, accuracy, each, validation, f"{row['minutes']:.0f}"])
        commands += [f"    {row['command']}"]
    head = ["data", "settings", "parameters", "epochs", "test accuracy, %", "each seed", "validation, %"]
    where = measured({name: value for name, value in found["conditions"].items() if name != "command"})
    commands = "\n".join(["Commands:", "", *dict.fromkeys(commands)])
    return "\n".join([table([*head, "minutes per run"], rows, left=2), "", commands, "", where])


def mean_and_spread(values):
    """Return the mean of percentages with their standard deviation, and all of them, as texts."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}", ", ".join(f"{value:.2f}" for value in values)


def processor(conditions):
    """Return the processor of a measurement, and whether the extra `fast` was installed."""
    return f"{conditions['cpu']}, {'extra `fast`' if _has(conditions, 'numba') else 'no extra'}"


def _has(conditions, library):
    return conditions.get(library) not in (None, "not installed")


# ---- maps of the code ----

FOLDERS = (  # the rows of the README's map: files and folders, and what they are
    (("tinyvit/reference.py",), "The whole model, its gradients, Adam and a training loop, as derived on paper"),
    (("tinyvit/ops/", "tinyvit/loops.py"), "The operations, each a forward and a backward function, made fast"),
    (("tinyvit/model.py",), "The Vision Transformer: settings, forward, backward, loss and gradient"),
    (("tinyvit/optim.py",), "Adam, clipping, averaging and learning-rate schedules"),
    (("tinyvit/gradcheck.py",), "The gradient check"),
    (
        ("tinyvit/backend.py", "tinyvit/memory.py", "tinyvit/parameters.py", "tinyvit/checks.py"),
        "NumPy or CuPy, reused memory, one flat array with named views",
    ),
    (("tinyvit/data/",), "MNIST and other data sets, augmentation, batches"),
    (("tinyvit/training/",), "One training step, the loop, checkpoints, worker processes"),
    (
        (
            "tinyvit/classifier.py",
            "tinyvit/evaluate.py",
            "tinyvit/plots.py",
            "tinyvit/checkpoint.py",
            "tinyvit/files.py",
            "tinyvit/signatures.py",
        ),
        "A model to use: train, predict, evaluate, draw, save, load",
    ),
    (("tinyvit/sklearn.py",), "A classifier for scikit-learn"),
    (("tinyvit/kernels/",), "The same operations as CUDA kernels, and a training step of them"),
    (("tinyvit/gpu/", "tinyvit/doctor.py"), "Choosing a device, and a check of the machine"),
    (("tinyvit/pretrained/",), "The trained model, and how a picture becomes an MNIST image"),
    (("tinyvit/server/", "tinyvit/page/"), "The page to draw digits on, and its JSON API"),
    (("tinyvit/commands/", "tinyvit/console.py", "tinyvit/__main__.py"), "The commands"),
    (("lessons/",), "Sixteen lessons, their exercises and solutions"),
    (("tests/",), "The tests"),
    (("benchmarks/",), "Measurements, and their records"),
)
ORDER = (  # the order of reading; a folder stands for its files that are not named above
    "tinyvit/reference.py",
    "tinyvit/ops/linear.py",
    "tinyvit/ops/layer_norm.py",
    "tinyvit/ops/gelu.py",
    "tinyvit/ops/softmax.py",
    "tinyvit/ops/attention.py",
    "tinyvit/ops/class_attention.py",
    "tinyvit/ops/patches.py",
    "tinyvit/ops/cross_entropy.py",
    "tinyvit/ops/",
    "tinyvit/loops.py",
    "tinyvit/parameters.py",
    "tinyvit/model.py",
    "tinyvit/optim.py",
    "tinyvit/gradcheck.py",
    "tinyvit/training/step.py",
    "tinyvit/training/loop.py",
    "tinyvit/training/settings.py",
    "tinyvit/training/state.py",
    "tinyvit/training/workers.py",
    "tinyvit/training/",
    "tinyvit/data/batches.py",
    "tinyvit/data/augment.py",
    "tinyvit/data/mnist.py",
    "tinyvit/data/idx.py",
    "tinyvit/data/datasets.py",
    "tinyvit/data/",
    "tinyvit/backend.py",
    "tinyvit/memory.py",
    "tinyvit/checks.py",
    "tinyvit/classifier.py",
    "tinyvit/sklearn.py",
    "tinyvit/evaluate.py",
    "tinyvit/plots.py",
    "tinyvit/checkpoint.py",
    "tinyvit/files.py",
    "tinyvit/signatures.py",
    "tinyvit/kernels/linear.cu",
    "tinyvit/kernels/layer_norm.cu",
    "tinyvit/kernels/attention.cu",
    "tinyvit/kernels/cross_entropy.cu",
    "tinyvit/kernels/patches.cu",
    "tinyvit/kernels/adam.cu",
    "tinyvit/kernels/matmul.cuh",
    "tinyvit/kernels/",
    "tinyvit/gpu/",
    "tinyvit/doctor.py",
    "tinyvit/pretrained/",
    "tinyvit/server/",
    "tinyvit/page/",
    "tinyvit/commands/",
    "tinyvit/console.py",
    "tinyvit/",
)
CODE = (".py", ".cu", ".cuh", ".h", ".js", ".css", ".html")


def files_of(part):
    """Return the source files of a part: the file itself if it exists, or all files of a folder (with a slash)."""
    if not part.endswith("/"):
        return [ROOT / part] if (ROOT / part).exists() else []
    skipped = {"__pycache__", "output"}
    found = [path for path in (ROOT / part).rglob("*") if path.suffix in CODE and not skipped & set(path.parts)]
    return sorted(found)


def check_maps():
    """Raise `ValueError` with what to change unless both maps name every file of the library, and only real ones."""
    named = [part for parts, _ in FOLDERS for part in parts]
    mapped = {path for part in named for path in files_of(part)} | {ROOT / "tinyvit" / "__init__.py"}
    lacking = [path.relative_to(ROOT).as_posix() for path in files_of("tinyvit/") if path not in mapped]
    faults = [f"add {name} to a row of FOLDERS" for name in lacking]
    for place, parts in (("FOLDERS", named), ("ORDER", ORDER)):
        faults += [f"remove {part} from {place}: there is no such file" for part in parts if not files_of(part)]
    if faults:
        raise ValueError(f"the maps in benchmarks/tables.py are not those of the library: {'; '.join(faults)}")


def code_lines(path):
    """Return the number of lines of a file that hold code: no docstrings, no comments, no blank lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = re.sub(r"/\*.*?\*/|<!--.*?-->", "", text, flags=re.DOTALL)
        return sum(bool(line.strip()) and not line.strip().startswith("//") for line in text.splitlines())
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def house():
    """Return the README's map: folders and the files at the top, their lines of code, and what they are."""
    rows = []
    for parts, description in FOLDERS:
        links = ", ".join(f"[`{part.removeprefix('tinyvit/')}`]({part.rstrip('/')})" for part in parts)
        count = sum(code_lines(path) for part in parts for path in files_of(part))
        count = count if count < 1000 else round(count, -2)  # so that small changes leave the README as it is
        rows.append(f"| {links} | {count:,} | {description} |")
    return "\n".join(["| part | lines of code | what it is |", "| --- | ---: | --- |", *rows])


def reading_order():
    """Return all source files of the library in the order of reading, without the empty fronts of packages."""
    order = []
    for part in ORDER:
        order += [path for path in files_of(part) if path not in order]
    return [path for path in order if path.name != "__init__.py" or code_lines(path) > 20]


def files():
    """Return the map of all files: the lines of code of each, and the first line of its docstring."""
    rows = []
    for path in reading_order():
        name = path.relative_to(ROOT).as_posix()
        link = os.path.relpath(path, ROOT / "docs" / "guide")
        rows.append(f"| [`{name.removeprefix('tinyvit/')}`]({link}) | {code_lines(path)} | {first_sentence(path)} |")
    return "\n".join(["| file | lines of code | |", "| --- | ---: | --- |", *rows])


def first_sentence(path):
    """Return what the first line of a source file says it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].rstrip(".")
    if path.suffix == ".html":
        return "Page: " + re.search("<title>(.*?)</title>", text)[1]
    if path.suffix == ".css":
        return "The style of the pages"
    return re.sub(r"^(// |/\* )|( \*/)$", "", text.partition("\n")[0]).rstrip(".")


# ---- writing them ----

PARTS = {  # page: its generated parts
    "README.md": {"numbers": numbers, "house": house},
    "docs/guide/reading_the_code.md": {"files": files},
    "docs/results/accuracy.md": {"accuracy": accuracy_table, "time": time_table, "other-data": other_data_table},
    "docs/results/robustness.md": {
        "kills": kills_table,
        "damage": damage_table,
        "mutants": mutants_table,
        "environments": environments_table,
    },
    "docs/results/speed.md": {
        "step": step_tables,
        "goals": goals_table,
        "inference": inference_tables,
        "memory": memory_text,
        "scaling": scaling_table,
        "gpu": lambda: gpu_table(record("gpu")),
    },
    "docs/results/server.md": {"server": server_table},
}


def generated(page, text):
    """Return the text of a page with everything between its markers generated again."""
    for name, make in PARTS[page].items():
        pattern, part = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", make()
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} needs one pair of markers <!-- {name} --> and <!-- /{name} -->, not {count}")
    return text


def draw_picture(run):
    """Draw the training curve of a run, beside what its model looks at.

    Parameters
    ----------
    run : Path
        The run's folder.
    """
    import checkout  # noqa: F401  so that the next lines find tinyvit

    from tinyvit.checkpoint import load_model
    from tinyvit.data import load_mnist
    from tinyvit.evaluate import attention_rollout, patch_maps
    from tinyvit.plots import hero

    parameters, config = load_model(run / "model.safetensors")
    history = json.loads((run / "metrics.json").read_text())["history"]
    data = load_mnist()
    chosen = [int((data.test_labels == digit).argmax()) for digit in range(10)][2:10]  # the first of each digit
    images = data.test_images[chosen]
    maps = patch_maps(attention_rollout(images, parameters, config))
    hero(history, images, maps, PICTURE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, metavar="RUN", help="draw the picture from this run's folder")
    options = parser.parse_args()
    if options.picture:
        draw_picture(options.picture)
    try:
        check_maps()
    except ValueError as error:
        parser.error(str(error))
    for page in PARTS:
        path = ROOT / page
        path.write_text(generated(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
