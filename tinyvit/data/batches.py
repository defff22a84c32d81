"""The order of an epoch's images and how each is changed, both a pure function of (seed, epoch)."""

import numpy as np

from tinyvit.data.augment import warp


class Epoch:
    """One pass over a training set: a shuffled order, and an affine map for every place in it.

    images: (N, R, C) uint8; labels: (N,) integers, both on the `backend`'s device; augmentation: an
    `Augmentation`; seed, number: whole numbers, from which everything random follows. Nothing needs saving to go
    on in the middle of an epoch but its number and the place reached, and no draw depends on how a batch is cut.
    Raises `ValueError` unless there is one label an image.
    """

    def __init__(self, images, labels, augmentation, seed, number, backend):
        if labels.shape != (len(images),):  # a GPU would not miss a label, but take another's
            raise ValueError(f"{len(images)} images need as many labels, not labels of shape {labels.shape}")
        self.images, self.labels = images, labels
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
        self._order = backend.asarray(rng.permutation(len(images)))
        self._maps = backend.asarray(augmentation.draw(rng, len(images))) if augmentation else None

    def load(self, start, stop):
        """Return the images and labels at places `start` to `stop` of this epoch's order, changed as drawn.

        Images are uint8 if nothing changes them, else float32 in 0 to 1. Safe to call from many threads.
        Raises `IndexError` on places outside the epoch.
        """
        if not 0 <= start <= stop <= len(self.images):
            raise IndexError(f"places {start} to {stop} are not within an epoch of {len(self.images)} images")
        chosen = self._order[start:stop]
        images, labels = self.images[chosen], self.labels[chosen]
        if self._maps is not None:
            images = warp(images, self._maps[start:stop])
        return images, labels
