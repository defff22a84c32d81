"""The checks of lesson 06's exercises. All gradients that are expected are found by central differences."""

import numpy as np

from tinyvit.gradcheck import numerical_gradients

EPSILON = 1e-6


def check_1(answer):
    dout = np.array([[3.0, 0.0, 0.0]])
    yield "dx for dout = [3, 0, 0]", answer(dout), np.array([[2.0, -1.0, -1.0]])
    dout = np.random.default_rng(1).standard_normal((3, 5))
    centre = np.eye(5) - 1 / 5  # subtracting the mean, as a matrix
    yield "dx for a random dout (3, 5)", answer(dout), dout @ centre.T


def check_2(answer):
    gain, bias = np.array([2.0, 3.0]), np.array([1.0, 0.0])
    w, b = np.array([[1.0], [10.0]]), np.array([100.0])
    expected = np.array([[2.0], [30.0]]), np.array([101.0])
    yield "gain [2, 3], bias [1, 0], w [[1], [10]], b [100]", answer(gain, bias, w, b), expected
    rng = np.random.default_rng(2)
    (gain, bias), w, b = rng.standard_normal((2, 4)), rng.standard_normal((4, 3)), rng.standard_normal(3)
    new = answer(gain, bias, w, b)
    normalised = rng.standard_normal((7, 4))
    expected = (normalised * gain + bias) @ w + b
    if isinstance(new, tuple | list) and len(new) == 2 and all(isinstance(part, np.ndarray) for part in new):
        new = normalised @ new[0] + new[1]  # anything else is for the kit to explain
    yield "what the layer puts out for 7 random rows of width 4", new, expected


def check_3(answer):
    x, dout, w = np.array([[1.0, 1.0]]), np.array([[1.0, 0.0]]), np.array([1.0, 1.0])  # the root mean square is 1
    yield "dx, dw for x = [1, 1], dout = [1, 0], w = [1, 1]", answer(dout, x, w), _rms_gradients(dout, x, w)
    rng = np.random.default_rng(3)
    for rows, width in ((3, 4), (1, 7)):
        (x, dout), w = rng.standard_normal((2, rows, width)), rng.standard_normal(width)
        yield f"dx, dw for random x {x.shape}", answer(dout, x, w), _rms_gradients(dout, x, w)


def check_4(answer):
    rng = np.random.default_rng(4)
    for rows, width, groups in ((3, 4, 1), (3, 6, 2), (2, 12, 3)):
        (x, dout), (w, b) = rng.standard_normal((2, rows, width)), rng.standard_normal((2, width))

        def group_norm(x, w, b, groups=groups):
            parts = x.reshape(len(x), groups, -1)
            parts = parts - parts.mean(axis=-1, keepdims=True)
            parts = parts / np.sqrt((parts**2).mean(axis=-1, keepdims=True) + EPSILON)
            return parts.reshape(x.shape) * w + b, None

        expected = tuple(numerical_gradients(group_norm, [x, w, b], dout))
        yield f"dx, dw, db for x {x.shape} in {groups} groups", answer(dout, x, w, groups), expected


def _rms_gradients(dout, x, w):
    def rms_norm(x, w):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * w, None

    return tuple(numerical_gradients(rms_norm, [x, w], dout))
