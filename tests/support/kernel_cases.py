"""One launch of each kernel, of any size, with the results of the plain operation in float64.

The plain operation is from `tinyvit.reference`, or from `tinyvit.ops` for the tanh form of GELU and smoothed labels,
which the reference does not have.

    case = CASES["linear_forward"](config, seed=0, rows=5)
    case.call(kernels, arrays)              # `arrays` are case.arrays on the device
    case.expected                           # the arrays that the launch must write, by name

An array that a launch must write is full of NaN before the launch. Memory that it must not write has other numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from strategies import decayed_adam_step

from tinyvit import ops, reference
from tinyvit.data.augment import Augmentation, warp
from tinyvit.model import ViTConfig
from tinyvit.optim import ExponentialMovingAverage, clip_by_global_norm

CONFIGS = {
    # No size is a multiple of 32. GELU has its tanh form.
    "odd": ViTConfig(image_size=9, patch_size=3, width=40, heads=2, mlp_width=50, classes=5, gelu="tanh"),
    # There is one patch, and one head that is wider than a warp.
    "one patch": ViTConfig(image_size=4, patch_size=4, width=33, heads=1, mlp_width=7, classes=40),
    # Images and patches are wider than high and have colours.
    "colours": ViTConfig(
        image_size=(6, 12),
        patch_size=(2, 4),
        channels=3,
        width=36,
        heads=2,
        mlp_width=40,
        classes=6,
        pixel_mean=(0.4, 0.5, 0.3),
        pixel_deviation=(0.2, 0.3, 0.1),
    ),
    # There are more tokens than a warp has lanes.
    "many tokens": ViTConfig(image_size=12, patch_size=2, width=44, heads=2, mlp_width=128, classes=10),
}
UNTOUCHED = 7.0  # fills the memory that a launch must not write


@dataclass
class Case:
    """A launch: its arrays by name, the expected values of those that it writes, and a function that launches it.

    An error is relative to the largest expected number, or to the number in `scales`. For a product x @ w that is the
    largest element of |x| @ |w|, because a sum of large terms may be near zero.
    """

    arrays: dict
    expected: dict
    call: Callable
    scales: dict = field(default_factory=dict)


def unwritten(*shape, dtype=np.float32):
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 99, dtype)


def normals(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def double(*arrays):
    return [None if array is None else array.astype(np.float64) for array in arrays]


def exact(x):
    return x.astype(np.float64)


def rounded_to(bits, to_even):
    """Return a function that rounds float32 to a mantissa of `bits` bits with the leading one, in float64."""

    def rounded(x):
        x = x.astype(np.float64)
        _, exponent = np.frexp(x)  # x = m * 2**exponent with 0.5 <= m < 1
        unit = np.ldexp(1.0, np.maximum(exponent, -125) - bits)  # below 2**-126 the units stay the same
        with np.errstate(invalid="ignore", over="ignore"):
            quotient = np.rint(x / unit) if to_even else np.copysign(np.floor(np.abs(x / unit) + 0.5), x)
            return (quotient * unit).astype(np.float32).astype(np.float64)

    return rounded


ROUNDED = {"float32": exact, "tf32": rounded_to(11, to_even=False), "bfloat16": rounded_to(8, to_even=True)}


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


def linear_forward(
    config, seed=0, rows=35, inputs=40, outputs=33, bias=True, residual=True, every=2, rounded=exact
):
    x, w, b, r = normals(seed, (rows, inputs), (inputs, outputs), (outputs,), (rows * every, outputs))
    expected, _ = reference.linear_forward(rounded(x), rounded(w), b.astype(np.float64) * bias)
    expected += r[::every].astype(np.float64) * residual
    scale = (np.abs(x) @ np.abs(w)).max() + 5  # b and r

    def call(kernels, a):
        kernels.linear_forward(**{"b": None, **a}, residual_every=every)

    arrays = {"x": x, "w": w, "b": b, "out": unwritten(rows, outputs), "residual": r}
    arrays = without(arrays, *["b"] * (not bias), *["residual"] * (not residual))
    return Case(arrays, {"out": expected}, call, {"out": scale})


def linear_gelu_forward(config, seed=0, rows=35, inputs=40, outputs=33, scale=1.0, rounded=exact):
    x, w, b = normals(seed, (rows, inputs), (inputs, outputs), (outputs,))
    w *= np.float32(scale / math.sqrt(inputs))
    hidden, _ = reference.linear_forward(rounded(x), rounded(w), *double(b))
    if config.gelu == "erf":
        out, cache = reference.gelu_forward(hidden)
        derivative = reference.gelu_backward(np.ones(hidden.shape), cache)
    else:
        out, cache = ops.gelu_tanh_forward(hidden)
        derivative = ops.gelu_backward(np.ones(hidden.shape), cache)
    arrays = {"x": x, "w": w, "b": b, "out": unwritten(rows, outputs), "derivative": unwritten(rows, outputs)}
    scale = (np.abs(x) @ np.abs(w)).max() + 5  # b; the derivatives of both functions are below 1.2
    scales = {"out": scale, "derivative": scale}
    expected = {"out": out, "derivative": derivative}
    return Case(arrays, expected, lambda kernels, a: kernels.linear_gelu_forward(**a), scales)


class Partials:
    """Memory for `partials` sets of gradients, `step` numbers apart, with gaps before, between and after the arrays.

    A launcher receives views of the first set. `expected` computes the content of the whole memory.
    """

    def __init__(self, partials, gap=5, **shapes):
        self.partials, self.shapes, self.places, end = partials, shapes, {}, 3
        for name, shape in shapes.items():
            self.places[name] = end
            end += math.prod(shape) + gap
        self.step = end
        self.memory = np.full((partials, end), UNTOUCHED, np.float32)

    def first(self, memory):
        """Return views of the first set in memory (S, step) on any device, by name."""
        views = {}
        for name, shape in self.shapes.items():
            place = self.places[name]
            views[name] = memory[0, place : place + math.prod(shape)].reshape(shape)
        return views

    def expected(self, rows, gradients):
        """Return the expected memory. `gradients` gives the gradients of a slice of the rows by name, or None."""
        expected = self.memory.astype(np.float64)
        each = -(-rows // self.partials)
        for partial in range(self.partials):
            for name, gradient in gradients(slice(partial * each, (partial + 1) * each)).items():
                if gradient is not None:
                    place = self.places[name]
                    expected[partial, place : place + gradient.size] = gradient.ravel()
        return expected


def linear_backward(
    config, seed=0, rows=35, inputs=40, outputs=33, partials=3, dx=True, db=True, derivative=True, rounded=exact
):
    dout, x, w, slope = normals(seed, (rows, outputs), (rows, inputs), (inputs, outputs), (rows, inputs))
    memory = Partials(partials, dw=(inputs, outputs), db=(outputs,))

    def backward(part, rounded):
        _, cache = reference.linear_forward(rounded(x[part]), rounded(w), np.zeros(outputs))
        return reference.linear_backward(rounded(dout[part]), cache)

    def gradients(part):
        _, dw, _ = backward(part, rounded)
        _, _, db_exact = backward(part, exact)  # the gradient of the bias is summed before any rounding
        return {"dw": dw, "db": db_exact if db else None}

    expected = {"partial_gradients": memory.expected(rows, gradients)}
    if dx:
        expected["dx"] = backward(slice(None), rounded)[0] * (slope if derivative else 1)

    def call(kernels, a):
        first = memory.first(a["partial_gradients"])
        if not db:
            first["db"] = None
        others = {"dx": None, **without(a, "partial_gradients")}
        kernels.linear_backward(**others, **first, partials=partials, partial_step=memory.step)

    arrays = {"dout": dout, "x": x, "w": w, "dx": unwritten(rows, inputs), "partial_gradients": memory.memory}
    arrays["derivative"] = slope
    arrays = without(arrays, *["dx"] * (not dx), *["derivative"] * (not derivative))
    scales = {
        "dx": (np.abs(dout) @ np.abs(w.T) * np.abs(slope)).max(),
        "partial_gradients": max(UNTOUCHED, (np.abs(x.T) @ np.abs(dout)).max()),
    }
    return Case(arrays, expected, call, scales)


def layer_norm_forward(config, seed=0, rows=11, offset=3.0, spread=1.0):
    x, w, b = normals(seed, (rows, config.width), (config.width,), (config.width,))
    x = x * np.float32(spread) + np.float32(offset)
    plain = x.astype(np.float64)
    out, _ = reference.layer_norm_forward(plain, *double(w, b), config.epsilon)
    normalised, _ = reference.layer_norm_forward(plain, 1.0, 0.0, config.epsilon)
    inverse_deviation = 1 / np.sqrt(plain.var(axis=1) + config.epsilon)
    arrays = {"x": x, "w": w, "b": b, "out": unwritten(*x.shape), "normalised": unwritten(*x.shape)}
    arrays["inverse_deviation"] = unwritten(rows)
    expected = {"out": out, "normalised": normalised, "inverse_deviation": inverse_deviation}
    return Case(arrays, expected, lambda kernels, a: kernels.layer_norm_forward(**a))


def layer_norm_backward(config, seed=0, rows=11, partials=3, residual=True, every=2):
    width = config.width
    dout, x, w, r = normals(seed, (rows, width), (rows, width), (width,), (-(-rows // every), width))
    normalised = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    inverse = np.exp(normals(seed + 1, (rows, 1))[0])
    memory = Partials(partials, dw=(width,), db=(width,))

    def backward(part):
        plain_normalised, plain_inverse, plain_w = double(normalised[part], inverse[part], w)
        return reference.layer_norm_backward(*double(dout[part]), (plain_normalised, 1 / plain_inverse, plain_w))

    def gradients(part):
        _, dw, db = backward(part)
        return {"dw": dw, "db": db}

    dx, _, _ = backward(slice(None))
    if residual:
        dx[::every] += r

    def call(kernels, a):
        first = memory.first(a["partial_gradients"])
        kernels.layer_norm_backward(
            **without(a, "partial_gradients"),
            **first,
            partials=partials,
            partial_step=memory.step,
            residual_every=every,
        )

    arrays = {"dout": dout, "normalised": normalised, "inverse_deviation": inverse[:, 0].copy(), "w": w}
    arrays |= {"dx": unwritten(rows, width), "partial_gradients": memory.memory, "residual": r}
    arrays = without(arrays, *["residual"] * (not residual))
    return Case(arrays, {"dx": dx, "partial_gradients": memory.expected(rows, gradients)}, call)


def _heads(qkv, config):
    """Return q, k and v (B, H, T, K) of qkv (B, T, 3D)."""
    return [reference.split_heads(part, config.heads) for part in np.split(qkv, 3, axis=-1)]


def attention_forward(config, seed=0, batch=2, class_only=False, scale=1.0):
    (qkv,) = normals(seed, (batch, config.tokens, 3 * config.width))
    qkv *= np.float32(scale)
    queries = 1 if class_only else config.tokens
    q, k, v = _heads(*double(qkv), config)
    attended, _ = reference.attention_forward(q[:, :, :queries], k, v)
    weights, _ = reference.attention_forward(q[:, :, :queries], k, np.eye(config.tokens))
    out = reference.join_heads(attended)
    arrays = {"qkv": qkv, "out": unwritten(*out.shape), "weights": unwritten(*weights.shape)}
    expected = {"out": out, "weights": weights}
    return Case(arrays, expected, lambda kernels, a: kernels.attention_forward(**a))


def attention_backward(config, seed=0, batch=2, class_only=False):
    queries = 1 if class_only else config.tokens
    shapes = (batch, config.tokens, 3 * config.width), (batch, queries, config.width)
    qkv, dout = normals(seed, *shapes)
    q, k, v = _heads(*double(qkv), config)
    q = q[:, :, :queries]
    weights = reference.attention_forward(q, k, np.eye(config.tokens))[0].astype(np.float32)
    dattended = reference.split_heads(*double(dout), config.heads)
    gradients = reference.attention_backward(dattended, (weights.astype(np.float64), q, k, v))
    dqkv = np.zeros(qkv.shape)
    for place, gradient in zip(np.split(dqkv, 3, axis=-1), gradients, strict=True):
        place[:, : gradient.shape[2]] = reference.join_heads(gradient)
    arrays = {"dout": dout, "qkv": qkv, "weights": weights, "dqkv": unwritten(*qkv.shape)}
    return Case(arrays, {"dqkv": dqkv}, lambda kernels, a: kernels.attention_backward(**a))


def cross_entropy(config, seed=0, batch=11, smoothing=0.1, scale=1.0, ties=True, wrong_label=None):
    """Build a case. `wrong_label`, if given, is an invalid label of the second image, whose results are NaN."""
    rng = np.random.default_rng(seed)
    logits = normals(seed, (batch, config.classes))[0] * np.float32(scale)
    if ties:  # with integers many rows have two largest logits, of which the first counts
        logits = np.round(logits)
    labels = rng.integers(0, config.classes, batch).astype(np.int32)
    labels[::2] = logits[::2].argmax(axis=1)
    before = np.array([5.25, 3.0])
    if smoothing:
        loss, cache = ops.cross_entropy_forward(*double(logits), labels, smoothing)
        dlogits = ops.cross_entropy_backward(1.0, cache)
    else:
        loss, cache = reference.cross_entropy_forward(*double(logits), labels)
        dlogits = reference.cross_entropy_backward(cache)
    rights = (logits.argmax(axis=1) == labels).sum()
    arrays = {"logits": logits, "labels": labels, "dlogits": unwritten(*logits.shape), "totals": before.copy()}
    totals = before + np.array([loss * batch, rights])
    expected = {"dlogits": dlogits, "totals": totals}
    if wrong_label is not None:
        expected["totals"][1] -= labels[1] == logits[1].argmax()
        expected["totals"][0] = expected["dlogits"][1] = np.nan
        labels[1] = wrong_label
    scales = {"dlogits": 1 / batch}  # dlogits is a difference of probabilities, which may be tiny
    return Case(arrays, expected, lambda kernels, a: kernels.cross_entropy(**a, smoothing=smoothing), scales)


EVERYTHING = Augmentation(rotation=25, scale=0.3, shear=15, shift=1.5, flip=0.4)


def draw_maps(config, seed=0, count=10, augmentation=EVERYTHING, drawn=0, counter=0):
    """Build a case after `drawn` numbers from the generator, half of them for a permutation."""
    philox = np.random.Philox(seed, counter=counter)
    rng = np.random.Generator(philox)
    rng.permutation(drawn // 2)
    rng.random(drawn - drawn // 2)
    state = philox.state
    first = 4 * int(state["state"]["counter"][0]) + state["buffer_pos"]
    key = [int(word) for word in state["state"]["key"]]
    return Case(
        {"maps": unwritten(count, 2, 3)},
        {"maps": augmentation.draw(rng, count).astype(np.float64)},
        lambda kernels, a: kernels.draw_maps(a["maps"], key, first, augmentation),
    )


def gather_patches(config, seed=0, images=9, batch=4, step=1, augmented=True, augmentation=EVERYTHING):
    """Build the case of batch `step` of an epoch. The last batch may be smaller than `batch`."""
    rng = np.random.default_rng(seed)
    length, tokens = config.patch_length, config.tokens
    stored = rng.integers(0, 256, (images, *config.image_shape, config.channels), dtype=np.uint8)
    labels = rng.integers(0, 1000, images, dtype=np.int32)  # more than a byte can count
    order = rng.permutation(images).astype(np.int32)
    maps = augmentation.draw(rng, images)
    places = slice(step * batch, (step + 1) * batch)
    chosen = order[places]
    seen = warp(stored[chosen], maps[places]) if augmented else stored[chosen] / 255
    rows = np.zeros((len(chosen), tokens, length + 2 + tokens))
    normalised = (seen.astype(np.float64) - config.pixel_mean) / config.pixel_deviation
    rows[:, 1:, :length] = reference.patches_forward(normalised, config.patch_size)
    rows[:, 1:, length] = 1
    rows[:, 0, length + 1] = 1
    rows[:, :, length + 2 :] = np.eye(tokens)
    arrays = {"images": stored, "labels": labels, "order": order, "maps": maps, "counter": np.int32([step])}
    arrays |= {"rows": unwritten(*rows.shape), "batch_labels": unwritten(len(chosen), dtype=np.int32)}
    arrays = without(arrays, *["maps"] * (not augmented))

    def call(kernels, a):
        kernels.gather_patches(**{"maps": None, **a}, batch_size=batch)

    return Case(arrays, {"rows": rows, "batch_labels": labels[chosen].astype(np.float64)}, call)


def sum_partials(config, seed=0, count=1100, partials=3, gap=6):
    (gradients,) = normals(seed, (partials, count + gap))
    total = gradients[:, :count].astype(np.float64).sum(axis=0)
    parts = np.add.reduceat(total**2, np.arange(0, count, 1024))
    arrays = {"partial_gradients": gradients, "gradient": unwritten(count), "squares": unwritten(len(parts))}
    arrays["counter"] = np.int32([4])
    expected = {"gradient": total, "squares": parts, "counter": np.array([5.0])}
    return Case(arrays, expected, lambda kernels, a: kernels.sum_partials(**a))


def adam_step(config, seed=0, count=1100, clip=0.7, decay=0.1, masked=True, averaged=True, step=3):
    """Build the case of step `step` of an epoch, from random moments and a random average."""
    rate = 0.02
    betas_and_epsilon = {"beta1": 0.8, "beta2": 0.95, "epsilon": 0.01}  # large enough to matter
    weights, gradient, first, second, average = normals(seed, *[(count,)] * 5)
    second = second**2
    decayed = (np.arange(count) % 3 > 0).astype(np.float32)
    mean = ExponentialMovingAverage(np.zeros(count), 0.9)
    mean.average, mean.steps = average.astype(np.float64), step - 1
    plain_weights, plain_gradient = double(weights, gradient)
    squares = np.add.reduceat(plain_gradient**2, np.arange(0, count, 1024)).astype(np.float32)
    if clip:
        clip_by_global_norm(plain_gradient, clip)
    plain_first, plain_second = double(first, second)
    plain_weights, plain_first, plain_second = decayed_adam_step(
        weights=plain_weights,
        gradient=plain_gradient,
        m=plain_first,
        v=plain_second,
        step=step,
        learning_rate=rate,
        decay=decay,
        decayed=decayed.astype(np.float64) if masked else 1.0,
        **betas_and_epsilon,
    )
    mean.step(plain_weights)

    share = 1 - min(0.9, (step - 1) / (step + 8))
    schedule = np.full((step + 2, 4), np.nan, np.float32)  # the kernel must read only one row
    beta1, beta2 = betas_and_epsilon["beta1"], betas_and_epsilon["beta2"]
    schedule[step - 1] = rate, rate / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), share
    arrays = {"weights": weights, "gradient": gradient, "first_moment": first, "second_moment": second}
    arrays |= {"average": average, "squares": squares, "schedule": schedule, "counter": np.int32([step])}
    arrays["decayed"] = decayed
    arrays = without(arrays, *["average"] * (not averaged), *["decayed"] * (not masked))
    expected = {"weights": plain_weights, "first_moment": plain_first, "second_moment": plain_second}
    if averaged:
        expected["average"] = mean.average

    def call(kernels, a):
        of_adam = {name: a.get(name) for name in ("first_moment", "second_moment", "decayed")}
        adam = SimpleNamespace(**of_adam, **betas_and_epsilon, weight_decay=decay)
        kernels.adam_step(**{"average": None, **without(a, *of_adam)}, adam=adam, clip=clip)

    return Case(arrays, expected, call)


CASES = {
    case.__name__: case
    for case in (
        draw_maps,
        gather_patches,
        linear_forward,
        linear_gelu_forward,
        linear_backward,
        layer_norm_forward,
        layer_norm_backward,
        attention_forward,
        attention_backward,
        cross_entropy,
        sum_partials,
        adam_step,
    )
}


# ---- running a case ----


def run(case, kernels, to_device, to_host):
    """Launch a case and return all its arrays as NumPy arrays by name. The case may be run again."""
    moved = {name: to_device(array) for name, array in case.arrays.items()}
    case.call(kernels, moved)
    return {name: to_host(array) for name, array in moved.items()}


def error(got, expected, scale):
    """Return the largest difference relative to `scale`, or infinity if only one of two elements is finite."""
    finite = np.isfinite(expected)
    if not (np.isfinite(got) == finite).all():
        return np.inf
    return np.abs(got.astype(np.float64)[finite] - expected[finite]).max(initial=0.0) / scale


def errors(case, results):
    """Return the error of every array. It is infinite for an array that the launch changed but must not."""
    found = {}
    for name, expected in case.expected.items():
        scale = case.scales.get(name) or np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
        found[name] = error(results[name], expected, scale)
    for name, array in case.arrays.items():
        if name not in case.expected:
            found[name] = 0.0 if results[name].tobytes() == array.tobytes() else np.inf
    return found
