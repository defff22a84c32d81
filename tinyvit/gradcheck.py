"""Comparison of a backward pass with central differences in float64.

    x, w, b = rng.standard_normal((3, 8)), rng.standard_normal(8), rng.standard_normal(8)
    gradient_error(layer_norm_forward, layer_norm_backward, [x, w, b])  # three errors, near 1e-10

The function to differentiate is ``sum(out * dout)`` with a random `dout`. With ``sum(out)`` the check could miss a
bug. For example, the rows of a softmax always sum to 1, so the gradient of their sum is zero, and a backward pass
that always returns zeros would pass the check.

An error of at most 1e-7 means that the backward pass is right. An error of at least 1e-4 is a bug, and 1 means that a
gradient is missing. Errors in between usually come from an unsuitable step, or from an input near a point where the
function has no derivative.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyvit.backend import array_module, to_host
from tinyvit.checks import require_number, require_scalar

Forward = Callable[..., tuple[np.ndarray, Any]]  # forward(*inputs) -> out, cache
Backward = Callable[[np.ndarray, Any], Any]  # backward(dout, cache) -> a gradient, or a tuple or list of them

STEP = 1e-5  # the truncation error is about step**2 and the rounding error about 1e-16 / step, so both are small
RIGHT = 1e-7  # largest error of a right backward pass
REPETITIONS = 50  # a forward pass with rare random changes gives another result in one of so many
TWO_RESULTS = (
    "forward returned two results for the same inputs: switch dropout off, or create the random generator "
    "with a fixed seed inside forward"
)
SMALLEST = 1e-4  # least denominator of a relative error, because rounding dominates gradients of smaller norms


def gradient_error(
    forward: Forward,
    backward: Backward,
    inputs: Sequence[np.ndarray],
    rng: int | np.random.Generator = 0,
    step: float = STEP,
) -> list[float]:
    """Compute the relative error of the gradient of each input.

    Parameters
    ----------
    forward : callable
        Forward pass. ``forward(*inputs)`` returns ``(out, cache)``. Wrap it in a lambda to fix other arguments.
    backward : callable
        Backward pass. ``backward(dout, cache)`` returns the gradients of all inputs in order, or the only gradient.
    inputs : list of ndarray
        Float64 arrays. They should be small, because `forward` runs twice for each of their elements, and 50 times
        more if an error is large.
    rng : int or numpy.random.Generator, default 0
        Seed or generator for `dout`.
    step : float, default 1e-5
        Distance by which an element is moved in both directions.

    Returns
    -------
    list of float
        Error for each input, from 0 to 1, and infinity if a gradient is not finite.

    Raises
    ------
    TypeError
        If an input, `out` or a gradient is not a float64 array.
    ValueError
        If the number or the shapes of the gradients are not those of the inputs, or if `forward` returns two results
        for the same inputs.
    AssertionError
        If a pass wrote into its inputs, `dout`, `out` or the cache.
    """
    out, dout, analytical = _analytical(forward, backward, inputs, rng)
    numerical = numerical_gradients(forward, inputs, dout, step=step)
    pairs = list(zip(map(to_host, analytical), numerical, strict=True))
    errors = [relative_error(a, n) for a, n in pairs]
    if RIGHT < max(errors) < math.inf:
        difference = max(float(np.linalg.norm(a - n)) for a, n in pairs)
        _require_one_result(forward, inputs, out, dout, 2 * step * difference)
    return errors


def directional_error(
    forward: Forward,
    backward: Backward,
    inputs: Sequence[np.ndarray],
    rng: int | np.random.Generator = 0,
    step: float = 0.1 * STEP,
    directions: int = 3,
) -> float:
    """Compute the relative error of the derivative along random directions through all inputs.

    Unlike `gradient_error`, it needs only a few forward passes for inputs of any size, such as a whole model.

    Parameters
    ----------
    forward : callable
        Forward pass. ``forward(*inputs)`` returns ``(out, cache)``.
    backward : callable
        Backward pass. ``backward(dout, cache)`` returns the gradients of all inputs in order, or the only gradient.
    inputs : list of ndarray
        Float64 arrays.
    rng : int or numpy.random.Generator, default 0
        Seed or generator for `dout` and the directions.
    step : float, default 1e-6
        Distance by which every element is moved. All P elements move at once, so the whole distance is
        ``sqrt(P) * step``.
    directions : int, default 3
        Number of directions. `forward` runs twice for each.

    Returns
    -------
    float
        Largest error of all directions, and infinity if a derivative is not finite.

    Raises
    ------
    TypeError
        If an input, `out` or a gradient is not a float64 array.
    ValueError
        If the number or the shapes of the gradients are not those of the inputs, or if `forward` returns two results
        for the same inputs.
    AssertionError
        If a pass wrote into its inputs, `dout`, `out` or the cache.
    """
    require_number("directions", directions, minimum=1, maximum=math.inf, integer=True)
    require_scalar("step", step, minimum=0, maximum=math.inf, above=True, below=True)
    rng = _generator(rng)
    out, dout, gradients = _analytical(forward, backward, inputs, rng)
    gradients = [to_host(gradient) for gradient in gradients]
    if not all(np.isfinite(gradient).all() for gradient in gradients):
        return math.inf
    # Directions are random signs. The derivative along one has the root mean square |gradient|, but it can be nearly
    # zero by chance, so the error is divided by |gradient| instead.
    norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
    worst = largest = 0.0
    for _ in range(directions):
        signs = [rng.choice([-1.0, 1.0], x.shape) for x in inputs]
        analytical = sum(float((g * s).sum()) for g, s in zip(gradients, signs, strict=True))
        moves = [array_module(x).asarray(step * s) for x, s in zip(inputs, signs, strict=True)]
        above, _ = _run(forward, [x + move for x, move in zip(inputs, moves, strict=True)])
        below, _ = _run(forward, [x - move for x, move in zip(inputs, moves, strict=True)])
        numerical = float(((above - below) * dout).sum()) / (2 * step)
        if not math.isfinite(numerical):
            return math.inf
        difference = abs(analytical - numerical)
        worst = max(worst, difference / max(norm, abs(numerical), SMALLEST))
        largest = max(largest, difference)
    if worst > RIGHT:
        _require_one_result(forward, inputs, out, dout, 2 * step * largest)
    return worst


def numerical_gradients(
    forward: Forward, inputs: Sequence[np.ndarray], dout: np.ndarray | float, step: float = STEP
) -> list[np.ndarray]:
    """Compute the gradient of ``f = sum(out * dout)`` as ``(f(x + step) - f(x - step)) / (2 * step)``.

    Parameters
    ----------
    forward : callable
        Forward pass. ``forward(*inputs)`` returns ``(out, cache)``.
    inputs : list of ndarray
        Float64 arrays.
    dout : ndarray of the shape of `out`
        Factor of each element of `out`.
    step : float, default 1e-5
        Distance by which an element is moved in both directions.

    Returns
    -------
    list of numpy.ndarray
        Gradient of each input.
    """
    require_scalar("step", step, minimum=0, maximum=math.inf, above=True, below=True)
    gradients = []
    for i, x in enumerate(inputs):
        moved, gradient = list(inputs), np.empty(x.shape)
        for place in np.ndindex(x.shape):
            moved[i] = array_module(x).array(x)
            moved[i][place] = x[place] + step
            above, _ = _run(forward, moved)
            moved[i] = array_module(x).array(x)
            moved[i][place] = x[place] - step
            below, _ = _run(forward, moved)
            gradient[place] = float(((above - below) * dout).sum()) / (2 * step)
        gradients.append(gradient)
    return gradients


def analytical_gradients(
    forward: Forward, backward: Backward, inputs: Sequence[np.ndarray], rng: int | np.random.Generator = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run both passes with a random `dout`, and check that they change none of their arguments.

    Parameters
    ----------
    forward : callable
        Forward pass. ``forward(*inputs)`` returns ``(out, cache)``.
    backward : callable
        Backward pass. ``backward(dout, cache)`` returns the gradients of all inputs in order, or the only gradient.
    inputs : list of ndarray
        Float64 arrays.
    rng : int or numpy.random.Generator, default 0
        Seed or generator for `dout`.

    Returns
    -------
    dout : ndarray of the shape of `out`
        Standard normal numbers.
    gradients : list of ndarray
        Gradients that `backward` returned for this `dout`.

    Raises
    ------
    TypeError
        If an input, `out` or a gradient is not a float64 array.
    ValueError
        If the number or the shapes of the gradients are not those of the inputs, or if `forward` returns two results
        for the same inputs.
    AssertionError
        If a pass wrote into its inputs, `dout`, `out` or the cache.
    """
    return _analytical(forward, backward, inputs, rng)[1:]


def _analytical(forward, backward, inputs, rng):
    """Return out as a NumPy array, dout and the gradients, after the checks of `analytical_gradients`."""
    if not isinstance(inputs, list | tuple) or not inputs:
        raise TypeError(f"inputs must be a list of float64 arrays, not {inputs!r:.40}: use [x] for one array")
    for i, x in enumerate(inputs):
        if getattr(x, "dtype", None) != np.float64:
            found = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"input {i} must be a float64 array, not {found}: use np.asarray(x, np.float64)")
    watched = {f"input {i}": x for i, x in enumerate(inputs)}
    before = _contents(watched)
    out, cache = _run(forward, inputs)
    _assert_same(before, watched, "forward")
    if getattr(out, "dtype", None) != np.float64:
        name = getattr(out, "dtype", type(out).__name__)
        raise TypeError(f"out must be a float64 array or a number, not {name}: let forward compute in float64")
    first = np.array(to_host(out))
    second = to_host(_run(forward, inputs)[0])
    if first.shape != second.shape or not np.allclose(first, second, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError(TWO_RESULTS)

    dout = array_module(inputs[0]).asarray(_generator(rng).standard_normal(out.shape))
    watched |= {"dout": dout, "out": out} | dict(_arrays(cache, "cache"))
    before = _contents(watched)
    gradients = backward(dout, cache)
    _assert_same(before, watched, "backward")

    gradients = list(gradients) if isinstance(gradients, tuple | list) else [gradients]
    for i, gradient in enumerate(gradients):
        if getattr(gradient, "dtype", None) != np.float64:
            name = getattr(gradient, "dtype", type(gradient).__name__)
            raise TypeError(f"gradient {i} must be a float64 array, not {name}: return one gradient per input")
    found, expected = [gradient.shape for gradient in gradients], [x.shape for x in inputs]
    if found != expected:
        raise ValueError(
            f"backward returned gradients of shapes {found} for inputs of shapes {expected}: "
            "return one gradient per input, in the order of the inputs"
        )
    return first, dout, gradients


def _require_one_result(forward, inputs, first, dout, difference):
    """Raise `ValueError` if repeated forward passes differ so much that this explains a difference of sums.

    `difference` is that of ``sum(out * dout)`` which belongs to the error of the gradient. Rounding is far smaller.
    """
    for _ in range(REPETITIONS):
        out = to_host(_run(forward, inputs)[0])
        if out.shape != first.shape or abs(((out - first) * to_host(dout)).sum()) > 0.01 * difference:
            raise ValueError(TWO_RESULTS)


def relative_error(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Compute ``|a - b| / (|a| + |b|)`` with Euclidean norms.

    Parameters
    ----------
    a : ndarray
        First array.
    b : ndarray of the shape of `a`
        Second array.

    Returns
    -------
    float
        0 for equal arrays, 1 if only one of them is zero, and infinity if one of them is not finite.
    """
    a, b = to_host(a), to_host(b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, but have {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    norms = float(np.linalg.norm(a) + np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / max(norms, SMALLEST)


def _run(forward, inputs):
    """Return out and the cache of a forward pass. A loss that is a Python number becomes an array."""
    result = forward(*inputs)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"forward must return (out, cache), not {type(result).__name__}")
    out, cache = result
    return np.asarray(out, np.float64) if isinstance(out, int | float) else out, cache


def _generator(rng: int | np.random.Generator) -> np.random.Generator:
    """Return a generator. It differs from ``default_rng(rng)``, which may have drawn the inputs already."""
    if isinstance(rng, np.random.Generator):
        return rng
    if not isinstance(rng, int | np.integer) or rng < 0:
        raise ValueError(f"rng must be a seed from 0 or a numpy.random.Generator, not {rng!r}")
    return np.random.default_rng([*b"dout", rng])


def _arrays(cache: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the array of every member of a cache of nested tuples, lists and mappings."""
    if isinstance(cache, Mapping):
        for key in cache:
            yield from _arrays(cache[key], f"{name}[{key!r}]")
    elif isinstance(cache, tuple | list):
        for i, entry in enumerate(cache):
            yield from _arrays(entry, f"{name}[{i}]")
    elif hasattr(cache, "dtype"):
        yield name, cache


def _contents(watched: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {name: to_host(array).tobytes() for name, array in watched.items()}


def _assert_same(before: Mapping[str, bytes], watched: Mapping[str, np.ndarray], name_of_pass: str) -> None:
    changed = [name for name, content in _contents(watched).items() if content != before[name]]
    if changed:
        raise AssertionError(f"{name_of_pass} wrote into {', '.join(changed)}: compute in a new array instead")
