"""Data sets in CSV files with one image per row, as Kaggle and OpenML have them."""

import contextlib
import csv
import io
import os
import re
from collections import namedtuple
from functools import partial

import numpy as np

from tinyvit.data.arrays import Found, Part, Source, square_shape, to_images
from tinyvit.data.contents import name_content, one_error, read_content
from tinyvit.data.mnist import DatasetError

NAME = re.compile(r".*\.(csv|tsv|tra|tes)(\.gz)?", re.IGNORECASE)  # .tra is UCI's optdigits
IDS = ("id", "imageid", "image_id", "index", "unnamed: 0", "")

# The images of a CSV file, its labels or None, and the name and the cells of its column of ids, or None twice.
Table = namedtuple("Table", "images labels id_name ids")


def find_tables(folder, paths):
    """Return a `Source` for each CSV file of a folder that is for training, or for the only one."""
    files = [path for path in paths if NAME.fullmatch(path) and os.path.isfile(path)]
    tests = [re.sub(r"\.tra$", ".tes", re.sub(r"train(ing)?(?=[^/\\]*$)", "test", path)) for path in files]
    pairs = [pair for pair in zip(files, tests, strict=True) if pair[0] != pair[1]]
    pairs = [tuple(path for path in pair if path in files) for pair in pairs or [files] * (len(files) == 1)]
    return [Source(pair[0], pair, partial(read_tables, *pair)) for pair in pairs]


def read_tables(train, test=None):
    """Return the `Found` of a CSV file for training and perhaps of one for testing."""
    table = read_table(train)
    if table.labels is None:
        found = "only pixels: to classify them, use tinyvit predict FILE --csv OUT"
        raise DatasetError(train, 'a column "label"', found)
    parts, notes = {"train": Part(*table[:2], train, train)}, []
    if test and (table := read_table(test)).labels is not None:
        parts["test"] = Part(*table[:2], test, test)
    elif test:
        notes.append(f"{os.path.basename(test)} has no labels")
    return Found("CSV file", parts, None, os.path.basename(train), notes)


def read_unlabelled(file):
    """Return the images of a CSV file as uint8, and the name and cells of its column of ids or None."""
    table = read_table(file)
    (images,) = to_images([Part(table.images, None, file, file)], [])
    return images, table.id_name, table.ids


def read_table(file):
    """Return the `Table` of a CSV file with one image per row, with or without a header."""
    content, file = read_content(file), str(file)
    if name := name_content(content):
        raise DatasetError(file, "a CSV file", name)
    with one_error(file, "a CSV file"):
        text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors="replace")
        lines = [text.readline() for _ in range(100)]
        delimiter = max(",;\t", key=lines[0].count)
        cells = [[cell.strip() for cell in row] for row in csv.reader(filter(str.strip, lines), delimiter=delimiter)]
        numbers = [number for cell in cells[0] if (number := _numbers(cell)) is not cell]
        named = len(numbers) < len(cells[0]) - 1 or set(np.diff(numbers)) == {1}  # words, or a row that counts pixels
        if len(cells) == named:
            raise DatasetError(file, "rows of pixels", "only a header")
        ids, labels, pixels = _columns(cells[0] if len(numbers) < len(cells[0]) and named else [], cells[named:], file)
        text.seek(0)
        codes = {}  # the cells of ids and labels, which may be words, and a number for each
        convert = dict.fromkeys(ids + labels, lambda cell: codes.setdefault(cell.strip(), len(codes)))
        load = partial(np.loadtxt, delimiter=delimiter, skiprows=int(named), comments=None, quotechar='"', ndmin=2)
        try:
            rows = load(text, dtype=np.int32, converters=convert)  # ten times as fast as floats
        except ValueError:
            text.seek(0)
            rows = load(text, dtype=np.float64, converters=convert)
        if not rows.size or rows.shape[1] != len(cells[0]):
            raise DatasetError(file, f"rows of {len(cells[0])} columns", f"an array of shape {rows.shape}")
        texts = np.array(list(codes))
        labels, id_cells = (texts[rows[:, column[0]].astype(int)] if column else None for column in (labels, ids))
        images = rows[:, pixels[0] : pixels[-1] + 1] if pixels[-1] - pixels[0] < len(pixels) else rows[:, pixels]
    return Table(images, _numbers(labels), cells[0][ids[0]] if ids else None, id_cells)


def _columns(header, cells, file):
    """Return three lists of column indices, of ids, labels and pixels, from the header and the first rows."""
    count, ids, labels = len(header or cells[0]), [], []
    if header:
        ids = [i for i, name in enumerate(header) if name.lower() in IDS]
        labels = [i for i, name in enumerate(header) if i not in ids and not any(map(str.isdigit, name))]
    elif not square_shape(count):
        firsts, lasts = ({row[i] for row in cells if row} for i in (0, -1))
        labels = [count - 1 if len(firsts) == 1 < len(lasts) else 0]  # a pixel in a corner is mostly constant
    pixels = [i for i in range(count) if i not in ids + labels]
    if max(len(ids), len(labels)) > 1 or not square_shape(len(pixels)):
        names = ", ".join(" ".join(name.split())[:20] for name in header[:8]) + ", ..." * (count > 8)
        names = f"columns {names}" if header else "columns without names"
        raise DatasetError(file, 'a column "label" and one column per pixel of a square image', f"{count} {names}")
    return ids, labels, pixels


def _numbers(cells):
    """Return texts as numbers if all of them are numbers, and otherwise unchanged."""
    for kind in (int, float) if cells is not None else ():
        with contextlib.suppress(ValueError, OverflowError):
            return np.asarray(cells).astype(kind)
    return cells
