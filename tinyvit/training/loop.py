"""The training loop: epochs, validation, history, checkpoints, stopping and resuming."""

import signal
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyvit.checkpoint import CheckpointError
from tinyvit.evaluate import check_labels, evaluate
from tinyvit.model import ViTConfig
from tinyvit.training.settings import TrainingConfig
from tinyvit.training.state import CHECKPOINT, new_state, read_checkpoint, restore_state, save_state
from tinyvit.training.step import make_step

DEFAULT_STEP = make_step  # the one that takes the option workers
CHECKPOINT_SECONDS = 20  # a killed run loses at most this, and the time of one step


class TrainingDiverged(ArithmeticError):
    """The loss or a weight is no longer a finite number."""


class TrainingStopped(Exception):
    """The run was asked to stop and did, with a checkpoint to resume from."""


class Training:
    """A training run that can stop anywhere and resume.

    model_config: `ViTConfig`; config: `TrainingConfig`; images: (N, R, C) uint8; labels: (N,) integers in
    0..classes-1; backend: a `Backend`; make_step: a function that makes the step, called with the `State`, the images
    and labels to train on, both configs, the backend and the `options`: those of `training.step.make_step` are
    workers, precision and kernels.

    `state` has the weights and the history, `step` takes the steps. Everything random follows from (seed, epoch), so
    resuming gives the same bits as never having stopped, on the same machine with the same number of workers. Raises
    `ValueError` if the data does not fit the model, or the device does not support an option.
    """

    def __init__(self, model_config, config, images, labels, backend, *, make_step=make_step, **options):
        check_dataset(images, labels, model_config)
        count = len(images) - config.validation
        if count < 1:
            raise ValueError(f"validation holds back {config.validation} of {len(images)} images: none are left")
        self.model_config, self.config = model_config, config
        self.fingerprint = zlib.crc32(np.ascontiguousarray(labels), zlib.crc32(np.ascontiguousarray(images)))
        self.train_images = count  # how many; the last images are for validation
        self.validation = backend.asarray(images[count:]), labels[count:]
        self.state = new_state(model_config, config, backend)
        self.step = make_step(self.state, images[:count], labels[:count], model_config, config, backend, **options)
        self.stop_requested = False
        self._in_epoch = False

    def __repr__(self):
        return f"Training({self.state.epoch} of {self.config.epochs} epochs on {self.train_images:,} images)"

    @property
    def finished(self):
        """Whether all epochs are done."""
        return self.state.epoch >= self.config.epochs

    @property
    def steps_per_epoch(self):
        """The number of batches in an epoch; the last may be smaller."""
        return -(-self.train_images // self.config.batch_size)

    @property
    def images_done(self):
        """How many images of the epoch under way the steps have used."""
        return min(self.state.done * self.config.batch_size, self.train_images)

    def run(self, folder=None, on_step=None, on_epoch=None, stop_after=None):
        """Train to the last epoch, keeping `folder`/checkpoint.safetensors up to date.

        folder: where checkpoints go, None for none; on_step(training) is called after every step and
        on_epoch(training) after every epoch, when its record is in the history; stop_after: leave when so many
        epochs are finished. Ctrl-C or SIGTERM leave a checkpoint and raise `TrainingStopped`; a loss that is not
        finite raises `TrainingDiverged` and leaves the last good checkpoint as it is; `WorkerError` means that a
        process died. A folder that cannot be written raises `OSError` at the start.
        """
        state = self.state
        last_epoch = self.config.epochs if stop_after is None else min(stop_after, self.config.epochs)
        self.stop_requested = False
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(folder)  # there is always something to resume from, and a full disk is found at once
        with self._stop_on_signals(), self.step:
            while state.epoch < last_epoch:
                self._run_epoch(folder, on_step)
                self.save(folder)  # validation takes its time, and may be interrupted
                self._stop_if_asked()
                self._finish_epoch()
                self.save(folder)
                if on_epoch:
                    on_epoch(self)
                if state.epoch < last_epoch:
                    self._stop_if_asked()

    def _run_epoch(self, folder, on_step):
        """Take the steps that are left of the epoch under way."""
        state, step = self.state, self.step
        saved, began = time.monotonic(), time.perf_counter()
        step.begin_epoch(state.epoch, state.done, (state.loss_sum, state.correct))
        self._in_epoch = True
        while state.done < self.steps_per_epoch:
            try:
                step()
            except ArithmeticError as error:
                raise self._diverged(error) from error
            state.done += 1
            due = self.stop_requested or time.monotonic() - saved > CHECKPOINT_SECONDS
            if due or state.done == self.steps_per_epoch:
                self._read_totals()  # waits for a GPU, in the time that counts
            state.seconds += time.perf_counter() - began
            if on_step:
                on_step(self)
            if due or self.stop_requested:
                self.save(folder)
                saved = time.monotonic()
            self._stop_if_asked()
            began = time.perf_counter()

    def _finish_epoch(self):
        """Validate, and append the record of the epoch to the history."""
        state, epoch = self.state, self.state.epoch + 1
        learning_rates = self.config.learning_rates(epoch - 1, self.steps_per_epoch)
        record = {
            "epoch": epoch,
            "train_loss": state.loss_sum / self.train_images,
            "train_accuracy": state.correct / self.train_images,
            "validation_loss": None,
            "validation_accuracy": None,
            "first_learning_rate": learning_rates[0],
            "last_learning_rate": learning_rates[-1],
            "seconds": state.seconds,
        }
        self._require_finite()
        if len(self.validation[1]):
            try:
                result = evaluate(*self.validation, state.weights, self.model_config, workers=self.step.workers)
            except ArithmeticError as error:
                raise TrainingDiverged(f"validation after epoch {epoch}: {error}") from error
            record |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy}
        state.history.append(record)
        state.epoch, state.done, state.loss_sum, state.correct = epoch, 0, 0.0, 0
        self._in_epoch = False

    def save(self, folder):
        """Write the state to `folder`/checkpoint.safetensors; nowhere if `folder` is None.

        Raises `TrainingDiverged` if it is not finite, and `OSError` if it cannot be written.
        """
        self._read_totals()
        self._require_finite()
        if folder is not None:
            settings = {
                "model": self.model_config.as_dict(),
                "training": self.config.as_dict(),
                "data": self.fingerprint,
                **self.step.record,
            }
            save_state(folder, self.state, settings, self.images_done)

    @classmethod
    def resume(cls, folder, images, labels, backend, *, epochs=None, make_step=make_step, **options):
        """Return the run that `folder`/checkpoint.safetensors holds, ready to resume.

        images, labels: the same training set; epochs: a new number of epochs, by default that of the run; make_step
        and options: as for a new run. Without the option workers, their number is that of the run: only the same
        number gives the same bits. Raises `CheckpointError` if the checkpoint is not whole or the data is another.
        """
        path = Path(folder) / CHECKPOINT
        arrays, info = read_checkpoint(folder)
        config = TrainingConfig.from_dict(info["training"])
        if epochs is not None:
            begun = info["epoch"] + (info["place"] > 0)
            if epochs < begun:
                raise CheckpointError(f"{path}: {begun} epochs are begun or done, which is more than {epochs}")
            config = replace(config, epochs=epochs)
        if make_step is DEFAULT_STEP and options.get("workers") is None:
            options["workers"] = info["workers"]
        model_config = ViTConfig(**info["model"])
        run = cls(model_config, config, images, labels, backend, make_step=make_step, **options)
        if run.fingerprint != info["data"]:
            raise CheckpointError(f"{path}: the run was trained on other data than is given now")
        restore_state(path, run.state, arrays, info, config.batch_size, run.train_images)
        return run

    def _read_totals(self):
        if self._in_epoch:
            self.state.loss_sum, self.state.correct = self.step.totals()

    def _require_finite(self):
        try:
            self.state.require_finite()
        except ArithmeticError as error:
            raise self._diverged(error) from error

    def _diverged(self, error):
        total = self.config.epochs * self.steps_per_epoch
        return TrainingDiverged(
            f"{error} in epoch {self.state.epoch + 1}, after {self.state.adam.steps} of {total} steps: "
            f"try a learning rate below {self.config.learning_rate:g}, or clip the gradient"
        )

    def _stop_if_asked(self):
        if self.stop_requested:
            raise TrainingStopped

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


def check_dataset(images, labels, model_config):
    """Raise `ValueError` unless images (N, R, C) uint8 and labels (N,) integers fit the model and each other."""
    side = model_config.image_size
    if images.ndim != 3 or images.shape[1:] != (side, side) or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(
            f"the model reads uint8 images of shape (N, {side}, {side}), not {images.dtype} {images.shape}"
        )
    check_labels(labels, len(images), model_config.classes)
