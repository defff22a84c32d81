# %% [markdown]
r"""
# 15 Make it fast

**Goal.** To know how fast a training step could be on this machine before changing a line of it, and then to come
near that, one idea at a time, with the same numbers as before and a clock at every step.

**The one equation.** A product of matrices $(m, k) · (k, n)$ takes $2 m k n$ operations, one multiplication and one
addition for each term. If the machine does $r$ of them in a second, no step can take less than

$$
t_{\mathrm{floor}} = \frac{1}{r} ∑_{\mathrm{products}} 2 m k n
$$

**Source.** S. Williams, A. Waterman and D. Patterson, *Roofline: An Insightful Visual Performance Model for Multicore
Architectures*, 2009. K. Goto and R. van de Geijn, *Anatomy of High-Performance Matrix Multiplication*, 2008. G.
Amdahl, *Validity of the Single Processor Approach to Achieving Large Scale Computing Capabilities*, 1967.

**Time.** An hour and a half to read and play; fifteen minutes an exercise, more for the last. The script runs in less
than a minute.
"""

# %%
import contextlib
import math
import time
from unittest import mock

import numpy as np
from kit import BLUE, GREEN, INK, MUTED, ORANGE, PINK, SMALL, Lesson

import tinyvit.model
import tinyvit.ops.attention
import tinyvit.ops.class_attention
import tinyvit.ops.patches
from tinyvit import reference
from tinyvit.backend import one_blas_thread, use_loops
from tinyvit.data import load_mnist
from tinyvit.memory import Workspace
from tinyvit.model import ViTConfig, block_backward, block_forward, initialise, loss_and_gradient
from tinyvit.optim import Adam
from tinyvit.training import ParallelGradient, available_cores

lesson = Lesson("15_make_it_fast")
ROUNDS = 3 if lesson.quick else 10
B = 32 if lesson.quick else 64  # images in a batch

config = ViTConfig()
T, D, H, F = config.tokens, config.width, config.heads, config.mlp_width
mnist = load_mnist()
images, labels = mnist.train_images[:B], mnist.train_labels[:B]
parameters = initialise(config, seed=15)
only_core = contextlib.ExitStack()
only_core.enter_context(one_blas_thread())  # products on one core, until we say otherwise

# %% [markdown]
# ## A clock
#
# What a program takes is never twice the same: other programs want the machine too. So as long as we use one core, we
# do not look at the clock on the wall, but at the *processor time* of our process, which stands still while another
# program has the core. And others can only make us slower, never faster than we can be: of several measurements we
# take the *least*. The first run does not count, as it finds nothing in the caches.

# %%
wall_time, processor_time = time.perf_counter, time.process_time
if time.get_clock_info("process_time").resolution > 1e-4:  # as on Windows, where it ticks 64 times a second
    processor_time = wall_time


def milliseconds(run, rounds=ROUNDS, clock=processor_time):
    """Return the least that `run` took, in milliseconds, after a run that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append(clock() - start)
    return 1e3 * min(times)


# %% [markdown]
# ## Count the operations
#
# Before the first change: how much work is there? Forward, every token passes four linear layers a block. With $T$
# tokens an image, width $D$ and MLP width $F$ these are the products $(BT, D)(D, 3D)$ for queries, keys and values,
# $(BT, D)(D, D)$ for the projection, $(BT, D)(D, F)$ and $(BT, F)(F, D)$ for the MLP. Attention adds, for each of
# $B · H$ heads of width $K = D/H$, the scores $(T, K)(K, T)$ and the mean of the values $(T, T)(T, K)$. Then there is
# the embedding of the patches, and the head, which reads the class token.
#
# Backward, each product $y = x w$ is asked for two others of the same size, $∂L/∂x = ∂L/∂y · w^T$ and
# $∂L/∂w = x^T · ∂L/∂y$: that is why training costs three times what classifying does. Only the first layer needs no
# $∂L/∂x$, for nobody wants the gradient of the pixels.


# %%
def products(config, batch):
    """Return what one training step multiplies: a list of (name, how many at once, m, k, n, how often)."""
    tokens, width, heads, patch = config.tokens, config.width, config.heads, config.patch_size**2
    rows, head_width = batch * tokens, width // heads
    block = [
        ("linear", 1, rows, width, 3 * width),
        ("linear", 1, rows, width, width),
        ("linear", 1, rows, width, config.mlp_width),
        ("linear", 1, rows, config.mlp_width, width),
        ("attention", batch * heads, tokens, head_width, tokens),
        ("attention", batch * heads, tokens, tokens, head_width),
    ]
    found = [("linear", 1, batch * (tokens - 1), patch, width, 1), ("linear", 1, batch, width, config.classes, 1)]
    found += [(*product, config.depth) for product in block]
    for name, count, m, k, n, times in found[:]:
        if k != patch:
            found.append((name, count, m, n, k, times))  # dx = dout @ w.T
        found.append((name, count, k, m, n, times))  # dw = x.T @ dout
    return found


def operations(found):
    return sum(2 * count * m * k * n * times for _, count, m, k, n, times in found)


needed = products(config, B)
print(f"{parameters.flat.size:,} parameters, {B} images of {T} tokens")
print(f"a training step multiplies and adds {operations(needed) / 1e9:.2f} billion times")
share = operations([entry for entry in needed if entry[0] == "linear"]) / operations(needed)
print(f"{share:.0%} of that is linear layers, the rest attention's own products")

# The rule of thumb: 6 operations for each weight and token, 2 forward and 4 backward
weights = sum(math.prod(shape) for name, shape in config.shapes().items() if "blocks" in name and len(shape) == 2)
rule = 6 * weights * B * T
print(f"6 x weights x tokens, the rule of thumb, gives {rule / 1e9:.2f} billion")
assert abs(rule / operations(needed) - 1) < 0.1

# %% [markdown]
# ## Find the floor
#
# Products of matrices are done by a library called BLAS. It was tuned for this very processor, and NumPy hands every
# `@` of two matrices to it. We will not write a faster one. So the products alone, with nothing between them, are as
# fast as our step could ever be: its floor. We do not trust a data sheet for $r$, but measure it with the shapes that
# we need, as small matrices are multiplied at a lower rate than large ones. We take float32, which is as many digits
# as training needs.


# %%
def products_alone(found):
    """Return a function that does these products on arrays that are there already, and nothing else."""
    rng = np.random.default_rng(0)
    jobs = []
    for _, count, m, k, n, times in found:
        a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((count, m, k), (count, k, n)))
        a, b = (a[0], b[0]) if count == 1 else (a, b)
        jobs.append((a, b, np.empty_like(a @ b), times))

    def run():
        for a, b, out, times in jobs:
            for _ in range(times):
                np.matmul(a, b, out=out)

    return run


floor = milliseconds(products_alone(needed))
print(f"the floor on one core: {floor:.1f} ms, at {operations(needed) / floor / 1e6:.0f} billion operations a second")

# %% [markdown]
# ## The first version
#
# Now we need something slow. The library is what this lesson arrives at, so we go back to what earlier lessons
# derived: each operation as its derivation says it, with no thought of a clock. All of them stand in
# `tinyvit/reference.py`. Nothing is wrong with these functions. Their gradients are right to the last digit, and you
# can read them. They compute in float64, because a gradient check needs its digits.

# %%
double = parameters.with_flat(parameters.flat.astype(np.float64))


def by_reference(images, labels, parameters=double):
    """Return the loss and the gradients of a batch by the reference."""
    loss, _, gradients = reference.loss_and_gradient(
        images=images.astype(parameters.flat.dtype) / 255,
        labels=labels,
        parameters=parameters,
        heads=config.heads,
        patch_size=config.patch_size,
    )
    return loss, gradients


def in_one_row(gradients):
    """Return all gradients side by side, (P,), in the order of the parameters."""
    return np.concatenate([gradients[name].ravel() for name in parameters])


loss, expected = by_reference(images, labels)
expected = in_one_row(expected)  # what every version must give

# %% [markdown]
# The library's operations have the names of the reference's, take the same inputs and return the same gradients. And
# Python looks a name up when it is called. So we can exchange an operation for a while, and keep the model around it.


# %%
@contextlib.contextmanager
def exchanged(operations):
    """Let the models call `operations`, {name: function}, in the place of their own, inside this context."""
    ops = tinyvit.ops
    with contextlib.ExitStack() as stack:
        for module in (reference, tinyvit.model, ops.attention, ops.class_attention, ops.patches):
            here = {name: function for name, function in operations.items() if hasattr(module, name)}
            if here:
                stack.enter_context(mock.patch.multiple(module, **here))
        yield


def from_library(*names):
    """Return the library's forward and backward passes of these operations, {name: function}."""
    passes = [f"{name}_{way}" for name in names for way in ("forward", "backward")]
    return {name: getattr(tinyvit.model, name) for name in passes}


stairs = []  # (what was changed, milliseconds)


def climb(what, gradient, operations, workspace=None):
    """Check that a version gives the reference's gradients, measure it, and tell what it gained."""
    with exchanged(operations), workspace or contextlib.nullcontext():
        found_loss, found = gradient(images, labels)
        found = in_one_row(found)
        exact = found.dtype == np.float64
        assert abs(found_loss - loss) < (1e-10 if exact else 1e-4)
        assert np.abs(found - expected).max() < (1e-10 if exact else 1e-3) * np.abs(expected).max()
        took = milliseconds(lambda: gradient(images, labels))
    gained = f", {took - stairs[-1][1]:+6.1f}" if stairs else " " * 8
    print(f"{what:<44} {took:6.1f} ms{gained}   {took / floor:4.1f} times the floor")
    stairs.append((what, took))


climb("as the derivations say it, in float64", by_reference, {})

# %% [markdown]
# ## Where does the time go?
#
# Do not guess. We put a clock around each kind of operation; what is left over are attention's own products and
# everything between.


# %%
def profile(gradient, operations, workspace=None):
    """Return how many milliseconds of a step each kind of operation takes, {kind: milliseconds}."""
    home = reference if gradient is by_reference else tinyvit.model
    kinds = {"linear": "linear layers", "layer_norm": "layer norms", "gelu": "GELU"}
    spent = dict.fromkeys(kinds.values(), 0.0)

    def timed(function, kind):
        def wrapper(*arguments, **named):
            start = processor_time()
            result = function(*arguments, **named)
            spent[kind] += 1e3 * (processor_time() - start)
            return result

        return wrapper

    watched = dict(operations)
    for name, kind in kinds.items():
        for way in ("forward", "backward"):
            key = f"{name}_{way}"
            watched[key] = timed(operations.get(key, getattr(home, key)), kind)
    best = None
    with exchanged(watched), workspace or contextlib.nullcontext():
        for _ in range(ROUNDS):
            spent.update(dict.fromkeys(spent, 0.0))
            start = processor_time()
            gradient(images, labels)
            total = 1e3 * (processor_time() - start)
            if best is None or total < sum(best.values()):
                best = spent | {"attention and the rest": total - sum(spent.values())}
    return best


before = profile(by_reference, {})
for kind, took in before.items():
    print(f"{kind:<24} {took:6.1f} ms, {took / sum(before.values()):4.0%}")

# %% [markdown]
# The linear layers were nearly all of the *operations*, and they ought to run at BLAS's rate. In float64 that is
# about half of the rate in float32. If they take more than twice the floor, the fault is also in how they ask for
# what they compute.
#
# ## First: numbers half as wide
#
# Sixteen digits are for the gradient check. Training needs no more than the seven of float32: the gradients of two
# batches differ by far more than that (lesson 16 measures it). A float32 has half the bytes. So half as much is
# moved, and one instruction of the processor takes twice as many numbers, in BLAS too.
#
# For the reference, float32 weights and images are enough. That takes some care. NumPy makes float64 where it is not
# asked for anything else: in `np.zeros(n)`, in `np.eye(n)`, and in `np.sqrt(2)`, which turns every float32 array that
# it meets into float64. One such number, and all that follows is float64. So each pass of the reference takes the
# type of its inputs for every array that it makes, and writes `2**0.5`, because Python's numbers change no type.


# %%
def in_float32(images, labels):
    """Return the loss and the gradients of a batch by the reference, in float32."""
    loss, gradients = by_reference(images, labels, parameters)
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}
    return loss, gradients


climb("float32", in_float32, {})

# %% [markdown]
# ## Second: rows
#
# `x @ w` with `x` of the shape (B, T, D) is, for NumPy, $B$ small products of $T$ rows each, one call of BLAS after
# the other. `dout @ w.T` is the same again. But in the equation of lesson 02 the images and the tokens play the same
# part, that of the row $n$:
#
# $$
# y_{no} = ∑_i x_{ni} w_{io} + b_o, \qquad \frac{∂L}{∂w_{io}} = ∑_n x_{ni} \frac{∂L}{∂y_{no}}
# $$
#
# The reference uses this for `dw`, where the sum over $n$ asks for it. We say for all three products that there are
# $N = B · T$ rows. A reshape of an array moves nothing, and what was $B$ products is one.


# %%
def rows_linear_forward(x, w, b):
    rows = x.reshape(-1, x.shape[-1])  # (N, I)
    return (rows @ w + b).reshape(*x.shape[:-1], -1), (x, w)


def rows_linear_backward(dout, cache):
    x, w = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    return (drows @ w.T).reshape(x.shape), rows.T @ drows, drows.sum(axis=0)


ROWS = {"linear_forward": rows_linear_forward, "linear_backward": rows_linear_backward}
climb("rows: two dimensions for every product", in_float32, ROWS)

# %% [markdown]
# ## Third: a sum is a product
#
# The bias needs $∂L/∂b_o = ∑_n ∂L/∂y_{no}$, a sum down the columns, and layer norm needs means along the rows. Each
# adds one number at a time to few others, and NumPy's loops for that are far from what the processor can do. BLAS's
# are not. And a sum is a product with ones:
#
# $$
# ∑_n \frac{∂L}{∂y_{no}} = (1, 1, …, 1) · \frac{∂L}{∂y}
# $$

# %%
rng = np.random.default_rng(15)
dout = rng.standard_normal((B * T, F), dtype=np.float32)
ones = np.ones(B * T, np.float32)
assert np.allclose(ones @ dout, dout.sum(axis=0), atol=1e-3)
print(f"a column sum of {dout.shape}: {1e3 * milliseconds(lambda: dout.sum(axis=0)):.0f} microseconds,", end=" ")
print(f"as ones @ dout: {1e3 * milliseconds(lambda: ones @ dout):.0f}")

# %% [markdown]
# The library's linear layer does this, and adds the bias in place (`out += b` where `out = x @ w + b` would make a
# second array). From here on we put the library's operations into the reference, one after the other: first the
# linear layer, then layer norm, which has the same two ideas.

# %%
climb("sums as products, in the linear layer", in_float32, from_library("linear"))
climb("... and in layer norm, which works in place", in_float32, from_library("linear", "layer_norm"))

# %% [markdown]
# ## Fourth: passes over memory
#
# Look at `x * ((1 + erf(x / √2)) / 2)`. It seems one thing, and is five: NumPy divides all of `x` and writes the
# result to memory, reads that again for erf, and writes, reads and adds one, and so on. Each is a *pass*. The
# arithmetic of a pass is next to nothing; what takes the time is the moving, and a new array for the result.
#
# An operation's *intensity* is how many operations it does for each number that it moves. A product of $(N, D)(D, F)$
# moves $ND + DF + NF$ numbers for $2NDF$ operations. An addition moves three for one operation. Below a certain
# intensity it is memory that sets the pace, and BLAS's rate is out of reach: that is the roofline of the source
# above.

# %%
x = rng.standard_normal((B * T, F), dtype=np.float32)
other, out = x.copy(), np.empty_like(x)
new, same = milliseconds(lambda: x * other), milliseconds(lambda: np.multiply(x, other, out=out))
print(f"a pass over {x.shape}: {1e3 * new:.0f} microseconds into a new array, {1e3 * same:.0f} into one there is")
print(f"   that is {x.size / same / 1e6:.1f} billion operations a second")
intensity = 2 * B * T * D * F / (B * T * D + D * F + B * T * F)
print(f"   a product does {intensity:.0f} operations for each number it moves, this one a third")
assert intensity > 100

# %% [markdown]
# So: write into arrays that are there (`out=`, `+=`), and pass less often. For GELU there is one more idea, and it is
# mathematics. Its derivative is $Φ(x) + x φ(x)$, with the distribution $Φ$ that the forward pass has at hand anyway.
# The reference keeps both `x` and $Φ(x)$, and computes the derivative from them in the backward pass. If the
# *forward* pass computes the derivative, and keeps that in the place of the two, then the cache is half as large, and
# backward is one multiplication:
#
# $$
# \frac{∂L}{∂x} = \frac{∂L}{∂y} · \underbrace{(Φ(x) + x φ(x))}_{\mathrm{saved}}
# $$
#
# (In float32 the library also replaces erf by a polynomial in a tanh, which is as exact as float32 can be. See
# `tinyvit/ops/gelu.py`.)

# %%
climb("GELU in place, its derivative saved", in_float32, from_library("linear", "layer_norm", "gelu"))

# %% [markdown]
# ## Fifth: the softmax turned over
#
# The softmax of attention goes along the keys, of which there are 17. Side by side in memory, they make $B · H · T$
# sums of 17 numbers each, and to begin a sum takes longer than 17 additions. If the *same* array has the axis of the
# keys outermost in memory, there are 17 rows of $B · H · T$ numbers, and the sum is 16 additions of long rows. The
# shape is the same, only the strides of lesson 01 are others. The library asks for its scores in this order, and lets
# every head write its columns of the result where they belong, so that no copy brings the heads together.

# %%
scores = rng.standard_normal((B, H, T, T), dtype=np.float32)
turned = np.ascontiguousarray(scores.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)  # the same, in another order
assert np.array_equal(scores, turned)
for name, array in (("side by side", scores), ("far apart", turned)):
    took = milliseconds(lambda array=array: array.sum(axis=-1))
    print(f"sums over 17 keys that lie {name} in memory, strides {array.strides}: {1e3 * took:.0f} microseconds")
every_operation = from_library("linear", "layer_norm", "gelu", "multi_head_attention")
climb("attention, the softmax turned over", in_float32, every_operation)

# %% [markdown]
# ## Sixth: memory, handed out again
#
# A new array is not only written. The system first has to find room for it, and a large one is given back as soon as
# it is done with; the next one of its size is asked for again, and its pages are filled with zeros on the way. But a
# step needs the same arrays every time. The library asks for all of them in one place, `tinyvit.memory.empty`. A
# `Workspace` keeps what a step has done with, and hands it out again, and first what was freed last, as that is still
# cache of the processor.
#
# Here we leave the reference for the library's model, which uses memory again too: it adds the residuals in place,
# and writes each gradient where it belongs in one flat array. We turn off one idea of its last block, the next one in
# this lesson: all tokens leave the block, and those that are not read have a gradient of zero.


# %%
def by_library(images, labels):
    """Return the loss and the gradients of a batch as the library computes them, in float32."""
    loss, _, gradients = loss_and_gradient(
        images=images,
        targets=labels,
        parameters=parameters,
        config=config,
    )
    return loss, gradients


def forward_of_all_tokens(x, parameters, name, config, *switches, **named_switches):
    return block_forward(x, parameters, name, config)


def backward_of_all_tokens(dout, cache, gradients, name):
    if dout.shape[1] == 1:  # in the last block: the gradient of the class token
        others = np.zeros((len(dout), T - 1, D), dout.dtype)
        dout = np.concatenate([dout, others], axis=1)
    return block_backward(dout, cache, gradients, name)


ALL_TOKENS = {"block_forward": forward_of_all_tokens, "block_backward": backward_of_all_tokens}
climb("memory handed out again", by_library, ALL_TOKENS, Workspace())
after = profile(by_library, ALL_TOKENS, Workspace())

# %% [markdown]
# ## Seventh: do not compute what is never read
#
# The fastest operation is the one that is left out. At the end only the class token is read. So in the *last* block
# nobody needs the queries, the projection and the MLP of the other sixteen tokens; their gradients are zeros, and all
# that was done with them were products with zeros. It is the same function, with the same gradients. (Of the keys and
# values all are needed. But a single query can be taken to the tokens, in place of the tokens to the query: exercise
# 4.)

# %%
climb("the last block for the class token only", by_library, {}, Workspace())

# %% [markdown]
# Mind that our floor was the floor of *another* computation, with all tokens in all blocks. A floor is only as good
# as the question "what is needed?". What is not, in the last block, are the products of the MLP, the projection and
# the queries for sixteen tokens of seventeen. (The trick with the query saves most of the keys and values too: a few
# per cent more, which we do not count.)

# %%
skipped = [
    ("linear", 1, B * (T - 1), D, D, 2),  # queries and projection
    *(("linear", 1, B * (T - 1), k, n, 1) for k, n in ((D, F), (F, D))),
    *(("attention", B * H, T - 1, k, n, 1) for k, n in ((D // H, T), (T, D // H))),
]
saved = 3 * operations(skipped)  # forward, and twice backward
print(f"left out are {saved / operations(needed):.0%} of the operations that the floor was made of")
assert 0.1 < saved / operations(needed) < 0.25
print(f"so the floor of what is needed lies at about {floor * (1 - saved / operations(needed)):.1f} ms")

# %% [markdown]
# ## Eighth: one loop in place of twenty passes
#
# NumPy computes GELU and its derivative in some twenty passes over memory, because each of its functions does one
# thing to a whole array. A loop over the elements does all twenty things to one number while it is in a register:
#
# ```
# for i in range(len(x)):
#     cdf = normal_cdf(x[i])
#     out[i] = x[i] * cdf
#     derivative[i] = cdf + x[i] * normal_density(x[i])
# ```
#
# Interpreted by Python this takes a second. Numba compiles the same text for the processor, sixteen numbers at a
# time, if two conditions hold. Exponentials must be polynomials, as a call of `exp` for each number is not
# vectorised. And the output must not be the input under another name, as the compiler then has to expect that each
# write changes what it reads next. `tinyvit/loops.py` has four such loops: GELU, layer norm forward and backward, and
# Adam. Numba is optional (`pip install "tinyvit[fast]"`). Without it this stair is missing.

# %%
with use_loops("auto") as compiled:
    if compiled:
        climb("one loop in place of twenty passes", by_library, {}, Workspace())
        x = rng.standard_normal((B * T, F), dtype=np.float32)
        loop = milliseconds(lambda: tinyvit.ops.gelu_forward(x))
        with use_loops("off"):
            passes = milliseconds(lambda: tinyvit.ops.gelu_forward(x))
        print(f"GELU and its derivative for {x.shape}: {passes:.2f} ms in passes, {loop:.2f} ms in one loop")
    else:
        print("Numba is not installed, so this stair is missing")

# %% [markdown]
# ## Ninth: shares side by side
#
# All this was one core. Why not give BLAS several? Because it would use them for the products alone, and between two
# products only one core works. G. Amdahl's law says what that means. If a share $p$ of the time can be spread over
# $c$ cores, then the whole takes
#
# $$
# \frac{t(c)}{t(1)} = (1 - p) + \frac{p}{c}
# $$
#
# With $p = 0.7$ and two cores that is 0.65, and with a hundred cores still 0.3. Better to have *everything* side by
# side: cut the batch into shares, one for each core, let each do the whole step on its own, with read-only weights
# and one thread of BLAS, and add up the gradients. The loss is a mean over images, so its gradient is the mean of the
# shares' gradients, weighted by their sizes: this is exact. `ParallelGradient` does it, with a process for each core.

# %%
cores = min(available_cores(), 8)  # a share of fewer than a few images is not worth a process


with use_loops("auto"):
    with ParallelGradient(config, workers=cores) as parallel:
        _, _, found = parallel(parameters, images, labels)
        assert np.abs(found.flat - expected).max() < 1e-3 * np.abs(expected).max()
        side_by_side = milliseconds(lambda: parallel(parameters, images, labels), clock=wall_time)
    with Workspace():
        alone = milliseconds(lambda: by_library(images, labels), clock=wall_time)
        only_core.close()
        with_threads = milliseconds(lambda: by_library(images, labels), rounds=3, clock=wall_time)

what = f"shares side by side, on {cores} core{'s' if cores > 1 else ''}"
stairs.append((what, stairs[-1][1] * side_by_side / alone))  # the gain holds, whoever else is at work
print("now by the clock on the wall, as several processes are at work:")
for way, took in (("one core", alone), (what, side_by_side), ("the same cores given to BLAS instead", with_threads)):
    print(f"    {way:<40} {took:6.1f} ms, {alone / took:.2f} times as fast as one core")
if alone > 1.3 * stairs[-2][1]:
    print("    (other programs are using this machine: all three are larger than they need be, the last one most)")

# %% [markdown]
# ## Adam
#
# One thing is left: the update. As all weights lie in one flat array, it is a dozen passes over it, in place, and not
# a dozen for each of the model's arrays. The compiled loop makes one pass.

# %%
adam = Adam(parameters.flat)
weights_before, gradient = parameters.flat.copy(), expected.astype(np.float32)
with use_loops("auto"):
    update = milliseconds(lambda: adam.step(parameters.flat, gradient, 1e-3))
parameters.flat[...] = weights_before
per_weight = 1e6 * update / parameters.flat.size
print(f"Adam, {parameters.flat.size:,} weights: {update:.1f} ms, {per_weight:.1f} nanoseconds a weight")

# %% [markdown]
# ## The staircase

# %%
figure, axes = lesson.figure(7, 3.6)
names, times = zip(*stairs, strict=True)
places = np.arange(len(stairs))[::-1]
axes.barh(places, times, color=[BLUE] * (len(stairs) - 1) + [GREEN], height=0.7)
for place, took in zip(places, times, strict=True):
    axes.text(took + 0.01 * max(times), place, f"{took:.0f}", va="center", fontsize=SMALL, color=INK)
axes.axvline(floor, color=ORANGE, linestyle="--")
beside = floor + 0.015 * max(times)
axes.text(beside, -0.95, "the products alone, one core", color=ORANGE, fontsize=SMALL, va="center")
axes.set_yticks(places, names)
axes.set_ylim(-1.3, len(stairs) - 0.5)
axes.set_xlim(0, 1.08 * max(times))
axes.grid(visible=False, axis="y")
axes.set_xlabel(f"milliseconds for the gradient of {B} images, on this machine")
axes.set_title("Every stair is one idea, and the gradients stay the same")
lesson.save(figure, "staircase")

figure, axes = lesson.figure(7, 2.4)
left = np.zeros(2)
for (kind, took), colour in zip(before.items(), (BLUE, ORANGE, GREEN, PINK), strict=True):
    both = np.array([took, after[kind]])
    axes.barh([1, 0], both, left=left, color=colour, height=0.6, label=kind)
    left += both
axes.axvline(floor, color=MUTED, linestyle="--", linewidth=1)
axes.text(floor, 1.42, " the products alone", color=MUTED, fontsize=SMALL, va="bottom")
axes.set_yticks([1, 0], ["as derived,\nin float64", "the library's,\nin float32"])
axes.set_ylim(-0.5, 1.75)
axes.grid(visible=False, axis="y")
axes.set_xlabel("milliseconds, all tokens in all blocks, one core")
axes.set_title("Where the time goes")
figure.legend(loc="outside lower center", ncols=4)
lesson.save(figure, "profile")

first, last = stairs[0][1], stairs[-2][1]
print(f"on one core: from {first:.0f} ms to {last:.0f} ms, {first / last:.1f} times as fast, with the same gradients")
assert first > 1.5 * last

# %% [markdown]
# What a stair gains depends on the machine, and on what was done before it. One that gains nothing here may be the
# largest elsewhere, and all of them together are what counts.
#
# What remains above the floor is arithmetic that is no product: GELU, the norms, the softmax, the sums of residuals,
# each at the pace of memory; and the calls themselves, several hundred a step, each with a little of Python around
# it. On a small batch the calls weigh more, on a large one the memory.
#
# Just as instructive is what did *not* help. `benchmarks/NOTES.md` keeps a list: GELU in pieces that stay in the
# cache, larger pages, smaller shares. Each looked good on paper. None was kept, because the clock did not agree.
#
# ## How to go about it
#
# - Count first. If the count says 20 ms and you measure 25, go and do something else.
# - Measure the parts, and begin with the largest.
# - One change at a time, with the check of the gradients beside the clock.
# - Leave out before you speed up.
# - Keep what the clock says is faster, and throw away what ought to have been.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/15_make_it_fast.py`.
#
# **1.** How many operations does the forward pass of *one* block take for one image, in its products? Give a formula
# in the number of tokens, the width and the MLP width; the number of heads does not matter. From which number of
# tokens on does attention cost more than the MLP?


# %%
def exercise_1(tokens, width, mlp_width):
    """Return the operations, a whole number, of one block's products for one image, forward."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** Adam divides: $\hat m / (\sqrt{\hat v} + ε)$. Compute it with *one* new array, which you return. (The check
# counts the arrays that are made. Neither input may be written into.)


# %%
def exercise_2(m, v, epsilon):
    """Return m / (sqrt(v) + epsilon), elementwise, for arrays m and v of one shape."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Amdahl backwards. You measured a program on one core and on $c$ cores, and it became $s$ times as fast. Which
# share of its time on one core was *not* spread over the cores? And how much faster could it get at most, with as
# many cores as you like?


# %%
def exercise_3(speedup, cores):
    """Return the share of the time that is serial, and the largest speedup possible (serial is above 0)."""
    return ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** In the last block one query $q$ an image looks at $T$ tokens. Its scores are $s_{bt} = q_b · (x_{bt} w)$,
# where `x` is (B, T, D), `w` is (D, K) and `q` is (B, K). To make all keys $x w$ first takes $2BTDK$ operations. Find
# the same scores with far fewer. (The check counts the operations of every `@`; any number of dimensions will do.)


# %%
def exercise_4(x, w, q):
    """Return the scores (B, T), sum over d and k of x[b, t, d] w[d, k] q[b, k]."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# One core was not enough, so we took several. The last lesson goes to a machine with thousands of them, where the
# arithmetic is nearly free, and asking for it is what costs.
