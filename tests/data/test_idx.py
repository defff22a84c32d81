"""The idx reader and writer: everything there and back, and every way in which a file can be broken."""

import gzip
import io
import math
import os
import pathlib
import pickle
import stat
import struct
import sys
import tempfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyvit.data import DataError, IdxError, read_idx, write_idx

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
MB = 2**20


def header(code, *shape):
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def encode(array):
    """The format once more, written without the library: one element at a time, by the struct module."""
    letter = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "float32": "f", "float64": "d"}
    values = [struct.pack(">" + letter[array.dtype.name], value) for value in array.ravel().tolist()]
    return header(CODES[array.dtype.name], *array.shape) + b"".join(values)


def assert_same(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype.newbyteorder("=")
    assert got.dtype.isnative
    assert got.flags.c_contiguous
    assert got.flags.aligned
    assert got.flags.writeable
    assert got.tobytes() == expected.astype(got.dtype).tobytes()  # bytes, so that not-a-number equals itself


def peak_of(call):
    """Bytes of memory that the call had in use at its worst moment, on top of what was there."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuse(source, *words, limit=None):
    """The one line with which `source` is refused; each of `words` must be in it."""
    caught = []

    def read():
        with pytest.raises(IdxError) as info:
            read_idx(source)
        caught.append(str(info.value))

    if limit is None:
        read()
    else:
        assert peak_of(read) < limit
    message = caught[0]
    assert "\n" not in message
    for word in ("expected", "found", *words):
        assert word in message, f"{word!r} is not in {message!r}"


class Drip:
    """A stream at its barest: nothing but a read method, and that gives one byte at a time."""

    name = "drip"
    closed = False

    def __init__(self, data):
        self.inner = io.BytesIO(data)

    def read(self, size=-1):
        return self.inner.read(min(size, 1))


arrays = st.sampled_from(list(CODES)).flatmap(
    lambda name: st.sampled_from("<>").flatmap(
        lambda order: hnp.arrays(
            np.dtype(name).newbyteorder(order),
            hnp.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=4),
        )
    )
)


@settings(deadline=None)
@given(arrays, st.sampled_from(["raw", "gzip"]), st.sampled_from(["str", "path", "stream", "drip"]))
@example(np.array(7.5, ">f8"), "raw", "stream")
def test_round_trip(array, form, kind):
    before = array.copy()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.gz" if form == "gzip" else "a.idx")
        if kind in ("stream", "drip"):
            stream = io.BytesIO()
            write_idx(stream, array)
            assert stream.getvalue() == encode(array)
            data = gzip.compress(stream.getvalue()) if form == "gzip" else stream.getvalue()
            source = io.BytesIO(data) if kind == "stream" else Drip(data)
        else:
            source = pathlib.Path(path) if kind == "path" else path
            write_idx(source, array)
            raw = pathlib.Path(path).read_bytes()
            assert (gzip.decompress(raw) if form == "gzip" else raw) == encode(array)
        assert_same(read_idx(source), array)
        if kind in ("stream", "drip"):
            assert not source.closed
    assert array.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", CODES)
def test_extreme_values_survive(name):
    dtype = np.dtype(name)
    info = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    values = [info.min, info.max, 0, 1]
    if dtype.kind == "f":
        values += [np.inf, -np.inf, np.nan, -0.0, info.smallest_subnormal]
    array = np.array(values, dtype)
    assert_same(read_idx(io.BytesIO(encode(array))), array)


@pytest.mark.parametrize(
    "view",
    [lambda a: a[::2, ::-1], lambda a: a.T, lambda a: a[:, 1], lambda a: np.broadcast_to(a[0], (3, 6))],
)
@pytest.mark.parametrize("order", "<>")
def test_any_memory_layout(view, order):
    array = view(np.arange(24, dtype=np.dtype("i4").newbyteorder(order)).reshape(4, 6))
    stream = io.BytesIO()
    write_idx(stream, array)
    stream.seek(0)
    assert_same(read_idx(stream), array)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 63, 64])
def test_every_rank_numpy_has(rank):
    array = np.full((1,) * rank, -300, np.int16)
    stream = io.BytesIO()
    write_idx(stream, array)
    stream.seek(0)
    assert_same(read_idx(stream), array)


def test_a_read_array_can_be_written_to_and_is_not_shared():
    data = encode(np.arange(3, dtype=np.int32))
    first, second = read_idx(io.BytesIO(data)), read_idx(io.BytesIO(data))
    first += 10
    assert first.tolist() == [10, 11, 12]
    assert second.tolist() == [0, 1, 2]


def test_the_first_bytes_and_not_the_name_decide(tmp_path):
    array = np.arange(5, dtype=np.uint8)
    (tmp_path / "raw.gz").write_bytes(encode(array))
    (tmp_path / "packed").write_bytes(gzip.compress(encode(array)))
    assert_same(read_idx(tmp_path / "raw.gz"), array)
    assert_same(read_idx(tmp_path / "packed"), array)


def test_gzip_in_several_members_and_with_padding():
    # Both are gzip as its own tool reads it: files that were joined, and zeros up to the end of a tape block.
    array = np.arange(1000, dtype=np.float32)
    data = encode(array)
    packed = gzip.compress(data[:7]) + gzip.compress(b"") + gzip.compress(data[7:]) + bytes(512)
    assert_same(read_idx(io.BytesIO(packed)), array)
    assert_same(read_idx(Drip(packed)), array)


def test_reading_keeps_one_copy_in_memory(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, 8 * MB, np.uint8).view(np.float32)
    write_idx(tmp_path / "a", array)
    assert peak_of(lambda: read_idx(tmp_path / "a")) < 1.5 * array.nbytes


# ---- the writer ----


def test_gzip_is_the_same_each_time_and_under_each_name(tmp_path, monkeypatch):
    array = np.arange(1000, dtype=np.int16)
    write_idx(tmp_path / "a.gz", array)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_idx(tmp_path / "b.gz", array)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert len((tmp_path / "a.gz").read_bytes()) < array.nbytes


@pytest.mark.parametrize("name", ["a.idx", "a.gz"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    path = tmp_path / name
    write_idx(path, np.uint8([1, 2, 3]))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(IdxError, match="found No space left on device"):
        write_idx(path, np.uint8([4]))
    assert read_idx(path).tolist() == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_idx(path, np.uint8([1, 2, 3]))
    replace, seen = os.replace, []

    def look(source, target):
        seen.append((os.path.dirname(source), read_idx(target).tolist(), read_idx(source).tolist()))
        replace(source, target)

    monkeypatch.setattr("os.replace", look)
    write_idx(path, np.uint8([4]))
    assert seen == [(str(tmp_path), [1, 2, 3], [4])]
    assert read_idx(path).tolist() == [4]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are a POSIX matter")
def test_the_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_idx(tmp_path / "a", np.uint8([1]))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    "dtype", ["int64", "uint16", "uint32", "uint64", "float16", "bool", "complex64", "O", "U3"]
)
def test_types_that_idx_lacks_are_refused(tmp_path, dtype):
    with pytest.raises(IdxError) as info:
        write_idx(tmp_path / "a.idx", np.zeros(3, dtype))
    for word in ("a.idx", "expected", "uint8", "float64", "found", str(np.dtype(dtype)), "astype"):
        assert word in str(info.value)
    assert not list(tmp_path.iterdir())


def test_a_dimension_too_large_for_the_format_is_refused(tmp_path):
    with pytest.raises(IdxError, match=r"a\.idx: expected .* below 2\*\*32, found shape \(0, 4294967296\)"):
        write_idx(tmp_path / "a.idx", np.empty((0, 2**32), np.uint8))


def test_writing_where_nothing_can_be_written(tmp_path):
    with pytest.raises(IdxError, match=r"no-folder.a: expected a path that can be written, .*no-folder is not a f"):
        write_idx(tmp_path / "no-folder" / "a", np.uint8([1]))
    (tmp_path / "folder").mkdir()
    with pytest.raises(IdxError, match="folder: expected a path that can be written, found"):
        write_idx(tmp_path / "folder", np.uint8([1]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


# ---- the reader's refusals ----

GOOD = encode(np.arange(6, dtype=np.int16).reshape(2, 3))

BROKEN = {
    "empty": (b"", ["an idx file", "an empty file"]),
    "magic cut": (GOOD[:3], ["a header of at least 4 bytes", "found 3"]),
    "sizes cut": (GOOD[:9], ["a header of 12 bytes", "found 9"]),
    "no elements": (GOOD[:12], ["12 bytes of elements", "(2, 3)", "int16", "found 0"]),
    "elements cut": (GOOD[:-1], ["12 bytes of elements", "(2, 3)", "int16", "found 11"]),
    "too long": (GOOD + b"\0", ["12 bytes of elements", "(2, 3)", "found more"]),
    "not idx": (b"PK\3\4" + GOOD, ["begins with 00 00", "found 50 4b"]),
    "second byte": (b"\0\1" + GOOD[2:], ["begins with 00 00", "found 00 01"]),
    "no such type": (header(0x0A, 2) + b"ab", ["0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E", "found 0x0A"]),
    "type zero": (bytes(64), ["0x08", "found 0x00"]),
    "rank 65": (header(0x08, *[1] * 65) + b"a", ["at most 64 dimensions", "found 65"]),
    "rank 255": (header(0x08, *[1] * 255) + b"a", ["at most 64 dimensions", "found 255"]),
    "rank 0, empty": (header(0x0C), ["4 bytes of elements", "()", "found 0"]),
}


@pytest.mark.parametrize(("data", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_files(tmp_path, data, words):
    path = tmp_path / "broken.idx"
    path.write_bytes(data)
    refuse(path, str(path), *words)
    refuse(str(path), str(path), *words)
    refuse(Drip(data), "drip", *words)
    refuse(io.BytesIO(data), "<BytesIO>", *words)
    path.write_bytes(gzip.compress(data))
    refuse(path, str(path), *words)
    refuse(Drip(gzip.compress(data)), "drip", *words)


def damaged(data, position):
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


PACKED = gzip.compress(encode(np.random.default_rng(0).integers(0, 255, 5000, np.uint8)), mtime=0)

BROKEN_GZIP = {
    "checksum": damaged(PACKED, -8 + len(PACKED)),
    "length": damaged(PACKED, -4 + len(PACKED)),
    "method": damaged(PACKED, 2),
    "deflate": damaged(PACKED, 10),
    "only magic": PACKED[:2],
    "header cut": PACKED[:7],
    "data cut": PACKED[:3000],
    "trailer cut": PACKED[:-3],
    "trailer gone": PACKED[:-8],
    "garbage after": PACKED + b"garbage",
    "one byte after": PACKED + b"!",
}


@pytest.mark.parametrize("data", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
def test_broken_gzip(tmp_path, data):
    path = tmp_path / "broken.gz"
    path.write_bytes(data)
    refuse(path, str(path), "one intact gzip stream and nothing after it")
    refuse(Drip(data), "drip", "one intact gzip stream and nothing after it")


def test_a_second_gzip_member_is_too_much_data():
    refuse(io.BytesIO(PACKED + gzip.compress(b"x")), "5000 bytes of elements", "found more")


def test_paths_that_are_not_files(tmp_path):
    refuse(tmp_path / "missing.idx", "missing.idx", "a file that can be read", "No such file")
    refuse(tmp_path, str(tmp_path), "a file that can be read")


def test_a_stream_that_fails():
    class Failing(io.RawIOBase):
        name = "tape"

        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    refuse(Failing(), "tape", "a file that can be read", "Input/output error")


@pytest.mark.parametrize("call", [read_idx, lambda source: write_idx(source, np.uint8([1]))])
def test_what_is_no_source_is_a_programming_error(call):
    with pytest.raises(TypeError):
        call(3)  # not file descriptor 3


def test_the_error_can_be_caught_by_its_base_and_travels_between_processes(tmp_path):
    assert issubclass(IdxError, DataError)
    assert issubclass(DataError, ValueError)
    with pytest.raises(IdxError) as info:
        read_idx(tmp_path / "missing")
    copy = pickle.loads(pickle.dumps(info.value))
    assert type(copy) is IdxError
    assert str(copy) == str(info.value)


# ---- memory follows the bytes that are there, never the header ----

LYING = {
    "2**40 elements": header(0x08, 2**20, 2**20),
    "2**64 bytes, less a few": header(0x08, 2**32 - 1, 2**32 - 1),
    "one more than can be addressed": header(0x0C, 2**31, 2**30),
    "wraps to 0 in 64 bits": header(0x08, 2**31, 2**31, 4),
    "wraps to 4 in 64 bits": header(0x0C, 1, *[2**31] * 3),
    "64 dimensions of 2**32 - 1": header(0x0E, *[2**32 - 1] * 64),
}


@pytest.mark.parametrize("form", ["raw", "gzip"])
@pytest.mark.parametrize("data", LYING.values(), ids=LYING)
def test_a_lying_header_costs_nothing(tmp_path, data, form):
    path = tmp_path / "liar"
    data += b"abcd"
    path.write_bytes(gzip.compress(data) if form == "gzip" else data)
    refuse(path, "liar", limit=MB)
    refuse(Drip(path.read_bytes()), "drip", limit=MB)


def test_an_empty_array_may_have_large_sizes_that_numpy_can_hold():
    array = read_idx(io.BytesIO(header(0x08, 0, 2**32 - 1, 2**30)))
    assert array.shape == (0, 2**32 - 1, 2**30)
    assert math.prod(array.shape[1:]) <= sys.maxsize
    refuse(
        io.BytesIO(header(0x08, 0, 2**32 - 1, 2**32 - 1)), "memory can hold", "(0, 4294967295, 4294967295)"
    )


def test_a_header_that_claims_much_takes_what_is_there_and_not_more():
    data = header(0x08, 2**40 // 2**10, 2**10) + bytes(4 * MB)
    refuse(io.BytesIO(data), f"{2**40} bytes of elements", f"found {4 * MB}", limit=6 * MB)
    packed = gzip.compress(data)
    refuse(io.BytesIO(packed), f"found {4 * MB}", limit=6 * MB)


def test_a_header_that_claims_little_stops_a_bomb():
    packed = gzip.compress(header(0x08, 10) + bytes(10 * MB))
    assert len(packed) < 20_000
    refuse(io.BytesIO(packed), "10 bytes of elements", "found more", limit=MB)


def test_a_raw_file_is_not_read_past_the_claim():
    data = io.BytesIO(header(0x08, 10) + bytes(10 * MB))
    refuse(data, "found more")
    assert data.tell() == 8 + 10 + 1


# ---- mutations: an array or an IdxError, nothing else, and no large allocation ----

SEEDS = [
    GOOD,
    gzip.compress(GOOD),
    PACKED,
    gzip.compress(GOOD[:9]) + gzip.compress(GOOD[9:]),
    header(0x08, 1, 1, 1),
]

mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 40), st.integers(0, 255)),
        st.tuples(st.just("flip"), st.integers(0, 6000), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.integers(0, 6000), st.none()),
        st.tuples(st.just("append"), st.binary(min_size=1, max_size=40), st.none()),
        st.tuples(st.just("insert"), st.integers(0, 40), st.binary(min_size=1, max_size=8)),
    ),
    max_size=4,
)


def mutate(data, changes):
    data = bytearray(data)
    for kind, where, what in changes:
        if kind == "append":
            data += where
        elif kind == "insert":
            data[where:where] = what
        elif kind == "cut":
            del data[where:]
        elif data:
            where %= len(data)
            data[where] = what if kind == "set" else data[where] ^ (1 << what)
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), mutations, st.booleans())
def test_mutations(data, changes, pack):
    data = mutate(data, changes)
    if pack:  # mutated inside, sound outside
        data = gzip.compress(data, 1)
    outcome = []

    def read():
        try:
            outcome.append(read_idx(io.BytesIO(data)))
        except IdxError as error:
            outcome.append(error)

    assert peak_of(read) < MB
    if isinstance(outcome[0], IdxError):
        assert str(outcome[0]).startswith("<BytesIO>: expected ")
    else:
        # Whatever is accepted must say what the bytes say: written again, it is the same file.
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        stream = io.BytesIO()
        write_idx(stream, outcome[0])
        assert stream.getvalue() == plain
