# %% [markdown]
r"""
# 04 Adam

**Goal.** To derive the method that trains nearly every transformer, from the two weaknesses of gradient descent that
it mends, and to see in a race what it is good at and what it is not.

**The one equation.** Every weight moves by the mean of its recent gradients, divided by their size:

$$
w ← w - η \frac{\hat m}{\sqrt{\hat v} + ε}
$$

**Source.** D. Kingma and J. Ba, *Adam: A Method for Stochastic Optimization*, 2015, algorithm 1. For momentum: B.
Polyak, *Some methods of speeding up the convergence of iteration methods*, 1964.

**Time.** An hour to read and play, ten to twenty minutes an exercise, an evening for the last. The script runs in
half a minute.
"""

# %%
import numpy as np
from kit import BLUE, GREEN, MUTED, ORANGE, Lesson

from tinyvit import reference
from tinyvit.data import load_mnist
from tinyvit.data.batches import Epoch
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, initialise, loss_and_gradient
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward, linear_backward, linear_forward
from tinyvit.optim import Adam
from tinyvit.parameters import Parameters

lesson = Lesson("04_adam")
rng = np.random.default_rng(4)

# %% [markdown]
# ## A valley
#
# The simplest loss on which gradient descent has a hard time is a valley: flat along its floor, steep across.
#
# $$
# L(w) = \frac{1}{2} ∑_i a_i w_i^2, \qquad \frac{∂L}{∂w_i} = a_i w_i
# $$
#
# Let there be two weights, with $a_1 = 1$ along the valley, and $a_2 = 50$ across it. Near its minimum every smooth
# loss looks like this, seen from the right side, with one curvature $a_i$ for each direction.
#
# *Gradient descent* takes a step of the learning rate $η$ times the gradient, downhill:
#
# $$
# w_i ← w_i - η a_i w_i = (1 - η a_i) \, w_i
# $$
#
# So each weight is multiplied by its own factor, again and again. It shrinks if the factor lies between $-1$ and $1$,
# that is, if $η < 2 / a_i$. *The steepest direction decides how large $η$ may be*: beyond $2 / 50$ the weight $w_2$
# jumps from one wall to the other, higher each time. *The flattest decides how long it takes*: with $η = 2 / 50$,
# $w_1$ keeps $1 - 2/50$ of itself in a step. The best $η$ makes both factors the same size:
#
# $$
# 1 - η a_1 = η a_2 - 1, \qquad η = \frac{2}{a_1 + a_2}, \qquad \mathrm{factor} = \frac{a_2 - a_1}{a_2 + a_1}
# $$

# %%
FLAT, STEEP = 1.0, 50.0
curvatures = np.array([FLAT, STEEP])
start = np.array([-1.0, 0.3])


def descend(gradient_of, w, rate, steps):
    """Return the path (steps + 1, P) of gradient descent from w."""
    path = [w]
    for _ in range(steps):
        w = w - rate * gradient_of(w)
        path.append(w)
    return np.array(path)


best = 2 / (FLAT + STEEP)
factor = (STEEP - FLAT) / (STEEP + FLAT)
path = descend(lambda w: curvatures * w, start, best, 100)
expected = start * np.array([factor, -factor]) ** np.arange(101)[:, None]
assert np.allclose(path, expected, atol=1e-12)

print(f"with the best rate, {best:.4f}, a step leaves {factor:.1%} of the way;")
print(f"    to come a thousand times nearer takes {np.log(1000) / -np.log(factor):.0f} steps")
for rate in (0.99 * 2 / STEEP, 1.01 * 2 / STEEP):
    end = descend(lambda w: curvatures * w, start, rate, 500)[-1]
    print(f"    with the rate {rate:.4f}, w2 goes from {start[1]} to {abs(end[1]):.2g} in 500 steps")
    assert (abs(end[1]) < 1) == (rate < 2 / STEEP)

# %% [markdown]
# The number of steps grows with $a_2 / a_1$, the *condition number*. Here it is 50; it can be far larger.
#
# ## First idea: momentum
#
# Look at what the gradients have in common. Across the valley they change sign at every step, along it they all
# agree. So let us add them up. Where they agree the sum grows, where they do not it cancels:
#
# $$
# u ← μ u + g, \qquad w ← w - η u
# $$
#
# It is the ball that rolls: $u$ is its speed, and $μ$, often 0.9, is what friction leaves of it in a step. How fast
# does it get, if the gradient stays the same? At the end as much is added as is lost, $u = μ u + g$, so
#
# $$
# u = \frac{g}{1 - μ}
# $$
#
# which for $μ = 0.9$ is ten times the gradient. Keep that in mind: *a rate with momentum 0.9 is worth ten times the
# rate without*.


# %%
def momentum(gradient_of, w, rate, steps, mu=0.9):
    """Return the path (steps + 1, P) of gradient descent with momentum from w."""
    path, u = [w], np.zeros_like(w)
    for _ in range(steps):
        u = mu * u + gradient_of(w)
        w = w - rate * u
        path.append(w)
    return np.array(path)


slope = momentum(lambda w: np.ones(1), np.zeros(1), 0.01, 200)
fastest = (slope[-2] - slope[-1])[0]
print(f"on a slope of 1, with the rate 0.01, the ball reaches {fastest:.3f} a step")
assert np.isclose(fastest, 0.01 / (1 - 0.9))

# %% [markdown]
# ## Second idea: a scale for every weight
#
# Momentum still has one learning rate for all. But $w_1$ and $w_2$ need different ones, fifty times apart. If the
# curvatures were known, $η_i = 1 / a_i$ would reach the bottom in a single step. They are not; but a steep direction
# betrays itself by large gradients. So divide each gradient by its own usual size, and what is left is a number of
# the size of one, whatever the units.
#
# "Mean" and "usual size" have to be of *recent* gradients, as the landscape changes while we walk. An average that
# forgets is
#
# $$
# m ← β_1 m + (1 - β_1) \, g, \qquad v ← β_2 v + (1 - β_2) \, g^2
# $$
#
# The first is the momentum of before, times $1 - β_1$. The second is the mean square, and its root is the size.
# Typically $β_1 = 0.9$ remembers some ten steps, and $β_2 = 0.999$ some thousand.
#
# ## The correction
#
# Both averages start from zero, and a zero is no gradient. Write out what $m$ is after $t$ steps: each step
# multiplies what was there by $β$, so the gradient of step $s$ has been multiplied $t - s$ times.
#
# $$
# m_t = (1 - β) ∑_{s=1}^{t} β^{t-s} g_s
# $$
#
# An average needs weights that add up to one. Do they? It is a geometric series:
#
# $$
# (1 - β) ∑_{s=1}^{t} β^{t-s} = (1 - β) \frac{1 - β^t}{1 - β} = 1 - β^t
# $$
#
# They add up to less, the missing $β^t$ being the weight of the zero at the start. Divide by what they add up to, and
# it is an average:
#
# $$
# \hat m_t = \frac{m_t}{1 - β_1^t}, \qquad \hat v_t = \frac{v_t}{1 - β_2^t}
# $$
#
# At the first step $\hat m_1 = g$ and $\hat v_1 = g^2$, as one would wish. The step is $η g / |g|$: of length $η$,
# for every weight.


# %%
def adam_by_hand(w, gradients, rate, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """Return the weights, a list of numbers, after a step for each of the gradients, lists of numbers too."""
    w = list(w)
    for i in range(len(w)):
        m = v = 0.0
        for t, g in enumerate(gradients, 1):
            m = beta1 * m + (1 - beta1) * g[i]
            v = beta2 * v + (1 - beta2) * g[i] ** 2
            mean, square = m / (1 - beta1**t), v / (1 - beta2**t)
            w[i] -= rate * mean / (square**0.5 + epsilon)
    return w


def adam(gradient_of, w, rate, steps, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """Return the path (steps + 1, P) of Adam from w."""
    path, m, v = [w], np.zeros_like(w), np.zeros_like(w)
    for t in range(1, steps + 1):
        g = gradient_of(w)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        mean, square = m / (1 - beta1**t), v / (1 - beta2**t)
        w = w - rate * mean / (np.sqrt(square) + epsilon)
        path.append(w)
    return np.array(path)


w = rng.standard_normal(7)
gradients = rng.standard_normal((50, 7)) * 10.0 ** np.arange(-3, 4)  # of seven different sizes
arriving = iter(gradients)
ours = adam(lambda w: next(arriving), w, 0.01, 50)[-1]

library, optimiser = w.copy(), Adam(w)
for gradient in gradients:
    optimiser.step(library, gradient, 0.01)  # writes into `library`

assert np.allclose(ours, adam_by_hand(w, gradients, 0.01), atol=1e-12)
assert np.allclose(ours, library, atol=1e-12)
print("50 steps on 7 weights: the same number by number, by array and by tinyvit's Adam")

# %% [markdown]
# The step above is the one in `tinyvit/reference.py`. There a model is a dict of arrays, and one call of `adam_step`
# updates all of them.

# %%
named, m, v = {"w": w.copy()}, {"w": np.zeros(7)}, {"w": np.zeros(7)}
for t, gradient in enumerate(gradients, 1):
    reference.adam_step(
        parameters=named,
        gradients={"w": gradient},
        m=m,
        v=v,
        step=t,
        learning_rate=0.01,
    )
np.testing.assert_allclose(ours, named["w"], rtol=1e-10, atol=1e-12)
print("the same 50 steps by tinyvit/reference.py: the same weights")

# %% [markdown]
# The $ε$ below the fraction only keeps a weight whose gradient has always been zero, as of a pixel that is never lit,
# from dividing zero by zero.
#
# What if we left the correction out? Both averages are too small at first. But $v$ is too small for a thousand steps
# and $m$ only for ten, and it is $v$ that divides. Let the gradient be one, all the time, and look at the length of
# the steps:

# %%
t = np.arange(1, 5001)
uncorrected = (1 - 0.9**t) / np.sqrt(1 - 0.999**t)  # m / sqrt(v), as m = 1 - beta1^t if every gradient is 1
corrected = np.ones_like(uncorrected)

figure, axes = lesson.figure(7, 3)
axes.loglog(t, uncorrected, color=ORANGE, label="without the correction")
axes.loglog(t, corrected, color=BLUE, label="with it")
axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
axes.set_yticks([], minor=True)
axes.set_xlabel("step $t$")
axes.set_ylabel("length of a step, in learning rates")
axes.set_title("Without the correction, Adam leaps before it looks")
axes.legend()
lesson.save(figure, "correction")

print(f"without the correction the first step is {uncorrected[0]:.1f} times too long, and the longest")
print(f"    {uncorrected.max():.1f} times, at step {t[uncorrected.argmax()]}")
assert np.isclose(uncorrected[0], 0.1 / np.sqrt(0.001))
assert 6 < uncorrected.max() < 7

# %% [markdown]
# And that at a time when the weights are at their most random, and the gradients at their worst.
#
# ## What follows from it
#
# Multiply the loss by a thousand. Every gradient is a thousand times as large; so is $\hat m$, and so is
# $\sqrt{\hat v}$. The fraction is the same, and Adam takes the same path. Its learning rate is therefore no factor of
# a gradient, but *a length: how far a weight moves in a step*. That is why one value, such as 0.001, suits so many
# networks.
#
# That length is reached only if the gradients agree. If they are nothing but noise around zero, of the size $σ$, then
# $\sqrt{\hat v} ≈ σ$; but $m$, the average, has the variance
#
# $$
# (1 - β_1)^2 ∑_s β_1^{2(t-s)} σ^2 ≈ \frac{(1 - β_1)^2}{1 - β_1^2} σ^2 = \frac{1 - β_1}{1 + β_1} σ^2
# $$
#
# so that a step is about $\sqrt{0.1 / 1.9} ≈ 0.23$ learning rates long, and to and fro at that.

# %%
noisy = rng.standard_normal((2000, 7))
for size in (1, 1000):
    arriving = iter(size * noisy)
    walked = adam(lambda w: next(arriving), np.zeros(7), 1.0, 2000)  # noqa: B023  used before it changes
    moves = np.diff(walked, axis=0)[1000:]
    print(f"noise of size {size:>4}: a step is {np.sqrt((moves**2).mean()):.3f} learning rates long")
    assert np.isclose(np.sqrt((moves**2).mean()), np.sqrt(0.1 / 1.9), rtol=0.1)

# %% [markdown]
# ## The race in the valley
#
# Three methods; two valleys. The first is the one of above. The second is the same, turned by 45 degrees, so that
# both weights have a part in the steep direction and in the flat one. In each valley, each method has that learning
# rate, out of sixty, with which it is soonest at a thousandth of the loss and stays below it.

# %%
METHODS = {"gradient descent": (descend, ORANGE), "momentum 0.9": (momentum, GREEN), "Adam": (adam, BLUE)}
RATES = 10 ** np.linspace(-4, 0, 60)
half = np.sqrt(0.5)
TURN = np.array([[half, -half], [half, half]])  # by 45 degrees


def valley_of(steep, turned):
    """Return the matrix A (2, 2) of the loss w A w / 2, and a place (2,) to begin at."""
    curvature, begin = np.diag([FLAT, steep]), np.array([-1.0, 0.3 * np.sqrt(STEEP / steep)])
    return (TURN @ curvature @ TURN.T, TURN @ begin) if turned else (curvature, begin)


def race(method, steep, turned, steps):
    """Return the path (T, 2) with the best of the learning rates, that rate, and the number of steps it needs."""
    curvature, begin = valley_of(steep, turned)
    begin = np.tile(begin, (len(RATES), 1))  # (R, 2): all rates set off side by side
    with np.errstate(over="ignore", invalid="ignore"):  # too large a rate runs off to infinity
        path = method(lambda w: w @ curvature, begin, RATES[:, None], steps)  # (T, R, 2)
        losses = 0.5 * ((path @ curvature) * path).sum(axis=-1)  # (T, R)
    needed = [steps_needed(losses[:, r]) for r in range(len(RATES))]
    best = np.argmin(needed)
    return path[:, best], RATES[best], needed[best]


def steps_needed(losses, share=1e-3):
    """Return after how many steps the losses (T,) stay below a share of the first one."""
    above = np.flatnonzero(~(losses < share * losses[0]))  # what is no number counts as above
    return above[-1] + 1


figure, panels = lesson.figure(7, 3.9, columns=2, sharey=True)
side = np.linspace(-1.15, 0.45, 201)
grid = np.stack(np.meshgrid(side, side), axis=-1)  # (201, 201, 2)
needed = {}
print(f"{STEEP:.0f} times as steep across as along; steps to a thousandth of the loss:")
for axes, turned in zip(panels, (False, True), strict=True):
    valley = "turned by 45 degrees" if turned else "along the axes"
    height = 0.5 * ((grid @ valley_of(STEEP, turned)[0]) * grid).sum(axis=-1)
    axes.contour(side, side, height, levels=[0.02, 0.1, 0.3, 0.8, 2, 4, 8, 14], colors=MUTED, linewidths=0.5)
    for name, (method, colour) in METHODS.items():
        path, rate, needed[name, turned] = race(method, STEEP, turned, 200)
        print(f"    a valley {valley:<20}  {name:<16}  rate {rate:.3f}  {needed[name, turned]:3} steps")
        axes.plot(*path.T, "o-", color=colour, markersize=2.2, linewidth=1, label=name)
    axes.set_title(f"A valley {valley}")
    axes.set(xlabel="$w_1$", xlim=side[[0, -1]], ylim=side[[0, -1]], aspect="equal")
panels[0].set_ylabel("$w_2$")
panels[0].legend(loc="lower left", facecolor="white", frameon=True, framealpha=1, edgecolor="white")
lesson.save(figure, "valleys")

for name in ("gradient descent", "momentum 0.9"):
    assert abs(needed[name, False] - needed[name, True]) <= 1  # they do not know where the axes are

# %% [markdown]
# Gradient descent bounces from wall to wall. Momentum swings through, and wins back what it lost by bouncing. Adam,
# in the first valley, takes steps of equal length along both axes, as if the valley were a bowl; in the second one
# its two scales are of no use, since both weights have gradients of the same size. What is left of it is its
# momentum.
#
# This valley is a mild one. How does the number of steps grow if it gets steeper?

# %%
steepness = [10, 30, 100, 300, 1000]
needed = {
    label: [race(method, steep, turned, 2500)[2] for steep in steepness]
    for label, method, turned in [
        ("gradient descent", descend, False),
        ("momentum 0.9", momentum, False),
        ("Adam, valley along the axes", adam, False),
        ("Adam, valley turned", adam, True),
    ]
}
figure, axes = lesson.figure(7, 3.4)
for (label, counts), colour, line in zip(needed.items(), (ORANGE, GREEN, BLUE, BLUE), "---:", strict=True):
    axes.loglog(steepness, counts, "o", linestyle=line, markersize=4, color=colour, label=label)
    print(f"    {label:<28}", "".join(f"{count:6}" for count in counts), " steps")
axes.set_xticks(steepness, steepness)
axes.set_yticks([30, 100, 300, 1000], ["30", "100", "300", "1000"])
axes.minorticks_off()
axes.set_xlabel("how much steeper the valley is across than along")
axes.set_ylabel("steps to a thousandth of the loss")
axes.set_title("To Adam a steep valley is as easy as a mild one, if it lies along the axes")
axes.legend()
lesson.save(figure, "steepness")

assert needed["gradient descent"][-1] > 30 * needed["gradient descent"][0]
assert needed["Adam, valley along the axes"][-1] < 2 * needed["Adam, valley along the axes"][0]
assert needed["Adam, valley turned"][-1] > 5 * needed["Adam, valley turned"][0]
assert needed["momentum 0.9"][-1] < needed["gradient descent"][-1] / 10

# %% [markdown]
# So Adam is no magic. In a mild valley plain gradient descent is the quickest of all, for it has no memory that takes
# time to fill. In a turned and steep one momentum is better. What Adam does is to take one kind of difficulty away
# altogether: *weights that need different learning rates*. Is that the kind which networks have?
#
# ## The race on MNIST
#
# The same linear classifier as in lesson 03, one epoch over 55,000 images in batches of 50. Three things we have
# earned make it short. `Epoch` is the shuffled order of lesson 03. `Parameters` is one flat array with a name for
# each part of it; so an optimiser sees one vector, whatever the model, and a layer sees its weight. And `Adam` is the
# library's. Each method is tried with nine learning rates, and judged by its loss on the validation images. The test
# images are left alone: choosing is not their business.
#
# Then the race is run once more with one change. The right half of each image is twenty times fainter, as if another
# scanner had taken it. Nothing is lost by that: weights twenty times as large make up for it exactly. But the
# gradient of such a weight, which has the pixel for a factor, is twenty times *smaller*. To go twenty times as far
# with a twentieth of the gradient takes a rate four hundred times as large, and only for these weights: it is a
# valley, and it lies along the axes.

# %%
PIXELS, CLASSES, BATCH = 784, 10, 50
mnist = load_mnist()
pixels = mnist.train_images.reshape(-1, PIXELS).astype(np.float32) / 255
train_labels, validation_labels = mnist.train_labels[:-5000], mnist.train_labels[-5000:]
images = 10_000 if lesson.quick else 55_000

SHAPES = {"head.weight": (PIXELS, CLASSES), "head.bias": (CLASSES,)}


def linear_classifier_loss(parameters, x, labels):
    """Return the loss and the gradients, as Parameters of the same names."""
    logits, linear_cache = linear_forward(x, *parameters.pair("head"))
    loss, loss_cache = cross_entropy_forward(logits, labels)
    _, dw, db = linear_backward(cross_entropy_backward(1.0, loss_cache), linear_cache)
    gradients = parameters.empty_like()
    gradients.set_pair("head", dw, db)
    return loss, gradients


def train(method, rate, x):
    """Return the losses of one epoch's batches and the loss on the validation images."""
    parameters = Parameters(SHAPES, np.zeros(PIXELS * CLASSES + CLASSES, np.float32))
    flat, speed, optimiser = parameters.flat, np.zeros_like(parameters.flat), Adam(parameters.flat)
    epoch = Epoch(x[:images], train_labels[:images], None, seed=4, number=1, backend=get_backend("cpu"))
    losses = []
    for first in range(0, images, BATCH):
        loss, gradients = linear_classifier_loss(parameters, *epoch.load(first, first + BATCH))
        losses.append(loss)
        if method == "Adam":
            optimiser.step(flat, gradients.flat, rate)
        else:
            speed *= 0.9 if method == "momentum 0.9" else 0.0  # without momentum, the speed is the gradient
            speed += gradients.flat
            flat -= rate * speed
    logits = linear_forward(x[-5000:], *parameters.pair("head"))[0]
    return losses, float(cross_entropy_forward(logits, validation_labels)[0])


fainter = pixels * np.where(np.arange(PIXELS) % 28 < 14, 1, 0.05).astype(np.float32)
scans = {"as they are": pixels, "right half fainter": fainter}
rates = 10.0 ** np.arange(-3.5, 0.6, 0.5)
figure, panels = lesson.figure(7, 5.6, rows=2, columns=2, sharey="row")
best = {}
for (choice, curves), (scan, x) in zip(panels.T, scans.items(), strict=True):
    for name, (_, colour) in METHODS.items():
        runs = [train(name, rate, x) for rate in rates]
        scores = [score for _, score in runs]
        chosen = np.argmin(scores)
        best[name, scan] = scores[chosen]
        print(f"images {scan:<18}  {name:<16}  best rate {rates[chosen]:<6.2g}  loss {scores[chosen]:.3f}")
        choice.plot(rates, scores, "o-", markersize=4, color=colour)
        losses = np.convolve(runs[chosen][0], np.ones(50) / 50, "valid")  # the mean of 50 batches
        seen = BATCH * np.arange(50, 50 + len(losses)) / 1000
        curves.plot(seen, losses, color=colour, label=f"{name}, rate {rates[chosen]:.2g}")
    choice.set(title=f"Images {scan}", xscale="log", xlabel="learning rate", ylim=(0.2, 1.2))
    curves.set(xlabel="thousand images seen, with the best rate", ylim=(0.2, 1.2))
    curves.legend()
panels[0, 0].set_ylabel("validation loss after an epoch")
panels[1, 0].set_ylabel("training loss")
lesson.save(figure, "mnist")

plain, rolling = "gradient descent", "momentum 0.9"
for scan in scans:
    assert abs(best[rolling, scan] - best[plain, scan]) < 0.05
    assert best["Adam", scan] < best[plain, scan]
assert best["Adam", "right half fainter"] < best[plain, "right half fainter"] - 0.1
assert best["Adam", "as they are"] > best[plain, "as they are"] - 0.1

# %% [markdown]
# Three things to see in the upper row. Where pixels are all of one kind, the choice of the rate matters far more than
# that of the method. Momentum has the curve of gradient descent, a factor of ten to the left, just as we found: with
# small and noisy batches it is a longer step and little else. And where the weights need different rates, no rate is
# good for the two, while Adam still has a good one. (It does not come off quite unharmed: its steps are lengths, and
# some weights have to go twenty times as far.)
#
# And the transformer at the end of this book? We look ahead at the gradients of its first batch. How large are they,
# in its last layer, the head, and in the weights of its attention?

# %%
config = ViTConfig()
transformer = initialise(config)
_, _, gradients = loss_and_gradient(
    images=mnist.train_images[:64],
    targets=mnist.train_labels[:64],
    parameters=transformer,
    config=config,
)
sizes = {name: np.sqrt((gradients[name] ** 2).mean()) for name in ("head.weight", "blocks.0.attention.qkv.weight")}
for name, size in sizes.items():
    print(f"size of the gradients of {name:<30} {size:.4f}")
assert sizes["head.weight"] > 10 * sizes["blocks.0.attention.qkv.weight"]

# %% [markdown]
# More than ten times apart, before anything is learned, and it changes as training goes. Nobody has to tell Adam.
# That is why it trains every transformer in this book.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/04_adam.py`.
#
# **1.** The average that forgets, with its correction: take in the gradients one after the other, beginning with
# $m = 0$, and return $\hat m$ after the last one.


# %%
def exercise_1(gradients, beta):
    """Return the corrected average (P,) of gradients (T, P), the last being the most recent."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** A valley in any direction: $L = \frac{1}{2} w^T A w$, with the gradient $A w$ and $A$ symmetric. Below which
# learning rate does gradient descent not run away? (In which direction is it steepest? NumPy has
# `np.linalg.eigvalsh`.)


# %%
def exercise_2(A):
    """Return the rate, a number, above which gradient descent runs away, for A (P, P), positive definite."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** *Weight decay* pulls every weight towards zero, by the share $η λ$ of it in each step, so that no weight
# grows without need. For plain gradient descent this is the same as to add $\frac{λ}{2} ∑_i w_i^2$ to the loss. For
# Adam it is not, as what is in the gradient is divided by its own size again. So it is kept out of the gradient, and
# out of $m$ and $v$: this is AdamW (Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019). Write one
# step of it.


# %%
def exercise_3(w, g, m, v, t, rate, decay):
    """Return w, m, v (P,) after step number t, from 1, with beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8."""
    return ..., ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** An evening's thought: the best momentum for a valley. Put the two lines of momentum together, and a weight
# with the curvature $a$ follows
#
# $$
# w_{t+1} = (1 + μ - η a) \, w_t - μ \, w_{t-1}
# $$
#
# Try $w_t = r^t$: it is a solution if $r^2 - (1 + μ - η a) \, r + μ = 0$. Whether the weight shrinks, and how fast,
# is decided by the larger of the two $|r|$. The product of the two is $μ$. So how small can the larger one be, at
# best? For which $η$ is it as small as that at both curvatures, $a$ and $b$, and which is the smallest $μ$ that
# allows it? (For the valley of above you should find a factor of 0.75 a step, where gradient descent had 0.96.)


# %%
def exercise_4(a, b):
    """Return the rate and the momentum, two numbers, that are best for the curvatures a < b."""
    return ..., ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import `Adam`, `Parameters` and `Epoch`. A better method did not make the linear layer a better
# reader: it is at its limit. The next lesson raises that limit, with a second layer and a bend between the two.
