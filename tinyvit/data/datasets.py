"""One function that loads data sets of many forms: idx, npz, CSV and CIFAR files, and folders of pictures."""

import contextlib
import glob
import os
import re
from functools import partial

import numpy as np

from tinyvit.data.arrays import Found, Part, are_sorted, hold_out, name_some, readable, to_classes, to_images
from tinyvit.data.binaries import find_cifar, find_npz, find_quartets, find_raw
from tinyvit.data.contents import content_of, is_file, listing, visible
from tinyvit.data.families import family_of
from tinyvit.data.folders import SUFFIXES, find_folders
from tinyvit.data.idx import DataError
from tinyvit.data.mnist import DatasetError, ImageDataset, load_mnist
from tinyvit.data.tables import find_tables, read_tables

FINDERS = (find_quartets, find_cifar, find_npz, find_tables, find_raw, find_folders)
DIGITS = "sklearn:digits"
SUPPORTED = "a data set: idx, npz, CSV or CIFAR's .bin files, or one sub-folder of pictures per class, at least two"


def load_dataset(
    path: str | os.PathLike[str] | None = None, classes: int | None = None, seed: int = 0
) -> ImageDataset:
    """Load a data set of any supported form, which is recognised by its files.

    Parameters
    ----------
    path : path, optional
        Folder or file. If a folder has several data sets, one of their files, or the beginning of the files' names
        such as ``gzip/emnist-letters``. ``sklearn:digits`` is the data set of scikit-learn. The default is MNIST.
    classes : int, optional
        Number of classes. The default is that of the published data set, or the number that the labels show.
    seed : int, default 0
        Seed of the split, if there are no labelled test images, and of the order of images that are sorted by class.

    Returns
    -------
    ImageDataset
        Images and labels, in C-contiguous and writable arrays. Its `description` says what was found and converted.

    Raises
    ------
    DataError
        If there is no data set, or several, or its files are damaged or do not fit each other.

    Notes
    -----
    The forms are idx files of MNIST's family (EMNIST's images are transposed back), npz files (Keras, MedMNIST,
    Kuzushiji), CSV files with one image per row, CIFAR's binary files, and folders of pictures.
    """
    if path is None:
        return load_mnist(classes=10 if classes is None else classes)
    path = os.fsdecode(path)
    source, read = (path, _digits) if path == DIGITS else _source(os.path.abspath(os.path.expanduser(path)))
    return _dataset(read(), source, classes, np.random.default_rng(seed))


def _source(path):
    """Return the path that names the data set at `path`, and the function that reads it."""
    if os.path.isdir(path):
        choices = _choices(path)
        if not choices:
            raise DatasetError(path, SUPPORTED, listing(path) + _advice(path))
        if len(choices) > 1 and _can_read(choices):
            names = ", ".join(choice.path for choice in choices)
            raise DatasetError(path, "one data set", f"{len(choices)}: give one of {names}")
        return choices[0].path, choices[0].read
    folder = os.path.dirname(path)
    paths = visible(folder) if os.path.isdir(folder) else []
    for find in FINDERS[:-1]:
        for choice in find(folder, paths):
            if find is find_tables and path in choice.files and path != choice.path:
                return choice.path, partial(choice.read, labelled=path)
            if path == choice.path or path in choice.files:
                return choice.path, choice.read
    if not is_file(path):
        found = f"no such file or folder beside {listing(folder)}" if paths else "no such file or folder"
        raise DatasetError(path, "a folder or a file with a data set", found)
    content = "a picture: give the folder of the classes" if path.lower().endswith(SUFFIXES) else content_of(path)
    if content:
        raise DatasetError(path, SUPPORTED, content)
    return path, partial(read_tables, path)


def _choices(folder):
    """Return a list of `Source` for the data sets of a folder, all of the first form that it has.

    A table without images, such as a list of files and labels, does not hide another form.
    """
    paths = visible(folder)
    found = filter(None, (find(folder, paths) for find in FINDERS))
    choices = next(found, [])
    is_table = choices and choices[0].read.func is read_tables
    others = next(found, []) if is_table else []
    return others if others and not _can_read(choices) else choices


def _can_read(choices):
    """Return whether one of the data sets can be read."""
    for choice in choices:
        with contextlib.suppress(DataError):
            choice.read()
            return True
    return False


def _advice(folder):
    """Return the end of a message that names the data sets in folders below or above, if there are any."""
    for pattern in ("*", "*/*", ".."):
        with contextlib.suppress(DataError):  # a folder nearby that cannot be read
            places = sorted(filter(os.path.isdir, glob.glob(os.path.join(glob.escape(folder), pattern))))[:50]
            near = [choice.path for place in places for choice in _choices(os.path.abspath(place))]
            if names := [path for path in near if os.path.commonpath([path, folder]) in (path, folder)]:
                return f": give {' or '.join(names[:6])}"
    return ""


def _digits():
    """Return the `Found` of scikit-learn's digits: 1,797 images of 8 x 8 pixels from 0 to 16."""
    from sklearn.datasets import load_digits  # imported here because it takes half a second

    part = Part(*load_digits(return_X_y=True), DIGITS, DIGITS)
    return Found("scikit-learn's digits", {"train": part}, tuple("0123456789"), file="", notes=[])


def _dataset(found, path, classes, rng):
    """Return the `ImageDataset` of a `Found`, whose images and labels have any supported form."""
    kind, parts, class_names, file, notes = found
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        notes.append("the validation images are for testing")
    images = to_images(parts.values(), notes)
    place = os.path.dirname(path) if re.fullmatch(r"(?i)raw|train\..*", os.path.basename(path)) else path
    name = re.sub(r"(?i)\.(npz|csv|tsv|tra)(\.gz)?$", "", os.path.basename(place).removeprefix("sklearn:"))
    numbered = class_names is None and parts["train"].labels.dtype.kind in "buif"
    family = family_of(file, name, images[-1], parts["train"].labels) if numbered else None
    if family:
        kind = family.kind + ", transposed back" * family.transposed
        images = [np.ascontiguousarray(array.swapaxes(1, 2)) if family.transposed else array for array in images]
    labels, classes, class_names = to_classes(parts.values(), classes, family, class_names, notes)
    data = dict(zip(parts, zip(images, labels, strict=True), strict=True))
    images, labels = data["train"]
    if "test" not in data:
        train, test = hold_out(labels, rng)
        data = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
        notes.append("about one image in seven is for testing")
        if not len(test):
            raise DatasetError(path, "at least two images of a class, one for testing", f"{len(labels)} images")
    elif shuffled := [split for split in ("train", "val", "test") if split in data and are_sorted(data[split][1])]:
        for split in shuffled:
            order = rng.permutation(len(data[split][1]))
            data[split] = tuple(array[order] for array in data[split])
        notes.append("images that were sorted by class are in random order")
    validation = len(data["val"][1]) if "val" in data else 0
    if validation:
        data["train"] = tuple(map(np.concatenate, zip(data["train"], data["val"], strict=True)))
        notes.append(f"its {validation:,} validation images are the last training images")
    if unseen := np.setdiff1d(data["test"][1], data["train"][1]).tolist():
        notes.append(f"no training images of {name_some(unseen, class_names)}, but test images")
    shown = f" {class_names[0]} to {class_names[-1]}" if class_names else ""
    description = " ".join(", ".join([kind, f"{classes} classes{shown}", *dict.fromkeys(notes)]).split())
    texts = readable(name), path, class_names, readable(description)
    return ImageDataset(*data["train"], *data["test"], classes, *texts, validation)
