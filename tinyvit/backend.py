"""NumPy or CuPy behind one small object; the only file of the library that imports cupy.

An operation never asks where it runs: it takes its array module from the array that it was given, by
`array_module(x)`, and the memory of its results from `memory.py`.
"""

import contextlib
import importlib
import logging
import math
import sys
import threading
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
from threadpoolctl import ThreadpoolController

from tinyvit import diagnosis


class DeviceError(RuntimeError):
    """The device that was asked for cannot compute; the message says in one line why, and what to type."""


class CuPyMissing(DeviceError):
    """CuPy is not installed at all, which is as it should be where there is no GPU."""


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

    def compute_capability(self):
        """Return the card's compute capability as a whole number, 90 for 9.0; of a CPU None."""
        return int(self.xp.cuda.Device().compute_capability) if self.device == "gpu" else None

    def synchronise(self):
        """Wait until the device has done all it was asked; a CPU always has."""
        if self.device == "gpu":
            self.xp.cuda.get_current_stream().synchronize()


def get_backend(device="auto"):
    """Return the `Backend` for "cpu", "gpu", or "auto" (a GPU if one really computes, else the CPU).

    "auto" logs in one line why a GPU is not used, unless CuPy is not installed. Raises `ValueError` on another name,
    and `DeviceError` if "gpu" is asked for and cannot compute.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device {device!r} is unknown: give 'auto', 'cpu' or 'gpu'")
    if device == "cpu":
        return Backend("cpu", np)
    try:
        return _gpu_backend()
    except DeviceError as error:
        if device == "gpu":
            raise
        if not isinstance(error, CuPyMissing):
            logging.getLogger("tinyvit").warning("note: the CPU computes, as %s", error)
        return Backend("cpu", np)


def _gpu_backend():
    cupy = import_cupy()
    try:  # an import proves little: launch a kernel and a matrix product, and read the result back
        ones = cupy.ones((2, 2), dtype=cupy.float32)
        result = float(cupy.exp(ones @ ones).sum())
    except Exception as error:  # CuPy raises many kinds: no driver, no device, no cuBLAS, no compiler
        raise DeviceError(diagnosis.explain(error, cupy)) from error
    expected = 4 * math.exp(2)
    if not abs(result - expected) < 0.05:
        raise DeviceError(diagnosis.wrong_result(expected, result))
    return Backend("gpu", cupy)


def import_cupy():
    """Return CuPy's module, which may be whole and yet find no GPU.

    Raises `CuPyMissing` if there is none, and `DeviceError` if it cannot be imported or two of its packages are
    installed.
    """
    packages = diagnosis.cupy_packages()
    if len(packages) > 1:
        raise DeviceError(diagnosis.two_packages(packages))
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # a package that is not whole raises anything
        missing = isinstance(error, ModuleNotFoundError) and not packages
        raise (CuPyMissing if missing else DeviceError)(diagnosis.not_importable(error, packages)) from error
    if not hasattr(cupy, "ndarray"):  # a folder that an old package has left, or somebody's own cupy.py
        raise DeviceError(diagnosis.not_cupy(cupy))
    return cupy


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
        from scipy.special import erf  # here, as training in float32 never needs it, and it is large
    else:
        from cupyx.scipy.special import erf
    return erf(x)


@contextlib.contextmanager
def one_blas_thread():
    """Keep BLAS to one thread in this process, for work that is side by side already; it gets its threads back after.

    Contexts may overlap in any order, in any threads: the first to be entered sets the limit, the last to be left
    lifts it.
    """
    with _limit.lock:
        _limit.users += 1
        if _limit.users == 1:
            _limit.own = ThreadpoolController().limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _limit.lock:
            _limit.users -= 1
            if _limit.users == 0:
                _limit.own.restore_original_limits()


_limit = SimpleNamespace(lock=threading.Lock(), users=0, own=None)
