"""NumPy or CuPy behind one small object.

An operation never asks where it runs. It takes its array module from its argument, by `array_module(x)`, and the
memory of its results from `memory.py`. `tinyvit.gpu` imports CuPy and makes the backend of a GPU.
"""

import contextlib
import contextvars
import functools
import importlib
import logging
import sys
import threading
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
from threadpoolctl import ThreadpoolController


@dataclass(frozen=True)
class Backend:
    """Where arrays live: a device's name, its array module, and the way in and out."""

    device: str  # "cpu" or "gpu"
    xp: ModuleType  # numpy or cupy

    def asarray(self, array, dtype=None):
        """Return `array`, a NumPy array or an array of this device, on this device, copied only if necessary."""
        if self.device == "cpu":
            array = to_host(array)
        return self.xp.asarray(array, dtype=dtype)

    def compute_capability(self):
        """Return the card's compute capability as an integer, 90 for 9.0, and None for a CPU."""
        return int(self.xp.cuda.Device().compute_capability) if self.device == "gpu" else None

    def synchronise(self):
        """Wait until the device has finished all its work; a CPU always has."""
        if self.device == "gpu":
            self.xp.cuda.get_current_stream().synchronize()


CPU = Backend("cpu", np)
LOOPS = ("auto", "on", "off")  # choices of `use_loops`
MANY_IMAGES = 5_000


def array_module(array):
    """Return the module whose functions work on `array`, numpy or cupy. Raises `TypeError` on another type."""
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
        from scipy.special import erf  # imported here because it is large and training in float32 never needs it
    else:
        from cupyx.scipy.special import erf
    return erf(x)


def available_cores():
    """Return the number of cores that this process may use, by its affinity and by the limit of a container."""
    import joblib  # imported here because a worker process does not need it

    return joblib.cpu_count()


@contextlib.contextmanager
def one_blas_thread():
    """Limit BLAS to one thread in this process, for work that runs in parallel already.

    Contexts may overlap in any order and in any threads. The first one to be entered sets the limit, and the last
    one to be left restores the earlier number of threads.
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


@functools.cache
def compiled_loops():
    """Return the module `tinyvit.loops`, compiled, or None if Numba is missing or does not work."""
    try:
        loops = importlib.import_module("tinyvit.loops")
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "numba"):  # such as a NumPy that is too new
            logging.getLogger("tinyvit").warning("note: NumPy computes without compiled loops, because %s", error)
        return None
    if seconds := loops.prepare():
        logging.getLogger("tinyvit").warning("note: compiled the loops of the CPU in %.1f s, once", seconds)
    return loops


@contextlib.contextmanager
def use_loops(choice="auto"):
    """Let operations on float32 arrays of the CPU run as compiled loops (`tinyvit/loops.py`).

    The choice holds in this thread, and in threads that run in a copy of its context.

    Parameters
    ----------
    choice : {"auto", "on", "off"}
        With "auto", loops are used if Numba is installed.

    Yields
    ------
    bool
        Whether loops are used.

    Raises
    ------
    ValueError
        If the choice is another, or if it is "on" and Numba is missing.
    """
    if choice not in LOOPS:
        raise ValueError(f"loops {choice!r} is unknown: give {', '.join(map(repr, LOOPS))}")
    loops = None if choice == "off" else compiled_loops()
    if choice == "on" and loops is None:
        raise ValueError("loops 'on' needs Numba: type pip install numba, or give 'auto' or 'off'")
    token = _loops.set((loops,))
    try:
        yield loops is not None
    finally:
        _loops.reset(token)


def use_loops_for_many(images):
    """Return the context `use_loops("auto")` for 5,000 images or more, unless the caller has chosen already.

    Numba takes a third of a second to import, which fewer images do not repay.
    """
    chosen = _loops.get(None) is not None
    return contextlib.nullcontext() if chosen or images < MANY_IMAGES else use_loops("auto")


def loops_in_use():
    """Return whether operations called in this context use compiled loops."""
    return _loops.get((None,)) != (None,)


def loops_for(*arrays):
    """Return the module of loops if it is in use and suits the arrays, which must be float32 and C-contiguous."""
    (loops,) = _loops.get((None,))
    if loops is not None and all(
        isinstance(array, np.ndarray) and array.dtype == np.float32 and array.flags.c_contiguous for array in arrays
    ):
        return loops
    return None


_loops = contextvars.ContextVar("loops")  # a tuple of the module or None; unset if there was no choice
