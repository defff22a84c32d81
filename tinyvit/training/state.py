"""The state of a run: all that a step changes, and how a checkpoint keeps it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checkpoint import CheckpointError, load_arrays, save_arrays
from tinyvit.model import ViTConfig, initialise
from tinyvit.optim import Adam, ExponentialMovingAverage, matrices_only
from tinyvit.parameters import Parameters
from tinyvit.training.settings import TrainingConfig

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_FORMAT = 1


@dataclass(eq=False)
class State:
    """The weights, the optimiser and the place that a run has reached. Steps update the first three in place."""

    parameters: Parameters
    adam: Adam
    average: ExponentialMovingAverage | None
    epoch: int = 0  # finished epochs
    done: int = 0  # finished steps of the epoch under way,
    loss_sum: float = 0.0  # the sum of its losses, at the last checkpoint: `totals` of the step is current
    correct: int = 0  # and how many images it classified correctly
    seconds: float = 0.0  # spent in steps, over all sittings
    history: list = field(default_factory=list)  # one dict per finished epoch
    origin: dict = field(default_factory=dict)  # where recipe and data came from, as JSON

    def __repr__(self):
        return f"State({self.parameters!r}, {self.epoch} epochs and {self.done} steps)"

    @property
    def weights(self):
        """The `Parameters` to use the model with: averaged, if the recipe averages."""
        return self.parameters if self.average is None else self.parameters.with_flat(self.average.average)

    def arrays(self):
        """Return the arrays of a checkpoint by their names there."""
        arrays = {
            "parameters": self.parameters.flat,
            "adam.first_moment": self.adam.first_moment,
            "adam.second_moment": self.adam.second_moment,
        }
        return arrays if self.average is None else {**arrays, "average": self.average.average}

    def require_finite(self):
        """Raise `ArithmeticError` unless the loss so far, every weight and every moment are finite."""
        require_finite("loss", self.loss_sum)
        with np.errstate(over="ignore", invalid="ignore"):
            require_finite("sum of all weights", self.parameters.flat.sum())
            require_finite("sum of Adam's first moments", self.adam.first_moment.sum())
            require_finite("sum of Adam's second moments", self.adam.second_moment.sum())


def require_finite(what, value):
    """Raise `ArithmeticError` unless `value`, a number or a 0-d array, is finite."""
    if not math.isfinite(value):
        raise ArithmeticError(f"the {what} became {float(value)}")


def new_state(model_config, config, backend):
    """Return the `State` that a run begins with, its arrays on the `backend`'s device."""
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


def save_state(folder, state, settings, place):
    """Write `folder`/checkpoint.safetensors.

    settings: what else the file says of the run: "model", "training", "workers" and "data"; place: how many images of
    the epoch under way are used.
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


def restore_state(path, state, arrays, info, batch_size, images):
    """Put what `read_checkpoint` gave into a new `State` of the same settings.

    Raises `CheckpointError` if an array does not fit the model, or the place does not fit the data.
    """
    for name, array in arrays.items():
        if array.shape != state.parameters.flat.shape or array.dtype != state.parameters.flat.dtype:
            raise CheckpointError(f"{path}: {name} does not fit the model: {array.dtype} {array.shape}")
    place = info["place"]
    if not 0 <= place <= images:
        raise CheckpointError(f"{path}: place {place} is outside an epoch of {images} images")
    if place % batch_size and place != images:
        raise CheckpointError(f"{path}: place {place} is not between two batches of {batch_size}")
    for name, array in state.arrays().items():
        array[...] = array_module(array).asarray(arrays[name])
    state.adam.steps = info["adam_steps"]
    if state.average is not None:
        state.average.steps = info["average_steps"]
    state.done = -(-place // batch_size)
    for name in ("epoch", "loss_sum", "correct", "seconds", "history", "origin"):
        setattr(state, name, info[name])


def read_checkpoint(folder):
    """Return the arrays and the info (a dict) of `folder`/checkpoint.safetensors.

    Raises `CheckpointError` if there is none, it is not whole, or it is not that of a run.
    """
    path = Path(folder) / CHECKPOINT
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
