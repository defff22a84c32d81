# %% [markdown]
r"""
# 09 Many heads

**Goal.** To let a token ask several questions at once: to split a width into heads without mixing up the tokens, to
know what it costs, and to see what the heads of a trained model do.

**The one equation.** Head $h$ has its own query, key and value layers, of width $K = D/H$. What the heads find is put
side by side and goes through one more linear layer:

$$
y = [o^1, o^2, …, o^H] \, W^O + b^O, \qquad o^h = \mathrm{attention}(x W^Q_h, \; x W^K_h, \; x W^V_h)
$$

**Source.** A. Vaswani et al., *Attention Is All You Need*, 2017, section 3.2.2; for images, A. Dosovitskiy et al.,
*An Image is Worth 16x16 Words*, 2021, appendix A.

**Time.** An hour to read and play, ten to twenty minutes an exercise, the last one longer. The script runs in about
half a minute.
"""

# %%
import time

import numpy as np
from kit import BLUE, GREEN, ORANGE, TEXT, Lesson, show

from tinyvit import VisionTransformer, reference
from tinyvit.backend import one_blas_thread
from tinyvit.data import load_mnist
from tinyvit.gpu import get_backend
from tinyvit.gradcheck import gradient_error
from tinyvit.model import ViTConfig, block_attention, vit_forward
from tinyvit.ops import (
    attention_backward,
    attention_forward,
    linear_backward,
    linear_forward,
    multi_head_attention_backward,
    multi_head_attention_forward,
)
from tinyvit.plots import RELEVANCE
from tinyvit.training import Training, TrainingConfig

lesson = Lesson("09_many_heads")
rng = np.random.default_rng(9)
mnist = load_mnist()

# %% [markdown]
# ## One mean is not enough
#
# A head of attention answers a query with one mean of the values. If a token needs to know two things, say what the
# stroke does at the top *and* whether the loop at the bottom is closed, a mean of both is neither. It could ask
# twice, with two queries and two sets of keys and values. That is what heads are: $H$ attentions side by side, each
# with weights of its own.
#
# So that it costs no more, each head is narrower. The width $D$ of a token is divided by the number of heads, and a
# head works with $K = D/H$ numbers. Put side by side, the results have $D$ numbers again. The layer $W^O$ behind them
# lets the heads' findings act on all of the token.
#
# By index, for one image: we compute head by head, each from its own columns of the weights.


# %%
def heads_one_by_one(x, w_q, w_k, w_v, w_out, b_out, H):
    """Return out (T, D) for x (T, D), four weights (D, D) and a bias (D,), as the equation says it."""
    K = x.shape[1] // H
    found = []
    for h in range(H):
        mine = slice(h * K, (h + 1) * K)  # the columns of head h
        o, _ = attention_forward(x @ w_q[:, mine], x @ w_k[:, mine], x @ w_v[:, mine])  # (T, K)
        found.append(o)
    return np.concatenate(found, axis=1) @ w_out + b_out


T, D, H = 5, 12, 3
K = D // H
x = rng.standard_normal((T, D))
w_q, w_k, w_v, w_out = rng.standard_normal((4, D, D)) / np.sqrt(D)
b_out = rng.standard_normal(D)
out = heads_one_by_one(x, w_q, w_k, w_v, w_out, b_out, H)

w_qkv, b_qkv = np.concatenate([w_q, w_k, w_v], axis=1), np.zeros(3 * D)  # (D, 3D), as the library keeps them
library, _ = multi_head_attention_forward(x[None], w_qkv, b_qkv, w_out, b_out, H)
assert np.allclose(out, library[0], atol=1e-13)
print(f"{H} heads of width {K} on {T} tokens of width {D}: head by head the same as tinyvit's all at once")

# %% [markdown]
# There is another way to read the last product. Row $d$ of $W^O$ meets column $d$ of what is side by side, and a head
# owns $K$ such columns. So the product is a sum over heads, and each adds something to the token, independently of
# the others: $y = ∑_h o^h W^O_h + b^O$, where $W^O_h$ are the $K$ rows of head $h$. Below we switch heads off; this
# is why that is possible.

# %%
y = b_out.copy()
for h in range(H):
    mine = slice(h * K, (h + 1) * K)
    o, _ = attention_forward(x @ w_q[:, mine], x @ w_k[:, mine], x @ w_v[:, mine])
    y = y + o @ w_out[mine]  # (T, D)
assert np.allclose(y, out, atol=1e-13)

# %% [markdown]
# ## All heads at once: a reshape
#
# No loop over heads is needed. The three products `x @ w_q` and so on are computed whole, even as a single product
# with (D, 3D) weights. Then columns are sorted into heads: column $d = hK + i$ is number $i$ of head $h$. The last
# axis is split in two, (B, T, D) to (B, T, H, K), and then heads must come before tokens, (B, H, T, K), because the
# products of attention use the last two axes, and everything before them is a batch. A head is to attention what an
# image is: another one, side by side.
#
# The second step is an exchange of axes and not a reshape. `x.reshape(B, H, T, K)` has the same shape, and something
# else in it: it takes numbers as they come in memory, token after token. Draw which head gets which numbers of six
# tokens of width 8, and as which token.


# %%
def split_heads(x, H):
    """Return (B, H, T, K) for x (B, T, D): head h has the columns hK to (h+1)K of every token."""
    B, T, D = x.shape
    return x.reshape(B, T, H, D // H).swapaxes(1, 2)


def reshaped_only(x, H):
    """The same shape, and not the same numbers."""
    B, T, D = x.shape
    return x.reshape(B, H, T, D // H)


tokens, width, heads = 6, 8, 2
places = np.arange(tokens * width).reshape(1, tokens, width)  # every number is its own address
figure, panels = lesson.figure(7, 2.9, columns=2)
for axes, split, title in (
    (panels[0], split_heads, "split, then axes exchanged: right"),
    (panels[1], reshaped_only, "reshaped only: tokens are cut up"),
):
    parts = split(places, heads)[0]  # (H, T, K)
    owner, name = np.empty((2, tokens * width), int)
    for h, t in np.ndindex(heads, tokens):
        owner[parts[h, t]], name[parts[h, t]] = h, t
    axes.imshow(np.where(owner == 0, 0.25, -0.25).reshape(tokens, width), cmap="PuOr", vmin=-1, vmax=1)
    for (row, column), token in np.ndenumerate(name.reshape(tokens, width)):
        axes.text(column, row, token, ha="center", va="center", fontsize=8)
    axes.set_title(title)
    axes.set_xlabel("column of $x$")
    axes.set_ylabel("token of $x$")
    axes.grid(False)
lesson.save(figure, "reshape")

# %% [markdown]
# Violet is what the first head gets, orange the second; the number is the token that it takes it for. On the left
# each head has half of every token. On the right the first head has three whole tokens, each cut into two "tokens",
# and does not see the other three at all.
#
# Would we notice? Not by the gradient check. The wrong split is a function like any other, its backward pass is its
# derivative, and it can be trained. What it breaks is the *law* of lesson 08: tokens in another order must give the
# same outputs in that other order. So check laws, too.


# %%
def attend(x, split):
    """Return every token's findings (B, T, D) with x itself for queries, keys and values, and the cache."""
    part = split(x, H)
    o, cache = attention_forward(part, part, part)  # (B, H, T, K)
    found = o.swapaxes(1, 2).reshape(x.shape) if split is split_heads else o.reshape(x.shape)
    return found, cache


def attend_backward(dfound, cache, split):
    dq, dk, dv = attention_backward(split(dfound, H), cache)
    dpart = dq + dk + dv  # three ways from x to the loss
    joined = dpart.swapaxes(1, 2) if split is split_heads else dpart
    return joined.reshape(dfound.shape)


x = rng.standard_normal((2, T + 1, D))  # (B, T, D)
order = rng.permutation(T + 1)
for split, name in ((split_heads, "axes exchanged"), (reshaped_only, "reshaped only")):

    def backward(dfound, cache, split=split):
        return attend_backward(dfound, cache, split)

    error = gradient_error(lambda x, split=split: attend(x, split), backward, [x])[0]
    broken = np.abs(attend(x[:, order], split)[0] - attend(x, split)[0][:, order]).max()
    print(f"{name:<15} gradient check {error:.0e}; tokens in another order, outputs differ by {broken:.0e}")
    assert error < 1e-8
    assert (broken < 1e-12) == (split is split_heads)

# %% [markdown]
# ## Backward
#
# Nothing new is needed. A reshape and an exchange of axes move numbers, so backward moves them back. The linear
# layers are lesson 02, the attention is lesson 08, with two axes in front. And as one product made queries, keys and
# values, one product gathers their gradients: `dx = dqkv @ w_qkv.T` is the sum over three ways from $x$ to the loss.


# %%
def our_forward(x, w_qkv, b_qkv, w_out, b_out):
    qkv, qkv_cache = linear_forward(x, w_qkv, b_qkv)  # (B, T, 3D)
    q, k, v = (split_heads(part, H) for part in np.split(qkv, 3, axis=2))  # (B, H, T, K) each
    o, attention_cache = attention_forward(q, k, v)
    side_by_side = o.swapaxes(1, 2).reshape(x.shape)  # (B, T, D)
    y, out_cache = linear_forward(side_by_side, w_out, b_out)
    return y, (qkv_cache, attention_cache, out_cache)


def our_backward(dy, cache):
    qkv_cache, attention_cache, out_cache = cache
    dside_by_side, dw_out, db_out = linear_backward(dy, out_cache)
    parts = attention_backward(split_heads(dside_by_side, H), attention_cache)  # dq, dk, dv (B, H, T, K)
    dqkv = np.concatenate([part.swapaxes(1, 2).reshape(dy.shape) for part in parts], axis=2)  # (B, T, 3D)
    dx, dw_qkv, db_qkv = linear_backward(dqkv, qkv_cache)
    return dx, dw_qkv, db_qkv, dw_out, db_out


b_qkv = rng.standard_normal(3 * D)
inputs = [x, w_qkv, b_qkv, w_out, b_out]
ours, our_cache = our_forward(*inputs)
library, library_cache = multi_head_attention_forward(*inputs, H)
assert np.allclose(ours, library, atol=1e-13)
dy = rng.standard_normal(ours.shape)
for gradient, theirs in zip(
    our_backward(dy, our_cache), multi_head_attention_backward(dy, library_cache), strict=True
):
    assert np.allclose(gradient, theirs, atol=1e-12)

errors = gradient_error(our_forward, our_backward, inputs)
print("gradient_error of dx, dw_qkv, db_qkv, dw_out, db_out:", ", ".join(f"{error:.0e}" for error in errors))
assert max(errors) < 1e-8

# %% [markdown]
# The two functions above are those in `tinyvit/reference.py`, and so is `split_heads`.

# %%
assert np.array_equal(split_heads(x, H), reference.split_heads(x, H))
reference_y, reference_cache = reference.multi_head_attention_forward(*inputs, heads=H)
np.testing.assert_allclose(ours, reference_y, rtol=1e-10, atol=1e-12)
for gradient, theirs in zip(
    our_backward(dy, our_cache), reference.multi_head_attention_backward(dy, reference_cache), strict=True
):
    np.testing.assert_allclose(gradient, theirs, rtol=1e-10, atol=1e-12)
print("attention in several heads and its gradients are those of tinyvit/reference.py")

# %% [markdown]
# One detail hides in there. The gradient of the *keys'* bias is zero, always: such a bias adds $q_s · b_k$ to all
# scores of query $s$ alike, and a softmax does not see what all scores have in common.

# %%
db_qkv = our_backward(dy, our_cache)[2]
print(f"largest gradient of the keys' bias: {np.abs(db_qkv[D : 2 * D]).max():.0e}")
assert np.abs(db_qkv[D : 2 * D]).max() < 1e-12

# %% [markdown]
# ## What it costs
#
# Count multiplications for one image. Three layers $D → D$ and a fourth at the end take $T D^2$ each. The scores of a
# head are $T · T$ dot products of $K$ numbers; the means are as many again; and $H$ heads have $H K = D$ columns:
#
# $$
# 4 \, T D^2 + 2 \, T^2 D
# $$
#
# There is no $H$ in it: many heads cost as many multiplications as one. (They do keep $H T^2$ weights instead of
# $T^2$, and a softmax for each.) The first term grows with the number of tokens, the second with its square. They are
# equal at $T = 2D$.


# %%
def multiplications(T, D, H):
    """Count them for one image: (in the four linear layers, in scores and means)."""
    K = D // H
    return 4 * T * D * D, H * (T * T * K + T * T * K)


config = ViTConfig()
linear, pairs = multiplications(config.tokens, config.width, config.heads)
print(
    f"{config.tokens} tokens of width {config.width}, as in this library's model: {linear + pairs:,} multiplications"
)
print(f"a block and image for attention; {pairs / (linear + pairs):.0%} of them are for scores and means")
assert len({multiplications(17, 128, H) for H in (1, 2, 4, 8, 128)}) == 1
assert multiplications(256, 128, 4)[0] == multiplications(256, 128, 4)[1]

sizes = 2 ** np.arange(4, 13)
figure, axes = lesson.figure(7, 3)
counts = np.array([multiplications(T, 128, 4) for T in sizes.tolist()])
axes.loglog(sizes, counts[:, 0], "o-", base=2, color=BLUE, markersize=4, label="four linear layers, $4TD^2$")
axes.loglog(sizes, counts[:, 1], "o-", base=2, color=ORANGE, markersize=4, label="scores and means, $2T^2D$")
for tokens, name in ((17, "7 x 7"), (50, "4 x 4"), (785, "1 x 1")):
    axes.axvline(tokens, color=GREEN, linewidth=1)
    axes.text(tokens * 1.05, counts.max(), name, fontsize=7.5, va="top")
axes.set_yscale("log", base=10)
axes.set_xticks(sizes, sizes)
axes.set_xlabel("tokens $T$ (green: an MNIST image with patches of that many pixels)")
axes.set_ylabel("multiplications, $D = 128$")
axes.set_title("Pairs overtake at $T = 2D$")
axes.legend(loc="lower right")
lesson.save(figure, "cost")

# %% [markdown]
# And in seconds? The softmax and everything that is not a product of matrices counts too; so the time does grow with
# the number of heads, only not in proportion. On your machine, one core:

# %%
batch, width = rng.standard_normal((32, 17, 128), np.float32), 128
weights = [rng.standard_normal(shape, np.float32) / 11 for shape in ((128, 384), 384, (128, 128), 128)]
print("32 images, 17 tokens, width 128, forward:")
with one_blas_thread():
    for heads in (1, 2, 4, 8, 16):
        seconds = []
        for _ in range(5 if lesson.quick else 30):
            start = time.perf_counter()
            multi_head_attention_forward(batch, *weights, heads)
            seconds.append(time.perf_counter() - start)
        print(f"    {heads:>2} heads: {1000 * np.median(seconds):.1f} ms")

# %% [markdown]
# ## What heads are worth
#
# The same model as in lesson 08, in which the class token asks 49 patches once, now with one head, two, four and
# sixteen. The number of weights is the same for all, and so are images, steps and the seed.


# %%
def train(heads):
    """Return the trained model with so many heads."""
    config = ViTConfig(patch_size=4, width=64, depth=1, heads=heads, mlp_width=128)
    count = 6400 if lesson.quick else 12_800
    recipe = TrainingConfig(
        epochs=2 if lesson.quick else 5,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=50,
        beta2=0.98,
        validation=0,
    )
    data = mnist.train_images[:count], mnist.train_labels[:count]
    training = Training(config, recipe, *data, get_backend("cpu"), workers=1)
    training.run()
    return VisionTransformer(training.model_config, training.state.weights)


images, labels = mnist.test_images[:2000], mnist.test_labels[:2000]
models = {heads: train(heads) for heads in ((1, 4) if lesson.quick else (1, 2, 4, 16))}
accuracies = {heads: model.evaluate(images, labels).accuracy for heads, model in models.items()}
print("of 2,000 test images are classified correctly")
for heads, accuracy in accuracies.items():
    size = models[heads].parameters.flat.size
    print(f"    {heads:>2} heads of width {64 // heads:>2}: {accuracy:.1%}   ({size:,} weights)")
assert min(accuracies.values()) > (0.35 if lesson.quick else 0.7)
assert lesson.quick or accuracies[4] > accuracies[1] + 0.02

# %% [markdown]
# ## Where they look
#
# The model with four heads. The first column is each head's attention over 2,000 images, on average; then come seven
# digits, with the patches that this head looks at. All four ask about the same image at the same moment. (The darkest
# square of a picture is its own largest weight.)

# %%
model = models[4]
_, cache = vit_forward(images, model.parameters, model.config)
attention = block_attention(cache)[0][:, :, 0, 1:].astype(np.float64)  # (2000, H, 49)
examples = [np.flatnonzero(labels == digit)[0] for digit in (0, 2, 3, 4, 6, 7, 9)]


def coloured(weights):
    """Return the weights (49,) of the patches as a picture (28, 28, 3)."""
    colour = RELEVANCE(weights.reshape(7, 7) / weights.max())[..., :3]
    return np.kron(colour, np.ones((4, 4, 1)))


figure, panels = lesson.figure(7, 4.1, rows=4, columns=8)
figure.suptitle("Four heads, four questions", x=0.01, ha="left", fontsize=TEXT + 1)
for head, row in enumerate(panels):
    show(row[0], coloured(attention[:, head].mean(axis=0)), "on average" if head == 0 else "")
    row[0].set_ylabel(f"head {head}")
    for axes, example in zip(row[1:], examples, strict=True):
        show(axes, coloured(attention[example, head]) * (1 - images[example][..., None] / 255))
lesson.save(figure, "heads")

# %% [markdown]
# Do they look at different places? A number for that: take two heads' weights for the same image, and sum the smaller
# of the two over all patches. It is 1 if they are the same, and 0 if they share no patch.

# %%
overlap = np.minimum(attention[:, :, None], attention[:, None]).sum(axis=-1).mean(axis=0)  # (H, H)
share = attention.sum(axis=-1).mean(axis=0)  # (H,), all but the class token's own weight
between = overlap[np.triu_indices(4, 1)]
print(
    f"overlap of two heads: {between.min():.2f} to {between.max():.2f}; {share.mean():.2f} would be the same weights"
)
assert between.mean() < 0.8 * share.mean()

# %% [markdown]
# ## What they do
#
# Where a head looks is not yet what it is good for. So we switch them off, one at a time: with its rows of $W^O$ at
# zero, a head adds nothing to the token. (Nothing is trained again.) How many more of each digit are mistaken then?


# %%
def without_head(model, head):
    """Return the model with one head of its first block silenced."""
    K = model.config.width // model.config.heads
    parameters = model.parameters.with_flat(model.parameters.flat.copy())
    parameters["blocks.0.attention.projection.weight"][head * K : (head + 1) * K] = 0
    return VisionTransformer(model.config, parameters)


def accuracy_by_digit(model):
    right = model.predict(images) == labels
    return np.array([right[labels == digit].mean() for digit in range(10)])  # (10,)


whole = accuracy_by_digit(model)
losses = np.array([whole - accuracy_by_digit(without_head(model, head)) for head in range(4)])  # (H, 10)
silenced = [without_head(model, head).evaluate(images, labels).accuracy for head in range(4)]
print(f"all four heads: {accuracies[4]:.1%}; without head 0, 1, 2, 3:", ", ".join(f"{a:.1%}" for a in silenced))
assert np.mean(silenced) < accuracies[4]
assert lesson.quick or max(silenced) < accuracies[4]  # each is missed

figure, axes = lesson.figure(7, 2.6)
drawn = show(axes, 100 * losses, "What is lost without a head, in percent of each digit", signed=True)
axes.set_aspect("auto")
axes.grid(False)
for (head, digit), loss in np.ndenumerate(100 * losses):
    dark = abs(loss) > 0.6 * np.abs(100 * losses).max()
    axes.text(digit, head, f"{loss:.0f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
axes.set_xticks(range(10), range(10))
axes.set_yticks(range(4), [f"head {head}" for head in range(4)])
axes.set_xlabel("digit")
figure.colorbar(drawn, ax=axes).outline.set_visible(False)
lesson.save(figure, "silenced")

# %% [markdown]
# A number below zero is no mistake: without this head *more* images of that digit are right, as the model now calls
# more images by its name, other digits among them.
#
# In large models the picture is mixed. Many heads can be removed after training with little loss (Michel, Levy and
# Neubig 2019, *Are Sixteen Heads Really Better than One?*); some do what has a name, others do not. Here there are
# four, after a thousand steps, and each is missed.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/09_many_heads.py`.
#
# **1.** Put the heads together again.


# %%
def exercise_1(o):
    """Return (B, T, D) for what the heads found, o (B, H, T, K): head h has the columns hK to (h+1)K."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** In a block, attention is followed by an MLP: two linear layers, $D → F$ and $F → D$, for every token. At how
# many tokens do scores and means take as many multiplications as *all* linear layers of the block?


# %%
def exercise_2(D, F):
    """Return that number of tokens, for width D and MLP width F."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Give every head a volume, $y = ∑_h g_h \, o^h W^O_h$. To switch a head off is $g_h = 0$. The gradient by
# $g_h$, at $g = 1$, predicts what that would do, for all heads at once and without trying (Michel et al. rank heads
# by it). Find it.


# %%
def exercise_3(dy, o, w_out):
    """Return dg (H,) at g = 1, for dy (B, T, D), o (B, H, T, K), w_out (D, D)."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** Multi-query attention (Shazeer 2019, *Fast Transformer Decoding: One Write-Head is All You Need*): each head
# has queries of its own, but all heads share the keys and values, so that far fewer of those have to be kept. Derive
# its backward pass.


# %%
def exercise_4(dout, q, k, v):
    """Return dq (B, H, T, K), dk, dv (B, T, K) for dout, q (B, H, T, K), shared k, v (B, T, K), scale 1/sqrt(K)."""
    return ..., ..., ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import `multi_head_attention_forward` and its backward pass. Tokens can talk (attention) and think
# (the MLP of lesson 05). The next lesson makes a block of the two, such that many blocks can be stacked.
