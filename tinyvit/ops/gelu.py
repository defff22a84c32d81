"""The Gaussian error linear unit, ``out = x * cdf(x)``, and its approximation by tanh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvit.backend import array_module, erf, loops_for
from tinyvit.checks import require_arrays
from tinyvit.memory import empty_like

Forward = Callable[..., tuple[np.ndarray, Any]]


def with_limits(forward: Forward) -> Forward:
    """Make a form of GELU return its limits for infinite elements, where the formula would be infinity times 0."""

    @functools.wraps(forward)
    def with_limits(x, with_cache=True):
        try:
            with np.errstate(invalid="raise"):
                return forward(x, with_cache)
        except FloatingPointError:
            out, derivative = forward(np.clip(x, -40, 40), with_cache)  # from 40 on, the factors are exactly 0 and 1
            return np.where(x > 40, x, out), derivative

    return with_limits


@with_limits
def gelu_forward(x: np.ndarray, with_cache: bool = True) -> tuple[np.ndarray, Any]:
    """Multiply each element by the probability that a standard normal variable is below it.

    Parameters
    ----------
    x : ndarray
        Input of any shape. On a GPU the result for an infinite element is NaN.
    with_cache : bool, default True
        Whether to compute the cache. Without a backward pass it is not needed.

    Returns
    -------
    out : ndarray of the shape of `x`
        Output.
    cache : ndarray of the shape of `x`, or None
        Derivative of `out`. It is computed here because it needs `cdf(x)` too.

    References
    ----------
    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units (GELUs)".
    """
    require_arrays("x (...)", x)
    if loops := loops_for(x):
        out = empty_like(x)
        derivative: Any = empty_like(x) if with_cache else None
        if with_cache:
            loops.gelu_forward(x.ravel(), out.ravel(), derivative.ravel())
        else:
            loops.gelu_values(x.ravel(), out.ravel())
        return out, derivative

    xp = array_module(x)
    square = xp.multiply(x, x, out=empty_like(x))

    # out = x * cdf(x)
    # derivative = x * density(x) + cdf(x) with density(x) = exp(-x**2 / 2) / sqrt(2 pi)
    if with_cache:
        derivative = xp.multiply(square, -0.5, out=empty_like(x))  # holds the exponent, then the density
        xp.exp(derivative, out=derivative)
        derivative *= 1 / math.sqrt(2 * math.pi)
        derivative *= x
    cdf = normal_cdf(x, square)
    if with_cache:
        derivative += cdf
    out = xp.multiply(x, cdf, out=square)  # reuses the memory of square
    return out, derivative if with_cache else None


def gelu_backward(dout: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """Compute the gradient of `gelu_forward` or of `gelu_tanh_forward`.

    Parameters
    ----------
    dout : ndarray
        Gradient of the loss with respect to `out`.
    cache : ndarray of the shape of `dout`
        Cache of the forward pass, which is the derivative of `out`.

    Returns
    -------
    ndarray of the shape of `dout`
        Gradient of `x`.
    """
    derivative = cache
    require_arrays("cache (...), dout (...)", derivative, dout)
    return array_module(dout).multiply(dout, derivative, out=empty_like(dout))


@with_limits
def gelu_tanh_forward(x: np.ndarray, with_cache: bool = True) -> tuple[np.ndarray, Any]:
    """Compute GELU with an approximate `cdf`, as some published models do.

    The approximation is ``cdf(x) = (1 + tanh(u)) / 2`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x**3)``.

    Parameters
    ----------
    x : ndarray
        Input of any shape. On a GPU the result for an infinite element is NaN.
    with_cache : bool, default True
        Whether to compute the cache. Without a backward pass it is not needed.

    Returns
    -------
    out : ndarray of the shape of `x`
        Output.
    cache : ndarray of the shape of `x`, or None
        Derivative of `out`, the input of `gelu_backward`.
    """
    require_arrays("x (...)", x)
    xp = array_module(x)
    scale = math.sqrt(2 / math.pi)
    square = xp.multiply(x, x, out=empty_like(x))
    tanh = xp.multiply(square, 0.044715 * scale, out=empty_like(x))  # holds u, and below tanh(u)
    tanh += scale
    tanh *= x
    xp.tanh(tanh, out=tanh)
    out = xp.add(tanh, 1, out=empty_like(x))
    out *= x
    out *= 0.5

    # out = x * (1 + tanh(u)) / 2
    # derivative = (1 + tanh(u)) / 2 + x * (1 - tanh(u)**2) * slope / 2, where slope is the derivative of u
    if with_cache:
        slope = square  # reuses the memory of square
        slope *= 3 * 0.044715 * scale
        slope += scale
        slope *= x  # now x * slope
        derivative = xp.multiply(tanh, tanh, out=empty_like(x))
        xp.subtract(1, derivative, out=derivative)
        derivative *= slope
        derivative += tanh
        derivative += 1
        derivative *= 0.5
    return out, derivative if with_cache else None


def normal_cdf(x: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Return the standard normal distribution function ``(1 + erf(x / sqrt(2))) / 2``.

    It overwrites `square`, which is ``x * x``. In float32 on a CPU, `_TANH_SERIES` replaces `erf`. This is several
    times as fast, and the error is at most 1.2e-7, which is the precision of float32.
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


# Coefficients of the polynomial P in erf(x / sqrt(2)) = tanh(x * P(x**2)). They minimise the largest error of
# `normal_cdf` for |x| < 5.5, which is 2.9e-8 in exact arithmetic. From 5.5 on, float32 rounds the result to 1.
# `tests/heart/test_gelu.py` repeats the fit. `gelu_tanh_forward` uses the first two terms, with other roundings.
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
