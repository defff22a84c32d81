"""Compile the `.cu` files for a model and launch their kernels, after checking every argument against a table.

A kernel does not check the length of its arrays. It reads and writes wherever its arguments point. `TABLE` therefore
states the shape, the dtype and the range of every argument, and a launch with any other argument is an error.
"""

import re
from functools import cached_property
from math import ceil  # noqa: F401  TABLE uses it
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.backend import Backend
from tinyvit.checks import require_scalar

if TYPE_CHECKING:
    from tinyvit.data.augment import Augmentation
    from tinyvit.model import ViTConfig
    from tinyvit.optim import Adam

FOLDER = Path(__file__).parent
PRECISIONS = ("float32", "tf32", "bfloat16")  # of the operands of matrix products; everything else is float32
SHARED_MEMORY = 48 * 1024  # bytes that one block may use on every GPU
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LARGEST = 2**31 - 1  # numbers in an array: kernels count in 32 bits
MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # along the three axes of a grid

TILE = 32  # rows and columns of the product that one block of linear.cu computes
NORM_ROWS = 8  # rows that one block of layer_norm.cu normalises
ADAM_NUMBERS = 1024  # numbers that one block of adam.cu updates
COUNTS = ("batch_size", "residual_every", "partials")  # arguments that must be at least 1

# One entry per kernel: its file, its threads per block, its grid, and its parameters in the order of the `.cu` file.
#
# * An array is written `name: dtype (shape)`. The dtype is float32 if none is written. A name in a shape is a symbol
#   of `Kernels._symbols`, an argument of the method, or a new size. The first array with a new size defines it, and
#   the other arrays must agree. A condition on the sizes follows "where".
# * An array "or None" is optional. For None the kernel receives a null pointer.
# * An array "per partial" is the first of `partials` arrays of this shape, one per partial gradient. They begin
#   `partial_step` numbers apart in the same memory.
# * Numbers are written `dtype expression, expression`.
TABLE = {
    "draw_maps": """patches.cu; threads 128; grid ceil(count / 128)
        maps: (count, 2, 3); int32 count; uint64 key[0], key[1], first
        float64 np.deg2rad(augmentation.rotation), np.log1p(augmentation.scale), np.deg2rad(augmentation.shear)
        float64 augmentation.shift, augmentation.flip""",
    "gather_patches": """patches.cu; threads 256; grid batch
        images: uint8 (stored, R, C, channels); labels: int32 (stored); order: int32 (count)
        maps: (count, 2, 3) or None; scales: (channels, 2)
        counter: int32 (1); rows: (batch, T, L + 2 + T); batch_labels: int32 (batch)
        int32 batch_size, R, C, channels, config.patch_shape[0], config.patch_shape[1]""",
    "linear_forward": """linear.cu; threads 128; grid ceil(outputs / TILE), ceil(rows / TILE)
        x: (rows, inputs); w: (inputs, outputs); b: (outputs) or None
        residual: (rows * residual_every, outputs) or None; out: (rows, outputs)
        int32 rows, inputs, outputs, residual_every * outputs""",
    "linear_gelu_forward": """linear.cu; threads 128; grid ceil(outputs / TILE), ceil(rows / TILE)
        x: (rows, inputs); w: (inputs, outputs); b: (outputs); out: (rows, outputs); derivative: (rows, outputs)
        int32 rows, inputs, outputs""",
    "linear_backward": """linear.cu; threads 128
        grid ceil(inputs / TILE) * ((dx is not None) * ceil(rows / TILE) + partials * ceil(outputs / TILE))
        dout: (rows, outputs); x: (rows, inputs); w: (inputs, outputs); derivative: (rows, inputs) or None
        dx: (rows, inputs) or None; dw: (inputs, outputs) per partial; db: (outputs) per partial or None
        int32 rows, inputs, outputs, ceil(rows / partials), partial_step""",
    "layer_norm_forward": """layer_norm.cu; threads 256; grid ceil(rows / NORM_ROWS)
        x: (rows, D); w: (D); b: (D); out: (rows, D); normalised: (rows, D); inverse_deviation: (rows)
        int32 rows; float32 config.epsilon""",
    "layer_norm_backward": """layer_norm.cu; threads 256; grid ceil(rows / NORM_ROWS) + partials * ceil(D / 32)
        dout: (rows, D); normalised: (rows, D); inverse_deviation: (rows); w: (D)
        residual: (ceil(rows / residual_every), D) or None; dx: (rows, D); dw: (D) per partial; db: (D) per partial
        int32 rows, residual_every, ceil(rows / partials), partial_step""",
    "attention_forward": """attention.cu; threads 128; grid H, batch
        qkv: (batch, T, 3 * D); out: (batch, queries, D) where queries in (1, T); weights: (batch, H, queries, T)
        int32 H, queries; float32 (D // H) ** -0.5""",
    "attention_backward": """attention.cu; threads 128; grid H, batch
        dout: (batch, queries, D) where queries in (1, T); qkv: (batch, T, 3 * D); weights: (batch, H, queries, T)
        dqkv: (batch, T, 3 * D); int32 H, queries; float32 (D // H) ** -0.5""",
    "cross_entropy": """cross_entropy.cu; threads 256; grid 1
        logits: (batch, classes); labels: int32 (batch); dlogits: (batch, classes); totals: float64 (2)
        int32 batch, classes; float32 smoothing""",
    "sum_partials": """adam.cu; threads 256; grid ceil(count / ADAM_NUMBERS)
        partial_gradients: (partials, partial_step); gradient: (count) where count <= partial_step
        squares: (ceil(count / ADAM_NUMBERS)); counter: int32 (1); int32 count, partials, partial_step""",
    "adam_step": """adam.cu; threads 256; grid ceil(count / ADAM_NUMBERS)
        weights: (count); gradient: (count); adam.first_moment: (count); adam.second_moment: (count)
        adam.decayed: (count) or None; average: (count) or None; squares: (ceil(count / ADAM_NUMBERS))
        schedule: (steps, 4); counter: int32 (1); int32 count; float32 clip, adam.beta1, 1 - adam.beta1, adam.beta2
        float32 1 - adam.beta2, adam.epsilon, adam.weight_decay""",
}


def unsupported_reason(config: "ViTConfig", precision: str = "float32", capability: int | None = None) -> str | None:
    """Return the reason why the kernels cannot compute a model, in one line, or None if they can.

    Parameters
    ----------
    config : ViTConfig
        The settings of the model.
    precision : {"float32", "tf32", "bfloat16"}, optional
        The precision of the operands of matrix products.
    capability : int, optional
        The compute capability of the GPU, such as 90 for 9.0. By default it is not checked.

    Returns
    -------
    str or None
        The reason and what to do.

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
            f"{capability // 10}.{capability % 10}: use precision 'float32'"
        )
    tokens, head_width = config.tokens, config.width // config.heads
    needed = 4 * (4 * tokens * (head_width + 1) + 2 * tokens**2)  # tables of attention_backward
    if needed > SHARED_MEMORY:
        return (
            f"the attention kernel needs {needed:,} bytes of shared memory for a head of {tokens} tokens of width "
            f"{head_width}, and a block has {SHARED_MEMORY:,}: use larger patches or more heads"
        )
    if config.width > 2048:
        return (
            "the layer norm kernel keeps a row in registers, which allows a width of 2,048, and the model has "
            f"{config.width:,}: plain operations (--kernels off) can compute it"
        )
    return None


def source(name: str) -> str:
    """Return the text of `name`.cu in which every #include line of a `.cuh` file is replaced by that file.

    CuPy's cache of compiled kernels compares this text only, so that it must contain the headers.
    """
    return _with_headers((FOLDER / f"{name}.cu").read_text(encoding="utf-8"), set())


def _with_headers(text, seen):
    """Insert each header at its first #include line, and add its name to the set `seen`."""

    def header(match):
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _with_headers((FOLDER / match[1]).read_text(encoding="utf-8"), seen).replace("#pragma once\n", "")

    return re.sub(r'^#include "(\w+\.cuh)"$', header, text, flags=re.MULTILINE)


def macros(config: "ViTConfig", precision: str) -> tuple[str, ...]:
    """Return the compiler options that define the sizes of a model and the precision of its products."""
    options = [
        f"-DPRECISION={PRECISIONS.index(precision)}",
        f"-DWIDTH={config.width}",
        f"-DTOKENS={config.tokens}",
        f"-DHEAD_WIDTH={config.width // config.heads}",
    ]
    return (*options, "-DGELU_TANH") if config.gelu == "tanh" else tuple(options)


class _Array:
    """An array parameter of a kernel, as `TABLE` describes it."""

    def __init__(self, kernel, text):
        form = r"([\w.]+): (?:(\w+) )?(\((.*?)\)(?: where (.*?))?)( per partial)?( or None)?"
        argument, dtype, self.shape, axes, condition, per_partial, optional = re.fullmatch(form, text).groups()
        self.kernel, self.name = kernel, argument.split(".")[-1]
        self.label, self.dtype = f"{kernel}: {self.name}", np.dtype(dtype or "float32")
        self.argument, self.axes = _code(argument), axes.split(", ")
        self.expected = _code(f"({axes},) if {condition or True} else None")
        self.per_partial, self.optional = bool(per_partial), bool(optional)

    def checked(self, sizes, ndarray):
        """Return the argument, or a null pointer for None. Add the new sizes of its shape to `sizes`."""
        array = _evaluate(self.argument, sizes, self.label)
        if array is None and self.optional:
            return np.uint64(0)
        if not isinstance(array, ndarray):
            raise TypeError(f"{self.label} must be an array on the GPU, not {type(array).__name__}")
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
            raise ValueError(f"{self.label} must not be empty, but its shape is {shape}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{self.label} must be C-contiguous, but its strides are {array.strides}")
        if size > LARGEST:
            raise ValueError(f"{self.label} must have at most {LARGEST:,} numbers, not {size:,}")
        if self.per_partial:
            self._check_partials(array, sizes["partials"], sizes["partial_step"])
        return array

    def _check_partials(self, array, partials, partial_step):
        """Raise an error unless all partial gradients fit into the memory that contains the first one."""
        if not isinstance(partial_step, int | np.integer):
            raise TypeError(f"{self.kernel}: partial_step must be an integer, not {partial_step!r}")
        owner = array if array.base is None else array.base
        start = (array.data.ptr - owner.data.ptr) // array.itemsize
        end = start + (partials - 1) * partial_step + array.size
        if end > owner.size or (partials > 1 and partial_step < array.size):
            raise ValueError(
                f"{self.kernel}: {partials} partials of {self.name}, with {array.size} numbers each and "
                f"{partial_step} apart, do not fit into memory of {owner.size} numbers, where the first one begins "
                f"at number {start}"
            )


class _Number:
    """A number parameter of a kernel, as `TABLE` describes it."""

    def __init__(self, kernel, dtype, expression):
        self.label, self.dtype, self.code = f"{kernel}: {expression}", np.dtype(dtype), _code(expression)
        self.integer = self.dtype.kind in "iu"
        limits, python = (np.iinfo(dtype), int) if self.integer else (np.finfo(dtype), float)
        self.least, self.most = python(limits.min), python(limits.max)

    def checked(self, sizes):
        """Return the number with the dtype of the kernel's parameter."""
        value = _evaluate(self.code, sizes, self.label)
        types, noun = (int | np.integer, "an integer") if self.integer else (int | float | np.number, "a number")
        if isinstance(value, bool) or not isinstance(value, types) or not self.least <= value <= self.most:
            raise ValueError(f"{self.label} must be {noun} of {self.dtype}, not {value!r}")
        return self.dtype.type(value)


class _Signature:
    """A kernel's entry in `TABLE`: file, threads, grid, arrays and numbers."""

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
    """Compile an expression of `TABLE`; a plain name stays text, which is quicker to look up."""
    return expression if expression.isidentifier() else compile(expression, "<TABLE>", "eval")


def _evaluate(code, sizes, label=None):
    """Return the value of an expression of `TABLE`. Only the text of this file reaches `eval`."""
    try:
        return sizes[code] if isinstance(code, str) else eval(code, globals(), sizes)
    except (AttributeError, TypeError, LookupError) as error:  # an argument of another type, such as adam=None
        raise TypeError(f"{label} cannot be computed from the arguments: {error}") from error


SIGNATURES = {kernel: _Signature(kernel, text) for kernel, text in TABLE.items()}
FUNCTIONS: dict[str, list[str]] = {}  # name of a .cu file: the names of its kernels
for _kernel, _signature in SIGNATURES.items():
    FUNCTIONS.setdefault(_signature.file, []).append(_kernel)


class Kernels:
    """The CUDA kernels, compiled for one model and one precision of its matrix products.

    Every method launches one kernel on the current stream and does not wait for it. `TABLE` states the shapes and
    dtypes of its arguments.

    Parameters
    ----------
    backend : Backend
        The backend of a GPU.
    config : ViTConfig
        The settings of the model.
    precision : {"float32", "tf32", "bfloat16"}, optional
        The precision of the operands of matrix products.

    Raises
    ------
    ValueError
        If the kernels cannot compute this model. A method raises it for an array of another shape, for an array that
        is not C-contiguous, and for a number out of range.
    TypeError
        If a method receives an array of another dtype, or one that is not on the GPU.
    """

    def __init__(self, backend: Backend, config: "ViTConfig", precision: str = "float32") -> None:
        reason = unsupported_reason(config, precision, backend.compute_capability())
        if reason is not None:
            raise ValueError(reason)
        self.backend, self.config, self.precision = backend, config, precision
        options = ("--std=c++17", *macros(config, precision))
        self._functions: dict[str, Any] = {}
        for file, kernels in FUNCTIONS.items():
            module = backend.xp.RawModule(code=source(file), options=options, backend="nvrtc")
            self._functions |= {name: module.get_function(name) for name in kernels}

    def draw_maps(self, maps: np.ndarray, key: tuple[int, ...], first: int, augmentation: "Augmentation") -> None:
        """Fill maps with the affine maps that `augmentation.draw` returns for a Philox generator.

        key: the generator's key, two integers below 2**64; first: the index of the next 64-bit word of its stream.
        """
        self._launch("draw_maps", locals())

    def gather_patches(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        order: np.ndarray,
        maps: np.ndarray | None,
        counter: np.ndarray,
        batch_size: int,
        rows: np.ndarray,
        batch_labels: np.ndarray,
    ) -> None:
        """Fill rows and batch_labels with the batch that begins at position counter * batch_size of the order.

        maps[i] is for the image at position i of the order; with maps=None no image is augmented. The values of
        counter and order are on the device, so that nothing checks them here: the caller must keep them in range.
        """
        self._launch("gather_patches", locals())

    def linear_forward(
        self,
        x: np.ndarray,
        w: np.ndarray,
        b: np.ndarray | None,
        out: np.ndarray,
        residual: np.ndarray | None = None,
        residual_every: int = 1,
    ) -> None:
        """out = x @ w + b + residual[::residual_every]"""
        self._launch("linear_forward", locals())

    def linear_gelu_forward(
        self, x: np.ndarray, w: np.ndarray, b: np.ndarray, out: np.ndarray, derivative: np.ndarray
    ) -> None:
        """out = gelu(x @ w + b), and derivative = gelu'(x @ w + b)"""
        self._launch("linear_gelu_forward", locals())

    def linear_backward(
        self,
        dout: np.ndarray,
        x: np.ndarray,
        w: np.ndarray,
        dx: np.ndarray | None,
        dw: np.ndarray,
        db: np.ndarray | None,
        partials: int,
        partial_step: int,
        derivative: np.ndarray | None = None,
    ) -> None:
        """dx = dout @ w.T * derivative, and dw = x.T @ dout and db = dout.sum(axis=0) for each part of the rows

        dw and db are the first of `partials` partial gradients, which begin partial_step numbers apart.
        """
        self._launch("linear_backward", locals())

    def layer_norm_forward(
        self,
        x: np.ndarray,
        w: np.ndarray,
        b: np.ndarray,
        out: np.ndarray,
        normalised: np.ndarray,
        inverse_deviation: np.ndarray,
    ) -> None:
        """out = normalised * w + b, where normalised = (x - mean) * inverse_deviation"""
        self._launch("layer_norm_forward", locals())

    def layer_norm_backward(
        self,
        dout: np.ndarray,
        normalised: np.ndarray,
        inverse_deviation: np.ndarray,
        w: np.ndarray,
        dx: np.ndarray,
        dw: np.ndarray,
        db: np.ndarray,
        partials: int,
        partial_step: int,
        residual: np.ndarray | None = None,
        residual_every: int = 1,
    ) -> None:
        """Fill dx, fill dw and db for each part of the rows, and add residual to dx[::residual_every].

        residual is the gradient that reaches x through the residual branch. dw and db are as in `linear_backward`.
        """
        self._launch("layer_norm_backward", locals())

    def attention_forward(self, qkv: np.ndarray, out: np.ndarray, weights: np.ndarray) -> None:
        """weights = softmax(q @ k.T / sqrt(K)) and out = weights @ v for each head

        The queries are all tokens, or the class token only, as the shape of out says.
        """
        self._launch("attention_forward", locals())

    def attention_backward(self, dout: np.ndarray, qkv: np.ndarray, weights: np.ndarray, dqkv: np.ndarray) -> None:
        """Fill dqkv, given dout, the gradient with respect to the out of `attention_forward`."""
        self._launch("attention_backward", locals())

    def cross_entropy(
        self, logits: np.ndarray, labels: np.ndarray, dlogits: np.ndarray, totals: np.ndarray, smoothing: float
    ) -> None:
        """Fill dlogits, and add the sum of the losses and the number of correct images to totals.

        A label that is not a class makes its row of dlogits and the sum of the losses NaN.
        """
        require_scalar("cross_entropy: smoothing", smoothing, minimum=0, maximum=1, below=True)
        self._launch("cross_entropy", locals())

    def sum_partials(
        self, partial_gradients: np.ndarray, gradient: np.ndarray, squares: np.ndarray, counter: np.ndarray
    ) -> None:
        """gradient = partial_gradients.sum(axis=0), squares = its squared norm over each block, and counter += 1"""
        self._launch("sum_partials", locals())

    def adam_step(
        self,
        weights: np.ndarray,
        gradient: np.ndarray,
        adam: "Adam",
        average: np.ndarray | None,
        squares: np.ndarray,
        schedule: np.ndarray,
        counter: np.ndarray,
        clip: float,
    ) -> None:
        """Update weights, the moments of `adam` and average in place.

        squares is the output of `sum_partials`. Row counter - 1 of the schedule applies. clip=0 means no clipping.
        """
        require_scalar("adam_step: clip", clip, minimum=0, maximum=LARGEST_FLOAT)
        self._launch("adam_step", locals())

    @cached_property
    def _scales(self):
        """The mean and the deviation of each channel on the device, (channels, 2)."""
        config = self.config
        scales = [np.broadcast_to(x, config.channels) for x in (config.pixel_mean, config.pixel_deviation)]
        return self.backend.asarray(np.stack(scales, axis=1).astype(np.float32))

    def _symbols(self):
        """Return the names that `TABLE` may use in addition to a method's arguments."""
        config = self.config
        rows, columns = config.image_shape
        symbols = {"T": config.tokens, "D": config.width, "H": config.heads, "R": rows, "C": columns}
        symbols |= {"L": config.patch_length, "channels": config.channels, "scales": self._scales}
        return symbols | {"classes": config.classes, "config": config}

    def _launch(self, kernel, arguments):
        """Check the arguments, a dict by name, and launch the kernel."""
        signature, sizes = SIGNATURES[kernel], self._symbols() | arguments
        for name in COUNTS:
            count = sizes.get(name, 1)
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
                raise ValueError(f"{kernel}: {name} must be at least 1, not {count!r}")
        pointers = [array.checked(sizes, self.backend.xp.ndarray) for array in signature.arrays]
        numbers = [number.checked(sizes) for number in signature.numbers]
        grid = _evaluate(signature.grid, sizes, f"{kernel}: grid")
        if any(blocks > most for blocks, most in zip(grid, MOST_BLOCKS, strict=False)):
            raise ValueError(f"{kernel}: the arrays need a grid of {grid} blocks, and a GPU allows {MOST_BLOCKS}")
        self._functions[kernel](grid, (signature.threads,), (*pointers, *numbers))
