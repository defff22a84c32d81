"""Softmax cross-entropy with optional label smoothing (Szegedy et al. 2016, section 7)."""

import numpy as np

from tinyvit.backend import array_module


def cross_entropy_forward(logits, labels, smoothing=0.0):
    """Mean over the batch of the cross-entropy between softmax(logits) and the smoothed labels.

    logits: (B, C) float; labels: (B,) integers in 0..C-1; smoothing in [0, 1) moves that share of the target
    from the label to all C classes evenly. Returns the loss, a 0-d array, and the cache.
    Raises `ValueError` on shapes that do not fit and, on a CPU, on a label out of range. On a GPU looking would mean
    to wait for it: there the loss of such a label is not-a-number, which training never takes for a result.
    """
    xp = array_module(logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross-entropy needs logits (B, C) and labels (B,), not {logits.shape} and {labels.shape}"
        )
    classes = logits.shape[1]
    target = (labels[:, None] == xp.arange(classes)).astype(logits.dtype)  # (B, C), one row a one-hot vector
    hits = target.sum(axis=1, keepdims=True)  # 1 in every row, but 0 for a label that is no class
    if xp is np and not hits.all():
        wrong = labels[hits[:, 0] == 0][0]
        raise ValueError(f"a label is {wrong}, but there are the classes 0 to {classes - 1}")
    target /= hits
    target *= 1 - smoothing
    target += smoothing / classes

    # log softmax(z) = z - max(z) - log(sum(exp(z - max(z)))): the largest exponent is 0, so nothing overflows
    log_probabilities = logits - logits.max(axis=1, keepdims=True)
    log_probabilities -= xp.log(xp.exp(log_probabilities).sum(axis=1, keepdims=True))
    loss = -(target * log_probabilities).sum(axis=1).mean()
    return loss, (xp.exp(log_probabilities), target)


def cross_entropy_backward(dloss, cache):
    """Return dlogits (B, C) for the gradient `dloss`, a number, of `cross_entropy_forward`'s loss."""
    probabilities, target = cache
    # loss = -mean(target . log softmax(logits)) and every row of target sums to 1, so
    dlogits = probabilities - target
    dlogits *= dloss / len(target)
    return dlogits
