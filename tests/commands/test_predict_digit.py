"""Reading the digit in a picture by command: what is printed, what is drawn, and what is said when it is wrong."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tinyvit.checkpoint import save_model
from tinyvit.commands import main
from tinyvit.model import ViTConfig, initialise

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
serve = importlib.import_module("serve")


def write(path, digit, ink="black", paper="white", size=(300, 240)):
    picture = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(picture)
    for stroke in serve.drawing(digit):
        draw.line([(30 + 200 * x, 20 + 200 * y) for x, y in stroke], fill=ink, width=12, joint="curve")
    picture.save(path)
    return str(path)


def test_pictures_are_read_and_all_probabilities_printed(tmp_path, capsys):
    files = [write(tmp_path / "a.png", 7), write(tmp_path / "b.jpg", 2, "white", "navy")]
    assert main(["predict", *files]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, *rows = out.splitlines()
    assert re.fullmatch(rf"{re.escape(files[0])}: 7 \(9\d\.\d %\)", first)
    assert out.splitlines()[3].startswith(f"{files[1]}: 2 (")
    shares = [float(share) for share in re.findall(r"(\d+\.\d) %", "".join(rows[:2]))]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares.index(max(shares)) == 7


def test_the_explanation_shows_the_picture_the_input_and_the_rollout(tmp_path, capsys):
    files = [write(tmp_path / f"{name}.png", digit) for name, digit in (("a", 7), ("$x_{2", 2))]
    path = tmp_path / "out.png"
    assert main(["predict", *files, "--explain", str(path)]) == 0
    picture = np.asarray(Image.open(path).convert("RGB"), int)
    assert picture.shape[1] == 900
    assert picture.shape[0] > 500
    colourful = np.abs(picture[..., 0] - picture[..., 2]) > 60
    columns = colourful.mean(axis=0)
    assert columns[: 500].max() < 0.02  # the picture and what the model sees of it are grey
    assert columns[600:800].max() > 0.3  # and where it looks is not
    again = tmp_path / "again.png"
    assert main(["predict", *files, "--explain", str(again)]) == 0
    assert again.read_bytes() == path.read_bytes()


def test_what_cannot_be_read_is_said_and_the_others_are_read(tmp_path, capsys):
    good, blank, text = write(tmp_path / "a.png", 3), tmp_path / "blank.png", tmp_path / "text.png"
    Image.new("L", (50, 50), 255).save(blank)
    text.write_text("no picture")
    files = [good, str(blank), str(text), str(tmp_path / "nowhere.png")]
    assert main(["predict", *files, "--explain", str(tmp_path / "out.png")]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: 3 (")
    errors = err.splitlines()
    assert [error.split(": ")[:2] for error in errors] == [["error", file] for file in files[1:]]
    for error, expected in zip(errors, ["blank", "not a picture", "cannot be read"], strict=True):
        assert expected in error
    assert (tmp_path / "out.png").exists()


def test_nothing_to_read_draws_nothing(tmp_path, capsys):
    assert main(["predict", str(tmp_path / "nowhere.png"), "--explain", str(tmp_path / "out.png")]) == 2
    assert not (tmp_path / "out.png").exists()
    assert capsys.readouterr().out == ""


def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys):
    good = write(tmp_path / "a.png", 3)
    config = ViTConfig(image_size=20, patch_size=5, width=16, depth=1, heads=2, mlp_width=8)
    save_model(tmp_path / "m.safetensors", initialise(config), config)
    (tmp_path / "link").symlink_to("/nowhere/out.png")
    for arguments, expected in {
        ("--model", str(tmp_path / "nowhere")): "nowhere: no such file or folder: give a model file",
        ("--model", str(tmp_path)): "this folder has no model.safetensors: give a model file",
        ("--model", str(tmp_path / "m.safetensors")): "expected a model for 28 x 28 pixels and 10 classes, found 20",
        ("--explain", good): "would overwrite the picture",
        ("--explain", str(tmp_path / "nowhere" / "out.png")): "nowhere is not a folder: create it, or give another",
        ("--explain", str(tmp_path)): "expected a file, found a folder: add a file name",
        ("--explain", "/dev/full"): "/dev/full: expected a file, found a device or a pipe: give another name",
        ("--explain", str(tmp_path / "link")): "cannot write this file (/nowhere is not a folder): give another file",
        ("--explain", "/proc/out.png"): "/proc/out.png: ",
    }.items():
        assert main(["predict", good, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert expected in error
        assert error.count("\n") == 1


def test_an_output_that_is_full_is_named(tmp_path):
    command = [sys.executable, "-m", "tinyvit", "predict", write(tmp_path / "a.png", 5)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("error: standard output: No space left on device\n")


def test_the_command_itself(tmp_path):
    write(tmp_path / "a.png", 5)
    command = [sys.executable, "-m", "tinyvit", "predict", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a.png: 5 (")
