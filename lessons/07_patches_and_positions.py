# %% [markdown]
r"""
# 07 Patches and positions

**Goal.** To turn an image into a short row of vectors, the tokens that a transformer works on; to know why each needs
to be told its place; and to see what a model makes of the places when it learns them by itself.

**The one equation.** Image $n$ is cut into $N$ patches. Each is embedded by the same linear layer $W, b$; a learned
vector, the class token $c$, goes in front, and every token gets a learned vector $P_t$ of its position added:

$$
z_{n0} = c + P_0, \qquad z_{nt} = x_{nt} W + b + P_t \qquad (t = 1 … N)
$$

**Source.** A. Dosovitskiy et al., *An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale*, 2021,
section 3.1, equation 1; what learned positions look like is in section 4.5, figure 7.

**Time.** An hour to read and play, ten to twenty minutes an exercise, the last one longer. The script runs in about
twenty seconds.
"""

# %%
import numpy as np
from kit import BLUE, MUTED, ORANGE, TEXT, Lesson, show

from tinyvit import reference
from tinyvit.backend import one_blas_thread
from tinyvit.data import load_mnist
from tinyvit.gpu import get_backend
from tinyvit.gradcheck import gradient_error
from tinyvit.model import ViTConfig, initialise
from tinyvit.ops import (
    cross_entropy_backward,
    cross_entropy_forward,
    gelu_backward,
    gelu_forward,
    linear_backward,
    linear_forward,
    patch_embedding_backward,
    patch_embedding_forward,
    patches_backward,
    patches_forward,
)
from tinyvit.optim import Adam
from tinyvit.training import Training, TrainingConfig

lesson = Lesson("07_patches_and_positions")
rng = np.random.default_rng(7)
mnist = load_mnist()
config = ViTConfig()  # 28 x 28 pixels, patches of 7 x 7, width 128

# %% [markdown]
# ## Why patches
#
# So far an image was one row of 784 numbers, and every pixel had a weight of its own. A transformer works on a *set
# of tokens* instead: vectors of one width, all treated by the same weights, that exchange what they know. What should
# be a token of an image?
#
# A pixel is too little. It says next to nothing by itself, and there are 784 of them; in the attention of the next
# lesson every token looks at every token, and that is more than 600,000 pairs. The whole image is too much: one token
# has nobody to talk to. In between lies the patch, a small square. Four by four squares of 7 x 7 pixels are 16 tokens
# and 256 pairs, and 7 x 7 pixels are enough for a piece of a stroke, its direction, its end, a crossing.

# %%
side, P = config.image_size, config.patch_size
print("     a token is   tokens    pairs")
for pixels in (1, 4, 7, 14, 28):
    tokens = (side // pixels) ** 2
    print(f"{pixels:>4} x {pixels:<2} pixels   {tokens:>6}  {tokens**2:>7,}")

# %% [markdown]
# ## The cut, index by index
#
# Number the patches row by row from the top left, $t = 0 … 15$, and the pixels within a patch the same way,
# $k = 0 … 48$. (The class token will take the place 0 later, and every patch moves up by one.) Patch $t$ is in row
# $⌊t/4⌋$ and column $t \bmod 4$ of the grid. So its pixel $k$ is in the image at
#
# $$
# \mathrm{row} = 7 ⌊t/4⌋ + ⌊k/7⌋, \qquad \mathrm{column} = 7\,(t \bmod 4) + (k \bmod 7)
# $$


# %%
def patches_by_index(images, P):
    """Return the patches (B, N, P*P) of images (B, R, C), as the equation says it."""
    batch, rows, columns = images.shape
    across = columns // P
    patches = np.zeros((batch, rows // P * across, P * P), images.dtype)
    for n, t, k in np.ndindex(patches.shape):
        patches[n, t, k] = images[n, P * (t // across) + k // P, P * (t % across) + k % P]
    return patches


# %% [markdown]
# No arithmetic happens to the pixels; they only change places. Then an array can do it without a loop. Split both
# axes of the image in two, $28 = 4 · 7$, and a pixel has four indices: row of the grid $i$, row within the patch $r$,
# column of the grid $j$, column within the patch $s$. In memory they come in the order $i, r, j, s$. We want the
# patch $(i, j)$ first and the pixel $(r, s)$ within it second, so the two in the middle change places. Then each pair
# melts into one index.

# %%
images = mnist.train_images[:4]
grid = images.reshape(-1, 4, P, 4, P)  # (B, i, r, j, s)
patches = grid.swapaxes(2, 3).reshape(-1, 16, P * P)  # (B, i, j, r, s) -> (B, N, P*P)

assert np.array_equal(patches, patches_by_index(images, P))
assert np.array_equal(patches, patches_forward(images, P))
print(f"images {images.shape} -> patches {patches.shape}, the same by index, by axes and by tinyvit")

# %% [markdown]
# What if the two axes are *not* exchanged? `images.reshape(-1, 16, 49)` has the same shape and raises no error. But a
# reshape alone keeps the order in memory: its first "patch" is the first 49 pixels of the file, a row and three
# quarters. Tokens are then strips that wrap around the edge. A network learns from them, too, and nobody tells you.

# %%
strips = images.reshape(-1, 16, P * P)
figure, panels = lesson.figure(7, 2.6, columns=3)
show(panels[0], images[0], "an image and where it is cut")
for edge in (6.5, 13.5, 20.5):
    panels[0].axhline(edge, color=ORANGE, linewidth=1)
    panels[0].axvline(edge, color=ORANGE, linewidth=1)


def sheet(patches, gap=2):
    """Return 16 patches (16, 49) as one picture, four in a row, with gaps between."""
    step = P + gap
    picture = np.full((4 * step - gap, 4 * step - gap), 70, np.uint8)
    for t in range(16):
        i, j = divmod(t, 4)
        picture[step * i : step * i + P, step * j : step * j + P] = patches[t].reshape(P, P)
    return picture


show(panels[1], sheet(patches[0]), "its 16 patches")
show(panels[2], sheet(strips[0]), "reshaped only: strips")
lesson.save(figure, "patches")

# %% [markdown]
# ## The way back
#
# Every pixel went to exactly one place: patch $(t, k)$ *is* pixel (row, column). So in the sum of the chain rule over
# all outputs, one term is left, with the factor one: the gradient of a pixel is the gradient of the place to which it
# went. Backward is the same exchange of axes, which undoes itself.

# %%
dpatches = rng.standard_normal((4, 16, P * P))
dimages = dpatches.reshape(-1, 4, 4, P, P).swapaxes(2, 3).reshape(images.shape)  # (B, i, j, r, s) -> (B, i, r, j, s)

assert np.array_equal(dimages, patches_backward(dpatches, images.shape, P))
assert np.array_equal(images, patches_backward(patches, images.shape, P))  # and it puts the images together again

# %% [markdown]
# ## A patch becomes a token
#
# The 49 pixels of a patch are normalised, as lesson 01 said, and go through a linear layer to the width $D = 128$ of
# the model. It is the *same* layer for all 16 patches of all images: what it learns of a stroke in one corner it
# knows in every other. (Those who know convolutions: this is one, with a kernel of 7 x 7 and a stride of 7.) That
# also makes it small.
#
# Two things are still missing. A classifier needs one vector to read the answer from, and no patch is better suited
# than another. So one more token is put in front, which belongs to no patch: the *class token*, the same learned
# vector for every image. It begins with no knowledge of the image at all, and has to collect it by attention. And
# every token gets the vector of its position added, which we come to below. That makes the equation at the top.

# %%
parameters = initialise(config, seed=0, dtype=np.float64)
w, b = parameters.pair("patch_embedding")  # (P*P, D), (D,)
class_token, positions = parameters["class_token"], parameters["positions"]  # (D,), (N + 1, D)

x = (patches / 255 - config.pixel_mean) / config.pixel_deviation  # (B, N, P*P)
z = np.empty((len(x), 17, config.width))  # (B, T, D), T = N + 1
z[:, 0] = class_token + positions[0]
z[:, 1:] = x @ w + b + positions[1:]

library, cache = patch_embedding_forward(
    images, w, b, class_token, positions, P, config.pixel_mean, config.pixel_deviation
)
assert np.allclose(z, library, atol=1e-12)
print(f"patches {x.shape} @ w {w.shape}, with the class token and positions {positions.shape} -> tokens {z.shape}")
print(f"one layer for all patches: {w.size + b.size:,} numbers; one for each would be {16 * (w.size + b.size):,}")

# %% [markdown]
# ## Its gradients
#
# Write $g_{ntd} = ∂L/∂z_{ntd}$ for the gradient that arrives. Who occurs where?
#
# $P_{td}$ occurs in token $t$ of *every* image, with the factor one. So does the class token, in token 0:
#
# $$
# \frac{∂L}{∂P_{td}} = ∑_n g_{ntd}, \qquad \frac{∂L}{∂c_d} = ∑_n g_{n0d}
# $$
#
# The gradients of $c$ and of $P_0$ are the same, as only their sum $c + P_0$ is ever used. It is one vector written
# as two, which does no harm.
#
# For the tokens from 1 on, $W$ and $b$ are lesson 02 again, with one row for every patch of every image:
# $∂L/∂W_{kd} = ∑_n ∑_t x_{ntk} \, g_{ntd}$. And pixels are first shifted and divided by the deviation $σ$, so their
# gradient is divided by $σ$, too, before it goes back to its place.

# %%
dz = rng.standard_normal(z.shape)
dpositions = dz.sum(axis=0)  # (T, D)
dclass_token = dz[:, 0].sum(axis=0)  # (D,)
dw = np.einsum("ntk,ntd->kd", x, dz[:, 1:])  # (P*P, D), a sum over images and patches
db = dz[:, 1:].sum(axis=(0, 1))  # (D,)
dx = dz[:, 1:] @ w.T / config.pixel_deviation  # (B, N, P*P)
dimages = patches_backward(dx / 255, images.shape, P)  # we gave bytes: a step of one byte is 1/255 of a unit

for ours, theirs in zip(
    (dimages, dw, db, dclass_token, dpositions), patch_embedding_backward(dz, cache), strict=True
):
    assert np.allclose(ours, theirs, atol=1e-10)
assert np.array_equal(dclass_token, dpositions[0])


def small_embedding(images, w, b, class_token, positions):
    return patch_embedding_forward(images, w, b, class_token, positions, 2, mean=0.3, deviation=0.5)


inputs = [rng.standard_normal(shape) for shape in ((2, 4, 6), (4, 3), (3,), (3,), (7, 3))]  # six patches of 2 x 2
errors = gradient_error(small_embedding, patch_embedding_backward, inputs)
print("gradient_error of the images, w, b, class token, positions:", ", ".join(f"{e:.0e}" for e in errors))
assert max(errors) < 1e-8

# %% [markdown]
# The patches, the tokens and the four gradients of the weights are those of `tinyvit/reference.py`. It reads pixels
# from 0 to 1, and returns no gradient of the images, because training needs none.

# %%
assert np.array_equal(patches, reference.patches_forward(images, P))
reference_z, reference_cache = reference.patch_embedding_forward(
    images=images / 255,
    w=w,
    b=b,
    class_token=class_token,
    positions=positions,
    patch_size=P,
)
np.testing.assert_allclose(z, reference_z, rtol=1e-10, atol=1e-12)
for ours, theirs in zip(
    (dw, db, dclass_token, dpositions), reference.patch_embedding_backward(dz, reference_cache), strict=True
):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
print("patches, tokens and gradients are those of tinyvit/reference.py")

# %% [markdown]
# ## Without positions, a bag of patches
#
# Why tell a token where it is? Because nothing else does. All patches go through the same weights, and what follows
# treats tokens as a set: attention, too, as we will see, gives the same answer in whatever order they come. An image
# cut up and shuffled would be the same image to such a model.
#
# To see it, we build the smallest model that has tokens out of what we have: embed, add positions, a linear layer and
# GELU for each token, then the *mean* over all tokens, and a linear layer to ten logits. (The mean takes the part of
# attention and the class token.) You know each backward pass; and for the mean, $m = \frac{1}{N} ∑_t a_t$, every
# token gets $\frac{1}{N}$ of the gradient that arrives.

# %%
D, F = 32, 64


def new_weights(rng, loudness):
    """Return a dict of float32 weights: Glorot's for the layers, normal numbers times loudness for the positions."""
    weights = {"b": np.zeros(D), "b1": np.zeros(F), "b2": np.zeros(10), "class_token": np.zeros(D)}
    for name, shape in {"w": (P * P, D), "w1": (D, F), "w2": (F, 10)}.items():
        bound = np.sqrt(6 / sum(shape))
        weights[name] = rng.uniform(-bound, bound, shape)
    weights["positions"] = loudness * rng.standard_normal((17, D))
    return {name: array.astype(np.float32) for name, array in weights.items()}


def bag_forward(images, p):
    """Return logits (B, 10) for uint8 images (B, 28, 28), and the cache."""
    mean_and_deviation = config.pixel_mean, config.pixel_deviation
    z, z_cache = patch_embedding_forward(
        images, p["w"], p["b"], p["class_token"], p["positions"], P, *mean_and_deviation
    )
    hidden, hidden_cache = linear_forward(z[:, 1:], p["w1"], p["b1"])  # (B, N, F); no class token here
    active, gelu_cache = gelu_forward(hidden)
    logits, logits_cache = linear_forward(active.mean(axis=1), p["w2"], p["b2"])  # a mean over the patches
    return logits, (z_cache, hidden_cache, gelu_cache, logits_cache, active.shape)


def bag_backward(dlogits, cache):
    """Return the gradient of every weight, a dict."""
    z_cache, hidden_cache, gelu_cache, logits_cache, shape = cache
    dmean, dw2, db2 = linear_backward(dlogits, logits_cache)  # (B, F)
    dactive = np.broadcast_to(dmean[:, None] / shape[1], shape)  # (B, N, F), the same for every patch
    dz, dw1, db1 = linear_backward(gelu_backward(dactive, gelu_cache), hidden_cache)
    dz = np.concatenate([np.zeros_like(dz[:, :1]), dz], axis=1)  # the class token has no part in the logits
    _, dw, db, dclass_token, dpositions = patch_embedding_backward(dz, z_cache)
    gradients = {"w": dw, "b": db, "class_token": dclass_token, "positions": dpositions}
    return gradients | {"w1": dw1, "b1": db1, "w2": dw2, "b2": db2}


# %% [markdown]
# First the claim. We take an image apart and put the patches together in another order. With positions that are all
# zero, the logits are the same, to the last digits that rounding leaves. With positions they are not.

# %%
order = rng.permutation(16)
shuffled = patches_backward(patches[:, order], images.shape, P)

figure, panels = lesson.figure(7, 2.1, columns=4)
for axes, image, title in zip(
    panels,
    (images[0], shuffled[0], images[2], shuffled[2]),
    ("a 5", "the same, shuffled", "a 4", "the same, shuffled"),
    strict=True,
):
    show(axes, image, title)
lesson.save(figure, "shuffled")

for loudness, name in ((0.0, "without positions"), (1.0, "with positions")):
    weights = new_weights(np.random.default_rng(0), loudness)
    difference = np.abs(bag_forward(images, weights)[0] - bag_forward(shuffled, weights)[0]).max()
    print(f"{name:<18} shuffling the patches changes the logits by at most {difference:.0e}")
    assert (difference < 1e-5) == (loudness == 0)

# %% [markdown]
# Now the price. We train it three times, with the same numbers of weights, steps and images: with positions that stay
# zero; with positions that begin quietly, as normal numbers times 0.02, which is customary; and with positions that
# begin as loud as the patches they are added to, as normal numbers, which is what this library does.

# %%
steps, batch = (250 if lesson.quick else 2000), 64


def train_bag(loudness, learning_rate=5e-3):
    """Return the share of test images that are classified correctly, after training from positions that loud."""
    rng = np.random.default_rng(0)
    weights = new_weights(rng, loudness)
    trained = [name for name in weights if loudness or name != "positions"]
    adams = {name: Adam(weights[name].ravel()) for name in trained}
    for step in range(steps):
        chosen = rng.integers(0, len(mnist.train_images), batch)
        logits, cache = bag_forward(mnist.train_images[chosen], weights)
        _, loss_cache = cross_entropy_forward(logits, mnist.train_labels[chosen])
        gradients = bag_backward(cross_entropy_backward(1.0, loss_cache), cache)
        for name, adam in adams.items():
            adam.step(weights[name].reshape(-1), gradients[name].reshape(-1), learning_rate * (1 - step / steps))
    return np.mean(bag_forward(mnist.test_images, weights)[0].argmax(axis=1) == mnist.test_labels)


with one_blas_thread():  # products this small are faster on one core
    without, quiet, loud = (train_bag(loudness) for loudness in (0.0, 0.02, 1.0))
print(f"after {steps} steps of {batch} images, of the 10,000 test images are classified correctly")
print(f"    without positions   {without:.1%}")
print(f"    quiet at the start  {quiet:.1%}")
print(f"    loud at the start   {loud:.1%}")
assert loud > without + 0.02
assert loud > quiet - 0.01
assert lesson.quick or quiet > without + 0.01

# %% [markdown]
# A bag of patches is not blind: which pieces of strokes a digit has says much of which digit it is. But a good part
# of the mistakes are due to not knowing where they were. And how positions begin matters: a token can only be treated
# by its place when the place is heard beside the pixels, and quiet positions have to grow first.
#
# One more thing is worth a thought. Why *add* a position, when it could stand beside the pixels as more columns?
# Because that is no different. Write the place as a row $e_t$ of sixteen numbers, a one for the patch's own place and
# zeros elsewhere; put it beside the pixels, and 16 more rows below $W$, row $t$ being $P_t$. Then the linear layer
# gives $x_t W + e_t P = x_t W + P_t$: to add a learned vector is what a layer does with a place.

# %%
one_hot = np.eye(16)  # row t is e_t
side_by_side = np.concatenate([x, np.broadcast_to(one_hot, (4, 16, 16))], axis=2)  # (B, N, P*P + N)
assert np.allclose(side_by_side @ np.concatenate([w, positions[1:]]) + b, z[:, 1:], atol=1e-12)

# %% [markdown]
# ## What learned positions look like
#
# Nobody tells the model that patch 1 is left of patch 2, or that the image is a square at all. There are 17 vectors
# in a list. Does it find out? For this we need a real Vision Transformer, and borrow the library's, with a single
# block: the next four lessons build it. Patches are 4 x 4 here, so that there are 49 of them and more of a map to
# see. And all positions begin at *zero*: whatever is in them afterwards was learned.

# %%
model_config = ViTConfig(patch_size=4, width=64, depth=1, heads=4, mlp_width=128)
count = 6400 if lesson.quick else 12_800
training = Training(
    model_config,
    TrainingConfig(
        epochs=2 if lesson.quick else 6,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=50,
        beta2=0.98,
        validation=1000,
    ),
    mnist.train_images[: count + 1000],
    mnist.train_labels[: count + 1000],
    get_backend("cpu"),
    workers=1,  # one process: for a model this small another is not worth its start
)
training.state.parameters["positions"][...] = 0
training.run()
learned = training.state.parameters["positions"][1:].astype(np.float64)  # (49, D); the class token's is left out
accuracy = training.state.history[-1]["validation_accuracy"]
print(f"{training.state.adam.steps} steps; of 1,000 images that were held back {accuracy:.1%} are right")
assert accuracy > (0.6 if lesson.quick else 0.85)

# %% [markdown]
# A vector of 64 numbers is not much to look at. But we can ask which positions are alike: the cosine of the angle
# between two of them, 1 for the same direction, 0 for none in common, -1 for opposite ones. (What all positions have
# in common tells no place from another, so their mean is subtracted first.)
#
# $$
# \cos(P_s, P_t) = \frac{∑_d P_{sd} P_{td}}{|P_s| \, |P_t|}
# $$
#
# In the picture each small square belongs to one patch, and stands where the patch is in the image. It shows how like
# *this* patch's position all 49 are, itself among them as the darkest.

# %%
centred = learned - learned.mean(axis=0)
directions = centred / np.linalg.norm(centred, axis=1, keepdims=True)
similarity = directions @ directions.T  # (49, 49)

figure, panels = lesson.figure(7, 6.2, rows=7, columns=7)
for t, axes in enumerate(panels.flat):
    show(axes, similarity[t].reshape(7, 7), signed=True).set_clim(-1, 1)
drawn = panels[0, 0].images[0]
bar = figure.colorbar(drawn, ax=panels, shrink=0.6, label="cosine of the angle between two learned positions")
bar.outline.set_visible(False)
figure.suptitle("Neighbours are alike, and so is the empty border", x=0.01, ha="left", fontsize=TEXT + 1)
lesson.save(figure, "similarity")

# %% [markdown]
# Two things can be seen. In the middle, a position is like those next to it, and less like those further off. The
# model has found out that places lie side by side, for strokes run on from one patch into the next, so that
# neighbours are of use in similar ways. And along the border all are alike, even opposite corners. There the paper is
# nearly always empty: these tokens receive the same pixels in every image and the same gradient, so they take the
# same way from zero. The model had no reason to tell them apart.
#
# Let us measure it instead of trusting the eye: the mean cosine of two positions by the distance of their patches,
# for the 25 patches inside the border; and the length of each position beside the ink that a patch has on average.

# %%
places = np.stack(np.divmod(np.arange(49), 7), axis=1)  # (49, 2): row and column of each patch
distance = np.linalg.norm(places[:, None] - places[None], axis=2)  # (49, 49), in patches
inside = np.all((places > 0) & (places < 6), axis=1)  # (49,)
pairs = inside[:, None] & inside[None]
near, far = similarity[pairs & (distance == 1)].mean(), similarity[pairs & (distance >= 2)].mean()
corners = similarity[np.ix_([0, 6, 42, 48], [0, 6, 42, 48])][np.triu_indices(4, 1)]
ink = patches_forward(mnist.train_images[:count], 4).mean(axis=(0, 2)) / 255  # (49,)
lengths = np.linalg.norm(learned, axis=1)

print(f"mean cosine of two neighbours inside the border: {near:.2f}; of patches two or more apart: {far:.2f}")
print(f"mean cosine of two of the four corners, a whole image apart: {corners.mean():.2f}")
print(
    f"mean length of a position inside the border: {lengths[inside].mean():.2f}; on it: {lengths[~inside].mean():.2f}"
)
assert near > far + 0.1
assert corners.mean() > 0.6
assert lengths[inside].mean() > lengths[~inside].mean()

figure, panels = lesson.figure(7, 2.6, columns=3, width_ratios=(1, 1, 1.3))
show(panels[0], ink.reshape(7, 7), "mean ink of a patch")
show(panels[1], lengths.reshape(7, 7), "length of its position")
axes = panels[2]
for chosen, colour, name in ((pairs, BLUE, "inside the border"), (np.ones_like(pairs), MUTED, "all patches")):
    distances = np.unique(distance[chosen])
    means = [similarity[chosen & (distance == d)].mean() for d in distances]
    axes.plot(distances, means, "o-", color=colour, markersize=3, label=name)
axes.set_xlabel("distance of two patches, in patches")
axes.set_ylabel("mean cosine")
axes.set_title("Alike near by")
axes.legend()
lesson.save(figure, "places")

# %% [markdown]
# The grey line turns up again at its far end: there are no patches further apart than two corners, and corners are
# empty. The paper finds neighbours alike in a far larger model, and there rows and columns come out as well.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/07_patches_and_positions.py`.
#
# **1.** Which patch, and which place in it, does the pixel in row `row` and column `column` go to? The image has
# `columns` columns; patches are `P` pixels a side. (Both numbers begin at 0; the way back of the equation above.)


# %%
def exercise_1(row, column, columns, P):
    """Return t, k: the number of the patch, and of the pixel within it."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** Put the tokens together. All arrays are given; the batch has one image or many. No normalisation of pixels,
# no loop over images.


# %%
def exercise_2(patches, w, b, class_token, positions):
    """Return tokens (B, N + 1, D) for patches (B, N, K), w (K, D), b (D,), class_token (D,), positions (N + 1, D)."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** A vector for every patch is one way. Another is a vector for every row of the grid and one for every column,
# and a position is the sum of the two: $P_{ij} = R_i + C_j$. There are fewer numbers to learn, and neighbours have
# one half in common from the start. What are the gradients?


# %%
def exercise_3(dtokens, down, across):
    """Return drows (down, D), dcolumns (across, D) for dtokens (B, down * across, D), patches row by row."""
    return ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** Patches need not lie side by side. They may overlap, so that no stroke is cut apart in all of them. With
# patches of `P` pixels a side that begin every `stride` pixels there are $(R - P) / \mathrm{stride} + 1$ of them from
# top to bottom, and $(C - P) / \mathrm{stride} + 1$ from left to right, rounded down. A pixel is then in several
# patches. What does the chain rule say of several ways to the loss? Return the gradient of the images. (A loop over
# the places in a patch is fine; a loop over the images is not needed.)


# %%
def exercise_4(dpatches, rows, columns, P, stride):
    """Return dimages (B, rows, columns) for dpatches (B, N, P*P) of patches that may overlap, row by row."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# The image is a set of tokens now, and each knows where it is from. But so far no token knows of any other. The next
# lesson lets them look at one another.
