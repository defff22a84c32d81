"""Is a backward pass the derivative of its forward pass? Central differences in float64 tell.

    x, w, b = rng.standard_normal((3, 8)), rng.standard_normal(8), rng.standard_normal(8)
    gradient_error(layer_norm_forward, layer_norm_backward, [x, w, b])  # three errors, near 1e-10

What is differentiated is f = sum(out * dout), for a `dout` drawn at random. The plain sum(out) would not do: the
rows of a softmax sum to one whatever goes in, so the true gradient of that sum is zero, and a backward pass that
returns nothing but zeros would pass.

How to read an error: 1e-7 and below is right, 1e-4 and above is a bug, and 1 is a gradient that is not there at
all. What lies between is mostly a step of the wrong size, or an input near a kink.
"""

import math
from collections.abc import Mapping

import numpy as np

from tinyvit.backend import array_module, to_host

STEP = 1e-5  # the formula's error falls as step**2, that of rounding grows as 1e-16 / step: here both are small
SMALLEST = 1e-4  # a gradient whose norm is below this drowns in rounding, and counts as if this were its norm


def gradient_error(forward, backward, inputs, rng=0, step=STEP):
    """Return the relative error of the gradient of each input: a list of numbers, 0 at best and 1 at worst.

    forward(*inputs) gives (out, cache); backward(dout, cache) gives the gradients of all inputs in their order,
    or the bare gradient of an only one. What is not differentiated (labels, the heads) goes into a lambda.
    inputs: float64 arrays, small ones, as forward runs twice for each of their elements; rng: a seed or a NumPy
    generator, for dout; step: how far an element is moved to either side.
    A gradient that is not finite has the error infinity. Raises as `analytical_gradients` does.
    """
    dout, analytical = analytical_gradients(forward, backward, inputs, rng)
    numerical = numerical_gradients(forward, inputs, dout, step)
    return [relative_error(a, n) for a, n in zip(analytical, numerical, strict=True)]


def directional_error(forward, backward, inputs, rng=0, step=0.1 * STEP, directions=3):
    """Return the relative error of the derivative along random directions through all inputs at once.

    The arguments are those of `gradient_error`; but here forward runs twice for each of the `directions`, however
    large the inputs, so that a whole model can be checked. The worst error of all directions is returned.
    The default step is smaller than there: all P elements move, and their way is sqrt(P) steps long.
    """
    rng = _generator(rng)
    dout, gradients = analytical_gradients(forward, backward, inputs, rng)
    gradients = [to_host(gradient) for gradient in gradients]
    if not all(np.isfinite(gradient).all() for gradient in gradients):
        return math.inf
    # a direction of signs has the expected slope |gradient|; signs may happen to cancel, so that is what divides
    norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
    worst = 0.0
    for _ in range(directions):
        signs = [rng.choice([-1.0, 1.0], x.shape) for x in inputs]
        analytical = sum(float((g * s).sum()) for g, s in zip(gradients, signs, strict=True))
        moves = [array_module(x).asarray(step * s) for x, s in zip(inputs, signs, strict=True)]
        above, _ = forward(*(x + move for x, move in zip(inputs, moves, strict=True)))
        below, _ = forward(*(x - move for x, move in zip(inputs, moves, strict=True)))
        numerical = float(((above - below) * dout).sum()) / (2 * step)
        if not math.isfinite(numerical):
            return math.inf
        worst = max(worst, abs(analytical - numerical) / max(norm, abs(numerical), SMALLEST))
    return worst


def numerical_gradients(forward, inputs, dout, step=STEP):
    """Return d sum(out * dout) / d input for each input: (f(x + step) - f(x - step)) / (2 step), one by one."""
    gradients = []
    for i, x in enumerate(inputs):
        moved, gradient = list(inputs), np.empty(x.shape)
        for place in np.ndindex(x.shape):
            moved[i] = array_module(x).array(x)
            moved[i][place] = x[place] + step
            above, _ = forward(*moved)
            moved[i] = array_module(x).array(x)
            moved[i][place] = x[place] - step
            below, _ = forward(*moved)
            gradient[place] = float(((above - below) * dout).sum()) / (2 * step)
        gradients.append(gradient)
    return gradients


def analytical_gradients(forward, backward, inputs, rng=0):
    """Draw dout, and return it and the list of what `backward` makes of it, if both passes keep their promises.

    Raises `TypeError` on an input that is no float64 array, `ValueError` if the gradients do not have the number
    and the shapes of the inputs, and `AssertionError` if a pass wrote into an input, dout, out or the cache.
    """
    for i, x in enumerate(inputs):
        if getattr(x, "dtype", None) != np.float64:
            found = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"input {i} must be a float64 array, or rounding hides the difference, not {found}")
    watched = {f"input {i}": x for i, x in enumerate(inputs)}
    before = _contents(watched)
    out, cache = forward(*inputs)
    _assert_same(before, watched, "forward")

    dout = array_module(inputs[0]).asarray(_generator(rng).standard_normal(out.shape))
    watched |= {"dout": dout, "out": out} | dict(_arrays(cache, "cache"))
    before = _contents(watched)
    gradients = backward(dout, cache)
    _assert_same(before, watched, "backward")

    gradients = list(gradients) if isinstance(gradients, tuple | list) else [gradients]
    found, expected = [gradient.shape for gradient in gradients], [x.shape for x in inputs]
    if found != expected:
        raise ValueError(f"backward gave gradients of shapes {found} for inputs of shapes {expected}")
    return dout, gradients


def relative_error(a, b):
    """Return |a - b| / (|a| + |b|), of Euclidean norms: 0 for equal arrays, 1 if one of the two is zero."""
    a, b = to_host(a), to_host(b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a) + np.linalg.norm(b), SMALLEST))


def _generator(rng):
    """A seed gets a stream of its own: default_rng(0) may have drawn the inputs, and dout must not equal one."""
    return rng if isinstance(rng, np.random.Generator) else np.random.default_rng([*b"dout", rng])


def _arrays(cache, name):
    """Yield the name and the array of everything in a cache of nested tuples, lists and mappings."""
    if isinstance(cache, Mapping):
        for key in cache:
            yield from _arrays(cache[key], f"{name}[{key!r}]")
    elif isinstance(cache, tuple | list):
        for i, entry in enumerate(cache):
            yield from _arrays(entry, f"{name}[{i}]")
    elif hasattr(cache, "dtype"):
        yield name, cache


def _contents(watched):
    return {name: to_host(array).tobytes() for name, array in watched.items()}


def _assert_same(before, watched, culprit):
    changed = [name for name, content in _contents(watched).items() if content != before[name]]
    if changed:
        raise AssertionError(f"{culprit} wrote into {', '.join(changed)}")
