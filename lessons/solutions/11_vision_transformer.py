"""Solutions of lesson 11: `python lessons/solutions/11_vision_transformer.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(image_size, patch_size, width, depth, mlp_width, classes):
    patches = (image_size // patch_size) ** 2
    embedding = (patch_size**2 + 1) * width + width + (patches + 1) * width  # with class token and positions
    norm = 2 * width
    attention = (width + 1) * 3 * width + (width + 1) * width
    mlp = (width + 1) * mlp_width + (mlp_width + 1) * width
    return embedding + depth * (2 * norm + attention + mlp) + norm + (width + 1) * classes


def wrong_1(image_size, patch_size, width, depth, mlp_width, classes):
    """The class token has a position of its own, which is forgotten here."""
    return exercise_1(image_size, patch_size, width, depth, mlp_width, classes) - width


def exercise_2(dy, tokens):
    batch, width = dy.shape
    dz = np.zeros((batch, tokens, width))
    # y[d] = sum over t >= 1 of z[t, d] / (T - 1), so every patch's token gets the same share, and token 0 nothing
    dz[:, 1:] = dy[:, None] / (tokens - 1)
    return dz


def wrong_2(dy, tokens):
    """The class token gets a share, though the mean leaves it out."""
    return np.repeat(dy[:, None] / tokens, tokens, axis=1)


def wrong_2b(dy, tokens):
    """A sum for a mean: the division is forgotten."""
    return exercise_2(dy, tokens) * (tokens - 1)


def exercise_3(counts, losses, gradients):
    shares = counts / counts.sum()  # a shard counts as much as it has images
    return shares @ losses, shares @ gradients


def wrong_3(counts, losses, gradients):
    """The mean of the means: right only if all shards are of one size."""
    return losses.mean(), gradients.mean(axis=0)


def exercise_4(f, parameters, gradients):
    rng, step = np.random.default_rng(0), 1e-5
    liars = []
    for name, array in parameters.items():
        signs = rng.choice([-1.0, 1.0], (3, *array.shape))  # three directions: one may cancel by luck
        for u in signs:
            above, below = (f(parameters | {name: array + s * step * u}) for s in (1, -1))
            slope = (above - below) / (2 * step)
            size = max(np.linalg.norm(gradients[name]), abs(slope), 1e-4)  # zero and zero agree
            if abs(slope - (gradients[name] * u).sum()) > 1e-4 * size:
                liars.append(name)
                break
    return ", ".join(sorted(liars))


def wrong_4(f, parameters, gradients):
    """Along a direction of ones: where the gradient's errors add up to little, nothing is seen; and the sizes are
    compared without their signs.
    """
    liars = []
    for name, array in parameters.items():
        slope = (f(parameters | {name: array + 1e-5}) - f(parameters | {name: array - 1e-5})) / 2e-5
        if abs(abs(slope) - abs(gradients[name].sum())) > 1e-4 * max(abs(slope), 1e-4):
            liars.append(name)
    return ", ".join(sorted(liars))


if __name__ == "__main__":
    Lesson("11_vision_transformer").check_all(globals())
