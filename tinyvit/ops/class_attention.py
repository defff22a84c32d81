"""Multi-head attention that computes only the class token, as the last block of a classifier needs no other."""

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit.checks import by_identity, require_arrays, require_cache
from tinyvit.memory import empty, empty_like, matmul, ones
from tinyvit.ops.attention import (
    AttentionCache,
    attention_backward,
    attention_forward,
    check_projections,
    split_heads,
    thirds,
)
from tinyvit.ops.linear import linear_backward, linear_forward


@by_identity
class ClassAttentionCache(NamedTuple):
    """Arrays of `class_attention_forward` that `class_attention_backward` reads, and the caches of its parts."""

    q_linear: tuple
    attention: AttentionCache  # with weights (B, H, T)
    out: tuple
    q: Any  # (B, D)
    seen: Any  # (B, H, D)
    w_qkv: Any
    heads: int


def class_attention_forward(
    x: np.ndarray, w_qkv: np.ndarray, b_qkv: np.ndarray, w_out: np.ndarray, b_out: np.ndarray, heads: int
) -> tuple[np.ndarray, ClassAttentionCache]:
    """Compute ``multi_head_attention_forward(...)[:, :1]`` with a tenth of the work.

    Parameters
    ----------
    x : ndarray of shape (B, T, D)
        Tokens, the class token first.
    w_qkv : ndarray of shape (D, 3 * D)
        Weights of the first projection, with D columns each for the queries, the keys and the values.
    b_qkv : ndarray of shape (3 * D,)
        Bias of the first projection.
    w_out : ndarray of shape (D, D)
        Weights of the second projection.
    b_out : ndarray of shape (D,)
        Bias of the second projection.
    heads : int
        Number of heads H, a divisor of D.

    Returns
    -------
    out : ndarray of shape (B, 1, D)
        Output for the class token.
    cache : ClassAttentionCache
        Input of `class_attention_backward`.

    Raises
    ------
    ValueError
        If `heads` does not divide D.

    Notes
    -----
    A head has only one query, so the keys and values of all tokens need not be computed. The scores are
    ``q @ (x @ w_k + b_k).T = (q @ w_k.T) @ x.T + q @ b_k``. The last term is the same for every token, and softmax
    ignores a common shift. The result is ``weights @ (x @ w_v + b_v) = (weights @ x) @ w_v + b_v``, because the
    weights sum to 1. So attention runs on `x` itself. In the code, `question` is ``q @ w_k.T`` and `seen` is
    ``weights @ x``.
    """
    check_projections(x, w_qkv, b_qkv, w_out, b_out, heads)
    batch, _, width = x.shape
    w_q, w_k, w_v = thirds(w_qkv)
    b_q, _, b_v = thirds(b_qkv)
    q, q_cache = linear_forward(x[:, 0], w_q, b_q)

    question = empty((batch, heads, width), like=x)  # (B, H, D)
    matmul(split_heads(q, heads), split_heads(w_k, heads).swapaxes(1, 2), out=question.swapaxes(0, 1))
    seen, attention_cache = attention_forward(question, x, x, scale=1 / math.sqrt(width // heads))  # (B, H, D)
    attended = empty((batch, width), like=x)
    matmul(seen.swapaxes(0, 1), split_heads(w_v, heads), out=split_heads(attended, heads))
    attended += b_v

    out, out_cache = linear_forward(attended, w_out, b_out)
    return out[:, None], ClassAttentionCache(
        q_linear=q_cache,
        attention=attention_cache,
        out=out_cache,
        q=q,
        seen=seen,
        w_qkv=w_qkv,
        heads=heads,
    )


def class_attention_backward(
    dout: np.ndarray,
    cache: ClassAttentionCache,
    dw_qkv: np.ndarray | None = None,
    db_qkv: np.ndarray | None = None,
    dw_out: np.ndarray | None = None,
    db_out: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """Compute the gradients of `class_attention_forward`.

    Parameters
    ----------
    dout : ndarray of shape (B, 1, D)
        Gradient of the loss with respect to `out`.
    cache : ClassAttentionCache
        Cache of `class_attention_forward`.
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
        Gradient of `b_qkv`. Its part for the keys is zero.
    dw_out : ndarray of shape (D, D)
        Gradient of `w_out`.
    db_out : ndarray of shape (D,)
        Gradient of `b_out`.
    """
    q_cache, attention_cache, out_cache, q, seen, w_qkv, heads = require_cache(cache, 7, "class_attention_forward")
    form = "q (B, D), w_qkv (D, 3 * D), dout (B, 1, D), dw_qkv (D, 3 * D) or None, db_qkv (3 * D) or None, "
    form += "dw_out (D, D) or None, db_out (D) or None"
    require_arrays(form, q, w_qkv, dout, dw_qkv, db_qkv, dw_out, db_out)
    batch = len(q)
    dw_qkv = empty_like(w_qkv) if dw_qkv is None else dw_qkv
    db_qkv = empty(w_qkv.shape[1:], like=w_qkv) if db_qkv is None else db_qkv
    _, w_k, w_v = (split_heads(part, heads) for part in thirds(w_qkv))  # (H, D, K)
    dw_q, dw_k, dw_v = thirds(dw_qkv)
    db_q, db_k, db_v = thirds(db_qkv)

    # out = attended @ w_out + b_out
    dattended, dw_out, db_out = linear_backward(dout[:, 0], out_cache, dw=dw_out, db=db_out)

    # attended = seen @ w_v + b_v, head by head
    matmul(ones(batch, like=dattended), dattended, out=db_v)
    dattended = split_heads(dattended, heads)  # (H, B, K)
    matmul(seen.swapaxes(0, 1).swapaxes(1, 2), dattended, out=split_heads(dw_v, heads))
    dseen = empty_like(seen)  # (B, H, D)
    matmul(dattended, w_v.swapaxes(1, 2), out=dseen.swapaxes(0, 1))

    # seen = attention(question, x, x), where x serves as keys and as values
    dquestion, dx, dx_as_values = attention_backward(dseen, attention_cache)
    dx += dx_as_values

    # question = q @ w_k.T, head by head, without b_k
    dquestion = dquestion.swapaxes(0, 1)  # (H, B, D)
    matmul(dquestion.swapaxes(1, 2), split_heads(q, heads), out=split_heads(dw_k, heads))
    db_k[...] = 0
    dq = empty_like(q)
    matmul(dquestion, w_k, out=split_heads(dq, heads))

    # q = x[:, 0] @ w_q + b_q
    dclass, _, _ = linear_backward(dq, q_cache, dw=dw_q, db=db_q)
    dx[:, 0] += dclass
    return dx, dw_qkv, db_qkv, dw_out, db_out
