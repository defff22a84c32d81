"""PyTorch, where it is installed, gives the same values and the same gradients: of every operation and the model."""

import math

import numpy as np
import pytest
from strategies import normal

from tinyvit.model import ViTConfig, loss_and_gradient, vit_backward_to_images, vit_forward
from tinyvit.ops import (
    attention_backward,
    attention_forward,
    class_attention_backward,
    class_attention_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    gelu_backward,
    gelu_forward,
    gelu_tanh_forward,
    layer_norm_backward,
    layer_norm_forward,
    linear_backward,
    linear_forward,
    multi_head_attention_backward,
    multi_head_attention_forward,
    patch_embedding_backward,
    patch_embedding_forward,
    softmax_backward,
    softmax_forward,
)
from tinyvit.optim import Adam, matrices_only
from tinyvit.parameters import Parameters

torch = pytest.importorskip("torch")
F = torch.nn.functional


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def compare(forward, backward, theirs, inputs):
    """Values, and gradients of all inputs for a random dout, agree with those of a function on tensors."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    out, cache = forward(*inputs)
    expected = theirs(*tensors)
    assert_close(out, expected)
    dout = np.random.default_rng(99).standard_normal(out.shape)
    expected.backward(torch.tensor(dout))
    gradients = backward(dout, cache)
    for ours, tensor in zip(gradients if isinstance(gradients, tuple) else [gradients], tensors, strict=True):
        assert_close(ours, tensor.grad)


# ---- operations ----


def test_linear():
    inputs = normal(0, (2, 3, 4), (4, 5), (5,))
    compare(linear_forward, linear_backward, lambda x, w, b: F.linear(x, w.T, b), inputs)


def test_layer_norm():
    inputs = normal(0, (2, 3, 5), (5,), (5,))
    compare(layer_norm_forward, layer_norm_backward, lambda x, w, b: F.layer_norm(x, (5,), w, b, 1e-6), inputs)


def test_gelu():
    x = [np.linspace(-10, 10, 401)]
    compare(gelu_forward, gelu_backward, F.gelu, x)
    compare(gelu_tanh_forward, gelu_backward, lambda x: F.gelu(x, approximate="tanh"), x)


def test_softmax():
    compare(softmax_forward, softmax_backward, lambda x: F.softmax(x, dim=-1), [normal(0, (2, 3, 5))])


def test_attention():
    inputs = normal(0, (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5))
    compare(attention_forward, attention_backward, F.scaled_dot_product_attention, inputs)


@pytest.mark.parametrize(
    ("forward", "backward", "asking"),
    [
        (multi_head_attention_forward, multi_head_attention_backward, 5),
        (class_attention_forward, class_attention_backward, 1),
    ],
)
def test_multi_head_attention(forward, backward, asking):
    module = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)

    def theirs(x, w_qkv, b_qkv, w_out, b_out):
        weights = {"in_proj_weight": w_qkv.T, "in_proj_bias": b_qkv}
        weights |= {"out_proj.weight": w_out.T, "out_proj.bias": b_out}
        return torch.func.functional_call(module, weights, (x[:, :asking], x, x))[0]

    def ours(*arrays):
        return forward(*arrays, 3)

    compare(ours, backward, theirs, normal(0, (2, 5, 12), (12, 36), (36,), (12, 12), (12,)))


def test_patch_embedding_is_a_convolution_with_a_stride():
    def theirs(images, w, b, class_token, positions):
        kernels = w.T.reshape(5, 1, 3, 3)
        embedded = F.conv2d((images[:, None] - 0.13) / 0.31, kernels, b, stride=3).flatten(2).mT
        return torch.cat([class_token.expand(2, 1, 5), embedded], dim=1) + positions

    def ours(*arrays):
        return patch_embedding_forward(*arrays, 3, 0.13, 0.31)

    compare(ours, patch_embedding_backward, theirs, normal(0, (2, 6, 9), (9, 5), (5,), (5,), (7, 5)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    labels = np.array([0, 4, 2])
    compare(
        lambda logits: cross_entropy_forward(logits, labels, smoothing),
        cross_entropy_backward,
        lambda logits: F.cross_entropy(logits, torch.tensor(labels), label_smoothing=smoothing),
        [normal(0, (3, 5))],
    )


# ---- the whole model, of PyTorch's own modules, with every token calculated to the end ----

SMALL = ViTConfig(width=12, depth=3, heads=3, mlp_width=20)


class StockViT(torch.nn.Module):
    """The Vision Transformer as one writes it with PyTorch."""

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
    """The parameter of the stock model that has `name` with us."""
    for ours, theirs in THEIR_NAMES.items():
        name = name.replace(ours, theirs)
    return model.get_parameter(name)


def twins(config):
    """Our parameters, all of them random, and a stock model with the same."""
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
