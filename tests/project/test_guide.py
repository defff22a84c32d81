"""The texts of commands and errors that the guide quotes are those of the library."""

import pickle
import re
from pathlib import Path

import numpy as np
import publishers
import pytest
from PIL import Image

import tinyvit
from tinyvit.data import DataError

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide" / "your_own_data.md").read_text(encoding="utf-8")
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (1400, 28, 28)).astype(np.uint8), (np.arange(1400) * 7 + 5) % 10
ARRAYS = IMAGES[:1200], LABELS[:1200], IMAGES[1200:], LABELS[1200:]


def rows(heading, columns):
    """Return the rows of the first table below a heading as lists of cells."""
    text = GUIDE.partition(f"## {heading}\n")[2]
    table = re.search(r"(?m)^\|.*\n\| ---.*\n((?:\|.*\n)+)", text)[1]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert all(len(row) == columns for row in found)
    return found


# ---- refused data ----


def web_page(folder):
    publishers.write_mnist(folder, ARRAYS)
    (folder / "train-images-idx3-ubyte.gz").write_text("<!DOCTYPE html><html>")


def truncated(folder):
    publishers.write_mnist(folder, ARRAYS)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:5000])


def several(folder):
    for split in ("balanced", "digits", "letters"):
        publishers.write_emnist(folder / "gzip", ARRAYS, split)
    return folder / "gzip"


def two_sizes(folder):
    for name, rows in (("a", 28), ("b", 20)):
        (folder / name).mkdir()
        Image.fromarray(IMAGES[0, :rows]).save(folder / name / "1.png")


def archive(folder):
    (folder / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(100))


def pickled(folder):
    (folder / "data_batch_1").write_bytes(pickle.dumps({}, protocol=2))


def standardised(folder):
    np.savez(folder / "x.npz", images=IMAGES / 127.5 - 1, labels=LABELS)


def one_label_less(folder):
    np.savez(folder / "x.npz", images=IMAGES, labels=LABELS[1:])


def no_images(folder):
    (folder / "x.csv").write_text("label,a,b,c\n1,2,3,4\n2,3,4,5\n")


def one_picture(folder):
    Image.fromarray(IMAGES[0]).save(folder / "1.png")
    return folder / "1.png"


REFUSED = {  # the first cells of the table, and what writes such data and returns its path, or None for the folder
    "a web page in place of a file": web_page,
    "an archive": archive,
    "CIFAR's Python version": pickled,
    "a truncated file": truncated,
    "a folder with several data sets": several,
    "pixels from -1 to 1": standardised,
    "pictures of two sizes": two_sizes,
    "one label missing": one_label_less,
    "a label beyond `--classes 5`": lambda folder: publishers.write_mnist(folder, ARRAYS),
    "a CSV file without images": no_images,
    "one picture in place of a folder": one_picture,
}


@pytest.mark.parametrize(("found", "message"), rows("What is refused", columns=2))
def test_the_guide_quotes_the_messages_of_refused_data(found, message, tmp_path):
    tmp_path = tmp_path / "data"  # the folder above has the data of other tests, which the library would advise
    tmp_path.mkdir()
    path = REFUSED[found](tmp_path) or tmp_path
    with pytest.raises(DataError) as caught:
        tinyvit.load_dataset(path, classes=5 if "--classes 5" in found else None)
    text = str(caught.value).replace(f"{tmp_path}/", "")
    # Three dots in the guide stand for a part that is left out.
    parts = [re.escape(part.strip()) for part in message.strip("`").split("...")]
    assert re.search(f"{'.*'.join(parts)}$", text)
    assert "\n" not in text


# ---- descriptions ----


def test_the_guide_quotes_the_descriptions_of_data(tmp_path):
    said = {form.partition(",")[0].partition(":")[0]: text.strip("`") for form, _, text in rows("Forms of data", 3)}
    many = [array if array.ndim == 3 else np.arange(len(array)) % 49 for array in ARRAYS]
    letters = [array if array.ndim == 3 else array % 26 for array in many]
    few = [array[:60] for array in ARRAYS]
    colours = [np.pad(array, ((0, 0), (2, 2), (2, 2))) if array.ndim == 3 else array for array in few]
    colours = [np.stack([array] * 3, axis=3) if array.ndim == 3 else array for array in colours]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    publishers.write_mnist(tmp_path / "fashion", ARRAYS)
    publishers.write_emnist(tmp_path / "letters", letters, "letters")
    publishers.write_qmnist(tmp_path / "qmnist", ARRAYS)
    publishers.write_kuzushiji(tmp_path / "k49", many, prefix="k49")
    publishers.write_table(tmp_path / "csv" / "train.csv", *ARRAYS[:2])
    publishers.write_cifar(tmp_path / "cifar", colours)
    publishers.write_pictures(tmp_path / "pictures", few, names)
    found = {
        "EMNIST": tmp_path / "letters",
        "QMNIST": tmp_path / "qmnist",
        "Kuzushiji's npz": tmp_path / "k49",
        "CSV": tmp_path / "csv",
        "CIFAR-10": tmp_path / "cifar",
        "pictures": tmp_path / "pictures",
        "scikit-learn's digits": "sklearn:digits",
    }
    for form, path in found.items():
        assert tinyvit.load_dataset(path).description == said[form]
    description = tinyvit.load_dataset(tmp_path / "fashion").description  # these images are not Fashion-MNIST's
    assert description == said["idx"].replace("Fashion-MNIST", "Fashion-MNIST by its name")
