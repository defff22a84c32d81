"""Solutions of lesson 06: `python lessons/solutions/06_layer_norm.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson

from tinyvit.ops import layer_norm_backward, layer_norm_forward

EPSILON = 1e-6


def exercise_1(dout):
    # y[j] = x[j] - mean, and x[i] is in the mean of every j with 1 / D
    return dout - dout.mean(axis=1, keepdims=True)


def wrong_1(dout):
    """The mean is held fixed."""
    return dout.copy()


def wrong_1b(dout):
    """The mean of the columns: a sum over the batch has no place here."""
    return dout - dout.mean(axis=0, keepdims=True)


def exercise_2(gain, bias, w, b):
    # sum_i (x[i] gain[i] + bias[i]) w[i, o] + b[o]
    return gain[:, None] * w, bias @ w + b


def wrong_2(gain, bias, w, b):
    """The biases are added as they are: that of the norm has yet to go through the weight."""
    return gain[:, None] * w, b + bias.sum()


def exercise_3(dout, x, w):
    inverse = 1 / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)  # (N, 1)
    normalised = x * inverse
    g = dout * w
    # two paths: directly, and through the root, whose derivative by x[i] is normalised[i] / D
    dx = (g - normalised * (g * normalised).mean(axis=1, keepdims=True)) * inverse
    return dx, (dout * normalised).sum(axis=0)


def wrong_3(dout, x, w):
    """All three paths of layer norm: but there is no mean here."""
    inverse = 1 / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)
    normalised = x * inverse
    g = dout * w
    dx = g - g.mean(axis=1, keepdims=True) - normalised * (g * normalised).mean(axis=1, keepdims=True)
    return dx * inverse, (dout * normalised).sum(axis=0)


def wrong_3b(dout, x, w):
    """The gain is left out of the path through the root."""
    inverse = 1 / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)
    normalised = x * inverse
    dx = (dout * w - normalised * (dout * normalised).mean(axis=1, keepdims=True)) * inverse
    return dx, (dout * normalised).sum(axis=0)


def exercise_4(dout, x, w, groups):
    # each group of each row is a vector of its own, to be normalised with gain 1 and bias 0; then come gain and bias
    width = x.shape[1] // groups
    normalised, cache = layer_norm_forward(x.reshape(-1, width), np.ones(width), np.zeros(width))
    dx, _, _ = layer_norm_backward((dout * w).reshape(-1, width), cache)
    dw = (dout * normalised.reshape(x.shape)).sum(axis=0)
    return dx.reshape(x.shape), dw, dout.sum(axis=0)


def wrong_4(dout, x, w, groups):
    """Layer norm for all: right for one group only."""
    return layer_norm_backward(dout, layer_norm_forward(x, w, np.zeros_like(w))[1])


if __name__ == "__main__":
    Lesson("06_layer_norm").check_all(globals())
