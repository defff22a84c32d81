"""Solutions of lesson 01: `python lessons/solutions/01_pixels_and_labels.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(place):
    image, within = divmod(place - 16, 28 * 28)
    row, column = divmod(within, 28)
    return image, row, column


def wrong_1(place):
    """The header is forgotten: every pixel is found 16 columns too far to the right."""
    image, within = divmod(place, 28 * 28)
    return image, within // 28, within % 28


def exercise_2(image, other):
    return np.mean(np.abs(image.astype(np.float64) - other))


def wrong_2(image, other):
    """Differences of bytes wrap around: 200 - 250 is 206."""
    return np.mean(np.abs(image - other))


def exercise_3(labels, classes):
    return np.eye(classes)[labels]  # row l of the identity has its one in column l


def wrong_3(labels, classes):
    """Whole numbers instead of float64: a later product with them would be exact, and slow."""
    return np.eye(classes, dtype=np.int64)[labels]


def exercise_4(train_images, train_labels, test_images):
    classes = int(train_labels.max()) + 1
    x = test_images.reshape(len(test_images), -1).astype(np.float64)  # (M, 784)
    means = np.stack([train_images[train_labels == label].mean(axis=0).ravel() for label in range(classes)])
    distances = (means**2).sum(axis=1) - 2 * x @ means.T  # (M, classes), less |x|^2, which all have in common
    return distances.argmin(axis=1)


def wrong_4(train_images, train_labels, test_images):
    """The largest product instead of the smallest distance: whatever is bright wins, as |m|^2 is left out."""
    classes = int(train_labels.max()) + 1
    x = test_images.reshape(len(test_images), -1).astype(np.float64)
    means = np.stack([train_images[train_labels == label].mean(axis=0).ravel() for label in range(classes)])
    return (x @ means.T).argmax(axis=1)


if __name__ == "__main__":
    Lesson("01_pixels_and_labels").check_all(globals())
