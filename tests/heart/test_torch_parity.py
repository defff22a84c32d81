"""PyTorch, if it is installed, gives the same values and gradients for every operation and for the model."""

import math

import numpy as np
import pytest
from operations import MEDIUM, OPERATIONS, out_and_gradients, pixel_scale
from strategies import normal

from tinyvit.model import ViTConfig, loss_and_gradient, vit_backward_to_images, vit_forward
from tinyvit.ops.patches import as_pair
from tinyvit.optim import Adam, matrices_only
from tinyvit.parameters import Parameters

torch = pytest.importorskip("torch")
F = torch.nn.functional


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


# ---- operations: the functions of PyTorch for rows of the table ----


def attend(queries):
    """Return multi-head attention in which only the first `queries` tokens have queries; 0 stands for all."""

    def function(x, w_qkv, b_qkv, w_out, b_out, heads):
        module = torch.nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, dtype=torch.float64)
        weights = {"in_proj_weight": w_qkv.T, "in_proj_bias": b_qkv}
        weights |= {"out_proj.weight": w_out.T, "out_proj.bias": b_out}
        return torch.func.functional_call(module, weights, (x[:, : queries or x.shape[1]], x, x))[0]

    return function


def embed(images, w, b, class_token, positions, patch_size):
    """Embed patches by a convolution with a stride."""
    mean, deviation = (torch.tensor(value, dtype=torch.float64) for value in pixel_scale(images))
    pixels = ((images - mean) / deviation).reshape(*images.shape[:3], -1).movedim(-1, 1)
    kernel = w.T.reshape(w.shape[1], *as_pair(patch_size), -1).movedim(-1, 1)
    embedded = F.conv2d(pixels, kernel, b, stride=patch_size).flatten(2).mT
    return torch.cat([class_token.expand(len(images), 1, -1), embedded], dim=1) + positions


def cross_entropy(logits, targets, smoothing=0.0):
    targets = torch.tensor(targets if targets.ndim == 2 else targets.astype(np.int64))
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


FUNCTIONS = {
    "linear": lambda x, w, b: F.linear(x, w.T, b),
    "layer_norm": lambda x, w, b, epsilon: F.layer_norm(x, w.shape, w, b, epsilon),
    "layer_norm with the default epsilon": lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "attention": F.scaled_dot_product_attention,
    "multi_head_attention": attend(queries=0),
    "class_attention": attend(queries=1),
    "patch_embedding": embed,
    "patch_embedding of colours": embed,
    "cross_entropy": cross_entropy,
    "cross_entropy of smoothed labels": cross_entropy,
    "cross_entropy of probabilities": cross_entropy,
}


def compare(name, arrays, constants, dout):
    """Values and gradients of a row agree with those of PyTorch."""
    ours = out_and_gradients(OPERATIONS[name].pair("ops"), arrays, constants, dout)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    out = FUNCTIONS[name](*tensors, *constants)
    out.backward(torch.tensor(dout))
    for a, b in zip(ours, [out, *(tensor.grad for tensor in tensors)], strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name, seed):
    compare(name, *OPERATIONS[name].draw(MEDIUM, seed))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_far_out(name):
    compare(name, [np.linspace(-10, 10, 401)], (), normal(99, (401,)))


def test_every_operation_is_compared():
    parts_of_patch_embedding = {"patches", "patches of colours", "patch_embedding of bytes"}
    assert set(OPERATIONS) - set(FUNCTIONS) == parts_of_patch_embedding


# ---- the whole model, from modules of PyTorch, which compute all tokens in all blocks ----

SMALL = ViTConfig(width=12, depth=3, heads=3, mlp_width=20)


class StockViT(torch.nn.Module):
    """A common Vision Transformer in PyTorch."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        approximate = "tanh" if config.gelu == "tanh" else "none"
        self.patch_embedding = torch.nn.Conv2d(1, width, config.patch_size, stride=config.patch_size)
        self.class_token = torch.nn.Parameter(torch.zeros(width))
        self.positions = torch.nn.Parameter(torch.zeros(config.tokens, width))
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                width,
                config.heads,
                config.mlp_width,
                dropout=0.0,
                activation="gelu" if config.gelu == "erf" else torch.nn.GELU(approximate),
                layer_norm_eps=config.epsilon,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.depth)
        )
        self.norm = torch.nn.LayerNorm(width, config.epsilon)
        self.head = torch.nn.Linear(width, config.classes)
        self.double()

    def forward(self, images):
        pixels = (images[:, None] - self.config.pixel_mean) / self.config.pixel_deviation
        embedded = self.patch_embedding(pixels).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(images), 1, -1), embedded], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


THEIR_NAMES = {
    "attention.qkv.": "self_attn.in_proj_",
    "attention.projection": "self_attn.out_proj",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
}


def their_parameter(model, name):
    """Return the parameter of the stock model that corresponds to `name`."""
    for ours, theirs in THEIR_NAMES.items():
        name = name.replace(ours, theirs)
    return model.get_parameter(name)


def twins(config):
    """Return random parameters and a stock model with the same parameters."""
    shapes = config.shapes()
    parameters = Parameters(shapes, 0.3 * normal(5, (sum(math.prod(shape) for shape in shapes.values()),)))
    model = StockViT(config)
    with torch.no_grad():
        for name, array in parameters.items():
            theirs = their_parameter(model, name)
            is_matrix = name.endswith("weight") and array.ndim == 2
            theirs.copy_(torch.tensor(array.T if is_matrix else array).reshape(theirs.shape))
    assert sum(p.numel() for p in model.parameters()) == parameters.flat.size
    return parameters, model


def assert_same_arrays(parameters, model, attribute):
    for name, array in parameters.items():
        theirs = getattr(their_parameter(model, name), attribute)
        if name.endswith("weight") and array.ndim == 2:
            theirs = theirs.flatten(1).T
        np.testing.assert_allclose(array, theirs.detach().numpy(), rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_whole_model(gelu):
    config = ViTConfig(width=12, depth=3, heads=3, mlp_width=20, gelu=gelu)
    parameters, model = twins(config)
    images = np.random.default_rng(0).random((4, 28, 28))
    pixels = torch.tensor(images, requires_grad=True)
    logits, cache = vit_forward(images, parameters, config)
    expected = model(pixels)
    assert_close(logits, expected)

    dlogits = normal(1, logits.shape)
    expected.backward(torch.tensor(dlogits))
    gradients, dimages = vit_backward_to_images(dlogits, cache)
    assert_close(dimages, pixels.grad)
    assert_same_arrays(gradients, model, "grad")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_five_steps_of_training(decay):
    parameters, model = twins(SMALL)
    rng = np.random.default_rng(0)
    images, labels = rng.random((5, 6, 28, 28)), rng.integers(0, 10, (5, 6))

    matrices = [their_parameter(model, name) for name, array in parameters.items()
                if name.endswith("weight") and array.ndim == 2]  # fmt: skip
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, eps=1e-6
    )
    ours = Adam(parameters.flat, epsilon=1e-6, weight_decay=decay, decayed=matrices_only(parameters))
    for step in range(5):
        theirs.zero_grad()
        their_logits = model(torch.tensor(images[step]))
        their_loss = F.cross_entropy(their_logits, torch.tensor(labels[step]), label_smoothing=0.1)
        their_loss.backward()
        theirs.step()

        loss, _, gradients = loss_and_gradient(images[step], labels[step], parameters, SMALL, smoothing=0.1)
        ours.step(parameters.flat, gradients.flat, 1e-3)
        assert loss == pytest.approx(their_loss.item(), rel=1e-9)
    assert_same_arrays(parameters, model, "data")
