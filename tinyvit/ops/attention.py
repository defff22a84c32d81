"""Softmax attention, one head or many (Vaswani et al. 2017, "Attention Is All You Need", section 3.2)."""

import math

from tinyvit.backend import array_module, empty, matmul
from tinyvit.ops.linear import linear_backward, linear_forward


def softmax_forward(x):
    """Softmax over the last axis: x (..., N) float; returns weights (..., N), which are the cache as well."""
    xp = array_module(x)
    # exp(x - c) / sum(exp(x - c)) is the same for every c: with the largest x as c nothing overflows
    weights = xp.subtract(x, x.max(axis=-1, keepdims=True), out=empty(x.shape, like=x))
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, weights  # its backward needs nothing but the result


def softmax_backward(dweights, cache):
    """Return dx (..., N) for the gradient `dweights` (..., N) of `softmax_forward`'s weights."""
    weights = cache
    # d weights[i] / d x[j] = weights[i] * ((i == j) - weights[j]), so
    dx = array_module(weights).multiply(dweights, weights, out=empty(weights.shape, like=weights))
    along = dx.sum(axis=-1, keepdims=True)  # sum over i of dweights[i] weights[i]
    dx -= weights * along
    return dx


def attention_forward(q, k, v):
    """Each query takes the mean of the values, weighted by how well their keys fit it.

    q: (..., S, K); k, v: (..., T, K), float, where S queries look at T tokens.
    Returns out (..., S, K) and the cache, whose last entry is the attention weights (..., S, T).
    """
    scale = 1 / math.sqrt(q.shape[-1])
    scores = matmul(q, k.swapaxes(-1, -2))  # (..., S, T)
    scores *= scale
    weights, _ = softmax_forward(scores)
    return matmul(weights, v), (q, k, v, weights)


def attention_backward(dout, cache):
    """Return dq (..., S, K), dk and dv (..., T, K) for the gradient `dout` of `attention_forward`'s out."""
    q, k, v, weights = cache
    scale = 1 / math.sqrt(q.shape[-1])

    # out = weights @ v, so
    dweights = matmul(dout, v.swapaxes(-1, -2))  # (..., S, T)
    dv = matmul(weights.swapaxes(-1, -2), dout)  # (..., T, K)

    # weights = softmax(scale * q @ k.T), so
    dscores = softmax_backward(dweights, weights)
    dscores *= scale
    dq = matmul(dscores, k)  # (..., S, K)
    dk = matmul(dscores.swapaxes(-1, -2), q)  # (..., T, K)
    return dq, dk, dv


def multi_head_attention_forward(x, w_qkv, b_qkv, w_out, b_out, heads, queries=None):
    """Project every token to a query, a key and a value, attend in `heads` slices of the width, and project.

    x: (B, T, D) float; w_qkv: (D, 3D), columns for queries, keys, values; b_qkv: (3D,); w_out: (D, D);
    b_out: (D,); heads divides D. queries: how many of the first tokens ask, all by default. A classifier reads
    one token of its last block: to let only that one ask is the same function at a fraction of the work.
    Returns out (B, queries, D) and the cache for `multi_head_attention_backward`.
    Raises `ValueError` if heads does not divide D.
    """
    _, _, width = x.shape
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    asking = x if queries is None else x[:, :queries]
    q, q_cache = linear_forward(asking, w_qkv[:, :width], b_qkv[:width])
    kv, kv_cache = linear_forward(x, w_qkv[:, width:], b_qkv[width:])
    k, v = kv[..., :width], kv[..., width:]
    attended, attention_cache = attention_forward(
        split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
    )
    out, out_cache = linear_forward(merge_heads(attended), w_out, b_out)
    return out, (q_cache, kv_cache, attention_cache, out_cache)


def multi_head_attention_backward(dout, cache):
    """Return dx (B, T, D), dw_qkv, db_qkv, dw_out, db_out for the gradient `dout` (B, queries, D) of out."""
    q_cache, kv_cache, attention_cache, out_cache = cache
    heads = attention_cache[0].shape[1]  # of q, (B, H, S, K)
    width = dout.shape[-1]
    dmerged, dw_out, db_out = linear_backward(dout, out_cache)
    dq, dk, dv = attention_backward(split_heads(dmerged, heads), attention_cache)
    dkv = empty((*dk.shape[:1], dk.shape[2], 2 * width), like=dout)  # (B, T, 2D)
    merge_heads(dk, out=dkv[..., :width])
    merge_heads(dv, out=dkv[..., width:])
    dasking, dw_q, db_q = linear_backward(merge_heads(dq), q_cache)
    dx, dw_kv, db_kv = linear_backward(dkv, kv_cache)
    dx[:, : dasking.shape[1]] += dasking  # a token that asks is read twice
    xp = array_module(dout)
    return dx, xp.concatenate([dw_q, dw_kv], axis=1), xp.concatenate([db_q, db_kv]), dw_out, db_out


def attention_weights(cache):
    """Return the attention weights (B, H, queries, T) kept in the cache of `multi_head_attention_forward`."""
    return cache[2][-1]


def split_heads(x, heads):
    """View x (B, T, D) as (B, H, T, K): head h takes the columns h*K to (h+1)*K."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).swapaxes(1, 2)


def merge_heads(x, out=None):
    """Copy x (B, H, T, K) to (B, T, D), a new array or `out`: the inverse of `split_heads`."""
    batch, heads, tokens, per_head = x.shape
    if out is None:
        out = empty((batch, tokens, heads * per_head), like=x)
    out.reshape(batch, tokens, heads, per_head)[...] = x.swapaxes(1, 2)
    return out
