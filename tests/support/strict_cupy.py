"""A strict stand-in for CuPy on NumPy, so that code meant for a GPU can be tested without one.

`modules` go into `sys.modules` under their names; the library then loads this as if it were CuPy. What CuPy
has no function or keyword for is missing here too, what it computes differently from NumPy is different, and
what waits for the device is counted in `synchronisations`. Signatures were read off CuPy's source; what
tinyvit has no use for is left out, so that AttributeError asks whoever needs it to look it up and add it.

In a few places this is stricter than CuPy, because what CuPy allows there is slow or hides a mistake: lists
and host arrays as indices (CuPy copies them over), `out` of another dtype (CuPy casts), NumPy's functions on
a device array (CuPy redirects them), iteration over an array (counted as a wait: a kernel an element).
"""

import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import scipy.special
from emulate import Emulated, owner_of

synchronisations = 0  # how often the host has waited for the device so far
_forbidden = 0
_lock = threading.Lock()


class SynchronisationError(AssertionError):
    """The host waited for the device inside `no_synchronisation()`."""


def _synchronise(what):
    global synchronisations
    if _captured is not None:
        raise RuntimeError(f"{what} would wait for a stream that is being captured")
    with _lock:
        synchronisations += 1
        if _forbidden:
            raise SynchronisationError(f"{what} waits for the device")


@contextmanager
def no_synchronisation():
    """Raise `SynchronisationError` where anything inside waits, in any thread; at the end, if swallowed."""
    global _forbidden
    before = synchronisations
    _forbidden += 1
    try:
        yield
    finally:
        _forbidden -= 1
    if synchronisations != before:
        raise SynchronisationError(f"{synchronisations - before} waits for the device, swallowed")


def _supported(dtype):
    dtype = np.dtype(dtype)
    if dtype.char not in "?bBhHiIlLqQefdFD":
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype.newbyteorder("=")


def _wrap(values):
    array = object.__new__(ndarray)
    array._values = values
    return array


def _device(array):
    """The values of a device array; anything else is refused."""
    if not isinstance(array, ndarray):
        raise TypeError(f"a device array is needed, not {type(array)}: nothing moves there implicitly")
    return array._values


def _operand(value):
    """The values of a device array, or a Python or NumPy number as it is; anything else is refused."""
    if isinstance(value, int | float | complex | np.number | np.bool_):
        return value
    return _device(value)


def _refuse_while_captured():
    """Refuse what CuPy refuses during capture, and what it would record without keeping the memory alive."""
    if _captured is not None:
        raise RuntimeError("an operation of CuPy's own while a stream is captured")


def _compute(function, *args, out=None, **kwargs):
    """Run a NumPy function as a kernel: without warnings; the result is new, in C order, never a scalar."""
    _refuse_while_captured()
    with np.errstate(all="ignore"):
        result = np.asarray(function(*args, **kwargs), order="C")
    return _wrap(result) if out is None else _write(out, result)


def _write(out, result):
    target = _device(out)
    if target.shape != result.shape:
        raise ValueError(f"Out shape is mismatched: {target.shape} for {result.shape}")
    if target.dtype != result.dtype:
        raise TypeError(f"out of {target.dtype} for a result of {result.dtype}")
    target[...] = result
    return out


class Flags:
    """CuPy knows these three flags and no others."""

    def __init__(self, flags):
        self.c_contiguous = flags.c_contiguous
        self.f_contiguous = flags.f_contiguous
        self.owndata = flags.owndata


class ufunc:
    """An element-wise function: device arrays and numbers in, `out` and `dtype` the only keywords."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args, out=None, dtype=None):
        inputs, given = args[: self._function.nin], args[self._function.nin :]
        if len(inputs) < self._function.nin or len(given) > 1 or (given and out is not None):
            raise TypeError(f"Wrong number of arguments for {self._function.__name__}")
        out = given[0] if given else out
        if out is not None:
            _device(out)
        options = {} if dtype is None else {"dtype": _supported(dtype)}
        return _compute(self._function, *map(_operand, inputs), out=out, order="C", **options)


def _matmul(a, b, out=None):
    return _compute(np.matmul, _device(a), _device(b), out=out)


def _operators(function):
    """The methods `a + b`, `b + a` and `a += b` of an element-wise function of two arguments."""

    def forward(self, other):
        return _compute(function, self._values, _operand(other), order="C")

    def reflected(self, other):
        return _compute(function, _operand(other), self._values, order="C")

    def in_place(self, other):
        result = _compute(function, self._values, _operand(other))._values
        if not np.can_cast(result.dtype, self.dtype, "same_kind"):
            raise TypeError(f"Cannot cast {result.dtype} to {self.dtype} with casting rule 'same_kind'")
        return _write(self, result.astype(self.dtype))

    return forward, reflected, in_place


class ndarray:
    """An array on the device. Its NumPy values are private: only what waits for the device shows them."""

    __slots__ = ("_values",)
    __array_ufunc__ = None  # NumPy's functions are refused, its operators fall back on ours

    def __init__(self, *args, **kwargs):
        raise TypeError("make device arrays with asarray, empty, zeros, ...")

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} is not for device arrays: use the array's own module")

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    strides = property(lambda self: self._values.strides)
    flags = property(lambda self: Flags(self._values.flags))
    data = property(lambda self: SimpleNamespace(ptr=self._values.ctypes.data))
    base = property(lambda self: None if self._values.base is None else _wrap(owner_of(self._values)))
    T = property(lambda self: _wrap(self._values.T))
    mT = property(lambda self: _wrap(self._values.mT))

    def __len__(self):
        return len(self._values)

    # what waits for the device

    def get(self, stream=None, order="C", out=None, blocking=True):
        _synchronise("copying to the host")
        if stream is not None or out is not None or not blocking:
            raise NotImplementedError("the stand-in copies to a new host array, at once")
        return np.array(self._values, order=order)

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    def __bool__(self):
        return bool(self.get())

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __complex__(self):
        return complex(self.get())

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        _synchronise("iteration")
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __reduce__(self):
        return asarray, (self.get(),)

    # shapes and copies

    def reshape(self, *shape, order="C"):
        return _wrap(self._values.reshape(*shape, order=order))  # a view if the layout allows it

    def transpose(self, *axes):
        return _wrap(self._values.transpose(*axes))

    def swapaxes(self, axis1, axis2):
        return _wrap(self._values.swapaxes(axis1, axis2))

    def squeeze(self, axis=None):
        return _wrap(self._values.squeeze(axis))

    def ravel(self, order="C"):
        return _wrap(self._values.ravel(order))

    def flatten(self, order="C"):
        return _wrap(self._values.flatten(order))

    def view(self, dtype=None):
        return _wrap(self._values.view() if dtype is None else self._values.view(_supported(dtype)))

    def copy(self, order="C"):
        _refuse_while_captured()
        return _wrap(self._values.copy(order))

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        if not copy and self.dtype == _supported(dtype):
            return self
        _refuse_while_captured()
        with np.errstate(all="ignore"):
            return _wrap(self._values.astype(_supported(dtype), order=order))

    def fill(self, value):
        self[...] = value

    # indices: whole numbers out of range raise, arrays of them wrap around

    def _key(self, key):
        """NumPy's form of an index, and whether it selects by arrays (a copy) or by slices alone (a view)."""
        entries = key if isinstance(key, tuple) else (key,)
        arrays = [entry for entry in entries if isinstance(entry, ndarray)]
        masks = [entry for entry in arrays if entry.dtype == np.bool_]
        if len(masks) > 1:
            raise IndexError("only one boolean array can be an index")
        consumed = sum(1 for entry in entries if entry is not None and entry is not Ellipsis)
        consumed += sum(mask.ndim - 1 for mask in masks)
        axis, found = 0, []
        for entry in entries:
            if entry is None or entry is Ellipsis:
                axis += self.ndim - consumed if entry is Ellipsis else 0
            elif isinstance(entry, ndarray):
                entry = entry._values
                if entry.dtype.kind in "iu" and axis < self.ndim and self.shape[axis]:
                    entry = entry % self.shape[axis]
                elif entry.dtype.kind not in "biu":
                    raise IndexError(f"an index array must be of integers or booleans, not {entry.dtype}")
                axis += entry.ndim if entry.dtype == np.bool_ else 1
            elif isinstance(entry, slice | int | np.integer) and not isinstance(entry, bool):
                axis += 1
            else:
                raise TypeError(f"{type(entry)} is not an index on the device")
            found.append(entry)
        if not arrays and Ellipsis not in entries:
            found.append(Ellipsis)  # so that one element is a 0-d view as well
        return tuple(found), bool(arrays), bool(masks)

    def __getitem__(self, key):
        found, by_arrays, by_mask = self._key(key)
        if by_mask:
            _synchronise("the size of a selection by a boolean array")
        return _compute(np.array, self._values[found]) if by_arrays else _wrap(self._values[found])

    def __setitem__(self, key, value):
        _refuse_while_captured()
        found, by_arrays, _ = self._key(key)
        value = _operand(value)
        with np.errstate(all="ignore"):
            if by_arrays:  # of several values for one place CuPy keeps any: here the first, in NumPy the last
                places = np.arange(self.size).reshape(self.shape)[found]
                values = np.broadcast_to(np.asarray(value).astype(self.dtype), places.shape)
                self._values[np.unravel_index(places.ravel()[::-1], self.shape)] = values.ravel()[::-1]
            else:
                self._values[found] = value

    def take(self, indices, axis=None, out=None):
        source = self._values.reshape(-1) if axis is None else self._values
        wrapped = _operand(indices) % source.shape[axis or 0]
        return _compute(np.take, source, wrapped, axis or 0, out=out)

    # reductions

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _compute(np.sum, self._values, axis=axis, dtype=dtype, keepdims=keepdims, out=out)

    def prod(self, axis=None, dtype=None, out=None, keepdims=False):
        return _compute(np.prod, self._values, axis=axis, dtype=dtype, keepdims=keepdims, out=out)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return _compute(np.mean, self._values, axis=axis, dtype=dtype, keepdims=keepdims, out=out)

    def var(self, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        return _compute(np.var, self._values, axis=axis, dtype=dtype, ddof=ddof, keepdims=keepdims, out=out)

    def std(self, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        return _compute(np.std, self._values, axis=axis, dtype=dtype, ddof=ddof, keepdims=keepdims, out=out)

    def max(self, axis=None, out=None, keepdims=False):
        return _compute(np.max, self._values, axis=axis, keepdims=keepdims, out=out)

    def min(self, axis=None, out=None, keepdims=False):
        return _compute(np.min, self._values, axis=axis, keepdims=keepdims, out=out)

    def all(self, axis=None, out=None, keepdims=False):
        return _compute(np.all, self._values, axis=axis, keepdims=keepdims, out=out)

    def any(self, axis=None, out=None, keepdims=False):
        return _compute(np.any, self._values, axis=axis, keepdims=keepdims, out=out)

    def argmax(self, axis=None, *, keepdims=False):
        return _compute(np.argmax, self._values, axis=axis, keepdims=keepdims)

    def argmin(self, axis=None, *, keepdims=False):
        return _compute(np.argmin, self._values, axis=axis, keepdims=keepdims)

    def argsort(self, axis=-1, kind=None):
        if kind not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        return _compute(np.argsort, self._values, axis=axis, kind="stable")

    def cumsum(self, axis=None, dtype=None, out=None):
        return _compute(np.cumsum, self._values, axis=axis, dtype=dtype, out=out)

    def clip(self, min=None, max=None, out=None):
        limits = [None if limit is None else _operand(limit) for limit in (min, max)]
        return _compute(np.clip, self._values, *limits, out=out)

    def round(self, decimals=0, out=None):
        return _compute(np.round, self._values, decimals, out=out)

    def dot(self, b, out=None):
        return dot(self, b, out)

    # operators

    __add__, __radd__, __iadd__ = _operators(np.add)
    __sub__, __rsub__, __isub__ = _operators(np.subtract)
    __mul__, __rmul__, __imul__ = _operators(np.multiply)
    __truediv__, __rtruediv__, __itruediv__ = _operators(np.true_divide)
    __floordiv__, __rfloordiv__, __ifloordiv__ = _operators(np.floor_divide)
    __mod__, __rmod__, __imod__ = _operators(np.remainder)
    __pow__, __rpow__, __ipow__ = _operators(np.power)
    __and__, __rand__, __iand__ = _operators(np.bitwise_and)
    __or__, __ror__, __ior__ = _operators(np.bitwise_or)
    __xor__, __rxor__, __ixor__ = _operators(np.bitwise_xor)
    __lt__, __le__ = _operators(np.less)[0], _operators(np.less_equal)[0]
    __gt__, __ge__ = _operators(np.greater)[0], _operators(np.greater_equal)[0]
    __eq__, __ne__ = _operators(np.equal)[0], _operators(np.not_equal)[0]
    __hash__ = None

    def __matmul__(self, other):
        return _matmul(self, other)

    def __rmatmul__(self, other):
        return _matmul(other, self)

    def __neg__(self):
        return _compute(np.negative, self._values, order="C")

    def __abs__(self):
        return _compute(np.absolute, self._values, order="C")

    def __invert__(self):
        return _compute(np.invert, self._values, order="C")


# making arrays


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    _refuse_while_captured()
    if order not in (None, "K") or copy is False:
        raise NotImplementedError("the stand-in keeps the order and copies if need be")
    if isinstance(a, ndarray):
        return a.astype(a.dtype if dtype is None else dtype, copy=bool(copy))
    host = np.asarray(a)
    order = "F" if host.flags.fnc else "C"
    return _wrap(np.array(host, dtype=_supported(host.dtype if dtype is None else dtype), order=order))


def array(obj, dtype=None, copy=True, order="K"):
    return asarray(obj, dtype, order, copy=copy)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def ascontiguousarray(a, dtype=None):
    values = _device(a)
    return a if dtype in (None, a.dtype) and values.flags.c_contiguous else a.astype(dtype or a.dtype, "C")


def _spoil(values):
    """Fill memory that nobody has written with what nobody would write."""
    if values.dtype.kind in "fc":
        values.fill(np.nan)
    else:
        values.fill(1 if values.dtype == np.bool_ else np.iinfo(values.dtype).max // 2 + 1)
    return _wrap(values)


def empty(shape, dtype=float, order="C"):
    return _spoil(np.empty(shape, _supported(dtype), order))


def zeros(shape, dtype=float, order="C"):
    _refuse_while_captured()
    return _wrap(np.zeros(shape, _supported(dtype), order))


def ones(shape, dtype=float, order="C"):
    _refuse_while_captured()
    return _wrap(np.ones(shape, _supported(dtype), order))


def full(shape, fill_value, dtype=None, order="C"):
    _refuse_while_captured()
    value = _operand(fill_value)
    dtype = np.asarray(value).dtype if dtype is None else dtype
    return _wrap(np.full(shape, value, _supported(dtype), order))


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return _spoil(np.empty_like(_device(prototype), dtype=dtype, order=order, shape=shape))


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    _refuse_while_captured()
    return _wrap(np.zeros_like(_device(a), dtype=dtype, order=order, shape=shape))


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    _refuse_while_captured()
    return _wrap(np.ones_like(_device(a), dtype=dtype, order=order, shape=shape))


def full_like(a, fill_value, dtype=None, order="K", subok=None, shape=None):
    _refuse_while_captured()
    return _wrap(np.full_like(_device(a), _operand(fill_value), dtype=dtype, order=order, shape=shape))


def arange(start, stop=None, step=1, dtype=None):
    limits = (0, start, step) if stop is None else (start, stop, step)
    if not all(isinstance(limit, int | float | np.number) for limit in limits):
        raise TypeError("arange needs numbers of the host")
    return _wrap(np.arange(*limits, dtype=None if dtype is None else _supported(dtype)))


def eye(N, M=None, k=0, dtype=float, order="C"):
    return _wrap(np.eye(N, M, k, _supported(dtype), order))


# functions that are not methods


def dot(a, b, out=None):
    if out is not None and not out.flags.c_contiguous:
        raise ValueError("Output array must be C-contiguous")
    return _compute(np.dot, _device(a), _device(b), out=out)


def einsum(subscripts, *operands, dtype=None, optimize=False):
    return _compute(np.einsum, subscripts, *map(_device, operands), dtype=dtype, optimize=optimize)


def tensordot(a, b, axes=2):
    return _compute(np.tensordot, _device(a), _device(b), axes)


def outer(a, b, out=None):
    return _compute(np.outer, _device(a), _device(b), out=out)


def where(condition, x=None, y=None):
    if x is None and y is None:
        return nonzero(condition)
    return _compute(np.where, _device(condition), _operand(x), _operand(y))


def nonzero(a):
    _synchronise("the number of places that are not zero")
    return tuple(map(_wrap, np.nonzero(_device(a))))


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return _compute(np.concatenate, [_device(a) for a in tup], axis, dtype=dtype, casting=casting, out=out)


def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return _compute(np.stack, [_device(a) for a in tup], axis, dtype=dtype, casting=casting, out=out)


def broadcast_to(array, shape):
    return _wrap(np.broadcast_to(_device(array), shape))


def expand_dims(a, axis):
    return _wrap(np.expand_dims(_device(a), axis))


def moveaxis(a, source, destination):
    return _wrap(np.moveaxis(_device(a), source, destination))


def tril(m, k=0):
    return _compute(np.tril, _device(m), k)


def triu(m, k=0):
    return _compute(np.triu, _device(m), k)


def array_equal(a1, a2, equal_nan=False):
    return _compute(np.array_equal, _device(a1), _device(a2), equal_nan)  # 0-d, on the device


def allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=False):
    return _compute(np.allclose, _device(a), _operand(b), rtol, atol, equal_nan)  # 0-d, on the device


def get_array_module(*args):
    return cupy if any(isinstance(arg, ndarray) for arg in args) else np


# kernels from text, streams and graphs


class RawModule:
    """The kernels of a CUDA text, emulated on the CPU (`emulate.py`)."""

    def __init__(self, *, code, options=(), backend="nvrtc"):
        if backend != "nvrtc":
            raise NotImplementedError("the stand-in has NVRTC alone")
        self._emulated = Emulated(code, options)

    def get_function(self, name):
        if name not in self._emulated.signatures:
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return Function(self._emulated, name)


class Function:
    """One kernel: `function(grid, block, arguments)`, recorded if the current stream is being captured."""

    def __init__(self, emulated, name):
        self._emulated, self._name = emulated, name

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        if shared_mem or stream is not None:
            raise NotImplementedError("the stand-in launches on the current stream, without dynamic shared memory")
        for arg in args:
            if not isinstance(arg, ndarray | np.generic):
                raise TypeError(f"{self._name}: {type(arg)} is no array of the device and no number with a dtype")
        launch = _Launch(self._emulated, self._name, grid, block, args)
        if _captured is not None:
            _captured.append(launch)
        else:
            launch.run()


class _Launch:
    """A kernel and its arguments as a graph keeps them: addresses, which keep no array alive."""

    def __init__(self, emulated, name, grid, block, args):
        self._call = emulated, name, grid, block
        arguments = [arg._values if isinstance(arg, ndarray) else arg for arg in args]
        self._arguments = [_Address(x) if isinstance(x, np.ndarray) else x for x in arguments]
        emulated.check(name, arguments)

    def run(self):
        emulated, name, grid, block = self._call
        arguments = [x.array() if isinstance(x, _Address) else x for x in self._arguments]
        emulated.launch(name, grid, block, arguments)


class _Address:
    """Where an array lies, how it looks, and whose memory it is, without keeping that alive."""

    def __init__(self, array):
        self._owner = weakref.ref(owner_of(array))
        self._interface = array.__array_interface__

    def array(self):
        if self._owner() is None:
            raise RuntimeError("a graph reads memory that has been given back")
        return np.asarray(SimpleNamespace(__array_interface__=self._interface))


class Stream:
    """A stream that can be captured. Work happens at once and in order, as where streams wait for each other."""

    def __init__(self, null=False, non_blocking=False):
        if non_blocking:
            raise NotImplementedError("the stand-in knows streams only that wait for the default stream")
        self.null = null

    def __enter__(self):
        _streams.append(self)
        return self

    def __exit__(self, *exception):
        _streams.pop()

    def synchronize(self):
        _synchronise("the stream")

    def begin_capture(self, mode=None):
        global _captured, _captured_stream
        if self.null:
            raise RuntimeError("cannot capture the default stream")
        if _captured is not None or _streams[-1] is not self:
            raise RuntimeError("capture one stream at a time, and the current one")
        _captured, _captured_stream = [], self

    def end_capture(self):
        global _captured, _captured_stream
        if _captured_stream is not self:
            raise RuntimeError("this stream is not being captured")
        launches, _captured, _captured_stream = _captured, None, None
        return Graph(launches)


class Graph:
    """Launches that were captured."""

    def __init__(self, launches):
        self._launches = launches

    def launch(self, stream=None):
        _refuse_while_captured()
        for launch in self._launches:
            launch.run()


class Event:
    """A point of a stream that the clock is read at. Work is done at once here, so that is when it is recorded."""

    def __init__(self):
        self._time = None

    def record(self, stream=None):
        if _captured is not None:
            raise NotImplementedError("the stand-in records no events in a graph")
        self._time = time.perf_counter()

    def synchronize(self):
        _synchronise("an event")


def _elapsed_time(start_event, end_event):
    """The milliseconds from one event to another."""
    if start_event._time is None or end_event._time is None:
        raise RuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
    return 1e3 * (end_event._time - start_event._time)


class Device:
    """The one device."""

    compute_capability = "90"


_streams = [Stream(null=True)]
_captured = _captured_stream = None


def _function(method):
    """The function of a method's name and signature: `sum(a, axis)` for `a.sum(axis)`."""

    def function(a, *args, **kwargs):
        _device(a)
        return method(a, *args, **kwargs)

    return function


_METHODS = (
    "sum prod mean var std max min all any argmax argmin argsort cumsum round take ravel swapaxes squeeze"
)
_UFUNCS = (
    "abs absolute add arctan2 bitwise_and bitwise_or bitwise_xor ceil cos cosh divide equal exp exp2 expm1 "
    "floor floor_divide greater greater_equal hypot invert isfinite isinf isnan less less_equal log log10 "
    "log1p log2 logical_and logical_not logical_or maximum minimum multiply negative not_equal power "
    "reciprocal remainder rint sign sin sinh sqrt square subtract tan tanh true_divide trunc"
)
_HOST = (  # the same objects as NumPy's
    "bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
    "dtype finfo iinfo issubdtype newaxis nan inf pi e"
)

cupy = ModuleType("cupy", "What `import cupy` gives while `modules` are in `sys.modules`.")
cupy.__version__ = "14.0.0+strict.stand.in"
cupy.ndarray, cupy.ufunc = ndarray, ufunc
cupy.matmul, cupy.amax, cupy.amin = _matmul, _function(ndarray.max), _function(ndarray.min)
cupy.RawModule = RawModule
cupy.cuda = SimpleNamespace(get_current_stream=lambda: _streams[-1], Stream=Stream, Graph=Graph, Device=Device)
cupy.cuda.Event, cupy.cuda.get_elapsed_time = Event, _elapsed_time
cupy.cuda.using_allocator = lambda allocator=None: nullcontext()  # every array has memory of its own here anyway
for _name in _METHODS.split():
    setattr(cupy, _name, _function(getattr(ndarray, _name)))
for _name in _UFUNCS.split():
    setattr(cupy, _name, ufunc(getattr(np, _name)))
for _name in _HOST.split():
    setattr(cupy, _name, getattr(np, _name))
for _definition in (
    *(asarray, array, asnumpy, ascontiguousarray, arange, eye, empty, zeros, ones, full),
    *(empty_like, zeros_like, ones_like, full_like, get_array_module),
    *(dot, einsum, tensordot, outer, where, nonzero, tril, triu, array_equal, allclose),
    *(concatenate, stack, broadcast_to, expand_dims, moveaxis),
):
    setattr(cupy, _definition.__name__, _definition)
cupy.clip = lambda a, a_min, a_max, out=None: _wrap(_device(a)).clip(a_min, a_max, out)
cupy.reshape = lambda a, newshape, order="C": _wrap(_device(a).reshape(newshape, order=order))
cupy.transpose = lambda a, axes=None: _wrap(_device(a).transpose(axes))
cupy.copy = lambda a, order="K": _wrap(_device(a).copy(order))

modules = {name: ModuleType(name) for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.special")}
modules["cupy"] = cupy
modules["cupyx"].scipy = modules["cupyx.scipy"]
modules["cupyx.scipy"].special = modules["cupyx.scipy.special"]
modules["cupyx.scipy.special"].erf = ufunc(scipy.special.erf)
