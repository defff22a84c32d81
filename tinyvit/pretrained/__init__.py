"""The trained model that comes with the package, its card, and the preparation of pictures for it."""

import importlib.resources
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tinyvit.checkpoint import CheckpointError, load_arrays

WEIGHTS = "mnist.safetensors"  # in this folder, beside its card README.md


@dataclass(frozen=True)
class ModelCard:
    """The origin and the accuracy of a trained model.

    Parameters
    ----------
    command : str
        The command that trained the model.
    data : str
        Name of the data set.
    seed : int
        Seed of the training.
    epochs : int
        Number of epochs.
    parameters : int
        Number of weights.
    validation_accuracy : float
        Share of correct predictions on the validation images, 0 to 1.
    validation_images : int
        Number of images at the end of the training set that were for validation only.
    test_accuracy : float
        Share of correct predictions on the test images, 0 to 1.
    test_loss : float
        Mean cross-entropy on the test images in nats, without label smoothing.
    test_images : int
        Number of test images.
    misread : list of int
        Indices of the misclassified test images, the most confident first.
    barely_read : list of int
        Indices of the correctly classified test images with the smallest margins, the smallest first.
    versions : dict of str
        Versions and processor of the training.
    """

    command: str
    data: str
    seed: int
    epochs: int
    parameters: int
    validation_accuracy: float
    validation_images: int
    test_accuracy: float
    test_loss: float
    test_images: int
    misread: list[int]
    barely_read: list[int]
    versions: dict[str, str]


def pretrained_card() -> ModelCard:
    """Return the card of the trained model. `tinyvit/pretrained/README.md` gives the same facts in words.

    Returns
    -------
    ModelCard
        The card, from the metadata of the file with the weights.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged, or has no card.
    """
    with pretrained_file() as path:
        _, info = load_arrays(path)
        try:
            return ModelCard(**info["card"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: has no card of a trained model ({error}): reinstall tinyvit") from error


def pretrained_file() -> AbstractContextManager[Path]:
    """Return a context manager that provides the path of the file with the weights.

    If the package is in a zip archive, the file is unpacked for the duration of the context.

    Returns
    -------
    context manager
        Its value is a `pathlib.Path`.
    """
    return importlib.resources.as_file(importlib.resources.files("tinyvit.pretrained") / WEIGHTS)
