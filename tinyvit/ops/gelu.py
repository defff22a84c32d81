"""The Gaussian error linear unit, x * cdf(x) (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units")."""

import math

import numpy as np

from tinyvit.backend import array_module, erf, loops_for
from tinyvit.memory import empty_like


def gelu_forward(x, with_cache=True):
    """Multiply each x by the probability that a standard normal variable is below it.

    x: any shape, float. Returns out of the same shape, and the cache: the derivative, which is cheapest here
    because it shares the distribution with out. Where no backward will follow, with_cache=False spares it: None.
    """
    if loops := loops_for(x):
        out, derivative = empty_like(x), empty_like(x) if with_cache else None
        if with_cache:
            loops.gelu_forward(x.ravel(), out.ravel(), derivative.ravel())
        else:
            loops.gelu_values(x.ravel(), out.ravel())
        return out, derivative

    xp = array_module(x)
    square = xp.multiply(x, x, out=empty_like(x))

    # out = x * cdf(x) and cdf' = density, so the derivative is x * density(x) + cdf(x)
    if with_cache:
        derivative = xp.multiply(square, -0.5, out=empty_like(x))  # for now the exponent of the density
        xp.exp(derivative, out=derivative)
        derivative *= 1 / math.sqrt(2 * math.pi)
        derivative *= x
    cdf = normal_cdf(x, square)
    if with_cache:
        derivative += cdf
    out = xp.multiply(x, cdf, out=square)  # in the buffer of square, which is free now
    return out, derivative if with_cache else None


def gelu_backward(dout, cache):
    """Return dx, of the shape of `dout`, for the gradient `dout` of `gelu_forward`'s out."""
    derivative = cache
    return array_module(dout).multiply(dout, derivative, out=empty_like(dout))


def gelu_tanh_forward(x, with_cache=True):
    """The tanh form: cdf(x) replaced by (1 + tanh(u)) / 2 with u = sqrt(2/pi) * (x + 0.044715 x**3).

    x: any shape, float. Returns out of the same shape, and the derivative or None, as `gelu_forward` does.
    `gelu_backward` serves both, because a cache holds a derivative whatever the formula was.
    """
    xp = array_module(x)
    scale = math.sqrt(2 / math.pi)
    square = xp.multiply(x, x, out=empty_like(x))
    tanh = xp.multiply(square, 0.044715 * scale, out=empty_like(x))  # at first u
    tanh += scale
    tanh *= x
    xp.tanh(tanh, out=tanh)
    out = xp.add(tanh, 1, out=empty_like(x))
    out *= x
    out *= 0.5

    # out = x (1 + tanh(u)) / 2, so its derivative is (1 + tanh(u)) / 2 + x (1 - tanh(u)**2) u' / 2
    if with_cache:
        slope = square  # in its buffer, which is free now
        slope *= 3 * 0.044715 * scale
        slope += scale  # u'
        slope *= x
        derivative = xp.multiply(tanh, tanh, out=empty_like(x))
        xp.subtract(1, derivative, out=derivative)
        derivative *= slope
        derivative += tanh
        derivative += 1
        derivative *= 0.5
    return out, derivative if with_cache else None


def normal_cdf(x, square):
    """Return the standard normal distribution function at x, (1 + erf(x / sqrt(2))) / 2.

    x: float, any shape; square: x * x, which is overwritten. In float32 on the CPU a polynomial inside a tanh
    (`_TANH_SERIES`) replaces erf: within 1.2e-7 of the true value, which is float32's own precision, and several
    times as fast.
    """
    xp = array_module(x)
    if xp is np and x.dtype == np.float32:
        xp.minimum(square, _LARGEST_SQUARE, out=square)
        cdf = xp.multiply(square, _TANH_SERIES[-1], out=empty_like(x))
        for coefficient in _TANH_SERIES[-2:0:-1]:  # Horner's rule
            cdf += coefficient
            cdf *= square
        cdf += _TANH_SERIES[0]
        cdf *= x
        xp.tanh(cdf, out=cdf)
    else:
        cdf = erf(x * (1 / math.sqrt(2)))
    cdf += 1
    cdf *= 0.5
    return cdf


# erf(x / sqrt(2)) = tanh(x * P(x**2)): P is smooth, so few terms do. Fitted for the least largest error of the
# distribution function on |x| < 5.5 (2.9e-8 in exact arithmetic), where float32 can no longer tell it from 1;
# `tests/heart/test_gelu.py` measures it. The tanh form of GELU above is the first two terms of this series, rounded.
_LARGEST_SQUARE = np.float32(5.5**2)
_TANH_SERIES = tuple(
    np.float32(c)
    for c in (
        7.97884941e-01,
        3.63330846e-02,
        -3.25949771e-05,
        -5.53061930e-05,
        3.96474426e-06,
        -1.32263325e-07,
        1.75617024e-09,
    )
)
