"""The plain model and its gradients, and the fast model and optimiser compared with it.

`test_operations.py` tests its operations.
"""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    EQUAL,
    SHAPES,
    TOLERANCE,
    image_shape,
    normal,
    random_parameters,
    reference_with,
    seeds,
    small,
)

from tinyvit import model, optim, reference
from tinyvit.data.mnist import load_mnist
from tinyvit.gradcheck import gradient_error, relative_error
from tinyvit.model import ViTConfig
from tinyvit.parameters import Parameters


def test_the_loss_is_finite_for_huge_logits():
    logits = np.array([[1e4, 0, -1e4], [1e4, 0, -1e4]])
    loss, cache = reference.cross_entropy_forward(logits, np.array([0, 2]))
    assert loss == 1e4  # 0 for the first image, 20,000 for the second
    np.testing.assert_array_equal(reference.cross_entropy_backward(cache), [[0, 0, 0], [0.5, 0, -0.5]])


# ---- the model ----


@st.composite
def configs(draw):
    """Draw small configurations of all kinds."""
    heads, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3]))
    patch_size = draw(st.tuples(small, small))
    mean, deviation = draw(st.sampled_from([(0.1307, 0.3081), (0.5, 1.0)]))
    if channels == 3 and draw(st.booleans()):  # one mean and one deviation per channel
        mean, deviation = (mean, 0.25, 0.75), (deviation, 0.5, 0.125)
    return ViTConfig(
        image_size=tuple(side * draw(st.integers(1, 3)) for side in patch_size),
        patch_size=patch_size,
        channels=channels,
        width=heads * draw(st.integers(3, 5)),
        depth=draw(st.integers(1, 3)),
        heads=heads,
        mlp_width=draw(st.integers(1, 6)),
        classes=draw(st.integers(1, 5)),
        gelu=draw(st.sampled_from(["erf", "tanh"])),
        pixel_mean=mean,
        pixel_deviation=deviation,
        epsilon=draw(st.sampled_from([1e-6, 1e-2])),
    )


def sizes_of(config):
    """Return a configuration's sizes under the names of `reference.initialise`."""
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "channels": config.channels,
        "width": config.width,
        "depth": config.depth,
        "mlp_width": config.mlp_width,
        "classes": config.classes,
    }


def test_the_gradient_of_every_parameter_of_the_model_is_that_of_central_differences():
    rng = np.random.default_rng(0)
    names = reference.initialise(rng, image_size=4, patch_size=2, width=4, depth=2, mlp_width=3, classes=3)
    arrays = [array + 0.5 * rng.standard_normal(array.shape) for array in names.values()]  # no zeros and no ones
    images = rng.random((2, 4, 4))

    def forward(*arrays):
        return reference.vit_forward(images, dict(zip(names, arrays, strict=True)), heads=2, patch_size=2)

    def backward(dlogits, cache):
        gradients = reference.vit_backward(dlogits, cache)
        assert set(gradients) == set(names)
        return [gradients[name] for name in names]

    errors = dict(zip(names, gradient_error(forward, backward, arrays), strict=True))
    assert max(errors.values()) < TOLERANCE, errors


def test_the_gradient_of_the_loss_is_that_of_central_differences():
    rng = np.random.default_rng(0)
    names = reference.initialise(rng, image_size=4, patch_size=2, width=4, depth=1, mlp_width=3, classes=3)
    images, labels = rng.random((5, 4, 4)), np.array([0, 1, 2, 1, 1])

    def forward(*arrays):
        parameters = dict(zip(names, arrays, strict=True))
        loss, _, gradients = reference.loss_and_gradient(images, labels, parameters, heads=2, patch_size=2)
        return loss, [gradients[name] for name in names]

    def backward(dloss, gradients):
        return [dloss * gradient for gradient in gradients]

    assert max(gradient_error(forward, backward, list(names.values()))) < TOLERANCE


@SHAPES
@given(config=configs(), batch=small, seed=seeds, as_bytes=st.booleans())
def test_the_fast_model_has_the_same_logits_loss_and_gradients(config, batch, seed, as_bytes):
    rng = np.random.default_rng(seed)
    parameters, labels = random_parameters(config, seed), rng.integers(0, config.classes, batch)
    images = rng.integers(0, 256, image_shape(config, batch), np.uint8)
    pixels = images / 255
    dlogits = normal(seed, (batch, config.classes))
    with reference_with(config) as settings:
        expected_logits, cache = reference.vit_forward(pixels, parameters, **settings)
        expected = reference.vit_backward(dlogits, cache)
        expected_loss, expected_correct, expected_of_loss = reference.loss_and_gradient(
            pixels, labels, parameters, **settings
        )

    seen = images if as_bytes else pixels
    logits, cache = model.vit_forward(seen, parameters, config)
    loss, correct, of_loss = model.loss_and_gradient(seen, labels, parameters, config)
    assert relative_error(logits, expected_logits) < EQUAL
    assert relative_error(loss, expected_loss) < EQUAL
    assert correct == expected_correct
    for got, plain in ((model.vit_backward(dlogits, cache), expected), (of_loss, expected_of_loss)):
        assert set(got) == set(plain)
        errors = {name: relative_error(got[name], plain[name]) for name in got}
        assert max(errors.values()) < EQUAL, errors


@SHAPES
@given(config=configs(), seed=seeds)
def test_the_same_seed_draws_the_same_model_bit_by_bit(config, seed):
    expected = reference.initialise(np.random.default_rng(seed), **sizes_of(config))
    got = model.initialise(config, seed, np.float64)
    assert list(got) == list(expected)
    for name in got:
        assert got[name].tobytes() == expected[name].tobytes(), name


def test_its_defaults_are_those_of_the_library():
    config = ViTConfig()
    defaults = inspect.signature(reference.initialise).parameters
    assert {name: defaults[name].default for name in sizes_of(config)} == sizes_of(config)
    for function in (reference.vit_forward, reference.loss_and_gradient):
        parameters = inspect.signature(function).parameters
        assert parameters["heads"].default == config.heads
        assert parameters["patch_size"].default == config.patch_size
        assert parameters["mean"].default == config.pixel_mean
        assert parameters["deviation"].default == config.pixel_deviation
    assert inspect.signature(reference.layer_norm_forward).parameters["epsilon"].default == config.epsilon


# ---- training ----


@SHAPES
@given(
    seed=seeds,
    steps=st.integers(3, 8),
    learning_rate=st.sampled_from([1e-4, 1e-2, 1.0]),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.0, 0.5, 0.999]),
    epsilon=st.sampled_from([1e-8, 1e-3]),
)
def test_adam_takes_the_same_steps(seed, steps, learning_rate, beta1, beta2, epsilon):
    shapes = {"matrix": (3, 4), "vector": (5,)}
    start, gradients = normal(seed, (17,), (steps, 17))
    fast = Parameters(shapes, start.copy())
    adam = optim.Adam(fast.flat, beta1, beta2, epsilon)
    plain = dict(Parameters(shapes, start.copy()))
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step, flat in enumerate(gradients, start=1):
        gradient = Parameters(shapes, flat.copy())
        reference.adam_step(plain, gradient, m, v, step, learning_rate, beta1, beta2, epsilon)
        adam.step(fast.flat, gradient.flat, learning_rate)
        np.testing.assert_array_equal(gradient.flat, flat)
        for got, expected in ((fast.flat, plain), (adam.first_moment, m), (adam.second_moment, v)):
            assert relative_error(got, np.concatenate([expected[name].ravel() for name in shapes])) < EQUAL


def accuracy_after(steps, capsys):
    """Train on MNIST and return the share of the first 1000 test images that are classified correctly."""
    data = load_mnist()
    parameters = reference.train(data.train_images, data.train_labels, steps)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in range(50, steps + 1, 50)]
    logits, _ = reference.vit_forward(data.test_images[:1000] / 255, parameters)
    return (logits.argmax(axis=1) == data.test_labels[:1000]).mean()


@pytest.mark.extended
def test_sixty_steps_learn_most_digits(capsys):
    assert accuracy_after(60, capsys) > 0.8  # 0.857


@pytest.mark.extended
def test_three_hundred_steps_learn_nine_digits_in_ten(capsys):
    assert accuracy_after(300, capsys) >= 0.9  # 0.95


# ---- its form ----

FUNCTIONS = {name: f for name, f in vars(reference).items() if inspect.isfunction(f)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_is_one_sentence_on_one_line(name):
    docstring = FUNCTIONS[name].__doc__
    assert docstring
    assert "\n" not in docstring
    assert docstring.endswith(".")


def test_every_forward_pass_has_its_backward_pass():
    forward, backward = (
        {name.removesuffix(end) for name in FUNCTIONS if name.endswith(end)} for end in ("_forward", "_backward")
    )
    assert forward - backward == {"patches"}  # images need no gradient
    assert backward <= forward
