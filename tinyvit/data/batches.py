"""The order and the augmentation of the images in an epoch, which depend only on the seed and the epoch's number."""

import math

import numpy as np

from tinyvit.backend import Backend
from tinyvit.checks import as_array, require_scalar
from tinyvit.data.augment import Augmentation, warp


def draw_order(count: int, seed: int, number: int) -> tuple[np.ndarray, np.random.Generator]:
    """Draw the order of the images in an epoch.

    Parameters
    ----------
    count : int
        Number of images.
    seed : int
        Seed of the training.
    number : int
        Number of the epoch, from 0.

    Returns
    -------
    order : ndarray of shape (count,)
        Random permutation of the images' indices.
    rng : numpy.random.Generator
        Generator for the epoch's maps.
    """
    for name, value in {"count": count, "seed": seed, "number": number}.items():
        require_scalar(name, value, minimum=0, maximum=math.inf, integer=True)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
    return rng.permutation(count), rng


def stream_of(rng: np.random.Generator) -> tuple[tuple[int, ...], int]:
    """Return the state of a Philox generator in the form that a CUDA kernel needs to draw the same numbers.

    Parameters
    ----------
    rng : numpy.random.Generator
        Generator with the bit generator `numpy.random.Philox`.

    Returns
    -------
    key : tuple of int
        Key, two integers.
    position : int
        Index of the next 64-bit word. The words with the indices ``4 * i`` to ``4 * i + 3`` belong to the counter i.

    Notes
    -----
    NumPy stores the four words of the current counter, of which ``buffer_pos`` are used.
    """
    if not isinstance(getattr(rng, "bit_generator", None), np.random.Philox):
        raise TypeError("rng must be a numpy.random.Generator with the bit generator Philox")
    state = rng.bit_generator.state
    counter = int(state["state"]["counter"][0])  # the low 64 bits, which are enough for any epoch
    return tuple(int(word) for word in state["state"]["key"]), 4 * counter + state["buffer_pos"]


class Epoch:
    """One pass over a training set in random order, with one random map per image.

    Parameters
    ----------
    images : ndarray of shape (N, R, C)
        Images, uint8, on the device of `backend`.
    labels : ndarray of shape (N,)
        Integer labels, on the same device.
    augmentation : Augmentation or None
        Limits of the random changes.
    seed : int
        Seed of the training.
    number : int
        Number of the epoch, from 0.
    backend : Backend
        Device of the images.

    Raises
    ------
    ValueError
        If there is not one label per image.

    Notes
    -----
    All random numbers are drawn here, so they do not depend on the batch size. To resume in the middle of an epoch,
    training needs only the number of the epoch and the number of images that it has used.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        augmentation: Augmentation | None,
        seed: int,
        number: int,
        backend: Backend,
    ) -> None:
        images, labels = as_array("images", images), as_array("labels", labels)
        if not isinstance(augmentation, Augmentation | None):
            raise TypeError(f"augmentation must be an Augmentation or None, not {type(augmentation).__name__}")
        if labels.shape != (len(images),):  # on a GPU an index beyond the labels would read another label
            raise ValueError(f"labels must have shape ({len(images)},), one per image, not {labels.shape}")
        self.images, self.labels = images, labels
        order, rng = draw_order(len(images), seed, number)
        self._order = backend.asarray(order)
        self._maps = backend.asarray(augmentation.draw(rng, len(images))) if augmentation else None

    def batch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return a batch without applying the maps.

        Parameters
        ----------
        start : int
            Position of the first image in the epoch's order.
        stop : int
            Position after the last image.

        Returns
        -------
        images : ndarray of shape (B, R, C)
            Images, uint8.
        labels : ndarray of shape (B,)
            Labels of the images.
        maps : ndarray of shape (B, 2, 3) or None
            Maps for `warp`, and None without augmentation.

        Raises
        ------
        IndexError
            If a position is outside the epoch.
        """
        count = len(self.images)
        if not 0 <= start <= stop <= count:
            raise IndexError(f"start and stop must satisfy 0 <= start <= stop <= {count}, but are {start} and {stop}")
        chosen = self._order[start:stop]
        maps = None if self._maps is None else self._maps[start:stop]
        return self.images[chosen], self.labels[chosen], maps

    def load(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch with the maps applied.

        Parameters
        ----------
        start : int
            Position of the first image in the epoch's order.
        stop : int
            Position after the last image.

        Returns
        -------
        images : ndarray of shape (B, R, C)
            Float32 images from 0 to 1 with augmentation, and uint8 images from 0 to 255 without.
        labels : ndarray of shape (B,)
            Labels of the images.

        Raises
        ------
        IndexError
            If a position is outside the epoch.
        """
        images, labels, maps = self.batch(start, stop)
        return images if maps is None else warp(images, maps), labels
