"""The model in the box is the one that its card describes."""

import hashlib
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import tinyvit
import tinyvit.commands.train
from tinyvit import commands, pretrained
from tinyvit.checkpoint import CheckpointError
from tinyvit.classifier import VisionTransformer, load_pretrained
from tinyvit.data import load_mnist
from tinyvit.evaluate import misclassified
from tinyvit.model import ViTConfig
from tinyvit.pretrained import pretrained_card

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "tinyvit" / "pretrained"
sys.path.insert(0, str(ROOT / "benchmarks"))
publish_weights = importlib.import_module("publish_weights")


@pytest.fixture(scope="module")
def evaluation():
    data = load_mnist()
    return load_pretrained().evaluate(data.test_images, data.test_labels)


def test_all_test_images_are_read_as_the_card_says(evaluation):
    card = pretrained_card()
    assert len(evaluation.labels) == card.test_images == 10_000
    # another processor adds up in another order, which may decide an image that is on the edge
    assert evaluation.accuracy == pytest.approx(card.test_accuracy, abs=1.5e-4)
    assert evaluation.loss == pytest.approx(card.test_loss, abs=1e-4)
    assert len(set(card.misread) ^ set(misclassified(evaluation).tolist())) <= 2


def test_the_model_is_good_enough_to_be_in_the_box(evaluation):
    assert evaluation.accuracy >= 0.995
    assert pretrained_card().epochs == int(re.search(r"--epochs (\d+)", pretrained_card().command)[1])


def test_the_card_knows_the_hard_ones(evaluation):
    card = pretrained_card()
    assert len(card.misread) == round((1 - card.test_accuracy) * card.test_images)
    barely = np.array(card.barely_read)
    assert not set(card.misread) & set(card.barely_read)
    best_two = np.sort(evaluation.probabilities, axis=1)[:, -2:]
    margins = best_two[:, 1] - best_two[:, 0]
    assert margins[barely].max() < np.quantile(margins, 0.01)


def test_it_reads_one_image_and_many():
    model, data = load_pretrained(), load_mnist()
    assert model.config == ViTConfig()  # the technical note's architecture
    assert model.predict(data.test_images[:1]).shape == (1,)
    probabilities = model.predict_proba(data.test_images[:5])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == model.predict(data.test_images[:5])).all()
    assert tinyvit.load_pretrained is load_pretrained


def test_the_card_in_words_is_that_of_the_file():
    weights = (WEIGHTS / pretrained.WEIGHTS).read_bytes()
    assert len(weights) < 4_000_000
    text = (WEIGHTS / "README.md").read_text()
    assert text == publish_weights.card_in_words(pretrained_card(), load_pretrained().config, weights)
    assert hashlib.sha256(weights).hexdigest() in text
    assert f"**{100 * pretrained_card().test_accuracy:.2f} %**" in text


def test_the_command_on_the_card_is_one_that_the_training_takes():
    words = pretrained_card().command.split()
    assert words[:2] == ["python", "examples/train_mnist.py"]
    parser = commands.make_parser("tinyvit train", "")
    commands.train.add_arguments(parser)
    options = parser.parse_args(words[2:])
    assert options.epochs == pretrained_card().epochs


def test_a_missing_or_damaged_file_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.resources, "files", lambda package: tmp_path)
    for load in (load_pretrained, pretrained_card):
        with pytest.raises(CheckpointError, match=r"mnist\.safetensors"):
            load()
    (tmp_path / pretrained.WEIGHTS).write_bytes(b"damaged")
    for load in (load_pretrained, pretrained_card):
        with pytest.raises(CheckpointError, match="not a complete tinyvit file"):
            load()


def test_weights_without_a_card_are_said(tmp_path, monkeypatch):
    load_pretrained().save(tmp_path / pretrained.WEIGHTS)
    monkeypatch.setattr(pretrained.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="has no card"):
        pretrained_card()


def test_it_comes_out_of_a_zip_archive_too(tmp_path):
    archive = tmp_path / "tinyvit.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (ROOT / "tinyvit").rglob("*"):
            if path.suffix in (".py", ".safetensors"):
                file.write(path, path.relative_to(ROOT))
    program = "import tinyvit; print(tinyvit.load_pretrained().parameters.flat.size, tinyvit.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(archive)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("803338 " + str(archive)), done.stderr


# ---- how a run becomes the model in the box ----


def run_metrics(**changes):
    card = pretrained_card()
    training = publish_weights.RECIPES["tuned"].as_dict()
    history = [{"epoch": 1, "validation_accuracy": 0.9}, {"epoch": 2, "validation_accuracy": 0.99}]
    return {
        "device": "cpu", "workers": 2, "seed": 3, "recipe": "tuned", "history": history, "parameters": 803_338,
        "validation_images": 5000, "test_accuracy": card.test_accuracy, "test_loss": 0.1, "test_images": 10_000,
        "versions": {"python": "3", "numpy": "2", "blas": "b", "cpu": "c", "scipy": "s"},
        "origin": {"data_dir": None, "train_limit": None, "test_limit": None}, "training": training, **changes,
    }  # fmt: skip


def test_the_training_command_names_what_differs_from_the_recipe():
    training = {**publish_weights.RECIPES["tuned"].as_dict(), "epochs": 100, "learning_rate": 2e-3, "clip": 0.5}
    training["augmentation"] = {**training["augmentation"], "rotation": 12.0, "shift": 1.5}
    command = publish_weights.training_command(run_metrics(training=training))
    expected = "--epochs 100 --lr 0.002 --clip 0.5 --rotation 12 --shift 1.5 --workers 2"
    assert command == f"python examples/train_mnist.py {expected}"
    note = publish_weights.RECIPES["note"].as_dict()
    command = publish_weights.training_command(run_metrics(recipe="note", training=note))
    assert command == "python examples/train_mnist.py --recipe note --workers 2"


def test_the_card_takes_the_last_epoch_and_the_models_own_mistakes(evaluation):
    card = publish_weights.card_of(run_metrics(), load_pretrained())
    assert (card.epochs, card.validation_accuracy, card.seed) == (2, 0.99, 3)
    assert card.misread == misclassified(evaluation).tolist()
    assert set(card.versions) == {"python", "numpy", "blas", "cpu"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"history": []}, "finished training run"),
        ({"device": "gpu"}, "on the CPU"),
        ({"origin": {"train_limit": 100}}, "all of the MNIST"),
        ({"test_accuracy": 0.5}, "not 0.5"),
    ],
)
def test_a_run_that_is_not_for_the_box_is_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        publish_weights.card_of(run_metrics(**changes), load_pretrained())


def test_publishing_writes_weights_and_card(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    assert publish_weights.main([str(run)]) == 2
    assert "error: " in capsys.readouterr().err
    load_pretrained().save(run / "model.safetensors")
    publish_weights.write_atomically(run / "metrics.json", publish_weights.json.dumps(run_metrics()))
    assert publish_weights.main([str(run), "--out", str(tmp_path / "box")]) == 0
    expected = publish_weights.card_of(run_metrics(), load_pretrained())
    monkeypatch.setattr(pretrained.importlib.resources, "files", lambda package: tmp_path / "box")
    assert pretrained_card() == expected
    trained = VisionTransformer.load(run / "model.safetensors")
    assert (load_pretrained().parameters.flat == trained.parameters.flat).all()
    assert "| seed | 3 |" in (tmp_path / "box" / "README.md").read_text()
