"""The checks of lesson 09's exercises. Most of what is expected is found by central differences, or by looking."""

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import attention_forward


def check_1(answer):
    small = np.arange(8.0).reshape(1, 2, 2, 2)  # head 0 has 0 1 and 2 3, head 1 has 4 5 and 6 7
    expected = np.array([[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]])
    yield "two heads, two tokens, two numbers each", answer(small), expected
    o = np.random.default_rng(1).standard_normal((3, 4, 5, 2))
    yield "o (3, 4, 5, 2)", answer(o), np.concatenate([o[:, h] for h in range(4)], axis=2)


def check_2(answer):
    for D, F in ((1, 1), (128, 512), (64, 128), (768, 3072)):
        tokens = next(T for T in range(1, 10_000) if 2 * T * T * D >= T * (4 * D * D + 2 * D * F))
        yield f"tokens for D = {D}, F = {F}", answer(D, F), tokens


def check_3(answer):
    rng = np.random.default_rng(3)
    for batch, heads, tokens, width in ((1, 2, 1, 1), (2, 3, 4, 2)):
        o = rng.standard_normal((batch, heads, tokens, width))
        w_out = rng.standard_normal((heads * width, heads * width))
        dy = rng.standard_normal((batch, tokens, heads * width))

        def output(g, o=o, w_out=w_out):
            K = o.shape[-1]
            return sum(g[h] * o[:, h] @ w_out[h * K : (h + 1) * K] for h in range(len(g))), None

        expected = numerical_gradients(output, [np.ones(heads)], dy)
        yield f"dg for o {o.shape}", answer(dy, o, w_out), expected[0]


def check_4(answer):
    rng = np.random.default_rng(4)
    for batch, heads, tokens, width in ((1, 2, 2, 1), (2, 3, 4, 5)):
        q, dout = rng.standard_normal((2, batch, heads, tokens, width))
        k, v = rng.standard_normal((2, batch, tokens, width))

        def shared(q, k, v):
            every_head = np.broadcast_to(k[:, None], q.shape), np.broadcast_to(v[:, None], q.shape)
            return attention_forward(q, *every_head)[0], None

        expected = numerical_gradients(shared, [q, k, v], dout)
        yield f"dq, dk, dv for q {q.shape}, k and v {k.shape}", answer(dout, q, k, v), tuple(expected)
