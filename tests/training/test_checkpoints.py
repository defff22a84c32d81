"""A damaged checkpoint is one quick error, a failing disk loses nothing, and a folder has one run at a time."""

import errno
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import damaged_files as damage
import numpy as np
import pytest

import tinyvit.checkpoint
import tinyvit.training.loop
import tinyvit.training.state
from tinyvit import files
from tinyvit.checkpoint import CheckpointError
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig
from tinyvit.training import CHECKPOINT, TUNED, Training, TrainingStopped, read_checkpoint
from tinyvit.training.state import new_state, save_state

CPU = get_backend("cpu")
FILES = damage.CheckpointFiles
MODEL, SETTINGS, IMAGES, LABELS = damage.MODEL, damage.SETTINGS, damage.IMAGES, damage.LABELS


def training(config=SETTINGS):
    return Training(MODEL, config, IMAGES, LABELS, CPU, workers=1, loops="off")


def resumed(folder, **options):
    return Training.resume(folder, IMAGES, LABELS, CPU, **options)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Checkpoints: in the middle of the second epoch, after the last, without validation, and of a new run."""
    return FILES(tmp_path_factory.mktemp("originals")).originals


# ---- numbers that are out of range, behind a right checksum ----

RECORD = ("history", 0)
WRONG = [
    *[(("workers",), value) for value in (2**31, 1025, 0, -1, True, 2.0, "2", None, math.nan)],
    *[(("epoch",), value) for value in (-1, 2, 4, 2**63, 1.0, True)],
    *[(("place",), value) for value in (-1, 25, 2**63, 1.5, 17)],
    *[(("correct",), value) for value in (-1, 17, 2**63, 0.5)],
    *[(("adam_steps",), value) for value in (-1, 6, 2**63, None)],
    *[(("average_steps",), value) for value in (-1, 6, 2**63, [])],
    *[(("seconds",), value) for value in (-1.0, math.nan, math.inf, 0.5, "1", None)],
    *[(("loss_sum",), value) for value in (-1.0, math.nan, math.inf, "1", {})],
    *[(("data",), value) for value in (-1, 2**32, 1.0)],
    *[(("loops",), value) for value in ("maybe", None, ["on"])],
    *[(("history",), value) for value in ([], [1], [{}], [{}, {}], {}, None)],
    *[((*RECORD, "epoch"), value) for value in (0, 2, None, True, 1.0)],
    *[((*RECORD, "train_loss"), value) for value in (-1.0, math.nan, None, "1")],
    *[((*RECORD, "train_accuracy"), value) for value in (-0.1, 1.1, None)],
    *[((*RECORD, "validation_loss"), value) for value in (-1.0, math.inf, None)],
    *[((*RECORD, "validation_accuracy"), value) for value in (-0.1, 1.1, None)],
    *[((*RECORD, "first_learning_rate"), value) for value in (-0.1, 11, None)],
    *[((*RECORD, "last_learning_rate"), value) for value in (-0.1, 11, "x")],
    *[((*RECORD, "seconds"), value) for value in (-1.0, 1e9, math.nan)],
    *[(("origin",), value) for value in (None, [], "x")],
    *[(("origin", "recipe"), value) for value in (1, [], {})],
    *[(("origin", "data_dir"), value) for value in (1, [], {})],
    *[(("origin", "train_limit"), value) for value in (0, -1, 1.5, "1", True)],
    *[(("origin", "test_limit"), value) for value in (0, -1, 1.5, "1", True)],
    *[(("origin", "precision"), value) for value in ("float8", None, 1)],
    *[(("model", "depth"), value) for value in (0, 1, 3, 100_000, 100_001)],
    *[(("model", name), 100_000) for name in ("image_size", "width", "mlp_width", "classes", "heads")],
    *[(("model",), value) for value in (None, [], "x", {})],
    *[(("training", "batch_size"), value) for value in (0, 2**32, 7, 2**31)],
    *[(("training", "validation"), value) for value in (-1, 30, 31, 2**31)],
    *[(("training", "epochs"), value) for value in (0, 2**32)],
    *[(("training", "average"), value) for value in (0.0, 1.0)],
    *[(("training", "augmentation"), value) for value in (None, [], {}, {"rotation": 500})],
    *[(("training",), value) for value in (None, [], "x", {})],
    *[(("format",), value) for value in (0, 2, None, "1", True, 1.0)],
]
WRONG = [(0, *pair) for pair in WRONG]
WRONG += [
    (1, ("place",), 8),  # the run is finished
    (2, (*RECORD, "validation_loss"), 1.0),  # the run has no validation images
    (2, (*RECORD, "validation_accuracy"), 1.0),
    (3, ("training", "validation"), 30),  # no image is left for training
]
NAMES = [f"{index}-{'.'.join(map(str, entry))}={value!r}"[:60] for index, entry, value in WRONG]


@pytest.mark.parametrize(("index", "entry", "value"), WRONG, ids=NAMES)
def test_a_wrong_entry_is_one_quick_error_that_names_the_file(originals, tmp_path, index, entry, value):
    header, info, data = damage.opened(originals[index])
    *parents, name = entry
    container = info
    for parent in parents:
        container = container[parent]
    container[name] = value
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage.sealed(header, info, data, None))
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1) > damage.LIMIT:
        began = time.process_time()
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: ") as caught:
            resumed(tmp_path)
        seconds.append(time.process_time() - began)
    assert min(seconds) <= damage.LIMIT
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_its_run_is_checked_too(originals, tmp_path):
    header, info, data = damage.opened(originals[0])
    info["data"] = 2**32
    (tmp_path / CHECKPOINT).write_bytes(damage.sealed(header, info, data, None))
    with pytest.raises(CheckpointError, match="data must be an integer from 0 to below 4,294,967,296"):
        read_checkpoint(tmp_path)


def test_each_missing_entry_is_one_error(originals, tmp_path):
    for original in originals:
        _, info, _ = damage.opened(original)
        for number in range(len(damage.places(info))):
            header, changed, data = damage.opened(original)
            container, key = damage.places(changed)[number]
            del container[key]
            (tmp_path / CHECKPOINT).write_bytes(damage.sealed(header, changed, data, None))
            later = ("loops", "first_learning_rate", "last_learning_rate", "channels", "class_names")
            if key in later or container is changed.get("origin"):
                resumed(tmp_path, workers=1)  # version 0.1 had no such entries, and a run in Python has no origin
                continue
            with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
                resumed(tmp_path, workers=1)


def test_the_originals_resume(originals, tmp_path):
    for original in originals:
        (tmp_path / CHECKPOINT).write_bytes(original)
        run = resumed(tmp_path, workers=1)
        run.run(tmp_path)
        assert run.finished
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["parameters", "adam.first_moment", "adam.second_moment", "average"])
def test_values_that_are_not_finite_are_refused_with_the_name_of_the_array(originals, tmp_path, name):
    header, info, data = damage.opened(originals[0])
    start = header[name]["data_offsets"][0]
    data[start : start + 4] = np.float32(np.inf).tobytes()
    (tmp_path / CHECKPOINT).write_bytes(damage.sealed(header, info, data, None))
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT}: {name} contains 1 values that are NaN or infinite"):
        resumed(tmp_path)


def test_a_negative_mean_of_squares_is_refused(originals, tmp_path):
    header, info, data = damage.opened(originals[0])
    start = header["adam.second_moment"]["data_offsets"][0]
    data[start : start + 4] = np.float32(-1e-9).tobytes()
    (tmp_path / CHECKPOINT).write_bytes(damage.sealed(header, info, data, None))
    with pytest.raises(CheckpointError, match="second_moment is a mean of squares, but contains values below 0"):
        resumed(tmp_path)


def test_images_that_the_model_does_not_fit_are_an_error_of_the_checkpoint(originals, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(originals[0])
    with pytest.raises(CheckpointError, match=rf"{CHECKPOINT}: images must have the shape \(B, 8, 8\) with B at"):
        Training.resume(tmp_path, IMAGES[:, :4, :4], LABELS, CPU)


# ---- random damage ----


@pytest.mark.extended
@pytest.mark.parametrize("format_name", damage.SINGLE_FILES)
def test_random_damage_is_refused_or_changes_nothing(tmp_path, format_name):
    found = damage.run_cases(format_name, first=0, count=2000, seed=1, folder=tmp_path)
    assert found["findings"] == []
    assert sum(found["outcomes"].values()) == 2000
    assert found["outcomes"]["refused"] >= 1000
    assert found["outcomes"]["as the file says"] > 0


@pytest.mark.extended
def test_the_benchmark_counts_the_outcomes(tmp_path):
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "damage.py"
    arguments = ["--count", "600", "--first", "7", "--format", "model", "--json", str(tmp_path / "found.json")]
    subprocess.run([sys.executable, str(script), *arguments], check=True, timeout=120)
    (record,) = json.loads((tmp_path / "found.json").read_text())["records"]
    expected = damage.run_cases("model", first=7, count=600, seed=0, folder=tmp_path)
    assert record["outcomes"] == expected["outcomes"]  # in pieces and in other processes, the same cases
    assert (record["format"], record["count"], record["findings"]) == ("model", 600, [])


def test_a_little_random_damage_is_refused_or_changes_nothing(tmp_path):
    for format_name in damage.SINGLE_FILES:
        (tmp_path / format_name).mkdir()
        found = damage.run_cases(format_name, first=0, count=100, seed=2, folder=tmp_path / format_name)
        assert found["findings"] == []


@pytest.mark.parametrize(
    ("module", "function", "replacement", "outcome"),
    [
        (tinyvit.checkpoint, "_checksum", lambda *parts: AnyText(), "WRONG"),
        (tinyvit.training.state, "_check_progress", lambda info, config: None, "crashed"),
        (tinyvit.checkpoint, "_not_finite", lambda arrays: compute(0.11), "slow"),
    ],
)
def test_random_damage_finds_a_missing_check(tmp_path, monkeypatch, module, function, replacement, outcome):
    files = FILES(tmp_path)
    monkeypatch.setattr(damage, "FORMATS", {"checkpoint": lambda folder: files})
    monkeypatch.setattr(module, function, replacement)
    count = 6 if outcome == "slow" else 200
    assert damage.run_cases("checkpoint", first=0, count=count, seed=0, folder=tmp_path)["outcomes"][outcome] > 0


def compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class AnyText:
    """A text that is equal to every other."""

    def __ne__(self, other):
        return False


@pytest.mark.extended
def test_a_damaged_checkpoint_of_the_default_model_is_refused_within_a_tenth_of_a_second(tmp_path):
    config, rng = ViTConfig(), np.random.default_rng(0)
    settings = {"model": config.as_dict(), "training": TUNED.as_dict(), "data": 0, "workers": 1, "loops": "off"}
    save_state(tmp_path, new_state(config, TUNED, CPU), settings, 0)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    assert len(content) > 12e6
    best = []
    for number in range(8):
        header, info, data = damage.opened(content)
        info["model"]["depth" if number else "heads"] = 100_000
        damaged = damage.damage_bytes(rng, content)[1] if number > 1 else damage.sealed(header, info, data, None)
        path.write_bytes(damaged)
        seconds = []
        for _ in range(3):
            began = time.process_time()
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                read_checkpoint(tmp_path)
            seconds.append(time.process_time() - began)
        best.append(min(seconds))
    assert max(best) <= damage.LIMIT


# ---- a disk that fails ----


@pytest.fixture
def disk(monkeypatch):
    """A disk that fails while `disk.error` is set. It counts attempts."""

    class Disk:
        error, attempts = None, 0

    replace = os.replace

    def sometimes(source, target):
        Disk.attempts += 1
        if Disk.error is not None:
            raise Disk.error
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return Disk


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REFUSED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("error", [FULL, REFUSED])
def test_a_checkpoint_in_mid_epoch_that_fails_is_a_note(tmp_path, disk, monkeypatch, caplog, error):
    whole = training()
    whole.run()
    monkeypatch.setattr(tinyvit.training.loop, "CHECKPOINT_SECONDS", 0)
    run = training()

    def on_step(run):
        disk.error = error if run.state.done == 2 else None

    run.run(tmp_path, on_step=on_step)
    np.testing.assert_array_equal(run.state.parameters.flat, whole.state.parameters.flat)
    path = tmp_path / CHECKPOINT
    assert [record.getMessage() for record in caplog.records] == [
        f"note: no checkpoint after step 2 of epoch {epoch}, the next follows in 0 s ({error}: '{path}')"
        for epoch in (1, 2, 3)
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert os.listdir(tmp_path) == [CHECKPOINT]
    assert read_checkpoint(tmp_path)[1]["epoch"] == 3


@pytest.mark.parametrize("error", [FULL, REFUSED])
def test_a_checkpoint_at_the_end_of_an_epoch_that_fails_is_an_error(tmp_path, disk, error):
    run = training()

    def on_step(run):
        disk.error = error if (run.state.epoch, run.state.done) == (1, 3) else None

    with pytest.raises(type(error), match=f"{error.strerror}: .*{CHECKPOINT}"):
        run.run(tmp_path, on_step=on_step)
    disk.error = None
    assert os.listdir(tmp_path) == [CHECKPOINT]  # the lock and the temporary file are gone
    second = resumed(tmp_path)
    assert (second.state.epoch, second.state.done) == (1, 0)
    second.run(tmp_path)
    whole = training()
    whole.run()
    np.testing.assert_array_equal(second.state.parameters.flat, whole.state.parameters.flat)


def test_the_checkpoint_of_a_requested_stop_that_fails_is_an_error(tmp_path, disk):
    """A stop promises that nothing is lost."""

    def on_step(run):
        disk.error, run.stop_requested = FULL, True

    with pytest.raises(OSError, match=f"No space left on device: .*{CHECKPOINT}"):
        training().run(tmp_path, on_step=on_step)


def test_a_full_disk_is_found_before_the_first_step(tmp_path, disk):
    disk.error, run = FULL, training()
    with pytest.raises(OSError, match=f"No space left on device: .*{CHECKPOINT}"):
        run.run(tmp_path)
    assert run.state.adam.steps == 0
    assert os.listdir(tmp_path) == []


# ---- one run in a folder ----


def test_a_folder_has_one_run_at_a_time(tmp_path):
    found = []

    def second():
        run = training()
        try:
            run.run(tmp_path)
        except OSError as error:
            found.append((run.state.adam.steps, str(error)))

    def on_step(run):
        if run.state.adam.steps == 2:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            assert read_checkpoint(tmp_path)[1]["epoch"] == 0  # reading needs no lock

    training().run(tmp_path, on_step=on_step)
    ((steps, text),) = found
    assert steps == 0
    assert re.search(rf"another run uses this folder \(process {os.getpid()} on .*{re.escape(str(tmp_path))}", text)
    assert os.listdir(tmp_path) == [CHECKPOINT]


def test_a_stopped_run_releases_its_folder(tmp_path):
    run = training()
    with pytest.raises(TrainingStopped):
        run.run(tmp_path, on_step=lambda run: setattr(run, "stop_requested", True))
    assert os.listdir(tmp_path) == [CHECKPOINT]
    resumed(tmp_path).run(tmp_path)


KILLED = """
import sys
sys.path[:0] = sys.argv[2:]
import damaged_files as damage
from tinyvit import files
from tinyvit.gpu import get_backend
from tinyvit.training import Training
cpu = get_backend("cpu")
run = Training(damage.MODEL, damage.SETTINGS, damage.IMAGES, damage.LABELS, cpu, workers=1, loops="off")
run.run(sys.argv[1], stop_after=1)
files._rename = lambda *paths: (print("writing", flush=True), sys.stdin.read())
run.run(sys.argv[1])
"""


def test_a_run_that_is_killed_while_it_writes_leaves_nothing_to_the_next(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(damage.__file__)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    assert len(os.listdir(tmp_path)) == 3  # the checkpoint, the lock and an unfinished file
    resumed(tmp_path).run(tmp_path)
    assert os.listdir(tmp_path) == [CHECKPOINT]


# ---- other versions ----


def test_a_checkpoint_without_a_checksum_resumes_with_a_note(tmp_path, caplog):
    training().save(tmp_path)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    header, _, _ = damage.opened(content)
    checksum = f'"checksum": "{header["__metadata__"]["checksum"]}", '.encode()
    path.write_bytes(content.replace(checksum, b" " * len(checksum)))
    resumed(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"note: {path} has no checksum, so that damage could remain unnoticed; to add one, save it again"
    ]
