"""Multi-head attention for the class token alone, which is all that the last block of a classifier needs."""

import math
from typing import Any, NamedTuple

from tinyvit.memory import empty, empty_like, matmul, ones
from tinyvit.ops.attention import (
    AttentionCache,
    attention_backward,
    attention_forward,
    check_heads,
    split_heads,
    thirds,
)
from tinyvit.ops.linear import linear_backward, linear_forward


class ClassAttentionCache(NamedTuple):
    """What `class_attention_backward` needs of the forward pass."""

    q_linear: tuple  # the cache of the layer that gives the query
    attention: AttentionCache  # its weights are (B, H, T)
    out: tuple
    q: Any  # (B, D)
    seen: Any  # (B, H, D)
    w_qkv: Any
    heads: int


def class_attention_forward(x, w_qkv, b_qkv, w_out, b_out, heads):
    """The first token's part of `multi_head_attention_forward`, which is all that a classifier's last block needs.

    Arguments as there. Returns out (B, 1, D) and the cache for `class_attention_backward`.

    One query a head has no use for the keys and values of all tokens. With x for the tokens, and a head's columns of
    the weights and biases, its scores are q . (x w_k + b_k) = (q w_k.T) . x + q . b_k: take the query to the tokens
    instead of the tokens to the query. The last term is the same for every token, and softmax does not see it. In
    the same way weights . (x w_v + b_v) = (weights . x) w_v + b_v, as the weights sum to 1. It is the same function
    at a tenth of the work.
    """
    check_heads(x, heads)
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
    return out[:, None], ClassAttentionCache(q_cache, attention_cache, out_cache, q, seen, w_qkv, heads)


def class_attention_backward(dout, cache, dw_qkv=None, db_qkv=None, dw_out=None, db_out=None):
    """Return what `multi_head_attention_backward` does, for the gradient `dout` (B, 1, D) of out."""
    q_cache, attention_cache, out_cache, q, seen, w_qkv, heads = cache
    batch = len(q)
    dw_qkv = empty_like(w_qkv) if dw_qkv is None else dw_qkv
    db_qkv = empty(w_qkv.shape[1:], like=w_qkv) if db_qkv is None else db_qkv
    _, w_k, w_v = (split_heads(part, heads) for part in thirds(w_qkv))  # (H, D, K)
    dw_q, dw_k, dw_v = thirds(dw_qkv)
    db_q, db_k, db_v = thirds(db_qkv)
    dattended, dw_out, db_out = linear_backward(dout[:, 0], out_cache, dw_out, db_out)

    # attended = seen @ w_v + b_v, head by head, so
    matmul(ones(batch, like=dattended), dattended, out=db_v)
    dattended = split_heads(dattended, heads)  # (H, B, K)
    matmul(seen.swapaxes(0, 1).swapaxes(1, 2), dattended, out=split_heads(dw_v, heads))
    dseen = empty_like(seen)  # (B, H, D)
    matmul(dattended, w_v.swapaxes(1, 2), out=dseen.swapaxes(0, 1))

    # seen = attention(question, x, x), so x is reached twice
    dquestion, dx, dx_as_values = attention_backward(dseen, attention_cache)
    dx += dx_as_values

    # question = q @ w_k.T, head by head, and b_k has no part in anything, so
    dquestion = dquestion.swapaxes(0, 1)  # (H, B, D)
    matmul(dquestion.swapaxes(1, 2), split_heads(q, heads), out=split_heads(dw_k, heads))
    db_k[...] = 0
    dq = empty_like(q)
    matmul(dquestion, w_k, out=split_heads(dq, heads))

    dasking, _, _ = linear_backward(dq, q_cache, dw_q, db_q)
    dx[:, 0] += dasking
    return dx, dw_qkv, db_qkv, dw_out, db_out
