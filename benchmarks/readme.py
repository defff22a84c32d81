"""Write into README.md what is generated there: the table of results, the map of the house, the first picture.

    python benchmarks/readme.py                          tables, from benchmarks/results/ and the source
    python benchmarks/readme.py --picture runs/RUN       and the picture, from a trained run

A test fails when the README says something else than its sources do.
"""

import argparse
import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = RESULTS / "accuracy"
PICTURE = RESULTS / "learning_and_looking.png"
PARTS = (
    "tinyvit/reference.py",
    "tinyvit/backend.py",
    "tinyvit/checks.py",
    "tinyvit/memory.py",
    "tinyvit/ops/linear.py",
    "tinyvit/ops/layer_norm.py",
    "tinyvit/ops/gelu.py",
    "tinyvit/ops/softmax.py",
    "tinyvit/ops/attention.py",
    "tinyvit/ops/class_attention.py",
    "tinyvit/ops/patches.py",
    "tinyvit/ops/cross_entropy.py",
    "tinyvit/parameters.py",
    "tinyvit/model.py",
    "tinyvit/optim.py",
    "tinyvit/gradcheck.py",
    "tinyvit/data/idx.py",
    "tinyvit/data/mnist.py",
    "tinyvit/data/augment.py",
    "tinyvit/data/batches.py",
    "tinyvit/files.py",
    "tinyvit/checkpoint.py",
    "tinyvit/gpu/device.py",
    "tinyvit/gpu/diagnosis.py",
    "tinyvit/kernels/launch.py",
    "tinyvit/kernels/step.py",
    "tinyvit/kernels/linear.cu",
    "tinyvit/kernels/layer_norm.cu",
    "tinyvit/kernels/attention.cu",
    "tinyvit/kernels/cross_entropy.cu",
    "tinyvit/kernels/patches.cu",
    "tinyvit/kernels/adam.cu",
    "tinyvit/kernels/matmul.cuh",
    "tinyvit/kernels/tensor_cores.cuh",
    "tinyvit/kernels/warp.cuh",
    "tinyvit/evaluate.py",
    "tinyvit/plots.py",
    "tinyvit/training/settings.py",
    "tinyvit/training/state.py",
    "tinyvit/training/step.py",
    "tinyvit/training/loop.py",
    "tinyvit/training/workers.py",
    "tinyvit/training/progress.py",
    "tinyvit/training/results.py",
    "tinyvit/pretrained/pictures.py",
    "tinyvit/classifier.py",
    "tinyvit/doctor.py",
    "tinyvit/server/listen.py",
    "tinyvit/server/guard.py",
    "tinyvit/server/app.py",
    "tinyvit/server/reader.py",
    "tinyvit/commands/train.py",
    "tinyvit/commands/evaluate.py",
    "tinyvit/commands/predict.py",
    "tinyvit/commands/serve.py",
    "tinyvit/commands/doctor.py",
    "tinyvit/__main__.py",
)


def accuracy_table():
    """Return the table of test accuracies, from benchmarks/results/accuracy.json."""
    rows = ["| 10 epochs of batch 64 | test accuracy | seeds |", "| --- | --- | --- |"]
    names = {
        "tuned": "the default, `--recipe tuned`",
        "note": "the technical note's training, one image in ten flipped, `--recipe note`",
        "note-flip-half": "the same, every second image flipped, `--recipe note --flip 0.5`",
    }
    recorded = json.loads((RESULTS / "accuracy.json").read_text())
    for name, description in names.items():
        figures = recorded[name]
        mean, deviation = figures["test_accuracy_mean"], figures["test_accuracy_deviation"]
        seeds = ", ".join(str(seed) for seed in figures["seeds"])
        spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
        rows.append(f"| {description} | **{100 * mean:.2f} %**{spread} | {seeds} |")
    rows.append("| what the technical note reports | 97.77 % | |")
    timed = json.loads((RESULTS / "time_to_accuracy.json").read_text())
    runs = [run for run in timed["runs"] if run["epochs"] == 10]
    seconds = statistics.median(run["seconds"] for run in runs)
    speed = (
        f"Ten epochs of the default took {seconds / 60:.1f} minutes on two cores ({550_000 / seconds:,.0f} images/s, "
        f"median of {len(runs)} seeds, {timed['conditions']['cpu'].split(',')[0]}, NumPy "
        f"{timed['conditions']['numpy']}); the technical note reports 20 minutes."
    )
    return "\n".join([*rows, "", speed])


STEP_NAMES = {  # of the contestants of train_step.py
    "products": "the matrix products of the plain step alone, the floor",
    "torch": "PyTorch",
    "torch-compiled": "PyTorch, `torch.compile`",
    "torch-shortcut": "the same, with the last block for the class token only",
    "jax": "JAX, `jit`",
}
INFERENCE_NAMES = {
    "torch": "PyTorch",
    "torch-compiled": "`torch.compile`",
    "jax": "JAX",
    "onnx": "ONNX Runtime",
}


def speed_table():
    """Return the tables of speed, from what train_step.py, inference.py and memory.py recorded."""
    step = json.loads((RESULTS / "train_step.json").read_text())
    records = step["records"]
    heads = [
        f"batch {record['batch']}" + (f", MLP {record['mlp_width']}" if record["mlp_width"] != 512 else "")
        for record in records
    ]
    rows = [f"| a training step, {records[0]['threads']} cores | " + " | ".join(heads) + " |"]
    rows.append("| --- |" + " ---: |" * len(records))
    ours = [record["contestants"]["tinyvit"]["milliseconds"][1] for record in records]
    rows.append("| **tinyvit** | " + " | ".join(f"**{value:.1f} ms**" for value in ours) + " |")
    for name, description in STEP_NAMES.items():
        times = [record["contestants"][name]["times_tinyvit"] for record in records]
        cells = [f"{median:.2f}x ({low:.2f}-{high:.2f})" for low, median, high in times]
        rows.append(f"| {description} | " + " | ".join(cells) + " |")

    inference = json.loads((RESULTS / "inference.json").read_text())["records"][0]["contestants"]
    others = ", ".join(
        f"{name} {inference[key]['times_tinyvit'][1]:.2f}x" for key, name in INFERENCE_NAMES.items()
    )
    memory = json.loads((RESULTS / "memory.json").read_text())
    conditions = step["conditions"]
    text = (
        f"Classifying the 10,000 test images takes {inference['tinyvit']['milliseconds'][1] / 1e3:.2f} s; {others} "
        "that time, each at its best batch size (and with all tokens in the last block). A whole training run, with "
        "all it imports, its helper process, its evaluation and its pictures, peaks at "
        f"{memory['peak_megabytes']} MB. {conditions['cpu'].split(',')[0]}, Python "
        f"{conditions['python']}, NumPy {conditions['numpy']} ({conditions['blas']}), PyTorch {conditions['torch']}, "
        f"JAX {conditions['jax']}."
    )
    return "\n".join([*rows, "", text])


GPU_NAMES = {  # of the contestants of gpu.py
    "torch": "PyTorch eager",
    "torch-compiled": '`torch.compile`, "max-autotune"',
    "torch-graph": "PyTorch, a CUDA graph a step",
}


def gpu_table(found):
    """Return the table of a GPU's speed, from what gpu.py recorded; found: that, or None if there is none."""
    if found is None:
        return (
            "On an NVIDIA GPU: **not measured on a real card yet**. `python benchmarks/gpu.py --json "
            "benchmarks/results/gpu.json`\nmeasures it within eight minutes, and `python benchmarks/readme.py` then "
            "puts the figures here."
        )
    rows = ["| on a GPU | 10 epochs | tinyvit, a step | " + " | ".join(GPU_NAMES.values()) + " |"]
    rows.append("| --- |" + " ---: |" * (2 + len(GPU_NAMES)))
    trained = {}
    for record in found["training"]:
        if "seconds" in record and record["epochs"] == 10:
            trained[record["batch"], record["precision"]] = f" {statistics.median(record['seconds']):.1f} s"
    for record in found["steps"]:
        case, contestants = (record["batch"], record["precision"]), record["contestants"]
        ours = contestants.get("graph", {})
        step = f"**{ours['milliseconds'][1]:.3f} ms**" if "milliseconds" in ours else _missing(ours)
        cells = [_gpu_cell(contestants.get(name, {})) for name in GPU_NAMES]
        label = f"batch {record['batch']}, {record['precision']}"
        rows.append(f"| {label} |{trained.get(case, '')} | {step} | " + " | ".join(cells) + " |")
    conditions = found["conditions"]
    cards = conditions["nvidia_smi"]["before"]
    driver = f", driver {cards[0]['driver_version']}" if isinstance(cards, list) and cards else ""
    runtime = conditions.get("cuda_runtime")
    cuda = f", CUDA {runtime // 1000}.{runtime % 1000 // 10}" if runtime else ""
    torch = f", PyTorch {conditions['torch']}" if conditions.get("torch") else ""
    text = (
        "All at the same precision, in turns in one run. A step of tinyvit gathers its images from the training set "
        "and changes them, those of PyTorch lie ready; and of the last block it computes only what the class token "
        "needs. "
        f"{conditions['card']}{driver}, CuPy {conditions['cupy']}{cuda}{torch}: `python benchmarks/gpu.py`."
    )
    return "\n".join([*rows, "", text])


def _gpu_cell(figures):
    if figures.get("times_tinyvit") is None:
        return f"{figures['milliseconds'][1]:.3f} ms" if "milliseconds" in figures else _missing(figures)
    low, median, high = figures["times_tinyvit"]
    return f"{median:.2f}x ({low:.2f}-{high:.2f})"


def _missing(figures):
    words = {"absent": "not there", "failed": "failed"}
    return next((word for state, word in words.items() if state in figures), "not measured")


def time_table():
    """Return the table of seconds to an accuracy, from what time_to_accuracy.py recorded."""
    found = json.loads((RESULTS / "time_to_accuracy.json").read_text())
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in found["runs"]}))
    rows = [f"| test accuracy | seconds of training, median of seeds {seeds} | range | a run of |"]
    rows.append("| --- | ---: | ---: | --- |")
    for target in found["summary"]:
        best = next((length for length in target["lengths"] if length["epochs"] == target["best_epochs"]), None)
        if best is None:
            rows.append(f"| {target['target']:g} % | not by most seeds | | |")
            continue
        low, high = best["range"]
        plural = "epoch" if best["epochs"] == 1 else "epochs"
        reached = sum(value is not None for value in best["seconds"])
        some = "" if reached == len(best["seconds"]) else f" ({reached} of {len(best['seconds'])} seeds)"
        length = f"{best['epochs']} {plural}"
        median = f"**{best['median']:.0f} s**"
        rows.append(f"| {target['target']:g} % | {median} | {low:.0f}-{high:.0f} s{some} | {length} |")
    rows.append("| 97.77 %, the technical note | 1,200 s | | 10 epochs |")
    return "\n".join(rows)


def house():
    """Return the map of the house: each file, its lines, and the first line of its docstring."""
    rows = ["| file | lines | |", "| --- | ---: | --- |"]
    for part in PARTS:
        text = (ROOT / part).read_text()
        if part.endswith(".py"):
            sentence = ast.get_docstring(ast.parse(text)).splitlines()[0].rstrip(".")
        else:
            sentence = text.splitlines()[0].removeprefix("// ").rstrip(".")
        rows.append(f"| [`{part.removeprefix('tinyvit/')}`]({part}) | {len(text.splitlines())} | {sentence} |")
    return "\n".join(rows)


def generated(text):
    """Return the README's `text` with everything between its markers made again."""
    record = RESULTS / "gpu.json"
    parts = {
        "accuracy": accuracy_table(),
        "speed": speed_table(),
        "gpu": gpu_table(json.loads(record.read_text()) if record.exists() else None),
        "time": time_table(),
        "house": house(),
    }
    for name, part in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md needs one pair of markers <!-- {name} --> and <!-- /{name} -->, not {count}")
    return text


def draw_picture(run):
    """Draw the training curve of `run`, a folder, beside what its model looks at."""
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
    README.write_text(generated(README.read_text()))


if __name__ == "__main__":
    main()
