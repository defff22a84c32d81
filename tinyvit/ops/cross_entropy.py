"""Softmax cross-entropy, ``loss = -mean(sum(target * log(softmax(logits))))``, with optional label smoothing."""

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checks import as_array, require_arrays, require_cache, require_scalar


def cross_entropy_forward(
    logits: np.ndarray, targets: np.ndarray, smoothing: float = 0.0
) -> tuple[np.ndarray, tuple]:
    """Compute the mean cross-entropy between ``softmax(logits)`` and the targets.

    Parameters
    ----------
    logits : ndarray of shape (B, classes)
        Scores of the classes.
    targets : ndarray of shape (B,) or (B, classes)
        Integer labels from 0 to ``classes - 1``, or probabilities of the classes.
    smoothing : float, default 0.0
        Part of every target that is distributed evenly over all classes, from 0 to below 1.

    Returns
    -------
    loss : ndarray of shape ()
        Mean loss of the batch.
    cache : tuple
        Input of `cross_entropy_backward`.

    Raises
    ------
    TypeError
        If labels are not integers.
    ValueError
        If the shapes do not fit, a label or `smoothing` is out of range, or probabilities are negative or do not sum
        to 1.

    Notes
    -----
    On a GPU only the shapes are checked, because reading values would wait for the device. There, a label that is out
    of range makes the loss NaN.

    References
    ----------
    Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7, on label smoothing.
    """
    require_arrays("logits (batch, classes)", logits)
    require_scalar("smoothing", smoothing, minimum=0, maximum=1, below=True)
    xp, targets = array_module(logits), as_array("targets", targets)
    if array_module(targets) is not xp:
        raise TypeError("targets must be on the device of the logits: use Backend.asarray")
    if targets.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            "cross-entropy needs logits of shape (B, classes) with labels of shape (B,) or probabilities of shape "
            f"(B, classes), not logits of shape {logits.shape} with targets of shape {targets.shape}"
        )
    probabilities = one_hot(targets, logits) if targets.ndim == 1 else checked_probabilities(targets, logits)
    target = probabilities * (1 - smoothing)
    target += smoothing / logits.shape[1]

    # log(softmax(z)) = z - max(z) - log(sum(exp(z - max(z)))), where the largest exponent is 0 and cannot overflow
    log_probabilities = logits - logits.max(axis=1, keepdims=True)
    log_probabilities -= xp.log(xp.exp(log_probabilities).sum(axis=1, keepdims=True))
    # A target of 0 times an infinite logarithm would be NaN, but its limit is 0.
    loss = -(target * xp.where(target > 0, log_probabilities, 0)).sum(axis=1).mean()
    return loss, (xp.exp(log_probabilities), target)


def cross_entropy_backward(dloss: float | np.ndarray, cache: tuple) -> np.ndarray:
    """Compute the gradient of `cross_entropy_forward`.

    Parameters
    ----------
    dloss : float
        Gradient of the final loss with respect to `loss`, which is 1 if `loss` is the final loss.
    cache : tuple
        Cache of `cross_entropy_forward`.

    Returns
    -------
    ndarray of shape (B, classes)
        Gradient of `logits`.
    """
    probabilities, target = require_cache(cache, 2, "cross_entropy_forward")
    if not isinstance(dloss, int | float) and getattr(dloss, "shape", None) != ():
        raise TypeError(f"dloss must be a number, not {type(dloss).__name__}")
    # loss = -mean(sum(target * log(softmax(logits)))), where every row of target sums to 1
    dlogits = probabilities - target
    dlogits *= dloss / len(target)
    return dlogits


def one_hot(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return an array (B, classes) with 1 at each label and 0 elsewhere, or NaN for a label that is out of range."""
    xp = array_module(logits)
    classes = logits.shape[1]
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers from 0 to {classes - 1}, not {labels.dtype}: convert them")
    target = (labels[:, None] == xp.arange(classes)).astype(logits.dtype)
    hits = target.sum(axis=1, keepdims=True)  # (B, 1): 1, or 0 for a label that is out of range
    if xp is np and not hits.all():
        wrong = labels[hits[:, 0] == 0][0]
        raise ValueError(f"a label is {wrong}, but labels must be integers from 0 to {classes - 1}")
    target /= hits
    return target


def checked_probabilities(targets: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return `targets` in the dtype of `logits`. On a CPU, raise `ValueError` unless they are probabilities."""
    if targets.dtype.kind == "c":
        raise TypeError(f"target probabilities must be real, not {targets.dtype}")
    if array_module(logits) is np:
        fits = (targets >= 0).all(axis=1) & np.isclose(targets.sum(axis=1), 1, rtol=0, atol=1e-4)
        if not fits.all():
            raise ValueError(f"target probabilities must be at least 0 and sum to 1, not {targets[~fits][0]}")
    return targets.astype(logits.dtype, copy=False)
