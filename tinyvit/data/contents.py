"""Reading files and folders of unknown origin, with limits on memory and one kind of error."""

import contextlib
import gzip
import os
import zlib

from tinyvit.data.idx import GZIP_MAGIC, DataError, read_at_most
from tinyvit.data.mnist import DatasetError
from tinyvit.signatures import broken_link, identify

MOST_BYTES = 4 * 2**30  # of one file, unpacked
MOST_RATIO = 100  # of unpacked to packed bytes; pictures reach 20, while a decompression bomb reaches 1,000
SMALL = 64 * 2**20  # bytes; below, the ratio does not matter


def most_bytes(file):
    """Return the largest accepted number of bytes of a file's content when it is unpacked."""
    size = os.path.getsize(file) if os.path.exists(file) else 0  # the reader names a missing file
    return min(MOST_BYTES, max(SMALL, MOST_RATIO * size))


@contextlib.contextmanager
def one_error(file, expected):
    """Turn every error from a damaged or unreadable file into a `DatasetError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, Pillow and NumPy raise errors of many types for damaged files
        found = content_of(file)
        if not found or "zip archive" in found:  # an npz file is one
            found = getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
        raise DatasetError(file, expected, found) from error


def read_content(file):
    """Return the bytes of a file, unpacked if it is a gzip file."""
    with one_error(file, "one intact file"), open_unpacked(file) as stream:
        content = read_at_most(stream, most_bytes(file) + 1)
    if len(content) > most_bytes(file):
        raise DatasetError(file, f"at most {most_bytes(file):,} bytes of content for the size of the file", "more")
    return content


def open_unpacked(file):
    """Return a stream of the bytes of a file, unpacked if it is a gzip file."""
    with open(file, "rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
    return gzip.open(file) if packed else open(file, "rb")


def content_of(file):
    """Return what a file is that has no data, with what to do, or "" if that is unknown."""
    with contextlib.suppress(OSError, EOFError, zlib.error), open_unpacked(file) as stream:
        return ": ".join(identify(stream.read(512)))
    return broken_link(file)


def is_file(path):
    """Return whether a path is a file, or a link to a missing file, which the reader then names."""
    return os.path.isfile(path) or bool(broken_link(path))


def visible(folder):
    """Return the sorted paths in a folder, without hidden ones and those that operating systems add."""
    with one_error(folder, "a folder that can be read"):
        names = sorted(os.listdir(folder))
    hidden = (".", "__MACOSX", "Thumbs.db", "desktop.ini")
    return [os.path.join(folder, name) for name in names if not name.startswith(hidden)]


def listing(folder):
    """Return the names in a folder for a message. What to do about a kind of file is said once."""
    paths, texts, known = visible(folder), [], {""}
    for path in paths[:8]:
        is_data = path.endswith(".npz")  # `identify` knows npz files only under other names
        content = content_of(path) if is_file(path) and not is_data else ""
        text = os.path.basename(path) + "/" * os.path.isdir(path)
        texts.append(text if content in known else f"{text} ({content})")
        known.add(content)
    texts += [f"{len(paths) - 8:,} more"] if len(paths) > 8 else []
    return ", ".join(texts) or "an empty folder"
