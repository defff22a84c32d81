"""Test a trained model again: report, confusion matrix and misclassified digits.

    tinyvit evaluate runs/tuned-seed0
    tinyvit evaluate runs/tuned-seed0 --data fashion/    on another data set

The results replace those in the folder of the run. The results for other data
or for fewer images go to a folder inside it, such as RUN/on-fashion. For a
model file outside a run, they go to a folder beside it, FILE-evaluation.
"""

import contextlib
import sys

from tinyvit import console
from tinyvit.backend import available_cores
from tinyvit.checkpoint import CHECKPOINT, MODEL, CheckpointError
from tinyvit.classifier import VisionTransformer
from tinyvit.commands import integer, make_option_folder, model_file, path, require_range, require_size
from tinyvit.data import load_dataset
from tinyvit.data.datasets import DIGITS
from tinyvit.gpu import get_backend
from tinyvit.training import read_checkpoint
from tinyvit.training.results import (
    METRICS,
    draw_evaluation,
    read_metrics,
    versions,
    write_evaluation,
    write_metrics,
)


def add_arguments(parser):
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of a run, or model file")
    text = "device that computes; auto: a GPU if one works, else the CPU (default: auto)"
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help=text)
    parser.add_argument("--workers", type=integer, metavar="N", help="number of threads (default: one per core)")
    text = "folder or file of a data set (default: the data of the run, or MNIST)"
    parser.add_argument("--data", "--data-dir", type=path, metavar="PATH", help=text)
    text = "test on only the first N test images (default: as in the run, or all)"
    parser.add_argument("--test-limit", type=integer, metavar="N", help=text)
    parser.add_argument("--out", type=path, metavar="DIR", help="folder for the results (default: see above)")


def memory_advice(options):
    return "try fewer --workers, or --device cpu"


def run(options):
    require_range(options, "test-limit", 1)
    require_range(options, "workers", 1, 1024)
    backend = get_backend(options.device)
    file = model_file(options.model)
    of_a_run = file.name == MODEL and any((file.parent / name).exists() for name in (METRICS, CHECKPOINT))
    home = file.parent if of_a_run or options.model.is_dir() else file.with_name(f"{file.stem}-evaluation")
    model = VisionTransformer.load(file, backend)
    metrics = read_metrics(home) if of_a_run else {}
    origin = metrics.get("origin", {})
    if of_a_run and not origin and not options.data:  # a run that ended before its metrics were written
        origin = origin_in_checkpoint(file.parent)
    data = load_dataset(options.data or origin.get("data_dir"), classes=model.config.classes)
    require_size(data.source, data.test_images, model.config)
    digits = "data_dir" in origin and origin["data_dir"] in (None, DIGITS)
    if model.config.class_names or digits:  # a model without names may be of any data
        note_other_names(model.config.names, data.class_names)
    limit = options.test_limit if options.test_limit or options.data else origin.get("test_limit")
    images, labels = data.test_images[:limit], data.test_labels[:limit]

    # The record of a run names its test set, so that the results of any other test go to another folder.
    other = options.data or options.test_limit
    name = f"on-{data.name}" + (f"-first-{len(labels)}" if options.test_limit else "")
    folder = options.out or (home / name if other else home)
    if other or not metrics:
        metrics = {"run": str(options.model), "parameters": int(model.parameters.flat.size)}
        metrics |= {} if other or not origin else {"origin": origin}
    make_option_folder("--out", folder)
    console.require_memory(200e6 + 110e6 * (options.workers or available_cores()))
    with console.cleanup_after_signals():
        evaluation = write_evaluation(
            folder,
            model=model,
            images=images,
            labels=labels,
            workers=options.workers,
            pictures=False,
        )
        metrics |= {
            "test_accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss,
            "test_images": len(labels),
            "test_data": data.source if options.data else data.name,
            "versions": versions(backend),
        }
        write_metrics(folder, metrics)
        draw_evaluation(folder, evaluation, images, model.config.names)  # last, since the results do not need them
    print(f"data set: {data.description}")
    print(f"test accuracy {100 * evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, {len(labels):,} images")
    print(f"results: {folder}")


def origin_in_checkpoint(folder):
    """Return the origin of a run from its checkpoint, or raise `ValueError` if it does not name the data."""
    with contextlib.suppress(CheckpointError):
        if origin := read_checkpoint(folder)[1]["origin"]:
            return origin
    raise ValueError(f"{folder}: neither {METRICS} nor {CHECKPOINT} names the data of this run: give --data")


def note_other_names(of_model, of_data):
    """Print a note if the classes of the data have other names than those of the model."""
    pairs = zip(of_model, of_data or (), strict=False)
    number, pair = next(((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1]), (None, ()))
    if pair:
        names = "class {} is {!r} in the model and {!r} in the data".format(number, *pair)
        print(f"note: {names}, so the accuracy may mean nothing", file=sys.stderr)
