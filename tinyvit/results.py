"""What a run leaves in its folder: numbers, tables and pictures, each written at once."""

import csv
import io
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tinyvit import plots
from tinyvit.data.augment import warp
from tinyvit.evaluate import classification_report, confusion, evaluate
from tinyvit.files import write_atomically
from tinyvit.parallel import available_cores

METRICS = "metrics.json"
MODEL = "model.safetensors"


def versions(backend):
    """Return the versions and the machine that a number depends on, as a dict of texts."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("tinyvit", "numpy", "scipy", "scikit-learn")}
    if backend.device == "gpu":
        found["cupy"] = backend.xp.__version__
    found |= {"machine": f"{platform.system()} {platform.machine()}", "cpu": _processor()}
    return found


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "unknown"
    return f"{name}, {os.cpu_count()} cores"


def write_metrics(folder, metrics):
    """Write `metrics`, a dict, to `folder`/metrics.json."""
    write_atomically(Path(folder) / METRICS, json.dumps(metrics, indent=2) + "\n")


def write_history(folder, history):
    """Write `history`, a list with a dict an epoch, to `folder`/history.csv and training_curves.png."""
    folder = Path(folder)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "history.csv", text.getvalue())
    plots.training_curves(history, folder / "training_curves.png")


def write_evaluation(folder, model, images, labels, workers=None):
    """Run the test set through the model and write the report, the confusion matrix and the mistakes.

    images: (N, R, C) uint8 and labels: (N,) integers, both NumPy; workers: threads, by default the cores there are.
    Returns the `Evaluation`.
    """
    folder = Path(folder)
    evaluation = evaluate(model, images, labels, workers=workers or available_cores())
    write_atomically(folder / "classification_report.txt", classification_report(evaluation))
    plots.confusion_matrix(confusion(evaluation), folder / "confusion_matrix.png")
    plots.misclassified(
        images, labels, evaluation.predictions, evaluation.confidences, folder / "misclassified.png"
    )
    return evaluation


def write_augmentation_sheet(folder, images, augmentation, seed=0, variants=9):
    """Draw what the augmentation makes of some images, a row an image, in `folder`/augmentation.png.

    images: (N, R, C) uint8, NumPy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for image in images:
        copies = np.repeat(image[None], variants, axis=0)
        rows.append([image / 255, *warp(copies, augmentation.draw(rng, variants))])
    plots.contact_sheet(rows, Path(folder) / "augmentation.png")
