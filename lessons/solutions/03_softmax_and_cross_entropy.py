"""Solutions of lesson 03: `python lessons/solutions/03_softmax_and_cross_entropy.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(z):
    largest = z.max(axis=-1, keepdims=True)  # (..., 1)
    return largest[..., 0] + np.log(np.exp(z - largest).sum(axis=-1))


def wrong_1(z):
    """As the equation says it: right for small scores, infinite for large ones."""
    return np.log(np.exp(z).sum(axis=-1))


def wrong_1b(z):
    """One maximum for all rows: a row far below it has nothing but zeros to add up."""
    return z.max() + np.log(np.exp(z - z.max()).sum(axis=-1))


def exercise_2(z, y):
    # -log p = LSE(z, 0) - z and -log (1 - p) = LSE(z, 0), so the loss is LSE(z, 0) - y z
    loss = np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))) - y * z
    p = 0.5 * (1 + np.tanh(0.5 * z))  # 1 / (1 + exp(-z)), without the exponential that overflows
    return loss, p - y


def wrong_2(z, y):
    """The formulas as they stand: where p is 0, the logarithm is infinite."""
    p = 1 / (1 + np.exp(-z))
    return -y * np.log(p) - (1 - y) * np.log(1 - p), p - y


def wrong_2b(z, y):
    """The slope of the probability is left in: that of a squared error, which vanishes when sure and wrong."""
    loss, slope = exercise_2(z, y)
    p = slope + y
    return loss, slope * p * (1 - p)


def exercise_3(z, labels, s):
    count, classes = z.shape
    target = (1 - s) * np.eye(classes)[labels] + s / classes  # (N, C), rows still add up to one
    largest = z.max(axis=1, keepdims=True)
    logs = z - largest - np.log(np.exp(z - largest).sum(axis=1, keepdims=True))
    return -(target * logs).sum() / count, (np.exp(logs) - target) / count


def wrong_3(z, labels, s):
    """The share goes to the C - 1 other classes only: then the label keeps less than it should."""
    count, classes = z.shape
    target = np.full(z.shape, s / (classes - 1))
    target[np.arange(count), labels] = 1 - s
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return -(target * logs).sum() / count, (np.exp(logs) - target) / count


def exercise_4(dout, z):
    # a[n, c] = z[n, c] - LSE(z[n]), so z[n, i] acts on a[n, i] directly, and on every a[n, c] with the slope -p[n, i]
    shifted = np.exp(z - z.max(axis=1, keepdims=True))
    p = shifted / shifted.sum(axis=1, keepdims=True)
    return dout - p * dout.sum(axis=1, keepdims=True)  # dout = -y / N gives (p - y) / N


def wrong_4(dout, z):
    """As if dout added up to one: right behind a one-hot target alone."""
    shifted = np.exp(z - z.max(axis=1, keepdims=True))
    return dout - shifted / shifted.sum(axis=1, keepdims=True)


def wrong_4b(dout, z):
    """Each output by itself: the slopes of the other outputs are forgotten."""
    shifted = np.exp(z - z.max(axis=1, keepdims=True))
    return dout * (1 - shifted / shifted.sum(axis=1, keepdims=True))


if __name__ == "__main__":
    Lesson("03_softmax_and_cross_entropy").check_all(globals())
