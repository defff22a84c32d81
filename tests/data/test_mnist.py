"""MNIST as it is embedded, and folders of files in its form: what loads, what is refused, in which words."""

import dataclasses
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyvit.data.mnist as mnist
from tinyvit.data import DataError, DatasetError, IdxError, ImageDataset, load_mnist, write_idx

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@pytest.fixture(scope="module")
def digits():
    return load_mnist()


def small(seed=0, train=20, test=8, side=6, classes=10):
    random = np.random.default_rng(seed)
    parts = {}
    for split, count in (("train", train), ("t10k", test)):
        parts[f"{split}-images-idx3-ubyte"] = random.integers(0, 256, (count, side, side), np.uint8)
        parts[f"{split}-labels-idx1-ubyte"] = random.integers(0, classes, count, np.uint8)
    return parts


def save(folder, parts, dot=False, gz=False):
    folder.mkdir(exist_ok=True)
    for name, array in parts.items():
        name = name.replace("-idx", ".idx") if dot else name
        write_idx(folder / (name + ".gz" if gz else name), array)
    return folder


def refuse(folder, *words, error=DatasetError, **options):
    with pytest.raises(DataError) as info:
        load_mnist(folder, **options)
    assert type(info.value) is error
    message = str(info.value)
    assert "\n" not in message
    for word in ("expected", "found", *words):
        assert word in message, f"{word!r} is not in {message!r}"


# ---- the embedded files ----


def test_known_facts(digits):
    assert digits.train_images.shape == (60000, 28, 28)
    assert digits.test_images.shape == (10000, 28, 28)
    assert digits.train_labels.shape == (60000,)
    assert digits.test_labels.shape == (10000,)
    assert digits.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert digits.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert digits.train_images.sum(dtype=np.int64) == 1_567_298_545
    assert digits.test_images.sum(dtype=np.int64) == 264_923_200
    assert digits.train_images.mean() == pytest.approx(33.3184, abs=1e-4)
    assert (digits.classes, digits.name) == (10, "MNIST")


def test_the_first_image_is_the_right_way_up(digits):
    # The first training digit is a five: its upper stroke runs to the right, its lower bow ends on the left.
    image = digits.train_images[0].astype(float)
    columns = np.arange(28)
    upper, lower = image[5:9].sum(0), image[21:25].sum(0)
    assert upper @ columns / upper.sum() > lower @ columns / lower.sum() + 4
    assert image[:5].sum() == 0
    assert image[25:].sum() == 0


def test_arrays_are_plain_and_the_record_is_frozen(digits):
    for name in ARRAYS:
        array = getattr(digits, name)
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert array.flags.writeable
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.name = "other"


def test_each_call_returns_arrays_of_its_own(digits):
    again = load_mnist()
    for name in ARRAYS:
        assert not np.shares_memory(getattr(again, name), getattr(digits, name))


def test_it_loads_from_any_working_directory(tmp_path):
    # Whether or not tinyvit is installed: only where Python finds the package may matter, not where we stand.
    root = str(Path(mnist.__file__).parents[2])
    code = "import tinyvit.data as d; print(d.load_mnist().test_images.shape)"
    environment = {**os.environ, "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout == "(10000, 28, 28)\n", run.stderr


def test_the_readme_beside_the_files_has_their_checksums():
    text = (Path(mnist.__file__).parent / "mnist" / "README.md").read_text(encoding="utf-8")
    for name, digest in mnist.SHA256.items():
        assert f"{digest}  {name}" in text


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A package whose data folder the test may damage; small files, but the checksums are theirs."""
    folder = save(tmp_path / "mnist", small(), gz=True)
    digests = {path.name: mnist.hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(mnist, "SHA256", digests)
    monkeypatch.setattr("importlib.resources.files", lambda package: {"tinyvit.data": tmp_path}[package])
    return folder


@pytest.mark.parametrize("name", FILES)
def test_an_altered_embedded_file_is_refused(embedded, name):
    assert load_mnist().train_images.shape == (20, 6, 6)
    path = embedded / (name + ".gz")
    data = bytearray(path.read_bytes())
    data[4] ^= 1  # the time in the gzip header, which no check of the contents could see
    path.write_bytes(data)
    refuse(None, str(path), f"SHA-256 {mnist.SHA256[path.name]}", "reinstall")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_embedded_file_is_refused(embedded, name):
    (embedded / (name + ".gz")).unlink()
    refuse(None, name, "reinstall")


# ---- folders ----


@pytest.mark.parametrize("as_type", [str, Path, os.fsencode])
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_a_folder(tmp_path, dot, gz, as_type):
    parts = small(side=9)
    data = load_mnist(as_type(save(tmp_path / "fashion", parts, dot, gz)))
    assert isinstance(data, ImageDataset)
    for name, attribute in zip(FILES, ARRAYS, strict=True):
        np.testing.assert_array_equal(getattr(data, attribute), parts[name], strict=True)
    assert (data.name, data.source, data.classes) == ("fashion", str(tmp_path / "fashion"), 10)


def test_names_may_be_mixed(tmp_path):
    parts = small()
    names = list(parts)
    folder = save(tmp_path / "mixed", {name: parts[name] for name in names[:2]}, gz=True)
    save(folder, {name: parts[name] for name in names[2:]}, dot=True)
    assert load_mnist(folder).test_labels.tolist() == parts[FILES[3]].tolist()


def test_the_order_among_several_names(tmp_path):
    folder = tmp_path / "several"
    for seed, dot, gz in [(4, True, True), (3, True, False), (2, False, True), (1, False, False)]:
        parts = save(folder, small(seed), dot, gz) and small(seed)
        assert load_mnist(folder).train_images.tolist() == parts[FILES[0]].tolist()


def test_a_folder_with_the_name_of_a_file_is_passed_over(tmp_path):
    folder = save(tmp_path / "archive", small(), dot=True)
    for name in FILES:
        (folder / name).mkdir()
    assert len(load_mnist(folder).train_labels) == 20


def test_other_numbers_of_classes(tmp_path):
    parts = small(classes=2)
    parts[FILES[1]][:] = 1
    folder = save(tmp_path / "two", parts)
    assert load_mnist(folder, classes=2).classes == 2
    refuse(folder, FILES[1], "labels from 0 to 0", "1 at position 0", classes=1)
    parts[FILES[3]][3] = 255
    assert load_mnist(save(folder, parts), classes=256).test_labels[3] == 255
    assert load_mnist(folder, classes=1000).classes == 1000


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file(tmp_path, missing):
    folder = save(tmp_path / "part", small())
    (folder / missing).unlink()
    dotted = missing.replace("-idx", ".idx")
    refuse(folder, str(folder), f"{missing}, {missing}.gz, {dotted}, {dotted}.gz")


def test_no_such_folder(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "a folder")
    (tmp_path / "file").write_bytes(b"")
    refuse(tmp_path / "file", str(tmp_path / "file"), "a folder")


def with_part(name, array):
    parts = small()
    parts[name] = array
    return parts


zeros = np.zeros
REFUSED = {
    "train labels too few": (FILES[1], zeros(19, "u1"), ["20 labels", "found 19", FILES[0]]),
    "train labels too many": (FILES[1], zeros(21, "u1"), ["20 labels", "found 21", FILES[0]]),
    "test labels too few": (FILES[3], zeros(7, "u1"), ["8 labels", "found 7", FILES[2]]),
    "no train images": (FILES[0], zeros((0, 6, 6), "u1"), ["at least one image", "(0, 6, 6)"]),
    "no test images": (FILES[2], zeros((0, 6, 6), "u1"), ["at least one image", "(0, 6, 6)"]),
    "no pixels": (FILES[0], zeros((20, 0, 0), "u1"), ["at least one pixel", "(20, 0, 0)"]),
    "not square": (FILES[0], zeros((20, 6, 7), "u1"), ["square", "found 6 x 7 pixels"]),
    "test not square": (FILES[2], zeros((8, 7, 6), "u1"), ["square", "found 7 x 6 pixels"]),
    "sizes differ": (
        FILES[2],
        zeros((8, 5, 5), "u1"),
        ["images of 6 x 6 pixels", FILES[0], "found 5 x 5 pixels"],
    ),
    "labels for images": (FILES[0], zeros(20, "u1"), ["uint8 of rank 3", "found uint8 of rank 1"]),
    "images for labels": (FILES[1], zeros((20, 6, 6), "u1"), ["uint8 of rank 1", "found uint8 of rank 3"]),
    "images for test labels": (
        FILES[3],
        zeros((8, 6, 6), "u1"),
        ["uint8 of rank 1", "found uint8 of rank 3"],
    ),
    "colour": (FILES[2], zeros((8, 6, 6, 3), "u1"), ["uint8 of rank 3", "found uint8 of rank 4"]),
    "images of floats": (FILES[0], zeros((20, 6, 6), "f4"), ["uint8 of rank 3", "found float32 of rank 3"]),
    "labels of integers": (FILES[1], zeros(20, "i4"), ["uint8 of rank 1", "found int32 of rank 1"]),
    "train label 10": (
        FILES[1],
        np.arange(20, dtype="u1"),
        ["labels from 0 to 9", "found 10 at position 10"],
    ),
    "test label 255": (
        FILES[3],
        np.uint8([9] * 6 + [255, 254]),
        ["labels from 0 to 9", "found 255 at position 6"],
    ),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("name", "array", "words"), REFUSED.values(), ids=REFUSED)
def test_arrays_that_make_no_data_set(tmp_path, name, array, words, gz):
    folder = save(tmp_path / "bad", with_part(name, array), gz=gz)
    refuse(folder, str(folder / (name + ".gz" if gz else name)) + ": expected", *words)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_the_format_s_own_error(tmp_path, name):
    folder = save(tmp_path / "bad", small())
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    refuse(folder, str(folder / name), "bytes of elements", error=IdxError)
    (folder / name).write_bytes(gzip.compress(data)[:-4])
    refuse(folder, str(folder / name), "gzip", error=IdxError)
    # A sound file under the first name is not looked for elsewhere: a damaged file is said to be damaged.
    save(folder, small(), dot=True)
    refuse(folder, str(folder / name), "gzip", error=IdxError)
