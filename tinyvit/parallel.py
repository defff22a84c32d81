"""A training step over shards of a batch, side by side on the cores."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

from tinyvit.backend import Workspace, array_module
from tinyvit.model import vit_backward, vit_forward
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward

SHARD_SIZE = 32  # images: large enough for matrix products to run well, small enough for its arrays to stay in cache


def available_cores():
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ShardedGradient:
    """Computes a batch's loss and gradient, `workers` shards at a time. Use it as a context.

    Each shard reads the same weights and owns its cache, so shards need nothing from each other. Inside the
    context BLAS keeps to one thread a shard, and gets its threads back on leaving. Shards are cut and summed in an
    order that depends on the batch and the number of workers alone: the same bits whatever the threads' timing.
    A GPU is busy enough with one: give it one worker and a shard_size of the whole batch.
    """

    def __init__(self, config, workers=None, smoothing=0.0, shard_size=SHARD_SIZE):
        self.config, self.smoothing, self.shard_size = config, smoothing, shard_size
        self.workers = available_cores() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        self._workspaces = [Workspace() for _ in range(self.workers)]
        self._totals = {}
        self._limit = None

    def __enter__(self):
        if self._limit is not None:
            raise RuntimeError("this sharded gradient is in use already")
        self._limit = ThreadpoolController().limit(limits=1, user_api="blas")
        self._limit.__enter__()
        self._pool = ThreadPoolExecutor(self.workers) if self.workers > 1 else None
        return self

    def __exit__(self, *exception):
        if self._pool is not None:
            self._pool.shutdown()
        self._limit.__exit__(*exception)
        self._limit = None

    def __call__(self, parameters, load, start, stop):
        """Return loss, how many were classified rightly, and the gradient, for places `start` to `stop`.

        load(start, stop) gives images and labels, as `Epoch.load` does. loss and the count are 0-d arrays; the
        gradient is `Parameters`, valid until the next call.
        """
        if self._limit is None:
            raise RuntimeError("use a sharded gradient as a context: with ShardedGradient(...) as sharded_gradient:")
        shards = cut(start, stop, self.workers, self.shard_size)
        runs = [shards[w :: self.workers] for w in range(self.workers)]
        jobs = [(w, run, parameters, load, stop - start) for w, run in enumerate(runs) if run]
        if self._pool is None:
            results = [self._run(*job) for job in jobs]
        else:
            results = list(self._pool.map(lambda job: self._run(*job), jobs))
        loss, correct, gradient = results[0]
        for other_loss, other_correct, other_gradient in results[1:]:
            loss = loss + other_loss
            correct = correct + other_correct
            gradient.flat += other_gradient.flat
        return loss, correct, gradient

    def _run(self, worker, shards, parameters, load, batch_size):
        if worker not in self._totals:
            self._totals[worker] = parameters.with_flat(array_module(parameters.flat).empty_like(parameters.flat))
        total = self._totals[worker]
        total_loss, total_correct = 0, 0
        for number, (start, stop) in enumerate(shards):
            # whether the loss is finite is the caller's question, so NumPy need not warn of it
            with self._workspaces[worker], np.errstate(over="ignore", invalid="ignore"):
                images, labels = load(start, stop)
                logits, cache = vit_forward(images, parameters, self.config)
                loss, loss_cache = cross_entropy_forward(logits, labels, self.smoothing)
                share = (stop - start) / batch_size  # the batch's mean is the shards' means, weighted so
                gradient = vit_backward(cross_entropy_backward(share, loss_cache), cache)
            if number == 0:
                total.flat[...] = gradient.flat
            else:
                total.flat += gradient.flat
            total_loss = total_loss + loss * share
            total_correct = total_correct + (logits.argmax(axis=1) == labels).sum()
        return total_loss, total_correct, total


def cut(start, stop, workers, shard_size=SHARD_SIZE):
    """Cut places `start` to `stop` into even shards of at most `shard_size`, as many as there are workers or more."""
    count = stop - start
    shards = min(count, max(workers, -(-count // shard_size)))
    edges = [start + count * i // shards for i in range(shards + 1)]
    return list(itertools.pairwise(edges))
