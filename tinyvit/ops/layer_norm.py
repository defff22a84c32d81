"""Layer normalisation over the last axis (Ba, Kiros and Hinton 2016, "Layer Normalization")."""

from tinyvit.backend import array_module, empty


def layer_norm_forward(x, w, b, epsilon=1e-6):
    """Shift and scale each vector along the last axis to mean 0 and variance 1, then apply w and b.

    x: (..., D) float; w, b: (D,); epsilon is added to the variance. Returns out (..., D) and the cache.
    """
    xp = array_module(x)
    normalised = xp.subtract(x, x.mean(axis=-1, keepdims=True), out=empty(x.shape, like=x))
    out = xp.multiply(normalised, normalised, out=empty(x.shape, like=x))  # for now the squares
    variance = out.mean(axis=-1, keepdims=True)  # (..., 1)
    inverse_deviation = 1 / xp.sqrt(variance + epsilon)  # (..., 1)
    normalised *= inverse_deviation
    xp.multiply(normalised, w, out=out)
    out += b
    return out, (normalised, inverse_deviation, w)


def layer_norm_backward(dout, cache):
    """Return dx (..., D), dw (D,) and db (D,) for the gradient `dout` (..., D) of `layer_norm_forward`'s out."""
    normalised, inverse_deviation, w = cache
    xp = array_module(dout)
    width = dout.shape[-1]
    product = xp.multiply(dout, normalised, out=empty(dout.shape, like=dout))

    # out = normalised * w + b, so
    dw = product.reshape(-1, width).sum(axis=0)
    db = dout.reshape(-1, width).sum(axis=0)
    dnormalised = xp.multiply(dout, w, out=empty(dout.shape, like=dout))

    # normalised = (x - mean) / deviation: x acts directly, through the mean, and through the deviation, so
    # dx = (dnormalised - mean(dnormalised) - normalised * mean(dnormalised * normalised)) / deviation
    through_mean = dnormalised.mean(axis=-1, keepdims=True)
    xp.multiply(dnormalised, normalised, out=product)
    through_deviation = product.mean(axis=-1, keepdims=True)
    dx = xp.multiply(normalised, through_deviation, out=product)  # in the buffer of product, which is done with
    xp.subtract(dnormalised, dx, out=dx)
    dx -= through_mean
    dx *= inverse_deviation
    return dx, dw, db
