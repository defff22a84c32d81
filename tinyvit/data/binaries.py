"""Data sets of idx, npz and CIFAR files.

CIFAR's binary files have records of one label, or of two for CIFAR-100 (coarse and fine), and 32 x 32 bytes each of
red, green and blue.

References
----------
.. [1] A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import math
import os
import re
import zipfile
from functools import partial
from itertools import chain

import numpy as np

from tinyvit.data.arrays import SPLITS, Found, Part, Source
from tinyvit.data.contents import is_file, listing, most_bytes, one_error, read_content, visible
from tinyvit.data.idx import DataError, read_at_most, read_idx
from tinyvit.data.mnist import DatasetError

# Four files with one array each. Kuzushiji-MNIST has npz files with the word "imgs".
NAME = re.compile(
    r"(?P<set>.*?)(?P<split>train|t10k|test)-(?P<what>images|imgs|labels)([-.]idx\d-[a-z]+(\.gz)?|\.npz)"
)
# An array in an npz file, such as x_train, train_images or labels.
SPLIT = "|".join(SPLITS)
ARRAY = re.compile(rf"({SPLIT})?_?(?:(x|images?|imgs?|data|features)|y|labels?|targets?)_?({SPLIT})?")
CIFAR_PIXELS = 3 * 32 * 32
CIFAR = {  # kind: labels per record, training files and the test file, class names
    "CIFAR-10": (1, [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], "batches.meta.txt"),
    "CIFAR-100": (2, ["train.bin", "test.bin"], "fine_label_names.txt"),
}


def find_quartets(folder, paths):
    """Return a `Source` for each data set of four files in a folder."""
    sets = {}
    for path in filter(is_file, paths):
        if match := NAME.fullmatch(os.path.basename(path)):
            role = SPLITS[match["split"]], match["what"].replace("imgs", "images")
            sets.setdefault(match["set"], {}).setdefault(role, []).append(path)
    sources = []
    for prefix, roles in sets.items():
        name = os.path.join(folder, prefix.rstrip("-_")) if prefix else folder
        sources.append(Source(name, tuple(chain(*roles.values())), partial(_read_quartet, folder, prefix, roles)))
    return sources


def find_raw(folder, paths):
    """Return a `Source` for each data set of four files in the sub-folders "raw" and NAME/raw of torchvision."""
    raws = [os.path.join(path, "raw") for path in (folder, *paths)]
    return [choice for raw in raws if os.path.isdir(raw) for choice in find_quartets(raw, visible(raw))]


def _read_quartet(folder, prefix, roles):
    """Return the `Found` of the files with a prefix. `roles` has a list of copies for each split and "images"."""
    names = [os.path.basename(path) for path in chain(*roles.values())]
    found = Found("npz files" if names[0].endswith(".npz") else "idx files", {}, None, prefix, notes=[])
    for split in ("train", "test"):
        for what in ("images", "labels"):
            if (split, what) not in roles:
                raise DatasetError(folder, f"also a file with the {split} {what} beside {names[0]}", listing(folder))
        images, file = _read_intact(roles[split, "images"], found.notes)
        labels, labels_file = _read_intact(roles[split, "labels"], found.notes)
        if labels.ndim == 2 and labels.shape[1] == 8 and labels.max(initial=0) > 1:
            labels = labels[:, 0]  # QMNIST's extended labels, which begin with the class
        found.parts[split] = Part(images, labels, file, labels_file)
    return found


def _read_intact(copies, notes):
    """Return the array of the first copy that is intact, and its path. Raw files with a dash come first."""
    *others, last = sorted(copies, key=lambda path: (".idx" in path, path.endswith(".gz"), path))
    for path in others:
        try:
            return _read_array(path), path
        except DataError as error:
            notes.append(f"another copy is read, because this one is damaged: {error}")
    return _read_array(last), last


def _read_array(path):
    """Return the array of an idx file, or of an npz file with one array."""
    if not path.endswith(".npz"):
        return read_idx(path, most_bytes(path))
    arrays = list(read_npz(path).values())
    if len(arrays) != 1:
        raise DatasetError(path, "one array", f"{len(arrays)}")
    return arrays[0]


def find_npz(folder, paths):
    """Return a `Source` for each npz file of a folder."""
    return [Source(path, (path,), partial(_read_npz, path)) for path in paths if path.lower().endswith(".npz")]


def _read_npz(file):
    """Return the `Found` of a file with images and labels under one of the usual names."""
    arrays, splits = read_npz(file), {"train": {}, "val": {}, "test": {}}
    for name, array in arrays.items():
        if match := ARRAY.fullmatch(name.lower()):
            before, images, after = match.groups()
            splits[SPLITS[before or after or "train"]]["images" if images else "labels"] = array
    parts = {split: Part(**pair, file=file, labels_file=file) for split, pair in splits.items() if len(pair) == 2}
    if "train" not in parts:
        names = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no .npy files"
        raise DatasetError(file, "arrays x_train, y_train, x_test and y_test, or images and labels", names)
    notes = [f"the {split} images have no labels" for split, pair in splits.items() if [*pair] == ["images"]]
    return Found("npz file", parts, None, os.path.basename(file), notes)


def read_npz(file):
    """Return the arrays of an npz file by their names.

    No array is allocated for a size that only a header states, and nothing is unpickled.
    """
    with one_error(file, "an intact npz file"), zipfile.ZipFile(file) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        size, limit = sum(info.file_size for info in members), most_bytes(file)
        if size > limit:
            raise DatasetError(file, f"at most {limit:,} bytes of arrays for the size of the file", f"{size:,}")
        return {info.filename.removesuffix(".npy"): _read_member(archive, info) for info in members}


def _read_member(archive, info):
    """Return the array of one member of an npz file."""
    name = f"{archive.filename}, array {info.filename[:-4][:20]}"
    with archive.open(info) as stream:
        old = np.lib.format.read_magic(stream) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
        if dtype.hasobject:
            raise DatasetError(name, "an array of numbers", "pickled Python objects, which can run any code")
        expected = math.prod(shape) * dtype.itemsize
        content = read_at_most(stream, min(expected, info.file_size) + 1)
    if len(content) != expected or min(shape, default=0) < 0:
        raise DatasetError(name, f"{expected} bytes for shape {shape} of {dtype}", len(content))
    return np.ndarray(shape, dtype, buffer=content, order="F" if fortran_order else "C")


def find_cifar(folder, paths):
    """Return a `Source` for the binary version of CIFAR-10 or CIFAR-100 in a folder."""
    for kind, (_, names, _) in CIFAR.items():
        files = tuple(os.path.join(folder, name) for name in names)
        if files[0] in paths:
            return [Source(folder, files, partial(_read_cifar, folder, kind, files))]
    return []


def _read_cifar(folder, kind, files):
    """Return the `Found` of CIFAR's binary files. Without the file of class names the classes have none."""
    label_bytes, parts, meta = CIFAR[kind][0], {}, os.path.join(folder, CIFAR[kind][2])
    class_names = read_content(meta).decode("utf-8", "replace").split() if os.path.exists(meta) else ()
    for split, (file, *others) in (("train", files[:-1]), ("test", files[-1:])):
        content = b"".join(map(read_content, (file, *others)))
        if not content or len(content) % (label_bytes + CIFAR_PIXELS):
            raise DatasetError(file, f"records of {label_bytes + CIFAR_PIXELS} bytes", f"{len(content)} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + CIFAR_PIXELS)
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[split] = Part(images, records[:, label_bytes - 1], file, file)
    return Found(kind, parts, tuple(class_names) or None, file="", notes=[])
