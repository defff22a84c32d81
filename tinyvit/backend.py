"""NumPy or CuPy behind one small object; the only file of the library that imports cupy.

An operation never asks where it runs: it takes its array module from the array it was given
(`array_module(x)`) and its outputs from one place (`empty(shape, like=x)`). That place is plain allocation,
unless a `Workspace` is active in the thread: then it is the same buffers, in the same order, at every step.
"""

import importlib
import sys
import threading
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import scipy.special


class DeviceError(RuntimeError):
    """The device that was asked for cannot compute; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """Where arrays live: a device's name, its array module, and the way in and out."""

    device: str  # "cpu" or "gpu"
    xp: ModuleType  # numpy or cupy

    def asarray(self, array, dtype=None):
        """Return `array`, a NumPy array or one of this device's, on this device (copied only if need be)."""
        if self.device == "cpu":
            array = to_host(array)
        return self.xp.asarray(array, dtype=dtype)

    def synchronise(self):
        """Wait until the device has done all it was asked; a CPU always has."""
        if self.device == "gpu":
            self.xp.cuda.get_current_stream().synchronize()


def get_backend(device="auto"):
    """Return the `Backend` for "cpu", "gpu", or "auto" (a GPU if one really computes, else the CPU).

    Raises `ValueError` on another name, and `DeviceError` if "gpu" is asked for and cannot compute.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device {device!r} is unknown: give 'auto', 'cpu' or 'gpu'")
    if device == "cpu":
        return Backend("cpu", np)
    try:
        return _gpu_backend()
    except DeviceError:
        if device == "gpu":
            raise
        return Backend("cpu", np)


def _gpu_backend():
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise DeviceError(
            f"device 'gpu' needs CuPy, which cannot be imported ({error}). Install it with "
            "'pip install -e \".[gpu]\"' (CUDA 13) or '.[gpu-cuda12]' (CUDA 12), or train with --device cpu."
        ) from error
    try:  # an import proves little: launch a kernel and a matrix product, and read the result back
        ones = cupy.ones((2, 2), dtype=cupy.float32)
        result = float(cupy.exp(ones @ ones).sum())
        if not 29.5 < result < 29.6:
            raise DeviceError(f"device 'gpu' computes wrong results: four times exp(2) is 29.556, not {result}")
    except DeviceError:
        raise
    except Exception as error:  # CuPy raises many kinds: no driver, no device, no cuBLAS, no compiler
        raise DeviceError(
            f"device 'gpu' was found but does not compute ({type(error).__name__}: {error}). "
            "Check the driver with nvidia-smi, or train with --device cpu."
        ) from error
    return Backend("gpu", cupy)


def array_module(array):
    """Return the module whose functions work on `array`: numpy or cupy. Raises `TypeError` if it is no array."""
    if isinstance(array, np.ndarray | np.generic):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(array, cupy.ndarray):
        raise TypeError(f"expected an array of NumPy or CuPy, not {type(array).__name__}")
    return cupy


def to_host(array):
    """Return `array` as a NumPy array; a GPU array is copied, which waits for the device."""
    if isinstance(array, np.ndarray | np.generic | list | tuple | int | float):
        return np.asarray(array)
    return array_module(array).asnumpy(array)


def erf(x):
    """Return the error function of each element of `x`, `(2/sqrt(pi)) * integral of exp(-t**2) from 0 to x`."""
    if array_module(x) is np:
        return scipy.special.erf(x)
    return importlib.import_module("cupyx.scipy.special").erf(x)


class Workspace:
    """Hands out the same buffers in the same order, step after step, so that a step allocates next to nothing.

    Used as a context, it serves every `empty` called in this thread until it is left. Whatever was computed
    inside stays valid until the workspace is entered again: only someone who owns a whole step may use one.
    """

    def __init__(self):
        self._buffers = []
        self._next = 0
        self._serves = False

    def __enter__(self):
        """Serve this thread from the first buffer on. Raises `RuntimeError` if it serves already."""
        if self._serves:
            raise RuntimeError("this workspace is in use: whoever enters it again would overwrite its arrays")
        self._serves = True
        self._next = 0
        self._outer = getattr(_thread, "workspace", None)
        _thread.workspace = self
        return self

    def __exit__(self, *exception):
        _thread.workspace = self._outer
        self._serves = False

    def empty(self, shape, dtype, xp):
        """Return this step's next buffer, the one of the last step if its shape and dtype still fit."""
        if self._next == len(self._buffers):
            self._buffers.append(None)
        buffer = self._buffers[self._next]
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            buffer = self._buffers[self._next] = xp.empty(shape, dtype=dtype)
        self._next += 1
        return buffer


_thread = threading.local()


def empty(shape, like):
    """Return an uninitialised C-ordered array of `shape` (a tuple), with the dtype and the device of `like`."""
    workspace = getattr(_thread, "workspace", None)
    if workspace is None:
        return array_module(like).empty(shape, dtype=like.dtype)
    return workspace.empty(shape, like.dtype, array_module(like))


def matmul(a, b):
    """Return `a @ b` in a buffer from `empty`; a is (..., M, I) and b (..., I, N) with the same leading axes."""
    return array_module(a).matmul(a, b, out=empty((*a.shape[:-1], b.shape[-1]), like=a))
