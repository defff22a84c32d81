"""The linear layer, out = x @ w + b, and its three gradients."""

from tinyvit.memory import matmul, ones


def linear_forward(x, w, b):
    """Multiply the last axis of `x` by a matrix and add a bias.

    x: (..., I) float; w: (I, O); b: (O,). Returns out (..., O) and the cache for `linear_backward`.
    Raises `ValueError` if the axes do not fit. The weight is stored (in, out), so that out = x @ w.
    """
    rows = x.reshape(-1, x.shape[-1])  # one two-dimensional product is faster than many small ones
    out = matmul(rows, w)
    out += b
    return out.reshape(*x.shape[:-1], w.shape[1]), (x, w)


def linear_backward(dout, cache, dw=None, db=None):
    """Return dx (..., I), dw (I, O) and db (O,) for the gradient `dout` (..., O) of `linear_forward`'s out.

    dw and db, if given, are the arrays that are written and returned, as a view of a larger array may be.
    """
    x, w = cache
    rows = x.reshape(-1, x.shape[-1])  # (N, I)
    drows = dout.reshape(-1, dout.shape[-1])  # (N, O)

    # out[n, o] = sum_i x[n, i] w[i, o] + b[o], so
    dx = matmul(drows, w.T)  # sum over o
    dw = matmul(rows.T, drows, out=dw)  # sum over n
    db = matmul(ones(len(drows), like=drows), drows, out=db)  # sum over n
    return dx.reshape(x.shape), dw, db
