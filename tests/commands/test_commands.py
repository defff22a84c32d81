"""The commands, run as a user runs them: their output, their files, and their messages about errors."""

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
import strict_cupy

import tinyvit
from tinyvit import commands
from tinyvit.checkpoint import load_arrays, load_model, save_arrays
from tinyvit.commands import COMMANDS, main
from tinyvit.commands import evaluate as evaluate_command
from tinyvit.commands import train as train_command
from tinyvit.data import load_mnist, write_idx
from tinyvit.data.augment import Augmentation
from tinyvit.files import locked_folder
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig
from tinyvit.training import CHECKPOINT, Training, TrainingConfig, read_checkpoint
from tinyvit.training.progress import epoch_line
from tinyvit.training.step import PlainStep

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
TINYVIT = [sys.executable, "-m", "tinyvit"]
TRAIN, EVALUATE = [*TINYVIT, "train"], [*TINYVIT, "evaluate"]
TINY = "--width 16 --depth 2 --heads 2 --mlp-width 24 --train-limit 600 --test-limit 200 --workers 2".split()  # noqa: SIM905
FILES = {
    "augmentation.png",
    "checkpoint.safetensors",
    "classification_report.txt",
    "confusion_matrix.png",
    "history.csv",
    "metrics.json",
    "misclassified.png",
    "model.safetensors",
    "training_curves.png",
}


def run(command, cwd, expect=0):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def train(cwd, *arguments, expect=0):
    return run([*TRAIN, *TINY, *map(str, arguments)], cwd, expect)


def error_of(done):
    err = done.err if hasattr(done, "err") else done.stderr
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole tiny run of three epochs, in the folder where it was started."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder, "--epochs", 3, "--out", "run")
    return folder / "run", done


def test_a_run_leaves_everything(whole):
    folder, _done = whole
    assert set(os.listdir(folder)) == FILES
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["test_accuracy"] <= 1
    assert metrics["test_loss"] > 0
    assert metrics["seconds"] > 0
    assert metrics["images_per_second"] == pytest.approx(3 * 550 / metrics["seconds"])
    assert metrics["parameters"] == load_model(folder / "model.safetensors")[0].flat.size
    assert (metrics["device"], metrics["seed"], metrics["recipe"]) == ("cpu", 0, "tuned")
    assert metrics["versions"]["numpy"] == np.__version__
    assert (metrics["train_images"], metrics["validation_images"], metrics["test_images"]) == (550, 50, 200)
    assert metrics["model"]["width"] == 16
    assert metrics["training"]["epochs"] == 3
    assert [record["epoch"] for record in metrics["history"]] == [1, 2, 3]
    with open(folder / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert "f1-score" in (folder / "classification_report.txt").read_text()


def test_without_a_terminal_there_is_a_line_an_epoch_and_no_bar(whole):
    _, done = whole
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert lines[1] == "data set: MNIST, 10 classes 0 to 9"
    assert [line[:10] for line in lines[5:8]] == ["epoch  1/3", "epoch  2/3", "epoch  3/3"]
    assert max(map(len, lines)) <= 80
    assert done.stderr == ""


def test_with_a_terminal_there_is_a_bar(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 150, 0, 0))  # rows and columns of a real one
    process = subprocess.Popen(
        [*TRAIN, *TINY, "--epochs", "2", "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how a terminal says that its other end is closed
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"images/s" in shown
    assert b"100%" in shown
    assert out.count(b"epoch") == 2 + out.count(b"epochs")


def test_evaluating_again_gives_the_same_files(whole, tmp_path):
    folder, _ = whole
    done = run([*EVALUATE, str(folder), "--out", str(tmp_path / "again")], tmp_path)
    assert "test accuracy" in done.stdout
    for name in ("classification_report.txt", "confusion_matrix.png", "misclassified.png"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    before = json.loads((folder / "metrics.json").read_text())
    assert (again["test_accuracy"], again["test_loss"]) == (before["test_accuracy"], before["test_loss"])


def test_stopped_after_two_epochs_and_resumed_gives_the_same_model(whole, tmp_path):
    done = train(tmp_path, "--epochs", 3, "--out", "run", "--stop-after", 2)
    assert "to continue: tinyvit train --resume run" in done.stdout
    assert not (tmp_path / "run" / "metrics.json").exists()
    run([*TRAIN, "--resume", "run"], tmp_path)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


EAGER = [  # the same command, but with a checkpoint after every step
    sys.executable,
    "-c",
    "import sys; from tinyvit import commands; from tinyvit.training import loop; loop.CHECKPOINT_SECONDS = 0; "
    "sys.exit(commands.main())",
    "train",
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_again_and_again_and_resumed_gives_the_same_model(whole, tmp_path, number):
    """Each time it is killed as soon as it has got a few images further, in the middle of an epoch."""
    checkpoint = tmp_path / "run" / CHECKPOINT
    arguments = [*TINY, "--epochs", "3", "--out", "run"]
    kills, in_the_middle, reached = 0, 0, (-1, 0)
    while kills < 4:
        process = subprocess.Popen(
            [*EAGER, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if checkpoint.exists() and position(tmp_path / "run") > reached:
                break
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
        if number != signal.SIGKILL:
            assert b"nothing is lost; to continue: tinyvit train --resume run" in err
        kills += 1
        reached = position(tmp_path / "run")
        in_the_middle += reached[1] > 0
        arguments = ["--resume", "run"]
    assert in_the_middle > 0
    run([*TRAIN, "--resume", "run"], tmp_path)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    assert set(os.listdir(tmp_path / "run")) == FILES


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_run_with_one_clear_error_and_the_run_goes_on(whole, tmp_path):
    checkpoint = tmp_path / "run" / CHECKPOINT
    process = subprocess.Popen(
        [*EAGER, *TINY, "--epochs", "3", "--out", "run"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (checkpoint.exists() and position(tmp_path / "run") > (0, 0)) and time.monotonic() < deadline:
        time.sleep(0.01)
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    workers = []
    for thread in threads:
        with contextlib.suppress(OSError):  # a thread that has just ended
            workers += map(int, (thread / "children").read_text().split())
    (worker,) = workers
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"Traceback" not in err
    assert b"error: worker 2 of 2 was killed by signal 9" in err
    assert b"to continue from the last checkpoint: tinyvit train --resume run" in err
    run([*TRAIN, "--resume", "run"], tmp_path)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def position(folder):
    _, info = read_checkpoint(folder)
    return info["epoch"], info["place"]


def test_going_on_in_another_way_is_said(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    done = run([*TRAIN, "--resume", "run", "--epochs", "4", "--workers", "1"], tmp_path)
    assert "note: the run continues with --workers 1, not 2 as before:\n" in done.stderr
    assert "begin with\n--epochs 4 --stop-after N" in done.stderr


def test_another_data_set_is_evaluated_in_a_folder_of_its_own(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    write_data_set(tmp_path / "other", "-idx{}-ubyte")
    run([*EVALUATE, "run", "--data-dir", "other"], tmp_path)
    before = (whole[0] / "metrics.json").read_bytes()
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    metrics = json.loads((tmp_path / "run" / "on-other" / "metrics.json").read_text())
    assert (metrics["test_images"], metrics["test_data"]) == (40, str(tmp_path / "other"))
    assert "seconds" not in metrics  # which were spent on another data set


def test_a_smaller_test_does_not_replace_the_whole_one(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    run([*EVALUATE, "run", "--test-limit", "50"], tmp_path)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (whole[0] / "metrics.json").read_bytes()
    metrics = json.loads((tmp_path / "run" / "on-MNIST-first-50" / "metrics.json").read_text())
    assert metrics["test_images"] == 50


def test_a_finished_run_is_left_as_it_is(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    done = run([*TRAIN, "--resume", "run", "--workers", "1"], tmp_path)
    assert done.stdout == (
        "all 3 epochs in run are done\nto test the model again: tinyvit evaluate run\n"
        "to train longer: tinyvit train --resume run --epochs 6\n"
    )
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (whole[0] / "metrics.json").read_bytes()


def test_a_finished_run_can_be_resumed_for_its_results(whole, tmp_path):
    train(tmp_path, "--epochs", 1, "--out", "run")
    (tmp_path / "run" / "metrics.json").unlink()
    run([*TRAIN, "--resume", "run"], tmp_path)
    assert set(os.listdir(tmp_path / "run")) == FILES


def test_two_runs_in_one_folder_are_one_run_and_one_error(whole, tmp_path):
    """Whichever starts first trains, and the other names it."""
    command = [*TRAIN, *TINY, "--epochs", "3", "--out", "run"]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2]
    first, second = sorted(range(2), key=lambda i: runs[i].returncode)
    process = runs[first].pid
    assert re.match(
        rf"error: run: another run uses this folder \(process {process} on .* since .*\): wait for its end, or give "
        "another folder\n$|error: --out run: this folder contains a run: ",
        errors[second],
    ), errors[second]
    assert set(os.listdir(tmp_path / "run")) == FILES
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_a_run_in_use_is_neither_resumed_nor_replaced_but_evaluated(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole[0], "run")
    with locked_folder("run"), ThreadPoolExecutor(1) as pool:
        for arguments in (["--resume", "run", "--epochs", "5"], ["--resume", "run"], ["--out", "run"]):
            assert pool.submit(main, ["train", *arguments]).result() == 2
            assert "error: run: another run uses this folder (process " in error_of(capsys.readouterr())
        assert pool.submit(main, ["evaluate", "run", "--test-limit", "20"]).result() == 0
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "misclassified.png", "history.csv", "metrics.json"])
def test_a_result_that_cannot_be_written_is_named_and_the_run_continues_there(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    replace = os.replace

    def fail(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        text = error_within(capsys, "train", *TINY, "--epochs", "1", "--workers", "1", "--out", "my run")
    expected = f"my run/{name}: No space left on device; to continue from the last checkpoint: "
    assert text == f"error: {expected}tinyvit train --resume 'my run'\n"
    assert {entry for entry in os.listdir("my run") if entry.startswith(".")} == set()
    assert main(["train", "--resume", "my run"]) == 0
    assert set(os.listdir("my run")) == FILES


def test_a_run_from_python_is_continued_by_the_command(tmp_path, monkeypatch):
    """Its checkpoint names no recipe."""
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "data", "-idx{}-ubyte")
    data = load_mnist("data")
    model = ViTConfig(width=16, depth=1, heads=2, mlp_width=24)
    config = TrainingConfig(epochs=2, validation=10)
    training = Training(model, config, data.train_images, data.train_labels, get_backend("cpu"), workers=1)
    training.run("run", stop_after=1)
    assert main(["train", "--resume", "run", "--data", "data"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["recipe"] is None


def write_data_set(folder, form, size=28, count=120):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, n in (("train", count), ("t10k", 40)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        images = (rng.integers(0, 60, (n, size, size)) + 15 * labels[:, None, None]).astype(np.uint8)
        write_idx(folder / f"{split}-images{form.format(3)}", images)
        write_idx(folder / f"{split}-labels{form.format(1)}", labels)


@pytest.mark.parametrize("form", ["-idx{}-ubyte", ".idx{}-ubyte", "-idx{}-ubyte.gz", ".idx{}-ubyte.gz"])
def test_any_data_set_of_the_usual_four_files_trains(tmp_path, form):
    write_data_set(tmp_path / "data", form)
    done = train(tmp_path, "--epochs", 1, "--data-dir", "data", "--out", "run")
    assert "110 training, 10 validation and 40 test images" in done.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["origin"]["data_dir"] == str(tmp_path / "data")


def test_images_of_another_size_train(tmp_path):
    write_data_set(tmp_path / "data", "-idx{}-ubyte", size=20)
    train(tmp_path, "--epochs", 1, "--data-dir", "data", "--out", "run", "--patch-size", 5)
    assert load_model(tmp_path / "run" / "model.safetensors")[1].image_size == 20
    run([*EVALUATE, "run"], tmp_path)


def test_the_default_folder_is_never_one_that_is_taken(tmp_path):
    for _ in range(3):
        train(tmp_path, "--epochs", 1, "--recipe", "note", "--seed", 4)
    assert sorted(os.listdir(tmp_path / "runs")) == ["note-seed4", "note-seed4-2", "note-seed4-3"]


def error_within(capsys, *arguments, expect=2):
    """Return the line that a command prints about an error; it runs in this process, which is faster."""
    assert main([str(argument) for argument in arguments]) == expect
    return error_of(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--device gpu", "device 'gpu' needs CuPy"),
        ("--patch-size 5", "--patch-size must divide image_size: 5 does not divide 28"),
        ("--heads 3", "heads must divide width: 3 does not divide 16"),
        ("--lr -1", "--lr (usually below 0.1) must be a number above 0 to below 10, not -1.0: the recipes have"),
        ("--lr nan", "--lr (usually below 0.1) must be a number above 0 to below 10, not nan: the recipes have 0.00"),
        ("--epochs 0", "epochs must be an integer from 1 to below 4,294,967,296, not 0"),
        ("--workers 0", "--workers must be from 1 to 1,024, not 0"),
        ("--workers 100000", "--workers must be from 1 to 1,024, not 100000"),
        ("--rotation 200", "--rotation must be a number from 0 to 180, not 200.0"),
        ("--train-limit 0", "--train-limit must be at least 1, not 0"),
        ("--classes 5", "train-labels-idx1-ubyte.gz: expected labels from 0 to 4, found"),
        ("--classes 0", "from 1 to 100,000, not 0"),
        ("--validation 600", "validation must be below the number of images, 600, not 600"),
        ("--stop-after 0", "--stop-after must be at least 1, not 0"),
        ("--data-dir nowhere", "nowhere: expected a folder or a file with a data set, found no such file or folder"),
        ("--data-dir cut", "train-images-idx3-ubyte: expected 94080 bytes of elements for shape (120, 28, 28)"),
        ("--out whole", "--out whole: this folder contains a run: test it with tinyvit evaluate whole, or give"),
        ("--out begun", "--out begun: this folder contains a run: continue it with --resume begun, or give another"),
        ("--out model.safetensors", "--out model.safetensors: expected a folder for the results: leave out the file"),
        ("--out link", "--out link: cannot create this folder (link is a link to nowhere, which is missing): "),
        ("--out link/run", "--out link/run: cannot create this folder (link is a link to nowhere, which is missing"),
        ("--data link", "found a link to nowhere, which is missing"),
        ("--out file", "--out file: cannot create this folder (file is a file): give another folder"),
        ("--out file/run", "--out file/run: cannot create this folder (file is a file): give another folder"),
        ("--recipe note", "--out runs: cannot create this folder (runs is a file): give another folder"),
        ("--out /proc/run", "--out /proc/run: cannot create this folder (No such file or directory): "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(whole, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "cut", "-idx{}-ubyte")
    broken = tmp_path / "cut" / "train-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:-100])
    (tmp_path / "whole").symlink_to(whole[0])
    (tmp_path / "begun").mkdir()
    shutil.copy(whole[0] / CHECKPOINT, tmp_path / "begun")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "runs").touch()
    monkeypatch.setattr("tinyvit.gpu.diagnosis.PACKAGES", ())  # as if it were not installed, even where it is
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert expected in error_within(capsys, "train", *TINY, *arguments.split())
    assert not (tmp_path / "runs").is_dir()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--resume nowhere", "--resume nowhere: there is no such folder: give the folder of a run"),
        ("--resume .", "--resume .: this folder has no checkpoint.safetensors: give the folder of a run"),
        ("--resume whole --lr 0.5", "--resume keeps --lr at 0.0015, so that it cannot be 0.5: leave it out"),
        ("--resume whole --out x", "leave out --out"),
        ("--resume whole --epochs 2", "epochs must be at least 3, the number of epochs begun, not 2"),
    ],
)
def test_what_is_wrong_with_going_on_is_said_in_one_line(whole, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").symlink_to(whole[0])
    assert expected in error_within(capsys, "train", *arguments.split())


def test_too_little_memory_is_said_in_one_line(monkeypatch, capsys):
    def refuse(*arguments):
        raise MemoryError

    monkeypatch.setattr(train_command, "load_data", refuse)
    assert "not enough memory: try a smaller model or batch" in error_within(capsys, "train", expect=1)


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU, which `--device gpu` gets, until the test ends."""
    monkeypatch.setattr("tinyvit.gpu.diagnosis.PACKAGES", ())
    for name, module in strict_cupy.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupy", fake_cuda.make())


ON_GPU = ["--device", "gpu", "--kernels", "off"]
OUT_OF_MEMORY = [
    fake_cuda.OutOfMemoryError(),
    fake_cuda.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"),
    fake_cuda.CUBLASError("CUBLAS_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_gpu_without_memory_suggests_half_the_batch(gpu, tmp_path, monkeypatch, capsys, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PlainStep, "__call__", fake_cuda.raising(error))
    for size, expected in ((None, "--batch-size 32 in place of 64"), (24, "--batch-size 12 in place of 24")):
        flags = [] if size is None else ["--batch-size", size]
        text = error_within(capsys, "train", *TINY, *ON_GPU, *flags, expect=1)
        assert "error: not enough memory: try a smaller model or batch, such as " + expected in text
        assert type(error).__name__ in text
    text = error_within(capsys, "train", *TINY, *ON_GPU, "--batch-size", 1, expect=1)
    assert "try a smaller model or batch (" in text  # a batch of none is no advice
    text = error_within(capsys, "train", *ON_GPU, "--resume", tmp_path / "runs" / "tuned-seed0-2", expect=1)
    assert "--batch-size 12 in place of 24, in a new run, because --resume keeps both (" in text


def test_other_errors_of_a_gpu_are_not_taken_for_want_of_memory(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = fake_cuda.CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
    monkeypatch.setattr(PlainStep, "__call__", fake_cuda.raising(error))
    with pytest.raises(fake_cuda.CUDARuntimeError):
        main(["train", *TINY, *ON_GPU])


@pytest.mark.parametrize("error", [MemoryError(), *OUT_OF_MEMORY])
def test_an_evaluation_without_memory_is_said_in_one_line(whole, monkeypatch, capsys, error):
    monkeypatch.setattr(evaluate_command, "write_evaluation", fake_cuda.raising(error))
    expected = f"not enough memory: try fewer --workers, or --device cpu ({type(error).__name__}"
    assert expected in error_within(capsys, "evaluate", whole[0], "--device", "cpu", expect=1)


def test_what_is_wrong_with_an_evaluation_is_said_in_one_line(whole, tmp_path, capsys):
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / CHECKPOINT).touch()
    (tmp_path / "page").write_text("<html>")
    for arguments, expected in {
        (tmp_path / "nowhere",): "nowhere: no such file or folder: give a model file, or the folder",
        (tmp_path,): "this folder has no model.safetensors: give a model file, or the folder of a finished run",
        (tmp_path / "my run",): "its run has not ended: continue it with tinyvit train --resume '",
        (whole[0] / CHECKPOINT,): f"the checkpoint of a run, not a model: load {whole[0] / 'model.safetensors'}",
        (tmp_path / "page",): "page: not a complete tinyvit file, but an HTML page, so the download failed: down",
        ("/dev/zero",): "/dev/zero: this is a device or a pipe: give a file",
        (whole[0], "--test-limit", "-5"): "--test-limit must be at least 1, not -5",
        (whole[0], "--workers", "0"): "--workers must be from 1 to 1,024, not 0",
    }.items():
        assert expected in error_within(capsys, "evaluate", *arguments)
    write_data_set(tmp_path / "small", "-idx{}-ubyte", size=20)
    expected = "small: the model expects images of 28 x 28 pixels, found 20 x 20"
    assert expected in error_within(capsys, "evaluate", whole[0], "--data-dir", tmp_path / "small")
    shutil.copytree(whole[0], tmp_path / "bad")
    for text in ("[]", "{", '{"origin": null}'):
        (tmp_path / "bad" / "metrics.json").write_text(text)
        assert "metrics.json: not" in error_within(capsys, "evaluate", tmp_path / "bad")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    done = train(tmp_path, "--lr", 9, "--clip", 0, "--depth", 8, "--weight-decay", 9, "--epochs", 60, "--out", "run",
                 "--schedule", "constant", expect=1)  # fmt: skip
    assert done.returncode == 1
    note, error = done.stderr.splitlines()
    assert note.startswith("note: the model has not learned in 1 epoch: its loss is ")
    assert error.startswith("error: ")
    assert "became" in error
    assert "the last good checkpoint is run" in error


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_fits_eighty_columns(monkeypatch, capsys, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: tinyvit {' '.join(arguments)}".rstrip())
    assert max(map(len, lines)) <= 80


def test_alone_it_lists_the_commands():
    alone, asked = run(TINYVIT, ROOT).stdout, run([*TINYVIT, "--help"], ROOT).stdout
    assert alone == asked
    for name, text in COMMANDS.items():
        assert f"  {name:<10}{text}\n" in alone
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)


def test_help_imports_no_command():
    program = "import sys; from tinyvit.commands import main; main([]); print(sorted(sys.modules))"
    out = run([sys.executable, "-c", program], ROOT).stdout
    assert "'tinyvit.commands'" in out
    for name in (*(f"tinyvit.commands.{name}" for name in COMMANDS), "matplotlib.figure", "sklearn", "fastapi"):
        assert f"'{name}'" not in out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["nurse"])
    assert caught.value.code == 2
    assert "invalid choice: 'nurse'" in capsys.readouterr().err


def test_what_an_option_cannot_mean_is_said(capsys):
    for arguments, expected in {
        ("train", "--epochs", "1.5"): "argument --epochs: expected an integer, not '1.5'",
        ("train", "--lr", "fast"): "argument --lr: expected a number, not 'fast'",
        ("train", "--out", ""): "argument --out: expected a path, not an empty text",
        ("train", "--recipe", "best"): "invalid choice: 'best'",
        ("predict", ""): "argument FILE: expected a path, not an empty text",
    }.items():
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err


def test_the_version_is_that_of_the_code_and_says_if_it_is_not_installed(monkeypatch, capsys):
    def absent(name):
        raise commands.importlib.metadata.PackageNotFoundError(name)

    for look_up, note in ((lambda name: "3.2.1", ""), (absent, " (not installed)")):
        monkeypatch.setattr("importlib.metadata.version", look_up)
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"tinyvit {tinyvit.__version__}{note}\n"


def test_a_system_error_names_the_file_and_not_a_number(monkeypatch, capsys):
    error = OSError(28, "No space left on device", "runs/x")
    monkeypatch.setattr(train_command, "get_backend", fake_cuda.raising(error))
    assert error_within(capsys, "train") == "error: runs/x: No space left on device\n"


def test_an_interrupt_ends_any_command_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(train_command, "get_backend", fake_cuda.raising(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train_command, "get_backend", fake_cuda.raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_help_names_every_flag_with_its_default():
    text = run([*TRAIN, "--help"], ROOT).stdout
    for words in ("--resume DIR", "--data PATH, --data-dir PATH", "--recipe {tuned,note}", "set (default: 10)"):
        assert words in text
    assert "None" not in text


def test_every_setting_has_a_flag():
    fixed_by_the_data = {"image_size", "channels", "class_names", "pixel_mean", "pixel_deviation"}
    assert set(train_command.MODEL_SETTINGS) == set(ViTConfig().as_dict()) - fixed_by_the_data - {"epsilon"}
    assert set(train_command.TRAINING_SETTINGS) == set(TrainingConfig().as_dict()) - {"augmentation"}
    assert set(train_command.AUGMENTATION_SETTINGS) == set(vars(Augmentation()))


def test_an_epochs_line_fits_eighty_columns_with_the_largest_numbers():
    worst = {
        "epoch": 1000,
        "train_loss": 9876.54321,
        "train_accuracy": 1.0,
        "validation_loss": 9876.54321,
        "validation_accuracy": 1.0,
        "seconds": 99_999.0,
    }
    training = SimpleNamespace(state=SimpleNamespace(history=[worst]), config=SimpleNamespace(epochs=1000))
    line = epoch_line(training)
    assert line.startswith("epoch 1000/1000  loss 9876.54, 100.00 %  validation 9876.54, 100.00 %")
    assert len(line) <= 80


def test_the_example_script_is_the_command_and_needs_no_installation(tmp_path):
    script = str(ROOT / "examples" / "train_mnist.py")
    isolated = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*isolated, script, *TINY, "--epochs", "1", "--out", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(os.listdir(tmp_path / "run")) == FILES


def test_the_python_example_runs_on_fewer_images(tmp_path, monkeypatch, capsys):
    def quick(images, labels, epochs, **options):
        return train(images[:600], labels[:600], epochs=1, **options)

    train = tinyvit.train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinyvit, "train", quick)
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / "examples" / "train_from_python.py"))
    out = capsys.readouterr().out
    assert "on 10,000 test images: accuracy" in out
    assert out.count("labelled") == 5
    assert (tmp_path / "digits.safetensors").exists()


def test_a_model_file_is_evaluated_in_a_folder_beside_it(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(whole[0] / "model.safetensors", "mine.safetensors")
    assert main(["evaluate", "mine.safetensors", "--test-limit", "20", "--out", "here"]) == 0
    assert json.loads(Path("here/metrics.json").read_text())["test_images"] == 20
    assert main(["evaluate", "mine.safetensors", "--test-limit", "30"]) == 0
    assert (tmp_path / "mine-evaluation" / "on-MNIST-first-30" / "metrics.json").exists()
    shutil.copytree(whole[0], "run")
    assert main(["evaluate", "run/model.safetensors"]) == 0  # as the run's folder itself
    assert json.loads(Path("run/metrics.json").read_text())["test_images"] == 200
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_precision_reaches_the_run_and_its_record(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    class Asked(Exception):
        pass

    def training(*arguments, **options):
        asked.append((options["precision"], options["kernels"]))
        raise Asked

    monkeypatch.setattr(train_command, "Training", training)
    with pytest.raises(Asked):
        main(["train", *TINY, "--device", "gpu", "--precision", "tf32"])
    assert asked == [("tf32", None)]
    monkeypatch.undo()

    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--device", "cpu", "--epochs", "2", "--stop-after", "1"]) == 0
    folder = next((tmp_path / "runs").glob("*/checkpoint.safetensors")).parent
    arrays, info = load_arrays(folder / "checkpoint.safetensors")
    info["origin"]["precision"] = "tf32"
    save_arrays(folder / "checkpoint.safetensors", arrays, info)
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--device", "cpu"]) == 0
    assert "note: the run continues in float32, not in tf32 as before" in capsys.readouterr().err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not {"precision", "kernels"} & {*metrics, *metrics["origin"]}  # they describe a GPU's kernels


def test_a_model_file_beside_a_run_leaves_the_runs_record_alone(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder, _ = whole
    shutil.copytree(run_folder, tmp_path / "r1")
    shutil.copy(run_folder / "model.safetensors", tmp_path / "r1.safetensors")
    shutil.copy(run_folder / "model.safetensors", tmp_path / "bare")
    before = {path.name: path.read_bytes() for path in (tmp_path / "r1").iterdir()}
    for name in ("r1.safetensors", "bare"):
        assert main(["evaluate", name, "--test-limit", "100"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "r1").iterdir()} == before
    assert {"r1-evaluation", "bare-evaluation"} <= set(os.listdir(tmp_path))
