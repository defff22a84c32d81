"""The settings of a training run, the recipes, and what follows from them for every step of an epoch."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np

from tinyvit.checks import require_number
from tinyvit.data.augment import Augmentation
from tinyvit.optim import constant, warmup_cosine

AVERAGE_EVERY = 4  # steps, and at an epoch's end; an average over hundreds of steps does not need every one


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run; the defaults are the technical note's, with no augmentation.

    Raises `ValueError` on a value out of range, naming it and what would do.
    """

    epochs: int = 10
    batch_size: int = 64  # images
    learning_rate: float = 3e-4  # per step; the peak, if the schedule has one
    schedule: str = "constant"  # or "cosine": a linear warm-up, then half a cosine down to 0
    warmup_steps: int = 0  # and at most a tenth of all steps
    weight_decay: float = 0.0  # decoupled, on matrices only; per step and unit of learning rate
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 0.0  # largest norm of the gradient; 0 for no limit
    smoothing: float = 0.0  # of the labels
    average: float = 0.0  # decay of a moving average of the weights, taken every fourth step; 0 for none
    validation: int = 5000  # images at the end of the training set that are held back, never trained on
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self):
        integers = {"epochs": 1, "batch_size": 1, "warmup_steps": 0, "validation": 0, "seed": 0}
        for name, least in integers.items():
            require_number(name, getattr(self, name), least, 2**32, integer=True, below=True)
        limits = {"learning_rate": 10, "weight_decay": 10, "clip": math.inf}
        limits |= dict.fromkeys(("beta1", "beta2", "smoothing", "average"), 1)
        for name, limit in limits.items():
            require_number(name, getattr(self, name), 0, limit, below=True)
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', not {self.schedule!r}")

    def learning_rates(self, epoch, steps):
        """Return the learning rate of every step of an epoch of `steps` steps, a list of numbers."""
        total = self.epochs * steps
        schedule = warmup_cosine if self.schedule == "cosine" else constant
        warmup_steps = min(self.warmup_steps, total // 10)
        first = epoch * steps
        return [schedule(first + i, total, self.learning_rate, warmup_steps) for i in range(steps)]

    def averages_after(self, epoch, steps):
        """Return after which steps of an epoch the average takes in the weights: (steps,) bool."""
        count = epoch * steps + np.arange(1, steps + 1)
        return (self.average > 0) & ((count % AVERAGE_EVERY == 0) | (count == (epoch + 1) * steps))

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
