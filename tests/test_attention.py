"""Softmax, one head of attention, and many."""

import numpy as np
import pytest
import scipy.special
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    SHAPES,
    VALUES,
    assert_float32_agrees,
    assert_gradients_right,
    assert_workspace_changes_nothing,
    normal,
    seeds,
    small,
)

from tinyvit.gradcheck import gradient_error, relative_error
from tinyvit.ops import (
    attention_backward,
    attention_forward,
    attention_weights,
    multi_head_attention_backward,
    multi_head_attention_forward,
    softmax_backward,
    softmax_forward,
)
from tinyvit.ops.attention import merge_heads, split_heads

leading = st.lists(small, min_size=0, max_size=2).map(tuple)


def multi_head_inputs(seed, batch, tokens, heads, per_head):
    """Draw x, w_qkv, b_qkv, w_out and b_out."""
    width = heads * per_head
    return normal(seed, (batch, tokens, width), (width, 3 * width), (3 * width,), (width, width), (width,))


# ---- softmax ----


@SHAPES
@given(leading, small, seeds)
@example((), 3, 0)
@example((2,), 1, 0)
def test_softmax_gradient(leading, size, seed):
    assert_gradients_right(softmax_forward, softmax_backward, [normal(seed, (*leading, size))])


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


@SHAPES
@given(leading, small, small, small, seeds)
@example((), 1, 1, 1, 0)
@example((2, 3), 2, 5, 4, 0)
@example((1,), 3, 1, 2, 0)
def test_attention_gradients(leading, queries, tokens, per_head, seed):
    arrays = normal(
        seed, (*leading, queries, per_head), (*leading, tokens, per_head), (*leading, tokens, per_head)
    )
    assert_gradients_right(attention_forward, attention_backward, arrays)


def test_each_output_is_a_mean_of_the_values():
    q, k, v = normal(0, (2, 3, 4), (2, 5, 4), (2, 5, 4))
    out, (*_, weights) = attention_forward(q, k, v)
    for b in range(2):
        for s in range(3):
            scores = np.array([sum(q[b, s] * k[b, t]) / 2 for t in range(5)])  # 2 is the root of the width 4
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


# ---- many heads ----


@SHAPES
@given(small, small, st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), seeds)
@example(1, 1, 1, 1, 1, 0)
@example(2, 5, 3, 2, 1, 0)
@example(2, 3, 1, 3, 3, 0)
def test_multi_head_gradients(batch, tokens, heads, per_head, queries, seed):
    def forward(*arrays):
        return multi_head_attention_forward(*arrays, heads, min(queries, tokens))

    inputs = multi_head_inputs(seed, batch, tokens, heads, per_head)
    assert_gradients_right(forward, multi_head_attention_backward, inputs)


def test_heads_are_slices_of_the_width():
    x, w_qkv, b_qkv, w_out, b_out = multi_head_inputs(0, 2, 5, 3, 4)
    q, k, v = np.split(x @ w_qkv + b_qkv, 3, axis=-1)
    heads = [attention_forward(*(part[..., 4 * h : 4 * h + 4] for part in (q, k, v)))[0] for h in range(3)]
    expected = np.concatenate(heads, axis=-1) @ w_out + b_out
    out, _ = multi_head_attention_forward(x, w_qkv, b_qkv, w_out, b_out, 3)
    np.testing.assert_allclose(out, expected, atol=1e-12)


@SHAPES
@given(st.permutations(range(5)), seeds)
def test_attention_commutes_with_a_permutation_of_the_tokens(order, seed):
    x, *weights = multi_head_inputs(seed, 2, 5, 2, 3)
    out, _ = multi_head_attention_forward(x, *weights, 2)
    np.testing.assert_allclose(multi_head_attention_forward(x[:, order], *weights, 2)[0], out[:, order], atol=1e-12)


@SHAPES
@given(st.integers(1, 5), st.sampled_from([1, 2, 3]), seeds)
def test_fewer_queries_give_the_first_rows_and_their_gradients(queries, heads, seed):
    inputs = multi_head_inputs(seed, 2, 5, heads, 2)
    dout = normal(seed + 1, (2, queries, 2 * heads))
    some, some_cache = multi_head_attention_forward(*inputs, heads, queries)
    all_, all_cache = multi_head_attention_forward(*inputs, heads)
    np.testing.assert_allclose(some, all_[:, :queries], atol=1e-12)

    nothing_for_the_rest = np.zeros(all_.shape)
    nothing_for_the_rest[:, :queries] = dout
    for got, expected in zip(
        multi_head_attention_backward(dout, some_cache),
        multi_head_attention_backward(nothing_for_the_rest, all_cache),
        strict=True,
    ):
        assert relative_error(got, expected) < 1e-13


def test_the_bias_of_the_keys_has_no_gradient():
    # it adds the same number to all scores of a query, and softmax ignores a shift
    dout = normal(1, (2, 5, 6))
    _, cache = multi_head_attention_forward(*multi_head_inputs(0, 2, 5, 2, 3), 2)
    _, _, db_qkv, _, _ = multi_head_attention_backward(dout, cache)
    np.testing.assert_allclose(db_qkv[6:12], 0, atol=1e-13)
    assert np.abs(db_qkv[:6]).min() > 1e-6
    assert np.abs(db_qkv[12:]).min() > 1e-6


def test_attention_weights_are_kept_in_the_cache():
    _, cache = multi_head_attention_forward(*multi_head_inputs(0, 2, 5, 3, 4), 3, 2)
    weights = attention_weights(cache)
    assert weights.shape == (2, 3, 2, 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-14)


def test_heads_are_split_by_columns_and_merged_back():
    x = normal(0, (2, 3, 12))
    heads = split_heads(x, 4)
    np.testing.assert_array_equal(heads[:, 1], x[:, :, 3:6])
    np.testing.assert_array_equal(merge_heads(heads), x)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="4 heads do not divide a width of 6"):
        multi_head_attention_forward(*multi_head_inputs(0, 2, 5, 2, 3), 4)


def both(x, w_qkv, b_qkv, w_out, b_out, dout):
    out, cache = multi_head_attention_forward(x, w_qkv, b_qkv, w_out, b_out, 2, dout.shape[1])
    return out, *multi_head_attention_backward(dout, cache)


def test_float32_agrees_with_float64():
    assert_float32_agrees(both, [*multi_head_inputs(0, 2, 5, 2, 4), normal(1, (2, 5, 8))], tolerance=1e-4)


@pytest.mark.parametrize("queries", [1, 5])
def test_a_workspace_changes_nothing(queries):
    arrays = [*multi_head_inputs(0, 2, 5, 2, 4), normal(1, (2, queries, 8))]
    assert_workspace_changes_nothing(lambda: both(*arrays))
