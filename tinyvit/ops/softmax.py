"""Softmax, ``weights = exp(x) / sum(exp(x))`` over the last axis."""

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checks import require_arrays
from tinyvit.memory import empty_like


def softmax_forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn the last axis into positive weights that sum to 1.

    Parameters
    ----------
    x : ndarray of shape (..., K)
        Input.

    Returns
    -------
    weights : ndarray of shape (..., K)
        Output.
    cache : ndarray of shape (..., K)
        Input of `softmax_backward`, which is the same array as `weights`.
    """
    require_arrays("x (..., K)", x)
    xp = array_module(x)
    # exp(x - c) / sum(exp(x - c)) is the same for every c, and with c = max(x) exp cannot overflow
    weights = xp.subtract(x, x.max(axis=-1, keepdims=True), out=empty_like(x))
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, weights


def softmax_backward(dweights: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """Compute the gradient of `softmax_forward`.

    Parameters
    ----------
    dweights : ndarray of shape (..., K)
        Gradient of the loss with respect to `weights`.
    cache : ndarray of shape (..., K)
        Cache of `softmax_forward`.

    Returns
    -------
    ndarray of shape (..., K)
        Gradient of `x`.
    """
    weights = cache
    require_arrays("cache (..., K), dweights (..., K)", weights, dweights)
    xp = array_module(weights)
    # d weights[i] / d x[j] = weights[i] * ((i == j) - weights[j])
    # dx[j] = weights[j] * (dweights[j] - sum over i of dweights[i] * weights[i])
    product = xp.multiply(dweights, weights, out=empty_like(weights))
    along = product.sum(axis=-1, keepdims=True)
    dx = xp.subtract(dweights, along, out=product)  # reuses the memory of product
    dx *= weights
    return dx
