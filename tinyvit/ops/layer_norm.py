"""Layer normalisation, ``out = (x - mean(x)) / sqrt(var(x) + epsilon) * w + b`` over the last axis."""

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import array_module, loops_for
from tinyvit.checks import by_identity, require_arrays, require_cache, require_scalar
from tinyvit.memory import empty, empty_like, matmul, ones


@by_identity
class LayerNormCache(NamedTuple):
    """Arrays of `layer_norm_forward` that `layer_norm_backward` reads."""

    normalised: Any  # (N, D)
    inverse_deviation: Any  # (N, 1)
    w: Any  # (D,)


def layer_norm_forward(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, epsilon: float = 1e-6
) -> tuple[np.ndarray, LayerNormCache]:
    """Shift and scale each vector to mean 0 and variance 1, then multiply by `w` and add `b`.

    Parameters
    ----------
    x : ndarray of shape (..., D)
        Input. The mean and the variance are taken over the last axis.
    w : ndarray of shape (D,)
        Factor for each component.
    b : ndarray of shape (D,)
        Offset for each component.
    epsilon : float, default 1e-6
        Number added to the variance, at least 0, so that a constant vector causes no division by zero.

    Returns
    -------
    out : ndarray of shape (..., D)
        Output.
    cache : LayerNormCache
        Input of `layer_norm_backward`.

    Notes
    -----
    A vector becomes NaN if the square of a difference from the mean overflows, in float32 from 1.8e19.

    References
    ----------
    Ba, Kiros and Hinton 2016, "Layer Normalization".
    """
    require_arrays("x (..., D), w (D), b (D)", x, w, b)
    require_scalar("epsilon", epsilon, minimum=0, maximum=math.inf, below=True)
    xp = array_module(x)
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    if loops := loops_for(rows, w, b):
        normalised, inverse_deviation, out = empty_like(rows), empty((len(rows), 1), like=rows), empty_like(rows)
        loops.layer_norm_forward(rows, w, b, np.float32(epsilon), out, normalised, inverse_deviation)
        return out.reshape(x.shape), LayerNormCache(normalised, inverse_deviation, w)

    normalised = xp.subtract(rows, row_means(rows), out=empty_like(rows))
    out = xp.multiply(normalised, normalised, out=empty_like(rows))  # holds the squares first, then the output
    variance = row_means(out)
    # The last term is NaN for an infinite variance, which would give an output of 0.
    inverse_deviation = 1 / xp.sqrt(variance + epsilon) + (variance - variance)  # (N, 1)
    normalised *= inverse_deviation
    xp.multiply(normalised, w, out=out)
    out += b
    return out.reshape(x.shape), LayerNormCache(normalised, inverse_deviation, w)


def layer_norm_backward(
    dout: np.ndarray, cache: LayerNormCache, dw: np.ndarray | None = None, db: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the gradients of `layer_norm_forward`.

    Parameters
    ----------
    dout : ndarray of shape (..., D)
        Gradient of the loss with respect to `out`.
    cache : LayerNormCache
        Cache of `layer_norm_forward`.
    dw : ndarray of shape (D,), optional
        Array for the gradient of `w`, a new one by default.
    db : ndarray of shape (D,), optional
        Array for the gradient of `b`, a new one by default.

    Returns
    -------
    dx : ndarray of shape (..., D)
        Gradient of `x`.
    dw : ndarray of shape (D,)
        Gradient of `w`.
    db : ndarray of shape (D,)
        Gradient of `b`.
    """
    normalised, inverse_deviation, w = require_cache(cache, 3, "layer_norm_forward")
    form = "normalised (N, D), w (D), dout (..., D), dw (D) or None, db (D) or None"
    require_arrays(form, normalised, w, dout, dw, db)
    if dout.size != normalised.size:
        raise ValueError(f"dout must have {len(normalised)} vectors as the output has, not the shape {dout.shape}")
    xp = array_module(dout)
    drows = dout.reshape(normalised.shape)  # (N, D)
    outputs = [gradient for gradient in (dw, db) if gradient is not None]
    if loops := loops_for(drows, *cache, *outputs):
        dx = empty_like(drows)
        dw = empty_like(w) if dw is None else dw
        db = empty_like(w) if db is None else db
        loops.layer_norm_backward(drows, normalised, inverse_deviation, w, dx, dw, db)
        return dx.reshape(dout.shape), dw, db

    product = xp.multiply(drows, normalised, out=empty_like(normalised))

    # out = normalised * w + b
    every_row = ones(len(drows), like=drows)
    dw = matmul(every_row, product, out=dw)  # sum over n
    db = matmul(every_row, drows, out=db)  # sum over n
    dnormalised = xp.multiply(drows, w, out=empty_like(normalised))

    # normalised = (x - mean(x)) / deviation(x), where x also changes the mean and the deviation
    # dx = (dnormalised - mean(dnormalised) - normalised * mean(dnormalised * normalised)) / deviation
    through_mean = row_means(drows, w)
    through_deviation = row_means(product, w)
    dx = xp.multiply(normalised, through_deviation, out=product)  # reuses the memory of product
    xp.subtract(dnormalised, dx, out=dx)
    dx -= through_mean
    dx *= inverse_deviation
    return dx.reshape(dout.shape), dw, db


def row_means(x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
    """Return the means (N, 1) of the rows of `x` (N, D), or of ``x * w``. A matrix product is faster than `mean`."""
    w = ones(x.shape[-1], like=x) if w is None else w
    sums = matmul(x, w[:, None])
    sums /= x.shape[-1]
    return sums
