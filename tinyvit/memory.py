"""Arrays for results, in new memory or in the memory of arrays that are no longer used.

Operations create their results with `empty`, `empty_like`, `matmul` and `ones`. These functions take memory from the
active `Workspace`, or allocate it if no workspace is active.
"""

import math
import threading
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit.backend import array_module


class Workspace:
    """Memory that successive steps reuse, so that they allocate almost nothing.

    Notes
    -----
    Within ``with workspace:``, the functions of this module take memory from the workspace, in this thread only. When
    the last reference to an array disappears, its memory is free for the next array of the same size. The memory that
    became free last is used first, because it is probably still in the processor's cache. On a GPU a workspace does
    nothing, because CuPy reuses memory in the same way.

    A workspace can be entered again after it was left, but not while it is active. That raises `RuntimeError`.
    """

    def __init__(self) -> None:
        self._free: dict[int, list] = {}  # from a size in bytes to the free memory blocks of that size
        self._active = False

    def __enter__(self) -> "Workspace":
        if self._active:
            raise RuntimeError("this workspace is in use already: create another one for a nested block or a thread")
        self._active = True
        self._requested: set[int] = set()
        self._outer = getattr(_thread, "workspace", None)
        _thread.workspace = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.workspace = self._outer
        self._active = False
        # Sizes that were not requested this time belong to another batch size, so their memory is released.
        self._free = {size: free for size, free in self._free.items() if size in self._requested}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, xp: ModuleType) -> np.ndarray:
        """Return an uninitialised C-ordered array.

        Parameters
        ----------
        shape : tuple of int
            Shape of the array.
        dtype : dtype
            Dtype of the array.
        xp : module
            NumPy or CuPy. A CuPy array gets its memory from CuPy.

        Returns
        -------
        ndarray of `shape`
            Array that begins at the start of a cache line.
        """
        if xp is not np:
            return xp.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        self._requested.add(size)
        free = self._free.get(size)
        if free is None:
            free = self._free[size] = []
        memory, offset = free.pop() if free else _new_memory(size)
        lease = np.ndarray.__new__(_Lease, shape, dtype, buffer=memory, offset=offset)
        lease.memory, lease.free = (memory, offset), free
        return lease.view(np.ndarray)


class _Lease(np.ndarray):
    """The base of an array and of all its views. When the last of them is deleted, its memory becomes free again."""

    memory: Any = None  # the defaults are for copies, which own no memory of the workspace
    free: list | None = None

    def __del__(self):
        if self.free is not None:
            self.free.append(self.memory)


def _new_memory(size: int, line: int = 64) -> tuple[bytearray, int]:
    """Allocate `size` bytes and return the memory with the offset of its first cache line."""
    memory = bytearray(size + line)
    return memory, -np.frombuffer(memory, np.uint8).ctypes.data % line


_thread = threading.local()


def empty(shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    """Return an uninitialised C-ordered array.

    Parameters
    ----------
    shape : tuple of int
        Shape of the array.
    like : ndarray
        Array whose dtype and device the result gets.

    Returns
    -------
    ndarray of `shape`
        Array from the active workspace, or a new one.
    """
    workspace = getattr(_thread, "workspace", None)
    if workspace is None:
        return array_module(like).empty(shape, dtype=like.dtype)
    return workspace.empty(shape, like.dtype, array_module(like))


def empty_like(x: np.ndarray) -> np.ndarray:
    """Return an uninitialised array with the shape, dtype, device and memory order of another array.

    Parameters
    ----------
    x : ndarray
        Array to imitate.

    Returns
    -------
    ndarray of the shape of `x`
        Array from the active workspace, or a new one.
    """
    if x.flags.c_contiguous:
        return empty(x.shape, like=x)
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])  # from the outermost axis to the innermost
    buffer = empty(tuple(x.shape[axis] for axis in order), like=x)
    return buffer.transpose([order.index(axis) for axis in range(x.ndim)])


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Compute ``a @ b``.

    Parameters
    ----------
    a : ndarray of shape (..., M, I) or (I,)
        Left factor.
    b : ndarray of shape (..., I, N)
        Right factor, with the same leading axes as `a`.
    out : ndarray, optional
        Array for the product, by default an array from `empty`.

    Returns
    -------
    ndarray of shape (..., M, N) or (N,)
        Product.
    """
    if out is None:
        out = empty((*a.shape[:-1], b.shape[-1]), like=a)
    return array_module(a).matmul(a, b, out=out)


def ones(length: int, like: np.ndarray) -> np.ndarray:
    """Return a vector of ones. A matrix product with it is a fast sum.

    Parameters
    ----------
    length : int
        Length of the vector.
    like : ndarray
        Array whose dtype and device the result gets.

    Returns
    -------
    ndarray of shape (length,)
        Vector of ones.
    """
    result = empty((length,), like=like)
    result[...] = 1
    return result
