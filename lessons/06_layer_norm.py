# %% [markdown]
r"""
# 06 Layer norm

**Goal.** To derive the backward pass of layer normalisation, whose input reaches its output by three paths; to see
what becomes of a gradient that forgets one; and to know what has to be kept for it, and why.

**The one equation.** For each vector of width $D$, with $\hat x$ the normalised vector, $s$ its deviation, and
$g_i = \frac{∂L}{∂y_i} w_i$:

$$
\frac{∂L}{∂x_i} = \frac{1}{s} \left( g_i - \frac{1}{D} ∑_j g_j - \hat x_i \frac{1}{D} ∑_j g_j \hat x_j \right)
$$

**Source.** J. Ba, J. Kiros and G. Hinton, *Layer Normalization*, 2016, section 3.

**Time.** An hour to read and play, ten to twenty minutes an exercise, an evening for the last. The script runs in
less than half a minute.
"""

# %%
import math

import numpy as np
from kit import BLUE, GREEN, MUTED, ORANGE, SMALL, Lesson, show

from tinyvit import reference
from tinyvit.backend import one_blas_thread
from tinyvit.data import load_mnist
from tinyvit.data.batches import Epoch
from tinyvit.gpu import get_backend
from tinyvit.gradcheck import gradient_error, numerical_gradients, relative_error
from tinyvit.ops import (
    cross_entropy_backward,
    cross_entropy_forward,
    gelu_backward,
    gelu_forward,
    layer_norm_backward,
    layer_norm_forward,
    linear_backward,
    linear_forward,
)
from tinyvit.optim import Adam
from tinyvit.parameters import Parameters

lesson = Lesson("06_layer_norm")
rng = np.random.default_rng(6)

# %% [markdown]
# ## Forward
#
# Layer after layer, numbers grow or fade; and the next layer, which has learned on numbers of one size, is lost with
# those of another. So before each layer let every vector be put on the same footing: subtract its mean, and divide by
# its standard deviation. For one vector $x$ of width $D$:
#
# $$
# μ = \frac{1}{D} ∑_k x_k, \qquad v = \frac{1}{D} ∑_k (x_k - μ)^2, \qquad s = \sqrt{v + ε}, \qquad
# \hat x_i = \frac{x_i - μ}{s}
# $$
#
# Then each place gets a gain and a bias of its own, to be learned, so that nothing is lost for good:
#
# $$
# y_i = \hat x_i w_i + b_i
# $$
#
# No vector knows of any other: not of the other images of a batch, and not of the other tokens of an image.

# %%
EPSILON = 1e-6


def layer_norm_by_index(x, w, b):
    """Return y (N, D) for x (N, D), one number after the other."""
    y = np.zeros(x.shape)
    width = x.shape[1]
    for n in range(len(x)):
        mean = sum(x[n, k] for k in range(width)) / width
        variance = sum((x[n, k] - mean) ** 2 for k in range(width)) / width
        for i in range(width):
            y[n, i] = (x[n, i] - mean) / math.sqrt(variance + EPSILON) * w[i] + b[i]
    return y


mnist = load_mnist()
x = mnist.train_images[:4, 14, 8:16] / 255 + 0.1 * rng.standard_normal((4, 8))  # (N, D), pieces of four digits
w, b = rng.standard_normal((2, 8))  # (D,)

mean = x.mean(axis=1, keepdims=True)  # (N, 1)
deviation = np.sqrt(((x - mean) ** 2).mean(axis=1, keepdims=True) + EPSILON)  # (N, 1)
normalised = (x - mean) / deviation  # (N, D)
y = normalised * w + b

assert np.allclose(y, layer_norm_by_index(x, w, b), atol=1e-12)
assert np.allclose(y, layer_norm_forward(x, w, b, EPSILON)[0], atol=1e-12)
print("layer norm of 4 vectors of width 8: the same by index, by array and by tinyvit")

# %% [markdown]
# What it takes away is seen best with a whole image for the vector. Here is a digit; the same, faint; and the same in
# fog. The scale is divided out, the shift is subtracted: to layer norm the three are one.

# %%
digit = mnist.train_images[0] / 255
versions = {"a digit": digit, "faint": 0.25 * digit, "in fog": 0.3 * digit + 0.5}
plain = np.ones(784), np.zeros(784)
outputs = [layer_norm_forward(image.reshape(1, 784), *plain)[0].reshape(28, 28) for image in versions.values()]

figure, panels = lesson.figure(7, 4.2, rows=2, columns=3)
for (above, below), (title, image), output in zip(panels.T, versions.items(), outputs, strict=True):
    show(above, np.round(255 * image).astype(np.uint8), title)
    show(below, output, "after layer norm", signed=True)
lesson.save(figure, "footing")

for output in outputs[1:]:
    assert np.allclose(output, outputs[0], atol=1e-3)  # not exactly, because of epsilon
apart = max(np.abs(output - outputs[0]).max() for output in outputs)
print(f"a digit, faint or in fog: after layer norm they differ by {apart:.0e} at most")

# %% [markdown]
# ## Backward: three paths
#
# Gain and bias are quickly done. They are used by every vector $n$, so that their gradients are sums over all of
# them:
#
# $$
# \frac{∂L}{∂w_i} = ∑_n \frac{∂L}{∂y_{ni}} \hat x_{ni}, \qquad \frac{∂L}{∂b_i} = ∑_n \frac{∂L}{∂y_{ni}}
# $$
#
# And what arrives at $\hat x_i$ of one vector is $g_i = \frac{∂L}{∂y_i} w_i$. Now to $x$. Move a single $x_i$ a
# little, and ask how $\hat x_j = (x_j - μ) / s$ moves. There are three ways in which it can.
#
# **Directly**, if $j = i$. With $δ_{ij}$, which is 1 if $i = j$ and 0 otherwise, that is $δ_{ij} / s$.
#
# **Through the mean.** $x_i$ is one of the $D$ numbers in it, so $∂μ / ∂x_i = 1 / D$, and *every* $\hat x_j$ falls by
# $\frac{1}{s D}$.
#
# **Through the deviation.** First the variance. Both $x_k$ and $μ$ in it depend on $x_i$:
#
# $$
# \frac{∂v}{∂x_i} = \frac{2}{D} ∑_k (x_k - μ) \left( δ_{ki} - \frac{1}{D} \right) = \frac{2}{D} (x_i - μ)
# $$
#
# for the second term in the bracket meets $∑_k (x_k - μ)$, and that is zero: it is what the mean is for. Then the
# root:
#
# $$
# \frac{∂s}{∂x_i} = \frac{1}{2 s} \frac{∂v}{∂x_i} = \frac{x_i - μ}{s D} = \frac{\hat x_i}{D}
# $$
#
# As $\hat x_j$ is divided by $s$, it changes with it by $-(x_j - μ) / s^2 = -\hat x_j / s$. The three together are
#
# $$
# \frac{∂\hat x_j}{∂x_i} = \frac{1}{s} \left( δ_{ij} - \frac{1}{D} - \frac{\hat x_j \hat x_i}{D} \right)
# $$
#
# Multiply by $g_j$ and add up over $j$, over all that $x_i$ can reach, and there is the equation at the top.


# %%
def layer_norm_backward_by_index(dout, normalised, deviation, w):
    """Return dx (N, D), adding up over every output j that x[n, i] can reach, by each of the three paths."""
    dx = np.zeros(dout.shape)
    width = dout.shape[1]
    for n, i, j in np.ndindex(*dout.shape, width):
        directly = float(i == j)
        through_mean = -1 / width
        through_deviation = -normalised[n, j] * normalised[n, i] / width
        dx[n, i] += dout[n, j] * w[j] * (directly + through_mean + through_deviation) / deviation[n, 0]
    return dx


def row_mean(x):
    return x.mean(axis=1, keepdims=True)  # (N, 1)


dout = rng.standard_normal(x.shape)
g = dout * w
dx = (g - row_mean(g) - normalised * row_mean(g * normalised)) / deviation
dw = (dout * normalised).sum(axis=0)
db = dout.sum(axis=0)

assert np.allclose(dx, layer_norm_backward_by_index(dout, normalised, deviation, w), atol=1e-12)
for ours, library in zip((dx, dw, db), layer_norm_backward(dout, layer_norm_forward(x, w, b)[1]), strict=True):
    assert np.allclose(ours, library, atol=1e-12)
print("dx: the same by index, by array and by tinyvit; dw and db too")

errors = gradient_error(layer_norm_forward, layer_norm_backward, [x, w, b])
print("gradient check of dx, dw, db:", ", ".join(f"{error:.0e}" for error in errors))
assert max(errors) < 1e-8

# %% [markdown]
# The layer norm above is the one in `tinyvit/reference.py`, forward and backward.

# %%
reference_y, reference_cache = reference.layer_norm_forward(x=x, w=w, b=b, epsilon=EPSILON)
np.testing.assert_allclose(y, reference_y, rtol=1e-10, atol=1e-12)
for ours, theirs in zip((dx, dw, db), reference.layer_norm_backward(dout, reference_cache), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
print("layer norm and its gradients are those of tinyvit/reference.py")

# %% [markdown]
# ## The three paths as pictures
#
# For one vector, $∂\hat x_j / ∂x_i$ is a table of $D · D$ numbers, the *Jacobian*. Here is the table of each path,
# and of all three together, beside the one that central differences find with no formula at all.

# %%
vector, hat, spread = x[:1], normalised[0], deviation[0, 0]
tables = {
    "directly": np.eye(8) / spread,
    "by the mean": -np.ones((8, 8)) / 8 / spread,
    "by the deviation": -np.outer(hat, hat) / 8 / spread,
}
tables["all three"] = sum(tables.values())


def normalise(x):
    return layer_norm_forward(x, np.ones(8), np.zeros(8))


# with a dout that is 1 at place j alone, the gradient is row j of the table
tables["measured"] = np.stack([numerical_gradients(normalise, [vector], row[None])[0][0] for row in np.eye(8)])

figure, panels = lesson.figure(7, 1.9, columns=5)
strongest = max(np.abs(table).max() for table in tables.values())
for axes, (title, table) in zip(panels, tables.items(), strict=True):
    show(axes, table, signed=True).set_clim(-strongest, strongest)  # one scale for all five
    axes.set_title(title, fontsize=SMALL + 1)
    axes.set_xlabel("$i$ of $x_i$")
panels[0].set_ylabel("$j$ of $\\hat x_j$")
lesson.save(figure, "three_paths")

assert relative_error(tables["all three"], tables["measured"]) < 1e-8

# %% [markdown]
# The direct path is the diagonal. The mean is one shade all over. The deviation is a product, $\hat x_j$ times
# $\hat x_i$, strong where both are far from the mean.
#
# There is another way to see it. What can a change of $x$ *not* do? A shift of all $x_i$ by the same amount changes
# nothing, and neither does a stretch. So a gradient must have no part along either: along $(1, 1, …, 1)$, and along
# $\hat x$. The second term takes away the one, the third takes away the other; that is all that they do.

# %%
shift, stretch = np.abs(dx.sum(axis=1)).max(), np.abs((dx * normalised).sum(axis=1)).max()
print(f"dx along a shift: {shift:.0e}; along a stretch: {stretch:.0e}, because of epsilon")
assert shift < 1e-12
assert stretch < 1e-3

# %% [markdown]
# ## If a path is forgotten
#
# People do forget one, and their models train. How wrong is it? The direct path has $D$ numbers of the size of one in
# the table above. Each of the others takes away one direction out of $D$. So the wider the vector, the less is
# missed, and the longer the mistake can live. The gradient check has no trouble with it at any width:


# %%
def without_mean(dout, cache):
    normalised = cache.normalised
    g = dout * cache.w
    dx = (g - normalised * row_mean(g * normalised)) * cache.inverse_deviation
    return dx, (dout * normalised).sum(axis=0), dout.sum(axis=0)


def without_deviation(dout, cache):
    g = dout * cache.w
    dx = (g - row_mean(g)) * cache.inverse_deviation
    return dx, (dout * cache.normalised).sum(axis=0), dout.sum(axis=0)


widths = [4, 8, 16, 32, 64, 128]
paths = {
    "without the path through the mean": (without_mean, ORANGE, "o-"),
    "without the path through the deviation": (without_deviation, GREEN, "s--"),
    "all three": (layer_norm_backward, BLUE, "o-"),
}
found = {name: [] for name in paths}
for width in widths:
    inputs = [rng.standard_normal((8, width)), rng.standard_normal(width), rng.standard_normal(width)]
    for name, (backward, _, _) in paths.items():
        found[name].append(gradient_error(layer_norm_forward, backward, inputs)[0])

figure, axes = lesson.figure(7, 3.4)
for name, (_, colour, line) in paths.items():
    axes.loglog(widths, found[name], line, color=colour, markersize=4, label=name)
axes.axhspan(1e-12, 1e-7, color=MUTED, alpha=0.12, linewidth=0)
axes.text(4, 1.5e-8, "right", color=MUTED, fontsize=SMALL)
axes.set_xticks(widths, widths)
axes.minorticks_off()
axes.set(xlabel="width $D$", ylabel="relative error of dx", ylim=(1e-12, 1))
axes.set_title("The wider, the less is missed; but the check sees it")
axes.legend(loc="center right")
lesson.save(figure, "forgotten")

for name in list(paths)[:2]:
    print(f"{name}: error {found[name][0]:.2f} at width 4, {found[name][-1]:.3f} at width 128")
    assert min(found[name]) > 1e-2
    assert found[name][-1] < found[name][0]
assert max(found["all three"]) < 1e-7

# %% [markdown]
# At width 128, that of our transformer, a gradient that lacks a path still points nearly in the right direction, at
# least for a random `dout`. The curve of a training run would hardly show it. Lesson 14 comes back to this.
#
# ## What is kept, and why
#
# Look at the equation again for what the backward pass needs: $\hat x$, for the third path and for `dw`; $1 / s$; and
# the gain $w$. Neither $x$ nor $μ$ occurs in it, nor the output. That is the library's cache.

# %%
batch = rng.standard_normal((64, 17, 128)).astype(np.float32)  # (B, T, D), what our transformer normalises at once
_, cache = layer_norm_forward(batch, np.ones(128, np.float32), np.zeros(128, np.float32))
for name, kept in cache._asdict().items():
    print(f"kept: {name:<17} {kept.shape!s:<12} {kept.nbytes:>8,} bytes")
kept = sum(array.nbytes for array in cache)
print(f"together {kept / batch.nbytes:.3f} times the bytes of x")
assert kept < 1.02 * batch.nbytes

# %% [markdown]
# There are other ways, and each has its price:
#
# - *Keep $x$*, and compute $μ$, $s$ and $\hat x$ again. The same memory, unless $x$ is kept by someone else anyway,
#   and two more passes over it.
# - *Keep nothing but the output*, which the next layer keeps anyway, and find $\hat x_i = (y_i - b_i) / w_i$. That
#   works until a gain is zero.
# - *Keep $s$ and not $1 / s$.* A division for every number, where one for every vector does.
#
# Rows of one number each, like $1 / s$, cost next to nothing; arrays of the size of $x$ are what counts, and one of
# them is as few as it can be.
#
# ## Two traps
#
# **The variance in one pass.** It is tempting to use $v = \overline{x^2} - μ^2$, as both means can be taken at once.
# In float32, with seven digits, two large numbers that are nearly the same leave nothing when subtracted:

# %%
print("variance of 1000 numbers with deviation 1, in float32")
print("    around     mean of x^2 minus mean^2     mean of (x - mean)^2")
spread = rng.standard_normal(1000)
for centre in (0, 100, 1000, 10_000):
    numbers = (centre + spread).astype(np.float32)
    one_pass = np.mean(numbers**2) - np.mean(numbers) ** 2
    two_passes = np.mean((numbers - np.mean(numbers)) ** 2)
    print(f"    {centre:>6}     {one_pass:24.4f}     {two_passes:20.4f}")
    assert abs(two_passes / spread.var() - 1) < 0.01
assert abs(one_pass / spread.var() - 1) > 0.1  # the last, around 10,000

# %% [markdown]
# A variance may even come out negative, and its root is no number. So subtract the mean first, as the definition
# says.
#
# **A vector of equal numbers** has $v = 0$. Without $ε$ it would be zero divided by zero; with it, $\hat x = 0$, and
# the output is the bias. The derivative there is large, $1 / \sqrt ε = 1000$: that of a function which is nearly a
# jump.

# %%
blank = np.full((1, 8), 0.5)
output, cache = layer_norm_forward(blank, w, b, EPSILON)
print(f"a vector of equal numbers: the output is the bias; 1 / s = {cache.inverse_deviation[0, 0]:.0f}")
assert np.allclose(output, b)
assert np.isclose(cache.inverse_deviation[0, 0], 1000)

# %% [markdown]
# ## What it is good for, on digits
#
# The MLP of lesson 05, once as it was, and once with layer norm before either of its linear layers. Both learn from
# clear images. Then the fog comes: of each test image the share $1 - f$ is left, and the share $f$ is grey. Neither
# network has ever seen fog. (In a transformer it is not fog that layer norm is for, but the layers below; lesson 10
# shows what it does to depth. But here one can see it with one's eyes.)

# %%
PIXELS, HIDDEN, CLASSES, BATCH, RATE = 784, 64, 10, 100, 3e-3
epochs = 1 if lesson.quick else 3
pixels = mnist.train_images.reshape(-1, PIXELS).astype(np.float32) / 255
test_x = mnist.test_images.reshape(-1, PIXELS).astype(np.float32) / 255
SHAPES = {
    "norm1.weight": (PIXELS,),
    "norm1.bias": (PIXELS,),
    "fc1.weight": (PIXELS, HIDDEN),
    "fc1.bias": (HIDDEN,),
    "norm2.weight": (HIDDEN,),
    "norm2.bias": (HIDDEN,),
    "fc2.weight": (HIDDEN, CLASSES),
    "fc2.bias": (CLASSES,),
}


def identity_forward(x, w, b):
    return x, (w, b)


def identity_backward(dout, cache):
    return dout, *(np.zeros_like(parameter) for parameter in cache)


NORMS = {
    "with layer norm": (layer_norm_forward, layer_norm_backward, BLUE),
    "without": (identity_forward, identity_backward, ORANGE),
}


def forward(x, parameters, norm_forward):
    """Return the logits (N, C) for x (N, I), and the caches."""
    x, norm1 = norm_forward(x, *parameters.pair("norm1"))
    x, fc1 = linear_forward(x, *parameters.pair("fc1"))
    x, bend = gelu_forward(x)
    x, norm2 = norm_forward(x, *parameters.pair("norm2"))
    logits, fc2 = linear_forward(x, *parameters.pair("fc2"))
    return logits, (norm1, fc1, bend, norm2, fc2)


def backward(dlogits, caches, gradients, norm_backward):
    """Write the gradients of all parameters into `gradients`: forward, read from below."""
    norm1, fc1, bend, norm2, fc2 = caches
    dx, *pair = linear_backward(dlogits, fc2)
    gradients.set_pair("fc2", *pair)
    dx, *pair = norm_backward(dx, norm2)
    gradients.set_pair("norm2", *pair)
    dx = gelu_backward(dx, bend)
    dx, *pair = linear_backward(dx, fc1)
    gradients.set_pair("fc1", *pair)
    _, *pair = norm_backward(dx, norm1)
    gradients.set_pair("norm1", *pair)


@one_blas_thread()  # so small a product is not worth sharing between cores
def train(norm_forward, norm_backward):
    parameters = Parameters(SHAPES, np.zeros(sum(math.prod(shape) for shape in SHAPES.values()), np.float32))
    generator = np.random.default_rng(0)
    for name in ("fc1.weight", "fc2.weight"):
        parameters[name][...] = generator.standard_normal(SHAPES[name]) * math.sqrt(2 / SHAPES[name][0])
    for name in ("norm1.weight", "norm2.weight"):
        parameters[name][...] = 1
    optimiser, gradients = Adam(parameters.flat), parameters.empty_like()
    steps = epochs * len(pixels) // BATCH
    for number in range(epochs):
        epoch = Epoch(pixels, mnist.train_labels, None, 6, number, get_backend("cpu"))
        for first in range(0, len(pixels), BATCH):
            batch, labels = epoch.load(first, first + BATCH)
            logits, caches = forward(batch, parameters, norm_forward)
            _, loss_cache = cross_entropy_forward(logits, labels)
            backward(cross_entropy_backward(1.0, loss_cache), caches, gradients, norm_backward)
            optimiser.step(parameters.flat, gradients.flat, RATE * (1 - optimiser.steps / steps))
    return parameters


def in_fog(images, share):
    return (1 - share) * images + share * 0.5


def accuracy(parameters, norm_forward, images):
    return np.mean(forward(images, parameters, norm_forward)[0].argmax(axis=1) == mnist.test_labels)


shares = np.linspace(0, 0.9, 10)
figure, panels = lesson.figure(7, 3.9, rows=2, columns=1, height_ratios=[1, 3.2])
strip = np.concatenate([in_fog(test_x[:10].reshape(10, 28, 28)[i], share) for i, share in enumerate(shares)], axis=1)
show(panels[0], np.round(255 * strip).astype(np.uint8), "Ten test images in ever thicker fog")
scores = {}
for name, (norm_forward, norm_backward, colour) in NORMS.items():
    parameters = train(norm_forward, norm_backward)
    scores[name] = [accuracy(parameters, norm_forward, in_fog(test_x, share)) for share in shares]
    panels[1].plot(shares, 100 * np.array(scores[name]), "o-", color=colour, markersize=4, label=name)
    print(f"{name:<16} reads", ", ".join(f"{scores[name][i]:.1%} in fog of {shares[i]:.0%}" for i in (0, 3, 6, 9)))
panels[1].set(xlabel="share of fog", ylabel="test images read right, per cent", ylim=(0, 102))
panels[1].legend(loc="lower left")
lesson.save(figure, "fog")

assert max(scores["with layer norm"]) - min(scores["with layer norm"]) < 0.005
assert scores["with layer norm"][0] > (0.94 if lesson.quick else 0.96)
assert scores["without"][0] > (0.94 if lesson.quick else 0.96)
assert scores["without"][-1] < 0.8

# %% [markdown]
# Without layer norm, every hidden unit counts on the darkness that it has learned with, and a grey veil over 784
# pixels adds up to a great deal. With it, the fog is gone before the first weight sees it, and so is the difference.
# Nothing of this was learned. It is built in.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/06_layer_norm.py`.
#
# **1.** Half of a layer norm: only the mean is subtracted, $y_i = x_i - μ$. What is `dx`?


# %%
def exercise_1(dout):
    """Return dx (N, D) for dout (N, D), the mean being that of each row."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** A layer norm is nearly always followed by a linear layer. Once training is over, its gain and bias can be put
# into that layer's weight and bias: then $\hat x$ alone goes into it, and two passes over the data are saved. Find
# the weight and the bias with which $\hat x w' + b'$ equals $(\hat x · \mathrm{gain} + \mathrm{bias}) \, w + b$.


# %%
def exercise_2(gain, bias, w, b):
    """Return w' (D, O), b' (O,) for the gain and bias (D,) of the norm, w (D, O) and b (O,) of the layer."""
    return ..., ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Newer transformers leave the mean alone, and divide by the root of the mean square only (B. Zhang and R.
# Sennrich, *Root Mean Square Layer Normalization*, 2019): $r = \sqrt{\overline{x^2} + ε}$, $y_i = x_i w_i / r$. How
# many paths does $x$ have? Derive `dx` and `dw`. With $ε = 10^{-6}$.


# %%
def exercise_3(dout, x, w):
    """Return dx (N, D), dw (D,) of y = x / rms(x) * w, for dout (N, D), x (N, D), w (D,)."""
    return ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** An evening's thought: *group norm* (Y. Wu and K. He, *Group Normalization*, 2018). The width $D$ is cut into
# $G$ groups of neighbours, and each group has its own mean and deviation; gain and bias are of every place, as
# before. With $G = 1$ it is layer norm. Derive all three gradients, for any $G$ that divides $D$. Which of the sums
# of layer norm run over a group now, and which still over the batch? There is a way without any new formula. Again
# $ε = 10^{-6}$.


# %%
def exercise_4(dout, x, w, groups):
    """Return dx (N, D), dw (D,), db (D,), for dout (N, D), x (N, D), w (D,) and the number of groups."""
    return ..., ..., ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import `layer_norm_forward` and `layer_norm_backward`. We have all the parts of a network that looks
# at an image as one long vector. But a digit is no list of 784 numbers: it has places. The next lesson cuts it into
# patches.
