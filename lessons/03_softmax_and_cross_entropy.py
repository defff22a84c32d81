# %% [markdown]
r"""
# 03 Softmax and cross-entropy

**Goal.** To turn scores into probabilities without overflow, to say in one number how wrong they are, and to derive
how each score should change. Then a linear layer learns to read nine digits out of ten.

**The one equation.** For image $n$ and class $c$, the gradient of the loss by the score $z_{nc}$ is what was said
minus what is true:

$$
\frac{∂L}{∂z_{nc}} = \frac{1}{N} (p_{nc} - y_{nc})
$$

**Source.** J. Bridle, *Probabilistic Interpretation of Feedforward Classification Network Outputs, with Relationships
to Statistical Pattern Recognition*, 1990. For the arithmetic: P. Blanchard, D. Higham and N. Higham, *Accurately
computing the log-sum-exp and softmax functions*, 2021.

**Time.** An hour to read and play, ten to thirty minutes an exercise. The script runs in a few seconds.
"""

# %%
import numpy as np
from kit import BLUE, MUTED, ORANGE, SMALL, Lesson, show

from tinyvit import reference
from tinyvit.data import load_mnist
from tinyvit.gradcheck import gradient_error
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward, linear_backward, linear_forward

lesson = Lesson("03_softmax_and_cross_entropy")
rng = np.random.default_rng(3)

# %% [markdown]
# ## From scores to probabilities
#
# Let a linear layer have ten outputs, one for each digit. Its outputs $z_c$ are *scores*, or *logits*: any number,
# large if the image looks like digit $c$. The largest score decides. But to learn from examples we need more than a
# decision: we need to know how *nearly* it would have been right. So we turn the scores into probabilities, by the
# *softmax*:
#
# $$
# p_c = \frac{\exp(z_c)}{∑_k \exp(z_k)}
# $$
#
# The exponential makes every number positive, the division makes them add up to one, and the order stays what it was.
# Compare two classes, and the sum cancels:
#
# $$
# \frac{p_a}{p_b} = \exp(z_a - z_b)
# $$
#
# So what counts is the difference of scores. One more is $e ≈ 2.7$ times as probable. And if the same number is added
# to *all* scores, nothing changes at all.


# %%
def softmax_naive(z):
    """Return p (N, C), as the equation says it, for the scores z (N, C)."""
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


z = np.array([[2.0, 1.0, -1.0, 0.0]])  # (N, C) = (1, 4)
p = softmax_naive(z)
print("scores        ", "  ".join(f"{score:5.1f}" for score in z[0]))
print("probabilities ", "  ".join(f"{share:5.3f}" for share in p[0]))

assert abs(p.sum() - 1) < 1e-15
assert np.isclose(p[0, 0] / p[0, 1], np.e)
assert np.allclose(softmax_naive(z + 5), p, rtol=1e-14)

# %% [markdown]
# ## The exponential overflows
#
# $e^{710}$ is more than float64 can hold, and float32 gives up at $e^{89}$. It becomes infinity, and infinity divided
# by infinity is no number. Large negative scores are no better: all exponentials become zero, and we divide zero by
# zero.


# %%
with np.errstate(over="ignore", invalid="ignore"):  # NumPy would warn, and rightly
    for scores in ([1000.0, 999.0], [-1000.0, -1001.0]):
        print(f"softmax of {scores}, as the equation says it: {softmax_naive(np.array([scores]))[0]}")
        assert np.isnan(softmax_naive(np.array([scores]))).all()

# %% [markdown]
# Yet the answer is harmless: one score is larger by one, so it is 2.7 times as probable. And as only differences
# count, we may subtract what we like from all scores. We subtract the largest, $m = \max_k z_k$. Then the largest
# exponent is zero: nothing can overflow, and the sum is at least one, so that nothing is divided by zero.
#
# The same for the logarithm of the sum, which we shall need more often than the sum itself:
#
# $$
# \mathrm{LSE}(z) = \log ∑_k \exp(z_k) = \log \left( e^m ∑_k \exp(z_k - m) \right) = m + \log ∑_k \exp(z_k - m)
# $$
#
# This is the *log-sum-exp*. Of the last sum we know that it lies between one and $C$, the number of classes. So
#
# $$
# \max_k z_k ≤ \mathrm{LSE}(z) ≤ \max_k z_k + \log C
# $$
#
# It is a maximum with its corner rounded off, and it never overflows.


# %%
def log_sum_exp(z):
    """Return the log-sum-exp (N, 1) of each row of z (N, C)."""
    largest = z.max(axis=1, keepdims=True)  # (N, 1)
    return largest + np.log(np.exp(z - largest).sum(axis=1, keepdims=True))


def softmax(z):
    """Return p (N, C); log p = z - LSE(z), and its exponential is never above 1."""
    return np.exp(z - log_sum_exp(z))


print("softmax of [1000, 999] and of [-1000, -1001], by log-sum-exp:")
print("   ", *softmax(np.array([[1000.0, 999.0], [-1000.0, -1001.0]])).round(3).tolist())
assert np.allclose(softmax(z), p, rtol=1e-14)
assert np.allclose(softmax(z + 1000), p, rtol=1e-12)

scores = rng.normal(scale=100, size=(1000, 10))
excess = log_sum_exp(scores)[:, 0] - scores.max(axis=1)
assert excess.min() >= 0
assert excess.max() <= np.log(10)

# %% [markdown]
# There is a second trap at the other end. A class that is a thousand below the best has $p = e^{-1000}$, which
# float64 rounds to zero, and the logarithm of zero is minus infinity. But $\log p_c = z_c - \mathrm{LSE}(z)$ is
# plainly $-1000$. So: never take the logarithm of a probability. Compute the logarithm first, and the probability
# from it.

# %%
far = np.array([[0.0, -1000.0]])
print(f"log p of a class a thousand below: {(far - log_sum_exp(far))[0, 1]:.0f}; its p is {softmax(far)[0, 1]:g}")
assert softmax(far)[0, 1] == 0
assert (far - log_sum_exp(far))[0, 1] == -1000

# %% [markdown]
# ## How wrong is it?
#
# The model says $p_{nc}$, and the label of image $n$ is $l_n$. A good model gives the labels that were really
# observed a high probability. All $N$ of them together have the product $∏_n p_{n l_n}$. The logarithm makes a sum of
# the product, the minus sign makes small what is good, and $1/N$ makes it the same for few images as for many:
#
# $$
# L = -\frac{1}{N} ∑_n \log p_{n l_n} = -\frac{1}{N} ∑_n ∑_c y_{nc} \log p_{nc}
# $$
#
# In the second form, $y_{nc}$ is 1 if $c$ is the label and 0 otherwise: the rows of exercise 3 in lesson 01. This is
# the *cross-entropy*. Put in $\log p_{nc} = z_{nc} - \mathrm{LSE}(z_n)$. As the $y_{nc}$ of an image add up to one,
#
# $$
# L = \frac{1}{N} ∑_n \left( \mathrm{LSE}(z_n) - ∑_c y_{nc} z_{nc} \right)
# $$
#
# which needs no probability at all. It says: the score of the label should be as large as the soft maximum of all.


# %%
def cross_entropy_by_index(z, labels):
    """Return the loss, one image after the other."""
    return sum(log_sum_exp(z)[n, 0] - z[n, labels[n]] for n in range(len(z))) / len(z)


z = 3 * rng.standard_normal((5, 10))  # (N, C)
labels = rng.integers(10, size=5)
y = np.eye(10)[labels]  # (N, C)
loss = np.mean(log_sum_exp(z)[:, 0] - (y * z).sum(axis=1))

assert np.isclose(loss, cross_entropy_by_index(z, labels))
assert np.isclose(loss, cross_entropy_forward(z, labels)[0])
print(f"loss of 5 rows of random scores: {loss:.3f}, the same by index and by tinyvit")

knows_nothing = cross_entropy_forward(np.zeros((5, 10)), labels)[0]
print(f"loss of a model that knows nothing, p = 1/10 for all: {knows_nothing:.3f} = log 10")
assert np.isclose(knows_nothing, np.log(10))

# %% [markdown]
# Remember that number. An untrained classifier of ten classes should begin near 2.303. If yours begins at 7, it is
# sure of something that it cannot know.
#
# ## The gradient
#
# We need the derivative of log-sum-exp. By the chain rule, with $\log' s = 1/s$, and as $z_i$ occurs in one term of
# the sum:
#
# $$
# \frac{∂ \mathrm{LSE}(z)}{∂z_i} = \frac{1}{∑_k \exp(z_k)} \frac{∂}{∂z_i} ∑_k \exp(z_k)
# = \frac{\exp(z_i)}{∑_k \exp(z_k)} = p_i
# $$
#
# The slope of the soft maximum is the softmax. That is its whole secret, and the rest is one line. $z_{nc}$ occurs in
# the term of image $n$ alone, once in $\mathrm{LSE}(z_n)$, with the slope $p_{nc}$, and once with the factor
# $-y_{nc}$:
#
# $$
# \frac{∂L}{∂z_{nc}} = \frac{1}{N} (p_{nc} - y_{nc})
# $$
#
# The label's score is pushed up, by as much as its probability falls short of one. Every other score is pushed down,
# by the probability that it was given. The pushes on an image add up to zero: what one class gains, the others lose.
#
# Behind the loss comes nothing, so its `dout` is a single number, $∂L/∂L = 1$, called `dloss` in the library.


# %%
def cross_entropy_backward_by_index(z, labels):
    """Return dz (N, C), one score after the other."""
    dz = np.zeros(z.shape)
    for n, c in np.ndindex(z.shape):
        p = np.exp(z[n, c]) / sum(np.exp(z[n, k]) for k in range(z.shape[1]))
        dz[n, c] = (p - (c == labels[n])) / len(z)
    return dz


dz = (softmax(z) - y) / len(z)  # (N, C)

assert np.allclose(dz, cross_entropy_backward_by_index(z, labels), atol=1e-15)
assert np.allclose(dz, cross_entropy_backward(1.0, cross_entropy_forward(z, labels)[1]), atol=1e-15)
assert np.abs(dz.sum(axis=1)).max() < 1e-15

error = gradient_error(lambda z: cross_entropy_forward(z, labels), cross_entropy_backward, [z])[0]
print(f"dz: the same by index, by array and by tinyvit; gradient check: {error:.0e}")
assert error < 1e-8

# %% [markdown]
# The softmax, the loss and its gradient in `tinyvit/reference.py` give the same numbers.

# %%
np.testing.assert_allclose(softmax(z), reference.softmax_forward(z)[0], rtol=1e-10, atol=1e-12)
reference_loss, reference_cache = reference.cross_entropy_forward(z, labels)
np.testing.assert_allclose(loss, reference_loss, rtol=1e-10, atol=1e-12)
np.testing.assert_allclose(dz, reference.cross_entropy_backward(reference_cache), rtol=1e-10, atol=1e-12)
print("the softmax, the loss and dz are those of tinyvit/reference.py")

# %% [markdown]
# ## Why not the squared error?
#
# One could also ask that $(p_c - 1)^2$ be small for the label $c$. Take two classes, with the scores $z$ and 0, and
# let the first be the label. Then $p = 1 / (1 + e^{-z})$, with $p' = p (1 - p)$, and the two losses have the slopes
#
# $$
# \frac{d}{dz} (-\log p) = p - 1, \qquad \frac{d}{dz} (p - 1)^2 = 2 (p - 1) \, p \, (1 - p)
# $$
#
# Where the model is sure and wrong, $p ≈ 0$, the first is $-1$: a firm push. The second is zero. The more wrong the
# model is, the less it learns from the squared error. The logarithm of the cross-entropy cancels the exponential of
# the softmax; they belong together.

# %%
line = np.linspace(-6, 6, 241)
pair = np.stack([line, np.zeros_like(line)], axis=1)  # (241, 2), the scores of two classes
p = softmax(pair)[:, 0]

figure, panels = lesson.figure(7, 2.6, columns=3)
panels[0].plot(line, np.maximum(line, 0), color=MUTED, linestyle="--", label="$\\max(z, 0)$")
panels[0].plot(line, log_sum_exp(pair)[:, 0], color=BLUE, label="LSE$(z, 0)$")
panels[0].set_title("A maximum, rounded off")
panels[1].plot(line, line > 0, color=MUTED, linestyle="--", label="slope of the maximum")
panels[1].plot(line, p, color=BLUE, label="slope of LSE: $p$")
panels[1].set_title("Its slope is the softmax")
panels[1].set_ylim(-0.05, 1.55)
panels[2].plot(line, p - 1, color=BLUE, label="cross-entropy")
panels[2].plot(line, 2 * (p - 1) * p * (1 - p), color=ORANGE, label="squared error")
panels[2].set_title("How hard two losses pull")
panels[2].set_ylim(-1.05, 0.55)
panels[2].set_ylabel("slope of the loss")
for axes in panels:
    axes.set_xlabel("score $z$, the other being 0")
    axes.set_xticks([-6, -3, 0, 3, 6])
    axes.legend(loc="upper left")
lesson.save(figure, "soft_maximum")

wrong = line == -6
assert abs((p - 1)[wrong]) > 0.99
assert abs((2 * (p - 1) * p * (1 - p))[wrong]) < 0.01

# %% [markdown]
# ## A classifier
#
# Now we put two things together: a linear layer, and this loss. The backward pass goes the other way round, and each
# part hands its gradient to the one below. That is all there is to *backpropagation*. We check the two together, on
# four pieces of digits.


# %%
def classifier_forward(x, w, b, labels):
    logits, linear_cache = linear_forward(x, w, b)  # (N, C)
    loss, loss_cache = cross_entropy_forward(logits, labels)
    return loss, (linear_cache, loss_cache)


def classifier_backward(dloss, cache):
    linear_cache, loss_cache = cache
    dlogits = cross_entropy_backward(dloss, loss_cache)
    return linear_backward(dlogits, linear_cache)  # dx, dw, db


mnist = load_mnist()
piece = mnist.train_images[:4, 14, 10:16] / 255  # (4, 6)
inputs = [piece, rng.standard_normal((6, 10)), rng.standard_normal(10)]
errors = gradient_error(
    lambda x, w, b: classifier_forward(x, w, b, mnist.train_labels[:4]), classifier_backward, inputs
)
print("gradient check of the classifier, dx, dw, db:", ", ".join(f"{error:.0e}" for error in errors))
assert max(errors) < 1e-8

# %% [markdown]
# ## What the first step does
#
# An image is a row of 784 pixels, from 0 to 1. Let all weights begin at zero; then all scores are zero, and
# $p_{nc} = 1/10$. Write down the gradient of the weight from pixel $i$ to class $c$, by lesson 02:
#
# $$
# \frac{∂L}{∂w_{ic}} = \frac{1}{N} ∑_n x_{ni} (p_{nc} - y_{nc}) = \frac{1}{10} \bar{x}_i - \frac{N_c}{N} \bar{x}_{ic}
# $$
#
# Here $\bar{x}_i$ is the mean of pixel $i$ over all images, $\bar{x}_{ic}$ its mean over the $N_c$ images of class
# $c$, and a class has about a tenth of the images. So after one step downhill, the weights of a 3 are the mean 3
# minus the mean of everything, but for a factor: a picture like the last one of lesson 01. After that, learning is a
# matter of mistakes. An image that was read well has $p ≈ y$ and changes nothing. One that was not is added to the
# weights of its own class, and taken off those of the class that it was mistaken for.
#
# ## Learning
#
# The gradient over 55,000 images costs about a thousand times as much as that over 50, and is not a thousand times as
# good. So we shuffle, and take a step for every *batch* of 50 images: *stochastic gradient descent*. A pass over all
# images is an *epoch*. The learning rate, the length of the steps, falls to zero in a line, so that the noise of the
# small batches dies away. The last 5,000 training images are kept out, to watch whether what is learned holds for
# other images: they are the *validation* images. The test images stay where they are until the very end.

# %%
PIXELS, CLASSES, BATCH, RATE = 784, 10, 50, 0.2
epochs = 3 if lesson.quick else 10

x = mnist.train_images.reshape(-1, PIXELS).astype(np.float32) / 255  # (60000, 784), float32 for speed
x, validation_x = x[:-5000], x[-5000:]
labels, validation_labels = mnist.train_labels[:-5000], mnist.train_labels[-5000:]


def accuracy(x, labels, w, b):
    return np.mean(linear_forward(x, w, b)[0].argmax(axis=1) == labels)


w = np.zeros((PIXELS, CLASSES), np.float32)
b = np.zeros(CLASSES, np.float32)
loss, cache = classifier_forward(x, w, b, labels)
first_step = -classifier_backward(1.0, cache)[1]  # (784, 10), downhill for all images at once

for c in range(CLASSES):
    share = np.mean(labels == c)
    mean_of_class = x[labels == c].mean(axis=0, dtype=np.float64)
    assert np.allclose(first_step[:, c], share * mean_of_class - x.mean(axis=0, dtype=np.float64) / 10, atol=1e-5)

steps = epochs * len(x) // BATCH
losses, step = [], 0
for epoch in range(epochs):
    order = rng.permutation(len(x))
    for start in range(0, len(x), BATCH):
        chosen = order[start : start + BATCH]
        loss, cache = classifier_forward(x[chosen], w, b, labels[chosen])
        _, dw, db = classifier_backward(1.0, cache)
        rate = RATE * (1 - step / steps)
        w -= rate * dw
        b -= rate * db
        losses.append(loss)
        step += 1
    recent = np.mean(losses[-len(x) // BATCH :])
    print(
        f"epoch {epoch + 1}: loss {recent:.3f} in training, "
        f"{accuracy(validation_x, validation_labels, w, b):.1%} of the validation images right"
    )

assert np.isclose(losses[0], np.log(10), rtol=1e-5)

# %% [markdown]
# The first loss was $\log 10$, as it must be. Now the test images, once:

# %%
test_x = mnist.test_images.reshape(-1, PIXELS).astype(np.float32) / 255
test_accuracy = accuracy(test_x, mnist.test_labels, w, b)
train_accuracy = accuracy(x, labels, w, b)
print(f"{w.size + b.size:,} numbers read {test_accuracy:.1%} of the test images right,")
print(f"    and {train_accuracy:.1%} of those they were trained on")
assert w.size + b.size == 7850
assert 0.91 < test_accuracy < 0.935  # about 92 %
assert abs(train_accuracy - test_accuracy) < 0.02
assert accuracy(validation_x, validation_labels, w, b) > train_accuracy

# %% [markdown]
# About 92 %, with 7,850 numbers. Exercise 4 of lesson 01, which took the nearest mean, had 82 %. The images that it
# was trained on are not read much better, so it has not learned them by heart: a linear layer cannot do more. (And
# the validation images are read better still. They are the last in the file, and happen to be tidy ones. To compare
# one setting with another they serve; how good a model is, the test images tell.)
#
# ## What has it learned?
#
# Every class has a weight for every pixel, so its weights *are* an image. Purple: ink here speaks for the class.
# Orange: ink here speaks against it. Of each pair, above is what the first step makes of all the images; below, what
# the mistakes have made of it since.

# %%
figure, panels = lesson.figure(7, 5.9, rows=4, columns=5)
for c in range(CLASSES):
    above, below = panels[c // 5 * 2 : c // 5 * 2 + 2, c % 5]
    show(above, first_step[:, c].reshape(28, 28), f"{c}", signed=True)
    show(below, w[:, c].reshape(28, 28), signed=True)
for above, below in panels[:, 0].reshape(2, 2):
    above.set_ylabel("first step")
    below.set_ylabel("after training")
lesson.save(figure, "weights")

never = ~mnist.train_images[:-5000].reshape(-1, PIXELS).any(axis=0)  # (784,)
print(f"{never.sum()} pixels are never lit; their weights are still exactly zero")
assert (w[never] == 0).all()

# %% [markdown]
# See how the 0 is afraid of ink in the middle, and how the others have become ragged. The first step knows what a 3
# looks like; after training the weights know what tells a 3 from a 5 and an 8, and hang on single pixels to do so.
# (At the rim the weights are zero: a gradient has $x_{ni}$ for a factor, and a pixel that is never lit teaches
# nothing.)
#
# ## Where it is sure and wrong
#
# The loss punishes being sure and wrong. Here are the validation images with the largest loss, and what was said of
# them.

# %%
logits = linear_forward(validation_x, w, b)[0]
said = softmax(logits)  # (5000, 10)
costs = -np.log(said[np.arange(5000), validation_labels])
worst = np.argsort(costs)[::-1][:8]

figure, panels = lesson.figure(7, 4.3, rows=2, columns=4)
for axes, n in zip(panels.flat, worst, strict=True):
    guess, label = said[n].argmax(), validation_labels[n]
    show(axes, validation_x[n].reshape(28, 28), f"{label}, read as {guess}")
    axes.set_xlabel(f"{said[n, guess]:.1%} sure, loss {costs[n]:.1f}", fontsize=SMALL)
lesson.save(figure, "mistakes")

assert (said[worst].argmax(axis=1) != validation_labels[worst]).all()

# %% [markdown]
# Some of these we would not read either, and others we read without a thought. A linear layer weighs each pixel by
# itself, and cannot say "ink here, *but only if* there is none there". That takes a second layer, and something
# between the two: lesson 05.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/03_softmax_and_cross_entropy.py`.
#
# **1.** Attention will need the log-sum-exp along the last axis, whatever axes come before it. Let it not overflow.


# %%
def exercise_1(z):
    """Return the log-sum-exp (...) along the last axis of z (..., C)."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** With two classes, one score is enough: take the other for zero. Let $y$ be 1 if the first class is right and
# 0 if it is not; so the loss is $-\log p$ if $y = 1$ and $-\log (1 - p)$ if $y = 0$, with $p = 1 / (1 + e^{-z})$.
# Write both as one formula, with a log-sum-exp in it, and derive the slope. Scores of a thousand must do.


# %%
def exercise_2(z, y):
    """Return the loss of each of N scores, (N,), and its derivative by z, (N,), for z (N,) and y (N,) of 0 and 1."""
    return ..., ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Nobody is ever quite sure. *Label smoothing* takes the share $s$ of the target off the label and gives it to
# all $C$ classes evenly, so $y_{nc}$ becomes $(1 - s) \, y_{nc} + s / C$. What happens to the loss, and to its
# gradient? (The tuned training of this library uses it.)


# %%
def exercise_3(z, labels, s):
    """Return the mean loss, a number, and dz (N, C) for z (N, C), labels (N,) and the share s."""
    return ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** Cut the operation in two: $a_c = z_c - \mathrm{LSE}(z)$ is the *log-softmax*, and what comes behind it is
# anybody's guess. So derive $∂L/∂z_i$ for *any* upstream gradient $∂L/∂a_c$. Each $z_i$ acts on its own output, and
# on all outputs through the log-sum-exp. Which upstream gradient gives $p - y$ back? (Lesson 08 does this to the
# softmax itself.)


# %%
def exercise_4(dout, z):
    """Return dz (N, C) of a = log softmax(z) along each row, for dout (N, C), z (N, C)."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import the loss as well. The classifier was trained by the plainest method there is, with one
# learning rate for all weights. The next lesson is about better ones, up to the one that trains every transformer:
# Adam.
