"""Solutions of lesson 12: `python lessons/solutions/12_training.py` checks them all."""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(p, s):
    return math.ceil(p * (1 - p) / s**2 - 1e-9)  # 25.000000000000004 images are 25


def wrong_1(p, s):
    """The square is forgotten: twice as sure would then need twice as many images, and it needs four times."""
    return math.ceil(math.sqrt(p * (1 - p)) / s)


def exercise_2(down, across):
    # the new pixel at (r, c) comes from (r - down, c - across)
    return np.array([[1, 0, -down], [0, 1, -across]], np.float32)


def wrong_2(down, across):
    """The way of the ink in place of the way back: it moves up and to the left."""
    return np.array([[1, 0, down], [0, 1, across]], np.float32)


def exercise_3(step, total, peak, warmup, tail):
    return peak * min(1.0, (step + 1) / warmup, (total - step) / tail)


def wrong_3(step, total, peak, warmup, tail):
    """Counted from 0: the first step has the rate zero, and teaches nothing."""
    return peak * min(1.0, step / warmup, (total - step) / tail)


def exercise_4(logits, first, second, share):
    batch, classes = logits.shape
    one_hot = np.eye(classes)
    target = share * one_hot[first] + (1 - share) * one_hot[second]  # (B, C), every row sums to 1
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    # loss = -mean over n of sum over c of target log p, and each row of target sums to 1, so it is p - target again
    return -(target * log_p).sum(axis=1).mean(), (np.exp(log_p) - target) / batch


def wrong_4(logits, first, second, share):
    """The gradient of the sum over the batch, beside the mean of the loss."""
    loss, dlogits = exercise_4(logits, first, second, share)
    return loss, dlogits * len(logits)


if __name__ == "__main__":
    Lesson("12_training").check_all(globals())
