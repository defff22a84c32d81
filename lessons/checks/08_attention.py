"""The checks of lesson 08's exercises. What is expected comes from the forward pass alone, by central differences."""

import math

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import attention_forward, softmax_forward


def check_1(answer):
    yield (
        "the Jacobian of the weights [0.75, 0.25]",
        answer(np.array([0.75, 0.25])),
        0.1875 * np.array([[1.0, -1.0], [-1.0, 1.0]]),
    )
    scores = np.random.default_rng(1).standard_normal(5)
    columns = [numerical_gradients(softmax_forward, [scores], row)[0] for row in np.eye(5)]  # each output by itself
    yield "the Jacobian of five weights", answer(softmax_forward(scores)[0]), np.stack(columns)


def check_2(answer):
    scores = np.log(np.array([[1.0, 3.0, 4.0], [2.0, 2.0, 5.0]]))
    visible = np.array([[True, True, False], [False, True, False]])
    expected = np.array([[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]])
    yield (
        "scores log [1, 3, 4] and log [2, 2, 5], of which two and one are visible",
        answer(scores, visible),
        expected,
    )
    rng = np.random.default_rng(2)
    scores = 100 * rng.standard_normal((6, 6))
    scores[0, -1] = 2000.0  # invisible
    visible = np.tri(6, dtype=bool)
    expected = np.zeros((6, 6))
    for s in range(6):
        expected[s, : s + 1] = softmax_forward(scores[s, : s + 1])[0]
    yield "large scores (6, 6), each token seeing itself and those before it", answer(scores, visible), expected


def check_3(answer):
    rng = np.random.default_rng(3)
    for queries, tokens, width in ((1, 2, 1), (3, 5, 4)):
        q, (k, v) = rng.standard_normal((queries, width)), rng.standard_normal((2, tokens, width))
        dout, c = rng.standard_normal((queries, width)), np.array(0.7)
        expected = numerical_gradients(lambda c, q=q, k=k, v=v: attention_forward(q, k, v, scale=float(c)), [c], dout)
        yield f"dc for q {q.shape}, k and v {k.shape}", answer(dout, q, k, v, 0.7), float(expected[0])


def check_4(answer):
    q, k, v = np.array([[1.0]]), np.log(np.array([[1.0], [3.0], [4.0]])), np.array([[8.0], [16.0], [0.0]])
    yield "weights 1/8, 3/8, 4/8 of the values 8, 16, 0, two at a time", answer(q, k, v, 2), np.array([[7.0]])
    rng = np.random.default_rng(4)
    for queries, tokens, width, chunk, size in ((3, 7, 4, 2, 1), (2, 6, 3, 3, 1), (4, 9, 5, 4, 30), (2, 5, 2, 8, 30)):
        q, (k, v) = size * rng.standard_normal((queries, width)), rng.standard_normal((2, tokens, width))
        k *= size
        expected, _ = attention_forward(q, k, v, scale=1 / math.sqrt(width))
        what = f"{queries} queries, {tokens} tokens, {chunk} at a time, scores of about {size**2}"
        yield what, answer(q, k, v, chunk), expected
