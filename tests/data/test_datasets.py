"""Data sets of many forms, written as their publishers do: what is found, what is converted, and what is refused."""

import bz2
import gzip
import io
import os
import pickle
import re
import shutil
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import damaged_files
import numpy as np
import publishers
import pytest
from PIL import Image

import tinyvit
from tinyvit.data import DataError, DatasetError, IdxError, load_mnist, mnist, write_idx
from tinyvit.data.arrays import hold_out

MB = 2**20
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


@pytest.fixture(scope="module")
def digits():
    """Return four arrays of the first digits of MNIST, in which every class occurs."""
    data = load_mnist()
    return [data.train_images[:200], data.train_labels[:200], data.test_images[:60], data.test_labels[:60]]


@pytest.fixture(scope="module")
def pictures(digits):
    """Return the digits in colour, 32 x 32 pixels."""
    padded = [np.pad(array, ((0, 0), (2, 2), (2, 2))) if array.ndim == 3 else array for array in digits]
    return [np.stack([a, a // 2, 255 - a], axis=-1) if a.ndim == 3 else a for a in padded]


def arrays_of(data):
    return [data.train_images, data.train_labels, data.test_images, data.test_labels]


def assert_equal(data, arrays):
    """Require the same arrays, plain and writable."""
    for found, expected in zip(arrays_of(data), arrays, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        assert found.flags.writeable


def refuse(path, *words, **options):
    """Return the one line with which a path is refused. Each of `words` must be in it."""
    with pytest.raises(DataError) as info:
        tinyvit.load_dataset(path, **options)
    message = str(info.value)
    assert "\n" not in message
    for word in ("expected", "found", *words):
        assert str(word) in message, f"{word!r} is not in {message!r}"
    return message


def save(folder, **arrays):
    """Write an npz file of named arrays and return its path."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def peak_of(call):
    """Return the bytes that a call needed at its worst moment."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- the published forms ----


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", "-.")
def test_idx_files(tmp_path, digits, suffix, separator):
    publishers.write_mnist(tmp_path / "my digits", digits, suffix, separator)
    data = tinyvit.load_dataset(tmp_path / "my digits")
    assert_equal(data, digits)
    assert (data.name, data.source) == ("my digits", str(tmp_path / "my digits"))
    assert (data.classes, data.class_names, data.description) == (10, None, "idx files, 10 classes")


@pytest.mark.parametrize(("split", "names"), [
    ("byclass", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"),
    ("bymerge", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
    ("balanced", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
    ("letters", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ("digits", "0123456789"),
    ("mnist", "0123456789"),
])  # fmt: skip
def test_emnist_is_transposed_back(tmp_path, digits, split, names):
    count = len(names)
    arrays = [array if array.ndim == 3 else np.arange(len(array), dtype=np.uint8)[::-1] % count for array in digits]
    publishers.write_emnist(tmp_path, arrays, split)
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, arrays)
    assert data.class_names == tuple(names)
    assert data.description.startswith(f"EMNIST {split}, transposed back, {count} classes {names[0]} to {names[-1]}")
    assert ("labels 1 to 26 became 0 to 25" in data.description) == (split == "letters")
    assert data.name == f"emnist-{split}"


def test_a_split_of_emnist_is_chosen_by_a_file_or_by_the_beginning_of_the_names(tmp_path, digits):
    for split in ("letters", "digits"):
        publishers.write_emnist(tmp_path, digits, split)
    refuse(tmp_path, "one data set, found 2: give one of", tmp_path / "emnist-digits", tmp_path / "emnist-letters")
    for name in ("", "-train-images-idx3-ubyte.gz", "-test-labels-idx1-ubyte.gz"):
        data = tinyvit.load_dataset(tmp_path / f"emnist-letters{name}")
        assert (data.classes, data.source) == (26, str(tmp_path / "emnist-letters"))
        assert_equal(tinyvit.load_dataset(data.source), arrays_of(data))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_qmnist(tmp_path, digits, suffix):
    publishers.write_qmnist(tmp_path, digits, suffix)
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, digits)
    assert data.description == "QMNIST, 10 classes 0 to 9"


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_of_32_bits(tmp_path, digits, shape):
    publishers.write_mnist(tmp_path, digits, suffix="", prefix="qmnist-", test="test")
    for split, labels in (("train", digits[1]), ("test", digits[3])):
        (tmp_path / f"qmnist-{split}-labels-idx1-ubyte").unlink()
        labels = labels.astype(np.int32).reshape(shape)
        (tmp_path / f"qmnist-{split}-labels-idx{labels.ndim}-int").write_bytes(publishers.idx_bytes(labels))
    assert_equal(tinyvit.load_dataset(tmp_path), digits)


def test_the_folders_of_torchvision(tmp_path, digits):
    publishers.write_mnist(tmp_path / "FashionMNIST" / "raw", digits, suffix="")
    for path in (tmp_path, tmp_path / "FashionMNIST", tmp_path / "FashionMNIST" / "raw"):
        data = tinyvit.load_dataset(path)
        assert_equal(data, digits)
        assert (data.name, data.class_names[9]) == ("FashionMNIST", "Ankle boot")
        assert data.description == "Fashion-MNIST by its name, 10 classes T-shirt/top to Ankle boot"
    publishers.write_emnist(tmp_path / "EMNIST" / "raw", digits, "balanced", suffix="")
    publishers.write_qmnist(tmp_path / "QMNIST" / "raw", digits)
    raws = ("FashionMNIST/raw", "EMNIST/raw/emnist-balanced", "QMNIST/raw/qmnist")
    refuse(tmp_path, "found 3", *(tmp_path / raw for raw in raws))
    assert tinyvit.load_dataset(tmp_path / "QMNIST").description.startswith("QMNIST")


@pytest.mark.parametrize(("folder", "kind"), [
    ("fashion", "Fashion-MNIST by its name"),
    ("Fashion-MNIST", "Fashion-MNIST by its name"),
    ("kmnist", "KMNIST by its name"),
    ("kuzushiji-mnist", "KMNIST by its name"),
    ("mnist", "MNIST by its name"),
    ("fashion shop", "idx files"),
    ("emnist-letters", "idx files"),
])  # fmt: skip
def test_a_folder_s_name_names_the_classes_if_they_fit(tmp_path, digits, folder, kind):
    publishers.write_mnist(tmp_path / folder, digits)
    assert tinyvit.load_dataset(tmp_path / folder).description.split(",")[0] == kind
    publishers.write_mnist(tmp_path / folder, [a if a.ndim == 3 else a // 2 for a in digits])
    data = tinyvit.load_dataset(tmp_path / folder)
    assert (data.classes, data.class_names, data.description) == (5, None, "idx files, 5 classes")


def test_emnist_is_known_by_its_folder_s_name(tmp_path, digits):
    letters = [array if array.ndim == 3 else np.arange(len(array), dtype=np.uint8)[::-1] % 26 for array in digits]
    stored = [array.swapaxes(1, 2) if array.ndim == 3 else array + 1 for array in letters]
    publishers.write_mnist(tmp_path / "emnist-letters", stored)
    data = tinyvit.load_dataset(tmp_path / "emnist-letters")
    assert_equal(data, letters)
    assert data.description.startswith("EMNIST letters by its name, transposed back, 26 classes A to Z")


def test_mnist_is_known_by_its_content(tmp_path):
    source = Path(mnist.__file__).parent / "mnist"
    shutil.copytree(source, tmp_path / "fashion")  # whatever its name
    data = tinyvit.load_dataset(tmp_path / "fashion")
    assert data.description == tinyvit.load_dataset().description == "MNIST, 10 classes 0 to 9"
    assert_equal(data, arrays_of(load_mnist()))


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_itself(tmp_path):
    (tmp_path / "data").symlink_to(FASHION)
    data = tinyvit.load_dataset(tmp_path / "data")
    assert data.description == "Fashion-MNIST, 10 classes T-shirt/top to Ankle boot"
    assert np.bincount(data.test_labels).tolist() == [1000] * 10


def test_keras(tmp_path, digits):
    publishers.write_keras(tmp_path, digits)
    for path in (tmp_path, tmp_path / "mnist.npz"):
        data = tinyvit.load_dataset(path)
        assert_equal(data, digits)
        assert (data.name, data.description) == ("mnist", "MNIST, 10 classes 0 to 9")


def test_kuzushiji(tmp_path, digits):
    publishers.write_kuzushiji(tmp_path, digits)
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, digits)
    assert data.description == "KMNIST, 10 classes o to wo"
    labels = [array if array.ndim == 3 else (np.arange(len(array)) % 49).astype(np.uint8) for array in digits]
    publishers.write_kuzushiji(tmp_path, labels, "k49")
    refuse(tmp_path, "give one of", tmp_path / "k49", tmp_path / "kmnist")
    data = tinyvit.load_dataset(tmp_path / "k49")
    assert data.description == "Kuzushiji-49, 49 classes a to iteration-mark"
    assert len(set(data.class_names)) == 49
    (tmp_path / "k49-test-labels.npz").unlink()
    refuse(tmp_path / "k49", "also a file with the test labels", "k49-test-imgs.npz")


def test_medmnist(tmp_path, pictures):
    publishers.write_medmnist(tmp_path, pictures)
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, pictures)
    assert "its 5 validation images are the last training images" in data.description


def test_cifar(tmp_path, pictures):
    publishers.write_cifar(tmp_path / "10", pictures)
    data = tinyvit.load_dataset(tmp_path / "10")
    assert_equal(data, pictures)
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert data.description == "CIFAR-10, 10 classes airplane to truck"
    assert repr(data) == (
        "ImageDataset(10: 200 images of 32 x 32 x 3 to train on, 60 images of 32 x 32 x 3 to test on, 10 classes)"
    )
    publishers.write_cifar(tmp_path / "100", pictures, kind=100)
    data = tinyvit.load_dataset(tmp_path / "100")
    assert_equal(data, pictures)
    assert data.classes == 100
    assert data.class_names[99] == "fine99"
    (tmp_path / "10" / "data_batch_3.bin").unlink()
    refuse(tmp_path / "10", "data_batch_3.bin")
    (tmp_path / "100" / "test.bin").write_bytes(b"\0" * 3075)
    refuse(tmp_path / "100", "test.bin", "records of 3074 bytes")


def test_digits_of_scikit_learn(tmp_path):
    data = tinyvit.load_dataset("sklearn:digits")
    assert (data.name, data.source, data.classes) == ("digits", "sklearn:digits", 10)
    assert "pixels 0 to 16 became 0 to 255" in data.description
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.shape[1:] == (8, 8)
    assert data.train_images.max() == 255
    counts = np.bincount(data.test_labels)
    assert counts.min() >= 24
    assert counts.max() <= 27


def test_optdigits_of_uci(tmp_path, digits):
    small = [array[:, 2:26:3, 2:26:3] // 16 if array.ndim == 3 else array for array in digits]
    small[0][0, 4, 4] = 16
    publishers.write_optdigits(tmp_path, small)
    data = tinyvit.load_dataset(tmp_path)
    scaled = [np.rint(array * (255 / 16)).astype(np.uint8) if array.ndim == 3 else array for array in small]
    assert_equal(data, scaled)


# ---- CSV ----


def test_kaggle_s_digits(tmp_path, digits):
    publishers.write_kaggle(tmp_path, digits)
    for path in (tmp_path, tmp_path / "train.csv"):
        data = tinyvit.load_dataset(path)
        assert "test.csv has no labels, about one image in seven is for testing" in data.description
        assert data.name == tmp_path.name
        order = np.concatenate([data.train_images, data.test_images]).reshape(200, -1)
        assert sorted(map(bytes, order)) == sorted(map(bytes, digits[0].reshape(200, -1)))
    refuse(tmp_path / "test.csv", 'test.csv: expected a column "label"', "only pixels")
    refuse(tmp_path / "sample_submission.csv", 'a column "label"', "2 columns ImageId, Label")
    (tmp_path / "train.csv").unlink()
    refuse(tmp_path / "test.csv", 'a column "label"', "only pixels", "tinyvit predict FILE --csv OUT")


@pytest.mark.parametrize("header", [None, "pixel{}", "1x{}", "{:04}", "numbers"])
@pytest.mark.parametrize("label_last", [False, True])
def test_csv_files_with_labels(tmp_path, digits, header, label_last):
    names = header and [header.format(i) for i in range(784)]
    names = names and ([*names, "class"] if label_last else ["label", *names])
    names = [*map(str, range(785))] if header == "numbers" else names
    for split, images, labels in (("train", *digits[:2]), ("test", *digits[2:])):
        publishers.write_table(tmp_path / f"my_{split}.csv", images, labels, names, label_last)
    assert_equal(tinyvit.load_dataset(tmp_path), digits)
    assert_equal(tinyvit.load_dataset(tmp_path / "my_train.csv"), digits)


def test_csv_of_emnist_and_sign_language(tmp_path, digits):
    letters = [array.swapaxes(1, 2) if array.ndim == 3 else array + 1 for array in digits]
    for split, images, labels in (("train", *letters[:2]), ("test", *letters[2:])):
        publishers.write_table(tmp_path / f"emnist-letters-{split}.csv", images, labels)
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, digits)
    assert data.description.startswith("EMNIST letters, transposed back, 26 classes A to Z")
    signs = [array if array.ndim == 3 else np.where(array == 9, 24, array).astype(np.uint8) for array in digits]
    publishers.write_sign_language(tmp_path / "signs", signs)
    data = tinyvit.load_dataset(tmp_path / "signs")
    assert_equal(data, signs)
    assert data.description == "Sign Language MNIST, 25 classes A to Y, no images of J, K, L and 12 more"


@pytest.mark.parametrize("change", [
    lambda text: text.replace(",", ";"),
    lambda text: text.replace(",", "\t"),
    lambda text: "\ufeff" + text,
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace(",", ", "),
    lambda text: text.rstrip("\n"),
    lambda text: text + "\n\n",
    lambda text: text.replace("1", "1.0"),
])  # fmt: skip
def test_ways_to_write_csv(tmp_path, digits, change):
    for split, images, labels in (("train", *digits[:2]), ("test", *digits[2:])):
        publishers.write_table(tmp_path / "plain.csv", images // 100, labels, ["label", *map(str, range(784))])
        text = (tmp_path / "plain.csv").read_text()
        (tmp_path / f"{split}.csv.gz").write_bytes(gzip.compress(change(text).encode()))
    (tmp_path / "plain.csv").unlink()
    data = tinyvit.load_dataset(tmp_path)
    np.testing.assert_array_equal(data.train_labels, digits[1])
    np.testing.assert_array_equal(data.train_images > 0, digits[0] >= 100)


def test_csv_with_words_ids_and_colour(tmp_path, pictures):
    names = ["zebra", "ant", "bee", "cat", "dog, brown", "elk", "fox", "gnu", 'hen "h"', "ibis"]
    images, labels = pictures[:2]
    header = ["class", *(f"p{i}" for i in range(3072))]
    publishers.write_table(tmp_path / "a.csv", images, labels, header, names=names)
    data = tinyvit.load_dataset(tmp_path / "a.csv")
    assert data.class_names == tuple(sorted(names))
    lookup = {bytes(image): names[label] for image, label in zip(images, labels, strict=True)}
    for image, label in zip(data.test_images, data.test_labels, strict=True):
        assert lookup[bytes(image)] == data.class_names[label]
    text = (tmp_path / "a.csv").read_text().splitlines()
    text = [f"{'id' if i == 0 else f'no {i}'},{line}" for i, line in enumerate(text)]
    (tmp_path / "a.csv").write_text("\n".join(text))
    assert_equal(tinyvit.load_dataset(tmp_path / "a.csv"), arrays_of(data))


@pytest.mark.parametrize(("text", "words"), [
    ("", ["an empty file"]),
    ("label,p1,p2,p3,p4\n", ["rows of pixels", "only a header"]),
    ("name,age,city\nA,3,B\n", ['a column "label"', "3 columns name, age, city"]),
    ("emotion,pixels,Usage\n0,1 2 3 4,Training\n", ["columns emotion, pixels, Usage"]),
    ("label,p1,p2,p3\n1,2,3,4\n", ["one column per pixel of a square image", "4 columns label, p1, p2, p3"]),
    ("label,p1,p2,p3,p4\n1,2,3,4\n", ["rows of 5 columns", "found 4"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,5\n1,2,3,4\n", ["rows of 5 columns, found 4 in row 3"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,\n", ["a CSV file"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,x\n", ["'x'"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,5\n1,2,\n", ["rows of 5 columns, found 3 in row 3"]),
    ("a,b,c,d,e,f,g,p1,p2,p3,p4\n" + "1," * 10 + "1\n",
     ["11 columns a, b, c, d, e, f, ...: 7 may be labels, and 4 with a number form a square"]),
    ("label," + ",".join(f"p{i}" for i in range(50)) + "\n" + "1," * 50 + "1\n",
     ["51 columns label, p0, p1, p2, p3, p4, ...: 1 may be labels, and 50 with a number form no square"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,-5\n", ["pixels from 0 to 255", "pixels from -5 to 4"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,300\n", ["pixels from 0 to 255", "pixels from 2 to 300"]),
    ("label,p1,p2,p3,p4\n1.5,2,3,4,5\n", ["integers or words as labels", "1.5"]),
    ("label,p1,p2,p3,p4\n1,2,3,4,nan\n", ["pixels from 0 to 255"]),
    ("plain words\nand more\n", ['a column "label"']),
    ("\n \n\n", ['a column "label"', "found 1 column without names"]),
    ("inf,inf,-inf,3,4\n1,2,3,4,5\n", ["pixels from -inf to inf"]),
])  # fmt: skip
def test_csv_that_is_refused(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    refuse(tmp_path / "a.csv", tmp_path / "a.csv", *words)


def test_csv_files_in_another_encoding_are_refused(tmp_path, digits):
    names = ["café", "cafè", *"abcdefgh"]  # with a replacement character both would be one class
    publishers.write_table(tmp_path / "a.csv", *digits[:2], names=names)
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    refuse(tmp_path / "a.csv", "a.csv: expected a CSV file saved as UTF-8, found 'utf-8' codec can't decode byte 0xe")


def test_only_plain_decimal_numbers_are_numbers(tmp_path, digits):
    names = ["1_0", "nan", "10", "1e1", "infinity", "1", "2", "3", "4", "x"]
    publishers.write_table(tmp_path / "a.csv", *digits[:2], names=names)
    assert tinyvit.load_dataset(tmp_path / "a.csv").class_names == tuple(sorted(names))
    publishers.write_table(tmp_path / "b.csv", *digits[:2], names=["nan", *map(str, range(9))])
    assert "nan" in tinyvit.load_dataset(tmp_path / "b.csv").class_names
    header = ["label", *(f"{row}_{column}" for row in range(28) for column in range(28))]
    publishers.write_table(tmp_path / "c.csv", *digits[:2], header=header)
    assert len(tinyvit.load_dataset(tmp_path / "c.csv").class_names or range(10)) == 10


def test_a_row_that_pandas_took_for_the_header_is_an_image(tmp_path, digits):
    for split, images, labels in (("train", *digits[:2]), ("test", *digits[2:])):
        path = tmp_path / f"{split}.csv"
        publishers.write_table(path, images, labels)
        first, *others = path.read_text().splitlines()
        cells, seen = first.split(","), Counter()
        for i, cell in enumerate(cells):  # as pandas.read_csv names columns of equal names
            cells[i] = f"{cell}.{seen[cell]}" if seen[cell] else cell
            seen[cell] += 1
        path.write_text("\n".join([",".join(cells), *others]))
    assert_equal(tinyvit.load_dataset(tmp_path), digits)


@pytest.mark.parametrize(
    "names", [("Train.csv", "Test.csv"), ("TRAIN.CSV", "TEST.CSV"), ("MyTraining.csv", "MyTest.csv")]
)
def test_names_of_csv_files_in_capitals(tmp_path, digits, names):
    for name, images, labels in zip(names, digits[::2], digits[1::2], strict=True):
        publishers.write_table(tmp_path / name, images, labels)
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, digits)


def test_a_table_without_images_does_not_hide_pictures(tmp_path, digits):
    publishers.write_pictures(tmp_path / "a", digits)
    (tmp_path / "a" / "labels.csv").write_text("name,label\ntrain/3/00007.png,3\n")
    assert tinyvit.load_dataset(tmp_path / "a").description.startswith("folders of pictures, 10 classes")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "labels.csv").write_text("name,label\ntrain/3/00007.png,3\n")
    refuse(tmp_path / "b", "labels.csv", 'a column "label"', "2 columns name, label")
    publishers.write_table(tmp_path / "a" / "labels.csv", *digits[:2])
    assert tinyvit.load_dataset(tmp_path / "a").description.startswith("CSV file")


def test_a_large_csv_file_is_fast(tmp_path, digits):
    images, labels = np.tile(digits[0], (30, 1, 1)), np.tile(digits[1], 30)
    publishers.write_table(tmp_path / "train.csv", images, labels)
    start = time.process_time()
    tinyvit.load_dataset(tmp_path)
    assert time.process_time() - start < 3  # 0.4 s on a quiet core, a tenth of the 60,000 images of MNIST


# ---- folders of pictures ----


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing"), ("train", "val")])
def test_folders_of_pictures(tmp_path, digits, names):
    publishers.write_pictures(tmp_path, digits, splits=names)
    (tmp_path / names[0] / "3" / "._hidden.png").write_bytes(b"no picture")
    (tmp_path / names[0] / ".hidden").mkdir()
    (tmp_path / names[0] / "Thumbs.db").write_bytes(b"no picture")
    data = tinyvit.load_dataset(tmp_path)
    assert data.class_names == tuple("0123456789")
    assert data.train_images.shape == (200, 28, 28)
    assert "images that were sorted by class are in random order" in data.description
    assert (np.diff(data.train_labels.astype(int)) < 0).sum() > 50
    assert len(set(data.test_labels[:20].tolist())) > 6  # so that --test-limit tests all classes
    for split, images, labels in (("train", *digits[:2]), ("test", *digits[2:])):
        pairs = zip(getattr(data, f"{split}_images"), getattr(data, f"{split}_labels"), strict=True)
        lookup = {bytes(image): label for image, label in zip(images, labels, strict=True)}
        assert all(lookup[bytes(image)] == label for image, label in pairs)
    assert_equal(tinyvit.load_dataset(tmp_path), arrays_of(data))
    other = tinyvit.load_dataset(tmp_path, seed=1)
    assert sorted(other.train_labels.tolist()) == sorted(data.train_labels.tolist())
    assert other.train_labels.tolist() != data.train_labels.tolist()


def test_folders_of_tiff_pictures(tmp_path, digits):
    publishers.write_pictures(tmp_path, digits, suffix=".tif")
    data = tinyvit.load_dataset(tmp_path)
    for images, labels, found, found_labels in (
        (*digits[:2], data.train_images, data.train_labels),
        (*digits[2:], data.test_images, data.test_labels),
    ):
        pairs = zip(map(bytes, images), labels.tolist(), strict=True)
        assert sorted(pairs) == sorted(zip(map(bytes, found), found_labels.tolist(), strict=True))


def test_an_npz_file_in_a_listing_needs_no_advice(tmp_path, digits):
    publishers.write_keras(tmp_path, digits)
    refuse(tmp_path / "nowhere", "no such file or folder beside mnist.npz")
    with pytest.raises(DataError) as error:
        tinyvit.load_dataset(tmp_path / "nowhere")
    assert str(error.value).endswith("beside mnist.npz")


def test_folders_without_a_split(tmp_path, digits):
    names = [str(number) for number in (0, 2, 10, 9, 1, 3, 30, 20, 100, 11)]
    publishers.write_pictures(tmp_path / "größen", digits, names=names, splits=("",), suffix=".PNG")
    data = tinyvit.load_dataset(tmp_path / "größen")
    assert data.class_names == ("0", "1", "2", "3", "9", "10", "11", "20", "30", "100")  # in the order of the numbers
    assert len(data.train_images) + len(data.test_images) == 200
    assert set(data.test_labels) == set(range(10))
    assert data.description == "folders of pictures, 10 classes 0 to 100, about one image in seven is for testing"


def test_train_val_and_test_folders(tmp_path, digits):
    arrays = [digits[0][:150], digits[1][:150], *digits[2:], digits[0][150:], digits[1][150:]]
    publishers.write_pictures(tmp_path, arrays, splits=("train", "test", "val"))
    data = tinyvit.load_dataset(tmp_path)
    assert len(data.train_images) == 200
    pairs = zip(map(bytes, data.train_images[150:]), data.train_labels[150:].tolist(), strict=True)
    assert sorted(pairs) == sorted(zip(map(bytes, digits[0][150:]), digits[1][150:].tolist(), strict=True))
    assert data.train_labels[-15:].min() < 5  # so that a smaller number for validation does not lack classes
    assert "its 50 validation images are the last training images" in data.description
    assert data.validation == 50
    assert_equal(tinyvit.load_dataset(tmp_path), arrays_of(data))


def test_two_folders_for_one_split_are_refused(tmp_path, digits):
    publishers.write_pictures(tmp_path, digits, splits=("train", "training"))
    refuse(tmp_path, "one folder per split", f"{tmp_path / 'train'} and {tmp_path / 'training'}: rename one")


def test_pictures_without_labels_have_a_note(tmp_path, digits):
    publishers.write_pictures(tmp_path, digits[:2], splits=("train",), suffix=".jfif")
    (tmp_path / "test").mkdir()
    Image.fromarray(digits[2][0]).save(tmp_path / "test" / "1.png")
    data = tinyvit.load_dataset(tmp_path)
    assert "the pictures in test have no labels, about one image in seven is for testing" in data.description


def test_names_of_classes_are_readable_and_different(tmp_path, digits):
    names = [b"caf\xe9", b"caf\xe8", b"a\nb", b"a\x1b[31m", "u\u0308".encode(), b"x", b"y", b"z", b"v", b"w"]
    names = [os.fsdecode(name) for name in names]
    publishers.write_pictures(tmp_path / "a", digits, names=names)
    umlaut = tmp_path / "a" / "test" / "u\u0308"
    umlaut.rename(umlaut.with_name("\u00fc"))  # from a system with another form of Unicode
    data = tinyvit.load_dataset(tmp_path / "a")
    assert set(data.class_names) == {"caf?", "caf??", "a?b", "a?[31m", "\u00fc", *"xyzvw"}
    for text in (*data.class_names, data.description):
        assert text.isprintable()
        assert text.encode()
    path = save(tmp_path / "b", images=digits[0], labels=np.array(["u\u0308", "\u00fc"])[digits[1] % 2])
    refuse(path, "labels of at least two classes")
    path = save(tmp_path / "b", images=digits[0], labels=np.array([b"caf\xe9", b"caf\xe8"])[digits[1] % 2])
    refuse(path, "data.npz: expected labels in UTF-8")


def two_classes(folder, pictures):
    """Write pictures in turn into the folders of two classes."""
    for i, picture in enumerate(pictures):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def images_by_name(folder):
    """Return the images of a folder without a split in the order of `two_classes`, and the description."""
    from tinyvit.data.datasets import _source

    found = _source(str(folder))[1]()
    part = found.parts["train"]
    order = np.argsort(np.argsort([*range(0, len(part.images), 2), *range(1, len(part.images), 2)]))
    return part.images[order], found.notes


def test_kinds_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (6, 5), np.uint8)
    image = Image.fromarray(grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    opaque = Image.merge("LA", (image, Image.new("L", image.size, 255)))
    same = [image.convert(mode) for mode in ("RGB", "P", "RGBA")]
    two_classes(tmp_path / "grey", [image, deep, opaque, *same])
    images, notes = images_by_name(tmp_path / "grey")
    np.testing.assert_array_equal(images, [grey] * 6)  # none has colour
    assert notes == []
    rgb = rng.integers(0, 256, (6, 5, 3), np.uint8)
    colour = Image.fromarray(rgb)
    two_classes(tmp_path / "colour", [colour, image, colour.convert("RGBA"), deep])
    images, _ = images_by_name(tmp_path / "colour")
    deep_grey = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(images, [rgb, deep_grey, rgb, deep_grey])
    two_classes(tmp_path / "bits", [Image.fromarray(grey > 127)] * 2)
    images, _ = images_by_name(tmp_path / "bits")
    np.testing.assert_array_equal(images[0], np.where(grey > 127, 255, 0))


@pytest.mark.parametrize(("ink", "background"), [(20, 255), (230, 0)])
def test_transparent_pictures_get_a_background(tmp_path, ink, background):
    alpha = np.zeros((6, 6), np.uint8)
    alpha[2:4] = 255
    alpha[4] = 128
    light = np.full((6, 6), ink, np.uint8)
    light[0] = 99  # hidden colour
    with_alpha = Image.merge("LA", (Image.fromarray(light), Image.fromarray(alpha)))
    two_classes(tmp_path, [with_alpha, with_alpha.convert("RGBA"), Image.fromarray(light)])
    images, notes = images_by_name(tmp_path)
    assert notes == [f"transparent pixels became {'white' if background else 'black'}"]
    middle = np.rint(ink * 128 / 255 + background * 127 / 255)
    for image in images[:2]:
        assert image[:, 0].tolist() == [background, background, ink, ink, middle, background]
    np.testing.assert_array_equal(images[2], light)


def test_rotated_photographs_are_turned(tmp_path):
    rows = np.arange(40, dtype=np.uint8)[:, None] * np.full((1, 24), 6, np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        for i in range(2):
            options = {"exif": exif} if name == "b" else {}
            Image.fromarray(rows).save(tmp_path / name / f"{i}.jpg", quality=95, **options)
    data = tinyvit.load_dataset(tmp_path)
    assert data.test_images.shape == (2, 40, 24)
    means = {label: image[:10].mean() for image, label in zip(data.test_images, data.test_labels, strict=True)}
    assert means[0] < 50 < 150 < means[1]


def test_pictures_that_are_refused(tmp_path, digits):
    publishers.write_pictures(tmp_path / "one", [digits[0][:4], digits[1][:4] * 0], splits=("",))
    refuse(tmp_path / "one", "one sub-folder of pictures per class, at least two", "found 0/")

    publishers.write_pictures(tmp_path / "flat", [digits[0][:4], digits[1][:4] * 0], names=["train"], splits=("",))
    publishers.write_pictures(tmp_path / "flat", [digits[0][:4], digits[1][:4] * 0], names=["test"], splits=("",))
    refuse(tmp_path / "flat", "one sub-folder of pictures per class", "found test/, train/")

    publishers.write_pictures(tmp_path / "odd", digits, splits=("",))
    Image.new("L", (30, 40)).save(tmp_path / "odd" / "2" / "zz.png")
    refuse(tmp_path / "odd", "zz.png: expected 28 x 28 pixels as in", "0/00001.png", "found 40 x 30 pixels: resize")
    (tmp_path / "odd" / "2" / "zz.png").write_bytes(b"<!DOCTYPE html><html>")
    refuse(tmp_path / "odd", "zz.png", "an HTML page, so the download failed")
    (tmp_path / "odd" / "2" / "zz.png").write_bytes(b"")
    refuse(tmp_path / "odd", "zz.png", "an empty file")
    whole = (tmp_path / "odd" / "2" / "00005.png").read_bytes()
    (tmp_path / "odd" / "2" / "zz.png").write_bytes(whole[:100])
    refuse(tmp_path / "odd", "zz.png: expected an intact picture")
    (tmp_path / "odd" / "2" / "zz.png").unlink()
    (tmp_path / "odd" / "empty").mkdir()
    refuse(tmp_path / "odd", "odd/empty: expected pictures", "found an empty folder")

    publishers.write_pictures(tmp_path / "more", digits)
    (tmp_path / "more" / "test" / "11").mkdir()
    refuse(tmp_path / "more", "folders of the classes 0, 1, 2", "found a folder 11")
    shutil.rmtree(tmp_path / "more" / "test")
    Image.new("L", (5, 5)).save(tmp_path / "more" / "train" / "cover.png")  # beside the folders of the classes
    assert tinyvit.load_dataset(tmp_path / "more").classes == 10


# ---- labels ----


@pytest.mark.parametrize(("labels", "classes", "expected", "names", "note"), [
    ([0, 1, 2, 0, 1, 2], None, [0, 1, 2, 0, 1, 2], None, None),
    ([1, 2, 3, 1, 2, 3], None, [0, 1, 2, 0, 1, 2], ("1", "2", "3"), "labels 1 to 3 became 0 to 2"),
    ([1, 2, 3, 1, 2, 3], 3, [0, 1, 2, 0, 1, 2], ("1", "2", "3"), "labels 1 to 3 became 0 to 2"),
    ([1, 2, 3, 1, 2, 3], 4, [1, 2, 3, 1, 2, 3], None, "no images of 0"),
    ([0, 2, 5, 0, 2, 5], None, [0, 2, 5, 0, 2, 5], None, "no images of 1, 3, 4"),
    ([0, 2, 5, 0, 2, 5], 3, [0, 1, 2, 0, 1, 2], ("0", "2", "5"), "labels 0, 2, 5 became 0 to 2"),
    ([10, 20, 90, 10, 20, 90], None, [0, 1, 2, 0, 1, 2], ("10", "20", "90"), "labels 10, 20, 90 became 0 to 2"),
    ([-1, 1, -1, 1, -1, 1], None, [0, 1, 0, 1, 0, 1], ("-1", "1"), "labels -1, 1 became 0 to 1"),
    ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], None, [0, 1, 2, 0, 1, 2], None, "whole float labels became integers"),
    (np.eye(3)[[2, 1, 0, 2, 1, 0]], None, [2, 1, 0, 2, 1, 0], None, "one-hot labels became integers"),
    (np.eye(3, dtype=bool)[[2, 1, 0, 2, 1, 0]], None, [2, 1, 0, 2, 1, 0], None, "one-hot labels became integers"),
    ([[0], [1], [2], [0], [1], [2]], None, [0, 1, 2, 0, 1, 2], None, None),
    (["b", "a", "c", "b", "a", "c"], None, [1, 0, 2, 1, 0, 2], ("a", "b", "c"), None),
    ([b"b", b"a", b"c", b"b", b"a", b"c"], None, [1, 0, 2, 1, 0, 2], ("a", "b", "c"), None),
    ([True, False, True, False, True, False], None, [1, 0, 1, 0, 1, 0], None, None),
    (np.arange(6) * 50 + 1, 300, np.arange(6) * 50 + 1, None, "no images of 0, 2, 3 and 291 more"),
])  # fmt: skip
def test_labels_of_any_kind(tmp_path, labels, classes, expected, names, note):
    images = np.full((6, 4, 4), 200, np.uint8)
    labels = np.asarray(labels)
    data = tinyvit.load_dataset(
        save(tmp_path, x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3]), classes=classes
    )
    assert data.classes == (classes or int(max(expected)) + 1)
    assert data.train_labels.tolist() == list(expected) or "random order" in data.description
    assert sorted(data.test_labels.tolist()) == sorted(expected[:3])
    assert data.test_labels.tolist() == list(expected)[:3] or "random order" in data.description
    assert data.train_labels.dtype == (np.uint8 if data.classes <= 256 else np.int32)
    assert data.class_names == names
    assert (note is None and "became" not in data.description) or note in data.description


@pytest.mark.parametrize(("labels", "classes", "words"), [
    ([0, 1, 2, 3], 3, ["labels from 0 to 2", "found 3 at position 3: 4 classes fit all labels"]),
    ([0, 1, 2, -1], 3, ["labels from 0 to 2", "found -1 at position 3"]),
    ([1, 2, 4, 5], 3, ["labels from 0 to 2"]),
    (["a", "b", "c", "d"], 2, ["labels from 0 to 1"]),
    ([0.5, 1, 2, 3], None, ["integers or words as labels", "float64 such as [0.5"]),
    ([np.nan, 1, 2, 3], None, ["integers or words as labels"]),
    ([np.inf, 1, 2, 3], None, ["integers or words as labels"]),
    ([1j, 1, 2, 3], None, ["integers or words as labels", "complex128"]),
    ([2**40, 1, 2, 3], None, ["integers or words as labels"]),
    ([0, 1, 2], None, ["4 labels, one per image", "found shape (3,)"]),
    ([[0, 5], [5, 0], [0, 5], [5, 0]], None, ["as (N,), (N, 1) or one-hot", "found shape (4, 2)"]),
    ([[0, 1], [1, 1], [0, 0], [1, 0]], None, ["4 labels", "or one-hot (N, classes), found shape (4, 2)"]),
])  # fmt: skip
def test_labels_that_are_refused(tmp_path, labels, classes, words):
    path = save(tmp_path, images=np.full((4, 5, 5), 99, np.uint8), labels=np.array(labels))
    refuse(path, str(path), *words, classes=classes)


def test_a_wrong_label_of_the_test_images_is_found_in_their_file(tmp_path, digits):
    publishers.write_mnist(tmp_path, digits)
    labels = digits[3].copy()
    labels[7] = 77
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    refuse(tmp_path, "t10k-labels-idx1-ubyte.gz: expected labels from 0 to 9, found 77 at position 7", classes=10)


def test_test_images_of_classes_without_training_images_have_a_note(tmp_path, digits):
    images, labels, *test = digits
    path = save(tmp_path, x_train=images[labels > 3], y_train=labels[labels > 3], x_test=test[0], y_test=test[1])
    assert "no training images of 0, 1, 2 and 1 more, but test images" in tinyvit.load_dataset(path).description
    path = save(tmp_path, x_train=images, y_train=labels, x_test=test[0], y_test=test[1])
    assert "no training images" not in tinyvit.load_dataset(path).description


@pytest.mark.parametrize("label", [0, 1, 7, "a"])
def test_one_class_is_refused(tmp_path, digits, label):
    path = save(tmp_path, images=digits[0], labels=np.full(200, label))
    refuse(path, f"labels of at least two classes, found only {label}")


def test_an_image_in_seven_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2, 3], [70, 15, 2, 1])
    train, test = hold_out(labels, np.random.default_rng(0))
    assert sorted([*train, *test]) == list(range(88))
    assert np.bincount(labels[test], minlength=4).tolist() == [10, 2, 1, 0]
    assert (np.diff(labels[train]) < 0).any()
    again = hold_out(labels, np.random.default_rng(0))
    other = hold_out(labels, np.random.default_rng(1))
    assert again[0].tolist() == train.tolist() != other[0].tolist()


def test_one_image_per_class_is_too_few_for_a_split(tmp_path):
    path = save(tmp_path, images=np.full((3, 5, 5), 99, np.uint8), labels=np.arange(3))
    refuse(path, "at least two images of a class", "3 images")


# ---- pixels ----


def levels(images):
    return np.asarray(images, np.float64)


@pytest.mark.parametrize(("change", "note"), [
    (lambda x: x, None),
    (lambda x: x.astype(np.float64), None),
    (lambda x: x.astype(">i4"), None),
    (lambda x: levels(x) / 255, "pixels 0 to 1 became 0 to 255"),
    (lambda x: (levels(x) / 255).astype(np.float32), "pixels 0 to 1 became 0 to 255"),
    (lambda x: x.astype(np.uint16) * 257, "pixels 0 to 65,535 became 0 to 255"),
    (lambda x: x[..., None], None),
    (lambda x: x[:, None], "the axis of the channels became the last one"),
    (lambda x: x.reshape(len(x), -1), None),
    (lambda x: np.asfortranarray(x), None),
])  # fmt: skip
def test_pixels_of_any_kind(tmp_path, digits, change, note):
    images = [change(array) if array.ndim == 3 else array for array in digits]
    data = tinyvit.load_dataset(
        save(tmp_path, x_train=images[0], y_train=images[1], x_test=images[2], y_test=images[3])
    )
    assert_equal(data, digits)
    assert (note in data.description) if note else "became" not in data.description


def test_both_splits_have_one_scale(tmp_path):
    dark, light = np.full((4, 3, 3), 1, np.uint8), np.full((4, 3, 3), 200, np.uint8)
    labels = np.arange(4)
    data = tinyvit.load_dataset(save(tmp_path, x_train=dark, y_train=labels, x_test=light, y_test=labels))
    assert (data.train_images.max(), data.test_images.max()) == (1, 200)
    bits = np.arange(36).reshape(4, 3, 3) % 2 == 1
    data = tinyvit.load_dataset(save(tmp_path, x_train=bits, y_train=labels, x_test=bits, y_test=labels))
    assert set(data.test_images.ravel()) == {0, 255}


def test_rectangles_and_colour_are_loaded(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((8, 5, 9), (8, 5, 9, 3), (8, 12, 12, 3)):
        images, labels = rng.integers(0, 256, shape, np.uint8), np.arange(8) % 2
        data = tinyvit.load_dataset(save(tmp_path, x_train=images, y_train=labels, x_test=images, y_test=labels))
        np.testing.assert_array_equal(data.test_images, images, strict=True)
        flat = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images
        data = tinyvit.load_dataset(save(tmp_path, x_train=flat, y_train=labels, x_test=flat, y_test=labels))
        np.testing.assert_array_equal(data.test_images, images, strict=True)


@pytest.mark.parametrize(("images", "words"), [
    (np.zeros((4, 7)), ["(N, R, C), (N, R, C, 3) or (N, pixels of a square)", "shape (4, 7)"]),
    (np.zeros(4), ["shape (4,)"]),
    (np.zeros(()), ["shape ()"]),
    (np.zeros((4, 5, 5, 4)), ["shape (4, 5, 5, 4)"]),
    (np.zeros((4, 2, 5, 5, 3)), ["shape (4, 2, 5, 5, 3)"]),
    (np.zeros((4, 0, 0)), ["shape (4, 0, 0)"]),
    (np.zeros((0, 5, 5)), ["shape (0, 5, 5)"]),
    (np.full((4, 5, 5), np.nan), ["pixels from 0 to 255", "from nan to nan"]),
    (np.full((4, 5, 5), -1.0), ["pixels from -1 to -1"]),
    (np.full((4, 5, 5), 256.0), ["pixels from 256 to 256"]),
    (np.full((4, 5, 5), 70000), ["pixels from 70000 to 70000"]),
    (np.full((4, 5, 5), 1j), ["complex128"]),
    (np.full((4, 5, 5), "a"), ["<U1"]),
])  # fmt: skip
def test_images_that_are_refused(tmp_path, images, words):
    path = save(tmp_path, images=images, labels=np.arange(4))
    refuse(path, path, *words)


def test_one_value_that_is_not_a_number_is_found_in_any_split(tmp_path, digits):
    images = digits[2].astype(float)
    images[3, 4, 5] = np.nan
    for one, other in ((images, digits[2]), (digits[2], images)):
        path = save(tmp_path, x_train=one, y_train=digits[3], x_test=other, y_test=digits[3])
        refuse(path, "pixels from 0 to 255", "pixels from nan to nan")


def test_images_of_two_sizes_are_refused(tmp_path, digits):
    publishers.write_mnist(tmp_path, [*digits[:2], digits[2][:, :20], digits[3]])
    refuse(tmp_path, "t10k-images", "images of 28 x 28 pixels as in", "train-images", "found 20 x 28 pixels")


# ---- files that are no data ----


def zipped(name="a/b.txt", data=b"text"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        archive.addfile(info, io.BytesIO(b""))
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
NO_DATA = {
    "html": (b"\n<!DOCTYPE html>\n<html><title>404</title></html>", "an HTML page, so the download failed"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an HTML page, so the download failed"),
    "zip": (zipped(), "a zip archive: unpack it"),
    "tar": (tarred(), "a tar archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40), "a 7z archive: unpack it"),
    "xz": (b"\xfd7zXZ\0\0\4" + bytes(40), "a file packed by xz: unpack it"),
    "pointer": (POINTER, "a Git LFS pointer in place of the content: run git lfs pull"),
    "gzip twice": (gzip.compress(gzip.compress(b"data" * 100)), "a gzip file: unpack it, because it is packed twice"),
    "pickle": (pickle.dumps({"data": [1]}), "a Python pickle, which can run any code"),
    "npy": (b"\x93NUMPY\1\0v\0" + bytes(130), "a single NumPy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "mat": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(100), "a MATLAB file"),
    "parquet": (b"PAR1" + bytes(40), "a Parquet file"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("content", "text"), NO_DATA.values(), ids=NO_DATA)
def test_what_is_no_data_is_named(tmp_path, digits, content, text, pack):
    if pack is gzip.compress and content[:2] == b"\x1f\x8b":
        pytest.skip("is packed already")
    content = pack(content)
    publishers.write_mnist(tmp_path / "idx", digits, suffix="")
    (tmp_path / "idx" / "t10k-images-idx3-ubyte").write_bytes(content)
    refuse(tmp_path / "idx", "t10k-images-idx3-ubyte", text)
    for name in ("data", "data.csv"):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, tmp_path / name, text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "archive.bin").write_bytes(content)
    refuse(tmp_path / "folder", f"archive.bin ({text}")
    if not text.startswith("a zip"):
        (tmp_path / "a.npz").write_bytes(content)
        refuse(tmp_path / "a.npz", "a.npz: expected an intact npz file", text)


def test_pictures_and_pickles_are_given_advice(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    refuse(tmp_path / "a.png", "a picture: give the folder of the classes")
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("batches.meta", "data_batch_1", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({b"data": 1}, 2))
    message = refuse(tmp_path / "cifar-10-batches-py", "batches.meta (a Python pickle, which can run any code")
    assert message.count("Python pickle") == 1


@pytest.mark.parametrize(
    "damage_of", [lambda data: data[:-20], lambda data: data[:-8] + bytes(8), lambda data: data[:5]]
)
def test_a_damaged_gzip_file(tmp_path, digits, damage_of):
    publishers.write_mnist(tmp_path, digits)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage_of(path.read_bytes()))
    refuse(tmp_path, str(path), "one intact gzip stream")
    publishers.write_table(tmp_path / "csv" / "train.csv", *digits[:2])
    packed = gzip.compress((tmp_path / "csv" / "train.csv").read_bytes())
    (tmp_path / "csv" / "train.csv").write_bytes(damage_of(packed))
    refuse(tmp_path / "csv", "train.csv: expected one intact file")


def test_a_whole_copy_replaces_a_damaged_one(tmp_path, digits):
    publishers.write_mnist(tmp_path, digits)
    publishers.write_mnist(tmp_path, digits, suffix="")
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1000])
    data = tinyvit.load_dataset(tmp_path)
    assert_equal(data, digits)
    assert f"another copy is read, because this one is damaged: {path}: expected 156800 bytes" in data.description
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
    refuse(tmp_path, "train-images-idx3-ubyte.gz", "an empty file")


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_file_is_named_beside_what_is_there(tmp_path, digits, missing):
    publishers.write_emnist(tmp_path, digits, "digits")
    paths = sorted(tmp_path.iterdir())
    paths[missing].unlink()
    split, what = paths[missing].name.split("-")[2:4]
    others = [path.name for path in paths if path != paths[missing]]
    refuse(tmp_path, f"also a file with the {split} {what}", *others)


def test_npz_files_that_are_refused(tmp_path, digits):
    path = save(tmp_path, a=digits[0], b=digits[1])
    refuse(path, "x_train, y_train, x_test and y_test", "a (200, 28, 28), b (200,)")
    path = save(tmp_path, x_train=np.array([{"a": 1}], object), y_train=np.arange(1))
    refuse(path, "array x_train", "pickled Python objects, which can run any code")
    path.write_bytes(zipped())
    refuse(path, "x_train, y_train, x_test and y_test", "no .npy files")
    whole = save(tmp_path, x_train=digits[0], y_train=digits[1]).read_bytes()
    path.write_bytes(whole[:-50])
    refuse(path, "an intact npz file", "not a zip file")
    path.write_bytes(whole[:3000] + b"12345678" + whole[3008:])
    refuse(path, "an intact npz file", "CRC")


def test_npz_files_of_one_array_each_are_refused_once(tmp_path, digits):
    for name, array in zip(("X_train", "y_train", "X_test", "y_test"), digits, strict=True):
        np.savez(tmp_path / f"{name}.npz", array)
    message = refuse(tmp_path, "X_test.npz: expected arrays x_train, y_train", "found arr_0 (60, 28, 28)")
    assert "give one of" not in message


def test_an_npz_file_without_test_images_is_split(tmp_path, digits):
    for names in (("images", "labels"), ("x", "y"), ("X", "Y"), ("data", "target"), ("x_train", "y_train")):
        data = tinyvit.load_dataset(save(tmp_path, **dict(zip(names, digits[:2], strict=True))))
        assert len(data.train_images) + len(data.test_images) == 200
        assert "about one image in seven is for testing" in data.description


def test_folders_near_a_data_set_lead_to_it(tmp_path, digits):
    publishers.write_mnist(tmp_path / "a" / "b", digits)
    publishers.write_pictures(tmp_path / "pictures", digits)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "a", f"found b/: give {tmp_path / 'a' / 'b'}")
    publishers.write_keras(tmp_path / "keras", digits)
    refuse(tmp_path, f"give {tmp_path / 'keras' / 'mnist.npz'} or {tmp_path / 'pictures'}")
    (tmp_path / "deep" / "a").mkdir(parents=True)
    (tmp_path / "a" / "b").rename(tmp_path / "deep" / "a" / "b")
    refuse(tmp_path / "deep", f"give {tmp_path / 'deep' / 'a' / 'b'}")
    (tmp_path / "deep" / "a" / "b").rename(tmp_path / "a" / "b")
    refuse(tmp_path / "pictures" / "train" / "3", f"give {tmp_path / 'pictures' / 'train'}")
    assert "give" not in refuse(tmp_path / "empty", "found an empty folder")
    publishers.write_keras(tmp_path, digits)  # a neighbour that has nothing to do with the folder
    assert "give" not in refuse(tmp_path / "empty", "found an empty folder")
    (tmp_path / "a" / "b" / "processed").mkdir()
    refuse(tmp_path / "a" / "b" / "processed", f"give {tmp_path / 'a' / 'b'}")


def test_no_such_path(tmp_path, digits):
    refuse(tmp_path / "nowhere" / "else", "nowhere/else: expected a folder or a file", "no such file or folder")
    publishers.write_keras(tmp_path, digits)
    refuse(tmp_path / "mnits.npz", "no such file or folder beside mnist.npz")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "a folder or a file")
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")  # would block a reader
    assert tinyvit.load_dataset(tmp_path).name == "mnist"


# ---- paths ----


def test_odd_paths(tmp_path, digits, monkeypatch):
    folder = tmp_path / "Ziffern für ü 数字"
    publishers.write_mnist(folder, digits)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    absolute = [folder, str(folder), f"{folder}/", os.fsencode(folder), f"~/{folder.name}"]
    for path in (*absolute, folder.name, "./link", "link/../link"):
        data = tinyvit.load_dataset(path)
        assert_equal(data, digits)
        assert os.path.isabs(data.source)
    publishers.write_pictures(tmp_path / "Bilder", digits, names=[f"Klasse {c}" for c in "äöüßéñ漢字かな"])
    assert tinyvit.load_dataset("~/Bilder").class_names[0].startswith("Klasse ")


def test_the_default_is_mnist():
    data = tinyvit.load_dataset()
    assert (data.name, data.class_names) == ("MNIST", tuple("0123456789"))
    assert data.description == "MNIST, 10 classes 0 to 9"
    with pytest.raises(DatasetError, match="labels from 0 to 4"):
        tinyvit.load_dataset(classes=5)


# ---- links, and what is often found in real folders ----


def test_a_link_to_a_missing_file_is_named(tmp_path, digits, pictures):
    missing = "a link to /nowhere/file, which is missing"

    def break_link(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to("/nowhere/file")
        return path

    for name in ("notes.md", "train.csv", "data.npz", "train-images-idx3-ubyte.gz"):
        refuse(tmp_path / name.split(".")[0], break_link(tmp_path / name.split(".")[0] / name).name, missing)
        refuse(tmp_path / name.split(".")[0] / name, name, missing)
    publishers.write_mnist(tmp_path / "idx", digits)
    refuse(tmp_path / "idx", break_link(tmp_path / "idx" / "t10k-labels-idx1-ubyte.gz"), missing)
    publishers.write_cifar(tmp_path / "cifar", pictures)
    refuse(tmp_path / "cifar", break_link(tmp_path / "cifar" / "data_batch_3.bin"), missing)
    publishers.write_pictures(tmp_path / "pictures", digits)
    path = break_link(tmp_path / "pictures" / "train" / "3" / "zz.png")
    refuse(tmp_path / "pictures", path, missing)
    path.unlink()
    refuse(tmp_path / "pictures", break_link(tmp_path / "pictures" / "train" / "11"), missing)


def test_places_with_nothing_but_links(tmp_path, digits):
    blobs = tmp_path / "blobs"
    publishers.write_mnist(blobs, digits, prefix="a-")
    publishers.write_keras(blobs, digits, "b-mnist.npz")
    publishers.write_pictures(blobs / "c", digits)
    for i, path in enumerate(sorted(path for path in blobs.rglob("*") if path.is_file())):
        relative = path.relative_to(blobs)
        name = re.sub("^[ab]-", "", relative.name)
        link = tmp_path / relative.parts[0][0] / Path(*relative.parts[1:-1], name)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{i:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{i:040x}", link.parent))
    assert_equal(tinyvit.load_dataset(tmp_path / "a"), digits)
    assert tinyvit.load_dataset(tmp_path / "b").description == "MNIST, 10 classes 0 to 9"
    assert len(tinyvit.load_dataset(tmp_path / "c").test_images) == 60


def test_300_classes(tmp_path, digits):
    names = [f"{i:03}" for i in range(300)]
    labels = np.arange(600) % 300
    images = np.tile(digits[0], (3, 1, 1))
    publishers.write_pictures(tmp_path / "folders", [images, labels], names=names, splits=("",))
    data = tinyvit.load_dataset(tmp_path / "folders")
    assert (data.classes, data.class_names[-1], data.test_labels.max()) == (300, "299", 299)
    data = tinyvit.load_dataset(save(tmp_path, x_train=images, y_train=labels, x_test=images, y_test=labels + 101))
    assert (data.classes, data.train_labels.dtype, data.test_labels.max()) == (401, np.int32, 400)


def test_files_beside_the_folders_of_the_classes(tmp_path, digits):
    publishers.write_pictures(tmp_path, digits, splits=("",), suffix=".JPG")
    picture = sorted((tmp_path / "3").iterdir())[0]
    for name in ("3.JPG", "4.png", "11"):
        shutil.copy(picture, tmp_path / name)
    (tmp_path / "3" / "folder.png").mkdir()
    data = tinyvit.load_dataset(tmp_path)
    assert data.classes == 10
    assert len(data.train_images) + len(data.test_images) == 200


def test_names_of_arrays_in_npz_files(tmp_path, digits):
    for names in (
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("trainX", "trainY", "testX", "testy"),
        ("training_images", "training_labels", "test_images", "test_labels"),
        ("X_train", "Y_train", "X_val", "Y_val"),
    ):
        assert_equal(tinyvit.load_dataset(save(tmp_path, **dict(zip(names, digits, strict=True)))), digits)
    path = save(tmp_path, x_train=digits[0], y_train=digits[1], x_test=digits[2])
    assert "the test images have no labels, about one image in seven" in tinyvit.load_dataset(path).description
    refuse(save(tmp_path, x=digits[0]), "images and labels, found x (200, 28, 28)")


@pytest.mark.parametrize("name", ["Label", "TARGET", "class", "y", ' "Label" '])
@pytest.mark.parametrize("label_last", [False, True])
def test_names_of_the_column_of_labels(tmp_path, digits, name, label_last):
    names = [f"pixel{i}" for i in range(784)]
    names = [*names, name] if label_last else [name, *names]
    for split, images, labels in (("train", *digits[:2]), ("test", *digits[2:])):
        path = tmp_path / f"{split}.csv"
        publishers.write_table(path, images, labels, names, label_last)
        path.write_text(re.sub(r"[^,\n]+", r'"\g<0>"', path.read_text().replace('"', "")))  # all cells quoted
    assert_equal(tinyvit.load_dataset(tmp_path), digits)


@pytest.mark.parametrize("label_last", [False, True])
@pytest.mark.parametrize("words", [None, "zyxwvutsrq"])
@pytest.mark.parametrize("noise", [False, True])
def test_csv_files_without_a_header(tmp_path, digits, label_last, words, noise):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (200, 28, 28), np.uint8) if noise else digits[0]  # corners of many values
    publishers.write_table(tmp_path / "a.csv", images, digits[1], None, label_last, names=words)
    data = tinyvit.load_dataset(tmp_path)
    assert data.classes == 10
    assert data.class_names == (tuple(sorted(words)) if words else None)
    lookup = {bytes(image): label for image, label in zip(images, digits[1], strict=True)}
    expected = [lookup[bytes(image)] for image in data.test_images]
    assert data.test_labels.tolist() == [sorted(words).index(words[i]) if words else i for i in expected]


def test_digits_of_scikit_learn_as_a_file(tmp_path):
    import sklearn

    shutil.copy(Path(sklearn.__file__).parent / "datasets" / "data" / "digits.csv.gz", tmp_path)
    data = tinyvit.load_dataset(tmp_path)
    assert (data.name, data.classes, data.train_images.shape[1:]) == ("digits", 10, (8, 8))
    assert len(data.train_images) + len(data.test_images) == 1797


def test_other_data_sets_are_refused_with_advice(tmp_path, pictures):
    for name in ("train_X.bin", "test_X.bin"):  # STL-10
        (tmp_path / name).write_bytes(pictures[0].tobytes())
    refuse(tmp_path, "found test_X.bin, train_X.bin")
    refuse(tmp_path / "train_X.bin", "train_X.bin: expected a CSV file, found binary content")
    (tmp_path / "usps.bz2").write_bytes(bz2.compress(b"7 1:-1 2:-1\n"))
    refuse(tmp_path / "usps.bz2", "a file packed by bzip2: unpack it")
    (tmp_path / "data").write_bytes(save(tmp_path, images=pictures[0], labels=pictures[1]).read_bytes())
    refuse(tmp_path / "data", "found a zip archive of NumPy arrays: let its name end with .npz")
    publishers.write_cifar(tmp_path / "cifar", pictures)
    assert_equal(tinyvit.load_dataset(tmp_path / "cifar" / "data_batch_1.bin"), pictures)
    publishers.write_pictures(tmp_path / "flat", [pictures[0][:4], pictures[1][:4]], names=["x"] * 10, splits=("",))
    assert "give" not in refuse(tmp_path / "flat" / "x", "found 00000.png, 00001.png")


# ---- limits ----


def packed_zeros(head, count):
    """Return a gzip file of `head` and `count` zeros, without building them."""
    packer = zlib.compressobj(9, wbits=31)
    chunks = [packer.compress(head), *(packer.compress(bytes(MB)) for _ in range(count // MB)), packer.flush()]
    return b"".join(chunks)


@pytest.mark.extended
def test_bombs_are_refused_with_little_memory(tmp_path, digits):
    publishers.write_mnist(tmp_path / "idx", digits)
    shape = (400 * 1024, 32, 32)  # 400 MB
    header = publishers.idx_bytes(np.zeros((0, 32, 32), np.uint8))[:4] + b"".join(n.to_bytes(4, "big") for n in shape)
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").write_bytes(packed_zeros(header, 400 * MB))
    (tmp_path / "bomb.csv").write_bytes(packed_zeros(b"label,p1,p2,p3,p4\n", 400 * MB))
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((400, MB), np.uint8), labels=np.arange(400))
    for name in ("idx", "bomb.csv", "bomb.npz"):
        assert peak_of(lambda name=name: refuse(tmp_path / name, "at most 67,108,864 bytes")) < 140 * MB


def test_an_npz_header_that_lies_costs_nothing(tmp_path):
    for shape in ((2**40,), (2**20, 2**20), (2**31, 2**31, 4), (-1, 5, 5), (2**62, 2**62)):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", stream.getvalue() + bytes(100))
            archive.writestr("labels.npy", stream.getvalue() + bytes(100))
        assert peak_of(lambda: refuse(tmp_path / "a.npz", "a.npz")) < 2 * MB


def test_a_png_header_that_lies_costs_nothing(tmp_path, digits):
    publishers.write_pictures(tmp_path, digits, splits=("",))
    path = sorted((tmp_path / "0").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    assert peak_of(lambda: refuse(tmp_path, path)) < 4 * MB
    data[16:24] = (5000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    assert peak_of(lambda: refuse(tmp_path, path, "at most 16,777,216 pixels", "5000 x 5000")) < 4 * MB


def test_messages_are_short(tmp_path):
    header = bytes([0, 0, 8, 64]) + b"\xff\xff\xff\xfe" * 64
    (tmp_path / "a").write_bytes(header)
    with pytest.raises(IdxError, match=r"an array that memory can hold, found a header for shape .* \.\.\.$") as info:
        tinyvit.data.read_idx(tmp_path / "a")
    assert len(str(info.value)) < 500 + len(str(tmp_path))


def test_an_array_larger_than_allowed(tmp_path, digits):
    write_idx(tmp_path / "a", digits[0])
    with pytest.raises(IdxError, match="at most 156,799 bytes of elements"):
        tinyvit.data.read_idx(tmp_path / "a", most_bytes=156_799)
    assert tinyvit.data.read_idx(tmp_path / "a", most_bytes=156_800).shape == (200, 28, 28)


@pytest.mark.extended
@pytest.mark.parametrize("form", damaged_files.DATA_SETS)
def test_random_damage_is_refused_or_loaded(tmp_path, form):
    found = damaged_files.run_cases(form, first=0, count=300, seed=0, folder=tmp_path)
    assert found["findings"] == []
    assert 90 < found["outcomes"]["refused"] < 300  # so both happen


def no_name(path):
    raise DataError("file", "x", "y")


def compute(path):
    end = time.process_time() + 0.6
    while time.process_time() < end:
        pass
    return tinyvit.load_dataset(path)


def allocate(path):
    np.ones(damaged_files.peak_memory() + 320 * MB, np.uint8)
    return tinyvit.load_dataset(path)


@pytest.mark.parametrize(("reader", "outcome"), [
    (lambda path: {}["x"], "crashed"),
    (no_name, "crashed"),
    (lambda path: np.array(0) / 0, "crashed"),  # a warning
    (compute, "slow"),
    (allocate, "large"),
])  # fmt: skip
def test_the_check_for_damage_sees_another_error(tmp_path, monkeypatch, reader, outcome):
    files = damaged_files.FORMATS["mnist"](tmp_path)
    monkeypatch.setattr(damaged_files, "FORMATS", {"mnist": lambda folder: files})
    monkeypatch.setattr(files, "read", reader)
    monkeypatch.setattr(files, "limit", 0.5 if outcome == "slow" else 60)
    assert damaged_files.run_cases("mnist", first=0, count=1, seed=0, folder=tmp_path)["outcomes"][outcome] == 1
