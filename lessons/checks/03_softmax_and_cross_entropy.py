"""The checks of lesson 03's exercises: values from SciPy's log-sum-exp, gradients from central differences."""

import numpy as np
from scipy.special import expit, log_softmax, logsumexp

from tinyvit.gradcheck import numerical_gradients


def check_1(answer):
    yield "log-sum-exp of [0, 0]", answer(np.array([0.0, 0.0])), float(np.log(2))
    z = np.random.default_rng(1).standard_normal((2, 3, 5))
    yield "log-sum-exp of random z (2, 3, 5)", answer(z), logsumexp(z, axis=-1)
    z = np.array([[1000.0, 1000.0, 990.0], [-1000.0, -2000.0, -1001.0]])
    with np.errstate(over="ignore", divide="ignore"):
        yield "log-sum-exp of two rows near 1000 and -1000", answer(z), logsumexp(z, axis=-1)


def check_2(answer):
    z, y = np.array([0.0, 0.0]), np.array([1.0, 0.0])
    yield "loss and slope at z = 0, for y = 1 and y = 0", answer(z, y), (np.log([2.0, 2.0]), np.array([-0.5, 0.5]))
    rng = np.random.default_rng(2)
    z, y = 3 * rng.standard_normal(7), rng.integers(2, size=7).astype(float)
    loss = -np.where(y == 1, np.log(expit(z)), np.log(expit(-z)))
    yield "loss and slope of 7 random scores", answer(z, y), (loss, expit(z) - y)
    z, y = np.array([1000.0, -1000.0, 1000.0, -1000.0]), np.array([1.0, 1.0, 0.0, 0.0])
    expected = np.array([0.0, 1000.0, 1000.0, 0.0]), np.array([0.0, -1.0, 1.0, 0.0])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield "loss and slope at z = 1000 and -1000, for y = 1, then for y = 0", answer(z, y), expected


def check_3(answer):
    z, labels = np.array([[np.log(3.0), 0.0]]), np.array([0])  # p is 3/4, 1/4
    expected = float(-0.8 * np.log(0.75) - 0.2 * np.log(0.25)), np.array([[-0.05, 0.05]])
    yield "p = [3/4, 1/4], label 0, s = 0.4", answer(z, labels, 0.4), expected
    rng = np.random.default_rng(3)
    for s in (0.0, 0.1, 1.0):
        z, labels = rng.standard_normal((4, 6)), rng.integers(6, size=4)

        def loss_of(z, labels=labels, s=s):
            logs = log_softmax(z, axis=1)
            return -(1 - s) * logs[np.arange(4), labels].mean() - s * logs.mean(), None

        dz = numerical_gradients(loss_of, [z], np.float64(1))[0]
        yield f"4 rows of 6 random scores, s = {s}", answer(z, labels, s), (float(loss_of(z)[0]), dz)


def check_4(answer):
    z, dout = np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])
    yield "dz for z = [0, 0] and dout = [1, 0]", answer(dout, z), np.array([[0.5, -0.5]])
    rng = np.random.default_rng(4)
    for rows, classes in ((3, 4), (1, 7)):
        z, dout = rng.standard_normal((2, rows, classes))
        expected = numerical_gradients(lambda z: (log_softmax(z, axis=1), None), [z], dout)[0]
        yield f"dz for random z and dout {z.shape}", answer(dout, z), expected
