"""The commands on data sets of many forms: what `--data` takes, and the classes of a CSV file."""

import csv
import json
import os

import numpy as np
import publishers
import pytest

import tinyvit
from tinyvit.checkpoint import load_model, save_model
from tinyvit.commands import main
from tinyvit.data import load_mnist
from tinyvit.model import ViTConfig, initialise

pytestmark = pytest.mark.extended

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--mlp-width", "24", "--epochs", "1", "--workers", "1"]


@pytest.fixture(scope="module")
def digits():
    data = load_mnist()
    return [data.train_images[:300], data.train_labels[:300], data.test_images[:60], data.test_labels[:60]]


def run(capsys, *arguments):
    """Run a command in this process and return what it printed."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def error_of(capsys, *arguments):
    """Return the one line that a command prints about wrong input."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_split_of_emnist_trains_resumes_and_is_evaluated(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    for split in ("letters", "digits"):
        publishers.write_emnist(tmp_path / "gzip", digits, split)
    assert "give one of" in error_of(capsys, "train", *TINY, "--data", "gzip")
    run_folder = ["--data", "gzip/emnist-letters", "--out", "run", "--epochs", "2", "--stop-after", "1"]
    text = run(capsys, "train", *TINY, *run_folder)
    assert "data set: EMNIST letters, transposed back, 26 classes A to Z, " in text
    text = run(capsys, "train", "--resume", "run")
    assert "data set: EMNIST letters, transposed back, 26 classes A to Z, " in text
    assert load_model(tmp_path / "run" / "model.safetensors")[1].classes == 26
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["origin"]["data_dir"] == str(tmp_path / "gzip" / "emnist-letters")
    assert "data set: EMNIST letters" in run(capsys, "evaluate", "run")
    run(capsys, "evaluate", "run", "--data", "gzip/emnist-digits-test-images-idx3-ubyte.gz")
    assert (tmp_path / "run" / "on-emnist-digits" / "metrics.json").exists()


def test_the_number_of_classes_can_be_larger(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    publishers.write_keras(tmp_path, digits)
    run(capsys, "train", *TINY, "--data", "mnist.npz", "--classes", "12", "--out", "run")
    assert load_model(tmp_path / "run" / "model.safetensors")[1].classes == 12
    assert "labels from 0 to 4, found" in error_of(capsys, "train", *TINY, "--data", "mnist.npz", "--classes", "5")


def test_the_digits_of_scikit_learn_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = run(capsys, "train", *TINY, "--data", "sklearn:digits", "--out", "run")
    assert "data set: scikit-learn's digits, 10 classes 0 to 9, pixels 0 to 16 became 0 to 255" in text
    assert "data set: scikit-learn's digits" in run(capsys, "evaluate", "run")


def test_colour_and_rectangles_train_and_do_not_fit_other_models(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    colour = [np.repeat(a[..., None], 3, axis=3) if a.ndim == 3 else a for a in digits]
    wide = [a[:, :20] if a.ndim == 3 else a for a in digits]
    save_model(tmp_path / "grey.safetensors", initialise(ViTConfig()), ViTConfig())
    for name, arrays, size, patch in (
        ("colour", colour, "28 x 28 pixels of 3 numbers", (7, 7)),
        ("wide", wide, "20 x 28 pixels", (5, 7)),
    ):
        publishers.write_keras(tmp_path / name, arrays)
        error = error_of(capsys, "evaluate", "grey.safetensors", "--data", name)
        assert f"mnist.npz: the model expects images of 28 x 28 pixels, found {size}\n" in error
        run(capsys, "train", *TINY, "--data", name, "--out", f"run-{name}")
        config = load_model(tmp_path / f"run-{name}" / "model.safetensors")[1]
        assert (config.image_shape, config.channels) == (arrays[0].shape[1:3], 3 if name == "colour" else 1)
        assert config.patch_shape == patch
        assert "data set: " in run(capsys, "evaluate", f"run-{name}")
        assert os.listdir(tmp_path / name) == ["mnist.npz"]


def test_the_validation_images_of_a_data_set_are_for_validation(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    arrays = [*digits[:2], digits[0][:70], digits[1][:70], *digits[2:]]
    publishers.write_pictures(tmp_path / "data", arrays, splits=("train", "val", "test"))
    text = run(capsys, "train", *TINY, "--data", "data", "--out", "run")
    assert "data: 300 training, 70 validation and 60 test images" in text
    text = run(capsys, "train", *TINY, "--data", "data", "--validation", "10", "--out", "other")
    assert "data: 360 training, 10 validation and 60 test images" in text


def test_evaluation_on_classes_of_other_names_has_a_note(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    publishers.write_mnist(tmp_path / "fashion", digits)
    run(capsys, "train", *TINY, "--train-limit", "200", "--test-limit", "50", "--out", "run")
    assert main(["evaluate", "run"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["evaluate", "run", "--data", "fashion"]) == 0
    text = "note: class 0 is '0' in the model and 'T-shirt/top' in the data, so the accuracy may mean nothing\n"
    assert capsys.readouterr().err == text


def test_evaluation_of_a_model_without_names_has_no_note(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    publishers.write_mnist(tmp_path / "data", digits)
    publishers.write_mnist(tmp_path / "fashion", digits)
    run(capsys, "train", *TINY, "--data", "data", "--out", "run")
    assert load_model(tmp_path / "run" / "model.safetensors")[1].class_names is None
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    for model in ("run", "copy.safetensors"):
        assert main(["evaluate", model, "--data", "fashion"]) == 0
        assert capsys.readouterr().err == ""


def test_evaluation_without_metrics_takes_the_data_from_the_checkpoint(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    publishers.write_keras(tmp_path / "data", digits)
    run(capsys, "train", *TINY, "--data", "data", "--test-limit", "40", "--out", "run")
    metrics = tmp_path / "run" / "metrics.json"
    before = json.loads(metrics.read_text())
    metrics.unlink()
    for _ in range(2):  # the second time, the metrics of the first name the data
        text = run(capsys, "evaluate", "run")
        assert f"loss {before['test_loss']:.4f}, 40 images" in text
        after = json.loads(metrics.read_text())
        assert after["origin"]["data_dir"] == before["origin"]["data_dir"]
        assert after["test_loss"] == pytest.approx(before["test_loss"])
    metrics.unlink()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"damaged")
    text = "error: run: neither metrics.json nor checkpoint.safetensors names the data of this run: give --data\n"
    assert error_of(capsys, "evaluate", "run") == text
    run(capsys, "evaluate", "run", "--data", "data")


def test_a_picture_that_cannot_be_drawn_leaves_all_results(tmp_path, monkeypatch, capsys, digits):
    def fail(*args, **kwargs):
        raise RuntimeError("no font")

    monkeypatch.chdir(tmp_path)
    publishers.write_keras(tmp_path / "data", digits)
    for name in ("confusion_matrix", "misclassified", "training_curves", "augmentation_sheet"):
        monkeypatch.setattr(f"tinyvit.plots.{name}", fail)
    run(capsys, "train", *TINY, "--data", "data", "--rotation", "5", "--out", "run")
    tables = {"classification_report.txt", "history.csv", "metrics.json", "model.safetensors"}
    assert tables <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "run").glob("*.png"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    # A file error ends the command, but only after all numbers are written.
    monkeypatch.setattr("tinyvit.plots.confusion_matrix", lambda **arguments: os.stat(tmp_path / "missing"))
    assert main(["evaluate", "run", "--data", "data", "--out", "again"]) == 2
    assert sorted(os.listdir(tmp_path / "again")) == ["classification_report.txt", "metrics.json"]


def test_evaluation_of_names_with_dollars(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    names = ["$\\badcommand$", "x$y", "cost $5 to $10", *"3456789"]
    config = ViTConfig(width=16, depth=1, heads=2, mlp_width=24, class_names=names)
    save_model(tmp_path / "model.safetensors", initialise(config), config)
    publishers.write_mnist(tmp_path / "data", digits)
    assert main(["evaluate", "model.safetensors", "--data", "data"]) == 0
    assert "could not be drawn" not in capsys.readouterr().err
    files = os.listdir(tmp_path / "model-evaluation" / "on-data")
    assert {"confusion_matrix.png", "misclassified.png"} <= set(files)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_submission_to_kaggle(tmp_path, monkeypatch, capsys, digits, labelled):
    monkeypatch.chdir(tmp_path)
    publishers.write_kaggle(tmp_path, digits)
    if labelled:
        publishers.write_table(tmp_path / "test.csv", *digits[2:])
    assert run(capsys, "predict", "test.csv", "--csv", "submission.csv") == "60 classes: submission.csv\n"
    head, *rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert head == "ImageId,Label"
    expected = tinyvit.load_pretrained().predict(digits[2])
    assert rows == [f"{number},{label}" for number, label in enumerate(expected, 1)]
    assert (expected == digits[3]).mean() > 0.95


def test_conversions_of_a_csv_file_to_classify_are_printed(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emnist-digits").mkdir()
    expected = tinyvit.load_pretrained().predict(digits[2])
    for name, labels in (("emnist-digits-test.csv", digits[3]), ("emnist-digits/test.csv", None)):
        publishers.write_table(tmp_path / name, digits[2].swapaxes(1, 2) / 255, labels)
        kind = f"EMNIST digits{' by its name' * (labels is None)}, transposed back"
        text = f"data: {kind}, pixels 0 to 1 became 0 to 255, judged by this file only\n60 classes: out.csv\n"
        assert run(capsys, "predict", name, "--csv", "out.csv") == text
        _, *rows = (tmp_path / "out.csv").read_text().splitlines()
        assert rows == [f"{number},{label}" for number, label in enumerate(expected, 1)]


def test_names_of_classes_are_quoted_in_the_submission(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    publishers.write_table(tmp_path / "train.csv", *digits[:2], names=['a,"b"', *"cdefghijk"])
    run(capsys, "train", *TINY, "--data", "train.csv", "--out", "run")
    model = tmp_path / "run" / "model.safetensors"
    monkeypatch.setattr(tinyvit.VisionTransformer, "predict", lambda self, images: np.zeros(len(images), int))
    run(capsys, "predict", "train.csv", "--model", str(model), "--csv", "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ImageId", "Label"]
    assert rows[1:] == [[str(number), 'a,"b"'] for number in range(1, 301)]


def test_what_cannot_be_classified_is_said_in_one_line(tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    publishers.write_kaggle(tmp_path, digits)
    publishers.write_table(tmp_path / "small.csv", digits[0][:, :20, :20])
    for arguments, expected in (
        (["test.csv", "train.csv", "--csv", "out.csv"], "--csv classifies one CSV file"),
        (["test.csv", "--csv", "test.csv"], "--csv test.csv would overwrite the images: give another file"),
        (["test.csv", "--csv", "nowhere/out.csv"], "nowhere is not a folder"),
        (["test.csv", "--csv", "out.csv", "--explain", "a.png"], "leave out other files and --explain"),
        (["sample_submission.csv", "--csv", "out.csv"], 'expected a column "label" and one column per pixel'),
        (["nowhere.csv", "--csv", "out.csv"], "nowhere.csv: expected one intact file, found No such file"),
        (["small.csv", "--csv", "out.csv"], "the model expects images of 28 x 28 pixels, found 20 x 20"),
    ):
        assert expected in error_of(capsys, "predict", *arguments)
    assert not (tmp_path / "out.csv").exists()
    assert "to classify the images of a CSV file, give --csv OUT" in error_of(capsys, "predict", "test.csv")
