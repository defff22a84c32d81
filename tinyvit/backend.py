"""NumPy or CuPy behind one small object.

An operation gets the array module from its argument with `array_module(x)`, and the memory of its results from
`tinyvit.memory`. So the same code runs on a CPU and on a GPU. `tinyvit.gpu` imports CuPy and makes the GPU's backend.
"""

import contextlib
import contextvars
import functools
import importlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
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

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> np.ndarray:
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

    def compute_capability(self) -> int | None:
        """Return the compute capability of the GPU.

        Returns
        -------
        int or None
            Capability as an integer, for example 90 for 9.0, and None for the CPU.
        """
        return int(self.xp.cuda.Device().compute_capability) if self.device == "gpu" else None

    def synchronise(self) -> None:
        """Wait until the GPU has finished all its work. On the CPU this does nothing."""
        if self.device == "gpu":
            self.xp.cuda.get_current_stream().synchronize()


CPU = Backend("cpu", np)
LOOPS = ("auto", "on", "off")  # choices of `use_loops`
MANY_IMAGES = 5_000
MOST_WORKERS = 1024


def array_module(array: Any) -> ModuleType:
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


def to_host(array: npt.ArrayLike) -> np.ndarray:
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


def erf(x: np.ndarray) -> np.ndarray:
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


@functools.cache
def available_cores() -> int:
    """Return the number of cores that this process may use. It is determined at the first call.

    Returns
    -------
    int
        At least 1. The process's affinity and a container's limit are respected.
    """
    with quiet_joblib():
        from joblib.externals import loky  # imported here because a worker process does not need it

    return loky.cpu_count()  # joblib's own function returns 1 without /dev/shm


@contextlib.contextmanager
def quiet_joblib() -> Iterator[None]:
    """Import joblib, or a library that uses it, without its warning about a missing /dev/shm.

    Yields
    ------
    None
        The warning, that joblib cannot start processes, is ignored inside the context.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*joblib will operate in serial mode", UserWarning)
        yield


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
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
            _limit.own = _blas_libraries(len(sys.modules)).limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _limit.lock:
            _limit.users -= 1
            if _limit.users == 0:
                _limit.own.restore_original_limits()


@functools.lru_cache(maxsize=1)
def _blas_libraries(modules):
    """Return the controller of the loaded libraries. Only the import of further `modules` can load another one."""
    return ThreadpoolController()


_limit = SimpleNamespace(lock=threading.Lock(), users=0, own=None)


@contextlib.contextmanager
def _uninterrupted():
    """Delay Ctrl-C to the end of the context. A library whose import it interrupts fails until the program ends."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # only Python's own handler raises an exception in the middle of an import
        return
    received = []
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if received:
            raise KeyboardInterrupt


@functools.cache
def compiled_loops() -> ModuleType | None:
    """Return the module `tinyvit.loops`, compiled, or None if Numba is missing or does not work."""
    log = logging.getLogger("tinyvit")
    try:
        with _uninterrupted():
            loops = importlib.import_module("tinyvit.loops")
        seconds = loops.prepare()
    except Exception as error:  # Numba, its compiler and its files on disk can fail with errors of any type
        if not (isinstance(error, ModuleNotFoundError) and error.name == "numba"):
            log.warning("note: NumPy computes without compiled loops, because Numba fails: %r", error)
        return None
    if seconds:
        later = "later runs load them from a file"
        if not loops.gelu_forward.stats.cache_path:
            later = "for later runs to load them, set NUMBA_CACHE_DIR to a folder that can be written"
        log.warning("note: Numba compiled the loops of the CPU in %.1f s; %s", seconds, later)
    return loops


@contextlib.contextmanager
def use_loops(choice: str = "auto") -> Iterator[bool]:
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
        raise ValueError("loops 'on' needs Numba: type pip install 'tinyvit[fast]', or give 'auto' or 'off'")
    token = _loops.set((loops,))
    try:
        yield loops is not None
    finally:
        _loops.reset(token)


def use_loops_for_many(images: int) -> contextlib.AbstractContextManager:
    """Return the context `use_loops("auto")` for 5,000 images or more, unless the caller is inside `use_loops`.

    With fewer images the import of Numba takes longer than the loops save.

    Parameters
    ----------
    images : int
        Number of images.

    Returns
    -------
    context manager
        `use_loops("auto")`, or a context without effect.
    """
    few_or_chosen = images < MANY_IMAGES or loops_choice() != "auto"
    return contextlib.nullcontext() if few_or_chosen else use_loops("auto")


def loops_choice() -> str:
    """Return the choice of the innermost `use_loops` around the caller.

    Returns
    -------
    {"auto", "on", "off"}
        "on" or "off" inside `use_loops`, and otherwise "auto".
    """
    chosen = _loops.get(None)
    if chosen is None:
        return "auto"
    return "off" if chosen[0] is None else "on"


def loops_for(*arrays: np.ndarray) -> ModuleType | None:
    """Return the compiled loops if they are in use and suit the arrays.

    Parameters
    ----------
    *arrays : ndarray
        The arrays of an operation.

    Returns
    -------
    module or None
        `tinyvit.loops` if all arrays are NumPy's, float32, writeable and C-contiguous. The caller checks the shapes.
    """
    (loops,) = _loops.get((None,))
    if loops is not None and all(type(array) is np.ndarray and _suits_loops(array) for array in arrays):
        return loops
    return None


def _suits_loops(array: np.ndarray) -> bool:
    flags = array.flags
    return array.dtype == np.float32 and flags.c_contiguous and flags.writeable and flags.aligned


# A tuple of the module or None. It is unset if there was no choice.
_loops: contextvars.ContextVar[tuple[ModuleType | None]] = contextvars.ContextVar("loops")
