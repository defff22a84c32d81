"""One flat array with named views: weights, gradients and moments alike."""

import math
from collections.abc import Mapping

from tinyvit.memory import empty


class Parameters(Mapping):
    """A mapping from dotted names to arrays that all lie in one flat array, `flat`, in the order of `shapes`.

    shapes: a dict from name to shape; flat: a one-dimensional array with as many elements as the shapes have.
    Writing into a view writes into `flat` and the reverse. Raises `ValueError` if `flat` does not fit.
    """

    def __init__(self, shapes, flat):
        sizes = [math.prod(shape) for shape in shapes.values()]
        if flat.shape != (sum(sizes),):
            raise ValueError(f"the shapes need a flat array of {sum(sizes):,} elements, not {flat.shape}")
        self.shapes = dict(shapes)
        self.flat = flat
        self._views = {}
        start = 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            self._views[name] = flat[start : start + size].reshape(shape)
            start += size

    def __getitem__(self, name):
        return self._views[name]

    def __iter__(self):
        return iter(self._views)

    def __len__(self):
        return len(self._views)

    def pair(self, name):
        """Return the views `name.weight` and `name.bias`."""
        return self._views[name + ".weight"], self._views[name + ".bias"]

    def set_pair(self, name, weight, bias):
        """Copy two arrays into `name.weight` and `name.bias`."""
        self._views[name + ".weight"][...] = weight
        self._views[name + ".bias"][...] = bias

    def __repr__(self):
        return f"Parameters({self.flat.size:,} {self.flat.dtype} in {len(self)} arrays)"

    def with_flat(self, flat):
        """Return another flat array of the same size under the same names."""
        return Parameters(self.shapes, flat)

    def empty_like(self):
        """Return uninitialised parameters of the same names, from the workspace if one is active."""
        return self.with_flat(empty(self.flat.shape, like=self.flat))
