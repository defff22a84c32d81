"""What a run leaves in its folder: numbers, tables and pictures, each written at once."""

import csv
import io
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from tinyvit import plots
from tinyvit.checkpoint import CheckpointError
from tinyvit.data.augment import warp
from tinyvit.evaluate import classification_report, confusion, misclassified
from tinyvit.files import write_atomically
from tinyvit.training.workers import available_cores

METRICS = "metrics.json"
MODEL = "model.safetensors"


def versions(backend):
    """Return the versions and the machine that a number depends on, as a dict of texts."""
    found = {"python": platform.python_version()}
    for name in ("tinyvit", "numpy", "scipy", "scikit-learn", "matplotlib", "safetensors", "threadpoolctl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from its source, not installed
            found[name] = "not installed"
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    libraries = {f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}".strip() for pool in blas}
    found["blas"] = ", ".join(sorted(libraries))
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


def read_metrics(folder):
    """Return the metrics of `folder`/metrics.json, a dict; an empty one if there is no such file.

    Raises `CheckpointError` if it is not what `write_metrics` writes.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("origin", {}), dict):
        raise CheckpointError(f"{path}: not the metrics of a run")
    return metrics


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
    evaluation = model.evaluate(images, labels, workers=available_cores() if workers is None else workers)
    write_atomically(folder / "classification_report.txt", classification_report(evaluation))
    plots.confusion_matrix(confusion(evaluation), folder / "confusion_matrix.png")
    wrong, predictions, confidences = misclassified(evaluation), evaluation.predictions, evaluation.confidences
    plots.misclassified(images, labels, predictions, confidences, wrong, folder / "misclassified.png")
    return evaluation


def write_augmentation_sheet(folder, images, augmentation, seed=0, variants=9):
    """Draw what the augmentation makes of some images, a row per image, in `folder`/augmentation.png.

    images: (N, R, C) uint8, NumPy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for image in images:
        copies = np.repeat(image[None], variants, axis=0)
        rows.append([image / 255, *warp(copies, augmentation.draw(rng, variants))])
    plots.augmentation_sheet(rows, Path(folder) / "augmentation.png")
