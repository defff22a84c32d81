"""What a user holds: `VisionTransformer`, a model to use, and `train`, which makes one of images and labels."""

import math
from dataclasses import dataclass, replace

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checkpoint import load_model, save_model
from tinyvit.evaluate import evaluate
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, vit_logits
from tinyvit.ops import softmax_forward
from tinyvit.parameters import Parameters
from tinyvit.pretrained import pretrained_file
from tinyvit.training import RECIPES, Training, TrainingStopped
from tinyvit.training.progress import Progress


@dataclass(frozen=True, eq=False)
class VisionTransformer:
    """A model to use: its settings and its weights.

    Images are (B, R, C), uint8 (0 to 255) or float (0 to 1), of the size that `config` says. They may lie on the
    CPU or on the model's device; results are NumPy arrays.
    """

    config: ViTConfig
    parameters: Parameters

    def __repr__(self):
        c, flat = self.config, self.parameters.flat
        device = "CPU" if array_module(flat) is np else "GPU"
        return (
            f"VisionTransformer({c.image_size} x {c.image_size} pixels to {c.classes} classes: {c.depth} blocks, "
            f"width {c.width}, {c.heads} heads, {flat.size:,} parameters, {flat.dtype} on the {device})"
        )

    def logits(self, images, batch_size=None):
        """Return logits (B, classes); batch_size images are computed at a time, by default as many as suits."""
        return vit_logits(images, self.parameters, self.config, batch_size)

    def predict_proba(self, images):
        """Return the probability of every class, (B, classes)."""
        return softmax_forward(self.logits(images).astype(np.float64))[0]

    def predict(self, images):
        """Return the most probable class of every image, (B,) integers."""
        return self.logits(images).argmax(axis=1)

    def evaluate(self, images, labels, **options):
        """Return the `Evaluation` of the model on `images` and their labels (B,), integers.

        options: as `tinyvit.evaluate.evaluate` takes them: batch_size, workers, progress. Raises `ValueError` if
        images or labels do not fit, and `ArithmeticError` if a logit is not finite.
        """
        return evaluate(images, labels, self.parameters, self.config, **options)

    def save(self, path, info=None):
        """Write the model to a safetensors file; info: what else the file should say, a JSON dict."""
        save_model(path, self.parameters, self.config, info)

    @classmethod
    def load(cls, path, backend=None):
        """Return the model of a file that `save` wrote, on the `backend`'s device or the CPU.

        Raises `CheckpointError` if the file is not whole, or its arrays are not those of its settings.
        """
        parameters, config = load_model(path, backend)
        return cls(config, parameters)


def load_pretrained(name="mnist", backend=None):
    """Return the trained `VisionTransformer` that comes with the package, on the `backend`'s device or the CPU.

    name: "mnist", a model of handwritten digits: it reads uint8 images (B, 28, 28) as MNIST has them, white ink on
    black; `tinyvit.pretrained.pictures` prepares others. Raises `ValueError` on another name, and `CheckpointError`
    if the file is missing or not whole.
    """
    if name != "mnist":
        raise ValueError(f"there is no model {name!r} in the package: give 'mnist'")
    with pretrained_file() as path:
        return VisionTransformer.load(path, backend)


def train(images, labels, epochs=1, *, recipe="tuned", model=None, device="cpu", workers=None, seed=0, verbose=1):
    """Train a Vision Transformer on images and labels, and return it.

    images: (N, S, S) uint8; labels: (N,) integers from 0; epochs: passes over the images; recipe: the name of one of
    `tinyvit.training.RECIPES`, or a `TrainingConfig`, whose epochs and seed are replaced; model: settings of
    `ViTConfig` to change, a dict; device: "cpu", "gpu" or "auto"; workers: processes, by default one per core;
    verbose: 0 prints nothing.

    What the data decides follows from it: image size, classes, patch size (for a grid of about four by four),
    mean and deviation of the pixels, and how many images are held back to validate (a twelfth, at most 5,000).
    Raises `ValueError` if images, labels and settings do not fit, and `TrainingDiverged` if the loss is not finite.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    settings = RECIPES.get(recipe) if isinstance(recipe, str) else recipe
    if settings is None:
        names = ", ".join(map(repr, RECIPES))
        raise ValueError(f"there is no recipe {recipe!r}: give {names} or a TrainingConfig")
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
    except TrainingStopped as error:  # by Ctrl-C or SIGTERM, between two steps
        raise KeyboardInterrupt from error
    return VisionTransformer(run.model_config, run.state.weights)


def fitting_config(images, labels, **settings):
    """Return the `ViTConfig` that fits images (N, S, S) uint8 and labels (N,), with these settings changed.

    Raises `ValueError` if images or labels are of another kind.
    """
    if images.ndim != 3 or images.shape[1] != images.shape[2] or not images.size or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 of shape (N, S, S), not {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{len(images)} images need as many labels, integers from 0, not {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels are integers from 0, and one is {labels.min()}")
    side = images.shape[1]
    blocks = np.array_split(images, -(-len(images) // 1000))  # of so many images, as a copy of all may be large
    counts = sum(np.bincount(block.ravel(), minlength=256) for block in blocks)
    levels = np.arange(256) / 255
    mean = counts @ levels / images.size
    deviation = math.sqrt(counts @ (levels - mean) ** 2 / images.size)
    return ViTConfig(
        **{
            "image_size": side,
            "patch_size": fitting_patch_size(side),
            "classes": int(labels.max()) + 1,
            "pixel_mean": round(float(mean), 4),
            "pixel_deviation": max(round(deviation, 4), 1e-4),
        }
        | settings
    )


def fitting_patch_size(side):
    """Return the patch size that cuts an image of `side` pixels into a grid as near to four by four as possible."""
    fitting = [size for size in range(1, side + 1) if side % size == 0]
    return min(fitting, key=lambda size: abs(math.log(side / size / 4)))
