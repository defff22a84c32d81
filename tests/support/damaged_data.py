"""Damage files of data sets at random, and require that the library loads them or names the fault.

`PYTHONPATH=tests/support python -m damaged_data 100000` loads this number of damaged copies of each form.
"""

import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import publishers

import tinyvit
from tinyvit.data import DataError

TEXTS = (b"\n\n,,,,\n", b"1e999,-1", b"\0" * 8, b'""","\r\n;', b"nan,inf,")
MOST_SECONDS = 1.0  # of processor time per load
MOST_MEMORY = 300 * 2**20  # bytes by which the process may grow


def grey(count=24, side=8):
    """Return four arrays of a small data set of random grey images with ten classes."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, side, side), np.uint8) for n in (count, 12))
    return [train, np.arange(count, dtype=np.uint8) % 10, test, np.arange(12, dtype=np.uint8) % 10]


def colour(count=24, side=32):
    """Return four arrays of a small data set of random RGB images with ten classes."""
    arrays = grey(count, side)
    return [np.stack([array, array // 2, 255 - array], axis=-1) if array.ndim == 3 else array for array in arrays]


def write_words(folder):
    """Write a CSV file with quoted words as labels."""
    images, labels = grey()[:2]
    publishers.write_table(folder / "train.csv", images, labels, names=[f'class "{i}", ä' for i in range(10)])


FORMS = {
    "idx": lambda folder: publishers.write_mnist(folder, grey(), suffix=""),
    "idx, gzip": lambda folder: publishers.write_mnist(folder, grey()),
    "EMNIST": lambda folder: publishers.write_emnist(folder, grey(), "letters"),
    "QMNIST": lambda folder: publishers.write_qmnist(folder, grey(), suffix=""),
    "npz": lambda folder: publishers.write_keras(folder, grey()),
    "npz, packed": lambda folder: publishers.write_medmnist(folder, colour()),
    "Kuzushiji": lambda folder: publishers.write_kuzushiji(folder, grey()),
    "CSV": lambda folder: publishers.write_kaggle(folder, grey()),
    "CSV of words": write_words,
    "CIFAR-10": lambda folder: publishers.write_cifar(folder, colour()),
    "PNG": lambda folder: publishers.write_pictures(folder, grey()),
    "JPEG": lambda folder: publishers.write_pictures(folder, colour(), suffix=".jpg"),
}


def damaged(content, rng):
    """Return bytes with one to three random changes, mostly near the beginning or the end."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = len(content)
        near = int(rng.integers(0, 64))
        place = int(rng.choice([rng.integers(0, size + 1), min(size, near), max(0, size - near)]))
        noise = rng.bytes(int(rng.integers(1, 9)))
        match rng.integers(0, 8):
            case 0:
                content[place : place + 1] = noise[:1]
            case 1:
                content[place : place + 1] = bytes(byte ^ 1 << noise[0] % 8 for byte in content[place : place + 1])
            case 2:
                del content[place:]
            case 3:
                content[place:place] = noise
            case 4:
                del content[place : place + int(rng.integers(1, 65))]
            case 5:
                content += noise
            case 6:
                content[place : place + 4] = int(rng.choice([0, 1, 255, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big")
            case 7:
                content[place : place + 8] = TEXTS[rng.integers(0, len(TEXTS))]
    return bytes(content)


def fuzz(form, count, seed=0):
    """Load `count` damaged copies of a data set of a form, and return how many of them were refused.

    Raises `AssertionError` with the seed and the number of a copy that leads to another error than `DataError`, to a
    warning, to an error of several lines, or to a slow load.
    """
    refused = 0
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = Path(name) / "data"
        FORMS[form](folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        tinyvit.load_dataset(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            path = files[rng.integers(0, len(files))]
            content = path.read_bytes()
            path.write_bytes(damaged(content, rng))
            start = time.process_time()
            case = f"{form}, seed {seed}, copy {number}, {path.name}"
            text = ""
            try:
                data = tinyvit.load_dataset(folder)
                text = data.description
                assert len(data.train_images) == len(data.train_labels) > 0, case
                assert data.train_labels.max() < data.classes, case
            except DataError as error:
                refused += 1
                text = str(error)
            except Exception as error:
                raise AssertionError(case) from error
            finally:
                path.write_bytes(content)
            assert 0 < len(text) < 1000, f"{case}: {text}"
            assert "\n" not in text, f"{case}: {text}"
            assert time.process_time() - start < MOST_SECONDS, case
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < MOST_MEMORY, f"{form}: the process grew by {grown:,} bytes"
    return refused


if __name__ == "__main__":
    count = int(sys.argv[1])
    for form in FORMS:
        print(f"{form}: {fuzz(form, count):,} of {count:,} damaged copies are refused", flush=True)
