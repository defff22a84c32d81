"""The trained model that comes with the package, its card, and how a picture becomes an image as MNIST has them."""

import importlib.resources
from dataclasses import dataclass

from tinyvit.checkpoint import CheckpointError, load_arrays

WEIGHTS = "mnist.safetensors"  # in this folder, beside README.md, its card


@dataclass(frozen=True)
class ModelCard:
    """What is known of the trained model: how it came about and how well it reads. Accuracies are 0 to 1."""

    command: str  # that trained it
    data: str
    seed: int
    epochs: int
    parameters: int
    validation_accuracy: float  # on the last of the training images, which it was not trained on
    validation_images: int
    test_accuracy: float
    test_loss: float  # mean cross-entropy in nats, without label smoothing
    test_images: int
    misread: list  # indices of the test images that it gets wrong, the most confident first
    barely_read: list  # indices of some that it gets right, the nearest to another answer first
    versions: dict  # of what it was trained with


def pretrained_card():
    """Return the `ModelCard` of the trained model; tinyvit/pretrained/README.md says it in words.

    Raises `CheckpointError` if the file is missing or not whole.
    """
    with pretrained_file() as path:
        _, info = load_arrays(path)
        try:
            return ModelCard(**info["card"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: has no card of a trained model ({error}): reinstall tinyvit") from error


def pretrained_file():
    """Return a context that gives the path of the weights, unpacked for as long if the package is a zip archive."""
    return importlib.resources.as_file(importlib.resources.files("tinyvit.pretrained") / WEIGHTS)
