"""The main interface: `VisionTransformer`, `train` and `load_pretrained`."""

import copy
import logging
import math
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyvit.backend import Backend, array_module
from tinyvit.checkpoint import load_model, save_model
from tinyvit.checks import as_images, as_labels, require_scalar
from tinyvit.evaluate import Evaluation, evaluate, parallel_logits
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, check_parameters
from tinyvit.ops import softmax_forward
from tinyvit.parameters import Parameters
from tinyvit.pretrained import pretrained_file
from tinyvit.training import RECIPES, Training, TrainingConfig, TrainingStopped
from tinyvit.training.progress import Progress

MOST_PATCHES = 16  # along a side, without a note


@dataclass(frozen=True, eq=False)
class VisionTransformer:
    """A Vision Transformer: its settings and its weights.

    Parameters
    ----------
    config : ViTConfig
        The settings.
    parameters : Parameters
        The weights, on the CPU or on a GPU.

    Raises
    ------
    TypeError
        If an argument is of another class.
    ValueError
        If the parameters do not have the shapes of the model.

    Notes
    -----
    All methods take images on the CPU or on the model's device and return NumPy arrays. Lists are converted. Another
    shape, another dtype, or a float pixel outside 0 to 1 is a `ValueError`. Logits that are not finite are an
    `ArithmeticError`.

    A copy has its own parameters, so training it leaves the original unchanged. A model equals only itself.
    """

    config: ViTConfig
    parameters: Parameters

    def __post_init__(self):
        if not isinstance(self.config, ViTConfig):
            raise TypeError(f"config must be a ViTConfig, not {type(self.config).__name__}")
        check_parameters("parameters", self.parameters, self.config.shapes())

    def __repr__(self):
        c, flat = self.config, self.parameters.flat
        device = "CPU" if array_module(flat) is np else "GPU"
        rows, columns = c.image_shape
        size = f"{rows} x {columns} pixels" + (f" of {c.channels} numbers" if c.channels > 1 else "")
        return (
            f"VisionTransformer({size} to {c.classes} classes: {c.depth} blocks, "
            f"width {c.width}, {c.heads} heads, {flat.size:,} parameters, {flat.dtype} on the {device})"
        )

    def __copy__(self):
        return VisionTransformer(self.config, copy.copy(self.parameters))

    def logits(self, images: npt.ArrayLike, batch_size: int | None = None) -> np.ndarray:
        """Return the logits of images.

        Parameters
        ----------
        images : array_like of shape (B, R, C) or (B, R, C, channels)
            Either uint8, or float in 0 to 1.
        batch_size : int, optional
            Number of images that one thread computes at a time. Default: 128, and 500 on a GPU.

        Returns
        -------
        ndarray of shape (B, classes)
            The logits.
        """
        return parallel_logits(images, self.parameters, self.config, batch_size=batch_size)

    def predict_proba(self, images: npt.ArrayLike) -> np.ndarray:
        """Return the probability of each class.

        Parameters
        ----------
        images : array_like of shape (B, R, C) or (B, R, C, channels)
            Either uint8, or float in 0 to 1.

        Returns
        -------
        ndarray of shape (B, classes)
            Probabilities, float64. Each row sums to 1.
        """
        return softmax_forward(self.logits(images).astype(np.float64))[0]

    def predict(self, images: npt.ArrayLike) -> np.ndarray:
        """Return the most probable class of each image.

        Parameters
        ----------
        images : array_like of shape (B, R, C) or (B, R, C, channels)
            Either uint8, or float in 0 to 1.

        Returns
        -------
        ndarray of shape (B,)
            Classes, integers.
        """
        return self.logits(images).argmax(axis=1)

    def evaluate(self, images: npt.ArrayLike, labels: npt.ArrayLike, **options: Any) -> Evaluation:
        """Classify images and compare the predictions with the labels.

        Parameters
        ----------
        images : array_like of shape (B, R, C) or (B, R, C, channels)
            Either uint8, or float in 0 to 1.
        labels : array_like of shape (B,)
            The true classes, integers.
        **options
            The options of `tinyvit.evaluate.evaluate`: `batch_size`, `workers` and `progress`.

        Returns
        -------
        Evaluation
            The predictions, the accuracy and the loss.

        Raises
        ------
        ValueError
            If images or labels do not fit the model.
        ArithmeticError
            If a logit is not finite.
        """
        return evaluate(images, labels, self.parameters, self.config, **options)

    def save(self, path: str | PathLike[str], info: dict[str, Any] | None = None) -> None:
        """Write the model to a safetensors file.

        Parameters
        ----------
        path : path-like
            The file to write. It is replaced as a whole.
        info : dict, optional
            Further metadata that JSON can represent.
        """
        save_model(path, self.parameters, self.config, info)

    @classmethod
    def load(cls, path: str | PathLike[str], backend: Backend | None = None) -> "VisionTransformer":
        """Return the model of a file that `save` wrote.

        Parameters
        ----------
        path : path-like
            The file to read.
        backend : Backend, optional
            Where the weights go. Default: the CPU.

        Returns
        -------
        VisionTransformer
            The model.

        Raises
        ------
        CheckpointError
            If the file is missing or damaged, or its arrays do not fit its settings.
        """
        parameters, config = load_model(path, backend)
        return cls(config, parameters)


def load_pretrained(name: str = "mnist", backend: Backend | None = None) -> VisionTransformer:
    """Return the trained model that comes with the package.

    Parameters
    ----------
    name : {"mnist"}, optional
        "mnist" classifies handwritten digits in images of 28 x 28 pixels, white on black, as in MNIST.
        `tinyvit.pretrained.pictures` prepares other pictures.
    backend : Backend, optional
        Where the weights go. Default: the CPU.

    Returns
    -------
    VisionTransformer
        The model.

    Raises
    ------
    ValueError
        If the name is unknown.
    CheckpointError
        If the file is missing or damaged.
    """
    if name != "mnist":
        raise ValueError(f"model {name!r} is unknown: give 'mnist'")
    with pretrained_file() as path:
        return VisionTransformer.load(path, backend)


def train(
    images: npt.ArrayLike,
    labels: npt.ArrayLike,
    epochs: int = 1,
    *,
    recipe: str | TrainingConfig = "tuned",
    model: dict[str, Any] | None = None,
    device: str = "cpu",
    workers: int | None = None,
    seed: int = 0,
    verbose: int = 1,
) -> VisionTransformer:
    """Train a Vision Transformer on images and labels, and return it.

    The image size, the number of channels and of classes, the mean and deviation of the pixels and a patch size for a
    grid of at least four by four patches are derived from the data. The last twelfth of the images, at most 5,000, is
    for validation.

    Parameters
    ----------
    images : array_like of shape (N, R, C) or (N, R, C, channels)
        Grey or colour images, uint8.
    labels : array_like of shape (N,)
        Classes, integers from 0.
    epochs : int, optional
        Number of passes over the training images.
    recipe : {"tuned", "note"} or TrainingConfig, optional
        The settings of the training. Epochs and seed of a `TrainingConfig` are replaced.
    model : dict, optional
        Settings of `ViTConfig` to change.
    device : {"cpu", "gpu", "auto"}, optional
        Where to compute.
    workers : int, optional
        Number of processes. Default: one per core, at most one per 8 images of a batch.
    seed : int, optional
        Seed of the weights, the order of the images and the augmentation.
    verbose : int, optional
        With 0 nothing is printed.

    Returns
    -------
    VisionTransformer
        The trained model.

    Raises
    ------
    ValueError
        If images, labels and settings do not fit each other.
    TrainingDiverged
        If the loss or a weight becomes NaN or infinite.
    """
    images = as_images(images, bytes_only=True)
    labels = as_labels(labels, len(images))
    if workers is not None:
        require_scalar("workers", workers, minimum=1, maximum=math.inf, integer=True)
        workers = int(workers)
    settings = RECIPES.get(recipe) if isinstance(recipe, str) else recipe
    if settings is None:
        names = ", ".join(map(repr, RECIPES))
        raise ValueError(f"recipe {recipe!r} is unknown: give {names} or a TrainingConfig")
    config = replace(settings, epochs=epochs, seed=seed)
    config = replace(config, validation=min(config.validation, len(images) // 12))
    run = Training(
        fitting_config(images, labels, **(model or {})),
        config,
        images,
        labels,
        get_backend(device),
        workers=workers,
    )
    try:
        with Progress(run, silent=not verbose) as progress:
            run.run(on_step=progress.on_step, on_epoch=progress.on_epoch)
    except TrainingStopped as error:  # Ctrl-C or SIGTERM stopped the training between two steps
        raise KeyboardInterrupt from error
    return VisionTransformer(run.model_config, run.state.weights)


def fitting_config(images: npt.ArrayLike, labels: npt.ArrayLike, **settings: Any) -> ViTConfig:
    """Return the settings of a model that fits images and labels.

    Parameters
    ----------
    images : array_like of shape (N, R, C) or (N, R, C, channels)
        Grey or colour images, uint8.
    labels : array_like of shape (N,)
        Classes, integers from 0.
    **settings
        Settings of `ViTConfig` that replace the derived ones.

    Returns
    -------
    ViTConfig
        The settings.

    Raises
    ------
    ValueError
        If images or labels have another shape or type.
    """
    images = as_images(images, bytes_only=True)
    labels = as_labels(labels, len(images))
    size, channels = images.shape[1:3], math.prod(images.shape[3:])
    by_channel = np.moveaxis(images.reshape(*images.shape[:3], channels), 3, 0)
    means, deviations = zip(*map(mean_and_deviation, by_channel), strict=True)
    fitting: dict[str, Any] = {
        "image_size": size,
        "patch_size": tuple(map(fitting_patch_size, size)),
        "channels": channels,
        "classes": int(labels.max()) + 1,
        "pixel_mean": means,
        "pixel_deviation": deviations,
    }
    config = ViTConfig(**fitting | settings)
    if "patch_size" not in settings and max(config.grid) > MOST_PATCHES:
        rows, columns = config.patch_shape
        text = "note: patches of %d x %d pixels make %d tokens per image, which is slow: pad or resize the images"
        logging.getLogger("tinyvit").warning(text, rows, columns, config.tokens)
    return config


def mean_and_deviation(images: np.ndarray) -> tuple[float, float]:
    """Return the mean and the standard deviation of pixels, on the scale from 0 to 1 with four decimals.

    Parameters
    ----------
    images : ndarray of shape (N, R, C)
        One channel of images, uint8.

    Returns
    -------
    mean : float
        Mean of the pixels.
    deviation : float
        Standard deviation of the pixels, at least 0.0001.
    """
    blocks = np.array_split(images, -(-len(images) // 1000))  # a copy of all images may be large
    counts = sum(np.bincount(block.ravel(), minlength=256) for block in blocks)
    levels = np.arange(256) / 255
    mean = counts @ levels / images.size
    deviation = math.sqrt(counts @ (levels - mean) ** 2 / images.size)
    return round(float(mean), 4), max(round(deviation, 4), 1e-4)


def fitting_patch_size(side: int) -> int:
    """Return a patch size for a side of an image: its largest divisor that is at most a quarter of it.

    Parameters
    ----------
    side : int
        Rows or columns of the image.

    Returns
    -------
    int
        Rows or columns of a patch, 1 for a side below 4.
    """
    return max(size for size in range(1, max(1, side // 4) + 1) if side % size == 0)
