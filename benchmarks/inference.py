"""How long it takes to classify the 10,000 test images of MNIST, beside PyTorch, JAX and ONNX Runtime.

    python benchmarks/inference.py                                    the default model
    python benchmarks/inference.py --mlp 512 3072 --json FILE

A step is all the images, in memory, in float32. This library gets them as a user has them, uint8, through `evaluate`,
and normalises and scores them too; peers get pixels that are normalised already, and give logits. Peers that are not
installed are skipped. Each contestant takes as many images at once as is fastest for it, out of a few batch sizes
that it tries in a process of its own; this library cuts the batch that each thread takes smaller by itself. Then all
take turns, round by round (`turns.py`), and a ratio is the median over the rounds of what two took in the same one.
A hundred images' logits must agree with this library's to 1e-3 before anything is timed.
"""

import argparse
import functools
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import peers
from turns import PEERS, Contestant, compare, conditions, quartiles, ratio

from tinyvit.classifier import VisionTransformer
from tinyvit.data import load_mnist
from tinyvit.model import ViTConfig, initialise
from tinyvit.training import available_cores

TOLERANCE = 1e-3  # of a logit
NAMES = {
    "tinyvit": "tinyvit",
    "torch": "PyTorch eager",
    "torch-compiled": "PyTorch torch.compile",
    "jax": "JAX jit",
    "onnx": "ONNX Runtime",
}


def torch_compiled_logits(config, parameters, threads):
    import torch

    torch.compiler.reset()  # or the second batch size would be compiled for any size, which is slower
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
    """Return about a hundred rows from all over `array`: those whose logits are compared."""
    return array[:: max(1, len(array) // 100)]


def expected_logits(mlp, images):
    """Return this library's logits for the images that are compared."""
    config, parameters, pixels, _ = workload(mlp, images)
    return VisionTransformer(config, parameters).logits(spread(pixels))


def classify_step(contestant, mlp, images, batch, threads, expected, folder):
    """Return a function that classifies all images, `batch` at a time, once its logits are as `expected`.

    folder: where a peer may keep files. Raises `ValueError` if the logits are others.
    """
    config, parameters, pixels, labels = workload(mlp, images)
    if contestant == "tinyvit":
        model = VisionTransformer(config, parameters)
        check(contestant, model.logits(spread(pixels)), expected)
        return functools.partial(model.evaluate, pixels, labels, batch_size=batch, workers=threads)

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
    """Raise `ValueError` unless the logits are the expected ones."""
    worst = np.abs(logits - expected).max()
    if not worst <= TOLERANCE:
        raise ValueError(f"{NAMES[contestant]} gives other logits than tinyvit: {worst:.2g} apart, not {TOLERANCE:g}")


def try_batches(batches, arguments):
    """Return the seconds that all images take for each batch size, the better of two: a dict."""
    seconds = {}
    for batch in batches:
        step = classify_step(batch=batch, **arguments)
        step()
        times = []
        for _ in range(2):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        seconds[batch] = min(times)
    return seconds


def measure(mlp, images, batches, threads, names, rounds, seconds):
    """Return a dict of what every contestant took, and how tinyvit's time compares."""
    settings = {"mlp": mlp, "images": images, "threads": threads}
    settings["expected"] = expected_logits(mlp, images)
    contestants, tried = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        settings["folder"] = Path(folder)
        for name in names:
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                    tried[name] = own.submit(try_batches, batches, {"contestant": name} | settings).result()
            except ImportError as error:
                if (error.name or "").partition(".")[0] not in PEERS:
                    raise
                print(f"{NAMES[name]}: skipped, not installed ({error})", flush=True)
                continue
            batch = min(tried[name], key=tried[name].get)
            entered = Contestant(name, "inference", "classify_step", contestant=name, batch=batch, **settings)
            contestants[name] = entered
    compare(list(contestants.values()), rounds, seconds)
    ours = contestants["tinyvit"]
    record = {"images": images, "mlp_width": mlp, "threads": threads, "contestants": {}}
    for name, entered in contestants.items():
        low, median, high = quartiles(entered.seconds)
        record["contestants"][name] = {
            "images_per_second": images / median,
            "milliseconds": [1e3 * value for value in (low, median, high)],
            "times_tinyvit": ratio(entered, ours),
            "batch": min(tried[name], key=tried[name].get),
            "milliseconds_by_batch": {batch: 1e3 * value for batch, value in tried[name].items()},
            "megabytes": round(entered.megabytes),
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
    batches = [20, 50, 100, 250, 500, 1000]
    parser.add_argument("--batch", nargs="+", type=int, default=batches, metavar="B", help="to try (20 to 1000)")
    parser.add_argument("--mlp", nargs="+", type=int, default=[512], metavar="F", help="hidden width (512)")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="the first N test images (10000)")
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N", help="cores to use (all)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds that count (15)")
    parser.add_argument("--seconds", type=float, default=3, metavar="S", help="a contestant's turn (3)")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here too")
    options = parser.parse_args()
    uneven = [batch for batch in options.batch if batch < 1 or options.images % batch]
    if uneven:
        parser.error(f"--batch must divide {options.images} images, as {uneven[0]} does not: no batch is smaller")
    names = ["tinyvit", *(n for n in options.only or NAMES if n != "tinyvit")]
    records = []
    for mlp in options.mlp:
        records.append(
            measure(mlp, options.images, options.batch, options.threads, names, options.rounds, options.seconds)
        )
        show(records[-1])
    if options.json:
        packages = ("torch", "jax", "jaxlib", "onnx", "onnxruntime")
        found = {"conditions": conditions(*packages), "records": records}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
