"""The idx format: one array a file, as MNIST is published.

    offset  bytes  meaning
         0      2  zero
         2      1  element type, one of TYPES
         3      1  rank: the number of dimensions
         4  4 * r  the size of each dimension, unsigned, most significant byte first
     4 + 4r   rest the elements in C order (last dimension fastest), most significant byte first

The format has no name for rank 0; here it is what an empty product of sizes says: a single element.

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

import numpy as np

from tinyvit.files import write_atomically

TYPES = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
CODES = {dtype: code for code, dtype in TYPES.items()}

GZIP_MAGIC = b"\x1f\x8b"
MAX_RANK = 64  # NumPy's own limit; the format could say 255
CHUNK = 64 * 1024  # bytes; what a lying header can make us allocate


class DataError(ValueError):
    """A data set cannot be used; says in one line which file it is, what was expected and what was found."""

    def __init__(self, file, expected, found):
        # All three as arguments, and plain ones, or the exception could not travel between processes.
        super().__init__(str(file), str(expected), str(found))

    def __str__(self):
        return "{}: expected {}, found {}".format(*self.args)


class IdxError(DataError):
    """A file cannot be read or written as idx."""


def read_idx(source):
    """Read one array from an idx file, raw or gzip, told apart by the first bytes and not by the name.

    source: path (str or os.PathLike), or a binary stream, which is read to its end and left open.

    Returns an array of the file's shape and type: C-contiguous, native-endian, writable.

    Raises IdxError if the file is missing, cannot be read, or is anything but one sound array: a false or
    incomplete header, too few or too many bytes, a damaged gzip stream. No header is trusted: memory grows
    only with the bytes that arrive, and no more are unpacked than the header says, plus one buffer.
    """
    is_stream = hasattr(source, "read")
    name = _name(source)
    try:
        with contextlib.nullcontext(source) if is_stream else open(source, "rb") as stream:
            start = _read_at_most(stream, 4)
            if start[:2] != GZIP_MAGIC:
                return _parse(start, stream, name)
            with gzip.GzipFile(fileobj=_GivenBack(start, stream), mode="rb") as unpacked:
                return _parse(_read_at_most(unpacked, 4), unpacked, name)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise IdxError(name, "one sound gzip stream and nothing after it", error) from error
    except OSError as error:
        raise IdxError(name, "a file that can be read", error.strerror or error) from error


def write_idx(target, array):
    """Write one array as an idx file.

    target: path (str or os.PathLike), written whole or not at all, and as gzip if it ends in ".gz" (with no
        time inside, so that one Python gives one file for one array); or a buffered binary stream, which gets
        the raw format and is left open.
    array: uint8, int8, int16, int32, float32 or float64, of any shape, byte order and memory layout.

    Raises IdxError if idx has no such type or size, or if the path cannot be written.
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
        data = gzip.compress(data, mtime=0)  # no time inside
    try:
        write_atomically(name, data)
    except OSError as error:
        raise IdxError(name, "a path that can be written", error.strerror or error) from error


def _parse(start, stream, name):
    """The array behind the first four bytes `start` and the rest of the file, `stream`."""
    if not start:
        raise IdxError(name, "an idx file", "no bytes at all")
    if len(start) < 4:
        raise IdxError(name, "a header of at least 4 bytes", len(start))
    if start[:2] != b"\0\0":
        raise IdxError(name, "an idx file, which begins with 00 00", start[:2].hex(" "))
    code, rank = start[2], start[3]
    if code not in TYPES:
        known = ", ".join(f"0x{known:02X}" for known in TYPES)
        raise IdxError(name, f"an element type among {known}", f"0x{code:02X}")
    if rank > MAX_RANK:
        raise IdxError(name, f"at most {MAX_RANK} dimensions, NumPy's limit", rank)
    sizes = _read_at_most(stream, 4 * rank)
    if len(sizes) < 4 * rank:
        raise IdxError(name, f"a header of {4 + 4 * rank} bytes", 4 + len(sizes))

    shape = struct.unpack(f">{rank}I", sizes)
    dtype = TYPES[code]
    # Python's integers, so no product can overflow. NumPy wants even an empty array's other sizes to fit.
    if math.prod(size for size in shape if size) * dtype.itemsize > sys.maxsize:
        raise IdxError(name, "an array that memory can hold", f"a header for shape {shape} of {dtype.name}")
    expected = math.prod(shape) * dtype.itemsize
    elements = _read_at_most(stream, expected)
    what = f"{expected} bytes of elements for shape {shape} of {dtype.name}"
    if len(elements) < expected:
        raise IdxError(name, what, len(elements))
    if stream.read(1):  # at a gzip stream's end, this also has its checksum compared
        raise IdxError(name, what, "more")

    array = np.ndarray(shape, dtype, buffer=elements)
    return array if dtype.isnative else array.byteswap(inplace=True).view(dtype.newbyteorder())


def _read_at_most(stream, size):
    """Up to `size` bytes, fewer only at the end; memory follows what is there, not what is asked for."""
    data = bytearray()
    while len(data) < size and (chunk := stream.read(min(CHUNK, size - len(data)))):
        data += chunk
    return data


class _GivenBack:
    """A stream with the bytes that were taken for a look put back in front: a pipe cannot seek."""

    def __init__(self, start, stream):
        self.start, self.stream = bytes(start), stream

    def read(self, size):
        taken, self.start = self.start[:size], self.start[size:]
        return taken + _read_at_most(self.stream, size - len(taken))


def _name(source):
    """What to call a path or a stream in a message."""
    if hasattr(source, "read") or hasattr(source, "write"):
        return str(getattr(source, "name", f"<{type(source).__name__}>"))
    return os.fsdecode(source)
