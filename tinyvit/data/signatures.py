"""Names of common contents of files, such as HTML pages and archives, with what to do about them."""

SIGNATURES = (
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"\xfd7zXZ\x00", "a file packed by xz: unpack it"),
    (b"\x1f\x8b", "a gzip file inside a gzip file: unpack it once"),
    (b"\x89HDF\r\n", "an HDF5 file: save its arrays with numpy.savez"),
    (b"\x93NUMPY", "a single NumPy array: save images and labels together with numpy.savez"),
    (b"MATLAB 5.0", "a MATLAB file: save its arrays with numpy.savez"),
    (b"PAR1", "a Parquet file: save its images with numpy.savez, or as PNG files"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the data: run git lfs pull"),
)


def name_content(start):
    """Return what a file is whose first bytes are `start`, with what to do, or None if the content is unknown."""
    if not start:
        return "an empty file"
    start = bytes(start[:512])
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script", b"<!--")):
        return "an HTML page, so the download failed: download the file again"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if start[:1] == b"\x80" and start[1:2] in {b"\2", b"\3", b"\4", b"\5"}:
        return "a Python pickle, which can run any code: download the data in another format"
    return next((name for signature, name in SIGNATURES if start.startswith(signature)), None)
