"""Checks of arguments, with one clear error each, and comparison by identity."""

import contextlib
import contextvars
import functools
import math
import operator
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tinyvit.backend import Backend, to_host

EXCESS = 1e-4  # pixels may leave the range from 0 to 1 by this much, by rounding or in a gradient check
Class = TypeVar("Class", bound=Any)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def require_number(
    name: str,
    value: object,
    minimum: float,
    maximum: float,
    integer: bool = False,
    below: bool = False,
    above: bool = False,
) -> None:
    """Check that a setting is a number within limits.

    Parameters
    ----------
    name : str
        Name of the setting in the error.
    value : object
        Value to check.
    minimum : float
        Smallest permitted value.
    maximum : float
        Largest permitted value.
    integer : bool, default False
        Whether the number must be an `int`.
    below : bool, default False
        Whether `maximum` itself is excluded.
    above : bool, default False
        Whether `minimum` itself is excluded.

    Raises
    ------
    ValueError
        If the value is of another type or out of range.
    """
    types, noun = (int, "an integer") if integer else (int | float, "a number")
    finite = integer or not isinstance(value, int | float) or abs(value) <= sys.float_info.max
    fits = isinstance(value, types) and not isinstance(value, bool) and minimum <= value <= maximum
    fits = fits and (finite or isinstance(value, float))  # an integer beyond all floats cannot be computed with
    if not fits or (below and value == maximum) or (above and value == minimum):
        noun = "a finite number" if not finite and below and maximum == math.inf else noun
        start = "" if minimum == -math.inf else f" {'above' if above else 'from'} {minimum}"
        limit = f"{maximum:,}" if integer else f"{maximum}"
        end = "" if maximum == math.inf else f" to {'below ' if below else ''}{limit}"
        raise ValueError(f"{name} must be {noun}{start}{end}, not {value!r:.60}")


def require_scalar(name: str, value: object, minimum: float, maximum: float, **options: bool) -> None:
    """Check an argument of a computation as `require_number` does. It may also be a number of NumPy."""
    if type(value) is not float or not minimum < value < maximum or options.get("integer"):  # mostly one comparison
        value = value.item() if isinstance(value, np.generic) else value
        require_number(name, value, minimum, maximum, **options)


def require_backend(value: object) -> None:
    """Raise `TypeError` unless an argument is a backend, for example if it is the name of a device."""
    if not isinstance(value, Backend):
        advice = f": use tinyvit.gpu.get_backend({value!r})" if isinstance(value, str) else ""
        raise TypeError(f"backend must be a tinyvit.backend.Backend, not {value!r:.40}{advice}")


def python_numbers(value: Any) -> Any:
    """Return a setting with NumPy's numbers and arrays as Python's numbers and lists. Only these fit into JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return type(value)(map(python_numbers, value)) if type(value) in (tuple, list) else value


def require_cache(cache: Any, count: int, forward: str) -> Any:
    """Return a cache of a forward pass, after checking that it is a tuple with `count` members."""
    if not isinstance(cache, tuple | list) or len(cache) != count:
        raise TypeError(f"cache must be the cache of {forward}, not {cache!r:.40}")
    return cache


def require_divisor(name: str, value: Any, of: str, *lengths: int) -> None:
    """Check that a value is an integer from 1 that divides lengths.

    Parameters
    ----------
    name : str
        Name of the value in the error.
    value : object
        Value to check.
    of : str
        Name of the lengths in the error.
    *lengths : int
        Lengths that must be multiples of the value.

    Raises
    ------
    ValueError
        If the value is not such an integer.
    """
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1
    for length in lengths:
        if not integer or length % value:
            raise ValueError(f"{name} must be an integer that divides {of}, but {value!r} does not divide {length}")


def require_arrays(form: str, *arrays: np.ndarray | None) -> None:
    """Check the shapes and dtypes of the arrays of an operation.

    Parameters
    ----------
    form : str
        Names and shapes, such as ``"x (..., I), w (I, O), db (O) or None"``. The first array with a size or "..."
        defines it, and the others must agree. A size other than B and N must be at least 1.
    *arrays : ndarray
        Arrays in this order, which must be float32 or float64 and on one device.

    Raises
    ------
    TypeError
        If an argument is not an array, or is of another dtype or on another device.
    ValueError
        If a shape does not fit.
    """
    if _checked.get():
        return
    try:
        kinds = tuple(map(_kind_of, arrays))
    except AttributeError:
        kinds = tuple((type(a), getattr(a, "dtype", None), getattr(a, "shape", None)) for a in arrays)
    _check_arrays(form, kinds)


@contextlib.contextmanager
def arguments_checked() -> Iterator[None]:
    """Skip `require_arrays`, which takes a microsecond, in all operations of a model with checked arguments.

    Yields
    ------
    None
        The checks are skipped inside the context.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


_checked = contextvars.ContextVar("checked", default=False)
_kind_of = operator.attrgetter("__class__", "dtype", "shape")


@functools.lru_cache(4096)
def _check_arrays(form, kinds):
    sizes, first = {}, None
    parts = re.findall(r"([\w.]+) \((.*?)\)( or None)?", form)
    for (name, shape, optional), (kind, dtype, actual) in zip(parts, kinds, strict=True):
        if kind is type(None) and optional:
            continue
        device = _device_of(kind)
        if device is None:
            advice = "" if kind is type(None) else f": use np.asarray({name})"
            advice = f": use {name}.filled(0)" if issubclass(kind, np.ma.MaskedArray) else advice
            raise TypeError(f"{name} must be a NumPy or CuPy array, not {kind.__name__}{advice}")
        if dtype not in FLOATS:
            raise TypeError(f"{name} must be float32 or float64, not {dtype}: use {name}.astype(np.float32)")
        first = first or (name, device)
        if device != first[1]:
            raise TypeError(f"{name} must be on the {first[1]}, where {first[0]} is, not on the {device}")
        axes, lengths = shape.split(", "), actual
        if axes[0] == "..." and len(actual) >= len(axes) - 1:  # the leading axes count as one
            leading = len(actual) - len(axes) + 1
            lengths = (actual[:leading], *actual[leading:])
        fits = len(lengths) == len(axes)
        for axis, length in zip(axes, lengths, strict=True) if fits else ():
            if axis.isidentifier() or axis == "...":
                sizes.setdefault(axis, length)
            expected = sizes[axis] if axis in sizes else eval(axis, {}, sizes)  # only the text of a form gets here
            if length == expected == 0 and axis not in ("B", "N"):
                raise ValueError(f"{name} must have the shape ({shape}) with {axis} at least 1, not {actual}")
            fits = fits and length == expected
        if not fits:
            known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if axis in shape)
            where = f" for {known}" if known else ""
            raise ValueError(f"{name} must have the shape ({shape}){where}, not {actual}")


def _device_of(kind):
    """Return "CPU" or "GPU" for a class of arrays, and None for other classes."""
    if issubclass(kind, np.ndarray | np.generic):
        return None if issubclass(kind, np.ma.MaskedArray | np.matrix) else "CPU"
    cupy = sys.modules.get("cupy")
    return "GPU" if cupy is not None and issubclass(kind, cupy.ndarray) else None


def as_array(name: str, value: Any) -> np.ndarray:
    """Return an array as it is, and convert lists and other sequences of numbers to NumPy.

    Parameters
    ----------
    name : str
        Name of the argument in the error.
    value : array_like
        Array on any device, nested sequence of numbers, or object that NumPy converts.

    Returns
    -------
    ndarray
        Array with numbers or booleans.

    Raises
    ------
    TypeError
        If `value` does not consist of numbers.
    ValueError
        If its rows have different lengths.
    """
    if _device_of(type(value)) == "GPU":
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: use {name}.filled(0)")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array, or lists of equal lengths: {error}") from error
    if array.dtype.kind not in "buifc":
        found = type(value).__name__ + (f" of {array.dtype}" if array.ndim else "")
        raise TypeError(f"{name} must be an array of numbers, not {found}")
    return array


def as_images(
    images: npt.ArrayLike,
    shape: tuple[int, ...] | None = None,
    channels: int | None = None,
    bytes_only: bool = False,
    wait: bool = False,
) -> np.ndarray:
    """Check images and return them as an array.

    Lists and other objects that NumPy converts to integers from 0 to 255 become uint8. An array of another integer
    dtype is an error. So are integers whose maximum is 1, which may mean white or almost black.

    Parameters
    ----------
    images : array_like of shape (B, R, C) or (B, R, C, channels)
        Images, uint8 from 0 to 255 or float from 0 to 1. One channel needs no axis.
    shape : tuple of int, optional
        Rows and columns of one image. By default any are accepted.
    channels : int, optional
        Numbers per pixel. By default 1 to 4 are accepted.
    bytes_only : bool, default False
        Whether the images must be uint8.
    wait : bool, default False
        Whether to check the range of float images on a GPU too, which waits for the device.

    Returns
    -------
    ndarray of shape (B, R, C) or (B, R, C, channels)
        Images on their device. An array is not copied.

    Raises
    ------
    TypeError
        If `images` does not consist of numbers.
    ValueError
        If the shape, the dtype or a pixel does not fit.
    """
    first = images[0] if isinstance(images, list | tuple) and images else images
    if isinstance(first, str | bytes | os.PathLike):
        path = os.fsdecode(first)
        raise TypeError(f"images must be an array, not the path {path!r}: type tinyvit predict {path} in a shell")
    array = as_array("images", images)
    dtype = array.dtype
    if not _is_shape_of_images(array.shape, shape, channels):
        expected = ", ".join(map(str, [*(shape or "RC"), *([channels] if channels and channels > 1 else [])]))
        advice = _shape_advice(array.shape, shape, channels)
        raise ValueError(f"images must have the shape (B, {expected}) with B at least 1, not {array.shape}{advice}")
    if dtype.kind in "iu" and array is not images and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    on_cpu = _device_of(type(array)) == "CPU"
    seen = array is images and _checked.get()  # one batch of a data set may be almost black
    if dtype.kind == "f" and not bytes_only:
        if wait or on_cpu:
            _require_unit_range(array)
    elif array.dtype != np.uint8 or ((wait or on_cpu) and not seen and array.max() == 1):
        expected = "uint8 (0 to 255)" if bytes_only else "uint8 (0 to 255) or float (0 to 1)"
        name = "images" if array is images else "np.asarray(images)"
        raise ValueError(f"images must be {expected}, not {dtype}{_dtype_advice(name, to_host(array))}")
    return array


def _dtype_advice(name, images):
    """Return the range of images of a wrong dtype, and how to convert them to uint8."""
    low, high = float(images.real.min()), float(images.real.max())
    advice = "scale them so that black is 0 and white is 255"
    if low >= 0 and high <= 1:
        advice = f"use (255.0 * {name}).round().astype(np.uint8) if white is 1"
    elif low >= 0 and high <= 255:
        advice = f"use {name}.astype(np.uint8) if white is 255"
    return f" with pixels from {low:.7g} to {high:.7g}: {advice}"


def _is_shape_of_images(found, shape, channels):
    """Return whether an array has a shape of images."""
    last = found[3] if len(found) == 4 else 1
    if len(found) not in (3, 4) or 0 in found or (shape and found[1:3] != tuple(shape)):
        return False
    return last <= 4 if channels is None else last == channels


def _shape_advice(found, shape, channels):
    """Return how to give images of another shape the right one, or an empty text."""
    if shape is None and found:  # any rows, columns and channels
        one_image = len(found) == 2 and max(found) < 2 * min(found)
        shape = found[2:] if len(found) == 4 else found if one_image else 2 * (math.isqrt(found[-1]),)
    shape = shape or ()
    one = (*shape, channels) if channels and channels > 1 else tuple(shape)
    if found in (one, (*one, 1)):
        return ": give one image as images[None]"
    if len(found) == 4 and found[2:] == tuple(shape) and found[1] in (channels or 3, 1):
        return ": use images.transpose(0, 2, 3, 1), which moves the channels to the end"
    flattened = found[-1:] == (math.prod(one),)
    if 0 not in found and (flattened or tuple(length for length in found[1:] if length != 1) == one):
        return f": use images.reshape(-1, {', '.join(map(str, one))})"
    return ""


def _require_unit_range(images):
    """Raise `ValueError` unless all pixels of float images are from 0 to 1."""
    with np.errstate(invalid="ignore"):  # NaN raises the error below
        low, high = images.min(), images.max()
    if low >= -EXCESS and high <= 1 + EXCESS:
        return
    pixels = to_host(images).reshape(len(images), -1)
    fits = ((pixels >= -EXCESS) & (pixels <= 1 + EXCESS)).all(axis=1)
    index = int(fits.argmin())
    low, high = pixels[index].min(), pixels[index].max()
    if not np.isfinite(pixels[index]).all():
        problem = "has pixels that are NaN or infinite: replace them"
    elif low >= -0.1 and high <= 1.1:  # as after interpolation
        problem = f"has pixels from {low:g} to {high:g}: use np.clip(images, 0, 1)"
    elif low >= 0:
        problem = f"has pixels from {low:g} to {high:g}: divide by 255 if white is 255"
    else:
        problem = (
            f"has pixels from {low:g} to {high:g}: undo the standardisation, since the model normalises pixels itself"
        )
    raise ValueError(f"float images must have pixels from 0 to 1, but image {index} {problem}")


def as_labels(labels: npt.ArrayLike, count: int, classes: int | None = None) -> np.ndarray:
    """Check labels and return them as a NumPy array.

    Parameters
    ----------
    labels : array_like of shape (count,)
        Integer labels.
    count : int
        Number of images.
    classes : int, optional
        Number of classes. By default every label from 0 is accepted.

    Returns
    -------
    numpy.ndarray of shape (count,)
        Labels. An integer array on the CPU is not copied.

    Raises
    ------
    TypeError
        If `labels` does not consist of numbers.
    ValueError
        If the shape or the dtype does not fit, or a label is out of range.
    """
    labels = to_host(as_array("labels", labels))
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        if labels.ndim == 2:
            advice = f": use labels.{'argmax(axis=1)' if labels.shape[1] > 1 else 'ravel()'}"
        else:
            advice = ": use labels.astype(int)" if labels.shape == (count,) else ""
        raise ValueError(
            f"labels must be integers of shape ({count},), one per image, not {labels.dtype} {labels.shape}{advice}"
        )
    wrong = labels[(labels < 0) | (labels >= (math.inf if classes is None else classes))]
    if wrong.size:
        limit = "from 0" if classes is None else f"in 0 to {classes - 1}, the classes of the model"
        raise ValueError(f"labels must be {limit}, but one is {wrong[0]}")
    return labels


def by_identity(cls: Class) -> Class:
    """Make the objects of a class equal only to themselves, because ``==`` of arrays has no single truth value."""
    cls.__eq__ = lambda self, other: self is other
    cls.__ne__ = lambda self, other: self is not other
    cls.__hash__ = object.__hash__
    return cls
