"""Write files so that a reader finds either the old file or the new one, and keep two runs out of one folder."""

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from os import PathLike
from pathlib import Path

from tinyvit.signatures import broken_link

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".tinyvit.lock"  # its text names the process that uses the folder
LASTING = (errno.ENOSPC, errno.EROFS, errno.EXDEV, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
RENAME_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds between attempts
_held = threading.local()


def write_atomically(path: str | PathLike[str], content: bytes | str) -> None:
    """Replace a file as a whole.

    The content is written to a temporary file in the same folder and flushed to the disk. Then the temporary file
    is renamed. So a reader finds the old file or the new one, even if the program is killed. If the path is a
    symbolic link, the file that it points to is replaced.

    Parameters
    ----------
    path : path-like
        The file to write. Its folder must exist.
    content : bytes or str
        The new content. Text is encoded as UTF-8.

    Raises
    ------
    OSError
        If the file cannot be written. The message names it, and the old file is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            code, kind = (errno.EISDIR, "a folder") if target.is_dir() else (errno.EINVAL, "a device or a pipe")
            raise OSError(code, f"this is {kind}, not a file: give the name of a file")
        _write_and_rename(target, data)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and not target.parent.is_dir()
        reason = f"{target.parent} is not a folder" if missing else error.strerror
        raise OSError(error.errno, reason, os.fspath(path)) from error


def _write_and_rename(target, data):
    """Write a temporary file and give it the name `target`."""
    temporary = target.with_name(f".tinyvit-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                _lock(file)  # so that `_remove_temporary_files` of another process keeps this file
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames only closed files
                file.close()
            _rename(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _rename(temporary, target):
    """Rename a file. This may fail for a moment, on Windows or a network drive, so it is repeated."""
    for pause in RENAME_PAUSES:
        try:
            return os.replace(temporary, target)
        except OSError as error:
            if error.errno in LASTING:
                raise
            time.sleep(pause)
    return os.replace(temporary, target)


def _lock(file):
    """Lock an open file until it is closed or the process ends. Raise `BlockingIOError` if another has the lock."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Create a folder and those above it, unless it exists.

    Parameters
    ----------
    folder : path-like
        The folder.

    Raises
    ------
    OSError
        If it cannot be created. The message names it and what is in its place.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        places = (folder, *folder.parents)
        obstacle = next((str(place) for place in places if broken_link(place) or place.is_file()), None)
        reason = error.strerror
        if obstacle:
            reason = f"{obstacle} is {broken_link(obstacle) or 'a file'}"
        text = f"cannot create this folder ({reason}): give another folder"
        raise OSError(error.errno, text, os.fspath(folder)) from error


@contextlib.contextmanager
def locked_folder(folder: str | PathLike[str]) -> Iterator[None]:
    """Return a context manager that keeps all other runs out of a folder.

    The lock ends with the process, even if the process is killed. The same thread may enter a folder again. Files
    that a killed run left unfinished are removed.

    Parameters
    ----------
    folder : path-like
        The folder of a run. It must exist.

    Yields
    ------
    None

    Raises
    ------
    BlockingIOError
        If another run uses the folder. The message names its process.
    OSError
        If the folder cannot be written.

    Notes
    -----
    The lock is that of `flock` on a file in the folder. Windows has no `flock`, but refuses to remove a file that a
    process has open, so there the lock is an open file.
    """
    path = Path(os.path.realpath(folder)) / LOCK
    held = _held.__dict__.setdefault("paths", set())
    if path in held:
        yield
        return
    file = _open_lock(path, folder)
    held.add(path)
    try:
        _remove_temporary_files(path.parent)
        yield
    finally:
        held.discard(path)
        with contextlib.suppress(OSError):
            is_ours = os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
            if fcntl is None:
                file.close()
            if is_ours:  # otherwise the folder was replaced, and another run may use the new one
                path.unlink()  # before the lock ends, so that this is not the file of the next run
        file.close()


def _open_lock(path, folder):
    """Return the open and locked file `path`, whose text names this process."""
    while True:
        try:
            if fcntl is None:
                path.unlink(missing_ok=True)  # fails if another process has it open
            no_link = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            file = open(os.open(path, no_link, 0o666), "r+b", buffering=0)  # noqa: SIM115  open while the lock is held
        except OSError as error:
            if fcntl is None and isinstance(error, PermissionError):
                raise _in_use(path, folder) from error
            raise OSError(error.errno, f"this folder cannot be used ({error.strerror})", os.fspath(folder)) from error
        try:
            _lock(file)
        except BlockingIOError as error:
            file.close()
            raise _in_use(path, folder) from error
        except OSError:  # this file system has no locks
            pass
        if os.fstat(file.fileno()).st_nlink:  # otherwise the last owner removed the file after it was opened here
            break
        file.close()
    with contextlib.suppress(OSError):  # on a full disk the lock has no text
        file.truncate(0)
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
    return file


def _in_use(path, folder):
    """Return the error for a folder that another run has locked."""
    owner = ""
    with contextlib.suppress(OSError):
        owner = path.read_text(encoding="utf-8", errors="replace")
    text = f"another run uses this folder ({owner or 'of an unknown process'})"
    return BlockingIOError(errno.EAGAIN, f"{text}: wait for its end, or give another folder", os.fspath(folder))


def _remove_temporary_files(folder):
    """Remove the temporary files of killed processes from a folder. Files that are being written are locked."""
    for path in folder.glob(".tinyvit-*.part"):
        with contextlib.suppress(OSError), open(path, "rb") if fcntl else contextlib.nullcontext() as file:
            _lock(file)
            path.unlink()
