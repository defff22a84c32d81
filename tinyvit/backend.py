"""NumPy or CuPy behind one small object.

An operation gets the array module from its argument with `array_module(x)`, and the memory of its results from
`tinyvit.memory`. So the same code runs on a CPU and on a GPU. `tinyvit.gpu` imports CuPy and makes the GPU's backend.
"""

import contextlib
import sys
import threading
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
from threadpoolctl import ThreadpoolController


@dataclass(frozen=True)
class Backend:
    """A device and its array module.

    Parameters
    ----------
    device : {"cpu", "gpu"}
        Name of the device.
    xp : module
        NumPy for the CPU, CuPy for the GPU.
    """

    device: str
    xp: ModuleType

    def asarray(self, array, dtype=None):
        """Return an array on this device, without a copy if it is there already.

        Parameters
        ----------
        array : array_like
            NumPy array, CuPy array or nested sequence of numbers.
        dtype : dtype, optional
            Dtype of the result, that of `array` by default.

        Returns
        -------
        ndarray
            Array on this device.
        """
        if self.device == "cpu":
            array = to_host(array)
        return self.xp.asarray(array, dtype=dtype)

    def compute_capability(self):
        """Return the compute capability of the GPU.

        Returns
        -------
        int or None
            Capability as an integer, for example 90 for 9.0, and None for the CPU.
        """
        return int(self.xp.cuda.Device().compute_capability) if self.device == "gpu" else None

    def synchronise(self):
        """Wait until the GPU has finished all its work. On the CPU this does nothing."""
        if self.device == "gpu":
            self.xp.cuda.get_current_stream().synchronize()


CPU = Backend("cpu", np)


def array_module(array):
    """Return the module whose functions work on an array.

    Parameters
    ----------
    array : ndarray
        NumPy or CuPy array.

    Returns
    -------
    module
        NumPy or CuPy.

    Raises
    ------
    TypeError
        If `array` is of another type.
    """
    if isinstance(array, np.ndarray | np.generic):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(array, cupy.ndarray):
        raise TypeError(f"expected a NumPy or CuPy array, not {type(array).__name__}: convert it with np.asarray")
    return cupy


def to_host(array):
    """Return an array as a NumPy array.

    Parameters
    ----------
    array : array_like
        NumPy array, CuPy array, sequence or number.

    Returns
    -------
    numpy.ndarray
        The same array if it is on the CPU. Otherwise a copy, which waits for the GPU.
    """
    if isinstance(array, np.ndarray | np.generic | list | tuple | int | float):
        return np.asarray(array)
    return array_module(array).asnumpy(array)


def erf(x):
    """Compute the error function, ``2 / sqrt(pi)`` times the integral of ``exp(-t**2)`` from 0 to `x`.

    Parameters
    ----------
    x : ndarray
        Input of any shape.

    Returns
    -------
    ndarray of the shape of `x`
        Error function of each element.
    """
    if array_module(x) is np:
        from scipy.special import erf  # imported here because it is large and training in float32 does not use it
    else:
        from cupyx.scipy.special import erf
    return erf(x)


@contextlib.contextmanager
def one_blas_thread():
    """Limit BLAS to one thread in this process, for work that already runs in parallel.

    Several such contexts may overlap, also in different threads. The first one sets the limit. The last one restores
    the previous number of threads when it ends.

    Yields
    ------
    None
        The limit holds inside the context.
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
