"""What a file is that is not of the expected form: a web page, an archive, a pickle, a broken link, and so on."""

import os

DOWNLOAD, PULL = "download the file again", "run git lfs pull"
UNPACK, CONVERT = "unpack it", "save its arrays with numpy.savez"

# The first bytes, what the file is, and what to do if it should be data. A reader of models gives other advice.
SIGNATURES = (
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"\xfd7zXZ\x00", "a file packed by xz", UNPACK),
    (b"BZh", "a file packed by bzip2", UNPACK),
    (b"\x1f\x8b", "a gzip file", "unpack it, because it is packed twice"),
    (b"\x89HDF\r\n", "an HDF5 file", CONVERT),
    (b"MATLAB 5.0", "a MATLAB file", CONVERT),
    (b"\x93NUMPY", "a single NumPy array", "save images and labels together with numpy.savez"),
    (b"PAR1", "a Parquet file", "save its images with numpy.savez, or as PNG files"),
    ((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), "a Python pickle, which can run any code", CONVERT),
    (b"version https://git-lfs", "a Git LFS pointer in place of the content", PULL),
)
WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<script", b"<!--")


def identify(start: bytes) -> tuple[str, ...]:
    """Return what a file is whose first bytes are `start`, and what to do if it should be data, as two texts.

    512 bytes suffice. The result is empty if the content is unknown.
    """
    if not start:
        return "an empty file", "give a complete one"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(WEB_PAGE):
        return "an HTML page, so the download failed", DOWNLOAD
    if start[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if start.startswith(b"PK\x03\x04") and b".npy" in start[:100]:  # the name of the first member
        return "a zip archive of NumPy arrays", "let its name end with .npz"
    return next((tuple(found) for beginning, *found in SIGNATURES if start.startswith(beginning)), ())


def broken_link(path: str | os.PathLike[str]) -> str:
    """Return a text about a symbolic link whose target is missing, and "" for every other path."""
    broken = os.path.islink(path) and not os.path.exists(path)
    return f"a link to {os.readlink(path)}, which is missing" if broken else ""
