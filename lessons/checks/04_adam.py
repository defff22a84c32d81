"""The checks of lesson 04's exercises: averages and steps from other formulas than the lesson's, and from tinyvit."""

import numpy as np

from tinyvit.optim import Adam


def check_1(answer):
    yield "one gradient, [6], beta 0.9", answer(np.array([[6.0]]), 0.9), np.array([6.0])
    yield "the gradients [0] and [3], beta 0.5", answer(np.array([[0.0], [3.0]]), 0.5), np.array([2.0])
    gradients = np.random.default_rng(1).standard_normal((6, 4))
    shares = 0.9 ** np.arange(6)[::-1]
    yield "6 random gradients of 4 weights, beta 0.9", answer(gradients, 0.9), shares @ gradients / shares.sum()


def check_2(answer):
    yield "the valley of the lesson, diag(1, 50)", answer(np.diag([1.0, 50.0])), 0.04
    yield "[[3, 2], [2, 3]], steepest along (1, 1)", answer(np.array([[3.0, 2.0], [2.0, 3.0]])), 0.4
    x = np.random.default_rng(2).standard_normal((9, 5))
    yield "a random valley of 5 weights", answer(x.T @ x), 2 / float(np.linalg.norm(x, 2)) ** 2


def check_3(answer):
    zero = np.zeros(1)
    expected = np.array([0.98]), np.array([0.2]), np.array([0.004])
    yield "w = 1, g = 2 at step 1, rate 0.01, decay 1", answer(zero + 1, zero + 2, zero, zero, 1, 0.01, 1.0), expected
    rng = np.random.default_rng(3)
    w, m, v = rng.standard_normal(5), np.zeros(5), np.zeros(5)
    adam = Adam(w, weight_decay=0.1)
    for t in range(1, 4):
        g, after = rng.standard_normal(5), w.copy()
        adam.step(after, g, 0.02)
        expected = after, adam.first_moment.copy(), adam.second_moment.copy()
        yield f"5 random weights at step {t}, rate 0.02, decay 0.1", answer(w, g, m, v, t, 0.02, 0.1), expected
        w, m, v = expected


def check_4(answer):
    yield "rate and momentum for the curvatures 1 and 4", answer(1.0, 4.0), (4 / 9, 1 / 9)
    yield "the same valley, nine times as steep", answer(9.0, 36.0), (4 / 81, 1 / 9)
    for a, b in ((1.0, 50.0), (0.3, 2.0)):
        rate, momentum = answer(a, b)
        factor = max(np.abs(np.roots([1, -(1 + momentum - rate * c), momentum])).max() for c in (a, b))
        best = (np.sqrt(b) - np.sqrt(a)) / (np.sqrt(b) + np.sqrt(a))
        # a double root is known to half the digits only
        yield f"the larger |r| of both weights, for the curvatures {a:g} and {b:g}", float(factor), float(best), 1e-4
