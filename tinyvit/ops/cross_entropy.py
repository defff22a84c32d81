"""Softmax cross-entropy with optional label smoothing (Szegedy et al. 2016, section 7)."""

import numpy as np

from tinyvit.backend import array_module


def cross_entropy_forward(logits, targets, smoothing=0.0):
    """Mean over the batch of the cross-entropy between softmax(logits) and the smoothed targets.

    logits: (B, classes) float; targets: labels (B,), integers from 0 to classes - 1, or probabilities (B, classes),
    float, whose rows sum to 1; smoothing in [0, 1) moves that share of every target to all classes evenly.
    Returns the loss, a 0-d array, and the cache.
    Raises `ValueError` on shapes that do not fit and, on a CPU, on a label out of range and on probabilities that are
    negative or do not sum to 1. On a GPU such a check would wait for the device: the loss of such a label is NaN
    there, which training reports.
    """
    xp = array_module(logits)
    if logits.ndim != 2 or targets.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            "cross-entropy needs logits (B, classes) and labels (B,) or probabilities (B, classes), not "
            f"{logits.shape} and {targets.shape}"
        )
    probabilities = one_hot(targets, logits) if targets.ndim == 1 else checked_probabilities(targets, logits)
    target = probabilities * (1 - smoothing)
    target += smoothing / logits.shape[1]

    # log softmax(z) = z - max(z) - log(sum(exp(z - max(z)))): the largest exponent is 0, so nothing overflows
    log_probabilities = logits - logits.max(axis=1, keepdims=True)
    log_probabilities -= xp.log(xp.exp(log_probabilities).sum(axis=1, keepdims=True))
    loss = -(target * log_probabilities).sum(axis=1).mean()
    return loss, (xp.exp(log_probabilities), target)


def cross_entropy_backward(dloss, cache):
    """Return dlogits (B, classes) for the gradient `dloss`, a number, of `cross_entropy_forward`'s loss."""
    probabilities, target = cache
    # loss = -mean(target . log softmax(logits)) and every row of target sums to 1, so
    dlogits = probabilities - target
    dlogits *= dloss / len(target)
    return dlogits


def one_hot(labels, logits):
    """Return (B, classes) like `logits`: 1 at each label (B,), 0 elsewhere, NaN for a label out of range."""
    xp = array_module(logits)
    classes = logits.shape[1]
    target = (labels[:, None] == xp.arange(classes)).astype(logits.dtype)
    hits = target.sum(axis=1, keepdims=True)  # 1 in every row, 0 for a label out of range
    if xp is np and not hits.all():
        wrong = labels[hits[:, 0] == 0][0]
        raise ValueError(f"a label is {wrong}, but there are the classes 0 to {classes - 1}")
    target /= hits
    return target


def checked_probabilities(targets, logits):
    """Return probabilities (B, classes) in the dtype of `logits`; raise `ValueError` if they are none (CPU only)."""
    if array_module(logits) is np and not (
        (targets >= 0).all() and np.allclose(targets.sum(axis=1), 1, rtol=0, atol=1e-4)
    ):
        raise ValueError("the probabilities of an image must be at least 0 and sum to 1")
    return targets.astype(logits.dtype, copy=False)
