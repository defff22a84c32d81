"""From images to tokens: ``tokens = [class_token, patches @ w + b] + positions``."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checks import as_array, by_identity, require_arrays, require_cache, require_divisor, require_scalar
from tinyvit.memory import empty
from tinyvit.ops.linear import linear_backward, linear_forward


def patches_forward(images: np.ndarray, patch_size: int | Sequence[int]) -> np.ndarray:
    """Cut images into patches, row by row.

    Parameters
    ----------
    images : ndarray of shape (B, R, C) or (B, R, C, channels)
        Images of R rows and C columns, of any dtype.
    patch_size : int or tuple of int
        Rows and columns of a patch in pixels, divisors of R and C, or the side P of square patches.

    Returns
    -------
    ndarray of shape (B, N, L)
        The N patches of each image, in the dtype of `images`. A patch is a row of L numbers: the first row of its
        pixels, then the second. The channels of a pixel are neighbours.
    """
    images = as_array("images", images)
    batch, down, height, across, width, *channels = _grid(images.shape, patch_size)
    grid = images.reshape(batch, down, height, across, width, *channels)
    return grid.swapaxes(2, 3).reshape(batch, down * across, height * width * math.prod(channels))


def patches_backward(
    dpatches: np.ndarray, image_shape: tuple[int, ...], patch_size: int | Sequence[int]
) -> np.ndarray:
    """Compute the gradient of `patches_forward`, which moves every pixel back to its place.

    Parameters
    ----------
    dpatches : ndarray of shape (B, N, L)
        Gradient of the loss with respect to the patches. Patches of any dtype become the images that they were cut
        from.
    image_shape : tuple
        Shape of the images.
    patch_size : int or tuple of int
        Size of a patch, as in `patches_forward`.

    Returns
    -------
    ndarray of shape `image_shape`
        Gradient of the images.
    """
    batch, down, height, across, width, *channels = _grid(image_shape, patch_size)
    dpatches = as_array("dpatches", dpatches)
    if dpatches.shape != (shape := (batch, down * across, height * width * math.prod(channels))):
        raise ValueError(f"dpatches must have the shape {shape} for images of {image_shape}, not {dpatches.shape}")
    return dpatches.reshape(batch, down, across, height, width, *channels).swapaxes(2, 3).reshape(image_shape)


def as_pair(size: Any) -> tuple[int, int]:
    """Return the rows and columns of a size, which is a pair or the side of a square."""
    return tuple(size) if isinstance(size, tuple | list) and len(size) == 2 else (size, size)


def _grid(image_shape, patch_size):
    """Return the shape (B, down, height, across, width, channels) of images whose rows and columns are cut."""
    sizes = image_shape if isinstance(image_shape, tuple | list) else ()
    integers = all(isinstance(size, int | np.integer) and size >= 0 for size in sizes)
    if len(sizes) not in (3, 4) or not integers or 0 in sizes[1:]:
        form = "(B, R, C) or (B, R, C, channels) with R, C and channels at least 1"
        raise ValueError(f"images must have the shape {form}, not {image_shape!r}")
    batch, rows, columns, *channels = image_shape
    height, width = as_pair(patch_size)
    require_divisor("patch_size", height, "the rows and columns of the images", rows)
    require_divisor("patch_size", width, "the rows and columns of the images", columns)
    return batch, rows // height, height, columns // width, width, *channels


@by_identity
class PatchEmbeddingCache(NamedTuple):
    """Values of `patch_embedding_forward` that `patch_embedding_backward` reads."""

    linear: tuple
    image_shape: tuple
    patch_size: int | Sequence[int]
    pixel_scales: list


def patch_embedding_forward(
    images: np.ndarray,
    w: np.ndarray,
    b: np.ndarray,
    class_token: np.ndarray,
    positions: np.ndarray,
    patch_size: int | Sequence[int],
    mean: float | Sequence[float] = 0.0,
    deviation: float | Sequence[float] = 1.0,
) -> tuple[np.ndarray, PatchEmbeddingCache]:
    """Normalise the pixels, project each patch, put the class token first and add the positions.

    Parameters
    ----------
    images : ndarray of shape (B, R, C) or (B, R, C, channels)
        Images, uint8 from 0 to 255 or float from 0 to 1.
    w : ndarray of shape (L, D)
        Weights of the projection.
    b : ndarray of shape (D,)
        Bias of the projection.
    class_token : ndarray of shape (D,)
        Learned class token.
    positions : ndarray of shape (N + 1, D)
        Learned position embeddings, that of the class token first.
    patch_size : int or tuple of int
        Size of a patch, as in `patches_forward`.
    mean : float or sequence of float, default 0.0
        Mean of the pixels of the training images, on the scale from 0 to 1, or one mean per channel.
    deviation : float or sequence of float, default 1.0
        Standard deviation of these pixels, above 0, or one per channel.

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
    channels = math.prod(images.shape[3:])
    means = _per_channel("mean", mean, channels, minimum=-math.inf, maximum=math.inf, above=True, below=True)
    deviations = _per_channel("deviation", deviation, channels, minimum=0, maximum=math.inf, above=True, below=True)
    xp = array_module(w)
    unit = 255 if images.dtype == np.uint8 else 1  # the value of a white pixel
    pixels = empty(patches.shape, like=w)
    pixels[...] = patches
    by_channel = pixels.reshape(-1, channels)  # shares the memory of `pixels`
    scales = [1 / (deviation * unit) for deviation in deviations]
    for channel, (shift, scale) in enumerate(zip(means, scales, strict=True)):
        by_channel[:, channel] -= shift * unit
        by_channel[:, channel] *= scale

    embedded, linear_cache = linear_forward(pixels, w, b)  # (B, N, D)
    tokens = empty((len(images), embedded.shape[1] + 1, w.shape[1]), like=w)
    tokens[:, 0] = class_token + positions[0]
    xp.add(embedded, positions[1:], out=tokens[:, 1:])
    return tokens, PatchEmbeddingCache(linear_cache, images.shape, patch_size, scales)


def _per_channel(name, value, channels, **limits):
    """Return one number per channel as a list, after checking each."""
    values = list(value) if isinstance(value, tuple | list | np.ndarray) else [value] * channels
    if len(values) != channels:
        raise ValueError(f"{name} must be a number or one number per channel, {channels}, not {len(values)} numbers")
    for number in values:
        require_scalar(name, number, **limits)
    return values


def patch_embedding_backward(
    dtokens: np.ndarray,
    cache: PatchEmbeddingCache,
    dw: np.ndarray | None = None,
    db: np.ndarray | None = None,
    dclass_token: np.ndarray | None = None,
    dpositions: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """Compute the gradients of `patch_embedding_forward`.

    Parameters
    ----------
    dtokens : ndarray of shape (B, N + 1, D)
        Gradient of the loss with respect to `tokens`.
    cache : PatchEmbeddingCache
        Cache of `patch_embedding_forward`.
    dw : ndarray of shape (L, D), optional
        Array for the gradient of `w`, a new one by default.
    db : ndarray of shape (D,), optional
        Array for the gradient of `b`, a new one by default.
    dclass_token : ndarray of shape (D,), optional
        Array for the gradient of `class_token`, a new one by default.
    dpositions : ndarray of shape (N + 1, D), optional
        Array for the gradient of `positions`, a new one by default.

    Returns
    -------
    dimages : ndarray of the shape of `images`
        Gradient of `images`, for pixels in the scale of `images` (0 to 255 or 0 to 1).
    dw : ndarray of shape (L, D)
        Gradient of `w`.
    db : ndarray of shape (D,)
        Gradient of `b`.
    dclass_token : ndarray of shape (D,)
        Gradient of `class_token`.
    dpositions : ndarray of shape (N + 1, D)
        Gradient of `positions`.
    """
    linear_cache, image_shape, patch_size, pixel_scales = require_cache(cache, 4, "patch_embedding_forward")
    form = "x (B, N, S), w (S, D), dtokens (B, N + 1, D), dclass_token (D) or None, dpositions (N + 1, D) or None"
    require_arrays(form, *linear_cache, dtokens, dclass_token, dpositions)
    # tokens = [class_token, pixels @ w + b] + positions, with the same class token and positions for every image
    dpositions = dtokens.sum(axis=0, out=dpositions)
    dclass_token = empty(dpositions.shape[1:], like=dpositions) if dclass_token is None else dclass_token
    dclass_token[...] = dpositions[0]
    dpixels, dw, db = linear_backward(dtokens[:, 1:], linear_cache, dw=dw, db=db)
    # pixels = (patches - mean * unit) * scale
    channels = len(pixel_scales)
    by_channel = dpixels.reshape(dpixels.size // channels, channels)
    for channel, scale in enumerate(pixel_scales):
        by_channel[:, channel] *= scale
    return patches_backward(dpixels, image_shape, patch_size), dw, db, dclass_token, dpositions
