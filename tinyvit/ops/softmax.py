"""Softmax over the last axis."""

from tinyvit.backend import array_module
from tinyvit.memory import empty_like


def softmax_forward(x):
    """Softmax over the last axis: x (..., N) float; returns weights (..., N), which are the cache as well."""
    xp = array_module(x)
    # exp(x - c) / sum(exp(x - c)) is the same for every c: with the largest x as c nothing overflows
    weights = xp.subtract(x, x.max(axis=-1, keepdims=True), out=empty_like(x))
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, weights  # its backward needs nothing but the result


def softmax_backward(dweights, cache):
    """Return dx (..., N) for the gradient `dweights` (..., N) of `softmax_forward`'s weights."""
    weights = cache
    xp = array_module(weights)
    # d weights[i] / d x[j] = weights[i] * ((i == j) - weights[j]), so
    # dx[j] = weights[j] * (dweights[j] - sum over i of dweights[i] weights[i])
    product = xp.multiply(dweights, weights, out=empty_like(weights))
    along = product.sum(axis=-1, keepdims=True)
    dx = xp.subtract(dweights, along, out=product)  # in the buffer of product, which is free now
    dx *= weights
    return dx
