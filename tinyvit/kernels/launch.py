"""Compiles the `.cu` files for a model and launches their kernels, after every argument is checked against a table.

A kernel does not know how long its arrays are: it reads and writes wherever its arguments point. So a launch happens
only if all arguments are what `TABLE` says.
"""

import re
from math import ceil  # noqa: F401 - the table calls it
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
PRECISIONS = ("float32", "tf32", "bfloat16")  # of matrix products; every sum and everything else is float32
SHARED_MEMORY = 48 * 1024  # bytes that any block may have
LARGEST = 2**31 - 1  # numbers in an array, since kernels count in 32 bits
MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # along the axes of a grid

TILE = 32  # rows and columns of a product per block of linear.cu
NORM_ROWS = 8  # rows per block of layer_norm.cu
ADAM_NUMBERS = 1024  # numbers per block of adam.cu
COUNTS = ("batch_size", "residual_every", "shards")  # arguments that must be at least 1

# One entry per kernel: its file, its threads per block, its grid, and its parameters in the order of the file.
#
# * An array is written `name: dtype (shape)`, and its dtype is float32 if none is written. A name in a shape is a
#   symbol of `Kernels._symbols`, an argument of the method or a new size. The first array that has a new size defines
#   it, and the others must agree. A condition on the sizes follows "where".
# * An array "or None" may be missing. The kernel then gets a null pointer.
# * An array "per shard" is the first of `shards` arrays, which begin `shard_step` numbers apart in the same memory.
# * Numbers are written `dtype expression, expression`.
TABLE = {
    "draw_maps": """patches.cu; threads 128; grid ceil(count / 128)
        maps: (count, 2, 3); int32 count; uint64 key[0], key[1], first
        float64 np.deg2rad(augmentation.rotation), np.log1p(augmentation.scale), np.deg2rad(augmentation.shear)
        float64 augmentation.shift, augmentation.flip""",
    "gather_patches": """patches.cu; threads 256; grid batch
        images: uint8 (stored, side, side); labels: uint8 (stored); order: int32 (count); maps: (count, 2, 3) or None
        counter: int32 (1); rows: (batch, T, P * P + 2 + T); batch_labels: int32 (batch)
        int32 batch_size, side, P; float32 config.pixel_mean, config.pixel_deviation""",
    "linear_forward": """linear.cu; threads 128; grid ceil(outputs / TILE), ceil(rows / TILE)
        x: (rows, inputs); w: (inputs, outputs); b: (outputs) or None
        residual: (rows * residual_every, outputs) or None; out: (rows, outputs)
        int32 rows, inputs, outputs, residual_every * outputs""",
    "linear_gelu_forward": """linear.cu; threads 128; grid ceil(outputs / TILE), ceil(rows / TILE)
        x: (rows, inputs); w: (inputs, outputs); b: (outputs); out: (rows, outputs); derivative: (rows, outputs)
        int32 rows, inputs, outputs""",
    "linear_backward": """linear.cu; threads 128
        grid ceil(inputs / TILE) * ((dx is not None) * ceil(rows / TILE) + shards * ceil(outputs / TILE))
        dout: (rows, outputs); x: (rows, inputs); w: (inputs, outputs); derivative: (rows, inputs) or None
        dx: (rows, inputs) or None; dw: (inputs, outputs) per shard; db: (outputs) per shard or None
        int32 rows, inputs, outputs, ceil(rows / shards), shard_step""",
    "layer_norm_forward": """layer_norm.cu; threads 256; grid ceil(rows / NORM_ROWS)
        x: (rows, D); w: (D); b: (D); out: (rows, D); normalised: (rows, D); inverse_deviation: (rows)
        int32 rows; float32 config.epsilon""",
    "layer_norm_backward": """layer_norm.cu; threads 256; grid ceil(rows / NORM_ROWS) + shards * ceil(D / 32)
        dout: (rows, D); normalised: (rows, D); inverse_deviation: (rows); w: (D)
        residual: (ceil(rows / residual_every), D) or None; dx: (rows, D); dw: (D) per shard; db: (D) per shard
        int32 rows, residual_every, ceil(rows / shards), shard_step""",
    "attention_forward": """attention.cu; threads 128; grid H, batch
        qkv: (batch, T, 3 * D); out: (batch, queries, D) where queries in (1, T); weights: (batch, H, queries, T)
        int32 H, queries; float32 (D // H) ** -0.5""",
    "attention_backward": """attention.cu; threads 128; grid H, batch
        dout: (batch, queries, D) where queries in (1, T); qkv: (batch, T, 3 * D); weights: (batch, H, queries, T)
        dqkv: (batch, T, 3 * D); int32 H, queries; float32 (D // H) ** -0.5""",
    "cross_entropy": """cross_entropy.cu; threads 256; grid 1
        logits: (batch, classes); labels: int32 (batch); dlogits: (batch, classes); totals: float64 (2)
        int32 batch, classes; float32 smoothing""",
    "sum_shards": """adam.cu; threads 256; grid ceil(count / ADAM_NUMBERS)
        shard_gradients: (shards, shard_step); gradient: (count) where count <= shard_step
        squares: (ceil(count / ADAM_NUMBERS)); counter: int32 (1); int32 count, shards, shard_step""",
    "adam_step": """adam.cu; threads 256; grid ceil(count / ADAM_NUMBERS)
        weights: (count); gradient: (count); adam.first_moment: (count); adam.second_moment: (count)
        adam.decayed: (count) or None; average: (count) or None; squares: (ceil(count / ADAM_NUMBERS))
        schedule: (steps, 4); counter: int32 (1); int32 count; float32 clip, adam.beta1, 1 - adam.beta1, adam.beta2
        float32 1 - adam.beta2, adam.epsilon, adam.weight_decay""",
}


def unsupported_reason(config, precision="float32", capability=None):
    """Return why the kernels cannot compute a model, in one line, or None if they can.

    Parameters
    ----------
    config : ViTConfig
    precision : str
        One of `PRECISIONS`.
    capability : int, optional
        The compute capability of the GPU, such as 90 for 9.0.

    Raises
    ------
    ValueError
        If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown: give {', '.join(map(repr, PRECISIONS))}")
    if capability is not None and precision != "float32" and capability < 80:
        return (
            f"precision {precision!r} needs a GPU of compute capability 8.0 or above, and this one has "
            f"{capability // 10}.{capability % 10}: use float32"
        )
    tokens, head_width = config.tokens, config.width // config.heads
    needed = 4 * (4 * tokens * (head_width + 1) + 2 * tokens**2)  # tables of attention_backward
    if needed > SHARED_MEMORY:
        return (
            f"a head of {tokens} tokens of width {head_width} needs {needed:,} bytes of shared memory in the "
            f"attention kernel, which has {SHARED_MEMORY:,}: use larger patches or more heads"
        )
    if config.classes > 256:
        return f"the kernels read labels of one byte, and there are {config.classes} classes"
    if config.width > 2048:
        return f"the layer norm kernel keeps a row in registers: a width of {config.width} is over 2048"
    return None


def source(name):
    """Return the text of `name`.cu with its own headers in the place of their #include lines.

    One self-contained text: CuPy's cache of compiled kernels does not look into headers.
    """
    return _with_headers((FOLDER / f"{name}.cu").read_text(encoding="utf-8"), set())


def _with_headers(text, seen):
    def header(match):
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _with_headers((FOLDER / match[1]).read_text(encoding="utf-8"), seen).replace("#pragma once\n", "")

    return re.sub(r'^#include "(\w+\.cuh)"$', header, text, flags=re.MULTILINE)


def macros(config, precision):
    """Return what the kernels of a model are compiled with, as options for a compiler."""
    options = [
        f"-DPRECISION={PRECISIONS.index(precision)}",
        f"-DWIDTH={config.width}",
        f"-DTOKENS={config.tokens}",
        f"-DHEAD_WIDTH={config.width // config.heads}",
    ]
    return (*options, "-DGELU_TANH") if config.gelu == "tanh" else tuple(options)


class _Array:
    """An array of the table."""

    def __init__(self, kernel, text):
        form = r"([\w.]+): (?:(\w+) )?(\((.*?)\)(?: where (.*?))?)( per shard)?( or None)?"
        argument, dtype, self.shape, axes, condition, per_shard, optional = re.fullmatch(form, text).groups()
        self.kernel, self.name = kernel, argument.split(".")[-1]
        self.label, self.dtype = f"{kernel}: {self.name}", np.dtype(dtype or "float32")
        self.argument, self.axes = _code(argument), axes.split(", ")
        self.expected = _code(f"({axes},) if {condition or True} else None")
        self.per_shard, self.optional = bool(per_shard), bool(optional)

    def checked(self, sizes, ndarray):
        """Return the argument, or a null pointer for None, and put the new sizes of its shape into `sizes`."""
        array = _evaluate(self.argument, sizes)
        if array is None and self.optional:
            return np.uint64(0)
        if not isinstance(array, ndarray):
            raise TypeError(f"{self.label} must be an array of the GPU, not {type(array).__name__}")
        if array.dtype != self.dtype:
            raise TypeError(f"{self.label} must be {self.dtype}, not {array.dtype}")
        shape, size = array.shape, array.size
        fits = len(shape) == len(self.axes)
        if fits:
            for axis, length in zip(self.axes, shape, strict=True):
                if axis.isidentifier():
                    sizes.setdefault(axis, length)
        if not fits or shape != _evaluate(self.expected, sizes):
            symbols = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", self.shape))
            known = ", ".join(f"{name} = {sizes[name]}" for name in symbols if isinstance(sizes.get(name), int))
            expected = f"{self.shape} for {known}" if known else self.shape
            raise ValueError(f"{self.label} must have the shape {expected}, not {shape}")
        if size == 0:
            raise ValueError(f"{self.label} must not be empty, and its shape is {shape}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{self.label} must be C-contiguous, and its strides are {array.strides}")
        if size > LARGEST:
            raise ValueError(f"{self.label} has {size:,} numbers, and a kernel counts to {LARGEST:,}")
        if self.per_shard:
            self._check_shards(array, sizes["shards"], sizes["shard_step"])
        return array

    def _check_shards(self, array, shards, shard_step):
        """Raise `ValueError` unless the memory of the first shard has room for all shards."""
        owner = array if array.base is None else array.base
        start = (array.data.ptr - owner.data.ptr) // array.itemsize
        end = start + (shards - 1) * shard_step + array.size
        if end > owner.size or (shards > 1 and shard_step < array.size):
            raise ValueError(
                f"{self.kernel}: {shards} shards of {self.name}, {array.size} numbers each and {shard_step} apart, "
                f"do not fit into the {owner.size} numbers of their memory, in which the first begins at {start}"
            )


class _Number:
    """A number of the table."""

    def __init__(self, kernel, dtype, expression):
        self.label, self.dtype, self.code = f"{kernel}: {expression}", np.dtype(dtype), _code(expression)
        self.bounds = np.iinfo(dtype) if self.dtype.kind in "iu" else None

    def checked(self, sizes):
        """Return the number as the kernel takes it."""
        value, bounds = _evaluate(self.code, sizes), self.bounds
        if bounds and not (isinstance(value, int | np.integer) and bounds.min <= value <= bounds.max):
            raise ValueError(f"{self.label} must be an integer of {self.dtype}, not {value!r}")
        return self.dtype.type(value)


class _Signature:
    """An entry of the table."""

    def __init__(self, kernel, text):
        file, *entries = re.split(r"[;\n] *", text)
        self.file, self.arrays, self.numbers = file.removesuffix(".cu"), [], []
        for entry in entries:
            kind, rest = entry.split(" ", 1)
            if kind.endswith(":"):
                self.arrays.append(_Array(kernel, entry))
            elif kind == "threads":
                self.threads = int(rest)
            elif kind == "grid":
                self.grid = _code(f"{rest},")
            else:
                self.numbers += [_Number(kernel, kind, expression) for expression in rest.split(", ")]


def _code(expression):
    return expression if expression.isidentifier() else compile(expression, "<TABLE>", "eval")


def _evaluate(code, sizes):
    """Return the value of an expression of the table: the text of this file, and no other, reaches `eval`."""
    return sizes[code] if isinstance(code, str) else eval(code, globals(), sizes)


SIGNATURES = {kernel: _Signature(kernel, text) for kernel, text in TABLE.items()}
FUNCTIONS = {}  # file: its kernels
for _kernel, _signature in SIGNATURES.items():
    FUNCTIONS.setdefault(_signature.file, []).append(_kernel)


class Kernels:
    """The kernels, compiled for one model and one precision of its matrix products.

    Every method launches one kernel on the current stream and does not wait for it. The shapes and dtypes of its
    arguments are in `TABLE`.

    Parameters
    ----------
    backend : Backend
        Of a GPU.
    config : ViTConfig
    precision : str
        One of `PRECISIONS`.

    Raises
    ------
    ValueError
        If the kernels cannot compute this model, or a method gets an array of another shape, an array that is not
        C-contiguous, or a number out of its range.
    TypeError
        If a method gets an array of another dtype, or one that is not on the device.
    """

    def __init__(self, backend, config, precision="float32"):
        reason = unsupported_reason(config, precision, backend.compute_capability())
        if reason is not None:
            raise ValueError(reason)
        self.backend, self.config, self.precision = backend, config, precision
        options = ("--std=c++17", *macros(config, precision))
        self._functions = {}
        for file, kernels in FUNCTIONS.items():
            module = backend.xp.RawModule(code=source(file), options=options, backend="nvrtc")
            self._functions |= {name: module.get_function(name) for name in kernels}

    def draw_maps(self, maps, key, first, augmentation):
        """Fill maps with what `augmentation.draw` returns for a Philox generator.

        key: its key, two integers below 2**64; first: which 64-bit word of its stream comes next.
        """
        self._launch("draw_maps", locals())

    def gather_patches(self, images, labels, order, maps, counter, batch_size, rows, batch_labels):
        """Fill rows and batch_labels with the batch that begins at place counter * batch_size of the order.

        maps belong to the places of the order, and None changes no image. The counter and the order are on the
        device and are not checked: the caller ensures that they lie inside.
        """
        self._launch("gather_patches", locals())

    def linear_forward(self, x, w, b, out, residual=None, residual_every=1):
        """out = x @ w + b + residual[::residual_every]"""
        self._launch("linear_forward", locals())

    def linear_gelu_forward(self, x, w, b, out, derivative):
        """out = gelu(x @ w + b), and derivative = gelu'(x @ w + b)"""
        self._launch("linear_gelu_forward", locals())

    def linear_backward(self, dout, x, w, dx, dw, db, shards, shard_step, derivative=None):
        """dx = dout @ w.T * derivative; and for each shard of the rows dw = x.T @ dout and db = dout.sum(axis=0)"""
        self._launch("linear_backward", locals())

    def layer_norm_forward(self, x, w, b, out, normalised, inverse_deviation):
        """out = normalised * w + b, where normalised = (x - mean) * inverse_deviation"""
        self._launch("layer_norm_forward", locals())

    def layer_norm_backward(
        self, dout, normalised, inverse_deviation, w, dx, dw, db, shards, shard_step, residual=None, residual_every=1
    ):
        """Fill dx, and dw and db for each shard of the rows, and add residual to dx[::residual_every].

        residual is the gradient that reaches x through the residual branch.
        """
        self._launch("layer_norm_backward", locals())

    def attention_forward(self, qkv, out, weights):
        """weights = softmax(q @ k.T / sqrt(K)) and out = weights @ v per head, for the first tokens as queries"""
        self._launch("attention_forward", locals())

    def attention_backward(self, dout, qkv, weights, dqkv):
        """Fill dqkv for the gradient `dout` of the out of `attention_forward`."""
        self._launch("attention_backward", locals())

    def cross_entropy(self, logits, labels, dlogits, totals, smoothing):
        """Fill dlogits, and add the sum of the losses and the number of correct images to totals.

        A label outside the classes makes its row of dlogits and the sum of the losses NaN.
        """
        self._launch("cross_entropy", locals())

    def sum_shards(self, shard_gradients, gradient, squares, counter):
        """gradient = shard_gradients.sum(axis=0), squares = parts of its squared norm, and counter += 1"""
        self._launch("sum_shards", locals())

    def adam_step(self, weights, gradient, adam, average, squares, schedule, counter, clip):
        """Update weights, the moments of `adam` and average in place.

        Row counter - 1 of the schedule applies. squares come from `sum_shards`, and a clip of 0 clips nothing.
        """
        self._launch("adam_step", locals())

    def _symbols(self):
        """Return what the table may name besides a method's arguments."""
        config = self.config
        symbols = {"T": config.tokens, "D": config.width, "H": config.heads, "P": config.patch_size}
        return symbols | {"side": config.image_size, "classes": config.classes, "config": config}

    def _launch(self, kernel, arguments):
        signature, sizes = SIGNATURES[kernel], self._symbols() | arguments
        for name in COUNTS:
            if sizes.get(name, 1) < 1:
                raise ValueError(f"{kernel}: {name} must be at least 1, not {sizes[name]}")
        pointers = [array.checked(sizes, self.backend.xp.ndarray) for array in signature.arrays]
        numbers = [number.checked(sizes) for number in signature.numbers]
        grid = _evaluate(signature.grid, sizes)
        if any(blocks > most for blocks, most in zip(grid, MOST_BLOCKS, strict=False)):
            raise ValueError(f"{kernel}: arrays so large need {grid} blocks, and a GPU has at most {MOST_BLOCKS}")
        self._functions[kernel](grid, (signature.threads,), (*pointers, *numbers))
