"""Training: the settings, one step, the loop, the state of a run, and the worker processes.

Read step.py for one training step and loop.py for the loop that repeats it.
"""

from tinyvit.training.loop import Training, TrainingDiverged, TrainingStopped
from tinyvit.training.settings import NOTE, RECIPES, TUNED, TrainingConfig
from tinyvit.training.state import CHECKPOINT, State, read_checkpoint
from tinyvit.training.workers import ParallelGradient, WorkerError, available_cores
