"""Evaluate a trained model again: its report, confusion matrix, misclassified digits and test figures.

    python examples/evaluate_mnist.py runs/tuned-seed0
    python examples/evaluate_mnist.py runs/tuned-seed0 --data-dir other/   another data set, in RUN/on-other
"""

import argparse
import sys
from pathlib import Path

from tinyvit.checkpoint import CheckpointError, load_model
from tinyvit.data import DataError, load_mnist
from tinyvit.gpu import DeviceError, get_backend
from tinyvit.gpu.diagnosis import is_out_of_memory, one_line
from tinyvit.training.results import MODEL, read_metrics, versions, write_evaluation, write_metrics


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder with model.safetensors, from train_mnist.py")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help="where to compute (auto)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (all cores)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="four idx files (those of the run, or MNIST)")
    parser.add_argument("--test-limit", type=int, metavar="N", help="test on the first N images only")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for what is written (RUN, or RUN/on-...)")
    options = parser.parse_args(arguments)
    try:
        for name, value in (("--test-limit", options.test_limit), ("--workers", options.workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        backend = get_backend(options.device)
        model = load_model(options.run / MODEL, backend)
        metrics = read_metrics(options.run)
        origin = metrics.get("origin", {})
        data = load_mnist(options.data_dir or origin.get("data_dir"), classes=model.config.classes)
        side = model.config.image_size
        if data.test_images.shape[1] != side:
            found = "{} x {}".format(*data.test_images.shape[1:])
            raise ValueError(f"{data.source}: the model reads images of {side} x {side} pixels, found {found}")
        limit = options.test_limit if options.test_limit or options.data_dir else origin.get("test_limit")
        images, labels = data.test_images[:limit], data.test_labels[:limit]

        # what a run was tested on is a part of its record: another test gets a folder, and a record, of its own
        other = options.data_dir or options.test_limit
        name = f"on-{data.name}" + (f"-first-{len(labels)}" if options.test_limit else "")
        folder = options.out or (options.run / name if other else options.run)
        if other:
            metrics = {"run": str(options.run), "parameters": int(model.parameters.flat.size)}
        folder.mkdir(parents=True, exist_ok=True)
        evaluation = write_evaluation(folder, model, images, labels, options.workers)
        metrics |= {
            "test_accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss,
            "test_images": len(labels),
            "test_data": data.source if options.data_dir else data.name,
            "versions": versions(backend),
        }
        write_metrics(folder, metrics)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (DataError, DeviceError, CheckpointError, ArithmeticError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # a GPU's may be either
        if not is_out_of_memory(error):
            raise
        print(f"error: not enough memory: try fewer --workers, or --device cpu ({one_line(error)})", file=sys.stderr)
        return 2
    print(
        f"test accuracy {100 * evaluation.accuracy:.2f} %, loss {evaluation.loss:.4f}, on {len(labels):,} images; "
        f"the evaluation is in {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
