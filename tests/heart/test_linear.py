"""out = x @ w + b, and its three gradients."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    SHAPES,
    assert_float32_agrees,
    assert_gradients_right,
    assert_workspace_changes_nothing,
    normal,
    seeds,
    small,
)

from tinyvit.ops import linear_backward, linear_forward

leading = st.lists(small, min_size=0, max_size=3).map(tuple)


@SHAPES
@given(leading, small, small, seeds)
@example((), 3, 2, 0)
@example((1, 1), 1, 1, 0)
@example((2, 3), 5, 4, 0)
def test_gradients(leading, inputs, outputs, seed):
    arrays = normal(seed, (*leading, inputs), (inputs, outputs), (outputs,))
    assert_gradients_right(linear_forward, linear_backward, arrays)


@SHAPES
@given(leading, small, small, seeds)
def test_values_are_sums_over_the_input_axis(leading, inputs, outputs, seed):
    x, w, b = normal(seed, (*leading, inputs), (inputs, outputs), (outputs,))
    out, _ = linear_forward(x, w, b)
    assert out.shape == (*leading, outputs)
    for place in np.ndindex(out.shape):
        expected = b[place[-1]] + sum(x[place[:-1]][i] * w[i, place[-1]] for i in range(inputs))
        assert out[place] == pytest.approx(expected, abs=1e-12)


def test_slices_of_wider_arrays_give_the_same_as_copies():
    wide_x, wide_w, wide_dout = normal(0, (2, 3, 10), (5, 9), (2, 6, 8))
    x, w, b, dout = wide_x[:, :, 2:7], wide_w[:, 1:5], normal(1, (4,)), wide_dout[:, ::2, ::2]

    def both(x, w, dout):
        out, cache = linear_forward(x, w, b)
        return out, *linear_backward(dout, cache)

    for got, expected in zip(both(x, w, dout), both(x.copy(), w.copy(), dout.copy()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_float32_agrees_with_float64():
    def both(x, w, b, dout):
        out, cache = linear_forward(x, w, b)
        return out, *linear_backward(dout, cache)

    assert_float32_agrees(both, normal(0, (3, 5, 16), (16, 12), (12,), (3, 5, 12)))


def test_a_workspace_changes_nothing():
    x, w, b, dout = normal(0, (3, 5, 4), (4, 6), (6,), (3, 5, 6))

    def compute():
        out, cache = linear_forward(x, w, b)
        return out, *linear_backward(dout, cache)

    assert_workspace_changes_nothing(compute)


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="matmul"):
        linear_forward(*normal(0, (2, 3), (4, 5), (5,)))
