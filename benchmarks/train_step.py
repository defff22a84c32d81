"""Measure the time of one training step, of PyTorch and JAX, and of the matrix products of a step.

    python benchmarks/train_step.py                                       batch 64, the default model
    python benchmarks/train_step.py 16 64 256 1024 64x3072 --json FILE    other batches, one with another MLP width

A step is forward, backward and Adam in float32 on a batch in memory, without augmentation. Peers that are not
installed are skipped. All contestants take turns, round by round (`turns.py`). A ratio is the median over the rounds
of the ratio of two times from the same round. "products" computes only the matrix products of the plain step, in the
fastest way that NumPy's BLAS offers on the same number of threads. It is a lower bound for a step that needs all of
these products.
"""

import argparse
import contextlib
import ctypes
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import peers
from threadpoolctl import threadpool_limits
from turns import Contestant, compare, conditions, quartiles, ratio

from tinyvit import memory
from tinyvit.backend import available_cores, use_loops
from tinyvit.data import load_mnist
from tinyvit.model import ViTConfig, initialise
from tinyvit.optim import Adam
from tinyvit.training import ParallelGradient
from tinyvit.training.workers import CHUNK_TOKENS, gradient_of_share, split

LEARNING_RATE = 3e-4
until_the_end = contextlib.ExitStack()  # contexts that a contestant keeps until its process ends
BATCHES = 8  # used in turn
NAMES = {
    "tinyvit": "tinyvit, compiled loops",
    "numpy": "tinyvit, NumPy only",
    "own-products": "the matrix products of the tinyvit step alone",
    "products": "the matrix products of a step for all tokens alone",
    "torch": "PyTorch eager",
    "torch-compiled": "PyTorch torch.compile",
    "torch-shortcut": "torch.compile, last block for the class token only",
    "jax": "JAX jit",
}


def workload(batch, mlp):
    """Return the model's settings, its initial weights, and batches of images (B, 28, 28) float32 and labels."""
    config = ViTConfig(mlp_width=mlp)
    data = load_mnist()
    chosen = np.random.default_rng(0).permutation(len(data.train_images))[: BATCHES * batch]
    batches = [
        (data.train_images[part].astype(np.float32) / 255, data.train_labels[part])
        for part in np.split(chosen, BATCHES)
    ]
    return config, initialise(config), batches


def normalised(config, batches):
    """Return the batches with normalised pixels, which the models of the peers expect."""
    return [((x - config.pixel_mean) / config.pixel_deviation, y) for x, y in batches]


def tinyvit_step(batch, mlp, threads, loops="off"):
    """Return this library's training step, with compiled loops "on" or "off"."""
    until_the_end.enter_context(use_loops(loops))
    config, parameters, batches = workload(batch, mlp)
    gradient_of = until_the_end.enter_context(ParallelGradient(config, threads))
    adam = Adam(parameters.flat, threads=threads)
    count = 0

    def step():
        nonlocal count
        loss, _, gradients = gradient_of(parameters, *batches[count % BATCHES])
        count += 1
        adam.step(parameters.flat, gradients.flat, LEARNING_RATE)
        return float(loss)

    return step


def own_products_step(batch, mlp, threads):
    """Return a function that repeats the matrix products of `tinyvit_step` and nothing else.

    Each thread repeats the products of its share in their order and in the memory where the step computed them, all
    threads at once. The sums that the step computes as products with a vector are left out.
    """
    until_the_end.enter_context(use_loops("auto"))
    threadpool_limits(1, user_api="blas")
    config, parameters, batches = workload(batch, mlp)
    images, labels = batches[0]
    replays = []
    for start, stop in split(batch, threads):
        done = []

        def recording(a, b, out=None, done=done):
            result = memory.matmul(a, b, out=out)
            if min(a.ndim, b.ndim, *a.shape[-2:], *b.shape[-2:]) > 1:
                done.append([in_place(array) for array in (a, b, result)])
            return result

        workspace = memory.Workspace()
        modules = [module for name, module in sys.modules.items() if name.startswith("tinyvit.ops.")]
        with contextlib.ExitStack() as stack:
            for module in modules:
                if hasattr(module, "matmul"):
                    stack.enter_context(mock.patch.object(module, "matmul", recording))
            for _ in range(2):  # the second time, the workspace hands out the memory that every later step gets
                done.clear()
                with workspace:
                    gradient_of_share(
                        images[start:stop],
                        labels[start:stop],
                        None,
                        parameters,
                        config,
                        smoothing=0.0,
                        chunk_size=max(1, CHUNK_TOKENS // config.tokens),
                        batch_size=batch,
                    )
        replays.append((done, workspace))
    pool = ThreadPoolExecutor(threads)

    def replay(recorded):
        with np.errstate(all="ignore"):  # nothing scales the results, which are operands of later products
            for a, b, out in recorded[0]:
                np.matmul(a, b, out=out)

    return lambda: list(pool.map(replay, replays))


def in_place(array):
    """Return a view of the memory of `array` that leaves it free for the workspace, which must stay.

    Arrays that are not from a workspace are returned as they are.
    """
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not isinstance(owner, memory._Lease):
        return array
    low, high = np.lib.array_utils.byte_bounds(array)
    offset = array.__array_interface__["data"][0] - low
    memory_of = (ctypes.c_char * (high - low)).from_address(low)
    return np.ndarray(array.shape, array.dtype, memory_of, offset, array.strides)


def products_step(batch, mlp, threads):
    """Return a function that computes the matrix products of the plain step in the faster of two ways.

    BLAS uses all threads for every product, or each thread computes all products for its part of the batch.
    """
    import time

    config, _, _ = workload(batch, mlp)
    pool = ThreadPoolExecutor(threads)

    def work(images):
        rng = np.random.default_rng(0)
        jobs = []
        for (count, m, n, k), times in peers.matrix_products(config, images).items():
            shapes = ((m, k), (k, n), (m, n)) if count == 1 else ((count, m, k), (count, k, n), (count, m, n))
            jobs.append(([rng.standard_normal(shape).astype(np.float32) for shape in shapes], times))

        def run():
            for (a, b, out), times in jobs:
                for _ in range(times):
                    np.matmul(a, b, out=out)

        return run

    whole = work(batch)
    parts = [work(-(-batch // threads)) for _ in range(threads)]

    def shared():
        whole()

    def sharded():
        list(pool.map(lambda part: part(), parts))

    timed = []
    for way, limit in ((shared, threads), (sharded, 1)):
        threadpool_limits(limit, user_api="blas")
        for _ in range(3):
            way()
        began = time.perf_counter()
        for _ in range(5):
            way()
        timed.append((time.perf_counter() - began, limit, way))
    _, limit, way = min(timed, key=lambda entry: entry[0])
    threadpool_limits(limit, user_api="blas")
    return way


def torch_step(batch, mlp, threads, compiled=False, shortcut=False):
    config, parameters, batches = workload(batch, mlp)
    batches = normalised(config, batches)
    return peers.torch_train_step(
        config,
        parameters,
        batches,
        LEARNING_RATE,
        threads=threads,
        compiled=compiled,
        shortcut=shortcut,
    )


def jax_step(batch, mlp, threads):
    config, parameters, batches = workload(batch, mlp)
    return peers.jax_train_step(config, parameters, normalised(config, batches), LEARNING_RATE)


BUILT_BY = {
    "tinyvit": ("tinyvit_step", {"loops": "auto"}),
    "numpy": ("tinyvit_step", {}),
    "own-products": ("own_products_step", {}),
    "products": ("products_step", {}),
    "torch": ("torch_step", {}),
    "torch-compiled": ("torch_step", {"compiled": True}),
    "torch-shortcut": ("torch_step", {"compiled": True, "shortcut": True}),
    "jax": ("jax_step", {}),
}


def measure(batch, mlp, threads, names, rounds, seconds):
    """Return the record of all contestants: their times, their ratios to tinyvit, and their memory."""
    contestants = {}
    for name in names:
        function, arguments = BUILT_BY[name]
        contestant = Contestant(
            name,
            "train_step",
            function,
            batch=batch,
            mlp=mlp,
            threads=threads,
            **arguments,
        )
        if contestant.missing:
            print(f"{NAMES[name]}: skipped, not installed ({contestant.missing})")
        else:
            contestants[name] = contestant
    compare(list(contestants.values()), rounds, seconds)
    ours = contestants["tinyvit"]
    record = {"batch": batch, "mlp_width": mlp, "threads": threads, "contestants": {}}
    for name, contestant in contestants.items():
        record["contestants"][name] = {
            "milliseconds": [1e3 * value for value in quartiles(contestant.seconds)],
            "times_tinyvit": ratio(contestant, ours),
            "megabytes": round(contestant.megabytes),
        }
    return record


def show(record):
    """Print a record as a table."""
    print(f"\nbatch {record['batch']}, MLP {record['mlp_width']}, {record['threads']} threads")
    print(f"{'':50} {'ms per step':>20} {'times tinyvit':>20} {'peak MB':>8}")
    for name, figures in record["contestants"].items():
        low, median, high = figures["milliseconds"]
        below, times, above = figures["times_tinyvit"]
        print(
            f"{NAMES[name]:50} {median:7.1f} ({low:.1f}-{high:.1f}) {times:10.2f} ({below:.2f}-{above:.2f})"
            f" {figures['megabytes']:8}"
        )


def case(text):
    """Return (batch, MLP width) for "64x512" or "64"."""
    batch, _, mlp = text.partition("x")
    return int(batch), int(mlp or 512)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="*", type=case, default=[(64, 512)], metavar="B[xF]",
        help="batch size and MLP width, such as 64x512 (64); the width is 512 by default")  # fmt: skip
    add("--threads", type=int, default=available_cores(), metavar="N", help="number of threads (one per core)")
    add("--rounds", type=int, default=15, metavar="N", help="rounds after the warm-up (15)")
    add("--seconds", type=float, default=0.7, metavar="S", help="length of a turn (0.7)")
    add("--only", nargs="+", choices=list(BUILT_BY), metavar="NAME", help=f"contestants: {', '.join(BUILT_BY)}")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options = parser.parse_args()
    names = ["tinyvit"] + [name for name in options.only or BUILT_BY if name != "tinyvit"]
    records = []
    for batch, mlp in options.cases:
        record = measure(
            batch=batch,
            mlp=mlp,
            threads=options.threads,
            names=names,
            rounds=options.rounds,
            seconds=options.seconds,
        )
        records.append(record)
        show(record)
        if options.json:
            found = {"conditions": conditions("numba", "torch", "jax", "jaxlib"), "records": records}
            options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
