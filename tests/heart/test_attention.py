"""Softmax, attention with one head, and attention with many heads."""

import numpy as np
import pytest
import scipy.special
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SHAPES, TOLERANCE, VALUES, normal, seeds, small

from tinyvit.gradcheck import gradient_error
from tinyvit.ops import (
    attention_backward,
    attention_forward,
    class_attention_forward,
    multi_head_attention_backward,
    multi_head_attention_forward,
    softmax_forward,
)
from tinyvit.ops.attention import empty_scores, split_heads


def multi_head_inputs(seed, batch, tokens, heads, per_head):
    """Draw x, w_qkv, b_qkv, w_out and b_out."""
    width = heads * per_head
    return normal(seed, (batch, tokens, width), (width, 3 * width), (3 * width,), (width, width), (width,))


# ---- softmax ----


def test_the_check_sees_a_softmax_that_is_diagonal_only():
    def diagonal_only(dout, weights):
        return dout * weights * (1 - weights)

    assert gradient_error(softmax_forward, diagonal_only, [normal(0, (3, 5))])[0] > 0.1


@VALUES
@given(st.floats(-1e4, 1e4), seeds)
def test_softmax_ignores_a_shift(shift, seed):
    x = normal(seed, (3, 5))
    np.testing.assert_allclose(softmax_forward(x + shift)[0], softmax_forward(x)[0], atol=1e-11)


def test_softmax_values():
    x = normal(0, (3, 4, 5))
    np.testing.assert_allclose(softmax_forward(x)[0], scipy.special.softmax(x, axis=-1), rtol=1e-13)
    np.testing.assert_allclose(softmax_forward(x)[0].sum(axis=-1), 1, rtol=1e-14)


def test_softmax_of_huge_numbers():
    weights, _ = softmax_forward(np.array([[1e4, -1e4, 0], [1e300, 1e300, -1e300]]))
    np.testing.assert_array_equal(weights, [[1, 0, 0], [0.5, 0.5, 0]])


# ---- one head ----


def test_each_output_is_a_mean_of_the_values():
    q, k, v = normal(0, (2, 3, 4), (2, 5, 4), (2, 5, 4))
    out, (weights, *_) = attention_forward(q, k, v)
    for b in range(2):
        for s in range(3):
            scores = np.array([sum(q[b, s] * k[b, t]) / 2 for t in range(5)])  # 2 is the square root of the width 4
            expected = np.exp(scores) / sum(np.exp(scores))
            np.testing.assert_allclose(weights[b, s], expected, rtol=1e-13)
            np.testing.assert_allclose(out[b, s], sum(expected[t] * v[b, t] for t in range(5)), rtol=1e-12)


@SHAPES
@given(st.permutations(range(5)), seeds)
def test_the_order_of_keys_and_values_does_not_matter(order, seed):
    q, k, v = normal(seed, (2, 3, 4), (2, 5, 4), (2, 5, 4))
    out, _ = attention_forward(q, k, v)
    np.testing.assert_allclose(attention_forward(q, k[:, order], v[:, order])[0], out, atol=1e-13)


def test_a_single_token_gets_its_own_value():
    q, k, v = normal(0, (2, 3, 4), (2, 1, 4), (2, 1, 4))
    np.testing.assert_array_equal(attention_forward(q, k, v)[0], np.broadcast_to(v, (2, 3, 4)))


def test_the_scale_is_one_over_the_root_of_the_width_by_default():
    q, k, v = normal(0, (2, 3, 4), (2, 5, 4), (2, 5, 4))
    np.testing.assert_allclose(attention_forward(q, k, v, scale=0.5)[0], attention_forward(q, k, v)[0], rtol=1e-13)
    scaled, _ = attention_forward(q, k, v, scale=0.2)
    np.testing.assert_allclose(scaled, attention_forward(0.4 * q, k, v)[0], atol=1e-13)
    errors = gradient_error(lambda *qkv: attention_forward(*qkv, scale=0.2), attention_backward, [q, k, v])
    assert max(errors) < TOLERANCE, errors


def test_keys_are_the_outermost_axis_in_memory_and_values_are_right():
    q, k, v = normal(0, (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5))
    scores = empty_scores(q, k)
    assert scores.shape == (2, 3, 4, 6)
    assert scores.strides[-1] == max(scores.strides)
    weights = attention_forward(q, k, v)[1][0]
    assert weights.strides == scores.strides
    plain = scipy.special.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(5), axis=-1)
    np.testing.assert_allclose(weights, plain, rtol=1e-12)


# ---- many heads ----

FORMS = {"all tokens": multi_head_attention_forward, "the class token": class_attention_forward}
both_forms = pytest.mark.parametrize("forward", FORMS.values(), ids=FORMS)


@SHAPES
@given(st.permutations(range(5)), seeds)
def test_attention_commutes_with_a_permutation_of_the_tokens(order, seed):
    x, *weights = multi_head_inputs(seed, 2, 5, 2, 3)
    out, _ = multi_head_attention_forward(x, *weights, 2)
    np.testing.assert_allclose(multi_head_attention_forward(x[:, order], *weights, 2)[0], out[:, order], atol=1e-12)


@SHAPES
@given(small, st.integers(1, 6), st.sampled_from([1, 2, 3]), small, seeds)
@example(3, 1, 2, 2, 0)
def test_the_class_token_has_the_same_attention_weights_in_both_forms(batch, tokens, heads, per_head, seed):
    inputs = multi_head_inputs(seed, batch, tokens, heads, per_head)
    _, first_cache = class_attention_forward(*inputs, heads)
    _, all_cache = multi_head_attention_forward(*inputs, heads)
    weights = all_cache.attention.weights[:, :, 0]
    np.testing.assert_allclose(first_cache.attention.weights, weights, atol=1e-12)


def test_the_bias_of_the_keys_has_no_gradient():
    # It adds the same number to all scores of a query, and softmax ignores a shift.
    dout = normal(1, (2, 5, 6))
    _, cache = multi_head_attention_forward(*multi_head_inputs(0, 2, 5, 2, 3), 2)
    _, _, db_qkv, _, _ = multi_head_attention_backward(dout, cache)
    np.testing.assert_allclose(db_qkv[6:12], 0, atol=1e-13)
    assert np.abs(db_qkv[:6]).min() > 1e-6
    assert np.abs(db_qkv[12:]).min() > 1e-6


@both_forms
def test_attention_weights_are_kept_in_the_cache(forward):
    out, cache = forward(*multi_head_inputs(0, 2, 5, 3, 4), 3)
    weights = cache.attention.weights
    assert weights.reshape(2, 3, -1, 5).shape == (2, 3, out.shape[1], 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-14)


def test_heads_are_split_by_columns():
    x = normal(0, (2, 3, 12))
    heads = split_heads(x, 4)
    assert np.shares_memory(heads, x)
    np.testing.assert_array_equal(heads[:, 1], x[:, :, 3:6])


@both_forms
def test_heads_that_do_not_divide_the_width_are_refused(forward):
    with pytest.raises(ValueError, match="4 does not divide 6"):
        forward(*multi_head_inputs(0, 2, 5, 2, 3), 4)
