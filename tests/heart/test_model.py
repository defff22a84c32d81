"""The model as a whole: its gradient, its parameters, and what it can learn."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    SHAPES,
    PoisonedWorkspace,
    assert_workspace_changes_nothing,
    image_shape,
    normal,
    random_parameters,
    reference_with,
    seeds,
)

from tinyvit import reference
from tinyvit.classifier import VisionTransformer
from tinyvit.gradcheck import directional_error, gradient_error, relative_error
from tinyvit.model import (
    ViTConfig,
    block_attention,
    block_backward,
    block_forward,
    initialise,
    loss_and_gradient,
    vit_backward,
    vit_backward_to_images,
    vit_forward,
)
from tinyvit.optim import Adam
from tinyvit.parameters import Parameters
from tinyvit.training import ParallelGradient

CONFIGS = [
    ViTConfig(image_size=4, patch_size=2, width=6, depth=1, heads=1, mlp_width=5, classes=3),
    ViTConfig(image_size=6, patch_size=2, width=6, depth=2, heads=2, mlp_width=7, classes=4, gelu="tanh"),
    ViTConfig(image_size=3, patch_size=3, width=4, depth=2, heads=4, mlp_width=1, classes=1),
    ViTConfig(
        image_size=(6, 4),
        patch_size=(3, 2),
        channels=3,
        width=6,
        depth=2,
        heads=2,
        mlp_width=5,
        classes=3,
        pixel_mean=(0.4, 0.5, 0.3),
        pixel_deviation=(0.2, 0.3, 0.1),
    ),
    ViTConfig(image_size=4, patch_size=1, width=8, depth=3, heads=2, mlp_width=9, classes=2, epsilon=1e-3),
]
IDS = [f"depth {c.depth}, heads {c.heads}, tokens {c.tokens}, channels {c.channels}, {c.gelu}" for c in CONFIGS]
MIDDLE = CONFIGS[1]


def random_images(config, batch, seed=0):
    return np.random.default_rng(seed).random(image_shape(config, batch))


def pair_of(config):
    """Forward and backward of the model as functions of the images and the flat parameters."""
    shapes = config.shapes()

    def forward(images, flat):
        return vit_forward(images, Parameters(shapes, flat), config)

    def backward(dlogits, cache):
        gradients, dimages = vit_backward_to_images(dlogits, cache)
        return dimages, gradients.flat

    return forward, backward


# ---- the gradient ----


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_slope_along_random_directions_through_images_and_all_parameters(config, batch):
    inputs = [random_images(config, batch), random_parameters(config).flat]
    assert directional_error(*pair_of(config), inputs, directions=5) < 1e-7


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_slope_along_every_parameter_array_alone(config):
    # what is wrong in a small array cannot hide behind the gradients of the large ones
    parameters, images = random_parameters(config), random_images(config, 2)
    for name in parameters:

        def forward(array, name=name):
            changed = parameters.with_flat(parameters.flat.copy())
            changed[name][...] = array
            return vit_forward(images, changed, config)

        def backward(dlogits, cache, name=name):
            return vit_backward(dlogits, cache)[name].copy()

        assert directional_error(forward, backward, [parameters[name]]) < 1e-7, name


def test_every_single_element():
    config = CONFIGS[0]
    inputs = [random_images(config, 2), random_parameters(config).flat]
    assert max(gradient_error(*pair_of(config), inputs)) < 1e-7


def test_the_check_sees_one_forgotten_residual_branch():
    forward, backward = pair_of(MIDDLE)

    def forgetful(dlogits, cache):
        dimages, flat = backward(dlogits, cache)
        gradients = Parameters(MIDDLE.shapes(), flat)
        gradients["positions"][...] = 0
        return dimages, gradients.flat

    inputs = [random_images(MIDDLE, 2), random_parameters(MIDDLE).flat]
    assert directional_error(forward, forgetful, inputs) > 1e-4


def test_every_parameter_has_a_gradient():
    parameters = random_parameters(MIDDLE)
    logits, cache = vit_forward(random_images(MIDDLE, 3), parameters, MIDDLE)
    gradients = vit_backward(normal(1, logits.shape), cache)
    assert list(gradients) == list(parameters)
    for name, gradient in gradients.items():
        assert gradient.shape == parameters[name].shape
        assert np.abs(gradient).max() > 0, name


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_last_block_for_the_class_token_alone_is_the_first_row_of_the_whole(config):
    parameters, x = random_parameters(config), normal(1, (2, config.tokens, config.width))
    dout = normal(2, (2, 1, config.width))
    one, one_cache = block_forward(x, parameters, "blocks.0", config, 1)
    whole, whole_cache = block_forward(x, parameters, "blocks.0", config, config.tokens)
    np.testing.assert_allclose(one, whole[:, :1], atol=1e-12)

    nothing_for_the_rest = np.zeros(whole.shape)
    nothing_for_the_rest[:, :1] = dout
    of_one, of_whole = (parameters.with_flat(np.zeros_like(parameters.flat)) for _ in range(2))
    dx_one = block_backward(dout, one_cache, of_one, "blocks.0")
    dx_whole = block_backward(nothing_for_the_rest, whole_cache, of_whole, "blocks.0")
    assert relative_error(dx_one, dx_whole) < 1e-13
    for name in parameters:
        assert relative_error(of_one[name], of_whole[name]) < 1e-13, name


@SHAPES
@given(st.integers(1, 9), st.integers(1, 4), seeds)
def test_the_gradient_of_shares_is_the_gradient_of_the_whole(batch, workers, seed):
    parameters, images = random_parameters(MIDDLE, seed), random_images(MIDDLE, batch, seed)
    labels = np.random.default_rng(seed).integers(0, MIDDLE.classes, batch)
    loss, _, gradient = loss_and_gradient(images, labels, parameters, MIDDLE, 0.1)
    with ParallelGradient(MIDDLE, workers, smoothing=0.1) as shared:
        shared_loss, correct, shared_gradient = shared(parameters, images, labels)
    assert shared_loss == pytest.approx(loss, rel=1e-12)
    assert relative_error(shared_gradient.flat, gradient.flat) < 1e-13
    assert correct == (vit_forward(images, parameters, MIDDLE)[0].argmax(axis=1) == labels).sum()


@pytest.mark.parametrize("class_only", [False, True])
def test_the_gradient_of_one_block_alone_which_writes_nowhere_else(class_only):
    config = CONFIGS[0]
    parameters = random_parameters(config)

    def forward(x, flat):
        return block_forward(x, parameters.with_flat(flat), "blocks.0", config, class_only)

    def backward(dout, cache):
        gradients = parameters.with_flat(np.zeros_like(parameters.flat))
        return block_backward(dout, cache, gradients, "blocks.0"), gradients.flat

    inputs = [normal(1, (2, config.tokens, config.width)), parameters.flat]
    assert directional_error(forward, backward, inputs) < 1e-7


# ---- values ----


@pytest.mark.parametrize("config", CONFIGS)
def test_without_a_cache_the_logits_are_the_same_bits(config):
    parameters = random_parameters(config)
    images = random_images(config, 3)
    logits, cache = vit_forward(images, parameters, config, with_cache=False)
    assert cache is None
    np.testing.assert_array_equal(logits, vit_forward(images, parameters, config)[0])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_logits_are_those_of_the_model_written_plainly(config):
    parameters, images = random_parameters(config), random_images(config, 3)
    logits, _ = vit_forward(images, parameters, config)
    with reference_with(config) as settings:
        for i in range(3):  # one by one: the images of a batch do not see each other
            plain, _ = reference.vit_forward(images[i : i + 1], parameters, **settings)
            np.testing.assert_allclose(logits[i], plain[0], atol=1e-11)


# ---- laws ----


def test_images_of_a_batch_do_not_see_each_other():
    parameters, images = random_parameters(MIDDLE), random_images(MIDDLE, 5)
    logits, _ = vit_forward(images, parameters, MIDDLE)
    order = [3, 0, 4, 2, 1]
    np.testing.assert_allclose(vit_forward(images[order], parameters, MIDDLE)[0], logits[order], atol=1e-12)
    for i in range(5):
        np.testing.assert_allclose(vit_forward(images[i : i + 1], parameters, MIDDLE)[0][0], logits[i], atol=1e-12)


def test_bytes_and_floats_give_the_same_logits():
    parameters = random_parameters(MIDDLE)
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6), np.uint8)
    from_bytes, _ = vit_forward(images, parameters, MIDDLE)
    np.testing.assert_allclose(vit_forward(images / 255, parameters, MIDDLE)[0], from_bytes, atol=1e-12)


def test_without_positions_the_order_of_the_patches_does_not_matter():
    parameters, images = random_parameters(MIDDLE), random_images(MIDDLE, 2)
    upside_down = images.reshape(2, 3, 2, 6)[:, ::-1].reshape(2, 6, 6)  # rows of patches, not rows of pixels
    with_positions = [vit_forward(x, parameters, MIDDLE)[0] for x in (images, upside_down)]
    assert np.abs(with_positions[0] - with_positions[1]).max() > 1e-3
    parameters["positions"][...] = 0
    without = [vit_forward(x, parameters, MIDDLE)[0] for x in (images, upside_down)]
    np.testing.assert_allclose(without[0], without[1], atol=1e-12)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_float32_agrees_with_float64(gelu):
    config = ViTConfig(gelu=gelu)
    double = initialise(config, 0, np.float64)
    double.flat += 0.05 * normal(1, double.flat.shape)
    single = double.with_flat(double.flat.astype(np.float32))
    images, labels = random_images(config, 4), np.arange(4)
    loss, _, gradient = loss_and_gradient(images, labels, double, config)
    loss32, _, gradient32 = loss_and_gradient(images.astype(np.float32), labels, single, config)
    assert loss32 == pytest.approx(loss, rel=1e-4)
    assert gradient32.flat.dtype == np.float32
    for name in gradient:
        # the bias of the keys has no gradient, in float32 nothing but rounding: it is part of qkv.bias
        assert relative_error(gradient[name], gradient32[name]) < 1e-4, name


def test_attention_of_every_block_can_be_read():
    _, cache = vit_forward(random_images(MIDDLE, 3), random_parameters(MIDDLE), MIDDLE)
    first, last = block_attention(cache)
    assert first.shape == (3, 2, 10, 10)
    assert last.shape == (3, 2, 1, 10)
    np.testing.assert_allclose(first.sum(axis=-1), 1, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_workspace_changes_nothing(dtype):
    parameters = random_parameters(MIDDLE, dtype=dtype)
    images, dlogits = random_images(MIDDLE, 3), normal(1, (3, 4), dtype=dtype)

    def compute():
        logits, cache = vit_forward(images, parameters, MIDDLE)
        gradients, dimages = vit_backward_to_images(dlogits, cache)
        return logits, gradients.flat, dimages

    assert_workspace_changes_nothing(compute)


def test_backward_writes_every_gradient_itself():
    parameters = random_parameters(MIDDLE)
    with PoisonedWorkspace():
        logits, cache = vit_forward(random_images(MIDDLE, 2), parameters, MIDDLE)
        assert np.isfinite(vit_backward(logits, cache).flat).all()


# ---- parameters and settings ----


def test_the_default_has_803338_parameters():
    shapes = ViTConfig().shapes()
    assert initialise(ViTConfig()).flat.shape == (803_338,)
    assert ViTConfig().tokens == 17
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.2.")) == 198_272


def test_the_default_settings():
    assert ViTConfig().as_dict() == {
        "image_size": 28, "patch_size": 7, "channels": 1, "width": 128, "depth": 4, "heads": 4, "mlp_width": 512,
        "classes": 10, "gelu": "erf", "pixel_mean": 0.1307, "pixel_deviation": 0.3081, "epsilon": 1e-6,
        "class_names": None,
    }  # fmt: skip


def test_sizes_that_are_equal_are_one_number():
    settings = {"image_size": [28, 28], "patch_size": (7, 7), "pixel_mean": [0.1307], "pixel_deviation": (0.3081,)}
    assert ViTConfig(**settings) == ViTConfig()
    grey = ViTConfig(channels=3, pixel_mean=(0.5, 0.5, 0.5))
    assert grey.pixel_mean == 0.5


def test_rectangles_and_colours():
    config = ViTConfig(image_size=(32, 24), patch_size=(8, 6), channels=3, pixel_mean=(0.4, 0.5, 0.3))
    assert (config.image_shape, config.patch_shape, config.grid) == ((32, 24), (8, 6), (4, 4))
    assert config.tokens == 17
    assert config.shapes()["patch_embedding.weight"] == (8 * 6 * 3, 128)
    assert ViTConfig(**json.loads(json.dumps(config.as_dict()))) == config


def test_images_of_another_shape_than_the_models_are_refused():
    grey, colour = ViTConfig(), ViTConfig(image_size=(6, 4), patch_size=2, channels=3)
    for config, shape, expected in [
        (grey, (2, 28, 27), r"\(B, 28, 28\)"),
        (grey, (2, 28, 28, 3), r"\(B, 28, 28\)"),
        (colour, (2, 6, 4), r"\(B, 6, 4, 3\)"),
        (colour, (2, 4, 6, 3), r"\(B, 6, 4, 3\)"),
        (colour, (0, 6, 4, 3), r"\(B, 6, 4, 3\)"),
    ]:
        with pytest.raises(ValueError, match=expected):
            vit_forward(np.zeros(shape), initialise(config), config)
    one = np.random.default_rng(0).random((2, 28, 28))
    parameters = initialise(grey)
    expected, _ = vit_forward(one, parameters, grey)
    np.testing.assert_array_equal(vit_forward(one[..., None], parameters, grey)[0], expected)


def test_names_are_those_that_pytorch_users_know():
    block = [f"{part}.{kind}" for part in (
        "norm1", "attention.qkv", "attention.projection", "norm2", "mlp.fc1", "mlp.fc2"
    ) for kind in ("weight", "bias")]  # fmt: skip
    assert list(ViTConfig(depth=2).shapes()) == [
        "patch_embedding.weight", "patch_embedding.bias", "class_token", "positions",
        *(f"blocks.0.{name}" for name in block), *(f"blocks.1.{name}" for name in block),
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    ]  # fmt: skip


def test_initialisation():
    parameters = initialise(ViTConfig())
    assert (parameters["blocks.0.norm1.weight"] == 1).all()
    assert all((parameters[name] == 0).all() for name in parameters if name.endswith("bias"))
    assert np.abs(parameters["blocks.3.mlp.fc1.weight"]).max() == pytest.approx(math.sqrt(6 / 640), rel=1e-3)
    assert parameters["positions"].std() == pytest.approx(1, rel=0.05)
    assert parameters.flat.dtype == np.float32


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    def trained(seed):
        parameters = initialise(MIDDLE, seed)
        adam = Adam(parameters.flat)
        images, labels = random_images(MIDDLE, 4), np.arange(4)
        for _ in range(3):
            _, _, gradient = loss_and_gradient(images, labels, parameters, MIDDLE)
            adam.step(parameters.flat, gradient.flat, 1e-2)
        return parameters.flat.tobytes()

    assert trained(3) == trained(3) != trained(4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_size", 0, "image_size must be an integer from 1 to 100,000, not 0"),
        ("width", 12.0, "width must be an integer"),
        ("depth", True, "depth must be an integer"),
        ("mlp_width", -1, "mlp_width must be an integer"),
        ("classes", "10", "classes must be an integer"),
        ("patch_size", 5, "patch_size must divide image_size: 5 does not divide 28"),
        ("heads", 3, "heads must divide width: 3 does not divide 128"),
        ("gelu", "relu", "gelu must be 'erf' or 'tanh', not 'relu'"),
        ("pixel_mean", math.nan, "pixel_mean must be a number"),
        ("pixel_deviation", 0, "pixel_deviation must be above 0"),
        ("epsilon", -1e-6, "epsilon must be above 0"),
        ("epsilon", None, "epsilon must be a number"),
        ("image_size", (28, 0), "image_size must be an integer from 1 to 100,000, not 0"),
        ("image_size", (28, 28, 3), "image_size must be a number or 2 numbers, rows and columns, not"),
        ("patch_size", (7, 5), "patch_size must divide image_size: 5 does not divide 28"),
        ("channels", 0, "channels must be an integer"),
        ("pixel_mean", (0.1, 0.2, 0.3), "pixel_mean must be a number or 1 numbers, one per channel"),
        ("pixel_deviation", (0.0,), "pixel_deviation must be above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{name: value})


@pytest.mark.parametrize("shape", [(28, 28), (0, 28, 28), (2, 28, 27), (2, 1, 28, 28), (2, 784)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 28, 28\) with B at least 1, not"):
        vit_forward(np.zeros(shape), initialise(ViTConfig()), ViTConfig())


@pytest.mark.parametrize("dtype", [np.int64, np.int8, bool, np.complex64])
def test_images_of_another_type_are_refused(dtype):
    with pytest.raises(ValueError, match="images must be uint8"):
        vit_forward(np.zeros((1, 28, 28), dtype), initialise(ViTConfig()), ViTConfig())


# ---- a model to use ----


def test_logits_do_not_depend_on_the_size_of_a_batch():
    model = VisionTransformer(MIDDLE, random_parameters(MIDDLE))
    images = random_images(MIDDLE, 7)
    np.testing.assert_allclose(model.logits(images, 3), model.logits(images), atol=1e-12)


def test_probabilities_and_predictions():
    model = VisionTransformer(MIDDLE, random_parameters(MIDDLE))
    images = random_images(MIDDLE, 7)
    probabilities = model.predict_proba(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), model.predict(images))
    ratios = np.log(probabilities / probabilities[:, :1])
    logits = model.logits(images)
    np.testing.assert_allclose(ratios, logits - logits[:, :1], atol=1e-10)


# ---- learning ----


def test_it_learns_sixteen_images_with_random_labels_by_heart():
    config = ViTConfig(width=32, depth=2, heads=2, mlp_width=64)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 28, 28), np.uint8), rng.integers(0, 10, 16)
    parameters = initialise(config)
    adam = Adam(parameters.flat)
    first, _, _ = loss_and_gradient(images, labels, parameters, config)
    for _ in range(60):
        loss, _, gradient = loss_and_gradient(images, labels, parameters, config)
        adam.step(parameters.flat, gradient.flat, 3e-3)
    assert first > 2
    assert loss < 0.05
    assert (VisionTransformer(config, parameters).predict(images) == labels).all()


def test_numbers_of_numpy_become_those_of_python():
    plain = ViTConfig(width=12, heads=2, pixel_mean=0.5, channels=3, class_names=list("abcdefghij"))
    config = ViTConfig(
        image_size=(np.int64(28), np.int32(28)),
        width=np.int64(12),
        heads=np.uint8(2),
        channels=np.int16(3),
        pixel_mean=np.full(3, 0.5, np.float32),
        class_names=np.array(list("abcdefghij")),
    )
    assert config == plain
    assert json.dumps(config.as_dict()) == json.dumps(plain.as_dict())
    for wrong in (np.bool_(True), np.float64(12)):
        with pytest.raises(ValueError, match="width must be an integer"):
            ViTConfig(width=wrong)
