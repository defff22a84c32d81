"""The state of a run, and its checkpoint file."""

import copy
import math
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.backend import LOOPS, MOST_WORKERS, Backend, array_module
from tinyvit.checkpoint import (
    CHECKPOINT,
    CheckpointError,
    as_path,
    in_short,
    load_arrays,
    parameter_count,
    require_all_settings,
    save_arrays,
)
from tinyvit.checks import require_number
from tinyvit.kernels import PRECISIONS
from tinyvit.model import ViTConfig, initialise
from tinyvit.optim import Adam, ExponentialMovingAverage, matrices_only
from tinyvit.parameters import Parameters
from tinyvit.training.settings import TrainingConfig

CHECKPOINT_FORMAT = 1
LARGEST = 1e300  # of a sum of losses, and of seconds


@dataclass(eq=False)
class State:
    """The weights, the optimiser and the progress of a run.

    Steps update the arrays of the weights, of Adam and of the average in place.

    Parameters
    ----------
    parameters : Parameters
        The weights.
    adam : Adam
        The optimiser.
    average : ExponentialMovingAverage or None
        The moving average of the weights, if the settings have one.
    epoch : int
        Number of finished epochs.
    done : int
        Number of finished steps of the current epoch.
    loss_sum : float
        Sum of the losses of the images in the current epoch, when it was last read from the step.
    correct : int
        Number of correctly classified images in the current epoch, when it was last read from the step.
    seconds : float
        Time spent in training steps since the start of the run.
    history : list of dict
        One record per finished epoch.
    origin : dict
        The recipe, the data and further facts that JSON can represent.
    """

    parameters: Parameters
    adam: Adam
    average: ExponentialMovingAverage | None
    epoch: int = 0
    done: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def __copy__(self):
        return copy.deepcopy(self)

    def __repr__(self):
        return f"State({self.parameters!r}, {self.epoch} epochs and {self.done} steps)"

    @property
    def weights(self) -> Parameters:
        """The weights for validation and for the trained model: the moving average, if the settings have one."""
        return self.parameters if self.average is None else self.parameters.with_flat(self.average.average)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint contains.

        Returns
        -------
        dict of ndarray
            The arrays by their names in the checkpoint.
        """
        arrays = {
            "parameters": self.parameters.flat,
            "adam.first_moment": self.adam.first_moment,
            "adam.second_moment": self.adam.second_moment,
        }
        return arrays if self.average is None else {**arrays, "average": self.average.average}

    def require_finite(self) -> None:
        """Check that the loss, the weights and the moments are finite.

        Raises
        ------
        ArithmeticError
            If a value is NaN or infinite.
        """
        require_finite("loss", self.loss_sum)
        with np.errstate(over="ignore", invalid="ignore"):
            require_finite("sum of all weights", self.parameters.flat.sum())
            require_finite("sum of Adam's first moments", self.adam.first_moment.sum())
            require_finite("sum of Adam's second moments", self.adam.second_moment.sum())


def require_finite(name: str, value: float | np.ndarray) -> None:
    """Check that a number is finite.

    Parameters
    ----------
    name : str
        The name for the message.
    value : float or ndarray of shape ()
        The number.

    Raises
    ------
    ArithmeticError
        If the number is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ArithmeticError(f"the {name} became {float(value)}")


def new_state(model_config: ViTConfig, config: TrainingConfig, backend: Backend) -> State:
    """Return the state at the start of a run.

    Parameters
    ----------
    model_config : ViTConfig
        The settings of the model.
    config : TrainingConfig
        The settings of the training.
    backend : Backend
        Where the arrays go.

    Returns
    -------
    State
        Initial weights, and moments of zero.
    """
    first = initialise(model_config, config.seed)
    parameters = first.with_flat(backend.asarray(first.flat))
    adam = Adam(
        parameters.flat,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        decayed=matrices_only(parameters) if config.weight_decay else None,
    )
    average = ExponentialMovingAverage(parameters.flat, config.average) if config.average else None
    return State(parameters, adam, average)


def save_state(folder: str | PathLike[str], state: State, settings: dict[str, Any], place: int) -> None:
    """Write `folder`/checkpoint.safetensors.

    Parameters
    ----------
    folder : path-like
        The folder of the run. It must exist.
    state : State
        The state to save.
    settings : dict
        Further entries of the file: "model", "training", "workers", "loops" and "data".
    place : int
        Number of images of the current epoch that are used.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    info = {
        "format": CHECKPOINT_FORMAT,
        **settings,
        "origin": state.origin,
        "adam_steps": state.adam.steps,
        "average_steps": state.average.steps if state.average else 0,
        "epoch": state.epoch,
        "place": place,
        "loss_sum": float(state.loss_sum),
        "correct": int(state.correct),
        "seconds": state.seconds,
        "history": state.history,
    }
    save_arrays(Path(folder) / CHECKPOINT, state.arrays(), info)


def require_place(path: str | PathLike[str], info: dict[str, Any], batch_size: int, images: int) -> None:
    """Check that the progress in a checkpoint is possible for a number of training images.

    Parameters
    ----------
    path : path-like
        The file, for messages.
    info : dict
        The metadata from `read_checkpoint`.
    batch_size : int
        Number of images per step.
    images : int
        Number of training images.

    Raises
    ------
    CheckpointError
        If the place is not between two batches, or more steps were counted than taken.
    """
    place = info["place"]
    if not 0 <= place <= images:
        raise CheckpointError(f"{path}: place {place} is outside an epoch of {images} images")
    if place % batch_size and place != images:
        raise CheckpointError(f"{path}: place {place} is not between two batches of {batch_size}")
    steps = info["epoch"] * -(-images // batch_size) + -(-place // batch_size)
    for name in ("adam_steps", "average_steps"):
        if info[name] > steps:
            raise CheckpointError(f"{path}: {name} is {info[name]}, but the run has taken {steps} steps")


def restore_state(state: State, arrays: dict[str, np.ndarray], info: dict[str, Any], batch_size: int) -> None:
    """Copy a checkpoint into a new state of the same settings.

    Parameters
    ----------
    state : State
        The state to change.
    arrays : dict of ndarray
        The arrays from `read_checkpoint`.
    info : dict
        The metadata from `read_checkpoint`.
    batch_size : int
        Number of images per step.
    """
    for name, array in state.arrays().items():
        array[...] = array_module(array).asarray(arrays[name])
    state.adam.steps = info["adam_steps"]
    if state.average is not None:
        state.average.steps = info["average_steps"]
    state.done = -(-info["place"] // batch_size)
    for name in ("epoch", "loss_sum", "correct", "seconds", "history", "origin"):
        setattr(state, name, info[name])


def read_checkpoint(folder: str | PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the contents of `folder`/checkpoint.safetensors.

    Parameters
    ----------
    folder : path-like
        The folder of a run.

    Returns
    -------
    arrays : dict of ndarray
        The arrays of the state.
    info : dict
        The settings and the progress of the run.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged, is not the checkpoint of a run, or a value in it is out of range.
    """
    folder = as_path(folder)
    path = folder / CHECKPOINT
    if folder.is_file():
        raise CheckpointError(f"{folder}: expected the folder of a run, found a file: give its folder")
    arrays, info = load_arrays(path)
    if not isinstance(info, dict) or not _is_integer(info.get("format"), CHECKPOINT_FORMAT):
        raise CheckpointError(f"{path}: not a checkpoint of a run in format {CHECKPOINT_FORMAT}: start a new run")
    info.setdefault("loops", "off")  # checkpoints of version 0.1 have no loops
    try:
        model = ViTConfig(**info["model"])
        require_all_settings(model, info["model"])
        config = TrainingConfig.from_dict(info["training"])
        require_all_settings(config, info["training"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"its settings are not those of a run ({in_short(error)})"
        raise CheckpointError(f"{path}: {text}: start a new run") from error
    try:
        _check_arrays(arrays, model, config)
        _check_progress(info, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {in_short(error)}: start a new run") from error
    return arrays, info


def require_origin(origin: dict[str, Any]) -> None:
    """Check the origin of a run, from a file.

    Parameters
    ----------
    origin : dict
        The recipe, the data and further facts. None of them is required.

    Raises
    ------
    ValueError
        If a value is of another type or out of range.
    """
    for name in ("train_limit", "test_limit"):
        if origin.get(name) is not None:
            require_number(name, origin[name], 1, 2**53, integer=True)
    for name in ("recipe", "data_dir"):
        if not isinstance(origin.get(name), str | None):
            raise ValueError(f"{name} must be a text, not {origin[name]!r}")
    if origin.get("precision", "float32") not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {origin['precision']!r}")


def _is_integer(value, expected):
    """Return whether a value from a file is an integer. True and 1.0 equal 1, but are none."""
    return type(value) is int and value == expected


def _check_arrays(arrays, model, config):
    """Raise `ValueError` unless the arrays of a checkpoint fit the settings of the model and the training."""
    needed = {"parameters", "adam.first_moment", "adam.second_moment"} | ({"average"} if config.average else set())
    if wrong := sorted(needed ^ set(arrays)):
        raise ValueError(f"wrong or missing entries: {', '.join(wrong)}")
    shape = (parameter_count(model),)
    for name, array in sorted(arrays.items()):
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{name} does not fit the model: {array.dtype} {array.shape}, not float32 {shape}")
    if arrays["adam.second_moment"].min() < 0:
        raise ValueError("adam.second_moment is a mean of squares, but contains values below 0")


def _check_progress(info, config):
    """Raise `ValueError` unless the entries of a checkpoint are of their types, in range and consistent."""
    kinds = {"origin": dict, "history": list}
    numbers = ("workers", "data", "epoch", "place", "correct", "adam_steps", "average_steps", "loss_sum", "seconds")
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name), kind)]
    wrong += [name for name in numbers if name not in info] + ["loops"] * (info["loops"] not in LOOPS)
    if wrong:
        raise ValueError(f"wrong or missing entries: {', '.join(wrong)}")
    require_number("workers", info["workers"], 1, MOST_WORKERS, integer=True)
    require_number("data", info["data"], 0, 2**32, integer=True, below=True)
    require_number("epoch", info["epoch"], 0, config.epochs, integer=True)
    require_number("place", info["place"], 0, 2**53 if info["epoch"] < config.epochs else 0, integer=True)
    require_number("correct", info["correct"], 0, info["place"], integer=True)
    for name in ("adam_steps", "average_steps"):
        require_number(name, info[name], 0, 2**53, integer=True)
    for name in ("loss_sum", "seconds"):
        require_number(name, info[name], 0, LARGEST)
    if len(info["history"]) != info["epoch"]:
        raise ValueError(f"the history has {len(info['history'])} epochs, not {info['epoch']}")
    for number, record in enumerate(info["history"], 1):
        _check_record(number, record, config, info["seconds"])
    require_origin(info["origin"])


def _check_record(number, record, config, seconds):
    """Raise `ValueError` unless `record` is that of epoch `number` in the history of a run of `seconds`."""
    validation = {"validation_loss": LARGEST, "validation_accuracy": 1}
    limits = {"train_loss": LARGEST, "train_accuracy": 1, "seconds": seconds}
    complete = isinstance(record, dict) and {*limits, *validation} <= set(record)
    if not complete or not _is_integer(record.get("epoch"), number):
        raise ValueError(f"the record of epoch {number} in the history is missing or incomplete")
    if config.validation:
        limits |= validation
    elif any(record[name] is not None for name in validation):
        raise ValueError(f"epoch {number} has a validation, but the run has no validation images")
    # Version 0.1 did not record the learning rates.
    limits |= {name: 10 for name in ("first_learning_rate", "last_learning_rate") if name in record}
    for name, limit in limits.items():
        require_number(f"{name} of epoch {number}", record[name], 0, limit)
