"""Chooses the device that computes. A GPU is chosen only after it has really computed something."""

import importlib
import logging
import math

from tinyvit.backend import CPU, Backend
from tinyvit.gpu.diagnosis import cupy_packages, explain


class DeviceError(RuntimeError):
    """The requested device cannot compute; the message says in one line why, and what to type."""


class CuPyMissing(DeviceError):
    """CuPy is not installed at all, which is normal on a machine without a GPU."""


def get_backend(device="auto"):
    """Return the `Backend` of a device.

    With "auto" a log message says in one line why a GPU is not used, unless CuPy is not installed.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}
        "auto" is a GPU if one computes, and otherwise the CPU.

    Returns
    -------
    Backend

    Raises
    ------
    ValueError
        If the name is another.
    DeviceError
        If `device` is "gpu" and no GPU computes.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device {device!r} is unknown: give 'auto', 'cpu' or 'gpu'")
    if device == "cpu":
        return CPU
    try:
        return _gpu_backend()
    except DeviceError as error:
        if device == "gpu":
            raise
        if not isinstance(error, CuPyMissing):
            logging.getLogger("tinyvit").warning("note: the CPU computes, because %s", error)
        return CPU


def import_cupy():
    """Return CuPy's module, which does not prove that there is a GPU.

    Raises
    ------
    CuPyMissing
        If CuPy is not installed.
    DeviceError
        If CuPy cannot be imported, if two of its packages are installed, or if `cupy` is another module.
    """
    packages = cupy_packages()
    try:
        if len(packages) > 1:
            raise ImportError(f"both {' and '.join(packages)} are installed")
        cupy = importlib.import_module("cupy")
        if not hasattr(cupy, "ndarray"):  # a folder that an old package has left, or a user's own cupy.py
            place = getattr(cupy, "__file__", None) or ", ".join(getattr(cupy, "__path__", ["?"]))
            raise ImportError(f"not CuPy: {place}")
    except Exception as error:  # a broken package raises errors of any type
        missing = isinstance(error, ModuleNotFoundError) and not packages
        raise (CuPyMissing if missing else DeviceError)(explain(error)) from error
    return cupy


def _gpu_backend():
    """Return the GPU's backend if a kernel and a matrix product give the right result there."""
    cupy = import_cupy()
    try:
        ones = cupy.ones((2, 2), dtype=cupy.float32)
        result, expected = float(cupy.exp(ones @ ones).sum()), 4 * math.exp(2)
        if not abs(result - expected) < 0.05:
            raise ArithmeticError(f"{result:.6g} where {expected:.6g} is right")
    except Exception as error:  # CuPy's errors have many types: no driver, no device, no cuBLAS, no compiler
        raise DeviceError(explain(error, cupy)) from error
    return Backend("gpu", cupy)
