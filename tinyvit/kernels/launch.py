"""Compiles the `.cu` files for a model and calls their kernels, with every shape and dtype checked first.

A kernel does not know how long its arrays are: whatever it is given, it reads and writes where it is told. So nothing
is launched here before all arrays are what the kernel takes them for.
"""

import re
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
FUNCTIONS = {  # file: its kernels
    "patches": ("draw_maps", "gather_patches"),
    "linear": ("linear_forward", "linear_gelu_forward", "linear_backward"),
    "layer_norm": ("layer_norm_forward", "layer_norm_backward"),
    "attention": ("attention_forward", "attention_backward"),
    "cross_entropy": ("cross_entropy",),
    "adam": ("sum_shards", "adam_step"),
}
PRECISIONS = ("float32", "tf32", "bfloat16")  # of matrix products; all else, and every sum, is float32
SHARED_MEMORY = 48 * 1024  # bytes that a block has without asking for more
LARGEST = 2**31 - 1  # places in an array: kernels count in 32 bits
MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # in a grid, along each of its axes

TILE = 32  # rows and columns of a product that a block of linear.cu computes
NORM_ROWS = 8  # rows a block of layer_norm.cu
ADAM_NUMBERS = 1024  # numbers a block of adam.cu

_NULL = np.uint64(0)


def why_not(config, precision="float32", capability=None):
    """Return why the kernels cannot compute a model, one line, or None if they can.

    config: `ViTConfig`; precision: one of `PRECISIONS`; capability: the card's compute capability, such as 90 for
    9.0, if it is known. Raises `ValueError` on another precision.
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


class Kernels:
    """The kernels, compiled for one model and one precision of its matrix products.

    backend: a `Backend` of the GPU; config: `ViTConfig`; precision: one of `PRECISIONS`. Raises `ValueError` if the
    kernels cannot compute this model. Every method launches one kernel on the current stream and waits for nothing;
    each raises `TypeError` on what is no array of the device or has another dtype, and `ValueError` on a shape that
    does not fit or an array that is not C-contiguous. Arrays are float32 if nothing else is said; `rows` are the
    images' tokens, one under the other.
    """

    def __init__(self, backend, config, precision="float32"):
        reason = why_not(config, precision, backend.compute_capability())
        if reason is not None:
            raise ValueError(reason)
        self.backend, self.config, self.precision = backend, config, precision
        self.float32 = np.dtype(np.float32)
        options = ("--std=c++17", *macros(config, precision))
        self._functions = {}
        for file, names in FUNCTIONS.items():
            module = backend.xp.RawModule(code=source(file), options=options, backend="nvrtc")
            self._functions |= {name: module.get_function(name) for name in names}

    def draw_maps(self, maps, key, first, augmentation):
        """Fill maps (N, 2, 3) with what `augmentation.draw` gives for a Philox of this key and place in its stream.

        key: two whole numbers below 2**64; first: which 64-bit word of the stream comes next.
        """
        count, *_ = self._sizes("draw_maps", 3, maps=maps)
        self._check("draw_maps", maps=(maps, (count, 2, 3)))
        numbers = (
            np.deg2rad(augmentation.rotation),
            np.log1p(augmentation.scale),
            np.deg2rad(augmentation.shear),
            augmentation.shift,
            augmentation.flip,
        )
        words = map(np.uint64, (*key, first))
        self._launch(
            "draw_maps", _tiles(count, 128), 128, maps, np.int32(count), *words, *map(np.float64, numbers)
        )

    def gather_patches(self, images, labels, order, maps, counter, batch_size, rows, batch_labels):
        """Fill rows (B, T, P*P + 2 + T) and batch_labels (B,) int32 with the batch that `counter` (1,) int32 is at.

        images: (N, S, S) uint8; labels: (N,) uint8; order: (M,) int32 places in them; maps: (M, 2, 3), or None;
        batch_size: of all batches but the last: a batch begins at counter * batch_size in the order. Neither the
        counter nor the order is looked at here: whoever sets them sees that they lie inside.
        """
        config, side, patch = self.config, self.config.image_size, self.config.patch_size
        batch, count = self._sizes("gather_patches", 1, batch_labels=batch_labels, order=order)
        known, *_ = self._sizes("gather_patches", 3, images=images)
        self._check(
            "gather_patches",
            images=(images, (known, side, side), np.uint8),
            labels=(labels, (known,), np.uint8),
            order=(order, (count,), np.int32),
            counter=(counter, (1,), np.int32),
            rows=(rows, (batch, config.tokens, patch**2 + 2 + config.tokens)),
            batch_labels=(batch_labels, (batch,), np.int32),
            **_given(maps=(maps, (count, 2, 3))),
        )
        arrays = (images, labels, order, maps, counter, rows, batch_labels)
        sizes = (np.int32(batch_size), np.int32(side), np.int32(patch))
        statistics = (np.float32(config.pixel_mean), np.float32(config.pixel_deviation))
        self._launch("gather_patches", batch, 256, *arrays, *sizes, *statistics)

    def linear_forward(self, x, w, b, out, residual=None, residual_every=1):
        """Fill out (rows, O) with x (rows, I) @ w (I, O) + b (O,) + every residual_every-th row of residual.

        b and residual may be None.
        """
        rows, inputs, _, outputs = self._sizes("linear_forward", 2, x=x, w=w)
        self._at_least_one("linear_forward", residual_every=residual_every)
        self._check(
            "linear_forward",
            x=(x, (rows, inputs)),
            w=(w, (inputs, outputs)),
            out=(out, (rows, outputs)),
            **_given(b=(b, (outputs,)), residual=(residual, (rows * residual_every, outputs))),
        )
        grid = (_tiles(outputs, TILE), _tiles(rows, TILE))
        sizes = map(np.int32, (rows, inputs, outputs, residual_every * outputs))
        self._launch("linear_forward", grid, 128, x, w, b, residual, out, *sizes)

    def linear_gelu_forward(self, x, w, b, out, derivative):
        """Fill out and derivative (rows, F) with GELU and its derivative at x (rows, D) @ w (D, F) + b (F,)."""
        rows, inputs, _, outputs = self._sizes("linear_gelu_forward", 2, x=x, w=w)
        self._check(
            "linear_gelu_forward",
            x=(x, (rows, inputs)),
            w=(w, (inputs, outputs)),
            b=(b, (outputs,)),
            out=(out, (rows, outputs)),
            derivative=(derivative, (rows, outputs)),
        )
        grid = (_tiles(outputs, TILE), _tiles(rows, TILE))
        sizes = map(np.int32, (rows, inputs, outputs))
        self._launch("linear_gelu_forward", grid, 128, x, w, b, out, derivative, *sizes)

    def linear_backward(self, dout, x, w, dx, dw, db, shards, shard_step, derivative=None):
        """Fill dx (rows, I), and of each shard dw (I, O) and db (O,), for dout (rows, O) of x (rows, I) @ w (I, O).

        dw and db: those of the first shard; the others' lie shard_step, 2 shard_step ... numbers behind. dx and db
        may be None, and are not computed then. derivative: (rows, I), by which dx is multiplied, or None.
        """
        rows, inputs, _, outputs = self._sizes("linear_backward", 2, x=x, w=w)
        self._check(
            "linear_backward",
            dout=(dout, (rows, outputs)),
            x=(x, (rows, inputs)),
            w=(w, (inputs, outputs)),
            dw=(dw, (inputs, outputs)),
            **_given(derivative=(derivative, (rows, inputs)), dx=(dx, (rows, inputs)), db=(db, (outputs,))),
        )
        self._check_shards("linear_backward", shards, shard_step, dw=dw, db=db)
        input_tiles, output_tiles, row_tiles = (_tiles(size, TILE) for size in (inputs, outputs, rows))
        blocks = (0 if dx is None else row_tiles * input_tiles) + shards * input_tiles * output_tiles
        sizes = map(np.int32, (rows, inputs, outputs, _tiles(rows, shards), shard_step))
        self._launch("linear_backward", blocks, 128, dout, x, w, derivative, dx, dw, db, *sizes)

    def layer_norm_forward(self, x, w, b, out, normalised, inverse_deviation):
        """Fill out and normalised (rows, D) and inverse_deviation (rows,) for x (rows, D) and w, b (D,)."""
        width, (rows, _) = self.config.width, self._sizes("layer_norm_forward", 2, x=x)
        self._check(
            "layer_norm_forward",
            x=(x, (rows, width)),
            w=(w, (width,)),
            b=(b, (width,)),
            out=(out, (rows, width)),
            normalised=(normalised, (rows, width)),
            inverse_deviation=(inverse_deviation, (rows,)),
        )
        arrays = (x, w, b, out, normalised, inverse_deviation)
        grid = _tiles(rows, NORM_ROWS)
        self._launch("layer_norm_forward", grid, 256, *arrays, np.int32(rows), np.float32(self.config.epsilon))

    def layer_norm_backward(
        self, dout, normalised, inverse_deviation, w, dx, dw, db, shards, shard_step, residual=None, residual_every=1
    ):
        """Fill dx (rows, D), and of each shard dw and db (D,), for dout (rows, D); shards as in `linear_backward`.

        residual: (rows / residual_every, D), rounded up, what reached x by the residual branch; row r of it is added
        to row r * residual_every of dx. Or None.
        """
        width, (rows, _) = self.config.width, self._sizes("layer_norm_backward", 2, dout=dout)
        self._at_least_one("layer_norm_backward", residual_every=residual_every)
        self._check(
            "layer_norm_backward",
            dout=(dout, (rows, width)),
            normalised=(normalised, (rows, width)),
            inverse_deviation=(inverse_deviation, (rows,)),
            w=(w, (width,)),
            dx=(dx, (rows, width)),
            dw=(dw, (width,)),
            db=(db, (width,)),
            **_given(residual=(residual, (_tiles(rows, residual_every), width))),
        )
        self._check_shards("layer_norm_backward", shards, shard_step, dw=dw, db=db)
        arrays = (dout, normalised, inverse_deviation, w, residual, dx, dw, db)
        grid = _tiles(rows, NORM_ROWS) + shards * _tiles(width, 32)
        sizes = map(np.int32, (rows, residual_every, _tiles(rows, shards), shard_step))
        self._launch("layer_norm_backward", grid, 256, *arrays, *sizes)

    def attention_forward(self, qkv, out, weights):
        """Fill out (B, S, D) and weights (B, H, S, T) for qkv (B, T, 3D); the first S tokens ask."""
        queries, grid = self._check_attention("attention_forward", qkv, out, weights)
        scale = np.float32((self.config.width // self.config.heads) ** -0.5)
        sizes = map(np.int32, (self.config.heads, queries))
        self._launch("attention_forward", grid, 128, qkv, out, weights, *sizes, scale)

    def attention_backward(self, dout, qkv, weights, dqkv):
        """Fill dqkv (B, T, 3D) for dout (B, S, D) of `attention_forward`'s out."""
        queries, grid = self._check_attention("attention_backward", qkv, dout, weights, out_name="dout")
        self._check("attention_backward", dqkv=(dqkv, qkv.shape))
        scale = np.float32((self.config.width // self.config.heads) ** -0.5)
        sizes = map(np.int32, (self.config.heads, queries))
        self._launch("attention_backward", grid, 128, dout, qkv, weights, dqkv, *sizes, scale)

    def _check_attention(self, name, qkv, out, weights, out_name="out"):
        config, (batch, queries, _) = self.config, self._sizes(name, 3, **{out_name: out})
        if queries not in (1, config.tokens):
            raise ValueError(f"{name}: the class token or all {config.tokens} ask, not {queries}")
        self._check(
            name,
            qkv=(qkv, (batch, config.tokens, 3 * config.width)),
            weights=(weights, (batch, config.heads, queries, config.tokens)),
            **{out_name: (out, (batch, queries, config.width))},
        )
        return queries, (config.heads, batch)

    def cross_entropy(self, logits, labels, dlogits, totals, smoothing):
        """Fill dlogits (B, C) for logits (B, C) and labels (B,) int32, and add to totals (2,) float64.

        totals: the sum of the losses, and how many were classified rightly. A label that is no class makes its row
        of dlogits and the sum of the losses not-a-number.
        """
        classes, (batch,) = self.config.classes, self._sizes("cross_entropy", 1, labels=labels)
        self._check(
            "cross_entropy",
            logits=(logits, (batch, classes)),
            labels=(labels, (batch,), np.int32),
            dlogits=(dlogits, (batch, classes)),
            totals=(totals, (2,), np.float64),
        )
        sizes = (np.int32(batch), np.int32(classes), np.float32(smoothing))
        self._launch("cross_entropy", 1, 256, logits, labels, dlogits, totals, *sizes)

    def sum_shards(self, shard_gradients, gradient, squares, counter):
        """Fill gradient (P,) with the sum of shard_gradients (S, at least P), and squares; count a step.

        squares: (ceil(P / 1024),), of which each is a part of the gradient's squared norm; counter: (1,) int32.
        """
        (count,) = self._sizes("sum_shards", 1, gradient=gradient)
        shards, step = self._sizes("sum_shards", 2, shard_gradients=shard_gradients)
        if step < count:
            raise ValueError(f"sum_shards: shards of {step} numbers are too short for a gradient of {count}")
        self._check(
            "sum_shards",
            shard_gradients=(shard_gradients, (shards, step)),
            gradient=(gradient, (count,)),
            squares=(squares, (_tiles(count, ADAM_NUMBERS),)),
            counter=(counter, (1,), np.int32),
        )
        arrays = (shard_gradients, gradient, squares, counter)
        self._launch("sum_shards", len(squares), 256, *arrays, *map(np.int32, (count, shards, step)))

    def adam_step(self, weights, gradient, adam, average, squares, schedule, counter, clip):
        """Update weights (P,), the moments of `adam` and average (P,), or None, for gradient (P,).

        schedule: (steps, 4), whose row counter - 1 counts; squares: from `sum_shards`; clip: 0 for none.
        """
        flat = self._sizes("adam_step", 1, weights=weights)
        steps, _ = self._sizes("adam_step", 2, schedule=schedule)
        self._check(
            "adam_step",
            weights=(weights, flat),
            gradient=(gradient, flat),
            first_moment=(adam.first_moment, flat),
            second_moment=(adam.second_moment, flat),
            squares=(squares, (_tiles(flat[0], ADAM_NUMBERS),)),
            schedule=(schedule, (steps, 4)),
            counter=(counter, (1,), np.int32),
            **_given(decayed=(adam.decayed, flat), average=(average, flat)),
        )
        arrays = (weights, gradient, adam.first_moment, adam.second_moment, adam.decayed, average, squares)
        numbers = (clip, adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.epsilon, adam.weight_decay)
        numbers = (np.int32(flat[0]), *map(np.float32, numbers))
        self._launch("adam_step", len(squares), 256, *arrays, schedule, counter, *numbers)

    def _launch(self, name, grid, block, *arguments):
        grid = grid if isinstance(grid, tuple) else (grid,)
        if any(blocks > most for blocks, most in zip(grid, MOST_BLOCKS, strict=False)):
            raise ValueError(f"{name}: arrays so large need {grid} blocks, and a GPU has at most {MOST_BLOCKS}")
        arguments = tuple(_NULL if argument is None else argument for argument in arguments)
        self._functions[name](grid, (block,), arguments)

    def _sizes(self, kernel, dimensions, **arrays):
        """Return the sizes of the arrays from which all other shapes follow, one after the other."""
        sizes = []
        for name, array in arrays.items():
            self._check_device(kernel, name, array)
            if array.ndim != dimensions:
                raise ValueError(f"{kernel}: {name} must have {dimensions} dimensions, not the shape {array.shape}")
            sizes += array.shape
        return sizes

    def _check_device(self, kernel, name, array):
        if not isinstance(array, self.backend.xp.ndarray):
            raise TypeError(f"{kernel}: {name} must be an array of the GPU, not {type(array).__name__}")

    def _check(self, kernel, **arrays):
        for name, (array, shape, *dtype) in arrays.items():
            dtype = np.dtype(dtype[0]) if dtype else self.float32
            self._check_device(kernel, name, array)
            if array.dtype != dtype:
                raise TypeError(f"{kernel}: {name} must be {dtype}, not {array.dtype}")
            if array.shape != tuple(shape):
                raise ValueError(f"{kernel}: {name} must have the shape {tuple(shape)}, not {array.shape}")
            if array.size == 0:
                raise ValueError(f"{kernel}: {name} is empty: its shape is {array.shape}")
            if not array.flags.c_contiguous:
                raise ValueError(f"{kernel}: {name} must be C-contiguous")
            if array.size > LARGEST:
                raise ValueError(f"{kernel}: {name} has {array.size:,} numbers, and a kernel counts to {LARGEST:,}")

    def _check_shards(self, kernel, shards, shard_step, **gradients):
        """Raise `ValueError` unless the memory that a first shard lies in has room for all of them."""
        self._at_least_one(kernel, shards=shards)
        for name, array in gradients.items():
            if array is None:
                continue
            owner = array if array.base is None else array.base
            start = (array.data.ptr - owner.data.ptr) // array.itemsize
            end = start + (shards - 1) * shard_step + array.size
            if end > owner.size or (shards > 1 and shard_step < array.size):
                raise ValueError(
                    f"{kernel}: {shards} shards of {name}, {array.size} numbers each and {shard_step} apart, do not "
                    f"fit into the {owner.size} numbers of their memory, in which the first begins at {start}"
                )

    @staticmethod
    def _at_least_one(kernel, **numbers):
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{kernel}: {name} must be at least 1, not {number}")


def _tiles(count, size):
    """How many parts of `size` cover `count`."""
    return -(-count // size)


def _given(**arrays):
    """Those of the optional arrays that are there."""
    return {name: entry for name, entry in arrays.items() if entry[0] is not None}
