# %% [markdown]
r"""
# 16 To the GPU

**Goal.** To take the same code to a machine with thousands of small cores, to know by counting what it will wait for
there, and to read the kernels that make it wait less.

**The one equation.** A step of $n$ launches that moves $m$ bytes and does $a$ operations can take no less than the
longest of three times: to launch, at $t_{\mathrm{launch}}$ each, to move, at a bandwidth $b$, and to compute, at a
rate $r$:

$$
t ≥ \max \left( n \, t_{\mathrm{launch}}, \; \frac{m}{b}, \; \frac{a}{r} \right)
$$

**Source.** J. Nickolls, I. Buck, M. Garland and K. Skadron, *Scalable Parallel Programming with CUDA*, 2008. J.
Salmon, M. Moraes, R. Dror and D. Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, 2011. P. Micikevicius and
others, *Mixed Precision Training*, 2018.

**Time.** An hour and a half to read and play; fifteen minutes an exercise. The script runs in less than half a
minute, with a GPU or without one.
"""

# %%
import contextlib
import inspect
import math
import textwrap
import time
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
from kit import BLUE, GREEN, INK, ORANGE, PINK, SMALL, Lesson

import tinyvit.ops.linear
from tinyvit.backend import array_module, to_host
from tinyvit.data import load_mnist
from tinyvit.gpu import DeviceError, get_backend
from tinyvit.kernels import Kernels, KernelStep
from tinyvit.kernels.launch import source
from tinyvit.memory import Workspace, matmul
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_forward
from tinyvit.ops import gelu_forward, layer_norm_forward
from tinyvit.optim import Adam
from tinyvit.parameters import Parameters
from tinyvit.training import State, TrainingConfig

lesson = Lesson("16_to_the_gpu")
config = ViTConfig()
B, T, D, F = 64, config.tokens, config.width, config.mlp_width
mnist = load_mnist()
images, labels = mnist.train_images[:B], mnist.train_labels[:B]
rng = np.random.default_rng(16)

# %% [markdown]
# ## Is there one?
#
# If this machine has a GPU of NVIDIA's and CuPy, this lesson measures. If not, it counts and computes, and everything
# it says of a GPU is marked: *counted* by running the code, *computed* from a count, *data sheet* for what the vendor
# promises, or *assumed*. Nothing here is a measurement that somebody else took.

# %%
try:
    gpu = get_backend("gpu")
    print("there is a GPU, and it computes: what follows is measured on it where it can be")
except DeviceError as error:
    gpu = None
    print(textwrap.fill(f"no GPU here: {error}", 100))
    print("so figures of GPUs are counted, computed, assumed or from a data sheet, and say which")

# %% [markdown]
# ## The same code
#
# CuPy is NumPy's interface for arrays that live on a GPU. The library never says `np.exp`, but asks the array that it
# was given where it lives: `xp = array_module(x)`, and then `xp.exp`. So the very functions of lessons 02 to 11 run
# on both. Three rules had to be kept: no array of one device meets one of the other; nothing is looked at on the way
# (`if loss > 3` would have to wait until the GPU is done); and whoever needs an output asks in one place for it.


# %%
def norm_anywhere(backend):
    x = backend.asarray(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    w, b = backend.asarray(np.ones(4, np.float32)), backend.asarray(np.zeros(4, np.float32))
    return array_module(x).__name__, to_host(layer_norm_forward(x, w, b)[0])


results = [norm_anywhere(backend) for backend in (get_backend("cpu"), gpu) if backend is not None]
for module, result in results:
    print(f"layer norm by {module}: first row {np.round(result[0], 4)}")
    assert np.abs(result - results[0][1]).max() < 1e-5

# %% [markdown]
# ## A call is a launch
#
# On the CPU, `x * y` is a loop in this very process. On a GPU it is a *launch*: Python looks up a small program, a
# *kernel*, packs the addresses of its arrays, and puts it into a queue. The GPU takes it from there, with a thread
# for every element, and Python is already at the next line. As long as the queue is full, both work at once. But for
# Python to queue a launch takes microseconds. If the kernel itself takes less, then the GPU stands idle and waits for
# Python.
#
# So how many launches is a training step? We need no GPU to know: we count what the library asks of its array module.
# An array that counts is a subclass of NumPy's, which is told of every elementary operation done with it. It also
# adds up how many numbers each reads and writes. (In float64, because there the library takes the path without the
# polynomial for GELU, as it does on a GPU.)


# %%
LAUNCHES = []  # (kind, numbers moved), one entry for what would be one launch


class Counted(np.ndarray):
    """An array that writes down in LAUNCHES what is done with it."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        kinds = {"reduce": "sums and maxima", "__call__": "element by element"}
        kind = "matrix products" if ufunc is np.matmul else kinds[method]
        LAUNCHES.append((kind, sum(map(np.size, plain)) + np.size(result)))
        if out is not None:
            return out[0]
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __setitem__(self, place, value):
        super().__setitem__(place, value)
        LAUNCHES.append(("copies", np.size(value) + np.size(self[place])))

    def reshape(self, *shape):
        result = super().reshape(*shape)
        if not np.may_share_memory(self, result):
            LAUNCHES.append(("copies", 2 * result.size))
        return result


class CountingMemory(Workspace):
    """Gives the library arrays that count, wherever it asks for one."""

    def empty(self, shape, dtype, xp):
        return np.empty(shape, dtype).view(Counted)


def count(run):
    """Return the launches that `run` would be, a list of (kind, numbers moved)."""
    LAUNCHES.clear()
    with CountingMemory():
        run()
    return LAUNCHES.copy()


double = Parameters(config.shapes(), initialise(config, 16, np.float64).flat.view(Counted))
adam = Adam(double.flat)


def plain_step(images, labels, parameters, adam):
    """One training step in plain operations: forward, loss, backward, Adam."""
    _, _, gradients = loss_and_gradient(
        images=images,
        targets=labels,
        parameters=parameters,
        config=config,
    )
    adam.step(parameters.flat, gradients.flat, 1e-3)


plain = count(lambda: plain_step(images.view(Counted), labels.view(Counted), double, adam))
kinds = Counter(kind for kind, _ in plain)
print(f"counted: {len(plain)} launches for a training step in plain operations, at least")
for kind, times in kinds.most_common():
    moved = sum(numbers for other, numbers in plain if other == kind)
    print(f"    {times:4} {kind:<20} which move {4 * moved / 1e6:5.0f} MB in float32")
assert 300 < len(plain) < 900

# %% [markdown]
# ("At least": CuPy makes two or three of some that we counted once, such as a product of transposed stacks.)
#
# ## What would the GPU do in the meantime?
#
# Now we have $n$ and $m$, and $a$ from lesson 15: 6 operations a weight and token (a fifth more than is done, as the
# last block leaves out what nobody reads). For the machine we take what the vendor's data sheets say of two cards: a
# small one, of 2018, and a large one, of 2022. For the time of a call from Python we assume ten microseconds. It is
# an assumption: if you have a GPU, the lesson measures yours further down.

# %%
weights = sum(math.prod(shape) for name, shape in config.shapes().items() if "blocks" in name and len(shape) == 2)
arithmetic = 6 * weights * B * T  # operations, of all tokens in all blocks
CALL = 10e-6  # seconds, assumed: for Python to queue one launch
CARDS = {  # NVIDIA's data sheets: float32 operations a second outside tensor cores, bytes a second from memory
    "T4": (8.1e12, 320e9),
    "H100 SXM": (67e12, 3.35e12),
}


def bounds(launches, numbers, card):
    """Return the three times of the equation, in milliseconds: to launch, to move, to compute."""
    rate, bandwidth = CARDS[card]
    return 1e3 * launches * CALL, 1e3 * 4 * numbers / bandwidth, 1e3 * arithmetic / rate


moved = sum(numbers for _, numbers in plain)
print(f"computed, for {len(plain)} launches, {4 * moved / 1e6:.0f} MB and {arithmetic / 1e9:.1f} billion operations:")
for card in CARDS:
    launch, move, compute = bounds(len(plain), moved, card)
    by_data_sheet = f"to move {move:.2f}, to compute {compute:.2f} (data sheet)"
    print(f"    {card:<9} to launch {launch:.1f} ms (assumed), {by_data_sheet}")
launch, move, compute = bounds(len(plain), moved, "H100 SXM")
assert launch > 5 * max(move, compute)  # whatever a call costs, within reason: Python is what is waited for

# %% [markdown]
# On the large card the arithmetic is next to nothing, and the time is Python's. A larger model would be another
# matter: twice the width makes four times the arithmetic, and not one launch more. But ours is what it is, so we make
# *fewer launches that each do more*.
#
# ## Fusion
#
# Take Adam. Plain, it is a pass over all weights for every sign in the formula: read, one operation, write. But each
# weight goes its own way, and never looks at its neighbour. A kernel can do all of it for one weight, with the
# intermediate results in *registers*, the few numbers that a thread has at hand: each array is read once and written
# once, in one launch. That is *fusion*. Here is the library's Adam beside the heart of its kernel.

# %%
kernel_text = source("adam")
start = kernel_text.index("float g = gradient[place] * scale;")
end = kernel_text.index("weights[place] = weight;") + len("weights[place] = weight;")
print("tinyvit/optim.py, a pass over everything for each line:")
print(textwrap.indent(textwrap.dedent(inspect.getsource(Adam._update).split('"""')[2].lstrip("\n")), "    "))
print("tinyvit/kernels/adam.cu, what one thread does for its weight at `place`:")
print(textwrap.indent(textwrap.dedent(" " * 8 + kernel_text[start:end]), "    "))

# %% [markdown]
# C++ is no obstacle here: a line ends with a semicolon, `float` says that it is a number of 32 bits, and `sqrtf` is
# its square root. Let us run it as it stands, a thread at a time, in Python. That is what `tests/support/emulate.h`
# does with the real text for all kernels, on a CPU.


# %%
def adam_thread(place, weights, gradient, m_array, v_array, row, betas, epsilon):
    """What a thread of adam_step does, for one weight, without decay and average."""
    (beta1, rest1), (beta2, rest2) = betas
    _rate, step_size, v_correction, _average_share = row
    g = gradient[place]
    m = m_array[place] * beta1 + g * rest1
    v = v_array[place] * beta2 + g * g * rest2
    m_array[place], v_array[place] = m, v
    weights[place] -= m / (np.sqrt(v) * v_correction + epsilon) * step_size


size = 300
ours = rng.standard_normal(size, dtype=np.float32)
theirs, m, v = ours.copy(), np.zeros(size, np.float32), np.zeros(size, np.float32)
check = Adam(theirs)
numbers = [(np.float32(beta), np.float32(1 - beta)) for beta in (check.beta1, check.beta2)]
for t in (1, 2, 3):
    gradient = rng.standard_normal(size, dtype=np.float32)
    check.step(theirs, gradient, 1e-3)
    row = np.array([1e-3, 1e-3 / (1 - check.beta1**t), 1 / math.sqrt(1 - check.beta2**t), 0], np.float32)
    for place in rng.permutation(size):  # threads run in any order: none may need another's result
        adam_thread(place, ours, gradient, m, v, row, numbers, np.float32(check.epsilon))
assert np.abs(ours - theirs).max() < 1e-6
launches = count(lambda: Adam(double.flat).step(double.flat, double.flat.copy(), 1e-3))
touched = 4 + 3  # reads weight, gradient and both moments; writes weight and both moments
print(f"three steps of Adam, a thread at a time: the same as the library's, to {np.abs(ours - theirs).max():.0e}")
moved_plain = sum(numbers for _, numbers in launches) / double.flat.size
print(f"counted: plain, {len(launches)} launches that move {moved_plain:.0f} numbers for each weight;", end=" ")
print(f"fused, one that moves {touched}")

# %% [markdown]
# The same with GELU, which follows a linear layer. A tile of the product lies in registers when the product is done.
# So its kernel adds the bias, computes GELU *and* the derivative that lesson 15 saved, and writes both. This is what
# `linear_gelu_forward` in `linear.cu` says after the product:

# %%
kernel_text = source("linear")
start = kernel_text.index("float cdf = ")
end = kernel_text.index("#endif", start)
print(textwrap.indent(textwrap.dedent(" " * 12 + kernel_text[start:end].rstrip()), "    "))

x = rng.standard_normal((B * T, F)).view(Counted)
launches = count(lambda: gelu_forward(x))
print(f"counted: GELU and its derivative, plain, {len(launches)} launches that move", end=" ")
print(f"{sum(n for _, n in launches) / x.size:.0f} numbers for each input;")
print("fused into the product before it, none, and 2: the two results")


# The three lines, for one number, against the library
def gelu_thread(h):
    cdf = 0.5 * (1.0 + math.erf(h * 0.7071067812))
    return h * cdf, cdf + h * 0.3989422804 * math.exp(-0.5 * h * h)


for h in (-2.0, 0.0, 0.5, 3.0):
    value, derivative = gelu_forward(np.array([h]))
    assert np.allclose(gelu_thread(h), [value[0], derivative[0]], atol=1e-9)

# %% [markdown]
# ## Threads, warps, blocks
#
# A launch says how many *blocks* it has and how many threads a block. The threads of a block run on one of the card's
# processors and can do two things together that threads of different blocks cannot: wait for each other
# (`__syncthreads()`), and write into a small, fast *shared memory*. In hardware they come in *warps* of 32 that step
# together; the 32 *lanes* of a warp can read each other's registers. So a sum over a warp needs no memory at all.
# Each lane adds what the lane at a distance of 16 has, then 8, 4, 2 and 1, and after five steps all of them have the
# sum:


# %%
def warp_sum(lanes):
    """What warp_sum in warp.cuh does: `lanes` (32,) are the values that the 32 lanes hold."""
    lane = np.arange(32)
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[lane ^ distance]  # __shfl_xor_sync: what the lane whose number differs in that bit has
    return lanes


lanes = rng.integers(0, 100, 32)
assert (warp_sum(lanes) == lanes.sum()).all()
print(f"32 lanes after 5 exchanges: all have {warp_sum(lanes)[0]}, which is the sum")

# %% [markdown]
# What is shared memory for? In a product $y = x w$ of $(m, k) (k, n)$, each output needs a row of $x$ and a column of
# $w$: $2k$ numbers. A thread for each output would read $2mnk$ numbers from the card's memory, and the processors
# would wait for it. But outputs of one row all need the same row. So a block takes a *tile* of 32 rows and 32
# columns, brings 32 steps of $k$ at a time into shared memory, and from there each number serves 32 outputs. Let us
# count what is read.


# %%
def tiled_product(x, w, tile=32):
    """Return x @ w as `tile_product` in matmul.cuh does it, and how many numbers were read from the card's memory."""
    (m, k), n = x.shape, w.shape[1]
    y, read = np.zeros((m, n), x.dtype), 0
    for first_m in range(0, m, tile):  # these two loops are the blocks, which run in any order
        for first_n in range(0, n, tile):
            rows, columns = slice(first_m, first_m + tile), slice(first_n, first_n + tile)
            for first_k in range(0, k, tile):
                steps = slice(first_k, first_k + tile)
                a_slab, b_slab = x[rows, steps].copy(), w[steps, columns].copy()  # into shared memory
                read += a_slab.size + b_slab.size
                # __syncthreads(): all must have written before any of them reads
                y[rows, columns] += a_slab @ b_slab
                # __syncthreads(): all must have read before any of them writes the next
    return y, read


x, w = rng.standard_normal((B, D)), rng.standard_normal((D, 3 * D))
y, read = tiled_product(x, w)
assert np.allclose(y, x @ w, atol=1e-12)
alone = 2 * B * D * 3 * D
print(f"counted, for a product ({B}, {D}) ({D}, {3 * D}):")
print(f"    a thread for each output reads {alone:,} numbers, tiles of 32 read {read:,}")
assert alone == 32 * read

# %% [markdown]
# The attention kernel goes furthest. A head of our model has 17 tokens of width 32: its queries, keys and values are
# three tables of 544 numbers, and fit into shared memory together. One block takes one head of one image from `qkv`
# to its output. Scores, softmax and the sum of the values happen there, and only the weights are written, for the
# backward pass. Open `tinyvit/kernels/attention.cu` beside `tinyvit/ops/attention.py`, and find each line of the one
# in the other; a warp takes a query, and a lane a key.

# %%
table = T * (D // config.heads + 1)  # a row one number longer than it need be
forward_bytes = 4 * (3 * table + 4 * T)
blocks = B * config.heads
print(f"counted: attention's forward kernel has {blocks} blocks of 128 threads. Each keeps {forward_bytes:,} bytes")
print("in shared memory, of the 49,152 that a block may have")

# %% [markdown]
# ("One number longer"? Shared memory lies in 32 banks, each of which serves one lane at a time. If 32 lanes read down
# a column of a table whose rows have 32 numbers, all of them want the same bank. With rows of 33 they want 32
# different ones.)
#
# ## A step in kernels
#
# `KernelStep` takes a whole training step: it gathers the images, and launches forward, loss, backward and Adam. We
# count its launches by giving it, in the place of the kernels, something that writes down their names.


# %%
class Recorder:
    """Takes the place of `Kernels`, and writes down which of them are launched."""

    def __init__(self, config):
        self.config, self.precision, self.names = config, "float32", []
        cuda = SimpleNamespace(Stream=contextlib.nullcontext)  # nothing waits here
        xp = SimpleNamespace(zeros=np.zeros, empty=np.empty, cuda=cuda)
        self.backend = SimpleNamespace(xp=xp, synchronise=lambda: None, asarray=np.asarray)

    def __getattr__(self, name):
        return lambda **arguments: self.names.append(name)


recorder = Recorder(config)
single = initialise(config, 16)
state = State(single, Adam(single.flat), average=None)
step = KernelStep(recorder, state, images, labels, TrainingConfig(batch_size=B), graph=False)
step.begin_epoch(0)  # an epoch of this one batch
step()
print(f"counted: {len(recorder.names)} launches for the same step in kernels")
for name, times in Counter(recorder.names).most_common():
    print(f"    {times:4} {name}")
assert 50 < len(recorder.names) < 100
assert len(recorder.names) < len(plain) / 5

# %% [markdown]
# ## The graph
#
# Still one call from Python for each. But the launches of a step are *the same* every time: the same kernels, the
# same sizes, in the same order, and, as `KernelStep` makes each array once and keeps it, at the same addresses. CUDA
# can record such a sequence as a *graph*, and launch all of it with one call. The CPU is then out of the game. (The
# card still needs a moment between two kernels. It is far less than a call from Python, and we do not count it.)
#
# It has a price: a graph cannot take an argument. Whatever changes from step to step must lie in memory, where a
# kernel finds it. So there is a counter on the card that a kernel raises by one; the learning rates of a whole epoch
# lie there as a table, of which Adam reads the row of the counter; and so do the order of the images and how each is
# turned. With NumPy we would say `rng.uniform(...)`, and the generator would remember where it is. With 60,000
# threads that all want a number, in no order, that will not do.
#
# ## Random numbers without a memory
#
# Philox is a generator that has no state. It is a *function*: of a key and a counter, it makes four random words, by
# ten rounds of multiplying and mixing. Number 1,000,000 costs as much as number 1, and each thread asks for its own.
# NumPy has the same generator, so that CPU and GPU draw the very same numbers.

# %%
MASK = 2**64 - 1


def philox(counter, key):
    """Return the four 64-bit words of Philox4x64-10 for a counter and a key of two words, as in patches.cu."""
    c, (key0, key1) = [counter, 0, 0, 0], key
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        high0, low0, high1, low1 = product0 >> 64, product0 & MASK, product1 >> 64, product1 & MASK
        c = [high1 ^ c[1] ^ key0, low1, high0 ^ c[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & MASK, (key1 + 0xBB67AE8584CAA73B) & MASK
    return c


key = (2026, 16)
numpys = np.random.Philox(key=np.array(key, np.uint64)).random_raw(12)
ours = [word for counter in (1, 2, 3) for word in philox(counter, key)]  # NumPy counts from 1
assert [int(word) for word in numpys] == ours
print("Philox by hand and NumPy's: the same twelve words, the first of them", f"{ours[0]:#018x}")

close = philox(1, key)[0] ^ philox(2, key)[0]
print(f"counters 1 and 2 differ in two bits, their words in {close.bit_count()} of 64")
assert 16 < close.bit_count() < 48

# %% [markdown]
# ## Fewer bits
#
# The last thing a GPU offers is a bargain. Its *tensor cores* multiply small matrices many times as fast as its
# ordinary units, if the operands have fewer bits. A float32 has 8 bits for the size and 23 for the digits, the
# mantissa. TF32 keeps 10 of these, and bfloat16 keeps 7: it is a float32 without its lower half. The sums stay
# float32.
#
# Rounding is easily done by hand, for a float32 is a whole number to whoever looks at its bits. To keep $k$ bits of
# 23, add half of the last one that stays, and cut off the rest. A carry runs over into the next digit by itself, and
# even into the exponent, as it should.


# %%
def keep_bits(x, kept):
    """Round float32 numbers to `kept` bits of mantissa, to nearest, ties away from zero."""
    cut = 23 - kept
    if cut == 0:
        return x
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << (cut - 1))) & np.uint32(2**32 - (1 << cut))).view(np.float32)


assert keep_bits(np.float32([1 + 2**-10]), 10) == np.float32(1 + 2**-10)  # that has a place
assert keep_bits(np.float32([1 + 2**-11]), 10) == np.float32(1 + 2**-10)  # a tie
assert keep_bits(np.float32([1.9999]), 7) == 2

# %% [markdown]
# How much does it cost? We take a real product: real digits, as they enter the MLP of the first block, times its
# weights.

# %%
_, cache = vit_forward(images, single, config)
normed, _ = cache.blocks[0].fc1  # what fc1 of block 0 has kept: its input and its weight
normed = normed.reshape(-1, D)  # (B T, D)
fc1 = single["blocks.0.mlp.fc1.weight"]
exact = normed.astype(np.float64) @ fc1.astype(np.float64)


def error_of(product):
    return np.linalg.norm(product - exact) / np.linalg.norm(exact)


kept = np.arange(4, 24)
errors = [error_of(keep_bits(normed, k) @ keep_bits(fc1, k)) for k in kept]
FORMATS = {"bfloat16": 7, "TF32": 10, "float32": 23}
for name, k in FORMATS.items():
    print(
        f"relative error of the product with operands in {name:<9} ({k:2} bits): {errors[k - 4]:.1e}, measured here"
    )
steepness = np.polyfit(kept[:12], np.log2(errors[:12]), 1)[0]
print(f"for each bit that is left out, the error grows by a factor of {2**-steepness:.2f}")
assert abs(steepness + 1) < 0.1

# %% [markdown]
# Is that much? A product does not matter by itself, but the gradient does, and what it ought to be compared with: how
# different are the gradients of two *batches*? Training lives with that from its first step. So we round the operands
# of every linear layer's products, forward and backward, and look at the whole gradient.


# %%
def gradient_with(kept, images, labels):
    """Return the model's gradient, flat, where linear layers' operands keep so many bits."""

    def rounded_matmul(a, b, out=None):
        return matmul(keep_bits(a, kept), keep_bits(b, kept), out=out)

    with mock.patch.object(tinyvit.ops.linear, "matmul", rounded_matmul):
        _, _, gradients = loss_and_gradient(
            images=images,
            targets=labels,
            parameters=single,
            config=config,
        )
    return gradients.flat


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(a)


full = gradient_with(23, images, labels)
others = mnist.train_images[B : 2 * B], mnist.train_labels[B : 2 * B]
between_batches = difference(full, gradient_with(23, *others))
print("how much the gradient of 64 images changes, relative to its size:")
changes = {name: difference(full, gradient_with(FORMATS[name], images, labels)) for name in ("TF32", "bfloat16")}
for name, change in changes.items():
    print(f"    with products in {name:<9} {change:.1e}")
print(f"    with the next 64 images    {between_batches:.1e}")
assert changes["TF32"] < changes["bfloat16"] < between_batches / 5

# %% [markdown]
# The noise of the batch is far larger than that of the rounding. That is why training bears it, while *checking* a
# gradient (lesson 02) does not: with errors of that size, no check could tell right from wrong.

# %%
figure, panels = lesson.figure(7, 3.2, columns=2)
axes = panels[0]
names = ["plain operations", "kernels", "one graph"]
launches = [len(plain), len(recorder.names), 1]
axes.barh([2, 1, 0], [1e3 * n * CALL for n in launches], color=BLUE, height=0.6)
for place, n in zip((2, 1, 0), launches, strict=True):
    axes.text(1e3 * n * CALL * 1.2, place, f"{n}", va="center", fontsize=SMALL, color=INK)
for (card, (rate, _)), colour in zip(CARDS.items(), (ORANGE, GREEN), strict=True):
    axes.axvline(1e3 * arithmetic / rate, color=colour, linestyle="--", label=f"arithmetic: {card} (data sheet)")
axes.set_xscale("log")
axes.set_xlim(5e-3, 60)
axes.set_ylim(-0.5, 2.5)
axes.set_yticks([2, 1, 0], names)
axes.grid(visible=False, axis="y")
axes.set_xlabel("milliseconds a step: not measured")
axes.set_title("Launches of a step, and what\nthey take at 10 μs each (assumed)")

axes = panels[1]
axes.semilogy(kept, errors, "o-", color=BLUE, markersize=3)
for name, k in FORMATS.items():
    axes.plot(k, errors[k - 4], "o", color=PINK)
    axes.annotate(name, (k, errors[k - 4]), xytext=(-2, 8), textcoords="offset points", ha="left", fontsize=SMALL)
axes.set_xlim(3, 27)
axes.set_xticks([4, 7, 10, 15, 20, 23])
axes.set_xlabel("bits of the mantissa that operands keep")
axes.set_ylabel("relative error")
axes.set_title("A real product with fewer bits,\nmeasured on this machine")
figure.legend(loc="outside lower left", ncols=2)
lesson.save(figure, "launches_and_bits")

# %% [markdown]
# ## If you have one: measure
#
# A GPU works while Python goes on, so a clock around a call measures how long it takes to *ask*. To know how long the
# work takes, wait for the device before the clock is started and before it is stopped.

# %%
STEPS = 20


def seconds_of(run, wait, times=STEPS):
    """Return the seconds that one call of `run` takes, of several in a row; `wait` waits until the device is done."""
    run()
    run()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times


def measure(backend):
    """Return {what: seconds} of a call, of a plain step, of a step in kernels, and of the graph, on a GPU."""
    found = {}
    small = backend.asarray(np.zeros(32, np.float32))
    found["one call"] = seconds_of(lambda: backend.xp.add(small, 1, out=small), backend.synchronise, 50 * STEPS)

    steps = STEPS + 2  # as seconds_of begins with two that do not count
    count = B * steps
    on_device = [backend.asarray(array[:count]) for array in (mnist.train_images, mnist.train_labels)]
    parameters = single.with_flat(backend.asarray(single.flat.copy()))
    adam = Adam(parameters.flat)
    batch = [array[:B] for array in on_device]
    found["a plain step"] = seconds_of(lambda: plain_step(*batch, parameters, adam), backend.synchronise)

    kernels = Kernels(backend, config)
    for name, graph in (("a step in kernels", False), ("a step as one graph", True)):
        parameters.flat[...] = backend.asarray(single.flat.copy())
        state = State(parameters, Adam(parameters.flat), average=None)
        step = KernelStep(kernels, state, *on_device, TrainingConfig(batch_size=B, learning_rate=1e-3), graph=graph)
        step.begin_epoch(0)
        found[name] = seconds_of(step, step.totals)
    return found


if gpu is not None:
    for what, seconds in measure(gpu).items():
        print(f"    {what:<20} {1e6 * seconds:10.1f} microseconds, measured here")
else:
    print("there is nothing to measure here; on a machine with a GPU this cell times a call, a plain step,")
    print("a step in kernels and a step as one graph")

# %% [markdown]
# ## Exercises
#
# Solutions are in `lessons/solutions/16_to_the_gpu.py`.
#
# **1.** What does a program wait for? Of $n$ launches at $c$ seconds each, $m$ bytes at a bandwidth $b$ and $a$
# operations at a rate $r$, return the least time and the name of what takes longest: `"launches"`, `"memory"` or
# `"arithmetic"`.


# %%
def exercise_1(n, c, m, b, a, r):
    """Return the least seconds, a number, and which of the three it is, a text."""
    return ..., ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** How many numbers do tiles of $s$ by $s$ outputs read from the card's memory for a product of $(m, k)(k, n)$?
# Sizes need not be multiples of $s$: a tile at the edge reads only what is there. Give a formula, with no loop.


# %%
def exercise_2(m, k, n, s):
    """Return how many numbers all blocks together read, a whole number."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** `keep_bits` rounds a number that lies exactly between two others away from zero. bfloat16 rounds it to the
# one that is *even*: whose last bit that stays is 0. That way, many ties cancel out. Do it with the bits. (Numbers
# are finite. What is to be added, so that a tie is carried if and only if the last bit that stays is 1?)


# %%
def exercise_3(x):
    """Return x (N,) float32, rounded to bfloat16 (7 bits of mantissa, ties to even), as float32."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** Jump into the middle of a stream. `np.random.Generator(np.random.Philox(key=key)).random(10**15)` will not
# do, but its last number costs one call of `philox(counter, key)`, which you are given. NumPy makes a number in
# $[0, 1)$ of each word: of its 64 bits it keeps the upper 53, as many as a float64 has, and divides by $2^{53}$. A
# counter makes four words, and the first counter is 1.


# %%
def exercise_4(index, key, philox):
    """Return number `index` (from 0, however large) of the stream that NumPy's Philox gives for this key, a float."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# This is the end of the book, and there is nothing below it any more that you have not seen: from the byte of a file
# to the lane of a warp. Train a model of your own: `python examples/train_mnist.py`. Then change something, and check
# it.
