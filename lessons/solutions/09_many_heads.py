"""Solutions of lesson 09: `python lessons/solutions/09_many_heads.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson

from tinyvit.ops import attention_backward, attention_forward


def exercise_1(o):
    batch, heads, tokens, width = o.shape
    return o.swapaxes(1, 2).reshape(batch, tokens, heads * width)


def wrong_1(o):
    """Reshaped only: the right shape, with the tokens of one head in a row."""
    batch, heads, tokens, width = o.shape
    return o.reshape(batch, tokens, heads * width)


def exercise_2(D, F):
    # 2 T^2 D = T (4 D^2 + 2 D F)
    return 2 * D + F


def wrong_2(D, F):
    """The MLP is forgotten: this is where attention's own linear layers are overtaken."""
    return 2 * D


def exercise_3(dy, o, w_out):
    batch, heads, tokens, width = o.shape
    # y = g[h] * o[h] @ w_out[h] + ..., so first back through w_out, to the heads side by side
    dside_by_side = dy @ w_out.T  # (B, T, D)
    do = dside_by_side.reshape(batch, tokens, heads, width).swapaxes(1, 2)  # (B, H, T, K), of g[h] * o[h]
    return (do * o).sum(axis=(0, 2, 3))  # g[h] is used by all that head h found


def wrong_3(dy, o, w_out):
    """The gradient is reshaped to heads without exchanging the axes: shapes fit, heads do not."""
    do = (dy @ w_out.T).reshape(o.shape)
    return (do * o).sum(axis=(0, 2, 3))


def wrong_3b(dy, o, w_out):
    """A mean over the images, where each of them has its say."""
    return exercise_3(dy, o, w_out) / len(dy)


def exercise_4(dout, q, k, v):
    scale = 1 / np.sqrt(q.shape[-1])
    k, v = k[:, None], v[:, None]  # (B, 1, T, K), the same for every head
    scores = scale * q @ k.swapaxes(-1, -2)  # (B, H, T, T)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
    dweights = dout @ v.swapaxes(-1, -2)
    dscores = scale * weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True))
    dq = dscores @ k
    # keys and values serve every head, so the heads' gradients add up
    dk = (dscores.swapaxes(-1, -2) @ q).sum(axis=1)
    dv = (weights.swapaxes(-1, -2) @ dout).sum(axis=1)
    return dq, dk, dv


def wrong_4(dout, q, k, v):
    """A mean over the heads for a sum: the direction is right, and the size is not."""
    every_head = np.broadcast_to(k[:, None], q.shape), np.broadcast_to(v[:, None], q.shape)
    _, cache = attention_forward(q, *every_head)
    dq, dk, dv = attention_backward(dout, cache)
    return dq, dk.mean(axis=1), dv.mean(axis=1)


if __name__ == "__main__":
    Lesson("09_many_heads").check_all(globals())
