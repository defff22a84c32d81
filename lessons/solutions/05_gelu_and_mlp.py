"""Solutions of lesson 05: `python lessons/solutions/05_gelu_and_mlp.py` checks them all."""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson

from tinyvit.ops import gelu_backward, gelu_forward


def exercise_1(dout, x):
    slope = np.where(x > 0, 1.0, 0.1)
    return x * slope, dout * slope


def wrong_1(dout, x):
    """The slope is taken where the gradient is positive, not where the input is."""
    return x * np.where(x > 0, 1.0, 0.1), dout * np.where(dout > 0, 1.0, 0.1)


def exercise_2(dout, x):
    sigmoid = 1 / (1 + np.exp(-x))
    # sigmoid' = exp(-x) / (1 + exp(-x))^2 = sigmoid (1 - sigmoid), so
    return x * sigmoid, dout * (sigmoid + x * sigmoid * (1 - sigmoid))


def wrong_2(dout, x):
    """Half of the product rule: the x in front is held fixed."""
    sigmoid = 1 / (1 + np.exp(-x))
    return x * sigmoid, dout * x * sigmoid * (1 - sigmoid)


def wrong_2b(dout, x):
    """The other half: the gate is held fixed."""
    sigmoid = 1 / (1 + np.exp(-x))
    return x * sigmoid, dout * sigmoid


def exercise_3(x):
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    # (cdf + x density)' = density + density + x (-x density), which is zero at x^2 = 2
    return (2 - x**2) * density, math.sqrt(2)


def wrong_3(x):
    """The inner derivative of the bell curve is lost: one term of x density has no slope of its own."""
    return 2 * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi), math.sqrt(2)


def exercise_4(dout, x, u, w):
    gate, cache = gelu_forward(x @ u)  # (N, F)
    value = x @ w  # (N, F)
    # y = gate * value, so
    dvalue = dout * gate
    dgate = gelu_backward(dout * value, cache)  # by x @ u
    return dvalue @ w.T + dgate @ u.T, x.T @ dgate, x.T @ dvalue  # two ways to x, which add up


def wrong_4(dout, x, u, w):
    """The way through the gate is forgotten in dx."""
    gate, cache = gelu_forward(x @ u)
    dgate = gelu_backward(dout * (x @ w), cache)
    return (dout * gate) @ w.T, x.T @ dgate, x.T @ (dout * gate)


def wrong_4b(dout, x, u, w):
    """Gate and value are multiplied by their own numbers, not by each other's."""
    gate, cache = gelu_forward(x @ u)
    dvalue, dgate = dout * (x @ w), gelu_backward(dout * gate, cache)
    return dvalue @ w.T + dgate @ u.T, x.T @ dgate, x.T @ dvalue


if __name__ == "__main__":
    Lesson("05_gelu_and_mlp").check_all(globals())
