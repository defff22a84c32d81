"""The same model and training step in PyTorch and JAX, written as their users write them.

Both start from the weights of tinyvit and take normalised pixels, so that a test can compare their results with those
of tinyvit (`tests/project/test_benchmarks.py`). Each function imports its own framework, so
the others work if it is missing.
"""

import functools
import math

import numpy as np


def torch_model(config, parameters=None, shortcut=False):
    """Return the Vision Transformer as a PyTorch module, with the weights of `parameters` if they are not None.

    shortcut: compute only the class token's query and output in the last block. Users rarely write this. tinyvit does
    it too, and also computes no keys and values there.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(config.width, 3 * config.width)
            self.projection = nn.Linear(config.width, config.width)

        def forward(self, x, queries):
            batch, tokens, width = x.shape
            if queries == config.tokens:
                q, k, v = self.qkv(x).view(batch, tokens, 3, config.heads, -1).permute(2, 0, 3, 1, 4).unbind()
            else:
                q = F.linear(x[:, :queries], self.qkv.weight[:width], self.qkv.bias[:width])
                q = q.view(batch, queries, config.heads, -1).transpose(1, 2)
                kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
                k, v = kv.view(batch, tokens, 2, config.heads, -1).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v)
            return self.projection(out.transpose(1, 2).reshape(batch, queries, width))

    class Block(nn.Module):
        def __init__(self, queries):
            super().__init__()
            self.queries = queries
            self.norm1 = nn.LayerNorm(config.width, eps=config.epsilon)
            self.attention = Attention()
            self.norm2 = nn.LayerNorm(config.width, eps=config.epsilon)
            self.mlp = nn.Sequential()
            self.mlp.add_module("fc1", nn.Linear(config.width, config.mlp_width))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("fc2", nn.Linear(config.mlp_width, config.width))

        def forward(self, x):
            x = x[:, : self.queries] + self.attention(self.norm1(x), self.queries)
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embedding = nn.Conv2d(1, config.width, config.patch_size, stride=config.patch_size)
            self.class_token = nn.Parameter(torch.zeros(config.width))
            self.positions = nn.Parameter(torch.zeros(config.tokens, config.width))
            last = 1 if shortcut else config.tokens
            queries = [config.tokens] * (config.depth - 1) + [last]
            self.blocks = nn.Sequential(*(Block(count) for count in queries))
            self.norm = nn.LayerNorm(config.width, eps=config.epsilon)
            self.head = nn.Linear(config.width, config.classes)

        def forward(self, pixels):
            embedded = self.patch_embedding(pixels[:, None]).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_token.expand(pixels.shape[0], 1, -1), embedded], dim=1) + self.positions
            return self.head(self.norm(self.blocks(x)[:, 0]))

    model = ViT()
    if parameters is not None:
        with torch.no_grad():
            for name, array in parameters.items():
                theirs = model.get_parameter(name)
                is_matrix = name.endswith("weight") and array.ndim == 2
                theirs.copy_(torch.tensor(array.T if is_matrix else array).reshape(theirs.shape))
    return model


def torch_train_step(config, parameters, batches, learning_rate, threads, compiled=False, shortcut=False):
    """Return a function that takes one training step on the next batch and returns the loss, a float.

    batches: a list of (pixels (B, R, C) float32, labels (B,)).
    """
    import torch

    torch.set_num_threads(threads)
    model = torch_model(config, parameters, shortcut)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    run = torch.compile(model) if compiled else model
    tensors = [(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))) for x, y in batches]
    count = 0

    def step():
        nonlocal count
        pixels, labels = tensors[count % len(tensors)]
        count += 1
        loss = torch.nn.functional.cross_entropy(run(pixels), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def torch_logits(config, parameters, threads, compiled=False):
    """Return a function from normalised pixels (B, R, C) to logits (B, classes), both NumPy arrays."""
    import torch

    torch.set_num_threads(threads)
    model = torch_model(config, parameters).eval()
    run = torch.compile(model) if compiled else model

    def logits(pixels):
        with torch.inference_mode():
            return run(torch.from_numpy(pixels)).numpy()

    return logits


def onnx_logits(config, parameters, threads, folder):
    """Return the same function as `torch_logits`, for ONNX Runtime.

    PyTorch exports the model into `folder`, unless the file exists. Running the model does not need PyTorch.
    """
    import onnxruntime

    path = folder / "model.onnx"
    if not path.exists():
        import onnx  # noqa: F401  PyTorch's exporter needs it and reports its absence late
        import torch

        torch.onnx.export(
            torch_model(config, parameters).eval(),
            (torch.zeros(1, config.image_size, config.image_size),),
            str(path),
            input_names=["pixels"],
            dynamic_axes={"pixels": {0: "batch"}},
            dynamo=False,
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def jax_forward(config, parameters, pixels):
    """Return the logits in jax.numpy, for a dict of parameters with the names of tinyvit."""
    import jax
    import jax.numpy as jnp

    def linear(x, name):
        return x @ parameters[name + ".weight"] + parameters[name + ".bias"]

    def norm(x, name):
        mean = x.mean(axis=-1, keepdims=True)
        variance = x.var(axis=-1, keepdims=True)
        normalised = (x - mean) * jax.lax.rsqrt(variance + config.epsilon)
        return normalised * parameters[name + ".weight"] + parameters[name + ".bias"]

    batch, side, p = len(pixels), config.image_size, config.patch_size
    grid = pixels.reshape(batch, side // p, p, side // p, p).swapaxes(2, 3)
    embedded = linear(grid.reshape(batch, -1, p * p), "patch_embedding")
    class_token = jnp.broadcast_to(parameters["class_token"], (batch, 1, config.width))
    x = jnp.concatenate([class_token, embedded], axis=1) + parameters["positions"]
    for i in range(config.depth):
        block = f"blocks.{i}."
        qkv = linear(norm(x, block + "norm1"), block + "attention.qkv")
        q, k, v = jnp.moveaxis(qkv.reshape(batch, config.tokens, 3, config.heads, -1), 2, 0)
        out = jax.nn.dot_product_attention(q, k, v)  # (B, T, H, K)
        x = x + linear(out.reshape(x.shape), block + "attention.projection")
        hidden = jax.nn.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"), approximate=False)
        x = x + linear(hidden, block + "mlp.fc2")
    return linear(norm(x[:, 0], "norm"), "head")


def jax_train_step(config, parameters, batches, learning_rate):
    """Return a function that takes one training step, compiled with donated buffers, and returns the loss."""
    import jax
    import jax.numpy as jnp

    def loss_of(weights, pixels, labels):
        log_probabilities = jax.nn.log_softmax(jax_forward(config, weights, pixels))
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(weights, m, v, count, pixels, labels):
        loss, gradient = jax.value_and_grad(loss_of)(weights, pixels, labels)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)
        rate = learning_rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        epsilon = 1e-8 * jnp.sqrt(1 - 0.999**count)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + epsilon), weights, m, v)
        return weights, m, v, loss

    weights = {name: jnp.array(array) for name, array in parameters.items()}
    m, v = jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights)
    arrays = [(jnp.array(x), jnp.array(y.astype(np.int32))) for x, y in batches]
    count = 0

    def step():
        nonlocal weights, m, v, count
        pixels, labels = arrays[count % len(arrays)]
        count += 1
        weights, m, v, loss = update(weights, m, v, float(count), pixels, labels)
        jax.block_until_ready(weights)
        return float(loss)

    return step


def jax_logits(config, parameters):
    """Return a function from normalised pixels (B, R, C) to logits (B, classes), both NumPy arrays."""
    import jax
    import jax.numpy as jnp

    weights = {name: jnp.array(array) for name, array in parameters.items()}
    run = jax.jit(functools.partial(jax_forward, config))
    return lambda pixels: np.asarray(run(weights, pixels))


def matrix_products(config, batch):
    """Return the matrix products of a plain training step: a dict from (count, m, n, k) to the number of calls.

    (count, m, n, k) stands for `count` products of an (m, k) by a (k, n) matrix in one call. All blocks compute all
    tokens. A weight has one product forward and two backward, for its input and for itself. The patch embedding needs
    no gradient of the pixels. Attention has two products forward and four backward per image and head.
    """
    products = {}

    def add(count, m, n, k, times=1):
        products[count, m, n, k] = products.get((count, m, n, k), 0) + times

    def linear(rows, inputs, outputs, times, first=False):
        add(1, rows, outputs, inputs, times)  # out = x @ w
        if not first:
            add(1, rows, inputs, outputs, times)  # dx = dout @ w.T
        add(1, inputs, outputs, rows, times)  # dw = x.T @ dout

    t, d = config.tokens, config.width
    rows, per_head, pairs = batch * t, config.width // config.heads, batch * config.heads
    linear(batch * (t - 1), config.patch_size**2, d, 1, first=True)
    linear(rows, d, 3 * d, config.depth)
    linear(rows, d, d, config.depth)
    linear(rows, d, config.mlp_width, config.depth)
    linear(rows, config.mlp_width, d, config.depth)
    linear(batch, d, config.classes, 1)
    add(pairs, t, t, per_head, 2 * config.depth)  # q @ k.T, dout @ v.T
    add(pairs, t, per_head, t, 4 * config.depth)  # weights @ v; weights.T @ dout, dscores @ k, dscores.T @ q
    return products


def operations(products):
    """Return the number of floating-point operations of `matrix_products`: multiplications and additions."""
    return sum(2 * math.prod(shape) * times for shape, times in products.items())
