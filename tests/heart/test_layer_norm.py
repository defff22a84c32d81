"""Layer normalisation: its laws, and the three terms of its gradient."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operations import out_and_gradients
from strategies import SHAPES, normal, seeds

from tinyvit.backend import use_loops
from tinyvit.gradcheck import gradient_error
from tinyvit.ops import layer_norm_backward, layer_norm_forward


@pytest.mark.parametrize("dropped", ["mean", "deviation"])
def test_the_check_sees_a_missing_term(dropped):
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
    # Epsilon is added to a variance, so it must be scaled like one.
    x, w, b = normal(seed, (2, 6), (6,), (6,))
    out, _ = layer_norm_forward(x, w, b, 1e-3)
    np.testing.assert_allclose(layer_norm_forward(scale * x + shift, w, b, 1e-3 * scale**2)[0], out, atol=1e-9)


def test_the_gradient_has_no_part_along_a_shift_or_a_scale():
    # The output ignores both, so the derivative of out . dout along ones and along x - mean is zero.
    x, w, b, dout = normal(0, (4, 9), (9,), (9,), (4, 9))
    dx, _, _ = layer_norm_backward(dout, layer_norm_forward(x, w, b, 0.0)[1])
    np.testing.assert_allclose(dx.sum(axis=-1), 0, atol=1e-13)
    np.testing.assert_allclose((dx * (x - x.mean(axis=-1, keepdims=True))).sum(axis=-1), 0, atol=1e-13)


def test_equal_elements_give_the_bias_and_finite_gradients():
    w, b, dout = normal(0, (6,), (6,), (2, 6))
    out, cache = layer_norm_forward(np.full((2, 6), 7.0), w, b)
    np.testing.assert_array_equal(out, np.broadcast_to(b, (2, 6)))
    assert all(np.isfinite(gradient).all() for gradient in layer_norm_backward(dout, cache))


def test_a_slice_of_a_wider_array_gives_the_same_as_a_copy():
    # The model normalises x[:, 0] after its last block.
    x, w, b, dout = normal(0, (3, 4, 7), (7,), (7,), (3, 7))
    pair = layer_norm_forward, layer_norm_backward
    got = out_and_gradients(pair, [x[:, 0], w, b], (), dout)
    expected = out_and_gradients(pair, [x[:, 0].copy(), w, b], (), dout)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("loops", ["off", "auto"])
@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e20), (np.float64, 1e160)])
def test_a_variance_that_overflows_gives_nan_and_no_zeros(loops, dtype, size):
    x = np.array([[1, 2, 4], [size, -size, 0], [4, 2, 1]], dtype)
    with use_loops(loops), np.errstate(all="ignore"):
        out, _ = layer_norm_forward(x, np.ones(3, dtype), np.zeros(3, dtype))
    np.testing.assert_array_equal(np.isnan(out), [[False] * 3, [True] * 3, [False] * 3])
