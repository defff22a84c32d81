"""The checks of lesson 02's exercises. Most of what is expected is found by central differences alone."""

import numpy as np

from tinyvit.gradcheck import numerical_gradients


def check_1(answer):
    small = np.arange(12.0).reshape(2, 2, 3)
    yield "db for dout = 0 ... 11, of shape (2, 2, 3)", answer(small), np.array([18.0, 22.0, 26.0])
    dout = np.random.default_rng(1).standard_normal((3, 5, 4))
    yield "db for a random dout (3, 5, 4)", answer(dout), np.ones(15) @ dout.reshape(15, 4)


def check_2(answer):
    rng = np.random.default_rng(2)
    for rows, columns in ((2, 3), (5, 4), (1, 2)):
        (x, dout), g = rng.standard_normal((2, rows, columns)), rng.standard_normal(columns)
        expected = numerical_gradients(lambda x, g: (x * g, None), [x, g], dout)
        yield f"dx, dg for x {x.shape}, g {g.shape}", answer(dout, x, g), tuple(expected)


def check_3(answer):
    x, u = np.array([0.0, 1.0]), np.array([1.0, 2.0])
    # f = exp(x0) + x1^3 has the slope exp(0) * 1 + 3 * 2 along u
    slope = answer(lambda x: np.exp(x[0]) + x[1] ** 3, x, u, 1e-5)
    yield "slope of exp(x0) + x1^3 at (0, 1) along (1, 2)", slope, 7.0
    rng = np.random.default_rng(3)
    w, x, u = rng.standard_normal((3, 4, 5))
    exact = float(((1 - np.tanh(w * x) ** 2) * w * u).sum())
    slope = answer(lambda x: np.tanh(w * x).sum(), x, u, 1e-5)
    yield "slope of sum(tanh(w x)), 20 numbers at once", slope, exact, 1e-8


def check_4(answer):
    rng = np.random.default_rng(4)
    for rows, inputs, outputs in ((2, 3, 2), (4, 2, 5)):
        (x, dout), w = rng.standard_normal((2, rows, inputs)), rng.standard_normal((inputs, outputs))
        expected = numerical_gradients(lambda x, w: (x @ w @ w.T, None), [x, w], dout)
        yield f"dx, dw for x {x.shape}, w {w.shape}", answer(dout, x, w), tuple(expected)
