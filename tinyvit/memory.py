"""Where the arrays of a step come from: plain allocation, or memory that an earlier array no longer uses.

Operations call `empty`, `empty_like`, `matmul` and `ones`. Without an active `Workspace` these allocate.
"""

import math
import threading

import numpy as np

from tinyvit.backend import array_module


class Workspace:
    """Keeps the memory of arrays that are no longer used, so that a step allocates next to nothing.

    Used as a context, it serves every `empty` called in this thread until it is left. When the last reference to an
    array goes, its memory is free for the next array of its size, and what was freed last, and so is still in the
    processor's cache, is handed out first. On a GPU it does nothing: CuPy keeps its memory in just this way.
    """

    def __init__(self):
        self._free = {}  # bytes -> memory blocks of that size
        self._serves = False

    def __enter__(self):
        """Serve this thread. Raises `RuntimeError` if it serves already."""
        if self._serves:
            raise RuntimeError("this workspace is in use: it can serve one thread at a time, and once")
        self._serves = True
        self._asked_for = set()
        self._outer = getattr(_thread, "workspace", None)
        _thread.workspace = self
        return self

    def __exit__(self, *exception):
        _thread.workspace = self._outer
        self._serves = False
        # sizes that were not needed this time belong to another batch size: a step of a new size may need the room
        self._free = {size: free for size, free in self._free.items() if size in self._asked_for}

    def empty(self, shape, dtype, xp):
        """Return an uninitialised C-ordered array."""
        if xp is not np:
            return xp.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        self._asked_for.add(size)
        free = self._free.get(size)
        if free is None:
            free = self._free[size] = []
        memory, offset = free.pop() if free else _new_memory(size)
        lease = np.ndarray.__new__(_Lease, shape, dtype, memory, offset)
        lease.memory, lease.free = (memory, offset), free
        return lease.view(np.ndarray)


class _Lease(np.ndarray):
    """Stands behind an array, and so lives as long as the array or a view of it; then it gives the memory back."""

    memory = free = None  # as a copy of one has no memory to give back

    def __del__(self):
        if self.free is not None:
            self.free.append(self.memory)


def _new_memory(size, line=64):
    """Return `size` bytes of memory and where in it an array should begin: at the start of a cache line."""
    memory = bytearray(size + line)
    return memory, -np.frombuffer(memory, np.uint8).ctypes.data % line


_thread = threading.local()


def empty(shape, like):
    """Return an uninitialised C-ordered array of `shape` (a tuple), with the dtype and the device of `like`."""
    workspace = getattr(_thread, "workspace", None)
    if workspace is None:
        return array_module(like).empty(shape, dtype=like.dtype)
    return workspace.empty(shape, like.dtype, array_module(like))


def empty_like(x):
    """Return an uninitialised array of the shape, dtype and device of `x`, its axes in the same order in memory."""
    if x.flags.c_contiguous:
        return empty(x.shape, like=x)
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])  # from the outermost axis to the innermost
    buffer = empty(tuple(x.shape[axis] for axis in order), like=x)
    return buffer.transpose([order.index(axis) for axis in range(x.ndim)])


def matmul(a, b, out=None):
    """Return `a @ b` for a (..., M, I) and b (..., I, N) with the same leading axes: in `out`, or in an `empty`."""
    if out is None:
        out = empty((*a.shape[:-1], b.shape[-1]), like=a)
    return array_module(a).matmul(a, b, out=out)


def ones(length, like):
    """Return `length` ones, of the dtype and the device of `like`: a product with them is a fast sum."""
    result = empty((length,), like=like)
    result[...] = 1
    return result
