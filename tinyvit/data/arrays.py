"""Images and labels of any common form as uint8 images and classes from 0, and a split for testing."""

import math
import unicodedata
from collections import namedtuple

import numpy as np

from tinyvit.data.contents import one_error
from tinyvit.data.mnist import DatasetError

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "t10k": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")  # names in files and folders, and their split
HOLD_OUT = 7  # about one image in seven is for testing if a data set has no test images; MNIST has the same share


# The images and labels of one split in the form of their files, and the names of the files for messages.
Part = namedtuple("Part", "images labels file labels_file")

# A data set in the form of its files: the name of the form, a dict with a `Part` per split ("train", "val", "test"),
# the names of the classes or None, the beginning of the files' names, and a list of texts about conversions.
Found = namedtuple("Found", "kind parts class_names file notes")

# A data set in a folder: the path that names it, the paths of its files, and the function that reads it.
Source = namedtuple("Source", "path files read")


# ---- images ----


def to_images(parts, notes):
    """Return the images of each `Part` as uint8 (N, R, C) or (N, R, C, 3), with one scale for all parts."""
    arrays, (file, *_) = [_shaped(part, notes) for part in parts], [part.file for part in parts]
    for part, array in zip(parts, arrays, strict=True):
        if array.shape[1:] != arrays[0].shape[1:]:
            sizes = ["{} x {} pixels".format(*a.shape[1:]) + " in colour" * (a.ndim == 4) for a in (arrays[0], array)]
            raise DatasetError(part.file, f"images of {sizes[0]} as in {file}", sizes[1])
    low, high = np.min([array.min() for array in arrays]), np.max([array.max() for array in arrays])  # also of NaN
    whole = all(array.dtype.kind != "f" for array in arrays)
    if not 0 <= low <= high <= (65535 if whole and high > 4095 else 255):  # NaN fails too
        expected = "pixels from 0 to 255, from 0 to 1, or of 16 bits"
        raise DatasetError(file, expected, f"pixels from {low:g} to {high:g}: scale them first")
    top = next(top for top in (1, 16, 255, 65535) if high <= top)
    if top != 255 and high > 0:
        notes.append(f"pixels 0 to {top:,} became 0 to 255")
    return [_scaled(array, 1 if top == 255 else 255 / top) for array in arrays]


def _shaped(part, notes):
    """Return images of any common layout as (N, R, C) or (N, R, C, 3)."""
    images, shape = part.images, part.images.shape
    if images.ndim == 2 and (side := square_shape(shape[1])):
        images = images.reshape(-1, *side)
        notes.extend(["red, green and blue of each pixel are side by side"] * (images.ndim == 4))
    elif images.ndim == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        images = np.moveaxis(images, 1, 3)
        notes.append("the axis of the channels became the last one")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype.kind not in "buif" or not images.size or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
        expected = "numbers of shape (N, R, C), (N, R, C, 3) or (N, pixels of a square)"
        raise DatasetError(part.file, expected, f"{images.dtype} of shape {shape}")
    return images


def square_shape(pixels):
    """Return the shape of a square image, grey or RGB, with this number of values, or None if there is none."""
    for channels in ((), (3,)):
        side = math.isqrt(pixels // math.prod(channels))
        if side > 1 and side * side * math.prod(channels) == pixels:
            return (side, side, *channels)
    return None


def _scaled(images, scale):
    """Return images times `scale` as a C-contiguous and writable uint8 array."""
    if images.dtype != np.uint8 or scale != 1:
        images = np.rint(images.astype(np.float32) * np.float32(scale)).astype(np.uint8)
    return np.require(images, requirements=["C", "W"])


# ---- names of classes ----


def readable(name):
    """Return a name in Unicode's form NFC, with "?" for control characters and bytes that are not text."""
    name = unicodedata.normalize("NFC", name)
    return "".join("?" if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char for char in name)


def _different(names):
    """Return readable names, no two of which are equal."""
    texts = {}
    for text in map(readable, names):
        while text in texts:
            text += "?"
        texts[text] = None
    return tuple(texts)


def name_some(classes, class_names):
    """Return the names of the first three of some classes."""
    names = ", ".join(class_names[i] if class_names else str(i) for i in classes[:3])
    return names + f" and {len(classes) - 3} more" * (len(classes) > 3)


# ---- labels ----


def to_classes(parts, classes, family, class_names, notes):
    """Return the labels of each `Part` as classes from 0, the number of classes, and the class names or None.

    `classes` is the number of classes to use, or None for the number that the labels show.
    """
    vectors = [_vector(part, notes) for part in parts]
    values = np.unique(np.concatenate(vectors))
    words = values.dtype.kind == "U"
    low, high = (0, len(values) - 1) if words else (int(values[0]), int(values[-1]))
    class_names = family.class_names if family else class_names
    first = family.first if family else int(low == 1 and not class_names and classes in (None, high))
    number = classes or len(class_names or ()) or high + 1 - first
    if classes is None:
        sparse = low < 0 or 2 * len(values) < number
    else:
        sparse = classes == len(values) and (low < 0 or high >= first + number)
    if words or (sparse and not class_names):  # the labels are names of classes, and not their positions
        class_names, number = tuple(map(str, values)), classes or len(values)
        if not words:
            notes.append(f"labels {', '.join(class_names[:3])}{', ...' * (number > 3)} became 0 to {number - 1}")
        vectors, first = [np.searchsorted(values, vector) for vector in vectors], 0
    elif first:
        notes.append(f"labels {first} to {first + number - 1} became 0 to {number - 1}")
        class_names = class_names or tuple(str(value + first) for value in range(number))
    for part, vector in zip(parts, vectors, strict=True):
        wrong = np.flatnonzero((vector < first) | (vector >= first + number))
        if wrong.size:
            needed = "" if low < first else f": {high + 1 - first} classes fit all labels"
            found = f"{vector[wrong[0]]} at position {wrong[0]}{needed}"
            raise DatasetError(part.labels_file, f"labels from {first} to {first + number - 1}", found)
    if number < 2:
        raise DatasetError(next(iter(parts)).labels_file, "labels of at least two classes", f"only {values[0]}")
    labels = [(vector - first).astype(np.uint8 if number <= 256 else np.int32) for vector in vectors]
    if class_names and len(class_names) != number:
        class_names = None
    class_names = class_names and _different(class_names)
    if missing := np.setdiff1d(np.arange(number), np.concatenate(labels)).tolist():
        notes.append(f"no images of {name_some(missing, class_names)}")
    return labels, number, class_names


def are_sorted(labels):
    """Return whether images are sorted by class, and show more than one."""
    return (labels[1:] >= labels[:-1]).all() and labels[0] != labels[-1]


def _vector(part, notes):
    """Return the labels of a `Part` as int64 or str of shape (N,)."""
    labels, numbers = part.labels, part.labels.dtype.kind in "buif"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and numbers and np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
        labels = labels.argmax(axis=1)
        notes.append("one-hot labels became integers")
    if labels.shape != part.images.shape[:1]:
        expected = f"{len(part.images)} labels, one per image of {part.file}, as (N,), (N, 1) or one-hot (N, classes)"
        raise DatasetError(part.labels_file, expected, f"shape {labels.shape}")
    if labels.dtype.kind in "SU":
        texts, places = np.unique(labels, return_inverse=True)
        with one_error(part.labels_file, "labels in UTF-8"):
            texts = np.char.decode(texts, "utf-8") if labels.dtype.kind == "S" else texts
        return np.array([unicodedata.normalize("NFC", text) for text in texts.tolist()])[places]
    if not numbers or not (np.abs(labels.astype(float)) < 2**31).all() or (labels % 1).any():
        raise DatasetError(part.labels_file, "integers or words as labels", f"{labels.dtype} such as {labels[:3]}")
    if labels.dtype.kind == "f":
        notes.append("whole float labels became integers")
    return labels.astype(np.int64)


def hold_out(labels, rng):
    """Return the indices of images for training and of images for testing, both in random order.

    Of each class about one image in seven is for testing, and at least one if it has two.
    """
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    ranks = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    chosen = np.zeros(len(labels), bool)
    chosen[by_class[ranks % HOLD_OUT == 1]] = True
    return order[~chosen[order]], order[chosen[order]]
