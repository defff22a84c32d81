"""Write the results of a run into its folder: numbers, tables and pictures. Each file is replaced as a whole."""

import csv
import io
import json
import logging
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_info

from tinyvit import plots
from tinyvit.checkpoint import CheckpointError, in_short
from tinyvit.data.augment import Augmentation, warp
from tinyvit.evaluate import Evaluation, classification_report, confusion, misclassified
from tinyvit.files import write_atomically
from tinyvit.training.settings import TrainingConfig
from tinyvit.training.state import read_checkpoint, require_origin

if TYPE_CHECKING:
    from tinyvit.backend import Backend
    from tinyvit.classifier import VisionTransformer

METRICS = "metrics.json"
GPU_METRICS = ("precision", "kernels", "compile_seconds")  # they describe a GPU's kernels
HISTORY_FORMATS = {  # the columns of history.csv
    "epoch": "d",
    "train_loss": ".4f",
    "train_accuracy": ".4f",
    "validation_loss": ".4f",
    "validation_accuracy": ".4f",
    "first_learning_rate": ".3g",
    "last_learning_rate": ".3g",
    "seconds": ".1f",
}


def versions(backend: "Backend") -> dict[str, str]:
    """Return the versions and the machine that a result depends on.

    Parameters
    ----------
    backend : Backend
        The backend that computes. On a GPU, CuPy's version is included.

    Returns
    -------
    dict of str
        One text per library, and "blas", "machine" and "cpu".
    """
    found = {"python": platform.python_version()}
    for name in ("tinyvit", "numpy", "scipy", "scikit-learn", "matplotlib", "safetensors", "threadpoolctl", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the package is imported from its source folder
            found[name] = "not installed"
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    libraries = {f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}".strip() for pool in blas}
    found["blas"] = ", ".join(sorted(libraries))
    if backend.device == "gpu":
        found["cupy"] = backend.xp.__version__
    found |= {"machine": f"{platform.system()} {platform.machine()}", "cpu": _processor()}
    return found


def _processor():
    """Return the processor's name, on Linux with its family and model, and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        name = f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    except (OSError, KeyError):
        name = platform.processor() or "unknown"
    return f"{name}, {os.cpu_count()} cores"


def read_metrics(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the metrics in `folder`/metrics.json.

    Parameters
    ----------
    folder : path-like
        The folder of a run.

    Returns
    -------
    dict
        The metrics. Empty if there is no such file.

    Raises
    ------
    CheckpointError
        If the file is not what `write_metrics` writes.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metrics, dict) or not isinstance(metrics.get("origin", {}), dict):
            raise ValueError("no JSON object, or its origin is none")
        require_origin(metrics.get("origin", {}))
    except (OSError, ValueError, RecursionError) as error:
        text = f"not the metrics of a run ({in_short(error)})"
        raise CheckpointError(f"{path}: {text}: give the folder of another run") from error
    return metrics


def write_metrics(folder: str | PathLike[str], metrics: dict[str, Any]) -> None:
    """Write `folder`/metrics.json.

    Metrics of a run on a CPU are written without the entries that describe a GPU's kernels.

    Parameters
    ----------
    folder : path-like
        The folder of a run. It must exist.
    metrics : dict
        Values that JSON can represent. "device" is "cpu" or "gpu" if the metrics are those of a run.
    """
    if metrics.get("device") == "cpu":
        metrics = {name: value for name, value in metrics.items() if name not in GPU_METRICS}
        if "origin" in metrics:
            origin = metrics["origin"].items()
            metrics["origin"] = {name: value for name, value in origin if name not in GPU_METRICS}
    write_atomically(Path(folder) / METRICS, json.dumps(metrics, indent=2) + "\n")


def write_history(
    folder: str | PathLike[str], history: list[dict[str, Any]], config: TrainingConfig | None = None
) -> None:
    """Write `folder`/history.csv and `folder`/training_curves.png.

    The table has the first and the last learning rate of each epoch, and the training time since the start of the
    run in seconds. A cell is empty if an earlier version of tinyvit did not record its value.

    Parameters
    ----------
    folder : path-like
        The folder of a run. It must exist.
    history : list of dict
        One record per epoch, as `State.history` keeps them.
    config : TrainingConfig, optional
        The settings of the run, which explain its losses. Default: those of the checkpoint in `folder`.
    """
    folder = Path(folder)
    if config is None:
        config = TrainingConfig.from_dict(read_checkpoint(folder)[1]["training"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HISTORY_FORMATS)
    for record in history:
        values = ((form, record.get(name)) for name, form in HISTORY_FORMATS.items())
        writer.writerow("" if value is None else format(value, form) for form, value in values)
    write_atomically(folder / "history.csv", text.getvalue())
    note = describe_losses(history, config)
    draw_or_note(plots.training_curves, folder / "training_curves.png", history=history, note=note)


def draw_or_note(draw: Callable[..., None], path: Path, **arguments: Any) -> None:
    """Draw a picture. If this fails, log a note, so that a picture never costs the results of a run.

    Parameters
    ----------
    draw : callable
        A function of `tinyvit.plots`.
    path : pathlib.Path
        The PNG to write.
    **arguments
        The other arguments of the function.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    try:
        draw(path=path, **arguments)
    except OSError:
        raise
    except Exception as error:
        text = "note: %s is missing, because it could not be drawn (%s: %s)"
        path.unlink(missing_ok=True)  # an earlier picture would show other results
        logging.getLogger("tinyvit").warning(text, path, type(error).__name__, in_short(error))


def describe_losses(history: list[dict[str, Any]], config: TrainingConfig) -> str:
    """Describe in one line the conditions under which training and validation loss are measured.

    Parameters
    ----------
    history : list of dict
        One record per epoch.
    config : TrainingConfig
        The settings of the run.

    Returns
    -------
    str
        The line. It gives the reason if the training loss is above the validation loss in every epoch.
    """
    images = "on augmented images" if config.augmentation else ""
    labels = "with smoothed labels" if config.smoothing else ""
    conditions = " ".join(filter(None, (images, labels)))
    training = "a mean over each epoch" + (f", {conditions}" if conditions else "")
    losses = [(record["train_loss"], record["validation_loss"]) for record in history]
    if any(validation is None for _, validation in losses):
        return f"The training loss is {training}. This run has no validation images."
    if conditions and all(train > validation for train, validation in losses):
        return f"The training loss lies above the validation loss because it is {training}."
    original = " and ".join(filter(None, (images and "images", labels and "labels")))
    validation = f"uses the original {original}" if original else "is measured at the end of each epoch"
    return f"The training loss is {training}. The validation loss {validation}."


def write_evaluation(
    folder: str | PathLike[str],
    model: "VisionTransformer",
    images: np.ndarray,
    labels: np.ndarray,
    workers: int | None = None,
    pictures: bool = True,
) -> Evaluation:
    """Evaluate a model, and write the classification report, the confusion matrix and the mistakes.

    Parameters
    ----------
    folder : path-like
        Where the files go. It must exist.
    model : VisionTransformer
        The model to evaluate.
    images : ndarray of shape (N, R, C)
        The test images, uint8.
    labels : ndarray of shape (N,)
        Their classes, integers.
    workers : int, optional
        Number of threads. Default: one per core.
    pictures : bool, default True
        Whether to draw the pictures, too. Otherwise `draw_evaluation` draws them later.

    Returns
    -------
    Evaluation
        The predictions, the accuracy and the loss.
    """
    evaluation = model.evaluate(images, labels, workers=workers)
    report = classification_report(evaluation, list(map(plots.printable, model.config.names)))
    write_atomically(Path(folder) / "classification_report.txt", report)
    if pictures:
        draw_evaluation(folder, evaluation, images, model.config.names)
    return evaluation


def draw_evaluation(
    folder: str | PathLike[str], evaluation: Evaluation, images: np.ndarray, class_names: Sequence[str]
) -> None:
    """Draw the confusion matrix and the mistakes. A picture that cannot be drawn is a note.

    Parameters
    ----------
    folder : path-like
        Where the files go. It must exist.
    evaluation : Evaluation
        The predictions.
    images : ndarray of shape (N, R, C)
        The test images, uint8.
    class_names : sequence of str
        One name per class.
    """
    folder = Path(folder)
    draw_or_note(
        plots.confusion_matrix,
        folder / "confusion_matrix.png",
        counts=confusion(evaluation),
        class_names=class_names,
    )
    draw_or_note(
        plots.misclassified,
        folder / "misclassified.png",
        images=images,
        labels=evaluation.labels,
        predictions=evaluation.predictions,
        confidences=evaluation.confidences,
        wrong=misclassified(evaluation),
        class_names=class_names,
    )


def write_augmentation_sheet(
    folder: str | PathLike[str], images: np.ndarray, augmentation: Augmentation, seed: int = 0, variants: int = 9
) -> None:
    """Write `folder`/augmentation.png: one row per image, with the original and random variants of it.

    Parameters
    ----------
    folder : path-like
        The folder of a run. It must exist.
    images : ndarray of shape (N, R, C)
        The original images, uint8.
    augmentation : Augmentation
        The ranges of the random changes.
    seed : int, optional
        Seed of the random numbers.
    variants : int, optional
        Number of variants per image.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for image in images:
        copies = np.repeat(image[None], variants, axis=0)
        rows.append([image / 255, *warp(copies, augmentation.draw(rng, variants))])
    note = describe_augmentation(augmentation)
    draw_or_note(plots.augmentation_sheet, Path(folder) / "augmentation.png", rows=rows, note=note)


def describe_augmentation(augmentation: Augmentation) -> str:
    """Describe in one line the columns of the augmentation sheet.

    Parameters
    ----------
    augmentation : Augmentation
        The settings of the run.

    Returns
    -------
    str
        The line, with the range of every change that the settings use.
    """
    a = augmentation
    changes = {
        f"rotation ±{a.rotation:g}°": a.rotation,
        f"scale {1 / (1 + a.scale):.2f} to {1 + a.scale:.2f}": a.scale,
        f"shear ±{a.shear:g}°": a.shear,
        f"shift ±{a.shift:g} px": a.shift,
        f"{100 * a.flip:g} % mirrored": a.flip,
    }
    used = ", ".join(text for text, value in changes.items() if value)
    if not used:
        return "Column 1 is the original image. This run uses no augmentation, so all columns are the same."
    return f"Column 1 is the original image. The others are random variants: {used}."
