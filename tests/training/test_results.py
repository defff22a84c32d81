"""The tables of a run and the lines below its pictures say what the run did."""

import csv
import json
import re

import numpy as np
import pytest

from tinyvit import VisionTransformer, plots
from tinyvit.backend import CPU
from tinyvit.checkpoint import CheckpointError
from tinyvit.data.augment import Augmentation
from tinyvit.model import ViTConfig, initialise
from tinyvit.training import NOTE, TUNED, TrainingConfig
from tinyvit.training.results import (
    describe_augmentation,
    describe_losses,
    read_metrics,
    write_augmentation_sheet,
    write_evaluation,
    write_history,
    write_metrics,
)
from tinyvit.training.state import new_state, save_state

RECORD = {
    "epoch": 1,
    "train_loss": 0.123456789,
    "train_accuracy": 0.98765432,
    "validation_loss": 0.0555555,
    "validation_accuracy": 1.0,
    "first_learning_rate": 0.001234567,
    "last_learning_rate": 1.23456e-07,
    "seconds": 12.3456,
}
PLAIN = TrainingConfig()
SMOOTHED = TrainingConfig(smoothing=0.1)


def rows_of(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_history_table_has_sensible_digits(tmp_path):
    write_history(tmp_path, [RECORD], PLAIN)
    assert rows_of(tmp_path) == [
        {
            "epoch": "1",
            "train_loss": "0.1235",
            "train_accuracy": "0.9877",
            "validation_loss": "0.0556",
            "validation_accuracy": "1.0000",
            "first_learning_rate": "0.00123",
            "last_learning_rate": "1.23e-07",
            "seconds": "12.3",
        }
    ]


def test_the_history_table_takes_runs_without_validation_and_records_of_earlier_versions(tmp_path):
    old = {**RECORD, "learning_rate": 0.5, "validation_loss": None, "validation_accuracy": None}
    del old["first_learning_rate"], old["last_learning_rate"]
    write_history(tmp_path, [old, {**RECORD, "epoch": 2}], PLAIN)
    first, second = rows_of(tmp_path)
    assert [first[name] for name in ("validation_loss", "first_learning_rate", "last_learning_rate")] == [""] * 3
    assert (second["epoch"], second["first_learning_rate"]) == ("2", "0.00123")


def test_the_settings_of_the_history_are_by_default_those_of_the_checkpoint(tmp_path):
    model_config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12)
    for name, config in (("plain", PLAIN), ("smoothed", SMOOTHED)):
        for folder in (tmp_path / name, tmp_path / f"{name}-given"):
            folder.mkdir()
        settings = {"model": model_config.as_dict(), "training": config.as_dict(), "data": 0, "workers": 1}
        save_state(tmp_path / name, new_state(model_config, config, CPU), settings, 0)
        write_history(tmp_path / name, [RECORD])
        write_history(tmp_path / f"{name}-given", [RECORD], config)
    pictures = {folder.name: (folder / "training_curves.png").read_bytes() for folder in tmp_path.iterdir()}
    assert pictures["plain"] == pictures["plain-given"] != pictures["smoothed"]
    assert pictures["smoothed"] == pictures["smoothed-given"]


def small_model(names):
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        width=8,
        depth=1,
        heads=2,
        mlp_width=12,
        classes=len(names),
        class_names=names,
    )
    return VisionTransformer(config, initialise(config))


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8)).astype(np.uint8)


@pytest.mark.parametrize("error", [ValueError("no\nformula"), MemoryError(), RuntimeError("no font")])
def test_a_picture_that_cannot_be_drawn_is_a_note(tmp_path, monkeypatch, caplog, error):
    def fail(*args, **kwargs):
        raise error

    for name in ("confusion_matrix", "misclassified", "training_curves", "augmentation_sheet"):
        monkeypatch.setattr(plots, name, fail)
        (tmp_path / f"{name}.png").write_text("of an earlier evaluation")
    evaluation = write_evaluation(tmp_path, small_model(["a", "b"]), IMAGES, np.arange(6) % 2, workers=1)
    write_history(tmp_path, [RECORD], PLAIN)
    write_augmentation_sheet(tmp_path, IMAGES, Augmentation(rotation=5))
    assert len(evaluation.predictions) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "augmentation_sheet.png",  # the picture of a run has a shorter name
        "classification_report.txt",
        "history.csv",
    ]
    reason = re.escape(f"could not be drawn ({type(error).__name__}")
    for name in ("confusion_matrix", "misclassified", "training_curves", "augmentation"):
        path = re.escape(str(tmp_path / f"{name}.png"))
        assert re.search(rf"note: {path} is missing, because it {reason}.*\)$", caplog.text, re.MULTILINE)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(plots, "training_curves", fail)
    with pytest.raises(OSError, match="no space left"):
        write_history(tmp_path, [RECORD], PLAIN)
    assert (tmp_path / "history.csv").exists()


def test_control_characters_do_not_break_the_report(tmp_path):
    names = ["\x1b[31mred", "line\nbreak", "bell\x07", "caf\udce9"]
    write_evaluation(tmp_path, small_model(names), IMAGES, np.arange(6) % 4, workers=1)
    lines = (tmp_path / "classification_report.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("  ")[0].strip() for line in (line.strip() for line in lines[2:6])]
    assert rows == ["\\x1b[31mred", "line\\nbreak", "bell\\x07", "caf\\udce9"]


@pytest.mark.parametrize(
    ("config", "losses", "expected"),
    [
        (
            TUNED,
            [(2, 1), (1, 0.5)],
            "The training loss lies above the validation loss because it is a mean over each epoch, on augmented "
            "images with smoothed labels.",
        ),
        (
            NOTE,
            [(2, 1)],
            "The training loss lies above the validation loss because it is a mean over each epoch, on augmented "
            "images.",
        ),
        (
            SMOOTHED,
            [(2, 1)],
            "The training loss lies above the validation loss because it is a mean over each epoch, with smoothed "
            "labels.",
        ),
        (
            TUNED,
            [(2, 1), (1, 1.5)],  # not in every epoch
            "The training loss is a mean over each epoch, on augmented images with smoothed labels. The validation "
            "loss uses the original images and labels.",
        ),
        (
            NOTE,
            [(1, float("nan"))],
            "The training loss is a mean over each epoch, on augmented images. The validation loss uses the "
            "original images.",
        ),
        (
            PLAIN,
            [(2, 1)],
            "The training loss is a mean over each epoch. The validation loss is measured at the end of each epoch.",
        ),
        (PLAIN, [(2, None)], "The training loss is a mean over each epoch. This run has no validation images."),
    ],
)
def test_the_line_below_the_curves_is_true_for_the_run(config, losses, expected):
    history = [{"train_loss": training, "validation_loss": validation} for training, validation in losses]
    assert describe_losses(history, config) == expected


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        (
            Augmentation(rotation=8, scale=0.1, shear=5, shift=1),
            "The others are random variants: rotation ±8°, scale 0.91 to 1.10, shear ±5°, shift ±1 px.",
        ),
        (
            Augmentation(rotation=12.5, flip=0.1),
            "The others are random variants: rotation ±12.5°, 10 % mirrored.",
        ),
        (Augmentation(), "This run uses no augmentation, so all columns are the same."),
    ],
)
def test_the_line_below_the_augmentation_is_true_for_the_run(augmentation, expected):
    assert describe_augmentation(augmentation) == f"Column 1 is the original image. {expected}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "no JSON object"),
        (b'{"origin": null}', "no JSON object, or its origin is none"),
        (b"{", "Expecting"),
        (b"\xff", "'utf-8' codec"),
        (b"[" * 100_000, "maximum recursion"),
        (b'{"origin": {"test_limit": "10"}}', "test_limit must be an integer from 1 to .*, not '10'"),
        (b'{"origin": {"data_dir": 5}}', "data_dir must be a text, not 5"),
    ],
)
def test_damaged_metrics_are_one_error_that_names_the_file(tmp_path, content, expected):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern(tmp_path, expected)):
        read_metrics(tmp_path)


def pattern(folder, reason):
    path = re.escape(str(folder / "metrics.json"))
    return rf"^{path}: not the metrics of a run \({reason}.*\): give the folder of another run$"


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    assert read_metrics(tmp_path) == {}
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(CheckpointError, match=pattern(tmp_path, r".*Is a directory")):
        read_metrics(tmp_path)


def test_metrics_of_a_cpu_leave_out_what_describes_a_gpu(tmp_path):
    metrics = {
        "test_accuracy": 0.9,
        "precision": "float32",
        "kernels": "off",
        "compile_seconds": 0.0,
        "origin": {"recipe": "tuned", "precision": "float32"},
    }
    write_metrics(tmp_path, {**metrics, "device": "cpu"})
    assert read_metrics(tmp_path) == {"test_accuracy": 0.9, "device": "cpu", "origin": {"recipe": "tuned"}}
    for others in ({**metrics, "device": "gpu"}, {"run": "model.safetensors", "precision": "mine"}):
        write_metrics(tmp_path, others)
        assert json.loads((tmp_path / "metrics.json").read_text()) == others
