"""Layer normalisation: mean 0, variance 1, and a gradient that acts in three ways."""

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

from tinyvit.gradcheck import gradient_error
from tinyvit.ops import layer_norm_backward, layer_norm_forward

leading = st.lists(small, min_size=0, max_size=2).map(tuple)


@SHAPES
@given(leading, small, seeds)
@example((), 3, 0)
@example((1, 1), 1, 0)
@example((2, 3), 5, 0)
def test_gradients(leading, width, seed):
    # the default epsilon would make a kink where two elements happen to be equal
    arrays = normal(seed, (*leading, width), (width,), (width,))
    assert_gradients_right(lambda x, w, b: layer_norm_forward(x, w, b, 0.1), layer_norm_backward, arrays)


def test_gradients_with_the_default_epsilon():
    assert_gradients_right(layer_norm_forward, layer_norm_backward, normal(0, (2, 3, 7), (7,), (7,)))


@pytest.mark.parametrize("dropped", ["mean", "deviation"])
def test_the_check_sees_a_way_that_was_forgotten(dropped):
    def backward(dout, cache):
        normalised, inverse_deviation, w = cache
        dx, dw, db = layer_norm_backward(dout, cache)
        dnormalised = dout.reshape(normalised.shape) * w
        through = {
            "mean": dnormalised.mean(axis=-1, keepdims=True),
            "deviation": normalised * (dnormalised * normalised).mean(axis=-1, keepdims=True),
        }
        return dx + (through[dropped] * inverse_deviation).reshape(*dx.shape[:-1], -1), dw, db

    dx_error, *others = gradient_error(layer_norm_forward, backward, normal(0, (2, 3, 7), (7,), (7,)))
    assert dx_error > 0.05
    assert max(others) < 1e-8


def test_mean_is_zero_and_variance_is_one():
    x = 5 + 3 * normal(0, (2, 3, 50))
    out, _ = layer_norm_forward(x, np.ones(50), np.zeros(50), 1e-12)
    np.testing.assert_allclose(out.mean(axis=-1), 0, atol=1e-12)
    np.testing.assert_allclose(out.var(axis=-1), 1, atol=1e-12)


@SHAPES
@given(st.floats(-100, 100), st.floats(0.01, 100), seeds)
def test_shift_and_scale_of_the_input_are_ignored(shift, scale, seed):
    # exactly so once epsilon, which is a variance, is scaled as one
    x, w, b = normal(seed, (2, 6), (6,), (6,))
    out, _ = layer_norm_forward(x, w, b, 1e-3)
    np.testing.assert_allclose(layer_norm_forward(scale * x + shift, w, b, 1e-3 * scale**2)[0], out, atol=1e-9)


def test_the_gradient_has_no_part_along_a_shift_or_a_scale():
    # what the output ignores must have the slope zero: of out . dout along ones, and along x - mean
    x, w, b, dout = normal(0, (4, 9), (9,), (9,), (4, 9))
    dx, _, _ = layer_norm_backward(dout, layer_norm_forward(x, w, b, 0.0)[1])
    np.testing.assert_allclose(dx.sum(axis=-1), 0, atol=1e-13)
    np.testing.assert_allclose((dx * (x - x.mean(axis=-1, keepdims=True))).sum(axis=-1), 0, atol=1e-13)


def test_an_even_input_gives_the_bias_and_finite_gradients():
    w, b, dout = normal(0, (6,), (6,), (2, 6))
    out, cache = layer_norm_forward(np.full((2, 6), 7.0), w, b)
    np.testing.assert_array_equal(out, np.broadcast_to(b, (2, 6)))
    assert all(np.isfinite(gradient).all() for gradient in layer_norm_backward(dout, cache))


def both(x, w, b, dout):
    out, cache = layer_norm_forward(x, w, b)
    return out, *layer_norm_backward(dout, cache)


def test_a_slice_of_a_wider_array_gives_the_same_as_a_copy():
    # the model normalises x[:, 0] in the end
    x, w, b, dout = normal(0, (3, 4, 7), (7,), (7,), (3, 7))
    for got, expected in zip(both(x[:, 0], w, b, dout), both(x[:, 0].copy(), w, b, dout), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_float32_agrees_with_float64():
    assert_float32_agrees(both, normal(0, (3, 5, 16), (16,), (16,), (3, 5, 16)))


def test_a_workspace_changes_nothing():
    arrays = normal(0, (3, 5, 4), (4,), (4,), (3, 5, 4))
    assert_workspace_changes_nothing(lambda: both(*arrays))
