# %% [markdown]
r"""
# 08 Attention, one head

**Goal.** To let every token gather what it needs from all others, and to derive the whole way back: the softmax's
Jacobian, and the gradients of queries, keys and values. And to watch a trained model choose where on a digit to look.

**The one equation.** Each query takes a mean of the values, weighted by how well their keys fit it. With $K$ numbers
in a query,

$$
o_s = ∑_t a_{st} v_t, \qquad a_{st} = \frac{\exp(x_{st})}{∑_u \exp(x_{su})},
\qquad x_{st} = \frac{q_s · k_t}{\sqrt{K}}
$$

**Source.** A. Vaswani et al., *Attention Is All You Need*, 2017, section 3.2.1, equation 1.

**Time.** An hour and a half to read and play, ten to twenty minutes an exercise, the last one longer. The script runs
in about twenty seconds.
"""

# %%
import numpy as np
from kit import BLUE, ORANGE, TEXT, Lesson, show

from tinyvit import reference
from tinyvit.data import load_mnist
from tinyvit.gpu import get_backend
from tinyvit.gradcheck import gradient_error
from tinyvit.model import ViTConfig, block_attention, vit_forward
from tinyvit.ops import (
    attention_backward,
    attention_forward,
    layer_norm_forward,
    linear_forward,
    patch_embedding_forward,
    softmax_backward,
    softmax_forward,
)
from tinyvit.plots import RELEVANCE
from tinyvit.training import Training, TrainingConfig

lesson = Lesson("08_attention")
rng = np.random.default_rng(8)
mnist = load_mnist()

# %% [markdown]
# ## To look something up, softly
#
# After lesson 07 an image is a set of tokens, and no token knows of any other. A linear layer could mix them, with a
# weight for every pair of places; but such weights are the same for every image. What a token needs from others
# depends on what is *in* the image: whether a stroke is the top of a 7 or of a 5 is settled by what is below it,
# wherever that lies. So the weights must be computed from the tokens themselves.
#
# Think of a dictionary. You come with a *query*, compare it with all *keys*, and take the *value* of the key that
# fits. Attention does this with vectors, and softly: how well a key fits is the dot product $q_s · k_t$, and instead
# of the best value alone we take a mean of all values, in which those that fit better weigh more. Softly, because a
# choice has no derivative, and a mean has.
#
# The weights have to be positive and sum to one, and the softmax of lesson 03 makes such numbers of any scores. That
# is the equation at the top. Here $S$ queries look at $T$ tokens; in a transformer each token asks, so that $S = T$,
# but it is easier to keep track of two letters.


# %%
def attention_by_index(q, k, v):
    """Return out (S, K) and the weights (S, T) for q (S, K), k and v (T, K), as the equation says it."""
    (S, K), T = q.shape, len(k)
    scores, weights, out = np.zeros((S, T)), np.zeros((S, T)), np.zeros((S, K))
    for s, t in np.ndindex(S, T):
        scores[s, t] = sum(q[s, i] * k[t, i] for i in range(K)) / np.sqrt(K)
    for s, t in np.ndindex(S, T):
        weights[s, t] = np.exp(scores[s, t]) / sum(np.exp(scores[s, u]) for u in range(T))
    for s, i in np.ndindex(S, K):
        out[s, i] = sum(weights[s, t] * v[t, i] for t in range(T))
    return out, weights


q = rng.standard_normal((3, 4))  # (S, K)
k, v = rng.standard_normal((2, 5, 4))  # (T, K) each
scale = 1 / np.sqrt(q.shape[1])
weights, _ = softmax_forward(scale * q @ k.T)  # (S, T)
out = weights @ v  # (S, K)

for ours, by_index in zip((out, weights), attention_by_index(q, k, v), strict=True):
    assert np.allclose(ours, by_index, atol=1e-14)
assert np.allclose(out, attention_forward(q, k, v)[0], atol=1e-14)
assert np.allclose(weights.sum(axis=1), 1)
print(f"{len(q)} queries, {len(k)} keys and values -> out {out.shape}, the same by index, by product and by tinyvit")

# %% [markdown]
# ## A set has no order
#
# Exchange two tokens, keys with their values, and nothing changes: a sum does not mind in which order it is taken.
# Let the tokens themselves ask, and exchange them all, and the outputs are exchanged in the same way. This law holds
# for attention and not for every layer, and it is why lesson 07 had to add positions.

# %%
order = rng.permutation(5)
assert np.allclose(attention_forward(q, k[order], v[order])[0], out, atol=1e-14)
assert np.allclose(
    attention_forward(k[order], k[order], v[order])[0], attention_forward(k, k, v)[0][order], atol=1e-14
)
print("tokens in another order: the same outputs, in that other order")

# %% [markdown]
# ## The softmax's Jacobian
#
# Now backward. The hard part is the softmax, for each of its outputs depends on *all* of its inputs: if one weight
# grows, the others must shrink. Take one row, $a_i = \exp(x_i) / Z$ with $Z = ∑_u \exp(x_u)$. How does $a_i$ change
# with $x_j$? As a product of $\exp(x_i)$ and $1/Z$,
#
# $$
# \frac{∂a_i}{∂x_j} = \frac{1}{Z} \frac{∂\exp(x_i)}{∂x_j} - \frac{\exp(x_i)}{Z^2} \frac{∂Z}{∂x_j}
# $$
#
# The first derivative is $\exp(x_i)$ if $i = j$ and zero otherwise; write $δ_{ij}$ for 1 if $i = j$ and 0 otherwise.
# The second is $\exp(x_j)$, whatever $j$, as $Z$ contains each exponential once. Then everything can be said by the
# $a$ themselves:
#
# $$
# \frac{∂a_i}{∂x_j} = δ_{ij} a_i - a_i a_j = a_i (δ_{ij} - a_j)
# $$
#
# Such a table of all derivatives of all outputs is the *Jacobian*: as a matrix, $\mathrm{diag}(a) - a a^T$. On the
# diagonal stands $a_i (1 - a_i)$, which is positive: a score raises its own weight. Beside it stands $-a_i a_j$,
# which is negative: it lowers every other. And each row sums to zero, as $a_i (1 - ∑_j a_j) = 0$: to raise all scores
# by the same amount changes nothing.

# %%
a = softmax_forward(np.array([2.0, 1.0, 0.0, 1.5, -1.0]))[0]  # (N,)
jacobian = np.diag(a) - np.outer(a, a)  # (N, N)
assert np.allclose(jacobian.sum(axis=1), 0, atol=1e-15)

figure, panels = lesson.figure(7, 2.6, columns=2)
panels[0].bar(range(5), a, color=BLUE)
panels[0].set_xlabel("$i$, the token")
panels[0].set_title("weights $a_i$")
drawn = show(panels[1], jacobian, "their Jacobian $\\partial a_i/\\partial x_j$", signed=True)
panels[1].set_xlabel("$j$, the score that changes")
panels[1].set_ylabel("$i$, the weight")
figure.colorbar(drawn, ax=panels[1]).outline.set_visible(False)
lesson.save(figure, "jacobian")

# %% [markdown]
# ## Backward without the matrix
#
# Let $g_i = ∂L/∂a_i$ be what arrives. By the chain rule, over all outputs through which $x_j$ can reach the loss,
#
# $$
# \frac{∂L}{∂x_j} = ∑_i g_i a_i (δ_{ij} - a_j) = g_j a_j - a_j ∑_i g_i a_i = a_j (g_j - ∑_i g_i a_i)
# $$
#
# The sum does not depend on $j$: it is one number for the whole row, the mean of the $g_i$ with weights $a_i$. So no
# Jacobian need ever be built. The result says something, too: a score should grow if its token is better than what
# the mean already gives, and shrink if it is worse.


# %%
def our_softmax_backward(dweights, weights):
    """Return the gradient of the scores, of the shape of `weights` (..., N)."""
    mean = (dweights * weights).sum(axis=-1, keepdims=True)  # (..., 1)
    return weights * (dweights - mean)


g = rng.standard_normal(5)
assert np.allclose(our_softmax_backward(g, a), g @ jacobian, atol=1e-15)
dweights = rng.standard_normal(weights.shape)
assert np.allclose(our_softmax_backward(dweights, weights), softmax_backward(dweights, weights), atol=1e-15)

scores = rng.standard_normal((3, 5))
right = gradient_error(softmax_forward, our_softmax_backward, [scores])[0]
print(f"softmax backward, error against central differences: {right:.0e}")
assert right < 1e-8

# %% [markdown]
# A tempting slip is to think of softmax as acting on each number by itself, as GELU does, and to keep the diagonal
# only: $∂L/∂x_j = g_j a_j (1 - a_j)$. The shapes are right, most of the signs are right, and a network even learns
# with it. The check is not fooled.


# %%
def diagonal_only(dweights, weights):
    return dweights * weights * (1 - weights)


wrong = gradient_error(softmax_forward, diagonal_only, [scores])[0]
same_sign = np.mean(np.sign(diagonal_only(dweights, weights)) == np.sign(our_softmax_backward(dweights, weights)))
print(f"the diagonal only: error {wrong:.0e}, though {same_sign:.0%} of the signs are right")
assert wrong > 0.05
assert same_sign > 0.5

# %% [markdown]
# ## Queries, keys and values
#
# The rest is lesson 02 twice over. Write $d o_{si}$ for $∂L/∂o_{si}$, and so on. In $o_{si} = ∑_t a_{st} v_{ti}$ the
# weight $a_{st}$ occurs in row $s$ alone, for every $i$; the value $v_{ti}$ occurs in every row, as every query may
# use it:
#
# $$
# d a_{st} = ∑_i d o_{si} v_{ti} = d o_s · v_t, \qquad d v_{ti} = ∑_s a_{st} \, d o_{si}
# $$
#
# The softmax turns $da$ into $dx$, row by row. And in $x_{st} = ∑_i q_{si} k_{ti} / \sqrt{K}$ a query occurs in its
# row, with all keys, and a key in its column, with all queries:
#
# $$
# d q_{si} = \frac{1}{\sqrt{K}} ∑_t d x_{st} k_{ti}, \qquad d k_{ti} = \frac{1}{\sqrt{K}} ∑_s d x_{st} q_{si}
# $$
#
# Read the last two as instructions: a query moves towards the keys whose weight should grow, and each key towards the
# queries by which it should be found.


# %%
def attention_backward_by_index(dout, q, k, v, weights):
    """Return dq, dk, dv, one sum after the other."""
    (S, K), T = q.shape, len(k)
    dweights, dscores = np.zeros((S, T)), np.zeros((S, T))
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for s, t in np.ndindex(S, T):
        dweights[s, t] = sum(dout[s, i] * v[t, i] for i in range(K))
    for s, t in np.ndindex(S, T):
        mean = sum(dweights[s, u] * weights[s, u] for u in range(T))
        dscores[s, t] = weights[s, t] * (dweights[s, t] - mean)
    for t, i in np.ndindex(T, K):
        dv[t, i] = sum(weights[s, t] * dout[s, i] for s in range(S))
        dk[t, i] = sum(dscores[s, t] * q[s, i] for s in range(S)) / np.sqrt(K)
    for s, i in np.ndindex(S, K):
        dq[s, i] = sum(dscores[s, t] * k[t, i] for t in range(T)) / np.sqrt(K)
    return dq, dk, dv


dout = rng.standard_normal(out.shape)  # (S, K)
dv = weights.T @ dout  # (T, K), sum over the queries
dweights = dout @ v.T  # (S, T)
dscores = scale * our_softmax_backward(dweights, weights)  # (S, T), of q @ k.T before it is scaled
dq = dscores @ k  # (S, K), sum over the tokens
dk = dscores.T @ q  # (T, K), sum over the queries

for ours, by_index in zip((dq, dk, dv), attention_backward_by_index(dout, q, k, v, weights), strict=True):
    assert np.allclose(ours, by_index, atol=1e-14)
for ours, library in zip((dq, dk, dv), attention_backward(dout, attention_forward(q, k, v)[1]), strict=True):
    assert np.allclose(ours, library, atol=1e-14)

errors = gradient_error(attention_forward, attention_backward, [q, k, v])
print("gradient_error of dq, dk, dv:", ", ".join(f"{error:.0e}" for error in errors))
assert max(errors) < 1e-8

# %% [markdown]
# The attention above, and the backward pass of the softmax in it, are those of `tinyvit/reference.py`.

# %%
reference_out, reference_cache = reference.attention_forward(q, k, v)
np.testing.assert_allclose(out, reference_out, rtol=1e-10, atol=1e-12)
for ours, theirs in zip((dq, dk, dv), reference.attention_backward(dout, reference_cache), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
np.testing.assert_allclose(
    our_softmax_backward(dweights, weights), reference.softmax_backward(dweights, weights), rtol=1e-10, atol=1e-12
)
print("attention and its gradients are those of tinyvit/reference.py")

# %% [markdown]
# ## Why the square root
#
# Suppose that the numbers in $q$ and $k$ are independent, with mean 0 and variance 1. Each product $q_i k_i$ then has
# mean 0 and variance 1, and a sum of $K$ of them has variance $K$. So without a scale the scores grow as $\sqrt{K}$,
# and the softmax of large scores is nearly a choice: one weight is close to 1, the others are close to 0. All entries
# $a_i (δ_{ij} - a_j)$ of the Jacobian are then close to 0, and no gradient comes back. Divided by $\sqrt{K}$, scores
# have variance 1 whatever the width.
#
# We measure both: the largest of 50 weights, and how much of a random gradient gets through the softmax.

# %%
widths = 4 ** np.arange(6)  # K, 1 to 1024
tokens, draws = 50, (50 if lesson.quick else 400)
largest, through = {}, {}
for name in ("scaled", "not scaled"):
    largest[name], through[name] = [], []
    for K in widths:
        queries, keys = rng.standard_normal((draws, 1, K)), rng.standard_normal((draws, tokens, K))
        scores = queries @ keys.swapaxes(1, 2) / (np.sqrt(K) if name == "scaled" else 1)  # (draws, 1, T)
        row, _ = softmax_forward(scores)
        arriving = rng.standard_normal(row.shape)
        largest[name].append(row.max(axis=-1).mean())
        through[name].append(np.linalg.norm(softmax_backward(arriving, row), axis=-1).mean())
    print(f"{name:<11} K = 4: largest weight {largest[name][1]:.2f}, gradient {through[name][1]:.3f};", end=" ")
    print(f"K = 1024: {largest[name][-1]:.2f}, {through[name][-1]:.3f}")
assert largest["not scaled"][-1] > 0.85
assert largest["scaled"][-1] < 0.3
assert through["not scaled"][-1] < 0.5 * max(through["not scaled"])
assert through["scaled"][-1] > 0.7 * through["scaled"][1]

figure, panels = lesson.figure(7, 2.8, columns=2)
for axes, measured, title in (
    (panels[0], largest, "the largest of 50 weights"),
    (panels[1], through, "norm of the gradient behind the softmax"),
):
    for (name, values), colour in zip(measured.items(), (BLUE, ORANGE), strict=True):
        axes.semilogx(widths, values, "o-", base=4, color=colour, markersize=4, label=name)
    axes.set_xticks(widths, widths)
    axes.minorticks_off()
    axes.set_xlabel("width $K$ of queries and keys")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
panels[0].legend()
lesson.save(figure, "scale")

# %% [markdown]
# With scores that grow the gradient first grows as well, as more is decided by few tokens; then the choice is made,
# and it fades.
#
# ## Where a trained model looks
#
# In a Vision Transformer queries, keys and values are three linear layers of the same token: what I look for, what I
# have to offer, what I tell. All are learned. We train the smallest model in which that can be seen: one block, one
# head, and the class token asking 49 patches of 4 x 4 pixels, once, before it has to name the digit. It is the
# library's, whose other parts come in the next lessons. We do it twice, from two seeds.

# %%
config = ViTConfig(patch_size=4, width=64, depth=1, heads=1, mlp_width=128)
count = 6400 if lesson.quick else 19_200


def train(seed):
    """Return the trained weights, and the share of 1,000 images held back that is classified correctly."""
    recipe = TrainingConfig(
        epochs=2 if lesson.quick else 6,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=50,
        beta2=0.98,
        validation=1000,
        seed=seed,
    )
    data = mnist.train_images[: count + 1000], mnist.train_labels[: count + 1000]
    training = Training(config, recipe, *data, get_backend("cpu"), workers=1)  # for so small a model one process
    training.run()
    return training.state.parameters, training.state.history[-1]["validation_accuracy"]


trained = [train(seed) for seed in (0, 1)]
for seed, (_, accuracy) in enumerate(trained):
    print(f"seed {seed}: of 1,000 images that were held back {accuracy:.1%} are right, after one look")
    assert accuracy > (0.4 if lesson.quick else 0.8)

# %% [markdown]
# First we make sure that we know what it computes. From its weights, with our own equation: embed the image,
# normalise, take the class token's query and everybody's keys, and the softmax of the scores. The library keeps the
# same weights in its cache.

# %%
parameters, _ = trained[0]
examples = np.array([np.flatnonzero(mnist.test_labels == digit)[0] for digit in range(10)])
digits = mnist.test_images[examples]  # (10, 28, 28)

tokens, _ = patch_embedding_forward(
    digits,
    *parameters.pair("patch_embedding"),
    parameters["class_token"],
    parameters["positions"],
    config.patch_size,
    config.pixel_mean,
    config.pixel_deviation,
)  # (10, T, D)
normed, _ = layer_norm_forward(tokens, *parameters.pair("blocks.0.norm1"), config.epsilon)
qkv, _ = linear_forward(normed, *parameters.pair("blocks.0.attention.qkv"))  # (10, T, 3D): three layers side by side
D = config.width
query, keys = qkv[:, 0, :D], qkv[:, :, D : 2 * D]  # (10, D), (10, T, D)
scores = np.einsum("nd,ntd->nt", query, keys) / np.sqrt(D)  # (10, T)
looks, _ = softmax_forward(scores)  # (10, T)

logits, cache = vit_forward(digits, parameters, config)
assert np.allclose(looks, block_attention(cache)[0][:, 0, 0], atol=1e-4)
assert np.allclose(query, query[0], atol=1e-5)
print("the class token's weights: the same from our equation and from tinyvit's cache, to four digits")
print("its query is the same for all ten images, its keys are not")

# %% [markdown]
# The class token has seen nothing yet when it asks: its query is the same for every image. What differs is who
# answers, since keys are made of pixels and places. So the query is one learned question, put to all images alike. In
# the picture darker is more weight. What does the first model ask for, and what the second?

# %%
figure, panels = lesson.figure(7, 2.4, rows=2, columns=7)
figure.suptitle("One learned question for all images, from two seeds", x=0.01, ha="left", fontsize=TEXT + 1)
chosen = [0, 1, 2, 3, 5, 7, 8]
everything = mnist.test_images[:1000]
ink = (
    everything.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49) > 16
)  # (1000, 49), some stroke in the patch
print(f"{ink.mean():.0%} of all patches have ink on them")

for seed, (row, (parameters, _)) in enumerate(zip(panels, trained, strict=True)):
    _, cache = vit_forward(digits[chosen], parameters, config)
    for axes, digit, weights in zip(row, digits[chosen], block_attention(cache)[0][:, 0, 0, 1:], strict=True):
        colour = RELEVANCE(weights.reshape(7, 7) / weights.max())[..., :3]  # (7, 7, 3)
        colour = np.kron(colour, np.ones((4, 4, 1)))  # (28, 28, 3), each patch a square of one colour
        show(axes, colour * (1 - digit[..., None] / 255))  # the ink is drawn over it
    row[0].set_ylabel(f"seed {seed}")

    _, cache = vit_forward(everything, parameters, config)
    attention = block_attention(cache)[0][:, 0, 0, 1:].astype(np.float64)  # (1000, 49)
    on_ink, largest_weight = (attention * ink).sum() / attention.sum(), attention.max(axis=1).mean()
    print(f"seed {seed}: {on_ink:.0%} of the attention goes to patches with ink;", end=" ")
    print(f"the largest weight is {largest_weight:.2f} on average, where even ones would be {1 / 49:.2f}")
    assert largest_weight > 2 / 49
lesson.save(figure, "looks")

# %% [markdown]
# When this was written, the first model looked at pieces of strokes, and the second at the paper between and beside
# them: into the loops of an 8, to the left and right of a 1. Both are good questions, for what is *not* there tells a
# digit as well. So a picture of attention shows what one model does; it is not the way a digit is recognised. And a
# weight says how much of a token's value is *taken*, not how much it matters for the answer: a value may be small, or
# be ignored by what follows.
#
# And a single mean is not much of an answer. What the class token learns of all patches is one vector, $∑_t a_t v_t$,
# in which a stroke on the left and one on the right are added up.
#
# ## Exercises
#
# Solutions are in `lessons/solutions/08_attention.py`.
#
# **1.** The Jacobian of one row, from its weights. Build it, as a matrix, for once.


# %%
def exercise_1(weights):
    """Return the Jacobian (N, N) of a softmax with weights (N,): d weights[i] / d scores[j] in row i, column j."""
    return ...


lesson.check(1, exercise_1)

# %% [markdown]
# **2.** Language models read from left to right: a token must not see those that come after it. `visible[s, t]` says
# whether query $s$ may look at token $t$; each may look at one at least. Those that it may not see get the weight
# zero, and the others share the whole. Mind large scores, visible or not: nothing may overflow.


# %%
def exercise_2(scores, visible):
    """Return weights (S, T) for scores (S, T) float and visible (S, T) bool."""
    return ...


lesson.check(2, exercise_2)

# %% [markdown]
# **3.** Let the scale be learned instead of $1/\sqrt{K}$: $x_{st} = c \, q_s · k_t$ with one number $c$ for all. What
# is its gradient? Where does $c$ occur?


# %%
def exercise_3(dout, q, k, v, c):
    """Return dc, a number, for dout and q (S, K), k and v (T, K)."""
    return ...


lesson.check(3, exercise_3)

# %% [markdown]
# **4.** For a long text the scores of all pairs do not fit into fast memory. Then one reads the keys and values once,
# a chunk at a time, and keeps for every query no more than the largest score so far, the sum of exponentials and the
# weighted sum of values; if a larger score comes, what was summed so far is rescaled. (Milakov and Gimelshein 2018,
# *Online normalizer calculation for softmax*; FlashAttention, Dao et al. 2022, is built on it.) Do it. The last chunk
# may be smaller, and scores may be in the hundreds.


# %%
def exercise_4(q, k, v, chunk):
    """Return out (S, K) of attention, reading `chunk` rows of k and v at a time; scores are scaled by 1/sqrt(K)."""
    return ...


lesson.check(4, exercise_4)

# %% [markdown]
# ## Where this leads
#
# From here on we import `attention_forward` and `attention_backward`. One query can ask one question only. The next
# lesson asks several at once, at the same price, and measures what that is worth.
