"""Measure the time to classify the 10,000 test images of MNIST, for tinyvit, PyTorch, JAX and ONNX Runtime.

    python benchmarks/inference.py                                    the default model, in less than ten minutes
    python benchmarks/inference.py --mlp 512 3072 --json FILE         two MLP widths

A step classifies all images from memory in float32. tinyvit receives uint8 images in `evaluate`, and also
normalises and scores them. The peers receive normalised pixels and return logits. Peers that are not installed are
skipped. Each contestant first tries a few batch sizes on 2,000 images in a separate process and keeps the fastest.
tinyvit splits the batch of a thread into smaller chunks by default. Then all contestants take turns, round by round
(`turns.py`). A ratio is the median over the rounds of the ratio of two times from the same round. Before the
timing, the logits of a hundred images must agree with those of tinyvit to 1e-3.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import peers
from turns import PEERS, Contestant, compare, conditions, quartiles, ratio

from tinyvit.backend import available_cores, use_loops
from tinyvit.classifier import VisionTransformer
from tinyvit.data import load_mnist
from tinyvit.model import ViTConfig, initialise

TOLERANCE = 1e-3  # of a logit
NAMES = {
    "tinyvit": "tinyvit, compiled loops",
    "numpy": "tinyvit, NumPy only",
    "torch": "PyTorch eager",
    "torch-compiled": "PyTorch torch.compile",
    "jax": "JAX jit",
    "onnx": "ONNX Runtime",
}
LOOPS = {"tinyvit": "auto", "numpy": "off"}


def torch_compiled_logits(config, parameters, threads):
    import torch

    torch.compiler.reset()  # without it the second batch size is compiled for any size, which is slower
    return peers.torch_logits(config, parameters, threads, compiled=True)


BUILT_BY = {
    "torch": lambda config, parameters, threads, folder: peers.torch_logits(config, parameters, threads),
    "torch-compiled": lambda config, parameters, threads, folder: torch_compiled_logits(config, parameters, threads),
    "jax": lambda config, parameters, threads, folder: peers.jax_logits(config, parameters),
    "onnx": peers.onnx_logits,
}


def workload(mlp, images):
    """Return the model's settings, its weights, and `images` test images (N, 28, 28) uint8 and labels."""
    config, data = ViTConfig(mlp_width=mlp), load_mnist()
    return config, initialise(config), data.test_images[:images], data.test_labels[:images]


def spread(array):
    """Return about a hundred evenly spaced rows of `array`, whose logits are compared."""
    return array[:: max(1, len(array) // 100)]


def expected_logits(mlp, images):
    """Return the logits of tinyvit for the compared images."""
    config, parameters, pixels, _ = workload(mlp, images)
    return VisionTransformer(config, parameters).logits(spread(pixels))


def classify_step(contestant, mlp, images, batch, threads, expected, folder):
    """Return a function that classifies all images in batches of `batch`.

    A peer may keep files in `folder`. Raises `ValueError` if the logits differ from `expected`.
    """
    config, parameters, pixels, labels = workload(mlp, images)
    if contestant in LOOPS:
        model = VisionTransformer(config, parameters)
        with use_loops(LOOPS[contestant]):
            check(contestant, model.logits(spread(pixels)), expected)

        def evaluate():
            with use_loops(LOOPS[contestant]):
                model.evaluate(pixels, labels, batch_size=batch, workers=threads)

        return evaluate

    pixels = (pixels.astype(np.float32) / 255 - config.pixel_mean) / config.pixel_deviation
    logits_of = BUILT_BY[contestant](config, parameters, threads, folder)
    logits = np.empty((images, config.classes), np.float32)

    def step():
        for start in range(0, images, batch):
            logits[start : start + batch] = logits_of(pixels[start : start + batch])

    step()
    check(contestant, spread(logits), expected)
    return step


def check(contestant, logits, expected):
    """Raise `ValueError` if the logits differ from the expected ones."""
    worst = np.abs(logits - expected).max()
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{NAMES[contestant]}: the logits differ from those of tinyvit by {worst:.2g}, expected at most "
            f"{TOLERANCE:g}"
        )


def try_batches(batches, arguments):
    """Return a dict from each batch size to the seconds per image, the shorter of two times."""
    seconds = {}
    for batch in batches:
        step = classify_step(batch=batch, **arguments)
        step()
        times = []
        for _ in range(2):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        seconds[batch] = min(times) / arguments["images"]
    return seconds


def measure(mlp, images, batches, threads, names, rounds, seconds):
    """Return the record of all contestants: their times, their ratios to tinyvit, and their memory."""
    settings = {"mlp": mlp, "images": images, "threads": threads}
    settings["expected"] = expected_logits(mlp, images)
    few = 2000 if all(2000 % batch == 0 for batch in batches) and images > 2000 else images
    trial = settings | {"images": few, "expected": expected_logits(mlp, few)}
    contestants, tried = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        settings["folder"] = trial["folder"] = Path(folder)
        for name in names:
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                    tried[name] = own.submit(try_batches, batches, {"contestant": name} | trial).result()
            except ImportError as error:
                if (error.name or "").partition(".")[0] not in PEERS:
                    raise
                print(f"{NAMES[name]}: skipped, not installed ({error})", flush=True)
                continue
            batch = min(tried[name], key=tried[name].get)
            contestants[name] = Contestant(
                name,
                "inference",
                "classify_step",
                contestant=name,
                batch=batch,
                **settings,
            )
    compare(list(contestants.values()), rounds, seconds)
    ours = contestants["tinyvit"]
    record = {"images": images, "mlp_width": mlp, "threads": threads, "contestants": {}}
    for name, contestant in contestants.items():
        low, median, high = quartiles(contestant.seconds)
        record["contestants"][name] = {
            "images_per_second": images / median,
            "milliseconds": [1e3 * value for value in (low, median, high)],
            "times_tinyvit": ratio(contestant, ours),
            "batch": min(tried[name], key=tried[name].get),
            "milliseconds_by_batch": {batch: 1e3 * value * images for batch, value in tried[name].items()},
            "megabytes": round(contestant.megabytes),
        }
    return record


def show(record):
    """Print a record as a table."""
    print(f"\n{record['images']:,} images, MLP {record['mlp_width']}, {record['threads']} threads")
    print(f"{'':24} {'images/s':>9} {'ms for all':>24} {'times tinyvit':>20} {'batch':>6} {'peak MB':>8}")
    for name, figures in record["contestants"].items():
        low, median, high = figures["milliseconds"]
        below, times, above = figures["times_tinyvit"]
        print(
            f"{NAMES[name]:24} {figures['images_per_second']:9,.0f} {median:10.0f} ({low:.0f}-{high:.0f})"
            f" {times:10.2f} ({below:.2f}-{above:.2f}) {figures['batch']:6} {figures['megabytes']:8}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    batches = [20, 50, 100, 250, 500]
    add("--batch", nargs="+", type=int, default=batches, metavar="B", help="batch sizes to try (20 to 500)")
    add("--mlp", nargs="+", type=int, default=[512], metavar="F", help="widths of the MLP (512)")
    add("--images", type=int, default=10_000, metavar="N", help="use the first N test images (10000)")
    add("--threads", type=int, default=available_cores(), metavar="N", help="number of threads (one per core)")
    add("--rounds", type=int, default=5, metavar="N", help="rounds after the warm-up (5)")
    add("--seconds", type=float, default=2, metavar="S", help="length of a turn (2)")
    add("--only", nargs="+", choices=list(NAMES), metavar="NAME", help=f"contestants: {', '.join(NAMES)}")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options = parser.parse_args()
    uneven = [batch for batch in options.batch if batch < 1 or options.images % batch]
    if uneven:
        parser.error(f"--batch must divide the number of images, {options.images}, but got {uneven[0]}")
    names = ["tinyvit"] + [name for name in options.only or NAMES if name != "tinyvit"]
    records = []
    for mlp in options.mlp:
        record = measure(
            mlp=mlp,
            images=options.images,
            batches=options.batch,
            threads=options.threads,
            names=names,
            rounds=options.rounds,
            seconds=options.seconds,
        )
        records.append(record)
        show(record)
    if options.json:
        packages = ("numba", "torch", "jax", "jaxlib", "onnx", "onnxruntime")
        found = {"conditions": conditions(*packages), "records": records}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
