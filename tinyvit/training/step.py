"""One training step, plain or in kernels, behind one interface.

Every kind of step answers the same calls:

    with step:
        step.begin_epoch(epoch)        # the order of the images, how each is changed, the learning rates
        count = step()                 # forward, backward, clip, Adam and average on the next batch
        loss_sum, correct = step.totals()

It also has `workers`, for validation, and `record`, a dict of what a checkpoint keeps of it, with "workers" in it.
`mode`, `precision`, `asynchronous` and `compile_seconds` describe it for progress bars and records.

`PlainStep` computes with the operations of `tinyvit.ops`, on a CPU or a GPU. `tinyvit.kernels.KernelStep` computes
the same with CUDA kernels. Both update the arrays of a `State` in place.
"""

import logging
import time

import numpy as np

from tinyvit.data.batches import Epoch
from tinyvit.kernels import Kernels, KernelStep, unsupported_reason
from tinyvit.optim import clip_by_global_norm
from tinyvit.training.state import require_finite
from tinyvit.training.workers import ParallelGradient, available_cores

KERNELS = ("graph", "launches", "off")  # how a GPU takes a step: one graph of kernels, kernels, plain operations
IMAGES_PER_WORKER = 8  # at least, by default: a smaller share is not worth a process


class PlainStep:
    """Takes training steps with the plain operations, on any backend.

    state: the `State` that is updated; images: (N, R, C) uint8; labels: (N,) integers; model_config: `ViTConfig`;
    config: `TrainingConfig`; backend: where the state lies and the images will; workers: processes that share a
    batch, one on a GPU.
    """

    mode = "plain"
    precision = "float32"
    compile_seconds = 0.0

    def __init__(self, state, images, labels, model_config, config, backend, workers=1):
        self.state, self.config, self.backend, self.workers = state, config, backend, workers
        self.asynchronous = backend.device != "cpu"  # whether `totals` would have to wait
        self.images, self.labels = backend.asarray(images), backend.asarray(labels)
        self.steps = -(-len(images) // config.batch_size)  # of an epoch
        chunk_size = None if backend.device == "cpu" else config.batch_size
        self._gradient = ParallelGradient(model_config, workers, config.smoothing, chunk_size)
        state.adam.use_threads(workers)  # as many cores as the workers have
        self.record = {"workers": workers}  # what a checkpoint keeps of the step
        self._done = self.steps  # no epoch has begun
        self._loss_sum, self._correct = 0.0, 0

    def __enter__(self):
        self._gradient.__enter__()
        return self

    def __exit__(self, *exception):
        self._gradient.__exit__(*exception)

    def begin_epoch(self, epoch, done=0, totals=(0.0, 0)):
        """Begin an epoch, or resume it.

        epoch: its number, from 0; done: how many of its steps are done; totals: what `totals` gave after them.
        """
        config = self.config
        if not 0 <= done <= self.steps:
            raise ValueError(f"an epoch has {self.steps} steps: {done} of them cannot be done")
        self._epoch = Epoch(self.images, self.labels, config.augmentation, config.seed, epoch, self.backend)
        self._learning_rates = config.learning_rates(epoch, self.steps)
        self._averages_after = config.averages_after(epoch, self.steps)
        self._done, (self._loss_sum, self._correct) = done, totals

    def __call__(self):
        """Take the next step and return its number of images.

        Raises `IndexError` after the end of the epoch and, on a CPU, `ArithmeticError` if the loss or the norm of the
        gradient is not finite: then the weights are as before. A GPU would have to be waited for.
        """
        if self._done == self.steps:
            raise IndexError("the epoch has no step left: call begin_epoch first")
        state, config, checked = self.state, self.config, not self.asynchronous
        start = self._done * config.batch_size
        stop = min(start + config.batch_size, len(self.images))
        images, labels, maps = self._epoch.batch(start, stop)
        # `loss_and_gradient` of model.py on this batch: each worker changes and computes its share of the images
        loss, correct, gradients = self._gradient(state.parameters, images, labels, maps)
        if checked:
            require_finite("loss", loss)
        with np.errstate(over="ignore", invalid="ignore"):  # `State.require_finite` finds what overflows here
            if config.clip:
                norm = clip_by_global_norm(gradients.flat, config.clip)
                if checked:
                    require_finite("norm of the gradient", norm)
            state.adam.step(state.parameters.flat, gradients.flat, self._learning_rates[self._done])
        if self._averages_after[self._done]:
            state.average.step(state.parameters.flat)
        self._loss_sum = self._loss_sum + loss.astype(np.float64) * len(images)
        self._correct = self._correct + correct
        self._done += 1
        return len(images)

    def totals(self):
        """Return the sum of the losses and the number of images classified correctly in the epoch so far."""
        self.backend.synchronise()
        return float(self._loss_sum), int(self._correct)


def make_step(
    state, images, labels, model_config, config, backend, workers=None, precision="float32", kernels=None
):
    """Return the step that suits the backend: a `KernelStep` on a GPU that has kernels for the model, or `PlainStep`.

    workers: processes on a CPU, by default one per core, at most one per 8 images of a batch; precision: of a GPU's
    matrix products, one of `kernels.PRECISIONS`; kernels: one of `KERNELS`, by default "graph" if the model has
    kernels; if not, the log says why. Raises `ValueError` on what the device or the model does not support.
    """
    if workers is None:
        workers = max(1, min(available_cores(), config.batch_size // IMAGES_PER_WORKER))
    elif workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    kernels = choose_kernels(backend, model_config, precision, kernels)
    if kernels == "off":
        workers_here = workers if backend.device == "cpu" else 1
        step = PlainStep(state, images, labels, model_config, config, backend, workers=workers_here)
    else:
        began = time.perf_counter()
        compiled = Kernels(backend, model_config, precision)
        step = KernelStep(compiled, state, images, labels, config, graph=kernels == "graph")
        step.compile_seconds = time.perf_counter() - began
    step.record = {"workers": workers}  # a run of a GPU may resume on a CPU
    return step


def choose_kernels(backend, model_config, precision="float32", kernels=None):
    """Return which of `KERNELS` a run takes its steps by: on a CPU "off", and on a GPU what was asked for.

    kernels: one of `KERNELS`, or None for a graph if there are kernels for this model; if there are none, a line in
    the log says why. Raises `ValueError` if the device or the model does not support what was asked for.
    """
    if kernels not in (None, *KERNELS):
        raise ValueError(f"kernels {kernels!r} are unknown: give {', '.join(map(repr, KERNELS))}")
    reason = unsupported_reason(model_config, precision, backend.compute_capability())
    if backend.device == "cpu":
        if precision != "float32" or kernels in ("graph", "launches"):
            asked = f"precision {precision!r}" if precision != "float32" else f"kernels {kernels!r}"
            raise ValueError(f"{asked} is for a GPU: give --device gpu, or leave it out")
        return "off"
    if kernels == "off" or (kernels is None and reason is not None and precision == "float32"):
        if precision != "float32":
            raise ValueError(f"precision {precision!r} needs kernels: plain operations compute in float32")
        if kernels is None:
            logging.getLogger("tinyvit").warning("note: plain operations compute, as %s", reason)
        return "off"
    if reason is not None:
        raise ValueError(reason)
    return kernels or "graph"
