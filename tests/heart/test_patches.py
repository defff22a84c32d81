"""Patches and patch embedding: their order, their inverse, and the dtypes of images."""

import numpy as np
import pytest
from hypothesis import example, given
from strategies import SHAPES, normal, seeds, small

from tinyvit.gradcheck import gradient_error
from tinyvit.ops import (
    patch_embedding_backward,
    patch_embedding_forward,
    patches_backward,
    patches_forward,
)


def embedding_inputs(seed, batch, down, across, side, width):
    """Draw images, w, b, class_token and positions."""
    tokens = down * across + 1
    shapes = (batch, down * side, across * side), (side * side, width), (width,), (width,), (tokens, width)
    return normal(seed, *shapes)


def embed(*arrays):
    """Embed arrays from `embedding_inputs`. The first axis of w gives the side of a patch."""
    return patch_embedding_forward(*arrays, round(len(arrays[1]) ** 0.5), 0.3, 0.7)


@SHAPES
@given(small, small, small, small, seeds)
@example(1, 1, 1, 1, 0)
@example(2, 3, 2, 5, 0)
def test_patches_and_back_is_the_identity(batch, down, across, side, seed):
    images = normal(seed, (batch, down * side, across * side))
    patches = patches_forward(images, side)
    assert patches.shape == (batch, down * across, side * side)
    np.testing.assert_array_equal(patches_backward(patches, images.shape, side), images)


def test_patches_go_row_by_row():
    images = np.arange(24, dtype=np.uint8).reshape(1, 4, 6)
    patches = patches_forward(images, 2)
    assert patches.dtype == np.uint8
    assert patches[0].tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11],
        [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
    ]  # fmt: skip


def test_by_default_pixels_are_not_normalised():
    arrays = embedding_inputs(0, 2, 2, 3, 2, 5)
    expected, _ = patch_embedding_forward(*arrays, 2, mean=0.0, deviation=1.0)
    np.testing.assert_array_equal(patch_embedding_forward(*arrays, 2)[0], expected)


def test_the_check_sees_a_class_token_without_the_first_position():
    def forgetful(dout, cache):
        *others, dpositions = patch_embedding_backward(dout, cache)
        dpositions[0] = 0
        return *others, dpositions

    errors = gradient_error(embed, forgetful, embedding_inputs(0, 2, 2, 3, 2, 5))
    assert max(errors[:4]) < 1e-8
    assert errors[4] > 0.05


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_and_floats_give_the_same_tokens_in_the_type_of_the_weights(dtype):
    _, *weights = (array.astype(dtype) for array in embedding_inputs(0, 2, 2, 3, 2, 5))
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6), np.uint8)
    from_bytes, _ = patch_embedding_forward(images, *weights, 2, 0.13, 0.31)
    from_floats, _ = patch_embedding_forward(images / 255, *weights, 2, 0.13, 0.31)
    assert from_bytes.dtype == from_floats.dtype == dtype
    np.testing.assert_allclose(from_bytes, from_floats, atol=100 * np.finfo(dtype).eps)


def test_the_gradient_of_bytes_is_per_step_of_a_byte():
    _, *weights = embedding_inputs(0, 2, 2, 3, 2, 5)
    images, dout = np.full((2, 4, 6), 51, np.uint8), normal(1, (2, 7, 5))
    of_bytes = patch_embedding_backward(dout, embed(images, *weights)[1])
    of_floats = patch_embedding_backward(dout, embed(images / 255, *weights)[1])
    np.testing.assert_allclose(255 * of_bytes[0], of_floats[0], rtol=1e-12)
    for got, expected in zip(of_bytes[1:], of_floats[1:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
