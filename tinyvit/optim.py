"""Adam, clipping, averaging and learning-rate schedules, on flat arrays."""

import contextvars
import itertools
import math
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from tinyvit.backend import array_module, loops_for


class Adam:
    """Adam with bias correction and optional decoupled weight decay, updating a flat array in place.

    flat: the (P,) array that will be updated, for its size, dtype and device; beta1, beta2 in [0, 1); epsilon
    above 0; weight_decay: share of a weight taken off per step and unit of learning rate; decayed: (P,) array of
    ones and zeros saying where, everywhere if None; threads: how many update a part of the array each.
    State: `first_moment`, `second_moment` (P,) and `steps`. Raises `ValueError` on a setting out of range.
    Source: Kingma and Ba 2015, "Adam", algorithm 1; Loshchilov and Hutter 2019, "Decoupled Weight Decay
    Regularization", algorithm 2.
    """

    def __init__(self, flat, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, decayed=None, threads=1):
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon > 0 and weight_decay >= 0):
            raise ValueError(
                "Adam needs beta1 and beta2 in [0, 1), epsilon above 0 and weight_decay of at least 0, not "
                f"{beta1}, {beta2}, {epsilon} and {weight_decay}"
            )
        xp = array_module(flat)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.weight_decay, self.decayed = weight_decay, decayed
        self.first_moment = xp.zeros_like(flat)
        self.second_moment = xp.zeros_like(flat)
        self.steps = 0
        self._scratch = xp.empty_like(flat)
        self.use_threads(threads)

    def use_threads(self, threads):
        """Let so many threads update a part of the array each. Raises `ValueError` if threads is below 1."""
        if threads < 1:
            raise ValueError(f"Adam needs at least one thread, not {threads}")
        count = len(self._scratch)
        edges = [count * i // threads for i in range(threads + 1)]
        self._parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def step(self, flat, gradient, learning_rate):
        """Update `flat` (P,) in place for `gradient` (P,), which is left as it is."""
        self.steps += 1
        if self._pool is None:
            self._update(flat, gradient, learning_rate, slice(None))
            return
        # a copy of the context each: what the caller told NumPy to do about overflow holds in the threads too
        jobs = [
            self._pool.submit(contextvars.copy_context().run, self._update, flat, gradient, learning_rate, part)
            for part in self._parts
        ]
        wait(jobs)  # all of them, even if one fails: no thread writes into flat when this returns
        for job in jobs:
            job.result()

    def _update(self, flat, gradient, learning_rate, part):
        """Update one part, a slice, in place: every weight goes its own way."""
        xp = array_module(flat)
        flat, gradient, scratch = flat[part], gradient[part], self._scratch[part]
        m, v = self.first_moment[part], self.second_moment[part]

        if self.weight_decay:  # before the gradient's step, as the decay is of the weight that was
            xp.multiply(flat, learning_rate * self.weight_decay, out=scratch)
            if self.decayed is not None:
                scratch *= self.decayed[part]
            flat -= scratch

        # both moments start at zero, and the corrections undo that
        rate = learning_rate / (1 - self.beta1**self.steps)
        scale = 1 / math.sqrt(1 - self.beta2**self.steps)
        if loops := loops_for(flat, gradient, m, v):
            numbers = np.float32([self.beta1, self.beta2, rate, scale, self.epsilon])
            loops.adam_step(flat, gradient, m, v, *numbers)
            return

        m *= self.beta1  # m = beta1 m + (1 - beta1) g
        m += xp.multiply(gradient, 1 - self.beta1, out=scratch)
        v *= self.beta2  # v = beta2 v + (1 - beta2) g**2
        xp.multiply(gradient, gradient, out=scratch)
        scratch *= 1 - self.beta2
        v += scratch

        # flat -= rate * m / (scale * sqrt(v) + epsilon)
        xp.sqrt(v, out=scratch)
        scratch *= scale
        scratch += self.epsilon
        xp.divide(m, scratch, out=scratch)
        scratch *= rate
        flat -= scratch


def matrices_only(parameters):
    """Return a flat array of ones where a matrix lies and zeros elsewhere: what weight decay usually acts on.

    Biases, norms, the class token and the positions are left alone, as in Dosovitskiy et al. and in nanoGPT.
    """
    mask = parameters.with_flat(array_module(parameters.flat).zeros_like(parameters.flat))
    for name, view in mask.items():
        if name.endswith("weight") and view.ndim == 2:
            view[...] = 1
    return mask.flat


def clip_by_global_norm(gradient, limit):
    """Scale `gradient` (P,) in place so that its Euclidean norm is at most `limit`; return the norm before.

    The norm is a 0-d array of the same device: nothing waits for it. If it is not finite, the gradient is set to
    NaN so that the failure is noticed. Raises `ValueError` unless limit is above 0.
    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1.
    """
    if limit <= 0:
        raise ValueError(f"the limit of the gradient's norm must be above 0, not {limit}")
    xp = array_module(gradient)
    norm = xp.sqrt(xp.dot(gradient, gradient))
    gradient *= xp.where(xp.isfinite(norm), xp.minimum(1, limit / xp.maximum(norm, 1e-12)), xp.nan)
    return norm


class ExponentialMovingAverage:
    """An average of the weights as training goes: average = decay * average + (1 - decay) * flat.

    flat: the (P,) weights, for their size, dtype and device; decay in [0, 1), or `ValueError`. Early on the decay is
    (n - 1) / (n + 8) at the n-th update if that is less: the first update is the average, and soon forgotten.
    State: `average` (P,) and `steps`, the number of updates.
    """

    def __init__(self, flat, decay=0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a moving average must be in [0, 1), not {decay}")
        self.decay = decay
        self.steps = 0
        self.average = flat.copy()
        self._scratch = array_module(flat).empty_like(flat)

    def step(self, flat):
        """Take in the weights `flat` (P,) of one more step."""
        self.steps += 1
        array_module(flat).subtract(flat, self.average, out=self._scratch)
        self._scratch *= self.share(self.steps)
        self.average += self._scratch

    def share(self, update):
        """Return how much of the weights the average takes in at its `update`-th step, counted from 1."""
        return 1 - min(self.decay, (update - 1) / (update + 8))


def constant(step, total_steps, peak, warmup_steps=0):
    """Return the learning rate of `step` (from 0): a line up to `peak`, and `peak` from then on."""
    return peak * min(1.0, (step + 1) / max(1, warmup_steps))


def warmup_cosine(step, total_steps, peak, warmup_steps=0, final=0.0):
    """Return the learning rate of `step` (from 0): a line up to `peak`, then half a cosine down to `final`.

    The first step already has peak / warmup_steps, and the last one is just above `final`.
    Source: Loshchilov and Hutter 2017, "SGDR", eq. 5, for one cycle.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
