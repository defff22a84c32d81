"""Solutions of lesson 08: `python lessons/solutions/08_attention.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(weights):
    return np.diag(weights) - np.outer(weights, weights)


def wrong_1(weights):
    """The diagonal only: softmax taken for a function of each number by itself."""
    return np.diag(weights * (1 - weights))


def exercise_2(scores, visible):
    scores = np.where(visible, scores, -np.inf)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))  # exp(-inf) is 0
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def wrong_2(scores, visible):
    """Hidden after the softmax: the weights no longer sum to one, and what is hidden still has a say in them."""
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return visible * exponentials / exponentials.sum(axis=1, keepdims=True)


def wrong_2b(scores, visible):
    """Scores of hidden tokens are set to zero: a score of zero is not a weight of zero."""
    scores = np.where(visible, scores, 0)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def exercise_3(dout, q, k, v, c):
    products = q @ k.T  # (S, T)
    exponentials = np.exp(c * products - (c * products).max(axis=1, keepdims=True))
    weights = exponentials / exponentials.sum(axis=1, keepdims=True)
    dweights = dout @ v.T
    dscores = weights * (dweights - (dweights * weights).sum(axis=1, keepdims=True))
    # scores = c * products, and every one of them has the same c
    return (dscores * products).sum()


def wrong_3(dout, q, k, v, c):
    """The way leads past the softmax: the gradient of the weights is taken for that of the scores."""
    return ((dout @ v.T) * (q @ k.T)).sum()


def exercise_4(q, k, v, chunk):
    largest = np.full((len(q), 1), -np.inf)  # of the scores so far
    total = np.zeros((len(q), 1))  # of exp(score - largest)
    out = np.zeros((len(q), v.shape[1]))  # of exp(score - largest) * value
    for start in range(0, len(k), chunk):
        scores = q @ k[start : start + chunk].T / np.sqrt(q.shape[1])  # (S, chunk)
        new_largest = np.maximum(largest, scores.max(axis=1, keepdims=True))
        rescale = np.exp(largest - new_largest)  # what was summed so far was relative to the old one
        exponentials = np.exp(scores - new_largest)
        total = rescale * total + exponentials.sum(axis=1, keepdims=True)
        out = rescale * out + exponentials @ v[start : start + chunk]
        largest = new_largest
    return out / total


def wrong_4(q, k, v, chunk):
    """A mean of the chunks' results: each chunk has as much say as any other, however badly its keys fit."""
    results = []
    for start in range(0, len(k), chunk):
        scores = q @ k[start : start + chunk].T / np.sqrt(q.shape[1])
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        results.append(exponentials / exponentials.sum(axis=1, keepdims=True) @ v[start : start + chunk])
    return np.mean(results, axis=0)


def wrong_4b(q, k, v, chunk):
    """Sums are not rescaled when a larger score comes: chunks are relative to different maxima."""
    largest, total, out = np.full((len(q), 1), -np.inf), 0.0, 0.0
    for start in range(0, len(k), chunk):
        scores = q @ k[start : start + chunk].T / np.sqrt(q.shape[1])
        largest = np.maximum(largest, scores.max(axis=1, keepdims=True))
        exponentials = np.exp(scores - largest)
        total = total + exponentials.sum(axis=1, keepdims=True)
        out = out + exponentials @ v[start : start + chunk]
    return out / total


if __name__ == "__main__":
    Lesson("08_attention").check_all(globals())
