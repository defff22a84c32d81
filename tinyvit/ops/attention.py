"""Softmax attention, one head or many (Vaswani et al. 2017, "Attention Is All You Need", section 3.2)."""

import math
from typing import Any, NamedTuple

from tinyvit.memory import empty, empty_like, matmul
from tinyvit.ops.linear import linear_backward, linear_forward
from tinyvit.ops.softmax import softmax_backward, softmax_forward


class AttentionCache(NamedTuple):
    """What `attention_backward` needs of the forward pass."""

    weights: Any  # (..., S, T)
    q: Any
    k: Any
    v: Any
    scale: float


def attention_forward(q, k, v, scale=None, out=None):
    """Each query takes the mean of the values, weighted by how well their keys fit it.

    q: (..., S, K); k, v: (..., T, K), float, where S queries look at T tokens; scale: of the scores, 1/sqrt(K) by
    default; out: where the result goes, if given.
    Returns out (..., S, K) and the cache.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = matmul(q, k.swapaxes(-1, -2), out=empty_scores(q, k))  # (..., S, T)
    scores *= scale
    weights, _ = softmax_forward(scores)
    return matmul(weights, v, out=out), AttentionCache(weights, q, k, v, scale)


def attention_backward(dout, cache, dq=None, dk=None, dv=None):
    """Return dq (..., S, K), dk and dv (..., T, K) for the gradient `dout` of `attention_forward`'s out.

    dq, dk and dv, if given, are the arrays that are written and returned, as a view of a larger array may be.
    """
    weights, q, k, v, scale = cache

    # out = weights @ v, so
    dweights = matmul(dout, v.swapaxes(-1, -2), out=empty_like(weights))  # (..., S, T)
    dv = matmul(weights.swapaxes(-1, -2), dout, out=dv)  # (..., T, K)

    # weights = softmax(scale * q @ k.T), so
    dscores = softmax_backward(dweights, weights)
    dscores *= scale
    dq = matmul(dscores, k, out=dq)  # (..., S, K)
    dk = matmul(dscores.swapaxes(-1, -2), q, out=dk)  # (..., T, K)
    return dq, dk, dv


def empty_scores(q, k):
    """Return an uninitialised array (..., S, T) whose last axis, the keys, is the outermost in memory.

    A softmax goes along the keys. There are few of them: side by side in memory they would make many short sums, and
    far apart they make few long ones, which is ten times as fast.
    """
    *leading, queries, _ = q.shape
    scores = empty((k.shape[-2], *leading, queries), like=q)
    return scores.transpose([*range(1, scores.ndim), 0])


class MultiHeadAttentionCache(NamedTuple):
    """What `multi_head_attention_backward` needs of the forward pass: the caches of its parts."""

    qkv: tuple
    attention: AttentionCache
    out: tuple
    heads: int


def multi_head_attention_forward(x, w_qkv, b_qkv, w_out, b_out, heads):
    """Project every token to a query, a key and a value, attend in `heads` slices of the width, and project.

    x: (B, T, D) float; w_qkv: (D, 3D), columns for queries, keys, values; b_qkv: (3D,); w_out: (D, D);
    b_out: (D,); heads divides D. Returns out (B, T, D) and the cache for `multi_head_attention_backward`.
    Raises `ValueError` if heads does not divide D.
    """
    check_heads(x, heads)
    qkv, qkv_cache = linear_forward(x, w_qkv, b_qkv)
    q, k, v = (split_heads(part, heads) for part in thirds(qkv))
    attended = empty(x.shape, like=x)  # (B, T, D): every head writes its columns
    _, attention_cache = attention_forward(q, k, v, out=split_heads(attended, heads))
    out, out_cache = linear_forward(attended, w_out, b_out)
    return out, MultiHeadAttentionCache(qkv_cache, attention_cache, out_cache, heads)


def multi_head_attention_backward(dout, cache, dw_qkv=None, db_qkv=None, dw_out=None, db_out=None):
    """Return dx (B, T, D), dw_qkv, db_qkv, dw_out, db_out for the gradient `dout` (B, T, D) of out.

    The last four, if given, are the arrays that are written and returned, as a view of a larger array may be.
    """
    qkv_cache, attention_cache, out_cache, heads = cache
    dattended, dw_out, db_out = linear_backward(dout, out_cache, dw_out, db_out)
    dqkv = empty((*dout.shape[:2], 3 * dout.shape[2]), like=dout)
    dq, dk, dv = (split_heads(part, heads) for part in thirds(dqkv))
    attention_backward(split_heads(dattended, heads), attention_cache, dq, dk, dv)
    dx, dw_qkv, db_qkv = linear_backward(dqkv, qkv_cache, dw_qkv, db_qkv)
    return dx, dw_qkv, db_qkv, dw_out, db_out


def split_heads(x, heads):
    """View x (..., T, D) as (..., H, T, K): head h has the columns h*K to (h+1)*K."""
    *leading, tokens, width = x.shape
    return x.reshape(*leading, tokens, heads, width // heads).swapaxes(-3, -2)


def thirds(x):
    """View the last axis in its three parts, for queries, keys and values."""
    width = x.shape[-1] // 3
    return x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]


def check_heads(x, heads):
    """Raise `ValueError` unless heads divides the width of x."""
    if x.shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide a width of {x.shape[-1]}")
