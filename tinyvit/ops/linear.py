"""The linear layer, ``out = x @ w + b``."""

import numpy as np

from tinyvit.checks import require_arrays, require_cache
from tinyvit.memory import matmul, ones


def linear_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, tuple]:
    """Compute ``out = x @ w + b``.

    Parameters
    ----------
    x : ndarray of shape (..., I)
        Input.
    w : ndarray of shape (I, O)
        Weights.
    b : ndarray of shape (O,)
        Bias.

    Returns
    -------
    out : ndarray of shape (..., O)
        Output.
    cache : tuple
        Input of `linear_backward`.
    """
    require_arrays("x (..., I), w (I, O), b (O)", x, w, b)
    rows = x.reshape(-1, x.shape[-1])  # (N, I): one large matrix product is faster than many small ones
    out = matmul(rows, w)
    out += b
    return out.reshape(*x.shape[:-1], w.shape[1]), (x, w)


def linear_backward(
    dout: np.ndarray, cache: tuple, dw: np.ndarray | None = None, db: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the gradients of `linear_forward`.

    Parameters
    ----------
    dout : ndarray of shape (..., O)
        Gradient of the loss with respect to `out`.
    cache : tuple
        Cache of `linear_forward`.
    dw : ndarray of shape (I, O), optional
        Array for the gradient of `w`, a new one by default.
    db : ndarray of shape (O,), optional
        Array for the gradient of `b`, a new one by default.

    Returns
    -------
    dx : ndarray of shape (..., I)
        Gradient of `x`.
    dw : ndarray of shape (I, O)
        Gradient of `w`.
    db : ndarray of shape (O,)
        Gradient of `b`.
    """
    x, w = require_cache(cache, 2, "linear_forward")
    form = "x (..., I), w (I, O), dout (..., O), dw (I, O) or None, db (O) or None"
    require_arrays(form, x, w, dout, dw, db)
    rows = x.reshape(-1, x.shape[-1])  # (N, I)
    drows = dout.reshape(-1, dout.shape[-1])  # (N, O)

    # out[n, o] = sum over i of x[n, i] * w[i, o] + b[o]
    dx = matmul(drows, w.T)  # sum over o
    dw = matmul(rows.T, drows, out=dw)  # sum over n
    db = matmul(ones(len(drows), like=drows), drows, out=db)  # sum over n
    return dx.reshape(x.shape), dw, db
