"""The checks of lesson 10's exercises. Most of what is expected is found by central differences alone."""

from itertools import combinations

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import layer_norm_forward


def tanh_layer(w):
    """Return a small f, its output and cache for an input, and f_backward(dout, cache)."""

    def forward(x):
        out = np.tanh(x @ w)
        return out, out

    def backward(dout, out):
        return (dout * (1 - out**2)) @ w.T

    return forward, backward


def check_1(answer):
    dx, da = np.array([1.0, 2.0]) + 0.5 * np.array([30.0, 60.0]), 1.0 * 4 + 2.0 * 5
    given = answer(np.array([1.0, 2.0]), np.array([4.0, 5.0]), 0.5, lambda dout: 30 * dout)
    yield "dy = [1, 2], f(x) = [4, 5], a = 0.5, f_backward = 30 dout", given, (dx, da)
    rng = np.random.default_rng(1)
    for a in (0.0, 0.7):
        x, dy = rng.standard_normal((2, 3, 4))
        f, f_backward = tanh_layer(rng.standard_normal((4, 4)))
        fx, cache = f(x)
        expected = numerical_gradients(lambda x, a, f=f: (x + a * f(x)[0], None), [x, np.array([a])], dy)
        given = answer(dy, fx, a, lambda dout, back=f_backward, cache=cache: back(dout, cache))
        yield f"dx, da for f = tanh(x @ w), a = {a}", given, (expected[0], float(expected[1][0]))


def check_2(answer):
    expected = np.array([[[1.0]], [[5.0]], [[6.0]]])
    yield "two steps with the factors 2 and 3: 1, 2 + 3, 2 * 3", answer(np.array([[[2.0]], [[3.0]]])), expected
    jacobians = np.random.default_rng(2).standard_normal((4, 3, 3))
    expected = np.zeros((5, 3, 3))
    for length in range(5):
        for steps in combinations(range(4), length):
            path = np.eye(3)
            for step in steps:
                path = jacobians[step] @ path
            expected[length] += path
    yield "four random steps of width 3", answer(jacobians), expected


def check_3(answer):
    rng = np.random.default_rng(3)
    for shape in ((1, 1, 3), (2, 3, 4)):
        x, dy = rng.standard_normal((2, *shape))
        w, b = rng.standard_normal((2, shape[-1]))
        f, f_backward = tanh_layer(rng.standard_normal((shape[-1], shape[-1])))
        fx, cache = f(x)
        _, norm_cache = layer_norm_forward(x + fx, w, b)
        expected = numerical_gradients(lambda x, f=f, w=w, b=b: layer_norm_forward(x + f(x)[0], w, b), [x], dy)
        given = answer(dy, norm_cache, lambda dout, back=f_backward, cache=cache: back(dout, cache))
        yield f"dx of norm(x + tanh(x @ w)), x {shape}", given, expected[0]


def check_4(answer):
    rng = np.random.default_rng(4)
    for shape in ((1, 2), (3, 5)):
        x1, x2, dy1, dy2 = rng.standard_normal((4, *shape))
        (f, f_backward), (g, g_backward) = (tanh_layer(rng.standard_normal((shape[1], shape[1]))) for _ in "fg")

        def both(x1, x2, f=f, g=g):
            y1 = x1 + f(x2)[0]
            return np.stack([y1, x2 + g(y1)[0]]), None

        y1, y2 = both(x1, x2)[0]
        expected = numerical_gradients(both, [x1, x2], np.stack([dy1, dy2]))
        given = answer(y1, y2, dy1, dy2, f, f_backward, g, g_backward)
        yield f"x1, x2, dx1, dx2 of shape {shape}", given, (x1, x2, *expected)
