"""What a user holds: three lines to a trained model, and a model that says what it is."""

import json
import pydoc
import re
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tinyvit
from tinyvit.checkpoint import CheckpointError
from tinyvit.classifier import fitting_config
from tinyvit.model import ViTConfig, initialise, vit_forward
from tinyvit.ops import softmax_forward
from tinyvit.training import NOTE, Training, TrainingConfig
from tinyvit.training.progress import Progress, epoch_line

SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24}


@pytest.fixture(scope="module")
def data():
    return tinyvit.load_mnist()


def small_model():
    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, mlp_width=12, classes=5)
    return tinyvit.VisionTransformer(config, initialise(config, seed=1))


def test_three_lines_train_a_model(data, capsys):
    model = tinyvit.train(data.train_images[:3000], data.train_labels[:3000], epochs=2)
    assert model.config == replace(
        ViTConfig(), pixel_mean=model.config.pixel_mean, pixel_deviation=model.config.pixel_deviation
    )
    assert model.evaluate(data.test_images[:1000], data.test_labels[:1000]).accuracy > 0.8
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all("validation" in line for line in lines)  # a twelfth of the images was held back


@pytest.mark.parametrize(
    ("side", "patch_size"), [(28, 7), (32, 8), (8, 2), (16, 4), (12, 3), (14, 2), (7, 1), (1, 1), (13, 1), (30, 6)]
)
def test_the_defaults_fit_the_data(side, patch_size):
    images = np.random.default_rng(0).integers(0, 200, (20, side, side), dtype=np.uint8)
    labels = np.arange(20) % 6
    config = fitting_config(images, labels)
    assert (config.image_size, config.patch_size, config.classes) == (side, patch_size, 6)
    assert config.pixel_mean == pytest.approx(images.mean() / 255, abs=1e-4)
    assert config.pixel_deviation == pytest.approx(images.std() / 255, abs=1e-4)
    assert fitting_config(images, labels, classes=9, depth=1).as_dict() == {
        **config.as_dict(),
        "classes": 9,
        "depth": 1,
    }


def test_mnist_has_the_defaults_of_the_note(data):
    assert fitting_config(data.train_images, data.train_labels) == ViTConfig()


@pytest.mark.parametrize("count", [1, 2, 11, 40])
def test_few_images_are_enough(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    model = tinyvit.train(images, np.arange(count) % 3, model=SMALL, verbose=0)
    assert model.predict(images).shape == (count,)


def test_it_is_the_training_of_its_recipe_and_prints_nothing_if_asked(capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 3
    recipe = replace(NOTE, batch_size=16)
    model = tinyvit.train(images, labels, 2, recipe=recipe, model=SMALL, workers=1, seed=4, verbose=0)
    config = replace(recipe, epochs=2, seed=4, validation=5)
    run = Training(model.config, config, images, labels, tinyvit.gpu.get_backend("cpu"), workers=1)
    run.run()
    np.testing.assert_array_equal(model.parameters.flat, run.state.weights.flat)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8)), np.zeros(4, int), "images must be uint8 (0 to 255), not float64"),
        (np.zeros((4, 8, 8, 9), np.uint8), np.zeros(4, int), "images must have the shape (B, R, C)"),
        (np.zeros((8, 8), np.uint8), np.zeros(8, int), "not (8, 8): give one image as images[None]"),
        (np.zeros((0, 8, 8), np.uint8), np.zeros(0, int), "with B at least 1, not (0, 8, 8)"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(3, int), "integers of shape (4,), one per image, not int64 (3,)"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4), "not float64 (4,): use labels.astype(int)"),
        (np.zeros((4, 8, 8), np.uint8), np.array([0, 1, -1, 0]), "labels must be from 0, but one is -1"),
    ],
)
def test_data_that_does_not_fit_is_one_clear_error(images, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tinyvit.train(images, labels)


@pytest.mark.parametrize(("size", "note"), [((28, 28), ""), ((22, 10), ""), ((17, 8), "1 x 2"), ((29, 29), "1 x 1")])
def test_sides_without_a_fitting_divisor_have_a_note(caplog, size, note):
    config = fitting_config(np.zeros((2, *size), np.uint8), [0, 1])
    assert (f"patches of {note} pixels make {config.tokens} tokens" in caplog.text) == bool(note)
    assert bool(caplog.text) == bool(note)


def test_an_unknown_recipe_or_device_is_named():
    images, labels = np.zeros((4, 8, 8), np.uint8), np.zeros(4, int)
    with pytest.raises(ValueError, match="recipe 'best' is unknown: give 'tuned', 'note' or a TrainingConfig"):
        tinyvit.train(images, labels, recipe="best")
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        tinyvit.train(images, labels, device="tpu")
    with pytest.raises(ValueError, match="model 'digits' is unknown: give 'mnist'"):
        tinyvit.load_pretrained("digits")


def test_a_model_predicts_what_the_functions_give():
    model = small_model()
    images = np.random.default_rng(2).integers(0, 256, (7, 8, 8), dtype=np.uint8)
    logits, _ = vit_forward(images, model.parameters, model.config)
    np.testing.assert_allclose(model.logits(images), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(images), softmax_forward(logits)[0], rtol=1e-4)
    np.testing.assert_array_equal(model.predict(images), logits.argmax(axis=1))
    assert model.evaluate(images, logits.argmax(axis=1)).accuracy == 1


def test_a_model_comes_back_from_its_file(tmp_path):
    model = small_model()
    model.save(tmp_path / "model.safetensors", {"note": "mine"})
    back = tinyvit.VisionTransformer.load(tmp_path / "model.safetensors")
    assert back.config == model.config
    assert back.parameters.flat.tobytes() == model.parameters.flat.tobytes()
    with pytest.raises(CheckpointError, match="cannot be read"):
        tinyvit.VisionTransformer.load(tmp_path / "another.safetensors")


def test_what_is_printed_of_an_object_is_short(data):
    model = small_model()
    run = Training(
        model.config,
        TrainingConfig(validation=0),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros(3, int),
        tinyvit.gpu.get_backend("cpu"),
        workers=1,
    )
    shown = {
        "model": model,
        "parameters": model.parameters,
        "data": data,
        "evaluation": model.evaluate(np.zeros((2, 8, 8), np.uint8), np.zeros(2, int)),
        "run": run,
        "state": run.state,
    }
    for name, thing in shown.items():
        assert len(repr(thing)) < 200, name
        assert "array" not in repr(thing).replace("arrays", ""), name
    assert repr(data) == (
        "ImageDataset(MNIST: 60,000 images of 28 x 28 to train on, 10,000 images of 28 x 28 to test on, 10 classes)"
    )
    assert "8 x 8 pixels to 5 classes" in repr(model)


def test_help_fits_two_screens():
    text = pydoc.plain(pydoc.render_doc(tinyvit))
    assert len(text.splitlines()) <= 80
    for name in ("train", "VisionTransformer", "load_pretrained", "load_mnist", "loss_and_gradient"):
        assert re.search(rf"^\s+{name}\s", text, re.MULTILINE), name
        assert hasattr(tinyvit, name)


def test_the_line_of_an_epoch_fits_80_columns():
    record = {
        "epoch": 999,
        "train_loss": 9.8765,
        "train_accuracy": 1.0,
        "validation_loss": 9.8765,
        "validation_accuracy": 1.0,
        "seconds": 9999.4,
    }
    run = SimpleNamespace(config=SimpleNamespace(epochs=999), state=SimpleNamespace(history=[record]))
    assert len(epoch_line(run)) <= 80


def test_a_silent_progress_shows_nothing(capsys):
    model = small_model()
    config = TrainingConfig(epochs=1, validation=0)
    images, labels = np.zeros((3, 8, 8), np.uint8), np.zeros(3, int)
    run = Training(model.config, config, images, labels, tinyvit.gpu.get_backend("cpu"), workers=1)
    with Progress(run, silent=True) as progress:
        run.run(on_step=progress.on_step, on_epoch=progress.on_epoch)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_ctrl_c_is_a_keyboard_interrupt():
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)
    interrupt = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        tinyvit.train(images, np.arange(400) % 3, epochs=1000, model=SMALL, workers=1, verbose=0)
    interrupt.join()


@pytest.mark.parametrize("workers", [1.5, "2", True, 0])
def test_workers_are_an_integer(workers):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"^workers must be an integer from 1, not "):
        tinyvit.train(images, labels, workers=workers)


def test_numbers_of_numpy_are_settings():
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 3
    runs = [
        tinyvit.train(images, labels, epochs=epochs, workers=workers, seed=seed, model=SMALL, verbose=0)
        for epochs, workers, seed in ((1, 1, 2), (np.int64(1), np.int32(1), np.uint8(2)))
    ]
    np.testing.assert_array_equal(runs[0].parameters.flat, runs[1].parameters.flat)
    settings = TrainingConfig(learning_rate=np.float32(0.5), epochs=np.int64(3)).as_dict()
    assert json.dumps(settings) == json.dumps(TrainingConfig(learning_rate=0.5, epochs=3).as_dict())


def test_a_useful_learning_rate_is_named():
    for rate in (0, 10, np.nan):
        with pytest.raises(ValueError, match=r"^learning_rate \(usually below 0\.1\) must be a number above 0"):
            TrainingConfig(learning_rate=rate)
