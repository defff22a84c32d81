"""MNIST, which comes with the package, and any data set that is published in the same form.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86(11), 1998, section III.A. What is in the files: tinyvit/data/mnist/README.md.
"""

import hashlib
import importlib.resources
import io
import os
from dataclasses import dataclass

import numpy as np

from tinyvit.data.idx import DataError, read_idx

# Of the files as they are stored, still compressed.
SHA256 = {
    "train-images-idx3-ubyte.gz": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte.gz": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    "t10k-images-idx3-ubyte.gz": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte.gz": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
}


class DatasetError(DataError):
    """Files are missing, are not the ones that were published, or do not make up a data set together."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled grey-scale images, split for training and testing."""

    train_images: np.ndarray  # (N, S, S) uint8, 0 is background
    train_labels: np.ndarray  # (N,) uint8, in 0 .. classes - 1
    test_images: np.ndarray  # (M, S, S) uint8
    test_labels: np.ndarray  # (M,) uint8
    classes: int
    name: str
    source: str  # the folder that was read

    def __repr__(self):
        def split(images):
            return "{:,} images of {} x {}".format(*images.shape)

        return (
            f"ImageDataset({self.name}: {split(self.train_images)} to train on, "
            f"{split(self.test_images)} to test on, {self.classes} classes)"
        )


def load_mnist(data_dir=None, classes=10):
    """Load MNIST, or a data set in the form of MNIST such as Fashion-MNIST or KMNIST.

    data_dir: folder with the four idx files under their usual names, `train-images-idx3-ubyte` or
        `train-images.idx3-ubyte`, raw or with `.gz`, and so on. Where there are several, that order decides:
        the name with the hyphen before the name with the dot, and of each the raw file before the packed one.
        None: the copy of MNIST inside the package, 60,000 + 10,000 images of 28 x 28, checked by SHA-256.
    classes: the labels must lie in 0 .. classes - 1.

    Returns an ImageDataset of uint8 arrays, C-contiguous and writable.

    Raises DataError: IdxError on a file that is not sound idx, DatasetError on missing or altered files and
    on arrays that do not belong together.
    """
    if data_dir is None:
        folder = importlib.resources.files("tinyvit.data") / "mnist"
        name, load = "MNIST", _load_embedded
    else:
        folder = os.path.abspath(os.fsdecode(data_dir))
        name, load = os.path.basename(folder), _load_from
        if not os.path.isdir(folder):
            raise DatasetError(folder, "a folder with idx files", "no such folder")

    train_images, train_labels, train_file = _load_split(load, folder, "train", classes)
    test_images, test_labels, test_file = _load_split(load, folder, "t10k", classes)
    if train_images.shape[1:] != test_images.shape[1:]:
        expected = f"images of {_size(train_images)} as in {train_file}"
        raise DatasetError(test_file, expected, _size(test_images))
    return ImageDataset(train_images, train_labels, test_images, test_labels, classes, name, str(folder))


def _load_split(load, folder, split, classes):
    """One split's images and labels, checked against each other, and the path of the images for messages."""
    images, images_file = load(folder, f"{split}-images", rank=3)
    if not images.size:
        raise DatasetError(images_file, "at least one image of at least one pixel", f"shape {images.shape}")
    if images.shape[1] != images.shape[2]:
        raise DatasetError(images_file, "square images", _size(images))

    labels, labels_file = load(folder, f"{split}-labels", rank=1)
    if len(labels) != len(images):
        expected = f"{len(images)} labels, one for each image of {images_file}"
        raise DatasetError(labels_file, expected, len(labels))
    wrong = np.flatnonzero(labels >= classes)
    if wrong.size:
        found = f"{labels[wrong[0]]} at position {wrong[0]}"
        raise DatasetError(labels_file, f"labels from 0 to {classes - 1}", found)
    return images, labels, images_file


def _load_embedded(folder, stem, rank):
    """An array from the package itself, which may be a zip archive, so that there may be no path to open."""
    file = folder / f"{stem}-idx{rank}-ubyte.gz"
    try:
        packed = file.read_bytes()
    except OSError as error:
        found = f"{error.strerror or error}: reinstall tinyvit"
        raise DatasetError(file, "a part of MNIST inside the package", found) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256[file.name]:
        raise DatasetError(file, f"SHA-256 {SHA256[file.name]}", f"{found}: reinstall tinyvit")
    return read_idx(io.BytesIO(packed)), str(file)


def _load_from(folder, stem, rank):
    """An array from whichever of the usual names the folder has."""
    names = [f"{stem}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    # Only files: some archives hold a folder with the first name beside a file with the second.
    file = next((path for name in names if os.path.isfile(path := os.path.join(folder, name))), None)
    if file is None:
        raise DatasetError(folder, f"one of {', '.join(names)}", "none of them")
    array = read_idx(file)
    if array.dtype != np.uint8 or array.ndim != rank:
        found = f"{array.dtype} of rank {array.ndim}"
        raise DatasetError(file, f"{stem} as uint8 of rank {rank}", found)
    return array, file


def _size(images):
    return f"{images.shape[1]} x {images.shape[2]} pixels"
