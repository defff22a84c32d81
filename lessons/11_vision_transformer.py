# %% [markdown]
r"""
# 11 The Vision Transformer

**Goal.** To put the pieces of ten lessons together to a model that reads an image and names a digit; to send the
gradient all the way back, from the loss to each weight and each pixel; and to prove that the whole is right, with a
check that is as cheap for a million weights as for ten.

**The one equation.** It is four lines. Patches become tokens, $L$ blocks each add what attention and an MLP have to
say, and the class token is read:

$$
\begin{aligned}
z^{(0)} &= [\,c;\; p_1 E;\; …;\; p_N E\,] + P \\
a^{(l)} &= z^{(l-1)} + \mathrm{attention}(\mathrm{norm}(z^{(l-1)})) \\
z^{(l)} &= a^{(l)} + \mathrm{mlp}(\mathrm{norm}(a^{(l)})) \\
y &= \mathrm{norm}(z^{(L)}_0)\, W + b
\end{aligned}
$$

**Source.** A. Dosovitskiy and others, *An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale*,
2021, section 3.1, equations 1 to 4.

**Time.** An hour to read and play, ten to thirty minutes an exercise. The script runs in a few seconds.
"""

# %%
import numpy as np
from kit import BLUE, INK, MUTED, ORANGE, SMALL, Lesson, show

from tinyvit import reference
from tinyvit.backend import one_blas_thread
from tinyvit.data import load_mnist
from tinyvit.gradcheck import directional_error
from tinyvit.model import (
    ViTConfig,
    block_backward,
    block_forward,
    initialise,
    loss_and_gradient,
    vit_backward,
    vit_backward_to_images,
    vit_forward,
)
from tinyvit.ops import (
    cross_entropy_backward,
    cross_entropy_forward,
    layer_norm_backward,
    layer_norm_forward,
    linear_backward,
    linear_forward,
    patch_embedding_backward,
    patch_embedding_forward,
    softmax_forward,
)
from tinyvit.optim import Adam
from tinyvit.parameters import Parameters

lesson = Lesson("11_vision_transformer")
rng = np.random.default_rng(11)
mnist = load_mnist()

# %% [markdown]
# ## One array for all weights
#
# A model of four blocks has 56 arrays of weights. Adam does not care which is which, and neither does a file. So they
# all lie in *one* flat array, one after the other, and each name is a view of its part: write into the view, and the
# flat array has changed. Gradients get a second flat array with the same names.
#
# This is the model of the technical note that this project began with: 28x28 pixels, patches of 7x7, tokens of width
# 128, four blocks of four heads, an MLP of width 512.

# %%
note = ViTConfig()
parameters = initialise(note)

parameters["positions"][3, 5] = 42
assert 42 in parameters.flat  # a view: the same memory under another name
print(f"the note's model has {len(parameters)} arrays and {parameters.flat.size:,} weights")
for name in ("patch_embedding.weight", "class_token", "positions", "blocks.0.attention.qkv.weight", "head.weight"):
    print(f"    {name:<31}{parameters[name].shape}")
assert parameters.flat.size == 803_338

# %% [markdown]
# Where do 803,338 weights lie? We add them up by what they do. A block has $4 D^2$ in attention (three projections to
# queries, keys and values, and one back), and $2 D F$ in the MLP. Here $F = 4D$, so that the MLP has twice as many as
# attention. Whatever belongs to the image, patches and positions, is next to nothing.

# %%
parts = {
    "patches, positions, class token": ("patch_embedding", "positions", "class_token"),
    "attention": ("attention",),
    "MLP": ("mlp",),
    "norms and head": ("norm", "head"),
}
sizes = {
    part: sum(view.size for name, view in parameters.items() if any(f".{word}" in f".{name}" for word in words))
    for part, words in parts.items()
}
assert sum(sizes.values()) == parameters.flat.size
assert sizes["attention"] == note.depth * (4 * 128**2 + 4 * 128)  # weights, and a bias for each column
assert sizes["MLP"] == note.depth * (2 * 128 * 512 + 512 + 128)

figure, axes = lesson.figure(7, 1.9)
bars = axes.barh(list(sizes), list(sizes.values()), color=BLUE, height=0.6)
axes.bar_label(bars, [f"{size:,}" for size in sizes.values()], padding=4, color=INK, fontsize=SMALL)
axes.set_xlim(0, 620_000)
axes.set_xticks([0, 200_000, 400_000, 600_000], ["0", "200,000", "400,000", "600,000"])
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
axes.set_xlabel("weights")
axes.set_title("Most of a transformer is its MLPs")
lesson.save(figure, "weights")

# %% [markdown]
# ## Forward: read it down
#
# The four lines of the equation, in code. Every function is one that an earlier lesson derived; what is new is the
# order. Each step also returns its cache, and we keep them all, as the way back will need every one.


# %%
def model_forward(images, parameters, config):
    """Return logits (B, classes) for images (B, R, C), and the caches, in the order in which they came."""
    x, embedding_cache = patch_embedding_forward(
        images,
        *parameters.pair("patch_embedding"),
        parameters["class_token"],
        parameters["positions"],
        config.patch_size,
        config.pixel_mean,
        config.pixel_deviation,
    )  # (B, T, D)
    block_caches = []
    for i in range(config.depth):
        x, cache = block_forward(x, parameters, f"blocks.{i}", config)  # (B, T, D)
        block_caches.append(cache)
    normed, norm_cache = layer_norm_forward(x[:, 0], *parameters.pair("norm"), config.epsilon)  # (B, D)
    logits, head_cache = linear_forward(normed, *parameters.pair("head"))  # (B, classes)
    return logits, (parameters, x.shape, embedding_cache, block_caches, norm_cache, head_cache)


parameters = initialise(note)
logits, cache = model_forward(mnist.train_images[:5], parameters, note)
print(f"images {mnist.train_images[:5].shape} -> tokens {cache[1]} -> logits {logits.shape}")

library, _ = vit_forward(mnist.train_images[:5], parameters, note)
gap = np.abs(logits - library).max()
print(f"the library's logits differ from ours by {gap:.0e} at most, in float32")
assert gap < 1e-4

# %% [markdown]
# They differ by rounding, since the library adds in another order: it knows that of the last block only the class
# token is read, and computes nothing else there. The function is the same.
#
# ## Backward: read it up
#
# The model is a chain, $z^{(0)} → z^{(1)} → … → y → L$. The chain rule says how the gradient of one link follows from
# that of the next. For each element $j$ of $z^{(l-1)}$, add up over all elements $k$ of $z^{(l)}$:
#
# $$
# \frac{∂L}{∂z^{(l-1)}_j} = ∑_k \frac{∂L}{∂z^{(l)}_k} \frac{∂z^{(l)}_k}{∂z^{(l-1)}_j}
# $$
#
# That sum is what every backward pass of this book computes, without ever building the matrix of the derivatives. So
# we call them in the reverse order: what one returns as `dx` is the next one's `dout`.
#
# One link has not been derived yet: the step from all tokens to the class token, $c_d = z_{0d}$. Token $t$ occurs in
# it only if $t = 0$, with factor one:
#
# $$
# \frac{∂L}{∂z_{td}} = \frac{∂L}{∂c_d} \;\; \mathrm{if} \;\; t = 0, \;\; \mathrm{else} \;\; 0
# $$
#
# At the top only the class token learns anything. One block further down all tokens do, for the class token has
# looked at them.


# %%
def model_backward(dlogits, cache, norm_backward=layer_norm_backward):
    """Return the gradient of every weight under its name, for dlogits (B, classes)."""
    parameters, shape, embedding_cache, block_caches, norm_cache, head_cache = cache
    gradients = parameters.empty_like()

    dnormed, dw, db = linear_backward(dlogits, head_cache)
    gradients.set_pair("head", dw, db)
    dclass, dw, db = norm_backward(dnormed, norm_cache)
    gradients.set_pair("norm", dw, db)

    dx = np.zeros(shape, dlogits.dtype)  # (B, T, D)
    dx[:, 0] = dclass  # the class token alone was read
    for i in reversed(range(len(block_caches))):
        dx = block_backward(dx, block_caches[i], gradients, f"blocks.{i}")

    _, dw, db, dclass_token, dpositions = patch_embedding_backward(dx, embedding_cache)
    gradients.set_pair("patch_embedding", dw, db)
    gradients["class_token"][...] = dclass_token
    gradients["positions"][...] = dpositions
    return gradients


# %% [markdown]
# To compare ours with the library's, both in float64, we take a smaller model: two blocks of width 12, and all of its
# weights at random. Every one of its arrays must agree.

# %%
small = ViTConfig(patch_size=14, width=12, depth=2, heads=3, mlp_width=20)


def random_parameters(config):
    """Return float64 parameters in which nothing is 0 or 1 by design."""
    return initialise(config, dtype=np.float64).with_flat(rng.normal(0, 0.5, initialise(config).flat.size))


weights = random_parameters(small)
images = mnist.train_images[:3] / 255
dlogits = rng.standard_normal((3, 10))
ours = model_backward(dlogits, model_forward(images, weights, small)[1])
library = vit_backward(dlogits, vit_forward(images, weights, small)[1])
for name in weights:
    assert np.allclose(ours[name], library[name], rtol=1e-9, atol=1e-9), name
print(f"our gradients of all {len(weights)} arrays are the library's")

# %% [markdown]
# The two functions above are those in `tinyvit/reference.py`. You have now derived every gradient in that file. With
# the loss of lesson 03 between them, the two functions are a training step up to Adam. The reference and the library
# both call it `loss_and_gradient`: it returns the loss, how many images are read correctly, and the gradient of every
# weight.

# %%
expected_logits, reference_cache = reference.vit_forward(
    images=images,
    parameters=weights,
    heads=3,
    patch_size=14,
)
our_logits, our_cache = model_forward(images, weights, small)
np.testing.assert_allclose(our_logits, expected_logits, rtol=1e-10, atol=1e-12)
expected = reference.vit_backward(dlogits, reference_cache)
assert set(expected) == set(weights)
for name in weights:
    np.testing.assert_allclose(ours[name], expected[name], rtol=1e-10, atol=1e-12, err_msg=name)

three = mnist.train_labels[:3]
our_loss, loss_cache = cross_entropy_forward(our_logits, three)
our_gradients = model_backward(cross_entropy_backward(1.0, loss_cache), our_cache)
from_reference = reference.loss_and_gradient(
    images=images,
    labels=three,
    parameters=weights,
    heads=3,
    patch_size=14,
)
from_library = loss_and_gradient(
    images=images,
    targets=three,
    parameters=weights,
    config=small,
)
for loss, correct, gradients in (from_reference, from_library):
    np.testing.assert_allclose(our_loss, loss, rtol=1e-10, atol=1e-12)
    assert correct == (our_logits.argmax(axis=1) == three).sum()
    for name in weights:
        np.testing.assert_allclose(our_gradients[name], gradients[name], rtol=1e-10, atol=1e-12, err_msg=name)
print("logits, loss and gradients are those of tinyvit/reference.py, and of the library's loss_and_gradient")

# %% [markdown]
# ## Is the whole right? Ask along a direction
#
# A gradient check moves one weight at a time, and needs two forward passes for each. That is 1.6 million passes for
# the note's model. But a check has no need of all the slopes one by one. Move *all* weights at once, by a step $h$
# along a direction $u$, and compare one number:
#
# $$
# \frac{f(w + h u) - f(w - h u)}{2h} ≈ ∑_k u_k \frac{∂f}{∂w_k}
# $$
#
# Two passes, whatever the size. What can hide from it? Let $e_k$ be the error of our gradient in weight $k$. What the
# check sees is $∑_k u_k e_k$. Take $u_k = ±1$ by the toss of a coin, each for itself. Then $u_j u_k$ is 1 where
# $j = k$ and is 1 or -1 equally often elsewhere, so that on average
#
# $$
# \mathrm{mean}\, (∑_k u_k e_k)^2 = ∑_j ∑_k e_j e_k \, \mathrm{mean}(u_j u_k) = ∑_k e_k^2
# $$
#
# A wrong gradient is seen in its full size, on average. It may cancel by luck along one direction, but hardly along
# three, one after the other. `directional_error` does just that. Let us check the note's model in full size, on real
# digits.


# %%
def errors_of(config, weights, images, backward=model_backward):
    """Return the directional error of a backward pass at these weights, all of them moved at once."""

    def forward(flat):
        return model_forward(images, Parameters(config.shapes(), flat), config)

    return directional_error(forward, lambda dout, cache: backward(dout, cache).flat, [weights.flat])


full = initialise(note, dtype=np.float64)
full.flat[...] += rng.normal(0, 0.02, full.flat.size)  # no weight is 0 or 1
error = errors_of(note, full, mnist.train_images[:2])
print(f"the note's model, {full.flat.size:,} weights, 7 forward passes: error {error:.0e}")
assert error < 1e-6

# %% [markdown]
# ## Why not at the start of training
#
# It is tempting to check a model as it is initialised. But then every gain of a layer norm is 1 and every bias is 0,
# and whatever is multiplied with them can be forgotten unseen. Here is a backward pass of layer norm that forgets the
# gain, which is what `dnormalised = dout * w` is for.


# %%
def norm_without_gain(dout, cache):
    _, dw, db = layer_norm_backward(dout, cache)
    dx, _, _ = layer_norm_backward(dout, cache._replace(w=np.ones_like(cache.w)))
    return dx, dw, db


def forgetful_backward(dlogits, cache):
    return model_backward(dlogits, cache, norm_backward=norm_without_gain)


blind = errors_of(small, initialise(small, dtype=np.float64), images, forgetful_backward)
seeing = errors_of(small, weights, images, forgetful_backward)
print("a final layer norm whose backward pass forgets the gain:")
print(f"    weights as initialised: {blind:.0e}  nothing to be seen")
print(f"    all weights at random:  {seeing:.0e}  caught")
assert blind < 1e-6
assert seeing > 1e-3
assert errors_of(small, weights, images) < 1e-6  # and the right one is right there

# %% [markdown]
# ## It overfits sixteen images
#
# The next test is of everything at once: model, loss, gradient and optimiser. A model with tens of thousands of
# weights must be able to learn sixteen images by heart. If its loss does not go to zero, there is a bug, and no data,
# schedule or patience will help. It takes a second, and is the first thing to do with any new model.
#
# Where should the loss begin? Who knows nothing and says so gives each of ten classes a tenth, and pays
# $\ln 10 ≈ 2.30$. A new model knows nothing, and does not say so: its logits are random numbers. It pays somewhat
# more. If the first loss is 0.1 or 50, look for the reason before you train.

# %%
config = ViTConfig(width=64, depth=2, heads=4, mlp_width=128)
few, truth = mnist.train_images[:16], mnist.train_labels[:16].astype(int)


def learn_by_heart(images, labels, steps):
    """Train on one batch again and again; return the weights and the loss before each step."""
    parameters, losses = initialise(config), []
    adam = Adam(parameters.flat)
    with one_blas_thread():  # for products as small as these a second core is more trouble than help
        for _ in range(steps):
            loss, _, gradients = loss_and_gradient(
                images=images,
                targets=labels,
                parameters=parameters,
                config=config,
            )
            adam.step(parameters.flat, gradients.flat, learning_rate=1e-3)
            losses.append(float(loss))
    return parameters, losses


steps = 60 if lesson.quick else 150
learned, losses = learn_by_heart(few, truth, steps)
nonsense = rng.permutation(truth)
_, nonsense_losses = learn_by_heart(few, nonsense, steps)

right = (vit_forward(few, learned, config)[0].argmax(axis=1) == truth).sum()
print(f"true labels: the first loss is {losses[0]:.2f}, the last {losses[-1]:.4f}; {right} of 16 are right")
false = (nonsense != truth).sum()
print(f"labels at random, {false} of 16 false: first {nonsense_losses[0]:.2f}, last {nonsense_losses[-1]:.4f}")
print(f"(to know nothing costs {np.log(10):.2f})")
assert 2 < losses[0] < 5
assert losses[-1] < 0.05
assert nonsense_losses[-1] < 0.05
assert right == 16

# %% [markdown]
# The second line is worth a thought. We shuffled the labels, so that most of them are false, and the model learned
# those by heart as well. A loss that goes to zero on images which were trained on says that the machine can learn,
# not even that its gradients are right (lesson 14). It does not say that anything was understood. What it makes of
# other images says that.

# %%
fresh_images, fresh_labels = mnist.train_images[16:1016], mnist.train_labels[16:1016]
fresh = np.mean(vit_forward(fresh_images, learned, config, with_cache=False)[0].argmax(axis=1) == fresh_labels)
print(f"of 1,000 other images, {fresh:.0%} are right: sixteen examples teach a little")
assert 0.15 < fresh < 0.7

figure, (left, middle) = lesson.figure(7, 2.9, columns=2, width_ratios=(1.5, 1))
left.semilogy(losses, color=BLUE, label="true labels")
left.semilogy(nonsense_losses, color=ORANGE, label="labels at random")
left.axhline(np.log(10), color=MUTED, linewidth=1, linestyle=":")
left.text(steps, np.log(10) * 1.15, "to know nothing", ha="right", color=MUTED, fontsize=SMALL)
left.set_xlabel("step")
left.set_ylabel("loss, nats")
left.set_title("Sixteen images, learned by heart")
left.legend()
sheet = few.reshape(4, 4, 28, 28).swapaxes(1, 2).reshape(112, 112)  # whole rows of four images, one below another
show(middle, sheet, "The sixteen")
lesson.save(figure, "sixteen_images")

# %% [markdown]
# ## Down to the pixels
#
# The gradient need not stop at the patch embedding. One step further down it says how the loss changes with the
# brightness of every pixel: where more ink would help, and where it would hurt. (With this, one can also *change* an
# image until a model errs; that is how adversarial examples are made.) We check one pixel by central differences, in
# float64, and then draw it for the model that knows its sixteen images by heart: for four *other* images, and the
# loss of their true label.

# %%
exact = learned.with_flat(learned.flat.astype(np.float64))
others, labels = mnist.train_images[16:20] / 255, mnist.train_labels[16:20].astype(int)


def loss_of(images):
    logits, cache = vit_forward(images, exact, config)
    loss, loss_cache = cross_entropy_forward(logits, labels)
    return loss, cache, loss_cache


loss, cache, loss_cache = loss_of(others)
_, dimages = vit_backward_to_images(cross_entropy_backward(1.0, loss_cache), cache)  # (B, 28, 28)

above, below = others.copy(), others.copy()
above[0, 14, 14] += 1e-5
below[0, 14, 14] -= 1e-5
slope = (loss_of(above)[0] - loss_of(below)[0]) / 2e-5
print(f"one pixel: the slope of the loss is {dimages[0, 14, 14]:.6f}, by central differences {slope:.6f}")
assert np.isclose(dimages[0, 14, 14], slope, rtol=1e-4, atol=1e-8)

probabilities = softmax_forward(vit_forward(others, exact, config)[0])[0]
figure, grid = lesson.figure(7, 4.1, rows=2, columns=4)
for column in range(4):
    guess = probabilities[column].argmax()
    show(grid[0, column], mnist.train_images[16 + column], f"a {labels[column]}, taken for a {guess}")
    show(grid[1, column], -dimages[column], "ink helps (violet) or hurts" if column == 0 else "", signed=True)
lesson.save(figure, "pixels")

# %% [markdown]
# You see the grid of the patches: a model that has met sixteen images has no idea yet that pixels on the two sides of
# a patch's edge are neighbours.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/11_vision_transformer.py`.
#
# **1.** How many weights does a Vision Transformer have? Count them from its sizes: patches and their bias, class
# token, positions, blocks with two norms each, the last norm, the head. No array is needed, only arithmetic.


# %%
def exercise_1(image_size, patch_size, width, depth, mlp_width, classes):
    """Return the number of weights of a Vision Transformer for images of one channel, a whole number."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** Some Vision Transformers read no class token: they classify the *mean* of the other tokens,
# $y_d = \frac{1}{T-1} ∑_{t ≥ 1} z_{td}$. Derive what this sends back to every token.


# %%
def exercise_2(dy, tokens):
    """Return dz (B, T, D) for dy (B, D), where y = z[:, 1:].mean(axis=1) and `tokens` is T."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** A batch does not fit into the memory, so it is cut into shards, perhaps not all of one size. For each we have
# the number of its images, the mean loss over them, and the gradient of that mean. What are the mean loss of the
# whole batch, and its gradient?


# %%
def exercise_3(counts, losses, gradients):
    """Return the batch's loss, a number, and gradient (P,), for counts (S,), losses (S,), gradients (S, P)."""
    return ..., ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** A whole-model check fails. *Which* array has the wrong gradient? Find out with a few calls of `f` an array:
# move one array alone, along random signs, twice or three times, and compare the slope with what the gradient says.
# `f` takes a dict of arrays and returns a number; `parameters` and `gradients` are dicts with the same names. (Copy
# an array before you change it. A relative error above 1e-4 is a lie, and what should you divide by if the gradient
# of an array is zero?)


# %%
def exercise_4(f, parameters, gradients):
    """Return the names of the arrays whose gradient is wrong, as one text: sorted, with ", " between them."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# We have a model that can learn anything, and sixteen images that it learned without understanding. The next lesson
# is about the difference: how to train so that it is right about images that it has never seen, and how to know.
