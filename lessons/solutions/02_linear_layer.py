"""Solutions of lesson 02: `python lessons/solutions/02_linear_layer.py` checks them all."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(dout):
    return dout.sum(axis=(0, 1))  # the bias was added B * T times, and each time counts


def wrong_1(dout):
    """A mean for a sum: right for one token alone."""
    return dout.mean(axis=(0, 1))


def exercise_2(dout, x, g):
    # y[n, i] = x[n, i] g[i], so
    dx = dout * g  # x[n, i] occurs once
    dg = (dout * x).sum(axis=0)  # g[i] occurs in every row
    return dx, dg


def wrong_2(dout, x, g):
    """The sum over the rows is forgotten: every gradient has the shape of what it belongs to."""
    return dout * g, dout * x


def exercise_3(f, x, u, step):
    return (f(x + step * u) - f(x - step * u)) / (2 * step)


def wrong_3(f, x, u, step):
    """A forward difference: its error is of the size of the step, not of its square."""
    return (f(x + step * u) - f(x)) / step


def exercise_4(dout, x, w):
    h = x @ w  # (N, O)
    # y[n, j] = sum_o h[n, o] w[j, o], so
    dh = dout @ w  # (N, O), sum over j
    dw = dout.T @ h  # (I, O), sum over n: the way through the second use
    # h[n, o] = sum_i x[n, i] w[i, o], so
    dw = dw + x.T @ dh  # the way through the first use; two ways add up
    return dh @ w.T, dw


def wrong_4(dout, x, w):
    """Only one of the two ways: a gradient that is assigned where it should be added."""
    dh = dout @ w
    return dh @ w.T, x.T @ dh


if __name__ == "__main__":
    Lesson("02_linear_layer").check_all(globals())
