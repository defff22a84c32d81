"""Layer normalisation over the last axis (Ba, Kiros and Hinton 2016, "Layer Normalization")."""

from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import array_module, loops_for
from tinyvit.memory import empty, empty_like, matmul, ones


class LayerNormCache(NamedTuple):
    """What `layer_norm_backward` needs of the forward pass."""

    normalised: Any  # (N, D)
    inverse_deviation: Any  # (N, 1)
    w: Any  # (D,)


def layer_norm_forward(x, w, b, epsilon=1e-6):
    """Shift and scale each vector along the last axis to mean 0 and variance 1, then apply w and b.

    x: (..., D) float; w, b: (D,); epsilon is added to the variance. Returns out (..., D) and the cache.
    """
    xp = array_module(x)
    width = x.shape[-1]
    rows = x.reshape(-1, width)  # (N, D)
    if loops := loops_for(rows, w, b):
        normalised, inverse_deviation, out = empty_like(rows), empty((len(rows), 1), like=rows), empty_like(rows)
        loops.layer_norm_forward(rows, w, b, np.float32(epsilon), out, normalised, inverse_deviation)
        return out.reshape(x.shape), LayerNormCache(normalised, inverse_deviation, w)

    normalised = xp.subtract(rows, row_means(rows), out=empty_like(rows))
    out = xp.multiply(normalised, normalised, out=empty_like(rows))  # for now the squares
    inverse_deviation = 1 / xp.sqrt(row_means(out) + epsilon)  # (N, 1)
    normalised *= inverse_deviation
    xp.multiply(normalised, w, out=out)
    out += b
    return out.reshape(x.shape), LayerNormCache(normalised, inverse_deviation, w)


def layer_norm_backward(dout, cache, dw=None, db=None):
    """Return dx (..., D), dw (D,) and db (D,) for the gradient `dout` (..., D) of `layer_norm_forward`'s out.

    dw and db, if given, are the arrays that are written and returned.
    """
    normalised, inverse_deviation, w = cache
    xp = array_module(dout)
    drows = dout.reshape(normalised.shape)  # (N, D)
    if loops := loops_for(drows, *cache):
        dx = empty_like(drows)
        dw = empty_like(w) if dw is None else dw
        db = empty_like(w) if db is None else db
        loops.layer_norm_backward(drows, normalised, inverse_deviation, w, dx, dw, db)
        return dx.reshape(dout.shape), dw, db

    product = xp.multiply(drows, normalised, out=empty_like(normalised))

    # out = normalised * w + b, so
    every_row = ones(len(drows), like=drows)
    dw = matmul(every_row, product, out=dw)  # sum over n
    db = matmul(every_row, drows, out=db)
    dnormalised = xp.multiply(drows, w, out=empty_like(normalised))

    # normalised = (x - mean) / deviation: x acts directly, through the mean, and through the deviation, so
    # dx = (dnormalised - mean(dnormalised) - normalised * mean(dnormalised * normalised)) / deviation
    through_mean = row_means(drows, w)
    through_deviation = row_means(product, w)
    dx = xp.multiply(normalised, through_deviation, out=product)  # in the buffer of product, which is free now
    xp.subtract(dnormalised, dx, out=dx)
    dx -= through_mean
    dx *= inverse_deviation
    return dx.reshape(dout.shape), dw, db


def row_means(x, w=None):
    """Return the mean (N, 1) of every row of x (N, D), or of x * w for w (D,): as a product, faster than `mean`."""
    w = ones(x.shape[-1], like=x) if w is None else w
    sums = matmul(x, w[:, None])
    sums /= x.shape[-1]
    return sums
