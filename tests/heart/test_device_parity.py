"""A device computes what NumPy computes: every operation and its gradients, the model, and a training step.

Here the device is the strict stand-in for CuPy, and under `--device gpu` CuPy itself as well.
"""

import numpy as np
import pytest
from conftest import to_device
from strict_cupy import SynchronisationError, no_synchronisation

from tinyvit import ops
from tinyvit.backend import to_host
from tinyvit.classifier import VisionTransformer
from tinyvit.data.augment import Augmentation, warp
from tinyvit.data.batches import Epoch
from tinyvit.gpu import get_backend
from tinyvit.memory import Workspace
from tinyvit.model import ViTConfig, block_attention, vit_backward_to_images, vit_forward
from tinyvit.optim import Adam, ExponentialMovingAverage, clip_by_global_norm, matrices_only
from tinyvit.parameters import Parameters
from tinyvit.training import ParallelGradient

TOLERANCE = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
CONFIG = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, heads=3, mlp_width=10, classes=5)
EVERYTHING = Augmentation(rotation=20, scale=0.2, shear=10, shift=1.5, flip=0.3)


def leaves(result):
    """Every array in nested tuples, lists and `Parameters`, in order."""
    if isinstance(result, Parameters):
        return [result.flat]
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in leaves(part)]
    return [result]


def assert_agree(got, expected, xp, tolerance=None):
    """`got` lies on the device and equals `expected`, NumPy's, in shape, dtype and values."""
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected) > 0
    for mine, theirs in zip(got, expected, strict=True):
        assert isinstance(mine, xp.ndarray)
        assert (mine.shape, mine.dtype) == (np.shape(theirs), theirs.dtype)
        if theirs.dtype.kind != "f":
            np.testing.assert_array_equal(to_host(mine), theirs)
            continue
        allowed = tolerance or TOLERANCE[theirs.dtype]
        scale = max(1.0, float(np.abs(theirs).max(initial=0)))
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(to_host(mine), theirs, rtol=0, atol=allowed * scale)


def compare(backend, function, *arrays):
    """Run `function` with NumPy arrays and with device arrays, also in a workspace, and compare it all."""
    expected = function(*arrays)
    moved = [backend.asarray(array) for array in arrays]
    with no_synchronisation():
        got = function(*moved)
    assert_agree(got, expected, backend.xp)
    workspace = Workspace()
    for _ in range(2):
        with workspace, no_synchronisation():
            got = function(*moved)
    assert_agree(got, expected, backend.xp)
    for array, before in zip(moved, arrays, strict=True):
        np.testing.assert_array_equal(to_host(array), before)


def normal(dtype, *shapes):
    rng = np.random.default_rng(len(shapes))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def linear(x, w, b, dout):
    out, cache = ops.linear_forward(x, w, b)
    return out, ops.linear_backward(dout, cache)


def layer_norm(x, w, b, dout):
    out, cache = ops.layer_norm_forward(x, w, b)
    return out, ops.layer_norm_backward(dout, cache)


def gelu(x, dout):
    out, cache = ops.gelu_forward(x)
    return out, ops.gelu_backward(dout, cache)


def gelu_tanh(x, dout):
    out, cache = ops.gelu_tanh_forward(x)
    return out, ops.gelu_backward(dout, cache)


def softmax(x, dout):
    out, cache = ops.softmax_forward(x)
    return out, ops.softmax_backward(dout, cache)


def attention(q, k, v, dout):
    out, cache = ops.attention_forward(q, k, v)
    return out, ops.attention_backward(dout, cache)


def multi_head(heads):
    def function(x, w_qkv, b_qkv, w_out, b_out, dout):
        out, cache = ops.multi_head_attention_forward(x, w_qkv, b_qkv, w_out, b_out, heads)
        return out, cache.attention.weights, ops.multi_head_attention_backward(dout, cache)

    return function


def class_only(heads):
    def function(x, w_qkv, b_qkv, w_out, b_out, dout):
        out, cache = ops.class_attention_forward(x, w_qkv, b_qkv, w_out, b_out, heads)
        return out, cache.attention.weights, ops.class_attention_backward(dout, cache)

    return function


def of_transposed(function):
    """The same, on operands that lie in memory the other way round."""
    return lambda x, dout: function(x.swapaxes(0, -1), dout.swapaxes(0, -1))


def multi_head_shapes(batch, tokens, width, asking):
    weights = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    return [(batch, tokens, width), *weights, (batch, asking, width)]


OPERATIONS = {
    "linear": (linear, [(2, 3, 5), (5, 4), (4,), (2, 3, 4)]),
    "linear of one row": (linear, [(1, 5), (5, 1), (1,), (1, 1)]),
    "layer norm": (layer_norm, [(2, 3, 6), (6,), (6,), (2, 3, 6)]),
    "layer norm of rows": (layer_norm, [(1, 5), (5,), (5,), (1, 5)]),
    "gelu": (gelu, [(3, 4, 5), (3, 4, 5)]),
    "gelu of a transposed array": (of_transposed(gelu), [(3, 4, 5), (3, 4, 5)]),
    "gelu tanh": (gelu_tanh, [(3, 4, 5), (3, 4, 5)]),
    "softmax": (softmax, [(2, 3, 4), (2, 3, 4)]),
    "softmax of a transposed array": (of_transposed(softmax), [(2, 3, 4), (2, 3, 4)]),
    "attention": (attention, [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 3, 4)]),
    "attention to one token": (attention, [(1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 2)]),
    "multi-head": (multi_head(3), multi_head_shapes(2, 5, 6, 5)),
    "multi-head, one head": (multi_head(1), multi_head_shapes(1, 3, 4, 3)),
    "class attention": (class_only(2), multi_head_shapes(2, 5, 6, 1)),
    "class attention, one image, one token": (class_only(2), multi_head_shapes(1, 1, 4, 1)),
}


@DTYPES
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(accelerator, name, dtype):
    function, shapes = OPERATIONS[name]
    compare(accelerator, function, *normal(dtype, *shapes))


def images_of(kind, count=3, side=8):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    return images if kind is np.uint8 else (images / 255).astype(kind)


@DTYPES
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_patch_embedding(accelerator, kind, dtype):
    def function(images, w, b, class_token, positions, dout):
        out, cache = ops.patch_embedding_forward(images, w, b, class_token, positions, 4, 0.13, 0.31)
        return out, ops.patch_embedding_backward(dout, cache)

    arrays = normal(dtype, (16, 6), (6,), (6,), (5, 6), (3, 5, 6))
    compare(accelerator, function, images_of(kind), *arrays)


def test_patches_and_back(accelerator):
    def function(images):
        patches = ops.patches_forward(images, 4)
        return patches, ops.patches_backward(patches, images.shape)

    compare(accelerator, function, images_of(np.uint8))
    compare(accelerator, function, images_of(np.float32))


@DTYPES
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(accelerator, smoothing, dtype):
    def function(logits, labels):
        loss, cache = ops.cross_entropy_forward(logits, labels, smoothing)
        assert loss.shape == ()
        return loss, ops.cross_entropy_backward(1.0, cache), ops.cross_entropy_backward(0.25, cache)

    (logits,) = normal(dtype, (4, 5))
    for labels in (np.array([0, 4, 2, 2]), np.array([0, 4, 2, 2], np.uint8)):
        compare(accelerator, function, logits * 10, labels)


def random_parameters(dtype):
    """Every parameter random: zeros and ones at the start of training hide mistakes."""
    shapes = CONFIG.shapes()
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    return Parameters(shapes, (0.3 * np.random.default_rng(2).standard_normal(size)).astype(dtype))


@DTYPES
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_model(accelerator, gelu, kind, dtype):
    config = ViTConfig(**{**CONFIG.as_dict(), "gelu": gelu})
    parameters = random_parameters(dtype)

    def function(images, flat, dlogits):
        logits, cache = vit_forward(images, parameters.with_flat(flat), config)
        return logits, block_attention(cache), vit_backward_to_images(dlogits, cache)

    compare(accelerator, function, images_of(kind), parameters.flat, *normal(dtype, (3, 5)))


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_model_to_use(accelerator, kind):
    parameters, images = random_parameters(np.float32), images_of(kind)
    model = VisionTransformer(CONFIG, parameters)
    there = VisionTransformer(CONFIG, parameters.with_flat(accelerator.asarray(parameters.flat)))
    for name in ("logits", "predict_proba", "predict"):
        got = getattr(there, name)(accelerator.asarray(images))
        assert type(got) is np.ndarray
        np.testing.assert_allclose(got, getattr(model, name)(images), atol=1e-4)


def test_model_to_use_with_images_of_the_host(strict_gpu):
    parameters = random_parameters(np.float32)
    model = VisionTransformer(CONFIG, parameters.with_flat(strict_gpu.asarray(parameters.flat)))
    model.predict(images_of(np.uint8))


@DTYPES
def test_adam(accelerator, dtype):
    parameters = random_parameters(dtype)

    def function(flat, *gradients):
        flat = flat.copy()
        adam = Adam(flat, weight_decay=0.1, decayed=matrices_only(parameters.with_flat(flat)))
        for gradient in gradients:
            adam.step(flat, gradient, 1e-2)
        return flat, adam.first_moment, adam.second_moment

    size = parameters.flat.size
    compare(accelerator, function, parameters.flat, *normal(dtype, (size,), (size,), (size,)))


@DTYPES
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_and_averaging(accelerator, limit, dtype):
    def clip(gradient):
        gradient = gradient.copy()
        return clip_by_global_norm(gradient, limit), gradient

    def average(flat, other):
        averaged = ExponentialMovingAverage(flat, 0.9)
        averaged.step(other)
        averaged.step(flat)
        return averaged.average

    compare(accelerator, clip, *normal(dtype, (30,)))
    compare(accelerator, clip, np.zeros(30, dtype))
    compare(accelerator, average, *normal(dtype, (30,), (30,)))


def test_warp(accelerator):
    images = images_of(np.uint8, count=7)
    maps = EVERYTHING.draw(np.random.default_rng(3), 7)
    compare(accelerator, warp, images, maps)
    compare(accelerator, warp, images, maps * 50)  # far outside
    compare(accelerator, warp, images[:1], maps[:1])


def data(count=40):
    rng = np.random.default_rng(7)
    return rng.integers(0, 256, (count, 8, 8), dtype=np.uint8), rng.integers(0, 5, count, dtype=np.uint8)


def epoch(backend, augmentation=None, number=1):
    return Epoch(*to_device(backend, *data()), augmentation, seed=4, number=number, backend=backend)


@pytest.mark.parametrize("augmentation", [None, EVERYTHING])
def test_epoch(accelerator, augmentation):
    for start, stop in ((0, 8), (8, 40), (39, 40)):
        expected = epoch(get_backend("cpu"), augmentation).load(start, stop)
        with no_synchronisation():
            got = epoch(accelerator, augmentation).load(start, stop)
        assert_agree(got, expected, accelerator.xp)


def train(backend, dtype, steps=3, augmentation=None):
    """Take a few whole steps and return all that they leave behind, without once waiting for the device."""
    parameters = random_parameters(dtype)
    parameters = parameters.with_flat(backend.asarray(parameters.flat))
    adam = Adam(parameters.flat, weight_decay=0.1, decayed=matrices_only(parameters))
    average = ExponentialMovingAverage(parameters.flat)
    left = []
    with ParallelGradient(CONFIG, 1, smoothing=0.1) as gradient_of, no_synchronisation():
        batches = epoch(backend, augmentation)
        for step in range(steps):
            loss, correct, gradient = gradient_of(parameters, *batches.batch(10 * step, 10 * step + 10))
            norm = clip_by_global_norm(gradient.flat, 1.0)
            adam.step(parameters.flat, gradient.flat, 1e-2)
            average.step(parameters.flat)
            left.append((loss, correct, norm, gradient.flat.copy()))
    return left, parameters, adam.first_moment, adam.second_moment, average.average


def test_parallel_gradient(accelerator):
    def gradient(backend):
        parameters = random_parameters(np.float64)
        parameters = parameters.with_flat(backend.asarray(parameters.flat))
        with ParallelGradient(CONFIG, 1, chunk_size=16) as gradient_of:
            return gradient_of(parameters, *epoch(backend).batch(3, 40))

    assert_agree(gradient(accelerator), gradient(get_backend("cpu")), accelerator.xp)


def test_a_gpu_needs_one_worker(accelerator):
    parameters = random_parameters(np.float32)
    parameters = parameters.with_flat(accelerator.asarray(parameters.flat))
    with ParallelGradient(CONFIG, 2) as gradient_of, pytest.raises(ValueError, match="needs one worker, not 2"):
        gradient_of(parameters, *epoch(accelerator).batch(0, 10))


def test_training(accelerator):
    expected = train(get_backend("cpu"), np.float64)
    assert_agree(train(accelerator, np.float64), expected, accelerator.xp, tolerance=1e-9)


def test_a_training_step_never_waits_for_the_device(strict_gpu):
    train(strict_gpu, np.float32, augmentation=EVERYTHING)


# the comparison can fail


def test_a_wait_in_a_training_step_is_seen(strict_gpu, monkeypatch):
    monkeypatch.setattr(
        "test_device_parity.clip_by_global_norm", lambda gradient, limit: float(gradient.sum())
    )
    with pytest.raises(SynchronisationError):
        train(strict_gpu, np.float32)


@pytest.mark.parametrize(
    "damage",
    [
        lambda xp, x: x + 1e-9,  # a small difference
        lambda xp, x: x * np.ones(3),  # a host array
        lambda xp, x: x.astype(np.float32),
        lambda xp, x: x.sum(axis=0),
        lambda xp, x: xp.empty_like(x),  # memory nobody wrote
        lambda xp, x: x.T.reshape(-1).reshape(3, 2).T if float(x[0, 0]) else x,  # a wait
        lambda xp, x: to_host(x),  # a result on the host
        lambda xp, x: xp.add(x, 1, out=x) - 1,  # an argument overwritten
    ],
)
def test_damage_is_seen(strict_gpu, damage):
    def function(x):
        return x * 1 if isinstance(x, np.ndarray) else damage(strict_gpu.xp, x)

    with pytest.raises((AssertionError, TypeError)):
        compare(strict_gpu, function, np.arange(6.0).reshape(2, 3))
