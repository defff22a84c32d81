"""From images to tokens: ``tokens = [class_token, patches @ w + b] + positions``."""

import math
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checks import as_array, by_identity, require_arrays, require_divisor, require_scalar
from tinyvit.memory import empty
from tinyvit.ops.linear import linear_backward, linear_forward


def patches_forward(images, patch_size):
    """Cut images into square patches, row by row.

    Parameters
    ----------
    images : ndarray of shape (B, R, C)
        Images of R rows and C columns, of any dtype.
    patch_size : int
        Side P of a patch in pixels, a divisor of R and C.

    Returns
    -------
    ndarray of shape (B, N, P * P)
        The N patches of each image, in the dtype of `images`.
    """
    images = as_array("images", images)
    if images.ndim != 3:
        raise ValueError(f"images must have the shape (B, R, C), not {images.shape}")
    batch, rows, columns = images.shape
    require_divisor("patch_size", patch_size, "the rows and columns of the images", rows, columns)
    down, across = rows // patch_size, columns // patch_size
    grid = images.reshape(batch, down, patch_size, across, patch_size)
    return grid.swapaxes(2, 3).reshape(batch, down * across, patch_size * patch_size)


def patches_backward(dpatches, image_shape):
    """Compute the gradient of `patches_forward`, which moves every pixel back to its place.

    Parameters
    ----------
    dpatches : ndarray of shape (B, N, P * P)
        Gradient of the loss with respect to the patches.
    image_shape : tuple
        Shape (B, R, C) of the images.

    Returns
    -------
    ndarray of shape (B, R, C)
        Gradient of the images.
    """
    dpatches = as_array("dpatches", dpatches)
    if dpatches.ndim != 3 or dpatches.shape[-1] == 0 or len(image_shape) != 3:
        raise ValueError(f"dpatches must be (B, N, P * P) for an image_shape (B, R, C), not {dpatches.shape}")
    batch, rows, columns = image_shape
    patch_size = round(dpatches.shape[-1] ** 0.5)
    down, across = rows // patch_size, columns // patch_size
    if dpatches.shape != (batch, down * across, patch_size**2) or dpatches.size != batch * rows * columns:
        raise ValueError(f"dpatches of shape {dpatches.shape} does not fit images of shape {tuple(image_shape)}")
    grid = dpatches.reshape(batch, down, across, patch_size, patch_size)
    return grid.swapaxes(2, 3).reshape(image_shape)


@by_identity
class PatchEmbeddingCache(NamedTuple):
    """Values of `patch_embedding_forward` that `patch_embedding_backward` reads."""

    linear: tuple
    image_shape: Any
    pixel_scale: float


def patch_embedding_forward(images, w, b, class_token, positions, patch_size, mean=0.0, deviation=1.0):
    """Normalise the pixels, project each patch, put the class token first and add the positions.

    Parameters
    ----------
    images : ndarray of shape (B, R, C)
        Images, uint8 from 0 to 255 or float from 0 to 1.
    w : ndarray of shape (P * P, D)
        Weights of the projection.
    b : ndarray of shape (D,)
        Bias of the projection.
    class_token : ndarray of shape (D,)
        Learned class token.
    positions : ndarray of shape (N + 1, D)
        Learned position embeddings, that of the class token first.
    patch_size : int
        Side P of a patch in pixels, a divisor of R and C.
    mean : float, default 0.0
        Mean of the pixels of the training images, on the scale from 0 to 1.
    deviation : float, default 1.0
        Standard deviation of these pixels, above 0.

    Returns
    -------
    tokens : ndarray of shape (B, N + 1, D)
        Tokens, in the dtype of `w`.
    cache : PatchEmbeddingCache
        Input of `patch_embedding_backward`.

    References
    ----------
    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1.
    """
    images = as_array("images", images)
    patches = patches_forward(images, patch_size)
    _, count, size = patches.shape
    form = f"w ({size}, D), b (D), class_token (D), positions ({count + 1}, D)"
    require_arrays(form, w, b, class_token, positions)
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise TypeError(f"images must be uint8 (0 to 255) or float (0 to 1), not {images.dtype}: convert them")
    require_scalar("mean", mean, minimum=-math.inf, maximum=math.inf, above=True, below=True)
    require_scalar("deviation", deviation, minimum=0, maximum=math.inf, above=True, below=True)
    xp = array_module(w)
    unit = 255 if images.dtype == np.uint8 else 1  # the value of a white pixel
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
    """Compute the gradients of `patch_embedding_forward`.

    Parameters
    ----------
    dtokens : ndarray of shape (B, N + 1, D)
        Gradient of the loss with respect to `tokens`.
    cache : PatchEmbeddingCache
        Cache of `patch_embedding_forward`.
    dw : ndarray of shape (P * P, D), optional
        Array for the gradient of `w`, a new one by default.
    db : ndarray of shape (D,), optional
        Array for the gradient of `b`, a new one by default.
    dclass_token : ndarray of shape (D,), optional
        Array for the gradient of `class_token`, a new one by default.
    dpositions : ndarray of shape (N + 1, D), optional
        Array for the gradient of `positions`, a new one by default.

    Returns
    -------
    dimages : ndarray of shape (B, R, C)
        Gradient of `images`, for pixels in the scale of `images` (0 to 255 or 0 to 1).
    dw : ndarray of shape (P * P, D)
        Gradient of `w`.
    db : ndarray of shape (D,)
        Gradient of `b`.
    dclass_token : ndarray of shape (D,)
        Gradient of `class_token`.
    dpositions : ndarray of shape (N + 1, D)
        Gradient of `positions`.
    """
    linear_cache, image_shape, pixel_scale = cache
    form = "x (B, N, S), w (S, D), dtokens (B, N + 1, D), dclass_token (D) or None, dpositions (N + 1, D) or None"
    require_arrays(form, *linear_cache, dtokens, dclass_token, dpositions)
    # tokens = [class_token, pixels @ w + b] + positions, with the same class token and positions for every image
    dpositions = dtokens.sum(axis=0, out=dpositions)
    dclass_token = empty(dpositions.shape[1:], like=dpositions) if dclass_token is None else dclass_token
    dclass_token[...] = dpositions[0]
    dpixels, dw, db = linear_backward(dtokens[:, 1:], linear_cache, dw=dw, db=db)
    # pixels = (patches - mean * unit) * pixel_scale
    dpixels *= pixel_scale
    return patches_backward(dpixels, image_shape), dw, db, dclass_token, dpositions
