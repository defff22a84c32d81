# %% [markdown]
r"""
# 13 Looking inside

**Goal.** To ask a trained model four questions: what do you look at? what have you learned about places? where do you
err? and do you know it when you do? And to check the answers, for a picture that explains is not yet an explanation
that is true.

**The one equation.** In each block a token is half what it was, and half a mixture of what it attended to. What came
from where, through all blocks, is a product:

$$
R = A^{(L)} A^{(L-1)} ⋯ A^{(1)}, \qquad A^{(l)}_{ij} = \frac{1}{2} δ_{ij} + \frac{1}{2H} ∑_h w^{(l)}_{hij}
$$

Here $w^{(l)}_{hij}$ is the weight with which token $i$ attends to token $j$, in head $h$ of block $l$; $δ_{ij}$ is 1
if $i = j$ and else 0.

**Source.** S. Abnar and W. Zuidema, *Quantifying Attention Flow in Transformers*, 2020, for attention rollout. C.
Guo, G. Pleiss, Y. Sun and K. Weinberger, *On Calibration of Modern Neural Networks*, 2017, for calibration and
temperature.

**Time.** An hour and a half to read and play, ten to thirty minutes an exercise. The script runs for half a minute.
"""

# %%
import numpy as np
from kit import BLUE, GREEN, INK, MUTED, ORANGE, PINK, SMALL, TEXT, Lesson, show

from tinyvit import VisionTransformer
from tinyvit.data import load_mnist
from tinyvit.evaluate import (
    attention_rollout,
    calibration_error,
    confusion,
    evaluation_of_logits,
    misclassified,
    patch_maps,
)
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, block_attention, initialise, vit_backward_to_images, vit_forward
from tinyvit.ops import patches_backward, patches_forward, softmax_forward
from tinyvit.plots import RELEVANCE
from tinyvit.training import Training, TrainingConfig

lesson = Lesson("13_looking_inside")
rng = np.random.default_rng(13)
mnist = load_mnist()

# %% [markdown]
# ## A model to look into
#
# We train one, as in the last lesson, but with patches of 4x4 pixels: 49 of them, so that there is more to see. It is
# small and has few images, so it errs more often than it need. For this lesson that is welcome. Nothing is chosen by
# the test images in what follows, so we may look at them.

# %%
config = ViTConfig(patch_size=4, width=48, depth=2, heads=4, mlp_width=96)
count, epochs, held_back = (1000, 5, 200) if lesson.quick else (4000, 8, 800)
training = Training(
    config,
    TrainingConfig(
        epochs=epochs, learning_rate=3e-3, schedule="cosine", warmup_steps=30, beta2=0.98, validation=held_back
    ),
    mnist.train_images[-count - held_back :],
    mnist.train_labels[-count - held_back :],
    get_backend("cpu"),
    workers=1,
)
training.run()
model = VisionTransformer(config, training.state.weights)
parameters = model.parameters

tested = 1000 if lesson.quick else 5000
test_images, test_labels = mnist.test_images[:tested], mnist.test_labels[:tested]
test = model.evaluate(test_images, test_labels)
print(f"trained on {count:,} images; right: {test.accuracy:.1%} of {tested:,} test images")
assert test.accuracy > (0.4 if lesson.quick else 0.85)

# %% [markdown]
# ## What does it look at?
#
# The class token ends as a mixture of everything. Attention weights say who looked at whom in one block, but what a
# token holds in the second block is already a mixture, made in the first. Let $r^{(l)}_{ij}$ be the share of the
# input token $j$ in what token $i$ holds after block $l$. At the start each token holds itself:
# $r^{(0)}_{ij} = δ_{ij}$. A block replaces token $i$ by the sum of itself (the residual branch) and what its heads
# brought. If both count one half, then
#
# $$
# r^{(l)}_{ij} = ∑_k A^{(l)}_{ik} \, r^{(l-1)}_{kj}
# $$
#
# with the matrix $A$ of the equation at the top. That is a product of matrices, so $R = r^{(L)}$ is the product of
# all. The rows of $A$ sum to one, hence the rows of $R$ do: shares, indeed. Row 0 belongs to the class token.
#
# Two things in this are assumed, not derived: that the two branches count the same, and that a value arrives as it
# was sent, as if there were no MLP and no projection. So it is a guess. We compute it first and judge it after.


# %%
def rollout_by_index(weights):
    """Return row 0 of R, (T,), for the attention weights of one image: for each block (H, S, T), S being 1 or T."""
    tokens = weights[0].shape[-1]
    share = np.eye(tokens)
    for block in weights:
        mean = block.mean(axis=0)  # (S, T), over the heads
        new = np.zeros(mean.shape)
        for i, j in np.ndindex(new.shape):
            new[i, j] = sum((0.5 * (i == k) + 0.5 * mean[i, k]) * share[k, j] for k in range(tokens))
        share = new
    return share[0]


some = test_images[:7]
_, cache = vit_forward(some, parameters, config)
attention = block_attention(cache)  # for each block (B, H, S, T); in the last, the class token alone asks
ours = rollout_by_index([block[0].astype(np.float64) for block in attention])
library = attention_rollout(some, parameters, config)  # (B, N): the shares of the patches
assert np.allclose(ours[1:], library[0], atol=1e-6)
assert np.isclose(ours.sum(), 1)
print("attention rollout by index and tinyvit.evaluate.attention_rollout: the same")
print(f"of what the class token holds in the end, {ours[1:].sum():.0%} came from the patches, the rest was its own")

# %% [markdown]
# ## A second witness: the gradient
#
# Rollout looks at attention alone. Here is another answer, which looks at the whole function. How would the logarithm
# of the probability $p_c$ of the predicted class change, if a patch were blank? By Taylor, to first order, if the
# pixels $x_i$ of the patch all go to zero:
#
# $$
# \ln p_c(\mathrm{blank}) ≈ \ln p_c - ∑_{i\, \mathrm{in\; patch}} x_i \frac{∂ \ln p_c}{∂ x_i}
# $$
#
# So the sum says how much the patch speaks for the prediction: *gradient times ink*. By lesson 03, the gradient of
# $\ln p_c$ by the logits is $δ_{cj} - p_j$. We send it down to the pixels.


# %%
def gradient_times_ink(images):
    """Return how much each patch speaks for the predicted class, (B, N), to first order."""
    pixels = images.astype(np.float32) / 255
    logits, cache = vit_forward(pixels, parameters, config)
    probabilities, _ = softmax_forward(logits)
    predicted = np.eye(config.classes, dtype=np.float32)[logits.argmax(axis=1)]
    _, dpixels = vit_backward_to_images(predicted - probabilities, cache)
    return patches_forward(pixels * dpixels, config.patch_size).sum(axis=-1)


def overlay(axes, image, patches, colours, high, low=0.0):
    """Draw a digit in ink over a map of its patches."""
    axes.imshow(patches, cmap=colours, vmin=low, vmax=high, extent=(0, 28, 28, 0))
    axes.imshow(np.dstack([np.zeros((28, 28, 3)), image / 255 * 0.85]), extent=(0, 28, 28, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


speaking = gradient_times_ink(some)
figure, grid = lesson.figure(7, 2.8, rows=2, columns=7)
figure.get_layout_engine().set(h_pad=0.13)  # inches: room for a title a row
for column, image in enumerate(some):
    overlay(grid[0, column], image, patch_maps(library)[column], RELEVANCE, library.max())
    most = np.abs(speaking[column]).max()
    overlay(grid[1, column], image, patch_maps(speaking)[column], "PuOr", most, -most)
titles = "Attention rollout: the more, the darker", "Gradient times ink: for (violet) or against"
for axes, title in zip(grid[:, 0], titles, strict=True):
    axes.text(0, -1.5, title, fontsize=TEXT).set_in_layout(False)  # longer than a column is wide
lesson.save(figure, "what_it_looks_at")

# %% [markdown]
# ## Is the picture true?
#
# Both rows look plausible. That is the trouble with such pictures: whatever falls on the digit looks plausible. So we
# test them. If a map knows which patches matter, then to blank those that it names must do more harm than to blank
# others. We blank the first 2, 4, 8 and 12 patches of each map, classify again, and compare with three maps that know
# nothing about the model: patches at random; patches at random among those with ink; and those with the most ink.

# %%
number_judged = 100 if lesson.quick else 400
judged, truth = test_images[:number_judged], test_labels[:number_judged]
patches = patches_forward(judged, config.patch_size)  # (B, N, 16)
ink = patches.sum(axis=-1, dtype=np.int64)  # (B, N)
by_chance = rng.random(ink.shape)
maps = {
    "patches at random": by_chance,
    "attention rollout": attention_rollout(judged, parameters, config),
    "at random, with ink": by_chance * (ink > 0),
    "the most ink": ink,
    "gradient times ink": gradient_times_ink(judged),
}


def accuracy_without(importance, number):
    """Return the accuracy when of each image the `number` patches of greatest importance (B, N) are blank."""
    blank = np.argsort(-importance, axis=1)[:, :number]
    left = patches.copy()
    np.put_along_axis(left, blank[:, :, None], 0, axis=1)
    return model.evaluate(patches_backward(left, judged.shape, config.patch_size), truth).accuracy


numbers = [2, 4, 8, 12]
print(f"right, of {number_judged} test images, with none of 49 patches blank, and with 2, 4, 8 and 12:")
untouched = model.evaluate(judged, truth).accuracy
harm = {}
for name, importance in maps.items():
    harm[name] = np.array([untouched, *(accuracy_without(importance, number) for number in numbers)])
    print(f"    {name:<21}", "  ".join(f"{share:4.0%}" for share in harm[name]))

assert harm["attention rollout"][3:].mean() < harm["patches at random"][3:].mean()
assert harm["gradient times ink"][1:3].mean() < harm["attention rollout"][1:3].mean()
assert harm["the most ink"].mean() < harm["attention rollout"].mean()

figure, axes = lesson.figure(7, 3.1)
for (name, shares), colour in zip(harm.items(), (MUTED, BLUE, GREEN, PINK, ORANGE), strict=True):
    axes.plot([0, *numbers], 100 * shares, "o-", color=colour, markersize=4, label=name)
axes.set_xlabel("blank patches, of 49")
axes.set_ylabel("right, %")
axes.set_ylim(0, 100)
axes.set_title("A map that knows what matters does harm when it is followed")
axes.legend()
lesson.save(figure, "is_it_true")

# %% [markdown]
# This is sobering. Rollout beats patches at random, many of which are bare paper. But it is about as good as patches
# at random *with ink*, and to count ink, which needs no model at all, does more harm. Attention says where
# information flowed *from*; an empty corner may be asked, and answer "nothing here", which is worth knowing. It does
# not say what decided. The gradient of the function does more harm with few patches, and being a straight line beside
# a curved function, loses its lead with many.
#
# So read an attention map as what it is, a map of the traffic. And judge every picture that explains by asking what
# it would look like if it were wrong.
#
# ## What has it learned about places?
#
# Nobody told the model which patches are neighbours. Each position is a vector $P_i$, added to its patch, and it
# began at random. Have neighbours become alike? The usual measure is the cosine of the angle between two vectors:
#
# $$
# \cos(a, b) = \frac{∑_d a_d b_d}{\sqrt{∑_d a_d^2} \, \sqrt{∑_d b_d^2}}
# $$
#
# It is 1 for the same direction. Between two random vectors of width $D$ it is about $1/\sqrt{D}$, here 0.14, to
# either side of zero. Our positions began as loud random numbers and the run was short, so we look at what *training
# changed*, position now minus position at the start.
#
# What would you expect? Write it down before you run the cell. (Neighbours alike, perhaps, as they show parts of one
# stroke?)

# %%
start = initialise(config, training.config.seed)["positions"]
change = (parameters["positions"] - start)[1:].astype(np.float64)  # (N, D), without the class token's
unit = change / np.linalg.norm(change, axis=1, keepdims=True)
similarity = unit @ unit.T  # (N, N)

side = config.image_size // config.patch_size
places = np.stack(np.divmod(np.arange(side * side), side), axis=1)  # (N, 2): row, column
offsets = places[:, None] - places[None]  # (N, N, 2): how far down and across from one to the other


inner = ((places > 0) & (places < side - 1)).all(axis=1)  # (N,), without the patches along the edge
both_inner, both_edge = inner[:, None] & inner, ~inner[:, None] & ~inner
steps = np.abs(offsets).sum(axis=-1)  # (N, N): from one to the other


def mean_similarity(pairs):
    """Return the mean over those of the pairs (N, N) that are two different places."""
    return similarity[pairs & (steps > 0)].mean()


print(f"training changed the positions by {np.linalg.norm(change) / np.linalg.norm(start[1:]):.0%} of their length")
neighbours, distant = (mean_similarity(both_inner & chosen) for chosen in (steps == 1, steps > 3))
print("mean cosine of what was changed:")
print(f"    inner places, neighbours             {neighbours:5.2f}")
print(f"    inner places, more than 3 steps away {distant:5.2f}")
print(f"    places along the edge, near or far   {mean_similarity(both_edge):5.2f}")
assert mean_similarity(both_edge) > mean_similarity(both_inner) + (0.02 if lesson.quick else 0.1)

figure, (left, middle, right) = lesson.figure(7, 2.3, columns=3, width_ratios=(1, 1, 1.4))
for axes, (row, column), name in ((left, (0, 0), "a corner"), (middle, (3, 3), "the middle")):
    alike = similarity[row * side + column].copy()
    alike[row * side + column] = np.nan  # each with itself is 1, which would leave no colour for the rest
    axes.imshow(alike.reshape(side, side), cmap="PuOr", vmin=-0.7, vmax=0.7)
    axes.plot(column, row, "o", color=INK, markersize=5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_title(f"Cosine with {name}")
for pairs, colour, label in ((both_edge, ORANGE, "along the edge"), (both_inner, BLUE, "inner places")):
    farthest = steps[pairs].max()
    values = [mean_similarity(pairs & (steps == n)) for n in range(1, farthest + 1)]
    right.plot(range(1, farthest + 1), values, "o-", markersize=3, color=colour, label=label)
right.axhline(0, color=MUTED, linewidth=1)
right.set_xlabel("steps from patch to patch")
right.set_ylabel("mean cosine")
right.set_title("By distance")
right.legend()
lesson.save(figure, "positions")

# %% [markdown]
# It is not distance that has been learned first, but the edge. Places along it were changed alike however far they
# are from each other (violet is alike, orange is opposite): what is there is paper, in nearly every image, and the
# model need not tell one empty place from another. Among the inner places, neighbours are at most a little more alike
# than others, and in a run as short as this that is hard to tell from chance. The famous pictures of position
# similarity, with their clear rows and columns, come from models that were trained for far longer, on far more
# images. Had we looked at all places together, the edge would have passed for geometry: neighbours *are* alike then,
# for many neighbours both lie on the edge.
#
# ## Where does it err?
#
# Numbers first: which digit is taken for which? Then look at the errors, the most confident first. Some of them are
# the model's fault. Of others you would not be sure yourself.

# %%
counts = confusion(test)  # (10, 10): rows true, columns predicted
wrong = misclassified(test)
mistakes = counts - np.diag(np.diag(counts))
print(f"{len(wrong):,} of {tested:,} are wrong; the commonest mistakes:")
for place in np.argsort(-mistakes.ravel())[:4]:
    true, predicted = divmod(int(place), 10)
    print(f"    a {true} called {predicted}: {mistakes[true, predicted]} times, of {counts[true].sum():,}")
assert mistakes.sum() == len(wrong)

figure, grid = lesson.figure(7, 3.3, rows=2, columns=6)
for axes, i in zip(grid.flat, wrong, strict=False):
    show(axes, test_images[i], f"a {test_labels[i]}, called {test.predictions[i]}\nby {test.confidences[i]:.1%}")
    axes.title.set_fontsize(SMALL)
lesson.save(figure, "most_confident_errors")

# %% [markdown]
# ## Does it know when it does not know?
#
# A model says "7, with 98 %". If it is honest, then of all the times it says 98 %, it is right in 98 of 100. To see
# whether it is, put the predictions into bins by their confidence. In each bin $k$ compare the mean confidence with
# the share that is right. The mean gap, each bin weighed by the share of images in it, is the *expected calibration
# error*:
#
# $$
# \mathrm{ECE} = ∑_k \frac{n_k}{n} \left| \mathrm{right}_k - \mathrm{confidence}_k \right|
# $$


# %%
def bins_of(evaluation, bins=15):
    """Return for each bin that is not empty: images, mean confidence, share that is right."""
    right = evaluation.predictions == evaluation.labels
    found = []
    for k in range(bins):
        inside = (evaluation.confidences > k / bins) & (evaluation.confidences <= (k + 1) / bins)
        if inside.any():
            found.append((inside.sum(), evaluation.confidences[inside].mean(), right[inside].mean()))
    return np.array(found).T


images_in, confidence, right = bins_of(test)
error = (images_in * np.abs(right - confidence)).sum() / images_in.sum()
assert np.isclose(error, calibration_error(test), atol=1e-12)
print(f"mean confidence {test.confidences.mean():.1%}, right {test.accuracy:.1%}; calibration error {error:.1%}")

# %% [markdown]
# Why would a model be too sure of itself? Cross-entropy goes on falling on the training images when all of them are
# right already: by larger logits, hence larger confidence. What is true for them is carried over to others, for which
# it is not.
#
# ### One number mends most of it
#
# Divide all logits by one number, the *temperature* $T$ (no number of tokens here). The largest stays the largest, so
# no prediction changes; only the confidence does. With $s = 1/T$ the mean loss on *validation* images is
#
# $$
# L(s) = \frac{1}{N} ∑_n \left( \ln ∑_j e^{s z_{nj}} - s\, z_{n y_n} \right)
# $$
#
# The derivative of $\ln ∑_j e^{s z_j}$ by $s$ is $∑_j z_j e^{s z_j} / ∑_j e^{s z_j} = ∑_j p_j z_j$, so
#
# $$
# \frac{dL}{ds} = \frac{1}{N} ∑_n \left( ∑_j p_{nj} z_{nj} - z_{n y_n} \right)
# $$
#
# It is zero where the logit that the model *expects* is, on average, the one that comes true. The second derivative
# is the variance of $z$ under $p$, which is never negative. So $L$ has one valley, and halving an interval finds its
# bottom.


# %%
def slope_of_loss(s, logits, labels):
    probabilities, _ = softmax_forward(s * logits)
    return ((probabilities * logits).sum(axis=1) - logits[np.arange(len(labels)), labels]).mean()


def best_inverse_temperature(logits, labels):
    low, high = 0.01, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope_of_loss(middle, logits, labels) < 0 else (low, middle)
    return middle


validation_images, validation_labels = training.validation
validation_logits = model.logits(validation_images).astype(np.float64)
above, below = (evaluation_of_logits(s * validation_logits, validation_labels).loss for s in (1 + 1e-5, 1 - 1e-5))
assert np.isclose(slope_of_loss(1.0, validation_logits, validation_labels), (above - below) / 2e-5, rtol=1e-4)

s = best_inverse_temperature(validation_logits, validation_labels)
cooled = evaluation_of_logits(s * model.logits(test_images).astype(np.float64), test_labels)
print(f"temperature {1 / s:.2f}, found on {held_back:,} validation images. On the test images:")
print(f"    calibration error {calibration_error(test):.1%} -> {calibration_error(cooled):.1%}")
print(f"    loss {test.loss:.3f} -> {cooled.loss:.3f}; right {test.accuracy:.2%} -> {cooled.accuracy:.2%}")
assert np.array_equal(test.predictions, cooled.predictions)
if not lesson.quick:  # a model that has not yet learned its images by heart is not too sure of itself
    assert s < 1
    assert calibration_error(cooled) < calibration_error(test)
    assert cooled.loss < test.loss

order = np.argsort(-test.confidences, kind="stable")
answered = np.arange(1, tested + 1) / tested
error_of_answered = np.cumsum(test.predictions[order] != test.labels[order]) / np.arange(1, tested + 1)

figure, (left, middle) = lesson.figure(7, 3.1, columns=2)
left.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=":")
for evaluation, colour, label in ((test, ORANGE, "as trained"), (cooled, BLUE, f"temperature {1 / s:.2f}")):
    images_in, confidence, right = bins_of(evaluation)
    seen = images_in >= 10  # of fewer images a share says little
    left.plot(100 * confidence[seen], 100 * right[seen], "o-", color=colour, markersize=4, label=label)
left.set_xlabel("confidence, %")
left.set_ylabel("right, %")
left.set_xlim(20, 101)
left.set_ylim(20, 101)
left.set_title("Does it keep what it says?")
left.legend()
middle.plot(100 * answered, 100 * error_of_answered, color=BLUE)
middle.set_xlabel("answered, the surest first, %")
middle.set_ylabel("wrong, of those, %")
middle.set_title("What if it may stay silent?")
lesson.save(figure, "calibration")

half = error_of_answered[tested // 2 - 1]
print(f"if it answers only the half it is surest of, {half:.2%} are wrong, and not {1 - test.accuracy:.1%}")
assert half < 0.75 * (1 - test.accuracy)

# %% [markdown]
# On the left, points below the dotted line are promises that were not kept. (With `--quick` the temperature is found
# on 200 images only, and may make it worse.) On the right, confidence is put to use: if a reader of forms may hand
# the doubtful digits to a person, few errors are left. That works with any temperature, as it needs the order of the
# confidences only.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/13_looking_inside.py`.
#
# **1.** Nearly right: for which share of the images is the true label among the *two* most probable classes?


# %%
def exercise_1(probabilities, labels):
    """Return the share, a number, for probabilities (N, C) without ties and labels (N,)."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** The cosine of every position with every other, without a loop.


# %%
def exercise_2(positions):
    """Return the cosines (N, N) of positions (N, D)."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Another loss that asks for honesty: the *Brier score*, $\frac{1}{N} ∑_n ∑_c (p_{nc} - t_{nc})^2$, where
# $t_{nc}$ is 1 for the true class and else 0, and $p$ is the softmax of the logits. Derive its gradient by the
# logits. (It goes through the softmax's Jacobian of lesson 08: $p$ is not the end of the way here.)


# %%
def exercise_3(logits, labels):
    """Return the Brier score, a number, and dlogits (N, C) for logits (N, C) and labels (N,)."""
    return ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** A third witness, the slowest and the most direct: blank each patch in turn, and note by how much the
# probability of a class falls. `probability` takes images (B, R, C) and returns (B,). Ask it for all patches in one
# call, if you can. Then put this map into the test of this lesson, beside the others: does it do the most harm?


# %%
def exercise_4(probability, image, patch_size):
    """Return by how much the probability falls, (rows, columns) of patches, for one image (R, C) uint8."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# We judged pictures by a test that they could have failed. The next lesson does the same to gradients: seven of them
# are wrong, and training does not show it.
