"""Colour images and rectangles, from the settings to a trained model."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import tinyvit
from tinyvit.classifier import VisionTransformer, fitting_config
from tinyvit.commands import main
from tinyvit.data.augment import Augmentation, warp
from tinyvit.model import ViTConfig, initialise
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
    again = VisionTransformer.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    np.testing.assert_array_equal(again.predict(unseen), model.predict(unseen))
    assert "12 x 20 pixels of 3 numbers to 6 classes" in repr(again)


def test_names_of_classes_are_saved_with_the_model(tmp_path):
    config = ViTConfig(classes=3, class_names=["T-shirt", "Bag", "手写"])
    assert config.names == ("T-shirt", "Bag", "手写")
    VisionTransformer(config, initialise(config)).save(tmp_path / "model.safetensors")
    assert VisionTransformer.load(tmp_path / "model.safetensors").config == config
    assert ViTConfig(class_names=list("0123456789")) == ViTConfig()
    assert ViTConfig(classes=3).names == ("0", "1", "2")
    for names, message in ((("a", "b"), "one name per class, 3, not 2"), ("abc", "must be a sequence of texts")):
        with pytest.raises(ValueError, match=message):
            ViTConfig(classes=3, class_names=names)


def test_a_run_on_pictures_keeps_the_names_of_its_classes(tmp_path, monkeypatch):
    images, labels = colour_bars(120)
    names = ("left red", "left green", "left blue", "right red", "right green", "right blue")
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "data" / ("train" if number < 90 else "test") / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    out = tmp_path / "run"
    model = ("--width", "16", "--depth", "1", "--heads", "2", "--mlp-width", "16", "--patch-size", "6x10")
    main(["train", "--data", str(tmp_path / "data"), "--epochs", "1", "--out", str(out), "--workers", "1", *model])
    config = VisionTransformer.load(out / "model.safetensors").config
    assert (config.image_size, config.patch_size, config.channels) == ((12, 20), (6, 10), 3)
    assert config.class_names == tuple(sorted(names))
    report = (out / "classification_report.txt").read_text()
    assert all(name in report for name in names)
    main(["evaluate", str(out), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "classification_report.txt").read_text() == report


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
    model = VisionTransformer(config := fitting_config(images, labels, **SMALL), initialise(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.predict(np.zeros(shape, np.uint8))
