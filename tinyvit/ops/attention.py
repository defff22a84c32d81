"""Softmax attention, one head or many (Vaswani et al. 2017, "Attention Is All You Need", section 3.2)."""

import math

from tinyvit.backend import array_module
from tinyvit.memory import empty, empty_like, matmul, ones
from tinyvit.ops.linear import linear_backward, linear_forward


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
    dx = xp.subtract(dweights, along, out=product)  # in the buffer of product, which is done with
    dx *= weights
    return dx


def attention_forward(q, k, v, scale=None, out=None):
    """Each query takes the mean of the values, weighted by how well their keys fit it.

    q: (..., S, K); k, v: (..., T, K), float, where S queries look at T tokens; scale: of the scores, 1/sqrt(K) by
    default; out: where the result goes, if given.
    Returns out (..., S, K) and the cache, which begins with the attention weights (..., S, T).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = matmul(q, k.swapaxes(-1, -2), out=empty_scores(q, k))  # (..., S, T)
    scores *= scale
    weights, _ = softmax_forward(scores)
    return matmul(weights, v, out=out), (weights, q, k, v, scale)


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
    return out, (attention_cache, qkv_cache, out_cache, heads)


def multi_head_attention_backward(dout, cache, dw_qkv=None, db_qkv=None, dw_out=None, db_out=None):
    """Return dx (B, T, D), dw_qkv, db_qkv, dw_out, db_out for the gradient `dout` (B, T, D) of out.

    The last four, if given, are the arrays that are written and returned, as a view of a larger array may be.
    """
    attention_cache, qkv_cache, out_cache, heads = cache
    dattended, dw_out, db_out = linear_backward(dout, out_cache, dw_out, db_out)
    dqkv = empty((*dout.shape[:2], 3 * dout.shape[2]), like=dout)
    dq, dk, dv = (split_heads(part, heads) for part in thirds(dqkv))
    attention_backward(split_heads(dattended, heads), attention_cache, dq, dk, dv)
    dx, dw_qkv, db_qkv = linear_backward(dqkv, qkv_cache, dw_qkv, db_qkv)
    return dx, dw_qkv, db_qkv, dw_out, db_out


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
    return out[:, None], (attention_cache, q, seen, w_qkv, q_cache, out_cache, heads)


def class_attention_backward(dout, cache, dw_qkv=None, db_qkv=None, dw_out=None, db_out=None):
    """Return what `multi_head_attention_backward` does, for the gradient `dout` (B, 1, D) of out."""
    attention_cache, q, seen, w_qkv, q_cache, out_cache, heads = cache
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


def attention_weights(cache):
    """Return the attention weights (B, H, S, T) kept in the cache of either form, whose S tokens ask."""
    weights = cache[0][0]
    return weights if weights.ndim == 4 else weights[:, :, None]  # a lone query's are (B, H, T)


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
