"""The Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"): read down, then back up."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from tinyvit.backend import array_module, to_host
from tinyvit.checks import require_number
from tinyvit.memory import Workspace
from tinyvit.ops import (
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
)
from tinyvit.parameters import Parameters


@dataclass(frozen=True)
class ViTConfig:
    """Every setting of the model; the defaults are the technical note's (803,338 parameters).

    Raises `ValueError` on a value that cannot be, naming it and what would do.
    """

    image_size: int = 28  # pixels a side
    patch_size: int = 7  # pixels a side; divides image_size
    width: int = 128  # D, the length of a token
    depth: int = 4  # blocks
    heads: int = 4  # H; divides width
    mlp_width: int = 512  # F, the hidden width of a block's MLP
    classes: int = 10
    gelu: str = "erf"  # or "tanh"
    pixel_mean: float = 0.1307  # of the training images, pixels in 0 to 1
    pixel_deviation: float = 0.3081
    epsilon: float = 1e-6  # added to the variance in layer norm

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width", "classes"):
            require_number(name, getattr(self, name), 1, 100_000, integer=True)
        for part, whole in (("patch_size", "image_size"), ("heads", "width")):
            if getattr(self, whole) % getattr(self, part):
                size = getattr(self, whole)
                fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                given = getattr(self, part)
                raise ValueError(f"{part} must divide {whole}: {given} does not divide {size} ({fitting} do)")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu must be 'erf' or 'tanh', not {self.gelu!r}")
        for name in ("pixel_mean", "pixel_deviation", "epsilon"):
            require_number(name, getattr(self, name), -1e30, 1e30)
            if getattr(self, name) <= 0 and name != "pixel_mean":
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)!r}")

    @property
    def tokens(self):
        """T: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def shapes(self):
        """Return the name and shape of every parameter, in the order in which they lie in the flat array."""
        d, f = self.width, self.mlp_width
        shapes = {
            "patch_embedding.weight": (self.patch_size**2, d),
            "patch_embedding.bias": (d,),
            "class_token": (d,),
            "positions": (self.tokens, d),
        }
        for i in range(self.depth):
            for name, shape in {
                "norm1": (d,),
                "attention.qkv": (d, 3 * d),
                "attention.projection": (d, d),
                "norm2": (d,),
                "mlp.fc1": (d, f),
                "mlp.fc2": (f, d),
            }.items():
                shapes[f"blocks.{i}.{name}.weight"] = shape
                shapes[f"blocks.{i}.{name}.bias"] = shape[-1:]
        for name, shape in {"norm": (d,), "head": (d, self.classes)}.items():
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[-1:]
        return shapes

    def as_dict(self):
        """Return the settings as a plain dict, as a checkpoint keeps them."""
        return asdict(self)


def initialise(config, seed=0, dtype=np.float32):
    """Return new `Parameters` on the CPU: Glorot-uniform matrices, norms at 1 and 0, standard normal positions.

    config: `ViTConfig`; seed: an integer; the same seed gives the same bits. Positions as loud as the patches
    they are added to let attention tell places apart from the first step; the customary deviation of 0.02 does not,
    and learns far more slowly (`benchmarks/NOTES.md`).
    Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward networks", eq. 16.
    """
    shapes = config.shapes()
    parameters = Parameters(shapes, np.zeros(sum(math.prod(s) for s in shapes.values()), dtype))
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        if name in ("class_token", "positions"):
            parameters[name][...] = rng.standard_normal(shape)
        elif "norm" in name and name.endswith("weight"):
            parameters[name][...] = 1
        elif name.endswith("weight"):
            bound = math.sqrt(6 / sum(shape))
            parameters[name][...] = rng.uniform(-bound, bound, shape)
    return parameters


class ModelCache(NamedTuple):
    """What `vit_backward` needs of the forward pass."""

    parameters: Parameters
    embedding: tuple
    blocks: list  # of BlockCache
    norm: tuple
    head: tuple


class BlockCache(NamedTuple):
    """What `block_backward` needs of the forward pass."""

    norm1: tuple
    attention: tuple
    norm2: tuple
    fc1: tuple
    gelu: Any
    fc2: tuple
    class_only: bool  # whether only the class token left the block


def vit_forward(images, parameters, config, with_cache=True):
    """Run the model: images (B, R, C), uint8 or float in 0 to 1, to logits (B, classes), and the cache.

    Without a backward pass to follow, with_cache=False saves time and memory: the cache is None.
    """
    check_images(images, config)
    x, embedding_cache = patch_embedding_forward(
        images,
        *parameters.pair("patch_embedding"),
        class_token=parameters["class_token"],
        positions=parameters["positions"],
        patch_size=config.patch_size,
        mean=config.pixel_mean,
        deviation=config.pixel_deviation,
    )  # (B, T, D)
    block_caches = []
    for i in range(config.depth):
        # only the class token is read in the end, so the last block computes no other: the function is the same
        x, cache = block_forward(
            x,
            parameters,
            f"blocks.{i}",
            config,
            class_only=i == config.depth - 1,
            with_cache=with_cache,
        )
        block_caches.append(cache)
    normed, norm_cache = layer_norm_forward(x[:, 0], *parameters.pair("norm"), config.epsilon)
    logits, head_cache = linear_forward(normed, *parameters.pair("head"))
    if not with_cache:
        return logits, None
    return logits, ModelCache(parameters, embedding_cache, block_caches, norm_cache, head_cache)


def vit_backward(dlogits, cache, gradients=None):
    """Return the gradient of every parameter, `Parameters` of the same names, for `dlogits` (B, classes).

    gradients: the `Parameters` to write into and return, new ones by default.
    """
    return vit_backward_to_images(dlogits, cache, gradients)[0]


def vit_backward_to_images(dlogits, cache, gradients=None):
    """As `vit_backward`, and dimages (B, R, C) too: how the loss changes with each pixel as it was given."""
    gradients = cache.parameters.empty_like() if gradients is None else gradients
    dnormed, _, _ = linear_backward(dlogits, cache.head, *gradients.pair("head"))
    dx, _, _ = layer_norm_backward(dnormed, cache.norm, *gradients.pair("norm"))
    dx = dx[:, None]  # (B, 1, D): only the class token left the last block
    for i in reversed(range(len(cache.blocks))):
        dx = block_backward(dx, cache.blocks[i], gradients, f"blocks.{i}")
    dimages, *_ = patch_embedding_backward(
        dx,
        cache.embedding,
        *gradients.pair("patch_embedding"),
        dclass_token=gradients["class_token"],
        dpositions=gradients["positions"],
    )
    return gradients, dimages


def loss_and_gradient(images, targets, parameters, config, smoothing=0.0, weight=1.0, gradients=None):
    """Compute the loss of a batch, or of a share of one, and its gradient: the heart of every training step.

    images: (B, R, C), uint8 or float in 0 to 1; targets: labels (B,), integers, or probabilities (B, classes);
    smoothing: as in `cross_entropy_forward`; weight: how much of the whole batch these images are, so that the
    losses and the gradients of all shares of a batch add up to those of the batch; gradients: the `Parameters` to
    write into and return, new ones by default.
    Returns loss and correct, 0-d arrays on the device (weight times the mean loss; the number of images whose most
    probable class is that of the target), and the gradients.
    """
    logits, cache = vit_forward(images, parameters, config)
    loss, loss_cache = cross_entropy_forward(logits, targets, smoothing)
    labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
    correct = (logits.argmax(axis=1) == labels).sum()
    gradients = vit_backward(cross_entropy_backward(weight, loss_cache), cache, gradients)
    return loss * weight, correct, gradients


def block_forward(x, parameters, name, config, class_only=False, with_cache=True):
    """One pre-norm block: x + attention(norm1(x)), then x + mlp(norm2(x)).

    x: (B, T, D). Returns x of the same shape and the cache; with class_only, x (B, 1, D), the first token alone.
    with_cache: whether a backward pass will follow.
    """
    normed, norm1_cache = layer_norm_forward(x, *parameters.pair(f"{name}.norm1"), config.epsilon)
    attend = class_attention_forward if class_only else multi_head_attention_forward
    attended, attention_cache = attend(
        normed,
        *parameters.pair(f"{name}.attention.qkv"),
        *parameters.pair(f"{name}.attention.projection"),
        config.heads,
    )
    attended += x[:, :1] if class_only else x
    x = attended

    normed, norm2_cache = layer_norm_forward(x, *parameters.pair(f"{name}.norm2"), config.epsilon)
    hidden, fc1_cache = linear_forward(normed, *parameters.pair(f"{name}.mlp.fc1"))
    active, gelu_cache = (gelu_forward if config.gelu == "erf" else gelu_tanh_forward)(hidden, with_cache)
    out, fc2_cache = linear_forward(active, *parameters.pair(f"{name}.mlp.fc2"))
    out += x
    if not with_cache:
        return out, None
    return out, BlockCache(
        norm1_cache, attention_cache, norm2_cache, fc1_cache, gelu_cache, fc2_cache, class_only
    )


def block_backward(dout, cache, gradients, name):
    """Write the gradients of block `name` into `gradients` and return dx (B, T, D) for `dout`, (B, T or 1, D)."""
    # out = x + fc2(gelu(fc1(norm2(x))))
    dactive, _, _ = linear_backward(dout, cache.fc2, *gradients.pair(f"{name}.mlp.fc2"))
    dhidden = gelu_backward(dactive, cache.gelu)
    dnormed, _, _ = linear_backward(dhidden, cache.fc1, *gradients.pair(f"{name}.mlp.fc1"))
    dattended, _, _ = layer_norm_backward(dnormed, cache.norm2, *gradients.pair(f"{name}.norm2"))
    dattended += dout

    # x = x + attention(norm1(x))
    attend_backward = class_attention_backward if cache.class_only else multi_head_attention_backward
    dnormed, *_ = attend_backward(
        dattended,
        cache.attention,
        *gradients.pair(f"{name}.attention.qkv"),
        *gradients.pair(f"{name}.attention.projection"),
    )
    dx, _, _ = layer_norm_backward(dnormed, cache.norm1, *gradients.pair(f"{name}.norm1"))
    if cache.class_only:
        dx[:, :1] += dattended  # the other tokens have no residual branch
    else:
        dx += dattended
    return dx


def block_attention(cache):
    """Return the attention weights of every block from `vit_forward`'s cache: (B, H, T, T), the last (B, H, 1, T)."""
    weights = [block.attention.attention.weights for block in cache.blocks]
    return [
        w[:, :, None] if block.class_only else w for w, block in zip(weights, cache.blocks, strict=True)
    ]


def vit_logits(images, parameters, config, batch_size=None):
    """Return logits (B, classes), a NumPy array, for images (B, R, C), uint8 or float in 0 to 1.

    The images may lie on the CPU or on the parameters' device. batch_size of them are computed at a time: by default
    on a CPU as many as have 544 tokens (32 images of 17), which fits the processor's cache, and on a GPU all of them.
    """
    check_images(images, config)
    xp = array_module(parameters.flat)
    if batch_size is None:
        batch_size = max(1, 544 // config.tokens) if xp is np else len(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    chunks = (xp.asarray(images[i : i + batch_size]) for i in range(0, len(images), batch_size))
    with Workspace():
        logits = [vit_forward(chunk, parameters, config, with_cache=False)[0] for chunk in chunks]
        return np.concatenate([to_host(part) for part in logits])


def check_images(images, config):
    """Raise `ValueError` unless `images` is a batch that the model can read."""
    side = config.image_size
    if images.ndim != 3 or images.shape[1:] != (side, side) or len(images) == 0:
        raise ValueError(
            f"the model reads images of shape (B, {side}, {side}) with B at least 1, not {images.shape}"
        )
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (0 to 255) or float (0 to 1), not {images.dtype}")
