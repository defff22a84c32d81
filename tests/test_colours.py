"""Colour images and rectangles, from the settings to a trained model."""

import re
from dataclasses import replace

import numpy as np
import pytest

import tinyvit
from tinyvit.classifier import fitting_config
from tinyvit.data.augment import Augmentation, warp
from tinyvit.training import NOTE

SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 16}


def colour_bars(count, seed=0):
    """Draw images (N, 12, 20, 3) that are red, green or blue on the left or on the right, and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    images = rng.integers(0, 40, (count, 12, 20, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        half = slice(0, 10) if label < 3 else slice(10, 20)
        image[:, half, label % 3] += 200
    return images, labels


def test_the_settings_follow_from_the_data():
    images, labels = colour_bars(60)
    images[..., 1] //= 2
    config = fitting_config(images, labels)
    assert (config.image_size, config.patch_size, config.channels, config.classes) == ((12, 20), (3, 5), 3, 6)
    unit = images / 255
    np.testing.assert_allclose(config.pixel_mean, unit.mean(axis=(0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(config.pixel_deviation, unit.std(axis=(0, 1, 2)), atol=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_learns_colours_and_places(workers, tmp_path):
    images, labels = colour_bars(480)
    recipe = replace(NOTE, learning_rate=3e-3, augmentation=Augmentation(rotation=5, shift=1))
    model = tinyvit.train(images, labels, 6, recipe=recipe, model=SMALL, workers=workers, verbose=0)
    unseen, truth = colour_bars(60, seed=1)
    assert model.evaluate(unseen, truth).accuracy > 0.95
    model.save(tmp_path / "model.safetensors")
    again = tinyvit.VisionTransformer.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    np.testing.assert_array_equal(again.predict(unseen), model.predict(unseen))
    assert "12 x 20 pixels of 3 numbers to 6 classes" in repr(again)


def test_each_channel_is_warped_as_a_grey_image():
    images, _ = colour_bars(7)
    maps = Augmentation(rotation=30, scale=0.2, shear=10, shift=2, flip=0.5).draw(np.random.default_rng(0), 7)
    warped = warp(images, maps)
    assert warped.shape == images.shape
    for channel in range(3):
        np.testing.assert_array_equal(warped[..., channel], warp(np.ascontiguousarray(images[..., channel]), maps))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 3, 12, 20), "use images.transpose(0, 2, 3, 1), which moves the channels to the end"),
        ((12, 20, 3), "give one image as images[None]"),
        ((9, 720), "use images.reshape(-1, 12, 20, 3)"),
        ((9, 12, 20), "images must have the shape (B, 12, 20, 3) with B at least 1, not (9, 12, 20)"),
        ((9, 20, 12, 3), "not (9, 20, 12, 3)"),
    ],
)
def test_another_layout_is_refused_with_advice(shape, message):
    images, labels = colour_bars(12)
    model = tinyvit.VisionTransformer(config := fitting_config(images, labels, **SMALL), tinyvit.initialise(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.predict(np.zeros(shape, np.uint8))
