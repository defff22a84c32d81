"""The checks of lesson 05's exercises: values from SciPy and Python, slopes from central differences."""

import math

import numpy as np
from scipy.special import erf, expit

from tinyvit.gradcheck import numerical_gradients


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def check_1(answer):
    dout, x = np.array([1.0, 1.0, 2.0]), np.array([3.0, -3.0, -1.0])
    expected = np.array([3.0, -0.3, -0.1]), np.array([1.0, 0.1, 0.2])
    yield "y and dx for x = [3, -3, -1], dout = [1, 1, 2]", answer(dout, x), expected
    dout, x = np.random.default_rng(1).standard_normal((2, 3, 5))
    y = np.maximum(x, 0.1 * x)
    dx = numerical_gradients(lambda x: (np.maximum(x, 0.1 * x), None), [x], dout)[0]
    yield "y and dx for random x and dout (3, 5)", answer(dout, x), (y, dx)


def check_2(answer):
    dout, x = np.array([1.0]), np.array([0.0])
    yield "y and dx at x = 0, dout = 1", answer(dout, x), (np.array([0.0]), np.array([0.5]))
    dout, x = 2 * np.random.default_rng(2).standard_normal((2, 4, 3))
    dx = numerical_gradients(lambda x: (x * expit(x), None), [x], dout)[0]
    yield "y and dx for random x and dout (4, 3)", answer(dout, x), (x * expit(x), dx)


def check_3(answer):
    density = 1 / math.sqrt(2 * math.pi)
    x = np.array([0.0, 1.0])
    expected = np.array([2 * density, density * math.exp(-0.5)]), math.sqrt(2)
    yield "GELU'' at 0 and at 1, and the steepest place", answer(x), expected
    x, h = np.random.default_rng(3).standard_normal(6), 1e-4
    second = (gelu(x + h) - 2 * gelu(x) + gelu(x - h)) / h**2  # rounding leaves it eight digits
    yield "GELU'' at 6 random places, and the steepest place", answer(x), (second, math.sqrt(2)), 1e-5


def check_4(answer):
    rng = np.random.default_rng(4)
    for rows, inputs, units in ((2, 3, 2), (1, 4, 5)):
        x, dout = rng.standard_normal((rows, inputs)), rng.standard_normal((rows, units))
        u, w = rng.standard_normal((2, inputs, units))
        expected = numerical_gradients(lambda x, u, w: (gelu(x @ u) * (x @ w), None), [x, u, w], dout)
        yield f"dx, du, dw for x {x.shape}, u and w {u.shape}", answer(dout, x, u, w), tuple(expected)
