"""The state of a run, and its checkpoint file."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyvit.backend import LOOPS, array_module
from tinyvit.checkpoint import CheckpointError, load_arrays, save_arrays
from tinyvit.model import ViTConfig, initialise
from tinyvit.optim import Adam, ExponentialMovingAverage, matrices_only
from tinyvit.parameters import Parameters
from tinyvit.training.settings import TrainingConfig

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_FORMAT = 1


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
    history: list = field(default_factory=list)
    origin: dict = field(default_factory=dict)

    def __copy__(self):
        return copy.deepcopy(self)

    def __repr__(self):
        return f"State({self.parameters!r}, {self.epoch} epochs and {self.done} steps)"

    @property
    def weights(self):
        """The weights for validation and for the trained model: the moving average, if the settings have one."""
        return self.parameters if self.average is None else self.parameters.with_flat(self.average.average)

    def arrays(self):
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

    def require_finite(self):
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


def require_finite(name, value):
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


def new_state(model_config, config, backend):
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


def save_state(folder, state, settings, place):
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


def restore_state(path, state, arrays, info, batch_size, images):
    """Copy a checkpoint into a new state of the same settings.

    Parameters
    ----------
    path : path-like
        The file, for messages.
    state : State
        The state to change.
    arrays : dict of ndarray
        The arrays from `read_checkpoint`.
    info : dict
        The metadata from `read_checkpoint`.
    batch_size : int
        Number of images per step.
    images : int
        Number of training images.

    Raises
    ------
    CheckpointError
        If an array does not fit the model, or the place is not between two batches.
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
        If the file is missing or damaged, or is not the checkpoint of a run.
    """
    path = Path(folder) / CHECKPOINT
    arrays, info = load_arrays(path)
    if not isinstance(info, dict) or info.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a run in format {CHECKPOINT_FORMAT}: start a new run")
    info.setdefault("loops", "off")  # checkpoints of version 0.1 have no loops
    kinds = {
        **dict.fromkeys(("model", "training", "origin"), dict),
        **dict.fromkeys(("workers", "data", "adam_steps", "average_steps", "epoch", "place", "correct"), int),
        **dict.fromkeys(("loss_sum", "seconds"), float),
        "history": list,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(info.get(name), kind)]
    wrong += ["loops"] if info["loops"] not in LOOPS else []
    try:
        ViTConfig(**info["model"])
        config = TrainingConfig.from_dict(info["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings are not those of a run ({error}): start a new run") from error
    needed = {"parameters", "adam.first_moment", "adam.second_moment"} | ({"average"} if config.average else set())
    wrong += sorted(needed ^ set(arrays))
    if wrong:
        raise CheckpointError(f"{path}: wrong or missing entries: {', '.join(wrong)}: start a new run")
    return arrays, info
