# %% [markdown]
r"""
# 10 The encoder block

**Goal.** To put attention and the MLP into a block that can be stacked twenty times and still be trained; to see what
residuals and normalisation each do for the gradient, and that neither is enough alone.

**The one equation.** A block changes its tokens twice, and both times by adding to them:

$$
x' = x + \mathrm{attention}(\mathrm{norm}(x)), \qquad y = x' + \mathrm{mlp}(\mathrm{norm}(x'))
$$

**Source.** A. Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2021, equations 2 and 3. Residuals: K. He et al.,
*Identity Mappings in Deep Residual Networks*, 2016, section 2. Where the norm belongs: R. Xiong et al., *On Layer
Normalization in the Transformer Architecture*, 2020.

**Time.** An hour and a half to read and play, ten to thirty minutes an exercise. The script runs in about half a
minute.
"""

# %%
from itertools import combinations

import numpy as np
from kit import BLUE, GREEN, ORANGE, PINK, Lesson

from tinyvit import reference
from tinyvit.backend import one_blas_thread
from tinyvit.data import load_mnist
from tinyvit.gradcheck import gradient_error
from tinyvit.model import ViTConfig, block_backward, block_forward, initialise
from tinyvit.ops import (
    cross_entropy_backward,
    cross_entropy_forward,
    gelu_backward,
    gelu_forward,
    layer_norm_backward,
    layer_norm_forward,
    linear_backward,
    linear_forward,
    multi_head_attention_backward,
    multi_head_attention_forward,
    patch_embedding_backward,
    patch_embedding_forward,
)
from tinyvit.optim import Adam

lesson = Lesson("10_encoder_block")
rng = np.random.default_rng(10)
mnist = load_mnist()

# %% [markdown]
# ## Talk, then think
#
# All parts are there. Attention lets tokens *talk*: each takes from others what it needs, but all that it does with
# it is to add and to weigh. The MLP lets each token *think*, by itself, about what it has now. A block is one after
# the other, and a transformer is a stack of blocks.
#
# Two more things belong to it. Before each of the two, the tokens are normalised. And what comes out is *added* to
# what went in: a block does not replace a token, it amends it. The addition is called a *residual* connection. This
# lesson is about why they are there. So we write the block with a switch for each.


# %%
def our_block_forward(x, parameters, name, heads, residual=True, norm=True):
    """Return y (B, T, D) for x (B, T, D), and the cache. The two switches leave out what they say."""
    normed, norm1_cache = layer_norm_forward(x, *parameters.pair(f"{name}.norm1")) if norm else (x, None)
    qkv, projection = parameters.pair(f"{name}.attention.qkv"), parameters.pair(f"{name}.attention.projection")
    talk, attention_cache = multi_head_attention_forward(normed, *qkv, *projection, heads)
    x = x + talk if residual else talk

    normed, norm2_cache = layer_norm_forward(x, *parameters.pair(f"{name}.norm2")) if norm else (x, None)
    hidden, fc1_cache = linear_forward(normed, *parameters.pair(f"{name}.mlp.fc1"))  # (B, T, F)
    active, gelu_cache = gelu_forward(hidden)
    thought, fc2_cache = linear_forward(active, *parameters.pair(f"{name}.mlp.fc2"))
    y = x + thought if residual else thought
    return y, (norm1_cache, attention_cache, norm2_cache, fc1_cache, gelu_cache, fc2_cache)


# %% [markdown]
# ## Backward: a sum has two ways
#
# Take one of the two steps, $y = x + f(x)$. Each $x_i$ reaches the loss in two ways: directly, as $y_i$ contains it
# with the factor one, and through $f$. The chain rule adds up:
#
# $$
# \frac{∂L}{∂x_i} = \frac{∂L}{∂y_i} + ∑_j \frac{∂L}{∂y_j} \frac{∂f_j}{∂x_i}
# $$
#
# In code, `dx = dy + f_backward(dy)`. The gradient that arrives is used twice, once for each way. This is why a
# backward pass must not write into its `dout`: whoever comes second would get something else.


# %%
def our_block_backward(dy, cache, gradients, name, residual=True, norm=True):
    """Write the gradients of block `name` into `gradients`, and return dx (B, T, D)."""
    norm1_cache, attention_cache, norm2_cache, fc1_cache, gelu_cache, fc2_cache = cache

    dactive, _, _ = linear_backward(dy, fc2_cache, *gradients.pair(f"{name}.mlp.fc2"))
    dhidden = gelu_backward(dactive, gelu_cache)
    dnormed, _, _ = linear_backward(dhidden, fc1_cache, *gradients.pair(f"{name}.mlp.fc1"))
    through_mlp = norm_backward(dnormed, norm2_cache, gradients, f"{name}.norm2") if norm else dnormed
    dx = dy + through_mlp if residual else through_mlp

    qkv, projection = gradients.pair(f"{name}.attention.qkv"), gradients.pair(f"{name}.attention.projection")
    dnormed, *_ = multi_head_attention_backward(dx, attention_cache, *qkv, *projection)
    through_attention = norm_backward(dnormed, norm1_cache, gradients, f"{name}.norm1") if norm else dnormed
    return dx + through_attention if residual else through_attention


def norm_backward(dnormed, cache, gradients, name):
    dx, dw, db = layer_norm_backward(dnormed, cache)
    gradients.set_pair(name, dw, db)
    return dx


# %% [markdown]
# Is it the library's? And is it right? For the check we take a block so small that every one of its weights can be
# moved, and make all of them random: norms that begin at one and biases that begin at zero would hide mistakes.

# %%
small = ViTConfig(width=4, depth=1, heads=2, mlp_width=6)
parameters = initialise(small, 0, np.float64)
parameters.flat[...] = rng.standard_normal(parameters.flat.shape)
mine, theirs = (parameters.with_flat(np.zeros_like(parameters.flat)) for _ in range(2))
x, dy = rng.standard_normal((2, 2, 3, 4))  # (B, T, D) = (2, 3, 4) each

y, cache = our_block_forward(x, parameters, "blocks.0", heads=2)
library, library_cache = block_forward(x, parameters, "blocks.0", small)
assert np.allclose(y, library, atol=1e-12)
dx = our_block_backward(dy, cache, mine, "blocks.0")
assert np.allclose(dx, block_backward(dy, library_cache, theirs, "blocks.0"), atol=1e-11)
assert np.allclose(mine.flat, theirs.flat, atol=1e-11)

names = [name for name in parameters if name.startswith("blocks.0")]


def check_block(residual, norm):
    """Return the largest gradient error of x and all weights of the block."""

    def holder(*weights):
        held = parameters.with_flat(np.zeros_like(parameters.flat))
        for name, weight in zip(names, weights, strict=True):
            held[name][...] = weight
        return held

    def forward(x, *weights):
        return our_block_forward(x, holder(*weights), "blocks.0", 2, residual, norm)

    def backward(dy, cache):
        gradients = parameters.with_flat(np.zeros_like(parameters.flat))
        dx = our_block_backward(dy, cache, gradients, "blocks.0", residual, norm)
        return [dx, *(gradients[name] for name in names)]

    return max(gradient_error(forward, backward, [x, *(parameters[name] for name in names)]))


kinds = {
    "neither": (False, False),
    "norm only": (False, True),
    "residual only": (True, False),
    "both": (True, True),
}
print("the block and its gradients are tinyvit's; largest error against central differences, with")
for kind, (residual, norm) in kinds.items():
    error = check_block(residual, norm)
    print(f"    {kind:<14} {error:.0e}")
    assert error < 1e-7

# %% [markdown]
# All four are right. A gradient check says that a gradient is the derivative of its forward pass. It does not say
# that anything can be learned with it.
#
# With both switches on, the two functions above are the block of `tinyvit/reference.py`.

# %%
reference_y, reference_cache = reference.block_forward(
    x=x,
    parameters=parameters,
    name="blocks.0",
    heads=2,
)
np.testing.assert_allclose(y, reference_y, rtol=1e-10, atol=1e-12)
reference_gradients = {}
reference_dx = reference.block_backward(
    dout=dy,
    cache=reference_cache,
    gradients=reference_gradients,
    name="blocks.0",
)
np.testing.assert_allclose(dx, reference_dx, rtol=1e-10, atol=1e-12)
assert set(reference_gradients) == set(names)
for weight in names:
    np.testing.assert_allclose(mine[weight], reference_gradients[weight], rtol=1e-10, atol=1e-12)
print("the block and its gradients are those of tinyvit/reference.py")

# %% [markdown]
# ## A product of many
#
# Stack $L$ steps. Write $J_l$ for the Jacobian of $f_l$, the table of all $∂f_j/∂x_i$, and $g_l$ for the gradient at
# the input of step $l$, as a row. *Without* residuals each step multiplies by its Jacobian:
#
# $$
# g_1 = g_{L+1} \, J_L \, J_{L-1} ⋯ J_1
# $$
#
# If a step makes a gradient shorter by a factor of 0.3 on average, thirty steps make it shorter by $0.3^{30}$, about
# $10^{-16}$; if it makes it longer by 3, then longer by $10^{14}$. There is no setting between that lasts for long.
# *With* residuals the factor is $1 + J_l$, where 1 stands for the identity:
#
# $$
# g_1 = g_{L+1} (1 + J_L)(1 + J_{L-1}) ⋯ (1 + J_1)
# $$
#
# Multiply it out, and there is a term for each choice of steps to go through, the others being passed by: $2^L$
# paths. The shortest goes through none and delivers $g_{L+1}$ as it is, whatever the weights are. A sum of many ways,
# short ones among them, does not vanish. We check the claim for five random Jacobians, path by path.

# %%
L, D = 5, 4
jacobians = 0.5 * rng.standard_normal((L, D, D))
product = np.eye(D)
for J in jacobians:
    product = (np.eye(D) + J) @ product  # later steps from the left

by_paths, count = np.zeros((D, D)), 0
for length in range(L + 1):
    for steps in combinations(range(L), length):  # which steps this path goes through
        path = np.eye(D)
        for step in steps:
            path = jacobians[step] @ path
        by_paths, count = by_paths + path, count + 1
assert np.allclose(product, by_paths, atol=1e-12)
assert count == 2**L
print(f"{L} residual steps: their product is the sum of {count} paths")

# %% [markdown]
# But a sum of many can also be too much. Suppose that $J_l$ makes a gradient $ε$ times as long, in a random
# direction. Then $g$ and $g J_l$ stand nearly at right angles, and by Pythagoras each step makes it longer by
# $\sqrt{1 + ε^2}$. That is little if $ε$ is small, and it is exponential all the same.

# %%
width, depth = 256, 48
for size in (0.1, 0.5, 1.0):
    g = rng.standard_normal(width) / np.sqrt(width)
    for _ in range(depth):
        g = g + g @ (size / np.sqrt(width) * rng.standard_normal((width, width)))
    predicted = (1 + size**2) ** (depth / 2)
    print(f"steps of size {size}: after {depth} of them |g| is {np.linalg.norm(g):.3g}, predicted {predicted:.3g}")
    assert 0.2 < np.linalg.norm(g) / predicted < 5

# %% [markdown]
# ## What the norm adds
#
# So the steps must be small, compared with what they are added to, and stay so. This is what the norm does. Lesson 06
# found that layer norm ignores the scale of its input, and that its gradient is divided by the deviation of $x$. In
# $x + f(\mathrm{norm}(x))$, then, $f$ gets an input of the same size however long $x$ has become, so it adds about as
# much as before; and its Jacobian is divided by the size of $x$. If each step adds a vector of length one in a random
# direction, $x$ is $\sqrt{l}$ long after $l$ steps, again by Pythagoras, so the Jacobian of step $l$ is of size
# $1/\sqrt{l}$. The product of the $\sqrt{1 + 1/l}$ from 1 to $L$ is $\sqrt{L + 1}$: no longer a power with $L$ in the
# exponent, but a root of $L$.
#
# ## Measured: 24 blocks, four ways
#
# Enough said; we look. Sixteen real images, embedded; 24 blocks with the library's initial weights, the same for all
# four kinds; and at the top a random gradient of length one. What is its length at the input of each block? Beside it
# we record the size of the tokens on their way up, and how much of them differs from token to token:
# $|x - \bar{x}| / |x|$, where $\bar{x}$ is the mean of the tokens of an image.

# %%
config = ViTConfig(width=32, depth=24, heads=4, mlp_width=64)
deep = initialise(config, 0, np.float64)


def embed(images, parameters):
    """Return tokens (B, T, D) and the cache."""
    tables = parameters["class_token"], parameters["positions"]
    pixels = config.pixel_mean, config.pixel_deviation
    return patch_embedding_forward(images, *parameters.pair("patch_embedding"), *tables, config.patch_size, *pixels)


tokens, _ = embed(mnist.train_images[:16], deep)  # (B, T, D)
upstream = rng.standard_normal(tokens.shape)
upstream /= np.linalg.norm(upstream)
scratch = deep.with_flat(np.empty_like(deep.flat))  # the weights' gradients are of no interest here


def journey(residual, norm):
    """Return the gradient's length, the tokens' size and their difference, at each of 25 places between blocks."""
    x, caches, size, differ = tokens, [], [], []
    for place in range(config.depth + 1):
        size.append(np.sqrt((x**2).mean()))
        differ.append(np.linalg.norm(x - x.mean(axis=1, keepdims=True)) / np.linalg.norm(x))
        if place < config.depth:
            x, cache = our_block_forward(x, deep, f"blocks.{place}", config.heads, residual, norm)
            caches.append(cache)
    dx, length = upstream, [1.0]
    for place in reversed(range(config.depth)):
        dx = our_block_backward(dx, caches[place], scratch, f"blocks.{place}", residual, norm)
        length.append(np.linalg.norm(dx))
    return length[::-1], size, differ


with one_blas_thread():  # products this small are faster on one core
    journeys = {kind: journey(*switches) for kind, switches in kinds.items()}
print("24 blocks    gradient at the first block    size of the last tokens    how much they differ")
for kind, (length, size, differ) in journeys.items():
    print(f"{kind:<14} {length[0]:>18.0e} {size[-1]:>26.0e} {differ[-1]:>25.0e}")

colours = dict(zip(kinds, (PINK, GREEN, ORANGE, BLUE), strict=True))
figure, panels = lesson.figure(7, 3.3, columns=3)
for axes, number, title in zip(
    panels, range(3), ("length of the gradient", "size of the tokens", "how much tokens differ"), strict=True
):
    for kind, measured in journeys.items():
        axes.semilogy(measured[number], color=colours[kind], label=kind)
    axes.set_title(title)
    axes.set_xlabel("blocks below")
    axes.set_xticks(range(0, 25, 6))
panels[2].legend(loc="center right")
lesson.save(figure, "depth")

assert journeys["neither"][0][0] < 1e-8
assert journeys["residual only"][0][0] > 1e4
assert 1e-3 < journeys["norm only"][0][0] < 1e2
assert 0.3 < journeys["both"][0][0] < 30
assert journeys["norm only"][2][-1] < 1e-8
assert journeys["both"][2][-1] > 0.1

# %% [markdown]
# Read the three pictures together; depth goes from left to right, and the gradient comes from the right.
#
# - **Neither.** A straight line on a logarithmic axis: a product of many, and the first block hears nothing.
# - **Residual only.** The other straight line. Short ways deliver the gradient, and the long ones drown it: the first
#   block hears a roar. The tokens grow just as exponentially.
# - **Norm only.** Here the gradient is fine. And yet nothing can come of it: look at the right. After a few blocks
#   all tokens of an image are the same. Attention takes means, and a mean of means of means is the same for everyone;
#   if nobody keeps what he had before, all are alike to the last digit, and which patch was where is forgotten.
#   (Dong, Cordonnier and Loukas 2021, *Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially
#   with Depth*.)
# - **Both.** The gradient hardly changes over 24 blocks, the tokens grow slowly, and stay different.
#
# The prediction for both was that tokens grow about as a root of depth. A root is a slope of 1/2 if both axes are
# logarithmic, an exponential has no single slope:

# %%
_, size, _ = journeys["both"]
places = np.arange(4, 25)
slope = np.polyfit(np.log(places), np.log(np.array(size)[places] ** 2 - size[0] ** 2), 1)[0] / 2
print(f"with both, what the blocks have added grows as depth to the power of {slope:.2f}")
assert 0.2 < slope < 0.9

# %% [markdown]
# ## Does it matter for training?
#
# The same 24 blocks, four ways, with a class token, a norm and a linear layer behind, as lesson 11 will put them
# together; each trained by Adam on the same images with the same settings. One thing can go wrong. Adam squares the
# gradient, and in float32 no number can be larger than about $10^{38}$. So we stop a run whose gradient becomes
# longer than $10^{18}$: it is lost anyway.

# %%
steps, batch = (40 if lesson.quick else 300), 16


def train(residual, norm, learning_rate=2e-3, depth=config.depth):
    """Return the loss of every step, (steps,), or of fewer if it had to be stopped."""
    parameters, rng, losses = initialise(config, 0), np.random.default_rng(0), []
    gradients, adam = parameters.with_flat(np.zeros_like(parameters.flat)), Adam(parameters.flat)
    for step in range(steps):
        chosen = rng.integers(0, len(mnist.train_images), batch)
        x, embedding_cache = embed(mnist.train_images[chosen], parameters)
        caches = []
        for i in range(depth):
            x, cache = our_block_forward(x, parameters, f"blocks.{i}", config.heads, residual, norm)
            caches.append(cache)
        normed, norm_cache = layer_norm_forward(x[:, 0], *parameters.pair("norm"))  # the class token
        logits, head_cache = linear_forward(normed, *parameters.pair("head"))
        loss, loss_cache = cross_entropy_forward(logits, mnist.train_labels[chosen])
        losses.append(float(loss))

        dlogits = cross_entropy_backward(1.0, loss_cache)
        dnormed, _, _ = linear_backward(dlogits, head_cache, *gradients.pair("head"))
        dx = np.zeros_like(x)
        dx[:, 0] = norm_backward(dnormed, norm_cache, gradients, "norm")
        for i in reversed(range(depth)):
            dx = our_block_backward(dx, caches[i], gradients, f"blocks.{i}", residual, norm)
        _, dw, db, dclass_token, dpositions = patch_embedding_backward(dx, embedding_cache)
        gradients.set_pair("patch_embedding", dw, db)
        gradients["class_token"][...], gradients["positions"][...] = dclass_token, dpositions
        if not np.linalg.norm(gradients.flat.astype(np.float64)) < 1e18:  # nor if it is no number at all
            break
        adam.step(parameters.flat, gradients.flat, learning_rate * min(1, (step + 1) / 30))
    return np.array(losses)


with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
    histories = {kind: train(*switches) for kind, switches in kinds.items()}
guessing = np.log(10)
print(f"mean loss of the last 25 of {steps} steps; to guess all ten digits alike costs log 10 = {guessing:.2f}")
final = {kind: losses[-25:].mean() for kind, losses in histories.items()}
for kind, loss in final.items():
    taken = len(histories[kind])
    note = "" if taken == steps else f"   stopped at step {taken}, with a gradient longer than 1e18"
    print(f"    {kind:<14} {loss:.2f}{note}")

figure, axes = lesson.figure(7, 3)
for kind, losses in histories.items():
    smooth = [losses[max(0, end - 10) : end].mean() for end in range(1, len(losses) + 1)]
    axes.plot(range(1, len(losses) + 1), smooth, color=colours[kind], label=kind)
    if len(losses) < steps:
        axes.plot(len(losses), smooth[-1], "x", color=colours[kind], markersize=8)  # stopped
axes.axhline(guessing, color="black", linewidth=0.8, linestyle=":", label="guessing")
axes.set_xlabel(f"steps of {batch} images (x: stopped)")
axes.set_ylabel("loss, mean of ten steps")
axes.set_ylim(bottom=0)
axes.set_title("24 blocks: only with both does anything happen")
axes.legend(loc="lower left", ncols=2)
lesson.save(figure, "training")

assert final["both"] == min(final.values())
assert lesson.quick or final["both"] < 1.3
assert lesson.quick or min(loss for kind, loss in final.items() if kind != "both") > 1.7

# %% [markdown]
# Three of the four lie on one another: they guess. The weights are as many, the gradients are as right, the optimiser
# is the same. (With four blocks all four learn, if not equally well: try `train(*kinds["neither"], depth=4)`. What a
# residual and a norm buy is depth.)
#
# ## Exercises
#
# Solutions are in `lessons/solutions/10_encoder_block.py`. A function `f_backward(dout)` takes a gradient of $f$'s
# output to that of its input, and keeps its own cache.
#
# **1.** Start with no step at all: $y = x + a f(x)$ with one number $a$ that begins at zero and is learned
# (Bachlechner et al. 2020, *ReZero is All You Need*). Where does $x$ occur, and where $a$?


# %%
def exercise_1(dy, fx, a, f_backward):
    """Return dx, of the shape of dy, and da, a number, for fx = f(x)."""
    return ..., ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** Sort the paths by their length: for $n = 0 … L$ return the sum of all paths through exactly $n$ of the $L$
# steps. There are $2^L$ paths, but no need to visit them one by one: think what one more step does to each sum.


# %%
def exercise_2(jacobians):
    """Return sums (L + 1, D, D) for jacobians (L, D, D), step 0 being the first; later steps stand on the left."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** The first transformer had its norm *behind* the addition: $y = \mathrm{norm}(x + f(x))$. Return the gradient
# of $x$. What has become of the way that passes by all blocks untouched?


# %%
def exercise_3(dy, norm_cache, f_backward):
    """Return dx for dy (B, T, D) and the cache of layer_norm_forward(x + f(x), w, b)."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** A block that remembers nothing. Split the tokens in two halves, and let $y_1 = x_1 + f(x_2)$ and
# $y_2 = x_2 + g(y_1)$ (Gomez et al. 2017, *The Reversible Residual Network*). Then the inputs follow from the
# outputs, so that nothing need be kept on the way up, however many blocks there are. Find the inputs and their
# gradients from the outputs and theirs. Here `f(x)` and `g(x)` return their output and a cache, and
# `f_backward(dout, cache)` and `g_backward(dout, cache)` the gradient of their input.


# %%
def exercise_4(y1, y2, dy1, dy2, f, f_backward, g, g_backward):
    """Return x1, x2, dx1, dx2, all of one shape."""
    return ..., ..., ..., ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import `block_forward` and `block_backward`. All is there now: patches, positions, blocks, a loss
# and an optimiser. The next lesson puts them together.
