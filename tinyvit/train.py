"""The training loop: epochs, validation, history, stopping and going on."""

import logging
import math
import signal
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from tinyvit.checkpoint import CheckpointError, load_arrays, save_arrays
from tinyvit.data.augment import Augmentation
from tinyvit.data.batches import Epoch, draw_order, stream_of
from tinyvit.evaluate import check_labels, evaluate
from tinyvit.kernels import Kernels, KernelStep, why_not
from tinyvit.model import VisionTransformer, ViTConfig, initialise
from tinyvit.optim import (
    Adam,
    ExponentialMovingAverage,
    clip_by_global_norm,
    constant,
    matrices_only,
    warmup_cosine,
)
from tinyvit.parallel import ShardedGradient, available_cores

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_FORMAT = 1
CHECKPOINT_SECONDS = 20  # a killed run loses at most this, and the time of one step
IMAGES_A_WORKER = 8  # at least, if nobody says how many workers: for less it is not worth a process
KERNELS = ("graph", "launches", "off")  # how a GPU takes a step: one graph of kernels, kernels, plain operations
AVERAGE_EVERY = 4  # steps, and at an epoch's end; an average over hundreds of steps does not need every one


class TrainingDiverged(ArithmeticError):
    """The loss or a weight is no longer a finite number."""


class TrainingStopped(Exception):
    """The run was asked to stop and did, with a checkpoint to go on from."""


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run; the defaults are the technical note's, with no augmentation.

    Raises `ValueError` on a value that cannot be, naming it and what would do.
    """

    epochs: int = 10
    batch_size: int = 64  # images
    learning_rate: float = 3e-4  # per step; the peak, if the schedule has one
    schedule: str = "constant"  # or "cosine": a linear warm-up, then half a cosine down to 0
    warmup_steps: int = 0  # and at most a tenth of all steps
    weight_decay: float = 0.0  # decoupled, on matrices only; per step and unit of learning rate
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 0.0  # largest norm of the gradient; 0 for any
    smoothing: float = 0.0  # of the labels
    average: float = 0.0  # decay of a moving average of the weights, taken every fourth step; 0 for none
    validation: int = 5000  # images at the end of the training set that are held back, never trained on
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self):
        whole = {"epochs": 1, "batch_size": 1, "warmup_steps": 0, "validation": 0, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
                raise ValueError(f"{name} must be a whole number from {least} to below 2**32, not {value!r}")
        ranges = {
            "learning_rate": (0, 10),
            "weight_decay": (0, 10),
            "clip": (0, math.inf),
            "beta1": (0, 1),
            "beta2": (0, 1),
            "smoothing": (0, 1),
            "average": (0, 1),
        }
        for name, (least, limit) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < limit:
                raise ValueError(f"{name} must be a number from {least} to below {limit}, not {value!r}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', not {self.schedule!r}")

    def as_dict(self):
        """Return the settings as a plain nested dict, as a checkpoint keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings):
        """Return the settings that `as_dict` gave."""
        return cls(**{**settings, "augmentation": Augmentation(**settings["augmentation"])})


# The technical note's own training: Adam at a constant 3e-4, random rotations and horizontal flips. The note says
# neither how far it rotates nor how often it flips. A mirrored digit is mostly no digit, or another one: here one
# image in ten is flipped, as validation is better for it; `benchmarks/NOTES.md` has what every second one does.
NOTE = TrainingConfig(augmentation=Augmentation(rotation=10, flip=0.1))

# The best found for the same model, batch size and epochs, on the validation images: `benchmarks/NOTES.md`.
TUNED = TrainingConfig(
    learning_rate=1.5e-3,
    schedule="cosine",
    warmup_steps=500,
    weight_decay=0.1,
    beta2=0.98,
    clip=1.0,
    smoothing=0.05,
    average=0.999,
    augmentation=Augmentation(rotation=8, scale=0.1, shear=5, shift=1),
)

RECIPES = {"tuned": TUNED, "note": NOTE}


class Training:
    """A training run: its settings, its data and all that changes, so that it can stop anywhere and go on.

    model_config: `ViTConfig`; config: `TrainingConfig`; images: (N, R, C) uint8; labels: (N,) integers in
    0..classes-1; backend: a `Backend`; workers: processes side by side, by default as many as there are
    cores and eights of images in a batch (a GPU has one, and keeps the number for a CPU that may go on with its run);
    precision: of a GPU's matrix products, one of `kernels.PRECISIONS`; kernels: one of `KERNELS`, for a GPU, by
    default a graph if there are kernels for the model, which a line in the log says otherwise.

    Everything random follows from (seed, epoch), so what a checkpoint keeps is small: weights, moments, the average
    and the place in the epoch. Going on from one gives the same bits as never having stopped, on the same machine
    with the same number of workers. Raises `ValueError` if the data does not fit the model, or the precision or the
    kernels cannot be had.
    """

    def __init__(
        self, model_config, config, images, labels, backend, workers=None, precision="float32", kernels=None
    ):
        check_dataset(images, labels, model_config)
        self.model_config, self.config, self.backend = model_config, config, backend
        self.fingerprint = zlib.crc32(np.ascontiguousarray(labels), zlib.crc32(np.ascontiguousarray(images)))
        count = len(images) - config.validation
        if count < 1:
            raise ValueError(f"validation holds back {config.validation} of {len(images)} images: none are left")
        self.images, self.labels = backend.asarray(images[:count]), backend.asarray(labels[:count])
        self.validation = backend.asarray(images[count:]), labels[count:]

        first = initialise(model_config, config.seed)
        self.parameters = first.with_flat(backend.asarray(first.flat))
        flat = self.parameters.flat
        decayed = matrices_only(self.parameters) if config.weight_decay else None
        self.average = ExponentialMovingAverage(flat, config.average) if config.average else None
        if workers is None:
            workers = max(1, min(available_cores(), config.batch_size // IMAGES_A_WORKER))
        self.cpu_workers = workers
        if backend.device == "gpu":
            self.sharded_gradient = ShardedGradient(model_config, 1, config.smoothing, config.batch_size)
        else:
            self.sharded_gradient = ShardedGradient(model_config, workers, config.smoothing)
        self.workers = self.sharded_gradient.workers
        self.adam = Adam(
            flat,
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            decayed=decayed,
            threads=self.workers,
        )

        self.precision, self.kernels = precision, choose_kernels(backend, model_config, precision, kernels)
        self.kernel_step, began = None, time.perf_counter()
        if self.kernels != "off":
            self.kernel_step = KernelStep(
                Kernels(backend, model_config, precision),
                *(self.parameters, self.adam, self.average.average if self.average else None),
                *(self.images, self.labels.astype(np.uint8), config.batch_size, config.smoothing, config.clip),
                graph=self.kernels == "graph",
            )
        self.compile_seconds = time.perf_counter() - began  # of the kernels; none of a run's own seconds

        self.epoch = 0  # finished epochs
        self.place = 0  # images seen of the epoch under way,
        self.loss_sum, self.correct = 0.0, 0  # and what they gave
        self.seconds = 0.0  # spent in training steps, over all sittings
        self.origin = {}  # where recipe and data came from, for whoever goes on: any JSON
        self.history = []  # one dict a finished epoch
        self.stop_requested = False

    @property
    def finished(self):
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    @property
    def total_steps(self):
        """Steps in all epochs; the last of each may have a smaller batch."""
        return self.config.epochs * -(-len(self.images) // self.config.batch_size)

    def learning_rate(self, step=None):
        """Return the learning rate of a step, counted from 0 over all epochs; by default of the next one."""
        step = self.adam.steps if step is None else step
        schedule = warmup_cosine if self.config.schedule == "cosine" else constant
        warmup_steps = min(self.config.warmup_steps, self.total_steps // 10)
        return schedule(step, self.total_steps, self.config.learning_rate, warmup_steps)

    def model(self):
        """Return the `VisionTransformer` as it stands: with averaged weights, if the recipe averages."""
        flat = self.parameters.flat if self.average is None else self.average.average
        return VisionTransformer(self.model_config, self.parameters.with_flat(flat))

    def run(self, folder=None, on_step=None, on_epoch=None, stop_after=None):
        """Train to the last epoch, keeping `folder`/checkpoint.safetensors up to date.

        folder: where checkpoints go, None for none; on_step(training) is called after every step and
        on_epoch(training) after every epoch, when its record is in `history`; stop_after: leave when so many epochs
        are finished, to go on another day. Ctrl-C or SIGTERM leave a checkpoint and raise `TrainingStopped`;
        a loss that is not finite raises `TrainingDiverged` and leaves the last good checkpoint as it is.
        `OSError` comes of a folder that cannot be written, at the start and not after the first epoch.
        """
        last_epoch = self.config.epochs if stop_after is None else min(stop_after, self.config.epochs)
        self.stop_requested = False
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(folder)  # there is always something to go on from, and a full disk is found out at once
        with self._stop_on_signals(), self.sharded_gradient:
            while self.epoch < last_epoch:
                self._run_epoch(folder, on_step)
                self.save(folder)  # validation takes its time, and may be interrupted
                self._stop_if_asked()
                self._finish_epoch()
                self.save(folder)
                if on_epoch:
                    on_epoch(self)
                if self.epoch < last_epoch:
                    self._stop_if_asked()

    def _run_epoch(self, folder, on_step):
        """Take the steps that are left of the epoch under way."""
        config = self.config
        saved, began = time.monotonic(), time.perf_counter()
        if self.kernel_step is None:
            epoch = Epoch(self.images, self.labels, config.augmentation, config.seed, self.epoch, self.backend)
        else:
            epoch = self._begin_epoch_in_kernels()
        while self.place < len(self.images):
            self.step(epoch)
            due = self.stop_requested or time.monotonic() - saved > CHECKPOINT_SECONDS
            if due or self.place == len(self.images):
                self._wait()  # in the time that counts
            self.seconds += time.perf_counter() - began
            if on_step:
                on_step(self)
            if due or self.stop_requested:
                self.save(folder)
                saved = time.monotonic()
            self._stop_if_asked()
            began = time.perf_counter()

    def _wait(self):
        """Wait for a GPU, which may still be at it."""
        if self.kernel_step is not None:
            self.kernel_step.synchronise()
        self.backend.synchronise()

    def _stop_if_asked(self):
        if self.stop_requested:
            raise TrainingStopped

    def step(self, epoch):
        """Take one step on the next batch of `epoch`: an `Epoch`, or the `KernelStep` that has begun one."""
        if epoch is self.kernel_step:
            self._step_in_kernels()
            return
        start, stop = self.place, min(self.place + self.config.batch_size, len(self.images))
        loss, correct, gradient = self.sharded_gradient(self.parameters, epoch.load, start, stop)
        if self.backend.device == "cpu":  # a GPU would have to be waited for; there `check_finite` finds it
            self._require_finite("loss", loss)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows here is found by `check_finite`
            if self.config.clip:
                norm = clip_by_global_norm(gradient.flat, self.config.clip)
                if self.backend.device == "cpu":
                    self._require_finite("norm of the gradient", norm)
            self.adam.step(self.parameters.flat, gradient.flat, self.learning_rate())
        self.loss_sum = self.loss_sum + loss.astype(np.float64) * (stop - start)
        self.correct = self.correct + correct
        self.place = stop
        if self._averages_after(self.adam.steps, stop == len(self.images)):
            self.average.step(self.parameters.flat)

    def _averages_after(self, steps, is_last):
        """Say whether the average takes in the weights after so many steps, of which the last may end an epoch."""
        return self.average is not None and (steps % AVERAGE_EVERY == 0 or is_last)

    def _begin_epoch_in_kernels(self):
        """Put on the device what the steps that are left of the epoch will need; return the `KernelStep`."""
        config, kernel_step = self.config, self.kernel_step
        order, rng = draw_order(len(self.images), config.seed, self.epoch)
        draw = (config.augmentation, *stream_of(rng)) if config.augmentation else None
        done = -(-self.place // config.batch_size)
        totals = float(self.loss_sum), int(self.correct)
        kernel_step.begin_epoch(order, draw, self._kernel_schedule(done), done, totals)
        self.loss_sum, self.correct = kernel_step.totals[0], kernel_step.totals[1]  # views: they follow the steps
        return kernel_step

    def _kernel_schedule(self, done):
        """Return (steps, 4), what `adam_step` reads for each step of the epoch, of which `done` are done."""
        steps = -(-len(self.images) // self.config.batch_size)
        rows = np.zeros((steps, 4))
        average_steps = self.average.steps if self.average else 0
        for i in range(done, steps):
            step = self.adam.steps - done + i + 1  # counted from 1 over all epochs
            rate = self.learning_rate(step - 1)
            rows[i, :3] = rate, rate / (1 - self.adam.beta1**step), 1 / math.sqrt(1 - self.adam.beta2**step)
            if self._averages_after(step, i == steps - 1):
                average_steps += 1
                rows[i, 3] = self.average.share(average_steps)
        return rows

    def _step_in_kernels(self):
        """Take one step on the next batch, and count what the device does along with it."""
        count = min(self.config.batch_size, len(self.images) - self.place)
        self.kernel_step(count)
        self.place += count
        self.adam.steps += 1
        if self._averages_after(self.adam.steps, self.place == len(self.images)):
            self.average.steps += 1

    def _finish_epoch(self):
        """Validate and write the epoch into the history; the learning rate there is that of the next step."""
        record = {
            "epoch": self.epoch + 1,
            "train_loss": float(self.loss_sum) / self.place,
            "train_accuracy": int(self.correct) / self.place,
            "validation_loss": None,
            "validation_accuracy": None,
            "learning_rate": self.learning_rate(),
            "seconds": self.seconds,
        }
        self.check_finite()
        if len(self.validation[1]):
            try:
                result = evaluate(self.model(), *self.validation, workers=self.workers)
            except ArithmeticError as error:
                raise TrainingDiverged(f"validation after epoch {self.epoch + 1}: {error}") from error
            record |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy}
        self.history.append(record)
        self.epoch += 1
        self.place, self.loss_sum, self.correct = 0, 0.0, 0

    def check_finite(self):
        """Raise `TrainingDiverged` unless the loss so far, every weight and every moment are finite."""
        self._require_finite("loss", self.loss_sum)
        with np.errstate(over="ignore", invalid="ignore"):
            self._require_finite("sum of all weights", self.parameters.flat.sum())
            self._require_finite("sum of Adam's first moments", self.adam.first_moment.sum())
            self._require_finite("sum of Adam's second moments", self.adam.second_moment.sum())

    def _require_finite(self, what, value):
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {what} became {float(value)} in epoch {self.epoch + 1}, after {self.adam.steps} of "
                f"{self.total_steps} steps: try a learning rate below {self.config.learning_rate:g}, "
                "or clip the gradient"
            )

    def save(self, folder):
        """Write all that changes to `folder`/checkpoint.safetensors; nowhere if `folder` is None.

        Raises `TrainingDiverged` if it is not finite, and `OSError` if it cannot be written.
        """
        self._wait()
        self.check_finite()
        if folder is None:
            return
        arrays = {
            "parameters": self.parameters.flat,
            "adam.first_moment": self.adam.first_moment,
            "adam.second_moment": self.adam.second_moment,
        }
        if self.average is not None:
            arrays["average"] = self.average.average
        info = {
            "format": CHECKPOINT_FORMAT,
            "model": self.model_config.as_dict(),
            "training": self.config.as_dict(),
            "origin": self.origin,
            "workers": self.cpu_workers,
            "data": self.fingerprint,
            "adam_steps": self.adam.steps,
            "average_steps": self.average.steps if self.average else 0,
            "epoch": self.epoch,
            "place": self.place,
            "loss_sum": float(self.loss_sum),
            "correct": int(self.correct),
            "seconds": self.seconds,
            "history": self.history,
        }
        save_arrays(Path(folder) / CHECKPOINT, arrays, info)

    @classmethod
    def resume(
        cls, folder, images, labels, backend, epochs=None, workers=None, precision="float32", kernels=None
    ):
        """Return the run that `folder`/checkpoint.safetensors holds, ready to go on.

        images, labels: the same training set; epochs: a new number of epochs, by default that of the run; workers:
        by default that of the run, which alone gives the same bits; precision, kernels: as for a new run. Raises
        `CheckpointError` if the checkpoint is not whole or the data is another.
        """
        path = Path(folder) / CHECKPOINT
        arrays, info = _load(path)
        config = TrainingConfig.from_dict(info["training"])
        if epochs is not None:
            begun = info["epoch"] + (info["place"] > 0)
            if epochs < begun:
                raise CheckpointError(f"{path}: {begun} epochs are begun or done, which is more than {epochs}")
            config = replace(config, epochs=epochs)
        workers = info["workers"] if workers is None else workers
        run = cls(ViTConfig(**info["model"]), config, images, labels, backend, workers, precision, kernels)
        if run.fingerprint != info["data"]:
            raise CheckpointError(f"{path}: the run was trained on other data than is given now")
        for name, array in arrays.items():
            if array.shape != run.parameters.flat.shape or array.dtype != run.parameters.flat.dtype:
                raise CheckpointError(f"{path}: {name} does not fit the model: {array.dtype} {array.shape}")
        if not 0 <= info["place"] <= len(run.images):
            raise CheckpointError(f"{path}: place {info['place']} is outside an epoch of {len(run.images)} images")
        if info["place"] % config.batch_size and info["place"] != len(run.images):
            raise CheckpointError(f"{path}: place {info['place']} is not between two batches of {config.batch_size}")
        run.parameters.flat[...] = backend.asarray(arrays["parameters"])
        run.adam.first_moment[...] = backend.asarray(arrays["adam.first_moment"])
        run.adam.second_moment[...] = backend.asarray(arrays["adam.second_moment"])
        run.adam.steps = info["adam_steps"]
        if run.average is not None:
            run.average.average[...] = backend.asarray(arrays["average"])
            run.average.steps = info["average_steps"]
        run.origin = info["origin"]
        run.epoch, run.place = info["epoch"], info["place"]
        run.loss_sum, run.correct = info["loss_sum"], info["correct"]
        run.seconds, run.history = info["seconds"], info["history"]
        return run

    @contextmanager
    def _stop_on_signals(self):
        """Let the first Ctrl-C or SIGTERM ask for a stop between two steps; the second Ctrl-C is Python's own."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask_to_stop(number, frame):
            self.stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def choose_kernels(backend, model_config, precision="float32", kernels=None):
    """Return which of `KERNELS` a run takes its steps by: on a CPU "off", and on a GPU what was asked for.

    kernels: one of `KERNELS`, or None for a graph if there are kernels for this model; if there are none, a line in
    the log says why. Raises `ValueError` if what was asked for, or the precision, cannot be had.
    """
    if kernels not in (None, *KERNELS):
        raise ValueError(f"kernels {kernels!r} are unknown: give {', '.join(map(repr, KERNELS))}")
    reason = why_not(model_config, precision, backend.compute_capability())
    if backend.device == "cpu":
        if precision != "float32" or kernels in ("graph", "launches"):
            asked = f"precision {precision!r}" if precision != "float32" else f"kernels {kernels!r}"
            raise ValueError(f"{asked} is for a GPU: give --device gpu, or leave it out")
        return "off"
    if kernels == "off" or (kernels is None and reason is not None and precision == "float32"):
        if precision != "float32":
            raise ValueError(f"precision {precision!r} is one of the kernels': without them there is float32 alone")
        if kernels is None:
            logging.getLogger("tinyvit").warning("note: plain operations compute, as %s", reason)
        return "off"
    if reason is not None:
        raise ValueError(reason)
    return kernels or "graph"


def read_info(folder):
    """Return what the checkpoint in `folder` says of its run, a dict: "model", "training", "origin", "epoch"...

    Raises `CheckpointError` if there is none or it is not whole.
    """
    return _load(Path(folder) / CHECKPOINT)[1]


def _load(path):
    arrays, info = load_arrays(path)
    if not isinstance(info, dict) or info.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a run in format {CHECKPOINT_FORMAT}")
    kinds = {
        **dict.fromkeys(("model", "training", "origin"), dict),
        **dict.fromkeys(("workers", "data", "adam_steps", "average_steps", "epoch", "place", "correct"), int),
        **dict.fromkeys(("loss_sum", "seconds"), float),
        "history": list,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name), kind)]
    try:
        ViTConfig(**info["model"])
        config = TrainingConfig.from_dict(info["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings are not those of a run ({error})") from error
    needed = {"parameters", "adam.first_moment", "adam.second_moment"} | ({"average"} if config.average else set())
    wrong += sorted(needed ^ set(arrays))
    if wrong:
        raise CheckpointError(f"{path}: wrong or missing in this checkpoint: {', '.join(wrong)}")
    return arrays, info


def check_dataset(images, labels, model_config):
    """Raise `ValueError` unless images (N, R, C) uint8 and labels (N,) integers fit the model and each other."""
    side = model_config.image_size
    if images.ndim != 3 or images.shape[1:] != (side, side) or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(
            f"the model reads uint8 images of shape (N, {side}, {side}), not {images.dtype} {images.shape}"
        )
    check_labels(labels, len(images), model_config.classes)
