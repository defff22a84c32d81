"""Reading and writing of idx files, the format of MNIST, with one array per file.

    offset  bytes  meaning
         0      2  zero
         2      1  element type, one of TYPES
         3      1  rank: the number of dimensions
         4  4 * r  the size of each dimension, unsigned, most significant byte first
     4 + 4r   rest the elements in C order (last dimension fastest), most significant byte first

The format's description does not mention rank 0. Here an array of rank 0 has one element, as in NumPy.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", section
"The idx file format", http://yann.lecun.com/exdb/mnist/.
"""

import contextlib
import gzip
import math
import os
import struct
import sys
import zlib
from io import BufferedIOBase
from os import PathLike
from textwrap import shorten
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tinyvit.files import write_atomically
from tinyvit.signatures import broken_link, identify

TYPES: dict[int, np.dtype] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
CODES = {dtype: code for code, dtype in TYPES.items()}

GZIP_MAGIC = b"\x1f\x8b"
MAX_RANK = 64  # NumPy's limit, while the format allows 255
CHUNK = 64 * 1024  # bytes per read, so that a wrong header cannot cause a large allocation


class DataError(ValueError):
    """Error for a data set that cannot be used.

    Parameters
    ----------
    file : path or str
        Name of the file or the folder.
    expected : object
        Description of what was expected.
    found : object
        Description of what was found.
    """

    def __init__(self, file: str | PathLike[str], expected: object, found: object) -> None:
        # pickle calls the class with these arguments when the error is sent to another process
        super().__init__(str(file), *(shorten(str(text), 400, placeholder=" ...") for text in (expected, found)))

    def __str__(self):
        return "{}: expected {}, found {}".format(*self.args)


class IdxError(DataError):
    """Error for a file that cannot be read or written as idx.

    Parameters
    ----------
    file : path or str
        Name of the file.
    expected : object
        Description of what was expected.
    found : object
        Description of what was found.
    """


def read_idx(source: str | PathLike[str] | BinaryIO | BufferedIOBase, most_bytes: int = sys.maxsize) -> np.ndarray:
    """Read the array of an idx file.

    Parameters
    ----------
    source : path or binary file object
        File, raw or compressed with gzip. Its first bytes determine which, not its name. A file object is read to its
        end and stays open.
    most_bytes : int, optional
        Largest accepted size of the array in bytes. Default: what memory can address.

    Returns
    -------
    ndarray
        Array of the file's shape and type, C-contiguous, writable and in native byte order.

    Raises
    ------
    IdxError
        If the file is missing or unreadable, or the header, the number of bytes or the gzip stream is wrong.

    Notes
    -----
    Files from unknown sources are safe to read. Memory grows only with the bytes that are present, whatever size the
    header states, and at most one buffer is decompressed beyond that size.
    """
    name = _name(source)
    try:
        with contextlib.nullcontext(source) if hasattr(source, "read") else open(source, "rb") as stream:
            start = read_at_most(stream, 4)
            if start[:2] != GZIP_MAGIC:
                return _parse(start, stream, name, most_bytes)
            prepended: Any = _Prepended(start, stream)
            with gzip.GzipFile(fileobj=prepended, mode="rb") as unpacked:
                return _parse(read_at_most(unpacked, 4), unpacked, name, most_bytes)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise IdxError(name, "one intact gzip stream and nothing after it", error) from error
    except OSError as error:
        raise IdxError(name, "a file that can be read", broken_link(name) or error.strerror or error) from error


def write_idx(target: str | PathLike[str] | BinaryIO | BufferedIOBase, array: npt.ArrayLike) -> None:
    """Write an array as an idx file.

    Parameters
    ----------
    target : path or binary file object
        File to write. A path that ends with ``.gz`` gives a gzip file, and a failure leaves no partial file. A file
        object gets the raw format and stays open.
    array : array_like
        Array of dtype uint8, int8, int16, int32, float32 or float64, with any shape and memory order.

    Raises
    ------
    IdxError
        If the format has no such dtype or size, or the path cannot be written.
    """
    array = np.asarray(array)
    name = _name(target)
    dtype = array.dtype.newbyteorder(">")
    if dtype not in CODES:
        known = ", ".join(known.name for known in CODES)
        raise IdxError(name, f"an array of {known}", f"{array.dtype}: convert it with astype first")
    if any(size >= 2**32 for size in array.shape):
        raise IdxError(name, "dimensions below 2**32", f"shape {array.shape}")
    header = bytes([0, 0, CODES[dtype], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    elements = array.astype(dtype, copy=False).tobytes()

    if hasattr(target, "write"):
        target.write(header)
        target.write(elements)
        return
    data = header + elements
    if name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)  # without a time stamp, equal arrays give equal files
    try:
        write_atomically(name, data)
    except OSError as error:
        raise IdxError(name, "a path that can be written", error.strerror or error) from error


def _parse(start, stream, name, most_bytes):
    """Return the array of a file with the first four bytes `start` and the remaining bytes in `stream`."""
    if not start:
        raise IdxError(name, "an idx file", "an empty file")
    if len(start) < 4:
        raise IdxError(name, "a header of at least 4 bytes", len(start))
    if start[:2] != b"\0\0":
        content = ": ".join(identify(start + read_at_most(stream, 508)))
        found = f"{start[:2].hex(' ')}, {content}".removesuffix(", ")
        raise IdxError(name, "an idx file, which begins with 00 00", found)
    code, rank = start[2], start[3]
    if code not in TYPES:
        known = ", ".join(f"0x{known:02X}" for known in TYPES)
        raise IdxError(name, f"an element type among {known}", f"0x{code:02X}")
    if rank > MAX_RANK:
        raise IdxError(name, f"at most {MAX_RANK} dimensions, NumPy's limit", rank)
    sizes = read_at_most(stream, 4 * rank)
    if len(sizes) < 4 * rank:
        raise IdxError(name, f"a header of {4 + 4 * rank} bytes", 4 + len(sizes))

    shape = struct.unpack(f">{rank}I", sizes)
    dtype = TYPES[code]
    # Python's integers cannot overflow. Sizes of 0 are left out because NumPy limits the product of the others too.
    if math.prod(size for size in shape if size) * dtype.itemsize > sys.maxsize:
        raise IdxError(name, "an array that memory can hold", f"a header for shape {shape} of {dtype.name}")
    if math.prod(shape) * dtype.itemsize > most_bytes:
        expected = f"at most {most_bytes:,} bytes of elements for the size of the file"
        raise IdxError(name, expected, f"a header for shape {shape} of {dtype.name}")
    expected = math.prod(shape) * dtype.itemsize
    elements = read_at_most(stream, expected)
    description = f"{expected} bytes of elements for shape {shape} of {dtype.name}"
    if len(elements) < expected:
        raise IdxError(name, description, len(elements))
    if stream.read(1):  # at the end of a gzip stream, this also verifies its checksum
        raise IdxError(name, description, "more bytes")

    array = np.ndarray(shape, dtype, buffer=elements)
    return array if dtype.isnative else array.byteswap(inplace=True).view(dtype.newbyteorder())


def read_at_most(stream: Any, size: int) -> bytearray:
    """Read `size` bytes, or fewer at the end. The memory grows with the bytes that are present, not with `size`."""
    data = bytearray()
    while len(data) < size and (chunk := stream.read(min(CHUNK, size - len(data)))):
        data += chunk
    return data


class _Prepended:
    """A stream that yields the bytes of `start` first. It replaces ``seek(0)``, which a pipe does not support."""

    def __init__(self, start, stream):
        self.start, self.stream = bytes(start), stream

    def read(self, size):
        first, self.start = self.start[:size], self.start[size:]
        return first + read_at_most(self.stream, size - len(first))


def _name(source):
    """Return the name of a path or a stream for a message."""
    if hasattr(source, "read") or hasattr(source, "write"):
        return str(getattr(source, "name", f"<{type(source).__name__}>"))
    return os.fsdecode(source)
