"""Solutions of lesson 15: `python lessons/solutions/15_make_it_fast.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(tokens, width, mlp_width):
    linear = 3 * width**2 + width**2 + 2 * width * mlp_width  # queries, keys, values; projection; MLP
    attention = 2 * tokens * width  # for each token: scores, and the mean of the values, over all heads
    # attention's own products overtake the MLP where 2 T D > 2 D F: from more tokens than the MLP is wide
    return 2 * tokens * (linear + attention)


def wrong_1(tokens, width, mlp_width):
    """The heads are forgotten to go over all tokens: attention is taken for another linear layer."""
    return 2 * tokens * (4 * width**2 + 2 * width * mlp_width + 2 * width)


def wrong_1b(tokens, width, mlp_width):
    """Terms are counted, each of which is a multiplication and an addition."""
    return tokens * (4 * width**2 + 2 * width * mlp_width + 2 * tokens * width)


def exercise_2(m, v, epsilon):
    out = np.sqrt(v)
    out += epsilon
    return np.divide(m, out, out=out)


def wrong_2(m, v, epsilon):
    """The formula as it stands: right, and an array for every sign in it."""
    return m / (np.sqrt(v) + epsilon)


def exercise_3(speedup, cores):
    # 1 / s = (1 - p) + p / c, so
    parallel = (1 - 1 / speedup) / (1 - 1 / cores)
    serial = 1 - parallel
    return serial, 1 / serial


def wrong_3(speedup, cores):
    """What is missing from full use of the cores is taken for the serial share: 1 - s / c."""
    serial = 1 - speedup / cores
    return serial, 1 / serial


def exercise_4(x, w, q):
    # sum over d of x[b, t, d] * (sum over k of w[d, k] q[b, k]): the query goes to the tokens
    question = q @ w.T  # (B, D), 2 B K D operations
    return (x @ question[:, :, None])[:, :, 0]  # 2 B T D operations


def wrong_4(x, w, q):
    """All keys are made first: the same scores, and many times the work."""
    return (x @ w @ q[:, :, None])[:, :, 0]


if __name__ == "__main__":
    Lesson("15_make_it_fast").check_all(globals())
