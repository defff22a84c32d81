"""The table of all operations. The tests of gradients, dtypes, memory, devices and mutants take it from here.

An operation has a pair of functions in `tinyvit.ops` and mostly one in `tinyvit.reference`. Both take the same
arguments and give gradients for the same arrays:

    out, cache = forward(*arrays, *constants)
    gradients = backward(dout, cache)  # a tuple with one gradient per array, or the gradient of the only array

The table holds functions that build a pair from the names of a module, so that a test can replace one of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import example
from hypothesis import strategies as st
from strategies import small

from tinyvit import ops, reference
from tinyvit.backend import array_module

MODULES = {"reference": reference, "ops": ops}


# ---- sizes ----


class Sizes(NamedTuple):
    """The sizes of a test case. Each operation uses those that it needs."""

    leading: tuple = ()
    batch: int = 1
    queries: int = 1
    tokens: int = 1
    inputs: int = 1
    outputs: int = 1
    heads: int = 1
    per_head: int = 1
    down: int = 1
    across: int = 1
    side: int = 1

    @property
    def width(self):
        return self.heads * self.per_head

    @property
    def image_shape(self):
        return self.batch, self.down * self.side, self.across * self.side


any_sizes = st.builds(
    Sizes,
    leading=st.lists(small, max_size=3).map(tuple),
    batch=st.integers(1, 5),
    tokens=st.integers(1, 6),
    outputs=st.integers(1, 6),
    heads=st.integers(1, 3),
    **dict.fromkeys(("queries", "inputs", "per_head", "down", "across", "side"), small),
)
MEDIUM = Sizes(
    leading=(2, 3),
    batch=4,
    queries=3,
    tokens=5,
    inputs=6,
    outputs=6,
    heads=3,
    per_head=2,
    down=2,
    across=3,
    side=2,
)
ODD = [  # an axis is missing, has length 1, or is longer than the others
    Sizes(),
    Sizes(leading=(1,), queries=3, per_head=2),
    Sizes(leading=(1,), inputs=5, tokens=3, per_head=5),
    Sizes(leading=(1, 1)),
    Sizes(leading=(1, 1), heads=2, per_head=2),
    Sizes(leading=(2,)),
    Sizes(leading=(2, 3), batch=2, inputs=5, outputs=4, per_head=5, down=2, across=3, side=2),
    Sizes(leading=(2, 3), batch=3, queries=2, tokens=5, outputs=10, per_head=4),
    Sizes(leading=(2, 3, 5)),
    Sizes(inputs=3, outputs=2, heads=3),
    Sizes(batch=2, tokens=3, per_head=3),
    Sizes(batch=2, tokens=5, heads=3, per_head=2, down=3, across=2, side=5),
]


def odd_sizes(**others):
    """Return a decorator that adds the odd sizes to the examples of a Hypothesis test."""

    def decorate(test):
        for sizes in ODD:
            test = example(sizes=sizes, seed=0, **others)(test)
        return test

    return decorate


# ---- the table ----


def named(forward, backward=None):
    """Return a function that finds `forward`_forward and `backward`_backward, by default of the same name."""
    return lambda names: (names[f"{forward}_forward"], names[f"{backward or forward}_backward"])


class Operation(NamedTuple):
    """A row of the table. A pair is a function from a mapping of names to (forward, backward)."""

    shapes: Callable  # from Sizes to the shapes of the arrays that have gradients
    ops: Callable
    reference: Callable | None = None  # None where the reference has no such operation
    constants: Callable = lambda sizes, rng: ()  # from Sizes and a generator to the other arguments
    scale: float = 1.0  # the standard deviation of the drawn arrays
    places: int = 0  # how many of the last gradients the backward in `ops` can write into given arrays
    float32_tolerance: float = 2e-5

    def draw(self, sizes, seed, dtype=np.float64):
        """Return random arrays, the constants, and a random dout."""
        rng = np.random.default_rng(seed)
        arrays = [np.asarray(self.scale * rng.standard_normal(shape), dtype) for shape in self.shapes(sizes)]
        constants = self.constants(sizes, rng)
        out, _ = self.pair("ops")[0](*arrays, *constants)
        return arrays, constants, rng.standard_normal(out.shape).astype(dtype)

    def pair(self, module):
        """Return forward and backward of the module "ops" or "reference"."""
        return getattr(self, module)(vars(MODULES[module]))


def first_token(names):
    """Build the reference of class attention: the first token of multi-head attention."""
    all_forward, all_backward = named("multi_head_attention")(names)

    def forward(*arguments):
        out, cache = all_forward(*arguments)
        return out[:, :1], (cache, out.shape)

    def backward(dfirst, cache):
        cache, shape = cache
        dout = np.zeros(shape)
        dout[:, :1] = dfirst
        return all_backward(dout, cache)

    return forward, backward


def plain_patches_backward(dpatches, cache):
    """Return dimages. The patches of an image of pixel numbers tell where each pixel went."""
    shape, side = cache
    numbers = np.arange(math.prod(shape)).reshape(shape)
    dimages = np.empty(shape)
    dimages.flat[reference.patches_forward(numbers, side)] = dpatches
    return dimages


def plain_patches(names):
    def forward(images, side):
        return names["patches_forward"](images, side), (images.shape, side)

    return forward, plain_patches_backward


def patches(names):
    def forward(images, side):
        return names["patches_forward"](images, side), (images.shape, side)

    return forward, lambda dpatches, cache: names["patches_backward"](dpatches, *cache)


def pixel_scale(images):
    """Return a mean and a deviation of the pixels, one per channel for images of colours."""
    shape = images.shape if hasattr(images, "shape") else np.shape(images)
    return ((0.4, 0.5, 0.3), (0.2, 0.3, 0.1)) if shape[3:] == (3,) else (0.1307, 0.3081)


def plain_patch_embedding(names):
    """Build the reference of patch embedding, and add the gradient of the images to its backward."""
    plain_forward, plain_backward = named("patch_embedding")(names)

    def forward(images, w, b, class_token, positions, side):
        pixels = images / 255 if images.dtype == np.uint8 else images
        tokens, cache = plain_forward(pixels, w, b, class_token, positions, side, *pixel_scale(images))
        return tokens, (cache, images.shape, side)

    def backward(dtokens, cache):
        linear_cache, *shape_and_side = cache
        dpixels, _, _ = reference.linear_backward(dtokens[:, 1:], linear_cache)
        dimages = plain_patches_backward(dpixels, shape_and_side)
        dimages /= pixel_scale(dimages)[1]
        return dimages, *plain_backward(dtokens, linear_cache)

    return forward, backward


def patch_embedding(names):
    def forward(images, w, b, class_token, positions, side):
        return names["patch_embedding_forward"](
            images,
            w,
            b,
            class_token,
            positions,
            side,
            *pixel_scale(images),
        )

    return forward, names["patch_embedding_backward"]


def of_constant_images(pair):
    """Return a pair that takes the images among its constants and gives no gradient for them."""

    def build(names):
        pair_forward, pair_backward = pair(names)

        def forward(w, b, class_token, positions, images, side):
            return pair_forward(images, w, b, class_token, positions, side)

        def backward(dtokens, cache, *places):
            return pair_backward(dtokens, cache, *places)[1:]

        return forward, backward

    return build


def plain_cross_entropy(names):
    """Build the reference of cross-entropy, whose backward takes dloss as all others do."""
    forward, backward = named("cross_entropy")(names)
    return forward, lambda dloss, cache: dloss * backward(cache)


def linear_shapes(s):
    return [(*s.leading, s.inputs), (s.inputs, s.outputs), (s.outputs,)]


def layer_norm_shapes(s):
    return [(*s.leading, s.width), (s.width,), (s.width,)]


def softmax_shapes(s):
    return [(*s.leading, s.width)]


def attention_shapes(s):
    return [(*s.leading, s.queries, s.width), (*s.leading, s.tokens, s.width), (*s.leading, s.tokens, s.width)]


def multi_head_shapes(s):
    return [(s.batch, s.tokens, s.width), (s.width, 3 * s.width), (3 * s.width,), (s.width, s.width), (s.width,)]


def embedding_shapes(s):
    return [(s.side**2, s.width), (s.width,), (s.width,), (s.down * s.across + 1, s.width)]


def colour_shapes(s):
    """Return the shapes of colour images whose patches are wider than high, and of their embedding."""
    images = (s.batch, s.down * s.side, s.across * (s.side + 3), 3)
    _, *others = embedding_shapes(s)
    return [images, (s.side * (s.side + 3) * 3, s.width), *others]


def logits_shape(s):
    return [(s.batch, s.outputs)]


def heads(s, rng):
    return (s.heads,)


def side(s, rng):
    return (s.side,)


def wide_patch(s, rng):
    return ((s.side, s.side + 3),)


def bytes_and_side(s, rng):
    return rng.integers(0, 256, s.image_shape, np.uint8), s.side


def labels(s, rng):
    dtype = rng.choice([np.uint8, np.int32, np.int64])
    return (rng.integers(0, s.outputs, s.batch).astype(dtype),)


def smoothed_labels(s, rng):
    return *labels(s, rng), float(rng.choice([0.1, 0.9]))


def probabilities(s, rng):
    return rng.dirichlet(np.ones(s.outputs), s.batch), float(rng.choice([0.0, 0.1, 0.9]))


LINEAR, NORM, GELU, SOFTMAX = map(named, ("linear", "layer_norm", "gelu", "softmax"))
ATTENTION, MULTI_HEAD = named("attention"), named("multi_head_attention")
CROSS_ENTROPY = named("cross_entropy")
OF_LOGITS = {"scale": 3.0, "float32_tolerance": 1e-6}
OF_GELU = {"scale": 2.0, "float32_tolerance": 2e-6}
OPERATIONS = {
    "linear": Operation(linear_shapes, ops=LINEAR, reference=LINEAR, places=2),
    "layer_norm": Operation(
        layer_norm_shapes,
        ops=NORM,
        reference=NORM,
        constants=lambda s, rng: (0.1,),  # a small epsilon makes a kink where all elements happen to be equal
        places=2,
    ),
    "layer_norm with the default epsilon": Operation(
        lambda s: layer_norm_shapes(s._replace(per_head=s.per_head + 4)),  # elements of a wide row are far from equal
        ops=NORM,
        reference=NORM,
        places=2,
    ),
    "gelu": Operation(lambda s: [s.leading], ops=GELU, reference=GELU, **OF_GELU),
    "gelu_tanh": Operation(lambda s: [s.leading], ops=named("gelu_tanh", "gelu"), **OF_GELU),
    "softmax": Operation(softmax_shapes, ops=SOFTMAX, reference=SOFTMAX),
    "attention": Operation(attention_shapes, ops=ATTENTION, reference=ATTENTION, places=3),
    "multi_head_attention": Operation(
        multi_head_shapes,
        ops=MULTI_HEAD,
        reference=MULTI_HEAD,
        constants=heads,
        places=4,
    ),
    "class_attention": Operation(
        multi_head_shapes,
        ops=named("class_attention"),
        reference=first_token,
        constants=heads,
        places=4,
    ),
    "patches": Operation(lambda s: [s.image_shape], ops=patches, reference=plain_patches, constants=side),
    "patch_embedding": Operation(
        lambda s: [s.image_shape, *embedding_shapes(s)],
        ops=patch_embedding,
        reference=plain_patch_embedding,
        constants=side,
        places=4,
    ),
    "patches of colours": Operation(
        lambda s: colour_shapes(s)[:1],
        ops=patches,
        reference=plain_patches,
        constants=wide_patch,
    ),
    "patch_embedding of colours": Operation(
        colour_shapes,
        ops=patch_embedding,
        reference=plain_patch_embedding,
        constants=wide_patch,
        places=4,
    ),
    "patch_embedding of bytes": Operation(
        embedding_shapes,
        ops=of_constant_images(patch_embedding),
        reference=of_constant_images(plain_patch_embedding),
        constants=bytes_and_side,
        places=4,
    ),
    "cross_entropy": Operation(
        logits_shape,
        ops=CROSS_ENTROPY,
        reference=plain_cross_entropy,
        constants=labels,
        **OF_LOGITS,
    ),
    "cross_entropy of smoothed labels": Operation(
        logits_shape,
        ops=CROSS_ENTROPY,
        constants=smoothed_labels,
        **OF_LOGITS,
    ),
    "cross_entropy of probabilities": Operation(
        logits_shape,
        ops=CROSS_ENTROPY,
        constants=probabilities,
        **OF_LOGITS,
    ),
}
PAIRS = {  # every pair that the table describes: a label, the name in the table, and the module
    f"{module}.{name}": (name, module)
    for name, operation in OPERATIONS.items()
    for module in MODULES
    if getattr(operation, module)
}


# ---- how a test runs an operation ----


def with_constants(forward, constants):
    return lambda *arrays: forward(*arrays, *constants)


def evaluate(pair, arrays, constants, dout):
    """Return out, the list of all gradients, and the cache."""
    forward, backward = pair
    out, cache = forward(*arrays, *constants)
    gradients = backward(dout, cache)
    return out, list(gradients) if isinstance(gradients, tuple) else [gradients], cache


def out_and_gradients(pair, arrays, constants, dout):
    """Return out and all gradients in one list."""
    out, gradients, _ = evaluate(pair, arrays, constants, dout)
    return [out, *gradients]


def into_gaps(x):
    """Return x as every second element of a larger array."""
    wide = array_module(x).full((*x.shape, 2), np.nan, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def into_a_slice(x):
    """Return x as the inner part of a larger array."""
    xp = array_module(x)
    wide = xp.full(tuple(length + 2 for length in x.shape), np.nan, dtype=x.dtype)
    inner = wide[(..., *[slice(1, -1)] * x.ndim)]
    inner[...] = x
    return inner


def with_reversed_axes(x):
    """Return x with its axes in the reverse order in memory."""
    return x.T.copy().T


LAYOUTS = {"gaps": into_gaps, "a slice": into_a_slice, "reversed axes": with_reversed_axes}


def in_places(backward, count):
    """Call backward twice, for new arrays and for arrays with gaps, which must receive the last `count` gradients."""

    def function(dout, cache):
        gradients = backward(dout, cache)
        places = [into_gaps(np.full(gradient.shape, np.nan)) for gradient in gradients[-count:]]
        got = backward(dout, cache, *places)
        assert all(a is b for a, b in zip(got[-count:], places, strict=True))
        for a, b in zip(got[:-count], gradients[:-count], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(places, gradients[-count:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)
        return got

    return function
