"""Attention with one head, ``out = softmax(q @ k.T / sqrt(K)) @ v``, and with several heads."""

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit.checks import by_identity, require_arrays, require_cache, require_divisor, require_scalar
from tinyvit.memory import empty, empty_like, matmul
from tinyvit.ops.linear import linear_backward, linear_forward
from tinyvit.ops.softmax import softmax_backward, softmax_forward


@by_identity
class AttentionCache(NamedTuple):
    """Arrays of `attention_forward` that `attention_backward` reads."""

    weights: Any  # (..., S, T)
    q: Any
    k: Any
    v: Any
    scale: float


def attention_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, out: np.ndarray | None = None
) -> tuple[np.ndarray, AttentionCache]:
    """Compute a weighted mean of the values for each query.

    The weights of a query are the softmax of its scaled dot products with the keys.

    Parameters
    ----------
    q : ndarray of shape (..., S, K)
        Queries of S tokens.
    k : ndarray of shape (..., T, K)
        Keys of T tokens.
    v : ndarray of shape (..., T, K)
        Values of the same T tokens.
    scale : float, optional
        Factor of the dot products, ``1 / sqrt(K)`` by default.
    out : ndarray of shape (..., S, K), optional
        Array for the output, a new one by default.

    Returns
    -------
    out : ndarray of shape (..., S, K)
        Output.
    cache : AttentionCache
        Input of `attention_backward`.

    References
    ----------
    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    require_arrays("q (..., S, K), k (..., T, K), v (..., T, K), out (..., S, K) or None", q, k, v, out)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    require_scalar("scale", scale, minimum=-math.inf, maximum=math.inf, above=True, below=True)
    scores = matmul(q, k.swapaxes(-1, -2), out=empty_scores(q, k))  # (..., S, T)
    scores *= scale
    weights, _ = softmax_forward(scores)
    return matmul(weights, v, out=out), AttentionCache(weights=weights, q=q, k=k, v=v, scale=scale)


def attention_backward(
    dout: np.ndarray,
    cache: AttentionCache,
    dq: np.ndarray | None = None,
    dk: np.ndarray | None = None,
    dv: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the gradients of `attention_forward`.

    Parameters
    ----------
    dout : ndarray of shape (..., S, K)
        Gradient of the loss with respect to `out`.
    cache : AttentionCache
        Cache of `attention_forward`.
    dq : ndarray of shape (..., S, K), optional
        Array for the gradient of `q`, a new one by default.
    dk : ndarray of shape (..., T, K), optional
        Array for the gradient of `k`, a new one by default.
    dv : ndarray of shape (..., T, K), optional
        Array for the gradient of `v`, a new one by default.

    Returns
    -------
    dq : ndarray of shape (..., S, K)
        Gradient of `q`.
    dk : ndarray of shape (..., T, K)
        Gradient of `k`.
    dv : ndarray of shape (..., T, K)
        Gradient of `v`.
    """
    weights, q, k, v, scale = require_cache(cache, 5, "attention_forward")
    form = "q (..., S, K), k (..., T, K), dout (..., S, K), dq (..., S, K) or None, dk (..., T, K) or None, "
    require_arrays(form + "dv (..., T, K) or None", q, k, dout, dq, dk, dv)

    # out = weights @ v
    dweights = matmul(dout, v.swapaxes(-1, -2), out=empty_like(weights))  # (..., S, T)
    dv = matmul(weights.swapaxes(-1, -2), dout, out=dv)  # (..., T, K)

    # weights = softmax(scale * q @ k.T)
    dscores = softmax_backward(dweights, weights)
    dscores *= scale
    dq = matmul(dscores, k, out=dq)  # (..., S, K)
    dk = matmul(dscores.swapaxes(-1, -2), q, out=dk)  # (..., T, K)
    return dq, dk, dv


def empty_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return an uninitialised array (..., S, T) whose last axis is the outermost in memory.

    NumPy then sums over the T keys by adding T long vectors, which is ten times as fast as many sums of T neighbours.
    """
    *leading, queries, _ = q.shape
    scores = empty((k.shape[-2], *leading, queries), like=q)
    return scores.transpose([*range(1, scores.ndim), 0])


@by_identity
class MultiHeadAttentionCache(NamedTuple):
    """Caches of the parts of `multi_head_attention_forward`."""

    qkv: tuple
    attention: AttentionCache
    out: tuple
    heads: int


def multi_head_attention_forward(
    x: np.ndarray, w_qkv: np.ndarray, b_qkv: np.ndarray, w_out: np.ndarray, b_out: np.ndarray, heads: int
) -> tuple[np.ndarray, MultiHeadAttentionCache]:
    """Project each token to a query, a key and a value, apply attention in each head, and project the result.

    Parameters
    ----------
    x : ndarray of shape (B, T, D)
        Tokens.
    w_qkv : ndarray of shape (D, 3 * D)
        Weights of the first projection, with D columns each for the queries, the keys and the values.
    b_qkv : ndarray of shape (3 * D,)
        Bias of the first projection.
    w_out : ndarray of shape (D, D)
        Weights of the second projection.
    b_out : ndarray of shape (D,)
        Bias of the second projection.
    heads : int
        Number of heads H, a divisor of D. Head h uses the columns ``h * K`` to ``(h + 1) * K`` of each part.

    Returns
    -------
    out : ndarray of shape (B, T, D)
        Output.
    cache : MultiHeadAttentionCache
        Input of `multi_head_attention_backward`.

    Raises
    ------
    ValueError
        If `heads` does not divide D.

    References
    ----------
    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """
    check_projections(x, w_qkv, b_qkv, w_out, b_out, heads)
    qkv, qkv_cache = linear_forward(x, w_qkv, b_qkv)
    q, k, v = (split_heads(part, heads) for part in thirds(qkv))
    attended = empty(x.shape, like=x)  # (B, T, D): each head writes its own columns
    _, attention_cache = attention_forward(q, k, v, out=split_heads(attended, heads))
    out, out_cache = linear_forward(attended, w_out, b_out)
    return out, MultiHeadAttentionCache(qkv=qkv_cache, attention=attention_cache, out=out_cache, heads=heads)


def multi_head_attention_backward(
    dout: np.ndarray,
    cache: MultiHeadAttentionCache,
    dw_qkv: np.ndarray | None = None,
    db_qkv: np.ndarray | None = None,
    dw_out: np.ndarray | None = None,
    db_out: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """Compute the gradients of `multi_head_attention_forward`.

    Parameters
    ----------
    dout : ndarray of shape (B, T, D)
        Gradient of the loss with respect to `out`.
    cache : MultiHeadAttentionCache
        Cache of `multi_head_attention_forward`.
    dw_qkv : ndarray of shape (D, 3 * D), optional
        Array for the gradient of `w_qkv`, a new one by default.
    db_qkv : ndarray of shape (3 * D,), optional
        Array for the gradient of `b_qkv`, a new one by default.
    dw_out : ndarray of shape (D, D), optional
        Array for the gradient of `w_out`, a new one by default.
    db_out : ndarray of shape (D,), optional
        Array for the gradient of `b_out`, a new one by default.

    Returns
    -------
    dx : ndarray of shape (B, T, D)
        Gradient of `x`.
    dw_qkv : ndarray of shape (D, 3 * D)
        Gradient of `w_qkv`.
    db_qkv : ndarray of shape (3 * D,)
        Gradient of `b_qkv`.
    dw_out : ndarray of shape (D, D)
        Gradient of `w_out`.
    db_out : ndarray of shape (D,)
        Gradient of `b_out`.
    """
    qkv_cache, attention_cache, out_cache, heads = require_cache(cache, 4, "multi_head_attention_forward")
    form = "x (B, T, D), dout (B, T, D), dw_qkv (D, 3 * D) or None, db_qkv (3 * D) or None, "
    form += "dw_out (D, D) or None, db_out (D) or None"
    require_arrays(form, qkv_cache[0], dout, dw_qkv, db_qkv, dw_out, db_out)
    # out = attended @ w_out + b_out
    dattended, dw_out, db_out = linear_backward(dout, out_cache, dw=dw_out, db=db_out)
    # attended = attention(q, k, v), head by head
    dqkv = empty((*dout.shape[:2], 3 * dout.shape[2]), like=dout)
    dq, dk, dv = (split_heads(part, heads) for part in thirds(dqkv))
    attention_backward(split_heads(dattended, heads), attention_cache, dq=dq, dk=dk, dv=dv)
    # q, k, v = thirds(x @ w_qkv + b_qkv)
    dx, dw_qkv, db_qkv = linear_backward(dqkv, qkv_cache, dw=dw_qkv, db=db_qkv)
    return dx, dw_qkv, db_qkv, dw_out, db_out


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Return a view of `x` (..., T, D) as (..., H, T, K). Head h has the columns ``h * K`` to ``(h + 1) * K``."""
    *leading, tokens, width = x.shape
    return x.reshape(*leading, tokens, heads, width // heads).swapaxes(-3, -2)


def thirds(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return views of the three equal parts of the last axis: queries, keys and values."""
    width = x.shape[-1] // 3
    return x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]


def check_projections(
    x: np.ndarray, w_qkv: np.ndarray, b_qkv: np.ndarray, w_out: np.ndarray, b_out: np.ndarray, heads: int
) -> None:
    """Raise an error unless the arrays fit each other and `heads` divides the width of `x`."""
    form = "x (B, T, D), w_qkv (D, 3 * D), b_qkv (3 * D), w_out (D, D), b_out (D)"
    require_arrays(form, x, w_qkv, b_qkv, w_out, b_out)
    require_divisor("heads", heads, "the width of a token", x.shape[-1])
