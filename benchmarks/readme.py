"""Write into README.md what is generated there: the table of results, the map of the house, the first picture.

    python benchmarks/readme.py                          tables, from benchmarks/results/ and the source
    python benchmarks/readme.py --picture runs/RUN       and the picture, from a trained run

A test fails when the README says something else than its sources do.
"""

import argparse
import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = RESULTS / "accuracy"
PICTURE = RESULTS / "learning_and_looking.png"
PARTS = (
    "tinyvit/backend.py",
    "tinyvit/ops/linear.py",
    "tinyvit/ops/layer_norm.py",
    "tinyvit/ops/gelu.py",
    "tinyvit/ops/attention.py",
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
    "tinyvit/parallel.py",
    "tinyvit/files.py",
    "tinyvit/checkpoint.py",
    "tinyvit/train.py",
    "tinyvit/evaluate.py",
    "tinyvit/plots.py",
    "tinyvit/results.py",
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
    quiet = json.loads((RECORDS / "tuned-two-workers-seed0" / "metrics.json").read_text())
    speed = (
        f"The default took {quiet['seconds'] / 60:.1f} minutes on two cores with nothing else running "
        f"({quiet['images_per_second']:,.0f} images/s, {quiet['versions']['cpu'].split(',')[0]}, NumPy "
        f"{quiet['versions']['numpy']}); the technical note reports 20 minutes."
    )
    return "\n".join([*rows, "", speed])


def house():
    """Return the map of the house: each file, its lines, and the first line of its docstring."""
    rows = ["| file | lines | |", "| --- | ---: | --- |"]
    for part in PARTS:
        text = (ROOT / part).read_text()
        sentence = ast.get_docstring(ast.parse(text)).splitlines()[0].rstrip(".")
        rows.append(f"| [`{part.removeprefix('tinyvit/')}`]({part}) | {len(text.splitlines())} | {sentence} |")
    return "\n".join(rows)


def generated(text):
    """Return the README's `text` with everything between its markers made anew."""
    for name, part in {"accuracy": accuracy_table(), "house": house()}.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md needs one pair of markers <!-- {name} --> and <!-- /{name} -->, not {count}")
    return text


def draw_picture(run):
    """Draw the training curve of `run`, a folder, beside what its model looks at."""
    from tinyvit.checkpoint import load_model
    from tinyvit.data import load_mnist
    from tinyvit.evaluate import attention_rollout, patch_maps
    from tinyvit.plots import hero

    model = load_model(run / "model.safetensors")
    history = json.loads((run / "metrics.json").read_text())["history"]
    data = load_mnist()
    chosen = [int((data.test_labels == digit).argmax()) for digit in range(10)][2:10]  # the first of each digit
    images = data.test_images[chosen]
    maps = patch_maps(attention_rollout(images, model.parameters, model.config))
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
