"""MNIST, which comes with the package, and other data sets in the same format.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86(11), 1998, section III.A. tinyvit/data/mnist/README.md describes the files.
"""

import hashlib
import importlib.resources
import io
import os
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from tinyvit.data.idx import DataError, read_idx

# The checksums are those of the compressed files.
SHA256 = {
    "train-images-idx3-ubyte.gz": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte.gz": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    "t10k-images-idx3-ubyte.gz": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte.gz": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
}


class DatasetError(DataError):
    """Error for files that are missing or altered, or that do not form a data set together.

    Parameters
    ----------
    file : path or str
        Name of the file or the folder.
    expected : object
        Description of what was expected.
    found : object
        Description of what was found.
    """


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images for training and for testing.

    Parameters
    ----------
    train_images : ndarray of shape (N, R, C) or (N, R, C, 3)
        Training images, uint8, grey or RGB.
    train_labels : ndarray of shape (N,)
        Integer labels of the training images from 0 to ``classes - 1``, uint8, or int32 for more than 256 classes.
    test_images : ndarray of shape (M, R, C) or (M, R, C, 3)
        Test images, uint8.
    test_labels : ndarray of shape (M,)
        Integer labels of the test images.
    classes : int
        Number of classes.
    name : str
        Name of the data set.
    source : str
        Path that loads the data set again, such as the folder of the files.
    class_names : tuple of str, optional
        Name of each class, or None if the names are unknown.
    description : str, optional
        What was found and how it was converted, in one line.
    validation : int, default 0
        Number of images at the end of the training images that the data set has for validation.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    name: str
    source: str
    class_names: tuple[str, ...] | None = None
    description: str = ""
    validation: int = 0

    def __repr__(self):
        def split(images):
            return f"{len(images):,} images of {' x '.join(map(str, images.shape[1:]))}"

        return (
            f"ImageDataset({self.name}: {split(self.train_images)} to train on, "
            f"{split(self.test_images)} to test on, {self.classes} classes)"
        )


def load_mnist(data_dir: str | PathLike[str] | None = None, classes: int = 10) -> ImageDataset:
    """Load MNIST, or a data set in the same format such as Fashion-MNIST or KMNIST.

    Parameters
    ----------
    data_dir : path, optional
        Folder with the four idx files. The default is the copy of MNIST inside the package, which has 60,000 training
        images and 10,000 test images of 28 x 28 pixels.
    classes : int, default 10
        Number of classes. Labels must be from 0 to ``classes - 1``.

    Returns
    -------
    ImageDataset
        Images and labels, in C-contiguous and writable arrays.

    Raises
    ------
    IdxError
        If a file is not a valid idx file.
    DatasetError
        If a file is missing, MNIST inside the package is altered, or the arrays do not form a data set.

    Notes
    -----
    The files have the usual names. For example, the training images are in the first of these files that exists:
    ``train-images-idx3-ubyte``, ``train-images-idx3-ubyte.gz``, ``train-images.idx3-ubyte`` and
    ``train-images.idx3-ubyte.gz``.
    """
    if data_dir is None:
        folder: Any = importlib.resources.files("tinyvit.data") / "mnist"
        name, load = "MNIST", _load_embedded
    else:
        folder = os.path.abspath(os.fsdecode(data_dir))
        name, load = os.path.basename(folder), _load_from
        if not os.path.isdir(folder):
            raise DatasetError(folder, "a folder with idx files", "no such folder")

    train_images, train_labels, train_file = _load_split(load, folder, split="train", classes=classes)
    test_images, test_labels, test_file = _load_split(load, folder, split="t10k", classes=classes)
    if train_images.shape[1:] != test_images.shape[1:]:
        expected = f"images of {_size(train_images)} as in {train_file}"
        raise DatasetError(test_file, expected, _size(test_images))
    class_names = tuple("0123456789") if data_dir is None and classes == 10 else None
    return ImageDataset(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=classes,
        name=name,
        source=str(folder),
        class_names=class_names,
        description=f"{'idx files' if data_dir else 'MNIST'}, {classes} classes{' 0 to 9' if class_names else ''}",
    )


def _load_split(load, folder, split, classes):
    """Return the images and labels of one split and, for messages, the path of the images."""
    images, images_file = load(folder, f"{split}-images", rank=3)
    if not images.size:
        raise DatasetError(images_file, "at least one image of at least one pixel", f"shape {images.shape}")
    if images.shape[1] != images.shape[2]:
        raise DatasetError(images_file, "square images", _size(images))

    labels, labels_file = load(folder, f"{split}-labels", rank=1)
    if len(labels) != len(images):
        expected = f"{len(images)} labels, one per image of {images_file}"
        raise DatasetError(labels_file, expected, len(labels))
    wrong = np.flatnonzero(labels >= classes)
    if wrong.size:
        found = f"{labels[wrong[0]]} at position {wrong[0]}"
        raise DatasetError(labels_file, f"labels from 0 to {classes - 1}", found)
    return images, labels, images_file


def _load_embedded(folder, stem, rank):
    """Return an array and its path. The package may be in a zip archive, where a path cannot be opened."""
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
    """Return an array and its path, from the first file of the folder with one of the usual names."""
    names = [f"{stem}{separator}idx{rank}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    # Folders are ignored, because some archives have a folder with the first name and a file with the second.
    file = next((path for name in names if os.path.isfile(path := os.path.join(folder, name))), None)
    if file is None:
        found = ", ".join(sorted(os.listdir(folder))[:8]) or "an empty folder"
        raise DatasetError(folder, f"one of {', '.join(names)}", f"none of them, but {found}")
    array = read_idx(file)
    if array.dtype != np.uint8 or array.ndim != rank:
        found = f"{array.dtype} of rank {array.ndim}"
        raise DatasetError(file, f"{stem} as uint8 of rank {rank}", found)
    return array, file


def _size(images):
    return f"{images.shape[1]} x {images.shape[2]} pixels"
