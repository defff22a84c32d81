"""The Vision Transformer: its settings, its initial parameters, and its forward and backward passes.

The model is that of Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", with layer norms before each sublayer.
Letters in shapes are those of `tinyvit.ops`, and F is the width of the MLP.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyvit.backend import array_module, to_host
from tinyvit.checks import (
    FLOATS,
    arguments_checked,
    as_array,
    as_images,
    by_identity,
    python_numbers,
    require_arrays,
    require_cache,
    require_number,
    require_scalar,
)
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
from tinyvit.ops.layer_norm import LayerNormCache
from tinyvit.ops.patches import PatchEmbeddingCache, as_pair
from tinyvit.parameters import Parameters


@dataclass(frozen=True)
class ViTConfig:
    """Settings of the model. The defaults are those of the technical note and give 803,338 parameters.

    Parameters
    ----------
    image_size : int or tuple of int, default 28
        Rows R and columns C of an image in pixels, or the side of square images.
    patch_size : int or tuple of int, default 7
        Rows and columns of a patch in pixels, or the side P of square patches. They divide those of the image.
    channels : int, default 1
        Numbers per pixel: 1 for grey images, 3 for colours.
    width : int, default 128
        Length D of a token.
    depth : int, default 4
        Number of blocks.
    heads : int, default 4
        Number of heads H per block, a divisor of `width`.
    mlp_width : int, default 512
        Width F of the hidden layer of the MLP in each block.
    classes : int, default 10
        Number of classes.
    gelu : {"erf", "tanh"}, default "erf"
        Form of the activation function.
    pixel_mean : float or tuple of float, default 0.1307
        Mean of the pixels of the training images, on the scale from 0 to 1, or one mean per channel.
    pixel_deviation : float or tuple of float, default 0.3081
        Standard deviation of these pixels, or one per channel.
    epsilon : float, default 1e-6
        Number added to the variance in layer norms.
    class_names : sequence of str, optional
        One name per class. Default: "0", "1" and so on.

    Raises
    ------
    ValueError
        If a value is of the wrong type, out of range, or not a divisor where one is needed.

    Notes
    -----
    A pair of equal sizes becomes a single integer, and one mean or deviation of a single channel becomes a number.
    """

    image_size: int | Sequence[int] = 28
    patch_size: int | Sequence[int] = 7
    channels: int = 1
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int = 512
    classes: int = 10
    gelu: str = "erf"
    pixel_mean: float | Sequence[float] = 0.1307
    pixel_deviation: float | Sequence[float] = 0.3081
    epsilon: float = 1e-6
    class_names: Sequence[str] | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, python_numbers(value))
        for name in ("channels", "width", "depth", "heads", "mlp_width", "classes"):
            require_number(name, getattr(self, name), minimum=1, maximum=100_000, integer=True)
        for name in ("image_size", "patch_size"):
            self._require_numbers(name, count=2, what="rows and columns", minimum=1, maximum=100_000, integer=True)
        for name in ("pixel_mean", "pixel_deviation"):
            self._require_numbers(name, self.channels, what="one per channel", minimum=-1e30, maximum=1e30)
        require_number("epsilon", self.epsilon, minimum=-1e30, maximum=1e30)
        for name, value in (("pixel_deviation", self.pixel_deviation), ("epsilon", self.epsilon)):
            if np.min(value) <= 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        sizes = [("patch_size", "image_size", *pair) for pair in zip(self.patch_shape, self.image_shape, strict=True)]
        for part, whole, divisor, size in [*sizes, ("heads", "width", self.heads, self.width)]:
            if size % divisor:
                divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise ValueError(f"{part} must divide {whole}: {divisor} does not divide {size}, but {divisors} do")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu must be 'erf' or 'tanh', not {self.gelu!r}")

        if self.class_names is not None:
            self._require_class_names()

    def _require_class_names(self):
        """Check the names of the classes, and make them a tuple, or None for the default names."""
        names = self.class_names
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be a sequence of texts, not {names!r}")
        if len(names) != self.classes:
            raise ValueError(f"class_names must have one name per class, {self.classes}, not {len(names)}")
        names = tuple(names)
        object.__setattr__(self, "class_names", None if names == tuple(map(str, range(self.classes))) else names)

    def _require_numbers(self, name, count, what, **limits):
        """Check a setting that is a number or a sequence of `count` numbers, and simplify the sequence."""
        value = getattr(self, name)
        several = isinstance(value, tuple | list)
        if several and len(value) != count:
            raise ValueError(f"{name} must be a number or {count} numbers, {what}, not {value!r}")
        for number in value if several else [value]:
            require_number(name, number, **limits)
        if several:
            object.__setattr__(self, name, value[0] if len(set(value)) == 1 else tuple(value))

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class, a tuple of str."""
        return tuple(self.class_names or map(str, range(self.classes)))

    @property
    def image_shape(self) -> tuple[int, int]:
        """Rows and columns of an image in pixels."""
        return as_pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Rows and columns of a patch in pixels."""
        return as_pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches from top to bottom and from left to right."""
        (rows, columns), (height, width) = self.image_shape, self.patch_shape
        return rows // height, columns // width

    @property
    def patch_length(self) -> int:
        """Count of numbers L in a patch."""
        return math.prod(self.patch_shape) * self.channels

    @property
    def tokens(self) -> int:
        """Number of tokens T, which are the patches and the class token."""
        return math.prod(self.grid) + 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and the shape of every parameter.

        Returns
        -------
        dict of str to tuple of int
            Shapes in the order of the flat array of `Parameters`.
        """
        d, f = self.width, self.mlp_width
        shapes = {
            "patch_embedding.weight": (self.patch_length, d),
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

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a dict.

        Returns
        -------
        dict of str to int, float or str
            Names and values, for example for a checkpoint.
        """
        return asdict(self)


def initialise(config: ViTConfig, seed: int = 0, dtype: npt.DTypeLike = np.float32) -> Parameters:
    """Draw the parameters of a new model.

    Matrices are Glorot-uniform, biases 0 and the factors of layer norms 1. The class token and the positions are
    standard normal.

    Parameters
    ----------
    config : ViTConfig
        Settings of the model.
    seed : int, default 0
        Seed of the random numbers. The same seed gives the same parameters.
    dtype : dtype, default numpy.float32
        Float dtype of the parameters.

    Returns
    -------
    Parameters
        Parameters on the CPU.

    Raises
    ------
    ValueError
        If `dtype` is another dtype than float32 and float64.

    Notes
    -----
    Positions are often drawn with a standard deviation of 0.02. That of the embedded patches is of the order of 1, so
    attention could hardly distinguish such positions at first, and training would be much slower. A measurement is in
    ``benchmarks/NOTES.md``.

    References
    ----------
    Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", equation 16.
    """
    if np.dtype(dtype) not in FLOATS:
        raise ValueError(f"dtype must be float32 or float64, not {np.dtype(dtype)}")
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


@by_identity
class ModelCache(NamedTuple):
    """Caches of `vit_forward`, which `vit_backward` reads.

    Parameters
    ----------
    parameters : Parameters
        Parameters of the model.
    embedding : PatchEmbeddingCache
        Cache of the patch embedding.
    blocks : list of BlockCache
        Cache of each block.
    norm : LayerNormCache
        Cache of the last layer norm.
    head : tuple
        Cache of the linear layer that computes the logits.
    """

    parameters: Parameters
    embedding: PatchEmbeddingCache
    blocks: list["BlockCache"]
    norm: LayerNormCache
    head: tuple


@by_identity
class BlockCache(NamedTuple):
    """Caches of `block_forward`, which `block_backward` reads.

    Parameters
    ----------
    norm1 : LayerNormCache
        Cache of the layer norm before attention.
    attention : MultiHeadAttentionCache or ClassAttentionCache
        Cache of attention.
    norm2 : LayerNormCache
        Cache of the layer norm before the MLP.
    fc1 : tuple
        Cache of the first linear layer of the MLP.
    gelu : ndarray
        Cache of GELU.
    fc2 : tuple
        Cache of the second linear layer of the MLP.
    class_only : bool
        Whether the block returned only the class token.
    """

    norm1: LayerNormCache
    attention: Any
    norm2: LayerNormCache
    fc1: tuple
    gelu: np.ndarray
    fc2: tuple
    class_only: bool


def vit_forward(
    images: npt.ArrayLike, parameters: Parameters, config: ViTConfig, with_cache: bool = True
) -> tuple[np.ndarray, Any]:
    """Compute the logits of a batch of images.

    Parameters
    ----------
    images : array_like of shape (B, R, C) or (B, R, C, channels)
        Images, uint8 from 0 to 255 or float from 0 to 1, on the device of the parameters.
    parameters : Parameters
        Parameters of the model.
    config : ViTConfig
        Settings of the model.
    with_cache : bool, default True
        Whether to return a cache. Without one, the forward pass needs less time and memory.

    Returns
    -------
    logits : ndarray of shape (B, classes)
        Scores of the classes.
    cache : ModelCache or None
        Input of `vit_backward`.

    Raises
    ------
    ValueError
        If the images are of another size, dtype or range, or the parameters are those of another model.

    Notes
    -----
    On a GPU the range of the pixels is not checked, because reading values would wait for the device.
    """
    images = check_inputs(images, parameters, config)
    if array_module(images) is not array_module(parameters.flat):
        raise TypeError("images must be on the device of the parameters: use Backend.asarray")
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
        # The head reads only the class token, so the last block computes no other token.
        x, cache = block_forward(
            x,
            parameters,
            name=f"blocks.{i}",
            config=config,
            class_only=i == config.depth - 1,
            with_cache=with_cache,
        )
        block_caches.append(cache)
    normed, norm_cache = layer_norm_forward(x[:, 0], *parameters.pair("norm"), epsilon=config.epsilon)
    logits, head_cache = linear_forward(normed, *parameters.pair("head"))
    if not with_cache:
        return logits, None
    return logits, ModelCache(
        parameters=parameters,
        embedding=embedding_cache,
        blocks=block_caches,
        norm=norm_cache,
        head=head_cache,
    )


def vit_backward(dlogits: np.ndarray, cache: ModelCache, gradients: Parameters | None = None) -> Parameters:
    """Compute the gradient of every parameter.

    Parameters
    ----------
    dlogits : ndarray of shape (B, classes)
        Gradient of the loss with respect to the logits.
    cache : ModelCache
        Cache of `vit_forward`.
    gradients : Parameters, optional
        Arrays for the gradients, new ones by default.

    Returns
    -------
    Parameters
        Gradient of each parameter, under the same name.
    """
    return vit_backward_to_images(dlogits, cache, gradients)[0]


def vit_backward_to_images(
    dlogits: np.ndarray, cache: ModelCache, gradients: Parameters | None = None
) -> tuple[Parameters, np.ndarray]:
    """Compute the gradient of every parameter and of every pixel.

    Parameters
    ----------
    dlogits : ndarray of shape (B, classes)
        Gradient of the loss with respect to the logits.
    cache : ModelCache
        Cache of `vit_forward`.
    gradients : Parameters, optional
        Arrays for the gradients, new ones by default.

    Returns
    -------
    gradients : Parameters
        Gradient of each parameter, under the same name.
    dimages : ndarray of the shape of the images
        Gradient of the images, for pixels in the scale of the images (0 to 255 or 0 to 1).
    """
    if not isinstance(cache, ModelCache):
        raise TypeError(f"cache must be the cache of vit_forward with with_cache=True, not {type(cache).__name__}")
    require_arrays("x (B, D), w (D, C), dlogits (B, C)", *cache.head, dlogits)
    gradients = cache.parameters.empty_like() if gradients is None else gradients
    check_parameters("gradients", gradients, cache.parameters.shapes)
    dnormed, _, _ = linear_backward(dlogits, cache.head, *gradients.pair("head"))
    dx, _, _ = layer_norm_backward(dnormed, cache.norm, *gradients.pair("norm"))
    dx = dx[:, None]  # (B, 1, D), because the last block returns only the class token
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


def loss_and_gradient(
    images: npt.ArrayLike,
    targets: npt.ArrayLike,
    parameters: Parameters,
    config: ViTConfig,
    smoothing: float = 0.0,
    weight: float = 1.0,
    gradients: Parameters | None = None,
) -> tuple[np.ndarray, np.ndarray, Parameters]:
    """Compute the loss of a batch, or of a share of a batch, and its gradient.

    Parameters
    ----------
    images : array_like of shape (B, R, C) or (B, R, C, channels)
        Images, uint8 from 0 to 255 or float from 0 to 1, on the device of the parameters.
    targets : array_like of shape (B,) or (B, classes)
        Integer labels, or probabilities of the classes.
    parameters : Parameters
        Parameters of the model.
    config : ViTConfig
        Settings of the model.
    smoothing : float, default 0.0
        Part of every target that is distributed evenly over all classes, from 0 to below 1.
    weight : float, default 1.0
        Number of these images divided by the size of the whole batch. Then the losses and the gradients of all shares
        of a batch add up to those of the batch.
    gradients : Parameters, optional
        Arrays for the gradients, new ones by default.

    Returns
    -------
    loss : ndarray of shape ()
        Mean loss of the images times `weight`.
    correct : ndarray of shape ()
        Number of images whose largest logit is that of the target's most probable class.
    gradients : Parameters
        Gradient of `loss` with respect to each parameter.

    Raises
    ------
    ValueError
        If the images or the targets do not fit the model.

    Notes
    -----
    Unlike other functions, it accepts uint8 images whose maximum is 1, because one batch may be almost black.
    """
    targets = as_array("targets", targets)
    with arguments_checked():
        logits, cache = vit_forward(images, parameters, config)
        loss, loss_cache = cross_entropy_forward(logits, targets, smoothing)
        labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
        correct = (logits.argmax(axis=1) == labels).sum()
        gradients = vit_backward(cross_entropy_backward(weight, loss_cache), cache, gradients)
    return loss * weight, correct, gradients


def block_forward(
    x: np.ndarray,
    parameters: Parameters,
    name: str,
    config: ViTConfig,
    class_only: bool = False,
    with_cache: bool = True,
) -> tuple[np.ndarray, Any]:
    """Compute one block, ``x = x + attention(norm1(x))`` followed by ``out = x + fc2(gelu(fc1(norm2(x))))``.

    Parameters
    ----------
    x : ndarray of shape (B, T, D)
        Tokens.
    parameters : Parameters
        Parameters of the model.
    name : str
        Name of the block, for example ``"blocks.0"``.
    config : ViTConfig
        Settings of the model.
    class_only : bool, default False
        Whether to compute only the class token.
    with_cache : bool, default True
        Whether to return a cache.

    Returns
    -------
    out : ndarray of shape (B, T, D), or (B, 1, D) with `class_only`
        Tokens.
    cache : BlockCache or None
        Input of `block_backward`.
    """
    normed, norm1_cache = layer_norm_forward(x, *parameters.pair(f"{name}.norm1"), epsilon=config.epsilon)
    w_qkv, b_qkv = parameters.pair(f"{name}.attention.qkv")
    w_out, b_out = parameters.pair(f"{name}.attention.projection")
    attend = class_attention_forward if class_only else multi_head_attention_forward
    attended, attention_cache = attend(
        normed, w_qkv=w_qkv, b_qkv=b_qkv, w_out=w_out, b_out=b_out, heads=config.heads
    )
    attended += x[:, :1] if class_only else x
    x = attended

    normed, norm2_cache = layer_norm_forward(x, *parameters.pair(f"{name}.norm2"), epsilon=config.epsilon)
    hidden, fc1_cache = linear_forward(normed, *parameters.pair(f"{name}.mlp.fc1"))
    active, gelu_cache = (gelu_forward if config.gelu == "erf" else gelu_tanh_forward)(hidden, with_cache)
    out, fc2_cache = linear_forward(active, *parameters.pair(f"{name}.mlp.fc2"))
    out += x
    if not with_cache:
        return out, None
    return out, BlockCache(
        norm1=norm1_cache,
        attention=attention_cache,
        norm2=norm2_cache,
        fc1=fc1_cache,
        gelu=gelu_cache,
        fc2=fc2_cache,
        class_only=class_only,
    )


def block_backward(dout: np.ndarray, cache: BlockCache, gradients: Parameters, name: str) -> np.ndarray:
    """Compute the gradients of `block_forward`.

    Parameters
    ----------
    dout : ndarray of the shape of `out`
        Gradient of the loss with respect to `out`.
    cache : BlockCache
        Cache of `block_forward`.
    gradients : Parameters
        Arrays for the gradients of the block's parameters.
    name : str
        Name of the block, for example ``"blocks.0"``.

    Returns
    -------
    ndarray of shape (B, T, D)
        Gradient of `x`.
    """
    require_cache(cache, 7, "block_forward")
    # out = x + fc2(gelu(fc1(norm2(x))))
    dactive, _, _ = linear_backward(dout, cache.fc2, *gradients.pair(f"{name}.mlp.fc2"))
    dhidden = gelu_backward(dactive, cache.gelu)
    dnormed, _, _ = linear_backward(dhidden, cache.fc1, *gradients.pair(f"{name}.mlp.fc1"))
    dattended, _, _ = layer_norm_backward(dnormed, cache.norm2, *gradients.pair(f"{name}.norm2"))
    dattended += dout

    # x = x + attention(norm1(x))
    dw_qkv, db_qkv = gradients.pair(f"{name}.attention.qkv")
    dw_out, db_out = gradients.pair(f"{name}.attention.projection")
    attend_backward = class_attention_backward if cache.class_only else multi_head_attention_backward
    dnormed, *_ = attend_backward(
        dattended, cache.attention, dw_qkv=dw_qkv, db_qkv=db_qkv, dw_out=dw_out, db_out=db_out
    )
    dx, _, _ = layer_norm_backward(dnormed, cache.norm1, *gradients.pair(f"{name}.norm1"))
    if cache.class_only:
        dx[:, :1] += dattended  # only the class token has a residual connection
    else:
        dx += dattended
    return dx


def block_attention(cache: ModelCache) -> list[np.ndarray]:
    """Return the attention weights of every block.

    Parameters
    ----------
    cache : ModelCache
        Cache of `vit_forward`.

    Returns
    -------
    list of ndarray
        Weights of shape (B, H, T, T) per block, and of shape (B, H, 1, T) for the last one.
    """
    require_cache(cache, 5, "vit_forward")
    weights = [block.attention.attention.weights for block in cache.blocks]
    return [
        w[:, :, None] if block.class_only else w for w, block in zip(weights, cache.blocks, strict=True)
    ]


def vit_logits(
    images: npt.ArrayLike, parameters: Parameters, config: ViTConfig, batch_size: int | None = None
) -> np.ndarray:
    """Compute the logits of many images, a few at a time.

    Parameters
    ----------
    images : array_like of shape (B, R, C) or (B, R, C, channels)
        Images, uint8 from 0 to 255 or float from 0 to 1, on the CPU or on the device of the parameters.
    parameters : Parameters
        Parameters of the model.
    config : ViTConfig
        Settings of the model.
    batch_size : int, optional
        Number of images per forward pass. By default all images on a GPU. On a CPU as many as have 544 tokens, which
        fit in the processor's cache and are 32 images with the default settings.

    Returns
    -------
    numpy.ndarray of shape (B, classes)
        Scores of the classes.

    Raises
    ------
    ValueError
        If the images are of another size, dtype or range, or `batch_size` is below 1.
    ArithmeticError
        If a logit is not finite.
    """
    images = check_inputs(images, parameters, config, wait=True)
    xp = array_module(parameters.flat)
    if batch_size is None:
        batch_size = max(1, 544 // config.tokens) if xp is np else len(images)
    require_scalar("batch_size", batch_size, minimum=1, maximum=math.inf, integer=True)
    chunks = (xp.asarray(images[i : i + batch_size]) for i in range(0, len(images), batch_size))
    # An overflow makes a logit infinite or NaN, which raises an error below, so NumPy's warning is not needed.
    with Workspace(), arguments_checked(), np.errstate(over="ignore", invalid="ignore"):
        parts = [vit_forward(chunk, parameters, config, with_cache=False)[0] for chunk in chunks]
        logits = np.concatenate([to_host(part) for part in parts])
    if not np.isfinite(logits).all():
        raise ArithmeticError("the model's logits contain NaN or infinity: check its weights")
    return logits


def check_images(images: npt.ArrayLike, config: ViTConfig, wait: bool = False) -> np.ndarray:
    """Check that a model can read images, and return them as an array.

    Lists are converted. Lists of integers become uint8.

    Parameters
    ----------
    images : array_like of shape (B, R, C)
        Images, uint8 from 0 to 255 or float from 0 to 1. Rounding may exceed this range by 1e-4.
    config : ViTConfig
        Settings of the model.
    wait : bool, default False
        Whether to check the range of float images on a GPU too, which waits for the device.

    Returns
    -------
    ndarray of shape (B, R, C)
        Images on their device. An array is not copied.

    Raises
    ------
    TypeError
        If `images` does not consist of numbers.
    ValueError
        If the shape is not that of the model's images with B at least 1, the dtype is not uint8 or float, a float
        pixel is NaN, infinite or outside 0 to 1, or the maximum of uint8 images is 1, which may mean white.
    """
    if not isinstance(config, ViTConfig):
        raise TypeError(f"config must be a ViTConfig, not {type(config).__name__}")
    return as_images(images, config.image_shape, config.channels, wait=wait)


def check_inputs(images: npt.ArrayLike, parameters: Parameters, config: ViTConfig, wait: bool = False) -> np.ndarray:
    """Check images as `check_images` does, and that the parameters are those of the model. Return the images.

    Parameters
    ----------
    images : array_like of shape (B, R, C)
        Images, uint8 from 0 to 255 or float from 0 to 1.
    parameters : Parameters
        Parameters of the model.
    config : ViTConfig
        Settings of the model.
    wait : bool, default False
        Whether to check the range of float images on a GPU too, which waits for the device.

    Returns
    -------
    ndarray of shape (B, R, C)
        Images on their device.

    Raises
    ------
    TypeError
        If an argument is of another class or dtype.
    ValueError
        If an argument does not fit the model.
    """
    images = check_images(images, config, wait)
    check_parameters("parameters", parameters, _shapes(config))
    return images


def check_parameters(name: str, parameters: Parameters, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that parameters or gradients have the names and shapes of a model.

    Parameters
    ----------
    name : str
        Name of the argument in the error.
    parameters : Parameters
        Arrays to check.
    shapes : dict of str to tuple of int
        Shape of each parameter of the model.

    Raises
    ------
    TypeError
        If `parameters` is of another class or dtype.
    ValueError
        If a name or a shape differs.
    """
    if not isinstance(parameters, Parameters):
        raise TypeError(f"{name} must be tinyvit.parameters.Parameters, not {type(parameters).__name__}")
    if parameters.flat.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32 or float64, not {parameters.flat.dtype}")
    if parameters.shapes != shapes:
        different = sorted({part for part, _ in parameters.shapes.items() ^ shapes.items()})
        raise ValueError(f"{name} must have the shapes of the model, config.shapes(), but {different[0]} differs")


@functools.lru_cache
def _shapes(config):
    """Return `config.shapes()`, which a step needs quickly."""
    return config.shapes()
