"""The checks of lesson 14's exercises: things that are right and things that are wrong, to be told apart."""

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.optim import Adam


def check_1(answer):
    yield "dx for x = [[3, 4]], dout = [[1, 0]]", answer(np.array([[1.0, 0]]), np.array([[3.0, 4]])), _by_hand()
    rng = np.random.default_rng(1)
    for rows, width in ((4, 3), (2, 7)):
        x, dout = rng.standard_normal((2, rows, width))
        expected = numerical_gradients(lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True), None), [x], dout)[0]
        yield f"dx for {rows} rows of {width}", answer(dout, x), expected


def _by_hand():
    # y = [0.6, 0.8] and |x| = 5: dx = (dout - y (y . dout)) / |x| = ([1, 0] - 0.6 [0.6, 0.8]) / 5
    return np.array([[0.128, -0.096]])


def _softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _softmax_wrong_axis(x):
    weights = np.exp(x - x.max(axis=0, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _softmax_no_maximum(x):
    with np.errstate(all="ignore"):
        weights = np.exp(x)
        return weights / weights.sum(axis=-1, keepdims=True)


def _shares_of_squares(x):
    squares = (x - x.min(axis=-1, keepdims=True) + 1) ** 2
    return squares / squares.sum(axis=-1, keepdims=True)


def check_2(answer):
    yield "a softmax", answer(_softmax), True
    yield "a softmax that sums over the first axis", answer(lambda x: _softmax(x.T).T), False
    yield "a maximum along the wrong axis", answer(_softmax_wrong_axis), False
    yield "no maximum: right for small numbers, and then it overflows", answer(_softmax_no_maximum), False
    yield "shares that add up to one, but are no exponentials", answer(_shares_of_squares), False
    yield "a softmax of half of x", answer(lambda x: _softmax(x / 2)), False
    yield "a softmax written in another way", answer(lambda x: np.exp(x - np.logaddexp.reduce(x, -1)[:, None])), True


class _Frozen(Adam):
    def step(self, flat, gradient, learning_rate):
        self.steps = 0
        super().step(flat, gradient, learning_rate)


class _Wiped(Adam):
    def step(self, flat, gradient, learning_rate):
        self.first_moment[...] = 0
        self.second_moment[...] = 0
        super().step(flat, gradient, learning_rate)


def check_3(answer):
    for name, make in (("right", Adam), ("frozen", _Frozen), ("wiped", _Wiped), ("right", Adam)):
        yield "an optimiser that you can only watch", answer(make), name


def check_4(answer):
    rng = np.random.default_rng(4)
    shapes = {"w_in": (6, 6), "w_out": (6, 6), "b_out": (6,), "w_1": (6, 9), "w_2": (9, 6), "b_2": (6,)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    before = {name: array.copy() for name, array in weights.items()}
    x = rng.standard_normal((5, 6))

    def block(attention, mlp):
        def forward(x, p):
            scores = x @ p["w_in"] @ x.T
            x = attention * x + _softmax(scores) @ x @ p["w_out"] + p["b_out"]
            return mlp * x + np.tanh(x @ p["w_1"]) @ p["w_2"] + p["b_2"]

        return forward

    for expected, branches in (("both", (1, 1)), ("attention", (0, 1)), ("mlp", (1, 0)), ("none", (0, 0))):
        yield f"a block with {sum(branches)} residual branches", answer(block(*branches), x, weights), expected
    yield "the weights are as they were", all(np.array_equal(before[name], weights[name]) for name in weights), True
