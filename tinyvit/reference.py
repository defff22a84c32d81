"""The whole Vision Transformer, its gradients, Adam and a training loop, as derived on paper. Read this first.

Every operation is a pair of functions. The forward pass returns its result and a cache. The backward pass takes the
gradient of the loss with respect to that result and returns the gradients with respect to the inputs, in their order.
The backward pass of the model begins with that of the loss, which needs only its cache.

    out, cache = linear_forward(x, w, b)
    dx, dw, db = linear_backward(dout, cache)

A comment above a derivative quotes the forward line that it belongs to. Shapes are written with B images, T tokens
(the patches and the class token), D the width of a token, H heads, K = D / H the width of a head, F the width of
the MLP and P the side of a patch in pixels. Images are (B, R, C) with R rows and C columns. N is any other number of
rows, and "..." stands for any leading axes. Nothing here is tuned. `tinyvit/ops` and `tinyvit/model.py` compute the
same functions fast, and the tests require that they give the same numbers.

The model is that of Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", with blocks that normalise first.
"""

import numpy as np
from scipy.special import erf

PIXEL_MEAN, PIXEL_DEVIATION = 0.1307, 0.3081  # of MNIST's training images, with pixels from 0 to 1


def rows(x):
    """Flatten all axes but the last: (..., D) to (N, D), so that a sum over axis 0 covers all images and tokens."""
    return x.reshape(-1, x.shape[-1])


# ---- operations ----


def linear_forward(x, w, b):
    """Multiply the last axis of x (..., I) by w (I, O) and add b (O,)."""
    return x @ w + b, (x, w)


def linear_backward(dout, cache):
    """Return dx, dw and db for dout (..., O)."""
    x, w = cache
    # out[n, o] = sum over i of x[n, i] * w[i, o] + b[o]
    dx = dout @ w.T  # sum over o
    dw = rows(x).T @ rows(dout)  # sum over n
    db = rows(dout).sum(axis=0)  # sum over n
    return dx, dw, db


def layer_norm_forward(x, w, b, epsilon=1e-6):
    """Give every vector of x (..., D) mean 0 and variance 1, multiply by w (D,) and add b (D,)."""
    mean = x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    normalised = (x - mean) / deviation
    return normalised * w + b, (normalised, deviation, w)


def layer_norm_backward(dout, cache):
    """Return dx, dw and db for dout (..., D)."""
    normalised, deviation, w = cache
    # out = normalised * w + b
    dw = rows(dout * normalised).sum(axis=0)
    db = rows(dout).sum(axis=0)
    dnormalised = dout * w
    # normalised = (x - mean(x)) / deviation(x), where x also changes the mean and the deviation
    through_mean = dnormalised.mean(axis=-1, keepdims=True)
    through_deviation = normalised * (dnormalised * normalised).mean(axis=-1, keepdims=True)
    dx = (dnormalised - through_mean - through_deviation) / deviation
    return dx, dw, db


def gelu_forward(x):
    """Multiply every x by cdf(x), the probability that a standard normal variable is below x."""
    cdf = (1 + erf(x / 2**0.5)) / 2
    return x * cdf, (x, cdf)


def gelu_backward(dout, cache):
    """Return dx for dout, both of the shape of x."""
    x, cdf = cache
    # out = x * cdf(x), and the derivative of cdf is the normal density
    density = np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5
    return dout * (cdf + x * density)


def softmax_forward(x):
    """Turn the last axis of x (..., N) into positive weights that sum to 1."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))  # the shift cancels, and exp cannot overflow
    weights = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return weights, weights


def softmax_backward(dweights, weights):
    """Return dx for dweights (..., N), where the cache is the result of the forward pass."""
    # d weights[i] / d x[j] = weights[i] * ((i == j) - weights[j])
    return weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True))


def attention_forward(q, k, v):
    """Average the values v (..., T, K) for each query q (..., S, K), weighted by softmax(q @ k.T / sqrt(K))."""
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5  # (..., S, T)
    weights, _ = softmax_forward(scores)
    return weights @ v, (weights, q, k, v)


def attention_backward(dout, cache):
    """Return dq, dk and dv for dout (..., S, K)."""
    weights, q, k, v = cache
    # out = weights @ v
    dweights = dout @ v.swapaxes(-1, -2)
    dv = weights.swapaxes(-1, -2) @ dout
    # weights = softmax(scores)
    dscores = softmax_backward(dweights, weights)
    # scores = q @ k.T / sqrt(K)
    dproducts = dscores / q.shape[-1] ** 0.5
    dq = dproducts @ k
    dk = dproducts.swapaxes(-1, -2) @ q
    return dq, dk, dv


def split_heads(x, heads):
    """Reshape x from (B, T, D) to (B, H, T, K), so that head h has columns h * K to (h + 1) * K."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(1, 2)


def join_heads(x):
    """Reshape x from (B, H, T, K) to (B, T, D), the inverse of `split_heads`."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def multi_head_attention_forward(x, w_qkv, b_qkv, w_out, b_out, heads):
    """Apply attention to the tokens x (B, T, D) in several heads, with w_qkv (D, 3D) and w_out (D, D)."""
    qkv, qkv_cache = linear_forward(x, w_qkv, b_qkv)
    q, k, v = (split_heads(part, heads) for part in np.split(qkv, 3, axis=-1))  # (B, H, T, K) each
    attended, attention_cache = attention_forward(q, k, v)
    out, out_cache = linear_forward(join_heads(attended), w_out, b_out)
    return out, (qkv_cache, attention_cache, out_cache, heads)


def multi_head_attention_backward(dout, cache):
    """Return dx, dw_qkv, db_qkv, dw_out and db_out for dout (B, T, D)."""
    qkv_cache, attention_cache, out_cache, heads = cache
    dattended, dw_out, db_out = linear_backward(dout, out_cache)
    dq, dk, dv = attention_backward(split_heads(dattended, heads), attention_cache)
    dqkv = np.concatenate([join_heads(dq), join_heads(dk), join_heads(dv)], axis=-1)
    dx, dw_qkv, db_qkv = linear_backward(dqkv, qkv_cache)
    return dx, dw_qkv, db_qkv, dw_out, db_out


def patches_forward(images, patch_size):
    """Cut images (B, R, C) into squares, row by row: (B, N, P*P). The patch size may also be (rows, columns)."""
    batch, rows, columns, *channels = images.shape  # a colour image has (B, R, C, 3)
    height, width = np.broadcast_to(patch_size, 2)
    grid = images.reshape(batch, rows // height, height, columns // width, width, *channels)
    return grid.swapaxes(2, 3).reshape(batch, rows // height * (columns // width), -1)  # the last two: (N, P*P)


def patch_embedding_forward(
    images, w, b, class_token, positions, patch_size, mean=PIXEL_MEAN, deviation=PIXEL_DEVIATION
):
    """Turn images (B, R, C) with pixels from 0 to 1 into tokens (B, T, D), with the class token first."""
    pixels = patches_forward((images - mean) / deviation, patch_size)
    embedded, linear_cache = linear_forward(pixels, w, b)
    first = np.broadcast_to(class_token, (len(images), 1, len(class_token)))
    return np.concatenate([first, embedded], axis=1) + positions, linear_cache


def patch_embedding_backward(dtokens, linear_cache):
    """Return dw, db, dclass_token and dpositions for dtokens (B, T, D), but no gradient of the images."""
    # tokens = [class_token, pixels @ w + b] + positions, with the same class token and positions for every image
    dpositions = dtokens.sum(axis=0)
    dclass_token = dtokens[:, 0].sum(axis=0)
    _, dw, db = linear_backward(dtokens[:, 1:], linear_cache)
    return dw, db, dclass_token, dpositions


def cross_entropy_forward(logits, labels):
    """Return the mean over the batch of -log softmax(logits)[label], for logits (B, classes) and labels (B,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # finite where the softmax rounds to 0
    loss = -log_softmax[np.arange(len(labels)), labels].mean()
    return loss, (np.exp(log_softmax), labels)


def cross_entropy_backward(cache):
    """Return dlogits (B, classes)."""
    probabilities, labels = cache
    # d -log softmax(logits)[label] / d logits[j] = softmax(logits)[j] - (j == label)
    dlogits = probabilities.copy()
    dlogits[np.arange(len(labels)), labels] -= 1
    return dlogits / len(labels)


# ---- the model: `parameters` and `gradients` are dicts of arrays with the same names ----


def pair(parameters, name):
    """Return a layer's weight and bias."""
    return parameters[f"{name}.weight"], parameters[f"{name}.bias"]


def block_forward(x, parameters, name, heads):
    """Compute x = x + attention(norm1(x)), then out = x + mlp(norm2(x)), for tokens x (B, T, D)."""
    qkv, projection = pair(parameters, f"{name}.attention.qkv"), pair(parameters, f"{name}.attention.projection")
    normed, norm1_cache = layer_norm_forward(x, *pair(parameters, f"{name}.norm1"))
    attended, attention_cache = multi_head_attention_forward(normed, *qkv, *projection, heads)
    x = x + attended
    normed, norm2_cache = layer_norm_forward(x, *pair(parameters, f"{name}.norm2"))
    hidden, fc1_cache = linear_forward(normed, *pair(parameters, f"{name}.mlp.fc1"))  # (B, T, F)
    active, gelu_cache = gelu_forward(hidden)
    mlp, fc2_cache = linear_forward(active, *pair(parameters, f"{name}.mlp.fc2"))
    return x + mlp, (norm1_cache, attention_cache, norm2_cache, fc1_cache, gelu_cache, fc2_cache)


def block_backward(dout, cache, gradients, name):
    """Return dx (B, T, D) for dout (B, T, D), and put the block's gradients into `gradients`."""
    norm1_cache, attention_cache, norm2_cache, fc1_cache, gelu_cache, fc2_cache = cache

    def keep(layer, dw, db):
        gradients[f"{name}.{layer}.weight"], gradients[f"{name}.{layer}.bias"] = dw, db

    # out = x + fc2(gelu(fc1(norm2(x)))), where x acts directly and through the MLP
    dactive, *fc2 = linear_backward(dout, fc2_cache)
    dhidden = gelu_backward(dactive, gelu_cache)
    dnormed, *fc1 = linear_backward(dhidden, fc1_cache)
    dx, *norm2 = layer_norm_backward(dnormed, norm2_cache)
    dout = dout + dx
    # x = x + attention(norm1(x))
    dnormed, dw_qkv, db_qkv, dw_out, db_out = multi_head_attention_backward(dout, attention_cache)
    dx, *norm1 = layer_norm_backward(dnormed, norm1_cache)
    keep("norm1", *norm1)
    keep("attention.qkv", dw_qkv, db_qkv)
    keep("attention.projection", dw_out, db_out)
    keep("norm2", *norm2)
    keep("mlp.fc1", *fc1)
    keep("mlp.fc2", *fc2)
    return dout + dx


def vit_forward(images, parameters, heads=4, patch_size=7, mean=PIXEL_MEAN, deviation=PIXEL_DEVIATION):
    """Return logits (B, classes) for images (B, R, C) with pixels from 0 to 1."""
    embedding = *pair(parameters, "patch_embedding"), parameters["class_token"], parameters["positions"]
    x, embedding_cache = patch_embedding_forward(images, *embedding, patch_size, mean, deviation)
    depth = sum(name.endswith("norm1.weight") for name in parameters)  # every block has one
    block_caches = []
    for i in range(depth):
        x, cache = block_forward(x, parameters, f"blocks.{i}", heads)
        block_caches.append(cache)
    normed, norm_cache = layer_norm_forward(x[:, 0], *pair(parameters, "norm"))  # only the class token is read
    logits, head_cache = linear_forward(normed, *pair(parameters, "head"))
    return logits, (embedding_cache, block_caches, norm_cache, head_cache, x.shape)


def vit_backward(dlogits, cache):
    """Return the gradient of every parameter, a dict of arrays, for dlogits (B, classes)."""
    embedding_cache, block_caches, norm_cache, head_cache, shape = cache
    gradients = {}
    dnormed, gradients["head.weight"], gradients["head.bias"] = linear_backward(dlogits, head_cache)
    dclass, gradients["norm.weight"], gradients["norm.bias"] = layer_norm_backward(dnormed, norm_cache)
    dx = np.zeros(shape, dclass.dtype)
    dx[:, 0] = dclass  # the other tokens of the last block are not read
    for i in reversed(range(len(block_caches))):
        dx = block_backward(dx, block_caches[i], gradients, f"blocks.{i}")
    dw, db, dclass_token, dpositions = patch_embedding_backward(dx, embedding_cache)
    gradients["patch_embedding.weight"], gradients["patch_embedding.bias"] = dw, db
    gradients["class_token"], gradients["positions"] = dclass_token, dpositions
    return gradients


def loss_and_gradient(images, labels, parameters, heads=4, patch_size=7, mean=PIXEL_MEAN, deviation=PIXEL_DEVIATION):
    """Return the mean loss of a batch, the number of correct predictions, and the gradient."""
    logits, cache = vit_forward(images, parameters, heads, patch_size, mean, deviation)
    loss, loss_cache = cross_entropy_forward(logits, labels)
    gradients = vit_backward(cross_entropy_backward(loss_cache), cache)
    return loss, (logits.argmax(axis=1) == labels).sum(), gradients


# ---- training ----


def initialise(rng, image_size=28, patch_size=7, channels=1, width=128, depth=4, mlp_width=512, classes=10):
    """Draw parameters, with matrices as in Glorot and Bengio 2010 and standard normal positions."""
    parameters = {}

    def linear(name, inputs, outputs):
        bound = np.sqrt(6 / (inputs + outputs))
        parameters[f"{name}.weight"] = rng.uniform(-bound, bound, (inputs, outputs))
        parameters[f"{name}.bias"] = np.zeros(outputs)

    def norm(name):
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = np.ones(width), np.zeros(width)

    linear("patch_embedding", np.broadcast_to(patch_size, 2).prod() * channels, width)
    parameters["class_token"] = rng.standard_normal(width)
    patches = np.prod(np.broadcast_to(image_size, 2) // patch_size)
    parameters["positions"] = rng.standard_normal((patches + 1, width))
    for i in range(depth):
        norm(f"blocks.{i}.norm1")
        linear(f"blocks.{i}.attention.qkv", width, 3 * width)
        linear(f"blocks.{i}.attention.projection", width, width)
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.mlp.fc1", width, mlp_width)
        linear(f"blocks.{i}.mlp.fc2", mlp_width, width)
    norm("norm")
    linear("head", width, classes)
    return parameters


def adam_step(parameters, gradients, m, v, step, learning_rate, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """Update every parameter and its moments m and v in place (Kingma and Ba 2015), with steps from 1."""
    for name, g in gradients.items():
        m[name] = beta1 * m[name] + (1 - beta1) * g
        v[name] = beta2 * v[name] + (1 - beta2) * g**2
        m_hat = m[name] / (1 - beta1**step)  # corrects for moments that start at 0
        v_hat = v[name] / (1 - beta2**step)
        parameters[name] -= learning_rate * m_hat / (np.sqrt(v_hat) + epsilon)


def train(images, labels, steps=300, batch_size=64, learning_rate=1e-3, seed=0):
    """Return the parameters of a new model, trained on images (N, 28, 28) with bytes 0 to 255 and labels (N,)."""
    rng = np.random.default_rng(seed)
    parameters = initialise(rng)
    m, v = ({name: np.zeros_like(x) for name, x in parameters.items()} for _ in range(2))
    for step in range(1, steps + 1):
        batch = rng.integers(len(images), size=batch_size)
        loss, correct, gradients = loss_and_gradient(images[batch] / 255, labels[batch], parameters)
        adam_step(parameters, gradients, m, v, step, learning_rate)
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}, {correct} of {batch_size} correct")
    return parameters
