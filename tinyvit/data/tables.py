"""Data sets in CSV files with one image per row, as Kaggle and OpenML have them."""

import csv
import os
import re
from functools import partial

import numpy as np

from tinyvit.data.arrays import Found, Part, Source, square_shape
from tinyvit.data.contents import content_of, is_file, one_error, read_content
from tinyvit.data.mnist import DatasetError

NAME = re.compile(r".*\.(csv|tsv|tra|tes)(\.gz)?", re.IGNORECASE)  # .tra is UCI's optdigits
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)
SAMPLE = 100  # rows that show the columns
IDS = ("id", "imageid", "image_id", "index", "unnamed: 0", "")


def find_tables(folder, paths):
    """Return a `Source` for each CSV file of a folder that is for training, or for the only one."""
    files = {os.path.basename(path).lower(): path for path in paths if NAME.fullmatch(path) and is_file(path)}
    tests = {name: re.sub(r"\.tra$", ".tes", re.sub("train(ing)?", "test", name)) for name in files}
    pairs = [pair for pair in tests.items() if pair[0] != pair[1]] or [tuple(files)] * (len(files) == 1)
    pairs = [tuple(files[name] for name in pair if name in files) for pair in pairs]
    return [Source(pair[0], pair, partial(read_tables, *pair)) for pair in pairs]


def read_tables(train, test=None, labelled=None):
    """Return the `Found` of a CSV file for training and perhaps of one for testing.

    The file for training must have labels, and so must the file `labelled`.
    """
    parts, notes = {"train": read_table(train)} | ({"test": read_table(test)} if test else {}), []
    for part in parts.values():
        if part.labels is None and part.file in (train, labelled):
            found = "only pixels: to classify them, use tinyvit predict FILE --csv OUT"
            raise DatasetError(part.file, 'a column "label"', found)
    if test and parts["test"].labels is None:
        del parts["test"]
        notes.append(f"{os.path.basename(test)} has no labels")
    return Found("CSV file", parts, None, os.path.basename(train), notes)


def read_table(file):
    """Return the `Part` of a CSV file with one image per row, with or without a header and labels."""
    content = read_content(file)
    if found := content_of(file) or "binary content" * bool(re.search(rb"[\0-\x08\x0e-\x1f]", content[:4096])):
        raise DatasetError(file, "a CSV file", found)
    with one_error(file, "a CSV file saved as UTF-8"):
        lines = [*filter(str.strip, content.decode("utf-8-sig").splitlines())] or ["empty"]
        delimiter = max(",;\t", key=lines[0].count)
        cells = [[cell.strip() for cell in row] for row in csv.reader(lines[:SAMPLE], delimiter=delimiter)]
        if _is_made_unique(cells):
            cells[0] = [re.sub(r"^([0-9]+)\.[0-9]+$", r"\1", cell) for cell in cells[0]]
            lines[0] = delimiter.join(cells[0])
        count, numbers = len(cells[0]), [float(cell) for cell in cells[0] if NUMBER.fullmatch(cell)]
        # A header has words, or it numbers the pixels.
        header = len(numbers) < count - 1 or numbers[1:] == [number + 1 for number in numbers[:-1]] != []
        names = cells[0] if header and len(numbers) < count else []
        label, pixels = _columns(names, cells[header:], file)
        words = {}  # the labels and other cells that may be words, with a number for each
        convert = {i: lambda cell: words.setdefault(cell.strip(), len(words)) for i in {*range(count)} - {*pixels}}
        load = partial(np.loadtxt, lines[header:], delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
        try:
            rows = load(dtype=np.int32, converters=convert)  # ten times as fast as floats
        except ValueError:
            for number, row in enumerate(csv.reader(lines, delimiter=delimiter), 1):
                if len(row) != count:
                    raise DatasetError(file, f"rows of {count} columns", f"{len(row)} in row {number}") from None
            rows = load(dtype=np.float64, converters=convert)
        if rows.shape[1] != count:
            raise DatasetError(file, f"rows of {count} columns", f"{rows.shape[1]}")
        labels = None
        if label is not None:
            used, places = np.unique(rows[:, label].astype(int), return_inverse=True)
            labels = _numbers(np.array([*words])[used])[places]
        images = rows[:, pixels[0] : pixels[-1] + 1] if pixels[-1] - pixels[0] < len(pixels) else rows[:, pixels]
    return Part(images, labels, file, file)


def _is_made_unique(cells):
    """Return whether the first row has an image whose equal pixels pandas numbered, such as 0, 0.1 and 0.2."""
    names, text = {*cells[0]}, ",".join(cell for row in cells[1:] for cell in row)
    numbered = any({f"{name}.1", f"{name}.2"} < names for name in names if name.isdecimal())
    return len(names) == len(cells[0]) and numbered and text and "." not in text


def _columns(names, rows, file):
    """Return the index of the label column or None, and those of the pixels, from the header and the first rows."""
    if not rows:
        raise DatasetError(file, "rows of pixels", "only a header")
    count, label, others = len(rows[0]), [], []
    if names:
        others = [i for i, name in enumerate(names) if name.lower() in IDS]
        label = [i for i, name in enumerate(names) if i not in others and not any(map(str.isdigit, name))]
    elif not square_shape(count):
        words = [i for i, cell in enumerate(rows[0]) if not NUMBER.fullmatch(cell)]
        label = words or [count - 1 if _is_label_last(rows) else 0]
    pixels = [i for i in range(len(names) or count) if i not in label + others]
    if len(label) > 1 or not square_shape(len(pixels)):
        shown = ", ".join([*names[:6], *["..."] * (len(names) > 6)]) or "without names"
        found = f"{count} column{'s' * (count > 1)} {shown}"
        if names and pixels:
            square = "a square" if square_shape(len(pixels)) else "no square"
            found += f": {len(label)} may be labels, and {len(pixels)} with a number form {square}"
        raise DatasetError(file, 'a column "label" and one column per pixel of a square image', found)
    return label[0] if label else None, pixels


def _is_label_last(rows):
    """Return whether the last column has classes and the first one pixels, which are constant or have many values."""
    first, last = ([row[i] for row in rows] for i in (0, -1))
    constant = [max(map(column.count, column)) >= 0.9 * len(rows) for column in (first, last)]
    few = len(set(last)) < 40 and not constant[1]
    return few and (constant[0] or 2 * len(set(last)) < len(set(first)))


def _numbers(cells):
    """Return texts as numbers if all of them are plain decimal numbers, and otherwise unchanged."""
    if not all(NUMBER.fullmatch(cell) and "n" not in cell.lower() for cell in cells):
        return cells
    return cells.astype(float if any(re.search("[.eE]|[0-9]{18}", cell) for cell in cells) else int)
