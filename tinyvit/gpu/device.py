"""Choose the device that computes. A GPU is chosen only after it has computed a correct result."""

import importlib
import logging
import math
from types import ModuleType

from tinyvit.backend import CPU, Backend
from tinyvit.gpu.diagnosis import cupy_packages, explain


class DeviceError(RuntimeError):
    """The requested device cannot compute. The message is one line with the reason and what to type."""


class CuPyMissing(DeviceError):
    """CuPy is not installed, which is normal on a machine without a GPU."""


def get_backend(device: str = "auto") -> Backend:
    """Return the `Backend` of a device.

    With "auto", a log message of one line explains why a GPU is not used. There is none if CuPy is not installed.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}, optional
        The device. "auto" is a GPU if one computes, and the CPU otherwise.

    Returns
    -------
    Backend
        The backend that computes on this device.

    Raises
    ------
    ValueError
        If `device` has any other value.
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


def import_cupy() -> ModuleType:
    """Return the module `cupy`. This does not prove that a GPU works.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    CuPyMissing
        If CuPy is not installed.
    DeviceError
        If CuPy cannot be imported, if two of its packages are installed, or if another module has the name `cupy`.
    """
    packages = cupy_packages()
    try:
        if len(packages) > 1:
            raise ImportError(f"both {' and '.join(packages)} are installed")
        cupy = importlib.import_module("cupy")
        if not hasattr(cupy, "ndarray"):  # the rest of an uninstalled package, or a file cupy.py of the user
            place = getattr(cupy, "__file__", None) or ", ".join(getattr(cupy, "__path__", ["?"]))
            raise ImportError(f"not CuPy: {place}")
    except Exception as error:  # a broken package may raise any type of error
        missing = isinstance(error, ModuleNotFoundError) and not packages
        raise (CuPyMissing if missing else DeviceError)(explain(error)) from error
    return cupy


def _gpu_backend() -> Backend:
    """Return the backend of the GPU if a kernel and a matrix product give the correct result there."""
    cupy = import_cupy()
    try:
        ones = cupy.ones((2, 2), dtype=cupy.float32)
        result, expected = float(cupy.exp(ones @ ones).sum()), 4 * math.exp(2)
        if not abs(result - expected) < 0.05:
            raise ArithmeticError(f"the result is {result:.6g}, expected {expected:.6g}")
    except Exception as error:  # a missing driver, device, cuBLAS or compiler each raises another type
        raise DeviceError(explain(error, cupy)) from error
    return Backend("gpu", cupy)
