"""One flat array with named views, for the parameters of a model and for their gradients."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from tinyvit.checks import as_array, by_identity
from tinyvit.memory import empty


@by_identity
class Parameters(Mapping[str, np.ndarray]):
    """A mapping from names to arrays, which are views of one flat array.

    Parameters
    ----------
    shapes : dict of str to tuple of int
        Shape of each array, in the order of the flat array.
    flat : ndarray of shape (P,)
        Array with P elements, the sum of all sizes. It is not copied.

    Raises
    ------
    ValueError
        If `flat` has another shape, or a shape has a negative length.

    Notes
    -----
    A copy, whether by `copy.copy`, `copy.deepcopy` or `pickle`, has its own flat array with its own views. An object
    equals only itself. To compare values, compare the flat arrays.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], flat: np.ndarray) -> None:
        flat = as_array("flat", flat)
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        for length in {length for shape in shapes.values() for length in shape}:
            if not isinstance(length, int | np.integer) or length < 0:
                raise ValueError(f"shapes must consist of integers from 0, but one contains {length!r}")
        sizes = [math.prod(shape) for shape in shapes.values()]
        if flat.shape != (sum(sizes),):
            raise ValueError(f"the shapes need a flat array of shape ({sum(sizes)},), not {flat.shape}")
        self.shapes = shapes
        self.flat = flat
        self._views = {}
        start = 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            self._views[name] = flat[start : start + size].reshape(shape)
            start += size

    def __reduce__(self):
        return Parameters, (self.shapes, self.flat)

    def __copy__(self):
        return self.with_flat(self.flat.copy())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight and the bias of a layer.

        Parameters
        ----------
        name : str
            Name of the layer, for example ``"blocks.0.mlp.fc1"``.

        Returns
        -------
        weight : ndarray
            The array ``name.weight``.
        bias : ndarray
            The array ``name.bias``.
        """
        return self._views[name + ".weight"], self._views[name + ".bias"]

    def set_pair(self, name: str, weight: npt.ArrayLike, bias: npt.ArrayLike) -> None:
        """Copy a weight and a bias into the arrays of a layer.

        Parameters
        ----------
        name : str
            Name of the layer.
        weight : ndarray
            Values for the array ``name.weight``.
        bias : ndarray
            Values for the array ``name.bias``.
        """
        self._views[name + ".weight"][...] = weight
        self._views[name + ".bias"][...] = bias

    def __repr__(self):
        return f"Parameters({self.flat.size:,} {self.flat.dtype} in {len(self)} arrays)"

    def with_flat(self, flat: np.ndarray) -> "Parameters":
        """Return the same names as views of another flat array.

        Parameters
        ----------
        flat : ndarray of shape (P,)
            Array of the same size as `self.flat`.

        Returns
        -------
        Parameters
            Mapping with the same names and shapes.
        """
        return Parameters(self.shapes, flat)

    def empty_like(self) -> "Parameters":
        """Return the same names with uninitialised values.

        Returns
        -------
        Parameters
            Mapping with the same names, shapes, dtype and device. Its memory comes from the active workspace, if any.
        """
        return self.with_flat(empty(self.flat.shape, like=self.flat))
