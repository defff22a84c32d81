"""The order of an epoch's images and how each is changed, both a pure function of (seed, epoch)."""

import numpy as np

from tinyvit.data.augment import warp


def draw_order(count, seed, number):
    """Return an epoch's order, the places (count,) of all images, and the generator that draws their maps next."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
    return rng.permutation(count), rng


def stream_of(rng):
    """Return the key of a Philox generator, two integers, and which 64-bit word of its stream it gives next.

    With these a kernel draws the numbers that the generator would. NumPy keeps four words at a time: those of the
    counter it is at, of which `buffer_pos` are gone.
    """
    state = rng.bit_generator.state
    counter = int(state["state"]["counter"][0])  # the low 64 bits, which no epoch exhausts
    return tuple(int(word) for word in state["state"]["key"]), 4 * counter + state["buffer_pos"]


class Epoch:
    """One pass over a training set: a shuffled order, and an affine map for every place in it.

    images: (N, R, C) uint8; labels: (N,) integers, both on the `backend`'s device; augmentation: an
    `Augmentation`; seed, number: integers, from which everything random follows. Nothing needs saving to go
    on in the middle of an epoch but its number and the place reached, and no draw depends on how a batch is cut.
    Raises `ValueError` unless there is one label an image.
    """

    def __init__(self, images, labels, augmentation, seed, number, backend):
        if labels.shape != (len(images),):  # a GPU would not miss a label, but take another's
            raise ValueError(f"{len(images)} images need as many labels, not labels of shape {labels.shape}")
        self.images, self.labels = images, labels
        order, rng = draw_order(len(images), seed, number)
        self._order = backend.asarray(order)
        self._maps = backend.asarray(augmentation.draw(rng, len(images))) if augmentation else None

    def batch(self, start, stop):
        """Return the images, labels and maps at places `start` to `stop` of this epoch's order, as they are stored.

        images: (B, R, C) uint8; labels: (B,); maps: (B, 2, 3) for `warp`, or None if nothing changes the images.
        Raises `IndexError` on places outside the epoch.
        """
        if not 0 <= start <= stop <= len(self.images):
            raise IndexError(f"places {start} to {stop} are not within an epoch of {len(self.images)} images")
        chosen = self._order[start:stop]
        maps = None if self._maps is None else self._maps[start:stop]
        return self.images[chosen], self.labels[chosen], maps

    def load(self, start, stop):
        """Return the images and labels of `batch`, the images changed by their maps: uint8, or float32 in 0 to 1."""
        images, labels, maps = self.batch(start, stop)
        return images if maps is None else warp(images, maps), labels
