"""One training step, with plain operations or with CUDA kernels, behind one interface.

All kinds of steps have the same methods:

    with step:
        step.begin_epoch(epoch)        # draw the order and the augmentation, compute the learning rates
        count = step()                 # forward, backward, clip, Adam and average on the next batch
        loss_sum, correct = step.totals()

Attributes: `workers` is the number of workers for validation. `record` is a dict for the checkpoint, which contains
"workers" and "loops". `mode`, `precision`, `loops`, `asynchronous` and `compile_seconds` describe the step for
progress bars and metrics.

`PlainStep` computes with the operations of `tinyvit.ops`, on a CPU or a GPU. `tinyvit.kernels.KernelStep` computes
the same with CUDA kernels. Both update the arrays of a `State` in place.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.backend import LOOPS, Backend, available_cores, loops_choice, use_loops
from tinyvit.data.batches import Epoch
from tinyvit.kernels import Kernels, KernelStep, unsupported_reason
from tinyvit.optim import clip_by_global_norm
from tinyvit.training.state import State, require_finite
from tinyvit.training.workers import ParallelGradient

if TYPE_CHECKING:
    from tinyvit.model import ViTConfig
    from tinyvit.training.settings import TrainingConfig

KERNELS = ("graph", "launches", "off")  # a step on a GPU is one graph of kernels, single kernels or plain operations
IMAGES_PER_WORKER = 8  # the smallest share of a batch, by default; a smaller one does not justify a process


class PlainStep:
    """A training step with the plain operations, on a CPU or a GPU.

    Parameters
    ----------
    state : State
        The state that each step updates.
    images : ndarray of shape (N, R, C)
        The training images, uint8.
    labels : ndarray of shape (N,)
        Their classes, integers.
    model_config : ViTConfig
        The settings of the model.
    config : TrainingConfig
        The settings of the training.
    backend : Backend
        The backend of the state. The images are copied to its device.
    workers : int, optional
        Number of processes that share a batch. A GPU needs 1.
    loops : {"auto", "on", "off"}, optional
        Whether a CPU uses compiled loops. With "auto", it does if Numba is installed.
    """

    mode = "plain"
    precision = "float32"
    compile_seconds = 0.0

    def __init__(
        self,
        state: State,
        images: np.ndarray,
        labels: np.ndarray,
        model_config: "ViTConfig",
        config: "TrainingConfig",
        backend: Backend,
        workers: int = 1,
        loops: str = "off",
    ) -> None:
        self.state, self.config, self.backend, self.workers = state, config, backend, workers
        self.asynchronous = backend.device != "cpu"  # whether `totals` waits for a device
        self.images, self.labels = backend.asarray(images), backend.asarray(labels)
        self.steps = -(-len(images) // config.batch_size)  # per epoch
        chunk_size = None if backend.device == "cpu" else config.batch_size
        self._gradient = ParallelGradient(model_config, workers, config.smoothing, chunk_size)
        state.adam.use_threads(workers)  # the cores of the workers are idle while Adam runs
        with use_loops("off" if self.asynchronous else loops) as used:
            self.loops = "on" if used else "off"
        self.record = {"workers": workers, "loops": loops if self.asynchronous else self.loops}
        self._done = self.steps  # no epoch has begun
        self._loss_sum: Any = 0.0  # after a step, both are arrays on the device
        self._correct: Any = 0

    def __enter__(self) -> "PlainStep":
        with use_loops(self.loops):
            self._gradient.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._gradient.__exit__(*exception)

    def begin_epoch(self, epoch: int, done: int = 0, totals: tuple[float, int] = (0.0, 0)) -> None:
        """Begin or resume an epoch.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        done : int, optional
            Number of its steps that are already done.
        totals : tuple of (float, int), optional
            The result of `totals` after these steps.

        Raises
        ------
        ValueError
            If the epoch has fewer steps than `done`.
        """
        config = self.config
        if not 0 <= done <= self.steps:
            raise ValueError(f"done must be in 0 to {self.steps}, the steps of an epoch, not {done}")
        self._epoch = Epoch(self.images, self.labels, config.augmentation, config.seed, epoch, self.backend)
        self._learning_rates = config.learning_rates(epoch, self.steps)
        self._averages_after = config.averages_after(epoch, self.steps)
        self._done, (self._loss_sum, self._correct) = done, totals

    def __call__(self) -> int:
        """Take the next step.

        Returns
        -------
        int
            Number of images in the batch.

        Raises
        ------
        IndexError
            If the epoch has no step left.
        ArithmeticError
            On a CPU, if the loss or the norm of the gradient is not finite. The weights are unchanged. On a GPU this
            check would wait for the device.
        """
        if self._done == self.steps:
            raise IndexError("the epoch has no step left: call begin_epoch first")
        state, config, checked = self.state, self.config, not self.asynchronous
        start = self._done * config.batch_size
        stop = min(start + config.batch_size, len(self.images))
        images, labels, maps = self._epoch.batch(start, stop)
        # This is `loss_and_gradient` of model.py on the batch. Each worker augments and computes its share.
        loss, correct, gradients = self._gradient(state.parameters, images, labels, maps)
        if checked:
            require_finite("loss", loss)
        with np.errstate(over="ignore", invalid="ignore"):  # `State.require_finite` finds overflows later
            if config.clip:
                norm = clip_by_global_norm(gradients.flat, config.clip)
                if checked:
                    require_finite("norm of the gradient", norm)
            with use_loops(self.loops):
                state.adam.step(state.parameters.flat, gradients.flat, self._learning_rates[self._done])
        if state.average is not None and self._averages_after[self._done]:
            state.average.step(state.parameters.flat)
        self._loss_sum = self._loss_sum + loss.astype(np.float64) * len(images)
        self._correct = self._correct + correct
        self._done += 1
        return len(images)

    def totals(self) -> tuple[float, int]:
        """Return the totals of the current epoch. On a GPU, this waits for the device.

        Returns
        -------
        loss_sum : float
            Sum of the losses of its images so far.
        correct : int
            Number of its images that were classified correctly so far.
        """
        self.backend.synchronise()
        return float(self._loss_sum), int(self._correct)


def make_step(
    state: State,
    images: np.ndarray,
    labels: np.ndarray,
    model_config: "ViTConfig",
    config: "TrainingConfig",
    backend: Backend,
    workers: int | None = None,
    precision: str = "float32",
    kernels: str | None = None,
    loops: str | None = None,
) -> PlainStep | KernelStep:
    """Return the step for a backend: `KernelStep` on a GPU with kernels for the model, and otherwise `PlainStep`.

    Parameters
    ----------
    state : State
        The state that each step updates.
    images : ndarray of shape (N, R, C)
        The training images, uint8.
    labels : ndarray of shape (N,)
        Their classes, integers.
    model_config : ViTConfig
        The settings of the model.
    config : TrainingConfig
        The settings of the training.
    backend : Backend
        Where to compute.
    workers : int, optional
        Number of processes on a CPU. Default: one per core, at most one per 8 images of a batch.
    precision : {"float32", "tf32", "bfloat16"}, optional
        Precision of the matrix products on a GPU.
    kernels : {"graph", "launches", "off"}, optional
        How a GPU takes a step. Default: "graph" if there are kernels for the model, and otherwise "off" with a log
        message that gives the reason.
    loops : {"auto", "on", "off"}, optional
        Whether a CPU uses compiled loops. Default: the choice of `use_loops` around the call, or "auto", which uses
        them if Numba is installed.

    Returns
    -------
    PlainStep or KernelStep
        The step.

    Raises
    ------
    ValueError
        If the device or the model does not support an option.
    """
    if workers is None:
        workers = max(1, min(available_cores(), config.batch_size // IMAGES_PER_WORKER))
    elif workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    loops = loops_choice() if loops is None else loops
    if loops not in LOOPS:
        raise ValueError(f"loops {loops!r} is unknown: give {', '.join(map(repr, LOOPS))}")
    kernels = choose_kernels(backend, model_config, precision, kernels)
    step: PlainStep | KernelStep
    if kernels == "off":
        workers_here = workers if backend.device == "cpu" else 1
        step = PlainStep(
            state=state,
            images=images,
            labels=labels,
            model_config=model_config,
            config=config,
            backend=backend,
            workers=workers_here,
            loops=loops,
        )
    else:
        began = time.perf_counter()
        compiled = Kernels(backend, model_config, precision)
        step = KernelStep(
            compiled,
            state=state,
            images=images,
            labels=labels,
            config=config,
            graph=kernels == "graph",
        )
        step.compile_seconds = time.perf_counter() - began
    step.record |= {"workers": workers}  # a run on a GPU may resume on a CPU
    return step


def choose_kernels(
    backend: Backend, model_config: "ViTConfig", precision: str = "float32", kernels: str | None = None
) -> str:
    """Choose between a graph, kernel launches and plain operations. On a CPU the choice is always "off".

    Parameters
    ----------
    backend : Backend
        Where to compute.
    model_config : ViTConfig
        The settings of the model.
    precision : {"float32", "tf32", "bfloat16"}, optional
        Precision of the matrix products on a GPU.
    kernels : {"graph", "launches", "off"}, optional
        The requested way. Default: "graph" if there are kernels for the model, and otherwise "off" with a log
        message that gives the reason.

    Returns
    -------
    {"graph", "launches", "off"}
        The way to use.

    Raises
    ------
    ValueError
        If the device or the model does not support an option.
    """
    if kernels not in (None, *KERNELS):
        raise ValueError(f"kernels {kernels!r} is unknown: give {', '.join(map(repr, KERNELS))}")
    reason = unsupported_reason(model_config, precision, backend.compute_capability())
    if backend.device == "cpu":
        if precision != "float32" or kernels in ("graph", "launches"):
            option = f"precision {precision!r}" if precision != "float32" else f"kernels {kernels!r}"
            raise ValueError(f"{option} needs a GPU: give --device gpu, or omit the option")
        return "off"
    if kernels == "off" or (kernels is None and reason is not None and precision == "float32"):
        if precision != "float32":
            raise ValueError(f"precision {precision!r} needs kernels: give --kernels graph, or omit the precision")
        if kernels is None:
            logging.getLogger("tinyvit").warning("note: this run uses plain operations because %s", reason)
        return "off"
    if reason is not None:
        raise ValueError(reason)
    return kernels or "graph"
