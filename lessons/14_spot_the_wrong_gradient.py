# %% [markdown]
r"""
# 14 Spot the wrong gradient

**Goal.** To see seven programs train well with a bug inside, and to know which check finds which. Afterwards you will
not say "the loss goes down, so it is right" again.

**The one equation.** What a backward pass claims: that for *every* direction $u$,

$$
∑_k u_k\, \mathrm{dx}_k = \lim_{h → 0} \frac{f(x + h u) - f(x - h u)}{2h}
$$

Training never asks for that. It is content if the loss falls, and a small step against $\mathrm{dx}$ makes it fall
whenever $∑_k \mathrm{dx}_k\, g_k > 0$, where $g$ is the true gradient: an acute angle is enough.

**Source.** The seven bugs: all but the layer norm's were found in published from-scratch code. J. Nocedal and S.
Wright, *Numerical Optimization*, 2006, section 2.2, for descent directions. D. Kingma and J. Ba, *Adam: A Method for
Stochastic Optimization*, 2015, algorithm 1.

**Time.** An hour to read and play, ten to thirty minutes an exercise. The script runs for a quarter of a minute.
"""

# %%
import contextlib
from unittest import mock

import numpy as np
from kit import COLOURS, INK, MUTED, SMALL, Lesson

import tinyvit.model
import tinyvit.ops.attention
from tinyvit import VisionTransformer
from tinyvit.backend import one_blas_thread
from tinyvit.data import load_mnist
from tinyvit.gradcheck import directional_error, gradient_error, numerical_gradients, relative_error
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_forward
from tinyvit.ops import (
    class_attention_backward,
    gelu_backward,
    gelu_forward,
    gelu_tanh_forward,
    layer_norm_backward,
    linear_backward,
    multi_head_attention_backward,
)
from tinyvit.optim import Adam
from tinyvit.parameters import Parameters

lesson = Lesson("14_spot_the_wrong_gradient")
rng = np.random.default_rng(14)
mnist = load_mnist()

# %% [markdown]
# ## Seven bugs
#
# Read each, and try to see what is wrong before you read on. None of them raises, and all shapes fit.
#
# ### 1. The diagonal softmax
#
# The softmax's Jacobian is $∂w_i/∂x_j = w_i (δ_{ij} - w_j)$. Its diagonal is $w_i (1 - w_i)$, which looks just like
# the derivative of the sigmoid, and is often taken for all of it:


# %%
def diagonal_softmax_backward(dweights, weights):
    return dweights * weights * (1 - weights)


# %% [markdown]
# ### 2. The frozen step count
#
# Adam divides its moments by $1 - β^t$, as both start at zero. Here the count $t$ is set to 1 in each step, say
# because it lives in a variable that is made anew each time. At $t = 1$ that is right. Later, if the gradient is
# always $g > 0$, the moments are $(1 - β_1^t)\, g$ and $(1 - β_2^t)\, g^2$, and are still divided by $1 - β_1$ and
# $1 - β_2$. Instead of $η$ the step is
#
# $$
# η\, \frac{1 - β_1^t}{1 - β_1} \sqrt{\frac{1 - β_2}{1 - β_2^t}}
# $$
#
# With $β_1 = 0.9$ and $β_2 = 0.999$ that is up to twice the learning rate in the first hundred steps, and in the end
# a third of it, $\sqrt{0.001} / 0.1 = 0.316$. Another schedule than we asked for, and nothing else.


# %%
class FrozenAdam(Adam):
    def step(self, flat, gradient, learning_rate):
        self.steps = 0
        super().step(flat, gradient, learning_rate)


# %% [markdown]
# ### 3. The dropped path in layer norm
#
# An input of layer norm acts in three ways: directly, through the mean, and through the deviation. The last is the
# term that one forgets:


# %%
def short_layer_norm_backward(dout, cache, dw=None, db=None):
    dnormalised = dout.reshape(cache.normalised.shape) * cache.w
    dx = (dnormalised - dnormalised.mean(axis=-1, keepdims=True)) * cache.inverse_deviation
    _, dw, db = layer_norm_backward(dout, cache, dw, db)
    return dx.reshape(dout.shape), dw, db


# %% [markdown]
# ### 4. The other formula's derivative
#
# There are two formulas of GELU, the exact one and the one with tanh, and they differ by less than 0.001. Here the
# forward pass is one and the backward pass is of the other. (In the library the forward pass stores the derivative.)


# %%
def mixed_gelu_forward(x, with_cache=True):
    return gelu_tanh_forward(x)[0], gelu_forward(x)[1]


# %% [markdown]
# ### 5. The missing residual
#
# A block is $x + \mathrm{attention}(\mathrm{norm}(x))$, then the same with an MLP. The backward pass must add what
# comes along each branch $x$. This is the library's `block_backward`, and one of the two sums is not there. Which?


# %%
def block_backward_short(dout, cache, gradients, name):
    dactive, _, _ = linear_backward(dout, cache.fc2, *gradients.pair(f"{name}.mlp.fc2"))
    dhidden = gelu_backward(dactive, cache.gelu)
    dnormed, _, _ = linear_backward(dhidden, cache.fc1, *gradients.pair(f"{name}.mlp.fc1"))
    dattended, _, _ = layer_norm_backward(dnormed, cache.norm2, *gradients.pair(f"{name}.norm2"))
    dattended += dout

    attend_backward = class_attention_backward if cache.class_only else multi_head_attention_backward
    dnormed, *_ = attend_backward(
        dattended,
        cache.attention,
        *gradients.pair(f"{name}.attention.qkv"),
        *gradients.pair(f"{name}.attention.projection"),
    )
    dx, _, _ = layer_norm_backward(dnormed, cache.norm1, *gradients.pair(f"{name}.norm1"))
    return dx


# %% [markdown]
# ### 6. The maximum along the wrong axis
#
# To keep the exponential from overflowing, softmax subtracts a maximum. Any number will do, *if it is the same for
# all that are summed*. Here the axis is the wrong one, so that each element of a row loses something else, and what
# one query attends to depends on the other queries:


# %%
def wrong_axis_softmax_forward(x):
    weights = np.exp(x - x.max(axis=-2, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, weights


# %% [markdown]
# ### 7. The wiped moments
#
# Before each step, gradients are set to zero. If "set all to zero" catches Adam's moments as well, each step begins
# without a memory: $m = (1 - β_1) g$ and $v = (1 - β_2) g^2$. When $t$ is large and the corrections are 1, every
# weight moves by
#
# $$
# η\, \frac{(1 - β_1)\, g}{\sqrt{(1 - β_2)\, g^2}} = η\, \frac{1 - β_1}{\sqrt{1 - β_2}} = 3.16\, η
# $$
#
# whatever its gradient is, for $g > 0$. That is no longer Adam, only the gradient's sign, at three times the rate.


# %%
class WipedAdam(Adam):
    def step(self, flat, gradient, learning_rate):
        self.first_moment[...] = 0
        self.second_moment[...] = 0
        super().step(flat, gradient, learning_rate)


# %% [markdown]
# Are the factors true? We let all three have the same gradient four thousand times, so that the moments are full, and
# look at the last step.

# %%
for adam_class, factor in ((Adam, 1), (FrozenAdam, np.sqrt(0.001) / 0.1), (WipedAdam, 0.1 / np.sqrt(0.001))):
    x, optimiser = np.zeros(1), adam_class(np.zeros(1))
    for _ in range(4000):
        before = x.copy()
        optimiser.step(x, np.ones(1), learning_rate=1.0)
    moved = before[0] - x[0]
    print(f"{adam_class.__name__ + ':':<12} the last step is {moved:.3f} learning rates, by the formula {factor:.3f}")
    assert np.isclose(moved, factor, rtol=0.02)

t = np.arange(1, 4001)
frozen = (1 - 0.9**t) / 0.1 * np.sqrt(0.001 / (1 - 0.999**t))  # in learning rates
peak, even = frozen.argmax() + 1, t[frozen > 1].max()
print(f"frozen, it is {frozen.max():.2f} learning rates at step {peak}, and one at step {even}")
assert 2 < frozen.max() < 2.2
assert 90 < even < 120

# %% [markdown]
# ## Planting them
#
# Each bug takes the place of a function of the library, for as long as a `with` block lasts. (`mock.patch.object`
# does that; it is Python's own tool for tests.)

# %%
model, attention = tinyvit.model, tinyvit.ops.attention
BUGS = {
    "none": [],
    "diagonal softmax": [(attention, "softmax_backward", diagonal_softmax_backward)],
    "frozen step count": [],
    "layer norm, path dropped": [(model, "layer_norm_backward", short_layer_norm_backward)],
    "GELU, other formula": [(model, "gelu_forward", mixed_gelu_forward)],
    "missing residual": [(model, "block_backward", block_backward_short)],
    "maximum, wrong axis": [(attention, "softmax_forward", wrong_axis_softmax_forward)],
    "wiped moments": [],
}
ADAMS = {"frozen step count": FrozenAdam, "wiped moments": WipedAdam}


@contextlib.contextmanager
def planted(bug):
    """Put a bug's functions in the place of the library's."""
    with contextlib.ExitStack() as stack:
        for module, name, function in BUGS[bug]:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


# %% [markdown]
# ## Training says: all is well
#
# We train eight times, from the same weights on the same images in the same order: once as it should be, and once
# with each bug.

# %%
config = ViTConfig(width=32, depth=2, heads=4, mlp_width=64)
steps = 60 if lesson.quick else 250
images, labels = mnist.train_images[:8000], mnist.train_labels[:8000].astype(int)
validation_images, validation_labels = mnist.train_images[-1000:], mnist.train_labels[-1000:]


def train(adam_class, images, labels, steps, batch, rate):
    """Return the losses and the trained weights; images are taken in their order, again and again."""
    parameters, losses = initialise(config), []
    adam = adam_class(parameters.flat)
    with one_blas_thread():
        for step in range(steps):
            chosen = np.arange(step * batch, (step + 1) * batch) % len(images)
            loss, _, gradients = loss_and_gradient(
                images=images[chosen],
                targets=labels[chosen],
                parameters=parameters,
                config=config,
            )
            adam.step(parameters.flat, gradients.flat, rate)
            losses.append(float(loss))
    return losses, parameters


curves, trained = {}, {}
print(f"{steps} steps of 64 images: mean loss of the first and the last ten steps, and right of 1,000 other images")
for bug in BUGS:
    with planted(bug):
        curves[bug], trained[bug] = train(ADAMS.get(bug, Adam), images, labels, steps, batch=64, rate=1e-3)
        predictions = VisionTransformer(config, trained[bug]).predict(validation_images)
    first, last = np.mean(curves[bug][:10]), np.mean(curves[bug][-10:])
    print(f"    {bug:<26}{first:.2f} -> {last:.2f}   {np.mean(predictions == validation_labels):.1%}")
    assert last < 0.9 * first

figure, axes = lesson.figure(7, 3.6)
window = np.ones(10) / 10
styles = ["-", "-", "-", "-", "--", "--", "--", "--"]
for bug, colour, style in zip(BUGS, (INK, *COLOURS, *COLOURS), styles, strict=False):
    smooth = np.convolve(curves[bug], window, mode="valid")
    label, width = ("as it should be", 2) if bug == "none" else (bug, 1.2)
    axes.semilogy(np.arange(10, steps + 1), smooth, style, color=colour, label=label, linewidth=width)
axes.set_xlabel("step")
axes.set_ylabel("training loss, nats, mean of ten")
axes.yaxis.set_major_formatter("{x:g}")
axes.yaxis.set_minor_formatter("{x:g}")
axes.tick_params(axis="y", which="minor", labelsize=SMALL)
axes.set_title("Which of these eight is right?")
axes.legend(ncols=2)
lesson.save(figure, "training_hides")

# %% [markdown]
# Every curve goes down. Without the black one to compare with, and who has that, each would pass. Some bugs cost
# accuracy, some cost next to nothing in so short a run, and one may even look better than what is right: the frozen
# step count makes longer steps at first, and ours were not tuned. That is no reason to keep it. It is another method
# than the one that was meant, and nobody knows which.
#
# One of the seven is worse than it looks. With the maximum along the wrong axis, all elements of a row may lose much.
# What is left of the largest one?


# %%
def emptiest_row(parameters):
    """Return the exponent of the largest element in the row of attention that has lost the most."""
    exponents = []

    def watching(x):
        exponents.append((x - x.max(axis=-2, keepdims=True)).max(axis=-1).min())
        return wrong_axis_softmax_forward(x)

    with mock.patch.object(attention, "softmax_forward", watching):
        vit_forward(validation_images, parameters, config)
    return min(exponents)


before, after = emptiest_row(initialise(config)), emptiest_row(trained["maximum, wrong axis"])
nothing = np.log(np.finfo(np.float32).smallest_subnormal)
print(f"the emptiest row keeps exp({before:.1f}) before training, and exp({after:.1f}) after {steps} steps")
print(f"below exp({nothing:.0f}) float32 has nothing left, and the row is 0 / 0")
assert nothing < after < before

# %% [markdown]
# It is on its way. With a larger learning rate and more steps it arrives, and the loss is not a number. (Try it: 400
# steps at `rate=2e-3`.) Whoever meets that will lower the learning rate, see that it helps, and keep the bug.
#
# ## Nine checks
#
# Now let us look with better eyes. Each check below runs while a bug is planted, is told the bug's name, and returns
# whether it saw something. First the two that everyone does: a loss that has not fallen, and sixteen images that
# cannot be learned by heart, as in lesson 11.


# %%
def loss_does_not_fall(bug):
    return np.mean(curves[bug][-10:]) > 0.9 * np.mean(curves[bug][:10])


def sixteen_not_learned(bug):
    losses, _ = train(ADAMS.get(bug, Adam), images[:16], labels[:16], steps=80, batch=16, rate=2e-3)
    return losses[-1] > 0.2


# %% [markdown]
# Then gradient checks of every operation, one by one, in three qualities: in float32 with a tolerance of 1 %, as one
# that "has to pass" is often written; in float64 with a `dout` of ones; and as it should be, in float64 with a random
# `dout`. The pairs are looked up when they are called, so that they are the planted ones.

# %%
small = ViTConfig(patch_size=14, width=8, depth=2, heads=2, mlp_width=12)
weights = initialise(small, dtype=np.float64).with_flat(rng.normal(0, 0.5, initialise(small).flat.size))


def block_pair():
    """A block as a function of its input, with all its weights at random."""

    def forward(x):
        own = weights.with_flat(weights.flat.astype(x.dtype))
        return model.block_forward(x, own, "blocks.0", small)

    return forward, lambda dout, cache: model.block_backward(dout, cache, weights.empty_like(), "blocks.0")


def pairs():
    """Yield each operation with its inputs, float64."""
    yield attention.softmax_forward, attention.softmax_backward, [rng.standard_normal((3, 4))]
    vectors = [rng.standard_normal(shape) for shape in ((3, 6), (6,), (6,))]
    yield model.layer_norm_forward, model.layer_norm_backward, vectors
    yield model.gelu_forward, model.gelu_backward, [rng.standard_normal((4, 5))]
    yield *block_pair(), [rng.standard_normal((2, 3, small.width))]


def errors_for(forward, backward, inputs, dout, step=1e-5):
    out, cache = forward(*inputs)
    analytical = backward(dout(out.shape).astype(out.dtype), cache)
    analytical = list(analytical) if isinstance(analytical, tuple) else [analytical]
    numerical = numerical_gradients(forward, inputs, dout(out.shape), step)
    return [relative_error(a, n) for a, n in zip(analytical, numerical, strict=True)]


def operations_in_float32(bug):
    worst = 0
    for forward, backward, inputs in pairs():
        draws = {}

        def dout(shape, draws=draws):
            return draws.setdefault(shape, rng.standard_normal(shape))  # the same for both

        inputs = [x.astype(np.float32) for x in inputs]
        worst = max(worst, *errors_for(forward, backward, inputs, dout, step=1e-2))
    return worst > 1e-2


def operations_with_ones(bug):
    return max(max(errors_for(*pair, np.ones)) for pair in pairs()) > 1e-6


def operations(bug):
    return max(max(gradient_error(*pair)) for pair in pairs()) > 1e-6


# %% [markdown]
# The whole model along random directions, as in lesson 11:


# %%
def whole_model(bug):
    pixels = mnist.train_images[:3] / 255

    def forward(flat):
        return model.vit_forward(pixels, Parameters(small.shapes(), flat), small)

    return directional_error(forward, lambda d, cache: model.vit_backward(d, cache).flat, [weights.flat]) > 1e-6


# %% [markdown]
# *Laws.* A law is what must hold whatever the numbers are, and it needs no step and no tolerance to speak of.
#
# - Softmax does not see a constant that is added to a row, $w(x + c) = w(x)$. Differentiate by $c$: the gradient of a
#   row adds up to zero, $∑_j \mathrm{dx}_j = 0$.
# - Layer norm sees neither a shift nor a scale of a row. So $∑_j \mathrm{dx}_j = 0$ and $∑_j \mathrm{dx}_j x_j = 0$
#   (the latter up to $ε$).
# - GELU: as $\mathrm{cdf}(x) + \mathrm{cdf}(-x) = 1$, we have $\mathrm{gelu}(x) - \mathrm{gelu}(-x) = x$, and the
#   derivatives at $x$ and $-x$ add up to 1.
# - A block whose last projections are zero is the identity, forward *and* backward.
# - Adam, given the same gradient in each step, moves each weight by $η$ in each step.


# %%
def laws(bug):
    return not all((softmax_law(), layer_norm_law(), gelu_law(), block_law(), adam_law(ADAMS.get(bug, Adam))))


def softmax_law():
    x, dweights = rng.standard_normal((2, 3, 4))
    shares, cache = attention.softmax_forward(x)
    constants = np.array([[1.0], [-2.0], [3.0]])  # one for each row
    shifted, _ = attention.softmax_forward(x + constants)
    dx = attention.softmax_backward(dweights, cache)
    return np.allclose(shares, shifted) and np.allclose(dx.sum(axis=-1), 0)


def layer_norm_law():
    x, dout = rng.standard_normal((2, 3, 8))
    out, cache = model.layer_norm_forward(x, np.full(8, 2.0), np.ones(8))
    other, _ = model.layer_norm_forward(3 * x + 1, np.full(8, 2.0), np.ones(8))
    dx, _, _ = model.layer_norm_backward(dout, cache)
    unseen = np.allclose(dx.sum(axis=-1), 0) and np.allclose((dx * x).sum(axis=-1), 0, atol=1e-4)
    return np.allclose(out, other, atol=1e-4) and unseen


def gelu_law():
    x = rng.standard_normal(20)
    (up, up_cache), (down, down_cache) = model.gelu_forward(x), model.gelu_forward(-x)
    ones = np.ones(20)
    slopes = model.gelu_backward(ones, up_cache) + model.gelu_backward(ones, down_cache)
    return np.allclose(up - down, x) and np.allclose(slopes, 1)


def block_law():
    silent = weights.with_flat(weights.flat.copy())
    for name in ("attention.projection", "mlp.fc2"):
        silent.set_pair(f"blocks.0.{name}", 0, 0)
    x, dout = rng.standard_normal((2, 2, 3, small.width))
    out, cache = model.block_forward(x, silent, "blocks.0", small)
    dx = model.block_backward(dout, cache, silent.empty_like(), "blocks.0")
    return np.allclose(out, x) and np.allclose(dx, dout)


def adam_law(adam_class):
    x, gradient = np.zeros(3), np.array([1e-3, -2.0, 50.0])
    adam = adam_class(x)
    for step in range(1, 6):
        adam.step(x, gradient, learning_rate=0.1)
        if not np.allclose(x, -0.1 * step * np.sign(gradient), rtol=1e-4):
            return False
    return True


# %% [markdown]
# Last, the optimiser beside its definition, written down as plainly as the paper has it: for one step, and for five.


# %%
def adam_as_defined(gradients, rate, beta1=0.9, beta2=0.999, epsilon=1e-8):
    x, m, v = (np.zeros(gradients.shape[1]) for _ in range(3))
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        x = x - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
    return x


def differs_from_definition(bug, steps):
    gradients, x = rng.standard_normal((steps, 7)), np.zeros(7)
    adam = ADAMS.get(bug, Adam)(x)
    for gradient in gradients:
        adam.step(x, gradient, 0.1)
    return not np.allclose(x, adam_as_defined(gradients, 0.1), rtol=1e-6)


CHECKS = {
    "the loss falls": loss_does_not_fall,
    "sixteen images by heart": sixteen_not_learned,
    "operations, float32, 1 %": operations_in_float32,
    "operations, dout of ones": operations_with_ones,
    "operations, float64, random dout": operations,
    "whole model, random directions": whole_model,
    "laws": laws,
    "Adam's definition, one step": lambda bug: differs_from_definition(bug, 1),
    "Adam's definition, five steps": lambda bug: differs_from_definition(bug, 5),
}

# %% [markdown]
# ## Which check catches which
#
# Every check is run with every bug, and with none: a check that cries without a reason is of no use either.

# %%
caught = np.zeros((len(BUGS), len(CHECKS)), bool)
for row, bug in enumerate(BUGS):
    for column, check in enumerate(CHECKS.values()):
        with planted(bug), one_blas_thread():  # these products are too small to be shared between cores
            caught[row, column] = check(bug)

print(f"{'':<26}", *(f"{number:>2}" for number in range(1, 10)))
for bug, line in zip(BUGS, caught, strict=True):
    print(f"{bug:<26}", *(" x" if seen else " ." for seen in line))
for number, name in enumerate(CHECKS, start=1):
    print(f"    {number} {name}: {caught[1:, number - 1].sum()} of 7")

names = list(BUGS)
seen = {name: {bug for bug, hit in zip(BUGS, caught[:, i], strict=True) if hit} for i, name in enumerate(CHECKS)}
adams = set(ADAMS)
gradients = set(names[1:]) - adams
assert not caught[0].any()  # nothing is seen where nothing is
assert seen["the loss falls"] == set()
assert seen["sixteen images by heart"] == set()
assert seen["operations, float32, 1 %"] == gradients - {"GELU, other formula"}
assert seen["operations, dout of ones"] == gradients
assert seen["operations, float64, random dout"] == gradients
assert seen["whole model, random directions"] == gradients
assert seen["laws"] == set(names[1:]) - {"GELU, other formula"}
assert seen["Adam's definition, one step"] == set()
assert seen["Adam's definition, five steps"] == adams

figure, axes = lesson.figure(7, 4.4)
axes.imshow(np.where(caught[1:, :, None], np.array([0.0, 0.62, 0.45]), np.array([0.95, 0.95, 0.95])), aspect="auto")
for row, column in np.ndindex(7, 9):
    hit = caught[1 + row, column]
    word, colour = ("seen", "white") if hit else ("–", MUTED)
    axes.text(column, row, word, ha="center", va="center", fontsize=SMALL, color=colour)
axes.set_yticks(range(7), names[1:])
axes.set_xticks(range(9), CHECKS, rotation=38, ha="right", rotation_mode="anchor")
axes.set_xticks(np.arange(0.5, 8), minor=True)
axes.set_yticks(np.arange(0.5, 6), minor=True)
axes.grid(visible=False)
axes.grid(which="minor", color="white", linewidth=2)
axes.tick_params(which="both", length=0)
axes.spines["bottom"].set_visible(False)
axes.set_title("Which check sees which bug")
lesson.save(figure, "bugs_and_checks")

# %% [markdown]
# Before we read it, two numbers that the table hides: how wrong is the mixture of two GELUs? And what does a `dout`
# of ones see of the softmax with the wrong axis, if the softmax stands alone?

# %%
with planted("GELU, other formula"):
    (mixture,) = gradient_error(model.gelu_forward, model.gelu_backward, [rng.standard_normal((4, 5))])
with planted("maximum, wrong axis"):
    alone = attention.softmax_forward, attention.softmax_backward, [rng.standard_normal((3, 4))]
    (blind,), (seeing,) = errors_for(*alone, np.ones), gradient_error(*alone)
print(f"the mixture of two GELUs has a relative error of {mixture:.0e}")
print(f"the softmax with the wrong axis: {blind:.0e} with a dout of ones, {seeing:.0e} with a random one")
assert 1e-5 < mixture < 1e-2
assert blind < 1e-5 < 1e-2 < seeing

# %% [markdown]
# Now read the table by columns.
#
# - *Training* sees nothing. Neither does learning sixteen images by heart: a test worth doing, as it finds models
#   that cannot learn at all. But a wrong gradient with an acute angle to the right one gets there too.
# - *Gradient checks* see every wrong gradient, and no wrong optimiser: that is not what they look at. In float32,
#   with the tolerance that it needs, the GELU of two formulas passes. With a `dout` of ones the wrong axis was found
#   only since a whole block is among the operations; in the softmax alone nothing is to be seen, as its rows add up
#   to one whatever was subtracted.
# - The *whole model* along three directions sees them all, with seven forward passes. It does not say where they are.
#   So: first the whole, then, if it fails, the parts.
# - *Laws* see nearly everything and are the quickest to write. But each formula of GELU keeps its law, and so does
#   their mixture.
# - *One step* of Adam proves nothing about Adam. What has a memory must be watched while it remembers.
#
# No check sees all seven. Two together do: a gradient check in float64 with a random `dout`, and five steps of Adam.
#
# ## What a gradient check cannot say
#
# It says that a backward pass belongs to its forward pass. It does not say that the forward pass is what you meant.
# Leave the residual branch out of *both*, and every gradient is right, of another model. For that there are laws (the
# block above would not be the identity) and the values of an independent program. The library's own tests have both,
# `tests/heart/test_torch_parity.py` for the latter; and `tests/heart/test_mutation.py` damages every backward pass in
# some two thousand ways, to see that the check sees it.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/14_spot_the_wrong_gradient.py`.
#
# **1.** Mend it. Vectors are scaled to length one, $y_i = x_i / |x|$ with $|x| = \sqrt{∑_j x_j^2}$, and somebody
# wrote `dx = dout / |x|`. Which path was dropped? Derive `dx`, for every row of `x`.


# %%
def exercise_1(dout, x):
    """Return dx (N, D) of y = x / |x|, row by row, for dout (N, D) and x (N, D)."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** Write a law. `softmax` is a function from (N, T) to (N, T), and may be wrong in ways that you do not know. Is
# it a softmax over the last axis? Use what must hold: positive shares that add up to one; a constant added to *one*
# row, which changes nothing, even a large one; and the ratio of two shares, which is $e^{x_i - x_j}$. Return True or
# False.


# %%
def exercise_2(softmax):
    """Return whether `softmax` keeps the laws of a softmax over the last axis."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Diagnose. `make(x)` returns an optimiser for the array `x`, with the method
# `step(x, gradient, learning_rate)` that changes `x` in place. It is Adam with the usual settings, and "right"; or
# its step count is "frozen"; or its moments are "wiped". You see nothing but what it does. (One step tells you
# nothing. What do two or three tell you?)


# %%
def exercise_3(make):
    """Return "right", "frozen" or "wiped"."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** The eighth bug, that no gradient check can see: a block that forgot a residual branch in the forward pass,
# with a backward pass to match. `forward(x, weights)` takes tokens (T, D) and a dict of arrays, and returns tokens;
# the weights "w_out" and "b_out" are the last projection of its attention, "w_2" and "b_2" the last layer of its MLP.
# Does it have both residual branches? Return "both", "attention" or "mlp" (the one that is *missing*), or "none" if
# there is none. You may change the weights, in a copy.


# %%
def exercise_4(forward, x, weights):
    """Return "both" if both branches are there, the missing one ("attention" or "mlp"), or "none"."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# We know now that it is right, and how we know. Only what is right is worth making fast: that is the next lesson.
