"""A device gives the results of NumPy: the model, the optimiser, the data and a training step.

The device is the strict stand-in for CuPy and, under `--device gpu`, also CuPy. `test_operations.py` compares the
operations; only what its table lacks is here.
"""

import numpy as np
import pytest
from devices import assert_agree, assert_device_agrees, to_device
from operations import MEDIUM, OPERATIONS, out_and_gradients
from strategies import random_parameters
from strict_cupy import SynchronisationError, no_synchronisation

from tinyvit import ops
from tinyvit.backend import to_host
from tinyvit.classifier import VisionTransformer
from tinyvit.data.augment import Augmentation, warp
from tinyvit.data.batches import Epoch
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, block_attention, vit_backward_to_images, vit_forward
from tinyvit.optim import Adam, ExponentialMovingAverage, clip_by_global_norm, matrices_only
from tinyvit.training import ParallelGradient

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
CONFIG = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, heads=3, mlp_width=10, classes=5)
EVERYTHING = Augmentation(rotation=20, scale=0.2, shear=10, shift=1.5, flip=0.3)


def normal(dtype, *shapes):
    rng = np.random.default_rng(len(shapes))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def images_of(kind, count=3, side=8):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    return images if kind is np.uint8 else (images / 255).astype(kind)


@DTYPES
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_images_and_weights_of_different_dtypes(accelerator, kind, dtype):
    operation = OPERATIONS["patch_embedding"]
    (_, *weights), side, dout = operation.draw(MEDIUM._replace(down=4, across=4), 0, dtype)

    def function(dout, *arrays):
        return out_and_gradients(operation.pair("ops"), arrays, side, dout)

    assert_device_agrees(accelerator, function, dout, images_of(kind, count=4), *weights)


def test_patches_of_bytes(accelerator):
    assert_device_agrees(accelerator, lambda images: ops.patches_forward(images, 4), images_of(np.uint8))


@DTYPES
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_a_number_as_dloss(accelerator, smoothing, dtype):
    def function(logits, labels):
        loss, cache = ops.cross_entropy_forward(logits, labels, smoothing)
        assert loss.shape == ()
        return loss, ops.cross_entropy_backward(1.0, cache), ops.cross_entropy_backward(0.25, cache)

    (logits,) = normal(dtype, (4, 5))
    for labels in (np.array([0, 4, 2, 2]), np.array([0, 4, 2, 2], np.uint8)):
        assert_device_agrees(accelerator, function, logits * 10, labels)


@DTYPES
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_model(accelerator, gelu, kind, dtype):
    config = ViTConfig(**{**CONFIG.as_dict(), "gelu": gelu})
    parameters = random_parameters(CONFIG, dtype=dtype)

    def function(images, flat, dlogits):
        logits, cache = vit_forward(images, parameters.with_flat(flat), config)
        return logits, block_attention(cache), vit_backward_to_images(dlogits, cache)

    assert_device_agrees(accelerator, function, images_of(kind), parameters.flat, *normal(dtype, (3, 5)))


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_model_to_use(accelerator, kind):
    parameters, images = random_parameters(CONFIG, dtype=np.float32), images_of(kind)
    model = VisionTransformer(CONFIG, parameters)
    there = VisionTransformer(CONFIG, parameters.with_flat(accelerator.asarray(parameters.flat)))
    for name in ("logits", "predict_proba", "predict"):
        got = getattr(there, name)(accelerator.asarray(images))
        assert type(got) is np.ndarray
        np.testing.assert_allclose(got, getattr(model, name)(images), atol=1e-4)


def test_model_to_use_with_images_on_the_host(strict_gpu):
    parameters = random_parameters(CONFIG, dtype=np.float32)
    model = VisionTransformer(CONFIG, parameters.with_flat(strict_gpu.asarray(parameters.flat)))
    model.predict(images_of(np.uint8))


@DTYPES
def test_adam(accelerator, dtype):
    parameters = random_parameters(CONFIG, dtype=dtype)

    def function(flat, *gradients):
        flat = flat.copy()
        adam = Adam(flat, weight_decay=0.1, decayed=matrices_only(parameters.with_flat(flat)))
        for gradient in gradients:
            adam.step(flat, gradient, 1e-2)
        return flat, adam.first_moment, adam.second_moment

    size = parameters.flat.size
    assert_device_agrees(accelerator, function, parameters.flat, *normal(dtype, (size,), (size,), (size,)))


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

    assert_device_agrees(accelerator, clip, *normal(dtype, (30,)))
    assert_device_agrees(accelerator, clip, np.zeros(30, dtype))
    assert_device_agrees(accelerator, average, *normal(dtype, (30,), (30,)))


def test_warp(accelerator):
    images = images_of(np.uint8, count=7)
    maps = EVERYTHING.draw(np.random.default_rng(3), 7)
    assert_device_agrees(accelerator, warp, images, maps)
    assert_device_agrees(accelerator, warp, images, maps * 50)  # pixels far outside the image
    assert_device_agrees(accelerator, warp, images[:1], maps[:1])


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
    """Take a few training steps without waiting for the device, and return their results."""
    parameters = random_parameters(CONFIG, dtype=dtype)
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
        parameters = random_parameters(CONFIG)
        parameters = parameters.with_flat(backend.asarray(parameters.flat))
        with ParallelGradient(CONFIG, 1, chunk_size=16) as gradient_of:
            return gradient_of(parameters, *epoch(backend).batch(3, 40))

    assert_agree(gradient(accelerator), gradient(get_backend("cpu")), accelerator.xp)


def test_a_gpu_needs_one_worker(accelerator):
    parameters = random_parameters(CONFIG, dtype=np.float32)
    parameters = parameters.with_flat(accelerator.asarray(parameters.flat))
    expected = pytest.raises(ValueError, match="workers must be 1 on a GPU, not 2")
    with ParallelGradient(CONFIG, 2) as gradient_of, expected:
        gradient_of(parameters, *epoch(accelerator).batch(0, 10))


def test_training(accelerator):
    expected = train(get_backend("cpu"), np.float64)
    assert_agree(train(accelerator, np.float64), expected, accelerator.xp, tolerance=1e-9)


def test_a_training_step_never_waits_for_the_device(strict_gpu):
    train(strict_gpu, np.float32, augmentation=EVERYTHING)


# ---- the comparison can fail ----


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
        lambda xp, x: xp.empty_like(x),  # uninitialised memory
        lambda xp, x: x.T.reshape(-1).reshape(3, 2).T if float(x[0, 0]) else x,  # a wait
        lambda xp, x: to_host(x),  # a result on the host
        lambda xp, x: xp.add(x, 1, out=x) - 1,  # an argument overwritten
    ],
)
def test_damage_is_seen(strict_gpu, damage):
    def function(x):
        return x * 1 if isinstance(x, np.ndarray) else damage(strict_gpu.xp, x)

    with pytest.raises((AssertionError, TypeError)):
        assert_device_agrees(strict_gpu, function, np.arange(6.0).reshape(2, 3))
