"""The training loop: epochs, validation, history, checkpoints, stopping and resuming."""

import logging
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyvit.backend import Backend, compiled_loops, use_loops
from tinyvit.checkpoint import CheckpointError
from tinyvit.checks import as_images, as_labels, require_backend
from tinyvit.evaluate import evaluate
from tinyvit.files import locked_folder, make_folder
from tinyvit.model import ViTConfig
from tinyvit.training.settings import TrainingConfig
from tinyvit.training.state import CHECKPOINT, new_state, read_checkpoint, require_place, restore_state, save_state
from tinyvit.training.step import make_step

DEFAULT_STEP = make_step  # it has the option `workers`
STEPS_TO_JUDGE = 100  # after so few steps, a good run may still have the loss of a guess
USUAL_RATES = (1e-4, 5e-3)  # learning rates of Adam with which models of this kind learn
CHECKPOINT_SECONDS = 20  # a killed run loses at most this time and the time of one step


class TrainingDiverged(ArithmeticError):
    """The loss or a weight became NaN or infinite."""


class TrainingStopped(Exception):
    """The run stopped on request. If it has a folder, it left a checkpoint there to resume from.

    Parameters
    ----------
    signal : int, optional
        Number of the signal that requested the stop.
    """

    def __init__(self, signal: int | None = None) -> None:
        super().__init__(signal)
        self.signal = signal


class Training:
    """A training run that can stop between any two steps and resume.

    Parameters
    ----------
    model_config : ViTConfig
        The settings of the model.
    config : TrainingConfig
        The settings of the training.
    images : ndarray of shape (N, R, C)
        Images, uint8. The last ones are for validation.
    labels : ndarray of shape (N,)
        Their classes, integers in 0 to classes - 1.
    backend : Backend
        Where to compute.
    make_step : callable, optional
        Returns the step. It is called with the keywords `state`, `images`, `labels`, `model_config`, `config` and
        `backend`, and with the options.
    **options
        Options for `make_step`. The default has `workers`, `precision`, `kernels` and `loops`.

    Raises
    ------
    ValueError
        If the data does not fit the model, or the device does not support an option.

    Notes
    -----
    `state` contains the weights and the history. All random numbers follow from the seed and the epoch. So a resumed
    run gives the same bits as an uninterrupted one on the same machine with the same `workers` and `loops`.
    """

    def __init__(
        self,
        model_config: ViTConfig,
        config: TrainingConfig,
        images: np.ndarray,
        labels: np.ndarray,
        backend: Backend,
        *,
        make_step: Callable[..., Any] = make_step,
        **options: Any,
    ) -> None:
        require_backend(backend)
        images, labels = check_dataset(images, labels, model_config)
        count = len(images) - config.validation
        if count < 1:
            raise ValueError(f"validation must be below the number of images, {len(images)}, not {config.validation}")
        self.model_config, self.config = model_config, config
        of_images = zlib.crc32(np.ascontiguousarray(images).data)
        self.fingerprint = zlib.crc32(np.ascontiguousarray(labels).data, of_images)
        self.train_images = count
        self.validation = backend.asarray(images[count:]), labels[count:]
        self.state = new_state(model_config, config, backend)
        self.step = make_step(
            state=self.state,
            images=images[:count],
            labels=labels[:count],
            model_config=model_config,
            config=config,
            backend=backend,
            **options,
        )
        self.stop_requested, self._stop_signal = False, None
        self._in_epoch = False

    def __repr__(self):
        return f"Training({self.state.epoch} of {self.config.epochs} epochs on {self.train_images:,} images)"

    @property
    def finished(self) -> bool:
        """Whether all epochs are finished."""
        return self.state.epoch >= self.config.epochs

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch; the last may be smaller."""
        return -(-self.train_images // self.config.batch_size)

    @property
    def images_done(self) -> int:
        """The number of images of the current epoch that are used."""
        return min(self.state.done * self.config.batch_size, self.train_images)

    def run(
        self,
        folder: str | PathLike[str] | None = None,
        on_step: Callable[["Training"], object] | None = None,
        on_epoch: Callable[["Training"], object] | None = None,
        stop_after: int | None = None,
    ) -> None:
        """Train to the last epoch, and keep `folder`/checkpoint.safetensors up to date.

        Parameters
        ----------
        folder : path-like, optional
            Where checkpoints go. The folder is locked during the run. Default: no checkpoints.
        on_step : callable, optional
            Called with this object after each step.
        on_epoch : callable, optional
            Called with this object after each epoch, when its record is in the history.
        stop_after : int, optional
            Return when this number of epochs is finished.

        Raises
        ------
        TrainingStopped
            After Ctrl-C or SIGTERM. A checkpoint is written first.
        TrainingDiverged
            If the loss or a weight is not finite. The last good checkpoint is unchanged.
        WorkerError
            If another process failed or died.
        BlockingIOError
            If another run uses the folder.
        OSError
            If the checkpoint cannot be written, before the first step or after an epoch. The older file is unchanged.

        Notes
        -----
        If a checkpoint cannot be written during an epoch, the run continues, and the logger "tinyvit" gets a warning.
        """
        if folder is not None:
            make_folder(folder)
        with nullcontext() if folder is None else locked_folder(folder):
            self._run(folder, on_step, on_epoch, stop_after)

    def _run(self, folder, on_step, on_epoch, stop_after):
        """Train to the last epoch in a locked folder."""
        state = self.state
        last_epoch = self.config.epochs if stop_after is None else min(stop_after, self.config.epochs)
        self.stop_requested, self._stop_signal = False, None
        self.save(folder)  # a full disk raises an error before the first step
        with self._stop_on_signals(), self.step:
            while state.epoch < last_epoch:
                self._run_epoch(folder, on_step)
                self.save(folder)  # validation takes time and may be interrupted
                self._stop_if_requested()
                self._finish_epoch()
                self.save(folder)
                if on_epoch:
                    on_epoch(self)
                if state.epoch in (1, self.config.epochs) and (text := self.no_learning()):
                    logging.getLogger("tinyvit").warning("note: %s", text)
                self._stop_if_requested()
        self._stop_if_requested()  # a signal may have come while the workers ended

    def _run_epoch(self, folder, on_step):
        """Take the remaining steps of the current epoch."""
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
                self._read_totals()  # waits for a GPU, so that `seconds` includes its work
            state.seconds += time.perf_counter() - began
            if on_step:
                on_step(self)
            if due or self.stop_requested:
                self._save_during_epoch(folder)
                saved = time.monotonic()
            self._stop_if_requested()
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
                with use_loops(getattr(self.step, "loops", "off")):
                    result = evaluate(*self.validation, state.weights, self.model_config, workers=self.step.workers)
            except ArithmeticError as error:
                raise TrainingDiverged(f"validation after epoch {epoch}: {error}") from error
            record |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy}
        state.history.append(record)
        state.epoch, state.done, state.loss_sum, state.correct = epoch, 0, 0.0, 0
        self._in_epoch = False

    def no_learning(self) -> str | None:
        """Compare the last epoch with guessing.

        Returns
        -------
        str or None
            What shows that the model has not learned, with advice. None if it has learned. In the first
            `STEPS_TO_JUDGE` steps, only a loss far above that of a guess or an unusual learning rate counts.
        """
        record, (_, labels) = self.state.history[-1], self.validation
        loss, accuracy, rate = record["train_loss"], record["validation_accuracy"], self.config.learning_rate
        low, high = USUAL_RATES
        uniform = math.log(self.model_config.classes)
        early = self.state.adam.steps < STEPS_TO_JUDGE and loss < 2 * uniform and low <= rate <= high
        if early or self.model_config.classes == 1:
            return None
        most_frequent = np.bincount(labels).max() / len(labels) if len(labels) else 0.0
        if loss >= uniform:
            found = f"its loss is {loss:.5g}, and guessing gives {uniform:.5g}"
        elif accuracy is not None and accuracy <= most_frequent:
            found = f"its accuracy is {accuracy:.1%}, and the most frequent class has {most_frequent:.1%}"
        else:
            return None
        if not low <= rate <= high:
            advice = f"try a learning rate from {low:g} to {high:g}, not {rate:g}"
        elif self.state.adam.steps < 1000:
            advice = f"train for more than {self.state.adam.steps} steps"
        else:
            advice = "check that the labels belong to the images"
        epochs = f"{record['epoch']} epoch{'s' * (record['epoch'] > 1)}"
        return f"the model has not learned in {epochs}: {found}: {advice}"

    def save(self, folder: str | PathLike[str] | None) -> None:
        """Write the state to `folder`/checkpoint.safetensors.

        Parameters
        ----------
        folder : path-like or None
            The folder of the run. With None nothing is written.

        Raises
        ------
        TrainingDiverged
            If the loss or a weight is not finite.
        OSError
            If the file cannot be written.
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

    def _save_during_epoch(self, folder):
        """Write the state. A failure is only a warning, because the next checkpoint follows soon."""
        try:
            self.save(folder)
        except OSError as error:
            if self.stop_requested:
                raise
            text = f"no checkpoint after step {self.state.done} of epoch {self.state.epoch + 1}"
            text += f", the next follows in {CHECKPOINT_SECONDS} s"
            logging.getLogger("tinyvit").warning("note: %s (%s)", text, error)

    @classmethod
    def resume(
        cls,
        folder: str | PathLike[str],
        images: np.ndarray,
        labels: np.ndarray,
        backend: Backend,
        *,
        epochs: int | None = None,
        make_step: Callable[..., Any] = make_step,
        **options: Any,
    ) -> "Training":
        """Return the run of `folder`/checkpoint.safetensors, ready to resume.

        Parameters
        ----------
        folder : path-like
            The folder of the run.
        images : ndarray of shape (N, R, C)
            The images of the run.
        labels : ndarray of shape (N,)
            The labels of the run.
        backend : Backend
            Where to compute.
        epochs : int, optional
            A new number of epochs. Default: that of the run.
        make_step : callable, optional
            As for a new run.
        **options
            As for a new run. The defaults of `workers` and `loops` are those of the run, since others change the
            bits.

        Returns
        -------
        Training
            The run.

        Raises
        ------
        CheckpointError
            If the checkpoint is missing or damaged, or the data differs from that of the run.
        """
        require_backend(backend)
        path = Path(folder) / CHECKPOINT
        arrays, info = read_checkpoint(folder)
        config = TrainingConfig.from_dict(info["training"])
        if epochs is not None:
            begun = info["epoch"] + (info["place"] > 0)
            if epochs < begun:
                text = f"epochs must be at least {begun}, the number of epochs begun, not {epochs}"
                raise CheckpointError(f"{path}: {text}")
            config = replace(config, epochs=epochs)
        if make_step is DEFAULT_STEP:
            for name in ("workers", "loops"):
                if options.get(name) is None:
                    options[name] = info[name]
            if backend.device == "cpu" and options["loops"] == "on" and compiled_loops() is None:
                raise CheckpointError(
                    f"{path}: compiled loops need Numba, which is missing: type pip install 'tinyvit[fast]', or "
                    "continue with --loops off, which changes the bits"
                )
        model_config = ViTConfig(**info["model"])
        count = len(images) - config.validation
        try:
            check_dataset(images, labels, model_config)
            if count < 1:
                text = f"validation must be below the number of images, {len(images)}"
                raise ValueError(f"{text}, not {config.validation}")
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}: give the images and labels of the run") from error
        require_place(path, info, config.batch_size, count)
        run = cls(model_config, config, images, labels, backend, make_step=make_step, **options)
        if run.fingerprint != info["data"]:
            raise CheckpointError(f"{path}: the run used other training data: give the same images and labels")
        restore_state(run.state, arrays=arrays, info=info, batch_size=config.batch_size)
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

    def _stop_if_requested(self):
        if self.stop_requested:
            raise TrainingStopped(self._stop_signal)

    @contextmanager
    def _stop_on_signals(self):
        """Let the first Ctrl-C or SIGTERM request a stop between two steps. A second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request_stop(number, frame):
            self.stop_requested, self._stop_signal = True, number
            for other, handler in before.items():
                signal.signal(other, handler)

        numbers = (signal.SIGINT, signal.SIGTERM)  # a program in the background may ignore the first
        heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.getsignal(number) for number in heeded}
        for number in heeded:
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_dataset(
    images: npt.ArrayLike, labels: npt.ArrayLike, model_config: ViTConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Check that images and labels fit the model and each other, and return them as arrays.

    Parameters
    ----------
    images : array_like of shape (N, R, C)
        Images, uint8, with the image size of the model.
    labels : array_like of shape (N,)
        Their classes, integers in 0 to classes - 1.
    model_config : ViTConfig
        The settings of the model.

    Returns
    -------
    images : ndarray of shape (N, R, C)
        Images, uint8.
    labels : ndarray of shape (N,)
        Labels, integers.

    Raises
    ------
    TypeError
        If an argument does not consist of numbers.
    ValueError
        If an array does not fit.
    """
    images = as_images(images, model_config.image_shape, model_config.channels, bytes_only=True)
    return images, as_labels(labels, len(images), model_config.classes)
