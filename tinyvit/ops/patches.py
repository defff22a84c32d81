"""Images to tokens: patches, their embedding, the class token and the positions (Dosovitskiy et al. 2021, 3.1)."""

from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import array_module
from tinyvit.memory import empty
from tinyvit.ops.linear import linear_backward, linear_forward


def patches_forward(images, patch_size):
    """Cut images (B, R, C) into squares of `patch_size` pixels: (B, N, P*P), row by row, of the same dtype."""
    batch, rows, columns = images.shape
    down, across = rows // patch_size, columns // patch_size
    grid = images.reshape(batch, down, patch_size, across, patch_size)
    return grid.swapaxes(2, 3).reshape(batch, down * across, patch_size * patch_size)


def patches_backward(dpatches, image_shape):
    """Return dimages (B, R, C) of `image_shape` for `dpatches` (B, N, P*P): every pixel went to one place."""
    batch, rows, columns = image_shape
    patch_size = round(dpatches.shape[-1] ** 0.5)
    down, across = rows // patch_size, columns // patch_size
    grid = dpatches.reshape(batch, down, across, patch_size, patch_size)
    return grid.swapaxes(2, 3).reshape(image_shape)


class PatchEmbeddingCache(NamedTuple):
    """What `patch_embedding_backward` needs of the forward pass."""

    linear: tuple
    image_shape: Any
    pixel_scale: float


def patch_embedding_forward(images, w, b, class_token, positions, patch_size, mean=0.0, deviation=1.0):
    """Normalise the pixels, embed every patch, put the class token first and add the learned positions.

    images: (B, R, C), uint8 (0 to 255) or float (0 to 1), with sides that patch_size divides;
    w: (P*P, D); b, class_token: (D,); positions: (N + 1, D); mean and deviation: of the pixels in 0 to 1.
    Returns tokens (B, N + 1, D) in the dtype of w, and the cache.
    """
    xp = array_module(w)
    patches = patches_forward(images, patch_size)
    unit = 255 if images.dtype == np.uint8 else 1
    pixels = empty(patches.shape, like=w)
    pixels[...] = patches
    pixels -= mean * unit
    pixels *= 1 / (deviation * unit)

    embedded, linear_cache = linear_forward(pixels, w, b)  # (B, N, D)
    tokens = empty((len(images), embedded.shape[1] + 1, w.shape[1]), like=w)
    tokens[:, 0] = class_token + positions[0]
    xp.add(embedded, positions[1:], out=tokens[:, 1:])
    return tokens, PatchEmbeddingCache(linear_cache, images.shape, 1 / (deviation * unit))


def patch_embedding_backward(dtokens, cache, dw=None, db=None, dclass_token=None, dpositions=None):
    """Return dimages (B, R, C), dw, db, dclass_token and dpositions for the gradient `dtokens` (B, N + 1, D).

    The last four, if given, are the arrays that are written and returned.
    """
    linear_cache, image_shape, pixel_scale = cache
    # tokens = [class_token; pixels @ w + b] + positions, and class token and positions serve every image, so
    dpositions = dtokens.sum(axis=0, out=dpositions)
    dclass_token = empty(dpositions.shape[1:], like=dpositions) if dclass_token is None else dclass_token
    dclass_token[...] = dpositions[0]
    dpixels, dw, db = linear_backward(dtokens[:, 1:], linear_cache, dw, db)
    dpixels *= pixel_scale
    return patches_backward(dpixels, image_shape), dw, db, dclass_token, dpositions
