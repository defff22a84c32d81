"""Solutions of lesson 14: `python lessons/solutions/14_spot_the_wrong_gradient.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(dout, x):
    # y[i] = x[i] / |x|: x[i] acts directly, and through the length, d|x|/dx[j] = x[j] / |x| = y[j]
    length = np.linalg.norm(x, axis=1, keepdims=True)
    y = x / length
    return (dout - y * (dout * y).sum(axis=1, keepdims=True)) / length


def wrong_1(dout, x):
    """The path through the length is dropped, as in the bug."""
    return dout / np.linalg.norm(x, axis=1, keepdims=True)


def exercise_2(softmax):
    x = np.random.default_rng(0).standard_normal((3, 4))
    shares = softmax(x)
    ratios = shares[:, 1:] / shares[:, :1]
    with np.errstate(all="ignore"):
        shifted = softmax(x + np.array([[1.0], [-2.0], [2000.0]]))  # exp(2000) is more than a float64 can hold
    return bool(
        np.allclose(shares.sum(axis=1), 1)
        and np.allclose(ratios, np.exp(x[:, 1:] - x[:, :1]))
        and np.allclose(shifted, shares)  # False if something is not a number
    )


def wrong_2(softmax):
    """One constant for all rows is no test of the axis, and that shares add up to one is kept by nearly all."""
    x = np.random.default_rng(0).standard_normal((3, 4))
    return bool(np.allclose(softmax(x).sum(axis=1), 1) and np.allclose(softmax(x), softmax(x + 5)))


def exercise_3(make):
    x = np.zeros(1)
    optimiser = make(x)
    gradient = np.ones(1)
    optimiser.step(x, gradient, 1.0)  # all three move by one learning rate
    optimiser.step(x, gradient, 1.0)
    # the second step: right 1; frozen (0.19 / 0.1) / sqrt(0.001999 / 0.001) = 1.34;
    # wiped (0.1 / 0.19) / sqrt(0.001 / 0.001999) = 0.74
    second = -x[0] - 1
    return "frozen" if second > 1.1 else "wiped" if second < 0.9 else "right"


def wrong_3(make):
    """After one step all three are alike."""
    x = np.zeros(1)
    make(x).step(x, np.ones(1), 1.0)
    return "right" if np.isclose(x[0], -1) else "frozen"


def exercise_4(forward, x, weights):
    silent = {name: np.zeros_like(weights[name]) for name in ("w_out", "b_out", "w_2", "b_2")}
    attention_silent = weights | {name: silent[name] for name in ("w_out", "b_out")}
    mlp_silent = weights | {name: silent[name] for name in ("w_2", "b_2")}

    mlp_passes = not np.allclose(forward(x, mlp_silent), 0)  # the MLP says nothing, so what comes is the branch
    # attention says nothing: without its branch the MLP gets zeros, whatever x is
    attention_passes = not np.allclose(forward(x, attention_silent), forward(2 * x + 1, attention_silent))
    if mlp_passes and attention_passes:
        return "both"
    return "attention" if mlp_passes else "mlp" if attention_passes else "none"


def wrong_4(forward, x, weights):
    """With everything silent the block should be the identity; if it is not, one cannot tell yet which is missing."""
    silent = weights | {name: np.zeros_like(weights[name]) for name in ("w_out", "b_out", "w_2", "b_2")}
    return "both" if np.allclose(forward(x, silent), x) else "attention"


if __name__ == "__main__":
    Lesson("14_spot_the_wrong_gradient").check_all(globals())
