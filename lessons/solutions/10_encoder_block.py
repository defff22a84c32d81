"""Solutions of lesson 10: `python lessons/solutions/10_encoder_block.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson

from tinyvit.ops import layer_norm_backward


def exercise_1(dy, fx, a, f_backward):
    # y = x + a f(x): x directly, and through f with the factor a; a in every element of y, times f(x)
    return dy + f_backward(a * dy), (dy * fx).sum()


def wrong_1(dy, fx, a, f_backward):
    """The direct way is forgotten: at a = 0 nothing would come through."""
    return f_backward(a * dy), (dy * fx).sum()


def wrong_1b(dy, fx, a, f_backward):
    """The factor a is forgotten on the way through f."""
    return dy + f_backward(dy), (dy * fx).sum()


def exercise_2(jacobians):
    steps, width, _ = jacobians.shape
    sums = np.zeros((steps + 1, width, width))
    sums[0] = np.eye(width)  # before the first step there is one path, and it goes through none
    for J in jacobians:
        # a path of length n either passes this step by, or is one of length n - 1 that goes through it
        longer = J @ sums[:-1]
        sums[1:] = sums[1:] + longer
    return sums


def wrong_2(jacobians):
    """Later steps stand on the right: right for numbers, and not for matrices, which do not commute."""
    steps, width, _ = jacobians.shape
    sums = np.zeros((steps + 1, width, width))
    sums[0] = np.eye(width)
    for J in jacobians:
        longer = sums[:-1] @ J
        sums[1:] = sums[1:] + longer
    return sums


def exercise_3(dy, norm_cache, f_backward):
    # y = norm(s), s = x + f(x)
    dsum, _, _ = layer_norm_backward(dy, norm_cache)
    return dsum + f_backward(dsum)


def wrong_3(dy, norm_cache, f_backward):
    """The direct way passes the norm by, as if this were y = x + norm(f(x))."""
    dsum, _, _ = layer_norm_backward(dy, norm_cache)
    return dy + f_backward(dsum)


def exercise_4(y1, y2, dy1, dy2, f, f_backward, g, g_backward):
    # y2 = x2 + g(y1), so
    gy1, g_cache = g(y1)
    x2 = y2 - gy1
    dy1 = dy1 + g_backward(dy2, g_cache)  # y1 reaches the loss by itself, and through y2
    # y1 = x1 + f(x2), so
    fx2, f_cache = f(x2)
    x1 = y1 - fx2
    dx2 = dy2 + f_backward(dy1, f_cache)
    return x1, x2, dy1, dx2


def wrong_4(y1, y2, dy1, dy2, f, f_backward, g, g_backward):
    """The way from y1 to the loss through y2 is forgotten: the inputs are right, and the gradients are not."""
    gy1, _ = g(y1)
    x2 = y2 - gy1
    fx2, f_cache = f(x2)
    return y1 - fx2, x2, dy1, dy2 + f_backward(dy1, f_cache)


if __name__ == "__main__":
    Lesson("10_encoder_block").check_all(globals())
