"""Test a trained model again: report, confusion matrix and misclassified digits.

    tinyvit evaluate runs/tuned-seed0
    tinyvit evaluate runs/tuned-seed0 --data fashion/    on another data set

The results replace those in the run's folder. Another test set or a smaller
test gets a folder of its own inside it: RUN/on-fashion. For a model file
without its run, the results go to a folder beside it: FILE-evaluation.
"""

from pathlib import Path

from tinyvit.classifier import VisionTransformer
from tinyvit.commands import require_range
from tinyvit.data import load_mnist
from tinyvit.gpu import get_backend
from tinyvit.training import CHECKPOINT
from tinyvit.training.results import METRICS, MODEL, read_metrics, versions, write_evaluation, write_metrics


def add_arguments(parser):
    text = "a run's folder, or a model file"
    parser.add_argument("model", type=Path, metavar="MODEL", help=text)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help="where to compute (auto)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (one per core)")
    text = "folder with four idx files (the run's data, or MNIST)"
    parser.add_argument("--data", "--data-dir", type=Path, metavar="PATH", help=text)
    parser.add_argument("--test-limit", type=int, metavar="N", help="test on the first N images only")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")


def memory_advice(options):
    return "try fewer --workers, or --device cpu"


def run(options):
    require_range(options, "test-limit", 1)
    require_range(options, "workers", 1)
    backend = get_backend(options.device)
    path = options.model / MODEL if options.model.is_dir() else options.model
    of_a_run = path.name == MODEL and any((path.parent / name).exists() for name in (METRICS, CHECKPOINT))
    home = path.parent if of_a_run or options.model.is_dir() else path.with_name(f"{path.stem}-evaluation")
    model = VisionTransformer.load(path, backend)
    metrics = read_metrics(home) if of_a_run else {}
    origin = metrics.get("origin", {})
    data = load_mnist(options.data or origin.get("data_dir"), classes=model.config.classes)
    side = model.config.image_size
    if data.test_images.shape[1] != side:
        found = "{} x {}".format(*data.test_images.shape[1:])
        raise ValueError(f"{data.source}: the model reads images of {side} x {side} pixels, found {found}")
    limit = options.test_limit if options.test_limit or options.data else origin.get("test_limit")
    images, labels = data.test_images[:limit], data.test_labels[:limit]

    # The test set belongs to the record of a run, so that another test gets a folder and a record of its own.
    other = options.data or options.test_limit
    name = f"on-{data.name}" + (f"-first-{len(labels)}" if options.test_limit else "")
    folder = options.out or (home / name if other else home)
    if other or not metrics:
        metrics = {"run": str(options.model), "parameters": int(model.parameters.flat.size)}
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = write_evaluation(folder, model, images, labels, options.workers)
    metrics |= {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_images": len(labels),
        "test_data": data.source if options.data else data.name,
        "versions": versions(backend),
    }
    write_metrics(folder, metrics)
    print(f"test accuracy {100 * evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, {len(labels):,} images")
    print(f"results: {folder}")
