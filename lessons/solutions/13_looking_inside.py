"""Solutions of lesson 13: `python lessons/solutions/13_looking_inside.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson

from tinyvit.ops import patches_backward, patches_forward, softmax_backward, softmax_forward


def exercise_1(probabilities, labels):
    best_two = np.argsort(-probabilities, axis=1)[:, :2]  # (N, 2)
    return np.mean((best_two == labels[:, None]).any(axis=1))


def wrong_1(probabilities, labels):
    """The two least probable: argsort begins with the smallest."""
    return np.mean((np.argsort(probabilities, axis=1)[:, :2] == labels[:, None]).any(axis=1))


def exercise_2(positions):
    unit = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    return unit @ unit.T


def wrong_2(positions):
    """Products in place of cosines: long vectors look alike."""
    return positions @ positions.T


def wrong_2b(positions):
    """The norm of the whole array in place of each row's."""
    unit = positions / np.linalg.norm(positions)
    return unit @ unit.T


def exercise_3(logits, labels):
    p, cache = softmax_forward(logits)
    gap = p - np.eye(logits.shape[1])[labels]
    # score = mean over n of sum over c of (p - t)**2, so
    dp = 2 * gap / len(labels)
    return (gap**2).sum(axis=1).mean(), softmax_backward(dp, cache)


def wrong_3(logits, labels):
    """The softmax is forgotten: this is the gradient by the probabilities."""
    gap = softmax_forward(logits)[0] - np.eye(logits.shape[1])[labels]
    return (gap**2).sum(axis=1).mean(), 2 * gap / len(labels)


def exercise_4(probability, image, patch_size):
    rows, columns = (size // patch_size for size in image.shape)
    count = rows * columns
    patches = np.repeat(patches_forward(image[None], patch_size), count, axis=0)  # (N copies, N patches, P * P)
    patches[np.arange(count), np.arange(count)] = 0  # in copy n, patch n
    blank = patches_backward(patches, (count, *image.shape), patch_size)
    return (probability(image[None]) - probability(blank)).reshape(rows, columns)


def wrong_4(probability, image, patch_size):
    """All but the patch is blank: that is what it says alone, not what is missing without it."""
    rows, columns = (size // patch_size for size in image.shape)
    count = rows * columns
    alone = np.zeros((count, count, patch_size**2), image.dtype)
    alone[np.arange(count), np.arange(count)] = patches_forward(image[None], patch_size)[0]
    alone = patches_backward(alone, (count, *image.shape), patch_size)
    return (probability(image[None]) - probability(alone)).reshape(rows, columns)


if __name__ == "__main__":
    Lesson("13_looking_inside").check_all(globals())
