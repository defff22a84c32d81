# %% [markdown]
r"""
# 02 The linear layer, and the gradient check

**Goal.** To derive the three gradients of a linear layer by hand, and to build the tool that tells whether such a
derivation is right. From here on, no gradient in this book goes unchecked.

**The one equation.** A linear layer weighs its inputs. For row $n$ of the input and output number $o$:

$$
y_{no} = ∑_i x_{ni} w_{io} + b_o
$$

**Source.** For the gradients: M. Giles, *An extended collection of matrix derivative results for forward and reverse
mode algorithmic differentiation*, 2008, section 2.2. For the differences: J. Nocedal and S. Wright, *Numerical
Optimization*, 2006, section 8.1.

**Time.** An hour to read and play, ten to twenty minutes an exercise. The script runs in a few seconds.
"""

# %%
import numpy as np
from kit import BLUE, GREEN, MUTED, ORANGE, TEXT, Lesson

from tinyvit import reference
from tinyvit.data import load_mnist
from tinyvit.gradcheck import gradient_error, numerical_gradients, relative_error
from tinyvit.ops import linear_backward, linear_forward

lesson = Lesson("02_linear_layer")
rng = np.random.default_rng(2)

# %% [markdown]
# ## Forward
#
# Our input is four rows of real pixels: a piece of six pixels from the middle of each of the first four digits, as
# numbers from 0 to 1. The layer turns the six numbers of each row into three. The weight has the shape (in, out), so
# that the sum over $i$ in the equation is the product of matrices `x @ w`. We write the equation down index by index,
# and compare.


# %%
def linear_by_index(x, w, b):
    """Return y (N, O) for x (N, I), w (I, O), b (O,), as the equation says it."""
    y = np.zeros((len(x), len(b)))
    for n, o in np.ndindex(y.shape):
        y[n, o] = sum(x[n, i] * w[i, o] for i in range(x.shape[1])) + b[o]
    return y


x = load_mnist().train_images[:4, 14, 10:16] / 255  # (N, I) = (4, 6)
w = rng.standard_normal((6, 3))  # (I, O)
b = rng.standard_normal(3)  # (O,)
y = x @ w + b  # (N, O) = (4, 3)

assert np.allclose(y, linear_by_index(x, w, b), atol=1e-14)
assert np.allclose(y, linear_forward(x, w, b)[0], atol=1e-14)
print(f"x {x.shape} @ w {w.shape} + b {b.shape} -> y {y.shape}, the same by index, by product and by tinyvit")

# %% [markdown]
# ## What a backward pass is asked
#
# Somewhere behind this layer there is a loss $L$, a single number. Training needs to know how $L$ changes as each
# weight is changed: $∂L/∂w_{io}$. The layer does not know what comes behind it, and need not. All it is told is how
# the loss depends on what it put out, $∂L/∂y_{no}$. In the code this array is called `dout`: the gradient that
# arrives from above, the *upstream gradient*. It has the shape of $y$, as a gradient always has the shape of what it
# belongs to.
#
# The layer's task is to turn it into $∂L/∂x$, which becomes the `dout` of the layer below, and into $∂L/∂w$ and
# $∂L/∂b$. The tool is the chain rule: add up over *all* outputs through which a change can reach the loss. We write
# $m$ and $p$ for the row and number of such an output, as $n$ and $o$ are taken:
#
# $$
# \frac{∂L}{∂w_{io}} = ∑_m ∑_p \frac{∂L}{∂y_{mp}} \frac{∂y_{mp}}{∂w_{io}}
# $$
#
# ### The weight
#
# Where does $w_{io}$ occur in $y_{mp} = ∑_j x_{mj} w_{jp} + b_p$? Only where $j = i$ and $p = o$, and there its
# factor is $x_{mi}$. So $∂y_{mp}/∂w_{io}$ is $x_{mi}$ if $p = o$, and zero otherwise. Of the sum over $p$ one term is
# left:
#
# $$
# \frac{∂L}{∂w_{io}} = ∑_m x_{mi} \frac{∂L}{∂y_{mo}}
# $$
#
# Every row of the batch has its say, as all of them used this weight. The sum runs over the *first* index of `x` and
# the first of `dout`; for a product of matrices, the first index of `x` has to become its last, so `dw = x.T @ dout`.
#
# ### The bias
#
# $b_o$ occurs in $y_{mo}$, of every row $m$, with the factor one:
#
# $$
# \frac{∂L}{∂b_o} = ∑_m \frac{∂L}{∂y_{mo}}
# $$
#
# ### The input
#
# $x_{ni}$ occurs in row $n$ alone, but in *every* output of that row, $y_{np}$, with the factor $w_{ip}$. Now the row
# is fixed, and the sum over $p$ stays:
#
# $$
# \frac{∂L}{∂x_{ni}} = ∑_p \frac{∂L}{∂y_{np}} w_{ip}
# $$
#
# The sum runs over the last index of both, so the weight is transposed: `dx = dout @ w.T`.


# %%
def linear_backward_by_index(dout, x, w):
    """Return dx, dw, db, one sum after the other, as the three equations say it."""
    rows, outputs = dout.shape
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(outputs)
    for n, i in np.ndindex(dx.shape):
        dx[n, i] = sum(dout[n, p] * w[i, p] for p in range(outputs))
    for i, o in np.ndindex(dw.shape):
        dw[i, o] = sum(x[m, i] * dout[m, o] for m in range(rows))
    for o in range(outputs):
        db[o] = sum(dout[m, o] for m in range(rows))
    return dx, dw, db


dout = rng.standard_normal(y.shape)  # some loss's gradient: which loss does not matter
dx, dw, db = dout @ w.T, x.T @ dout, dout.sum(axis=0)

for ours, by_index in zip((dx, dw, db), linear_backward_by_index(dout, x, w), strict=True):
    assert np.allclose(ours, by_index, atol=1e-14)
for ours, library in zip((dx, dw, db), linear_backward(dout, linear_forward(x, w, b)[1]), strict=True):
    assert np.allclose(ours, library, atol=1e-14)
print("dx, dw and db: the same by index, by product and by tinyvit")

# %% [markdown]
# In the library, `linear_forward` returns its output *and* what its backward pass will need, the cache: here
# `(x, w)`. The bias is not in it, for no gradient contains it. And `x` may have more axes there, such as (images,
# tokens, width): all but the last are rows, and a sum over rows is then a sum over all of them.
#
# The library is written to be fast. `tinyvit/reference.py` is the same model, written to be read: every forward and
# backward pass as it is derived in these lessons. The layer above is the first of them.

# %%
reference_y, reference_cache = reference.linear_forward(x, w, b)
np.testing.assert_allclose(y, reference_y, rtol=1e-10, atol=1e-12)
for ours, theirs in zip((dx, dw, db), reference.linear_backward(dout, reference_cache), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
print("the layer and its gradients are those of tinyvit/reference.py")

# %% [markdown]
# ## Is it right? Ask the forward pass
#
# We compared a derivation with itself, written twice. A mistake in it would be in both. The independent witness is
# the forward pass: change a weight a little, and see how the loss changes. That is what a derivative *is*.
#
# How little is a little? Let $f(w)$ be the loss as a function of one weight, and $h$ the step. Taylor's series says
#
# $$
# f(w + h) = f(w) + h f'(w) + \frac{h^2}{2} f''(w) + \frac{h^3}{6} f'''(w) + …
# $$
#
# $$
# f(w - h) = f(w) - h f'(w) + \frac{h^2}{2} f''(w) - \frac{h^3}{6} f'''(w) + …
# $$
#
# From the first line alone, $(f(w + h) - f(w)) / h$ is $f'(w)$ with an error of $\frac{h}{2} f''(w)$: the *forward
# difference*. Subtract the second line from the first, and $f$ and $f''$ cancel:
#
# $$
# \frac{f(w + h) - f(w - h)}{2h} = f'(w) + \frac{h^2}{6} f'''(w) + …
# $$
#
# This is the *central difference*. With $h = 10^{-5}$ its error is of the size $10^{-10}$, where that of the forward
# difference is $10^{-5}$: for one more call of $f$, twice as many digits.


# %%
def central_differences(f, x, step):
    """Return the gradient of f, a number, by each element of the array x."""
    gradient = np.empty_like(x)
    for place in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[place] += step
        below[place] -= step
        gradient[place] = (f(above) - f(below)) / (2 * step)
    return gradient


# %% [markdown]
# Now we need a loss. The simplest loss that has a given upstream gradient `dout` is
# $L = ∑_{no} y_{no} · \mathrm{dout}_{no}$, for then $∂L/∂y_{no} = \mathrm{dout}_{no}$, whatever the layer does.
#
# And we need a measure of how far two gradients $a$ and $n$, the analytical and the numerical, are apart. The
# difference alone says nothing: 0.001 is much where gradients are 0.002, and little where they are 100. So we divide
# by their size:
#
# $$
# \mathrm{error} = \frac{|a - n|}{|a| + |n|}, \qquad |a| = \sqrt{∑_k a_k^2}
# $$
#
# It is 0 if they are the same, and 1 if one of them is zero, or if they point in opposite directions.

# %%
STEP = 1e-5


def error_of(analytical, numerical):
    return np.linalg.norm(analytical - numerical) / (np.linalg.norm(analytical) + np.linalg.norm(numerical))


numerical = [
    central_differences(lambda moved: ((moved @ w + b) * dout).sum(), x, STEP),
    central_differences(lambda moved: ((x @ moved + b) * dout).sum(), w, STEP),
    central_differences(lambda moved: ((x @ w + moved) * dout).sum(), b, STEP),
]
print("how far our gradients are from central differences:")
for name, analytical, witness in zip(("dx", "dw", "db"), (dx, dw, db), numerical, strict=True):
    print(f"    {name}: {error_of(analytical, witness):.0e}")
    assert error_of(analytical, witness) < 1e-9

# %% [markdown]
# That is right to ten digits and more. The library has the same tool, `tinyvit.gradcheck`; `gradient_error` takes any
# pair of a forward and a backward pass, draws a `dout`, and returns the error for each input. We use it from now on.

# %%
for ours, library in zip(numerical, numerical_gradients(linear_forward, [x, w, b], dout, STEP), strict=True):
    assert error_of(ours, library) < 1e-9
assert np.isclose(error_of(dw, 2 * dw), relative_error(dw, 2 * dw))

errors = gradient_error(linear_forward, linear_backward, [x, w, b])
print("tinyvit.gradcheck.gradient_error of dx, dw, db:", ", ".join(f"{error:.0e}" for error in errors))
assert max(errors) < 1e-9

# %% [markdown]
# What does it say of gradients that are wrong? Here are three slips that anyone can make. The last needs a layer with
# as many outputs as inputs: only then does the forgotten transposition not fail at once. That is why a check should
# use sizes that all differ, so that most slips are errors already.


# %%
def mean_for_sum(dout, cache):
    x, w = cache
    return dout @ w.T, x.T @ dout / len(x), dout.sum(axis=0)


def one_row_short(dout, cache):
    x, w = cache
    return dout @ w.T, x[1:].T @ dout[1:], dout.sum(axis=0)


def transposition_forgotten(dout, cache):
    x, w = cache
    return dout @ w, x.T @ dout, dout.sum(axis=0)


square = rng.standard_normal((6, 6))
slips = {
    "dw is a mean over the rows, not a sum": (mean_for_sum, [x, w, b]),
    "dw leaves out the first row": (one_row_short, [x, w, b]),
    "dx without the transposition, w square": (transposition_forgotten, [x, square, np.zeros(6)]),
}
print("errors of dx, dw and db, if")
for slip, (backward, inputs) in slips.items():
    errors = gradient_error(linear_forward, backward, inputs)
    print(f"    {slip:<40}", "  ".join(f"{error:.0e}" for error in errors))
    assert max(errors) > 1e-2  # nothing like 1e-10: right and wrong are far apart
    assert sorted(errors)[1] < 1e-9  # and only the wrong one of the three is accused

# %% [markdown]
# ## The step, and why smaller is not better
#
# If the error falls as $h^2$, why not take $h = 10^{-12}$? Because a computer rounds. A number in float64 is right to
# about $ε = 10^{-16}$ of its size. So $f(w + h)$ and $f(w - h)$ each have an error of about $ε |f|$; their difference
# has it too, and it is divided by $2h$. Two errors then pull in opposite directions:
#
# $$
# \mathrm{error}(h) ≈ \frac{h^2}{6} |f'''| + \frac{ε |f|}{h}
# $$
#
# The first falls as $h$ shrinks, the second grows. The sum is smallest where its derivative by $h$ is zero, at
# $h = (3 ε |f| / |f'''|)^{1/3}$: with everything else of the size of one, some $10^{-5}$. That is where the library's
# step comes from. The same thought for the forward difference gives $h ≈ \sqrt{ε} = 10^{-8}$, and an error of
# $10^{-8}$ at best, where the central one reaches $10^{-11}$.
#
# To see it we need a function that is curved; so we send the layer's output through tanh, with
# $\tanh' = 1 - \tanh^2$. (For the linear layer by itself $f'''$ is zero, and so is $f''$. No step is too large for
# it. It is the third line.)

# %%
steps = 10.0 ** np.arange(-13, 0.01, 0.5 if lesson.quick else 0.25)
z = np.tanh(y)
curved = x.T @ (dout * (1 - z**2))  # (I, O), dw when tanh follows


def loss_of_tanh(moved):
    return (np.tanh(x @ moved + b) * dout).sum()


def loss_of_linear(moved):
    return ((x @ moved + b) * dout).sum()


def forward_differences(f, x, step):
    gradient = np.empty_like(x)
    for place in np.ndindex(x.shape):
        above = x.copy()
        above[place] += step
        gradient[place] = (f(above) - f(x)) / step
    return gradient


central = [error_of(curved, central_differences(loss_of_tanh, w, step)) for step in steps]
forward = [error_of(curved, forward_differences(loss_of_tanh, w, step)) for step in steps]
straight = [error_of(dw, central_differences(loss_of_linear, w, step)) for step in steps]

best_central, best_forward = steps[np.argmin(central)], steps[np.argmin(forward)]
print(f"central difference: best step {best_central:.0e}, error {min(central):.0e}")
print(f"forward difference: best step {best_forward:.0e}, error {min(forward):.0e}")

figure, axes = lesson.figure(7, 4)
axes.loglog(steps, forward, "o-", color=ORANGE, markersize=3, label="forward difference, tanh of the layer")
axes.loglog(steps, central, "o-", color=BLUE, markersize=3, label="central difference, tanh of the layer")
axes.loglog(steps, straight, "o-", color=GREEN, markersize=3, label="central difference, the layer by itself")
for place, growth in {(4e-5, 2e-4): "as $h$", (4e-3, 3e-8): "as $h^2$", (1.5e-11, 2e-7): "as $1/h$"}.items():
    axes.text(*place, growth, color=MUTED, fontsize=TEXT)
axes.set_xlabel("step $h$")
axes.set_ylabel("relative error of $\\partial L/\\partial w$")
axes.set_title("Too large a step bends, too small a step rounds")
axes.legend()
lesson.save(figure, "step_and_error")

assert 1e-6 < best_central < 1e-4
assert 1e-9 < best_forward < 1e-6
assert min(central) < 1e-9 < min(forward)
assert straight[-1] < 1e-14 < straight[0]  # a step of 1 is the best for a straight line

# %% [markdown]
# On the right each line is as steep as Taylor says: ten times the step, ten times the error of the forward
# difference, and a hundred times that of the central one. On the left all are equally rough, and rise as the step
# shrinks: that is rounding, and no derivation helps against it. Let us measure the two slopes instead of trusting the
# eye.

# %%
bend = (steps > 1e-4) & (steps < 1e-1)
slope_central, slope_forward = np.polyfit(np.log(steps[bend]), np.log(np.array([central, forward]).T[bend]), 1)[0]
print(f"steepness on the right: central {slope_central:.2f}, forward {slope_forward:.2f}")
assert abs(slope_central - 2) < 0.1
assert abs(slope_forward - 1) < 0.1

# %% [markdown]
# ## Why the upstream gradient must be random
#
# It is tempting to take the sum of the outputs for the loss, $L = ∑ y_{no}$, which means a `dout` of nothing but
# ones. Then a backward pass that has forgotten `dout` altogether looks perfect:


# %%
def dout_forgotten(dout, cache):
    x, w = cache
    rows, outputs = dout.shape
    dx = np.tile(w.sum(axis=1), (rows, 1))
    dw = np.tile(x.sum(axis=0)[:, None], (1, outputs))
    return dx, dw, np.full(outputs, float(rows))


def errors_with(dout, forward, backward, inputs):
    """Return what gradient_error does, but with a dout of our choice."""
    analytical = backward(dout, forward(*inputs)[1])
    return [relative_error(a, n) for a, n in zip(analytical, numerical_gradients(forward, inputs, dout), strict=True)]


ones = np.ones((4, 3))
blind = errors_with(ones, linear_forward, dout_forgotten, [x, w, b])
seeing = errors_with(rng.standard_normal((4, 3)), linear_forward, dout_forgotten, [x, w, b])
print("a backward pass that forgot dout:")
print("    dout of ones:  ", "  ".join(f"{error:.0e}" for error in blind), " nothing to be seen")
print("    dout at random:", "  ".join(f"{error:.0e}" for error in seeing), " caught")
assert max(blind) < 1e-9
assert min(seeing) > 1e-2

# %% [markdown]
# It gets worse. Some operations have outputs that always add up to the same. Divide numbers by their sum, and the
# shares add up to one, whatever the numbers are:
#
# $$
# s_i = \frac{x_i}{∑_j x_j}, \qquad ∑_i s_i = 1
# $$
#
# So the true gradient of $∑_i s_i$ is zero, and a backward pass that returns zeros, and so teaches nothing, passes
# the test. The softmax of the next lesson is such an operation, and attention is built on it. With a random `dout`,
# each output has a weight of its own, and nothing cancels by accident.


# %%
def shares_forward(x):
    return x / x.sum(), None


def zeros_backward(dout, cache):
    return [np.zeros_like(dout)]


numbers = rng.uniform(1, 2, 5)
blind = errors_with(np.ones(5), shares_forward, zeros_backward, [numbers])[0]
seeing = errors_with(rng.standard_normal(5), shares_forward, zeros_backward, [numbers])[0]
print("shares of a sum, and a backward pass that returns zeros:")
print(f"    dout of ones:   {blind:.0e}  nothing to be seen")
print(f"    dout at random: {seeing:.0e}  caught")
assert blind < 1e-6
assert np.isclose(seeing, 1)

# %% [markdown]
# ## How to read a check
#
# - In float64, 1e-7 and below is right; 1e-4 and above is a bug; 1 is a gradient that is missing or has the wrong
#   sign.
# - What lies between is mostly a step of the wrong size, or an input near a kink.
# - A check in float32 is no check: with $ε ≈ 10^{-7}$, the best that central differences can do is some $10^{-5}$.
# - Small, odd sizes, all of them different; every input random; `dout` random.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/02_linear_layer.py`.
#
# **1.** A batch of images, each of several tokens: `dout` has the shape (B, T, O), and the bias was added to every
# token of every image. What is `db`?


# %%
def exercise_1(dout):
    """Return db (O,) for dout (B, T, O)."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** A gain for every column: $y_{ni} = x_{ni} g_i$. Derive both gradients as above: where does $x_{ni}$ occur,
# and where $g_i$? (Layer norm, in lesson 06, ends with this.)


# %%
def exercise_2(dout, x, g):
    """Return dx (N, I), dg (I,) of y = x * g, for dout (N, I), x (N, I), g (I,)."""
    return ..., ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** A model with a million weights cannot be checked one weight at a time. But the slope along *one* direction
# $u$ through all of them can be: $∑_k u_k ∂f/∂x_k$. Find it with two calls of `f`.


# %%
def exercise_3(f, x, u, step):
    """Return the slope of f, a function of an array that returns a number, at x along u: a central difference."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** The same weight, used twice: $h = x w$ and $y = h w^T$, so $y_{nj} = ∑_o h_{no} w_{jo}$. There are two ways
# from $w$ to the loss. What does the chain rule say of two ways? Check yourself with `gradient_error` before the
# check does.


# %%
def exercise_4(dout, x, w):
    """Return dx (N, I), dw (I, O) of y = (x @ w) @ w.T, for dout (N, I), x (N, I), w (I, O)."""
    return ..., ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import `linear_forward`, `linear_backward` and `gradient_error`. A layer needs a loss behind it: the
# next lesson makes a classifier of it.
