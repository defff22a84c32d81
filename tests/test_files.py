"""Writing is all or nothing, an error names the file, nothing is left behind, and a folder has one run at a time."""

import contextlib
import errno
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit import files
from tinyvit.files import LOCK, RENAME_PAUSES, locked_folder, make_folder, write_atomically

ERRORS = [
    getattr(errno, name)
    for name in ("ENOSPC", "EFBIG", "EDQUOT", "EROFS", "ENAMETOOLONG", "EISDIR", "EIO", "EACCES", "EMFILE", "ENOENT")
    if hasattr(errno, name)
]


@pytest.fixture
def no_pauses(monkeypatch):
    """Record the pauses between attempts instead of waiting."""
    pauses = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return pauses


# ---- all or nothing ----


def test_writes_bytes_and_text(tmp_path):
    write_atomically(tmp_path / "a", b"\x00\x01")
    write_atomically(tmp_path / "b", "é")
    assert (tmp_path / "a").read_bytes() == b"\x00\x01"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "é"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@given(st.data())
def test_any_failure_keeps_the_old_file_names_it_and_leaves_nothing_behind(tmp_path, data):
    step = data.draw(st.sampled_from(["open", "write", "flush", "fsync", "replace"]))
    number = data.draw(st.sampled_from([*ERRORS, None]))
    error = OSError("a failure without a number") if number is None else OSError(number, os.strerror(number))
    if data.draw(st.booleans()):
        error = KeyboardInterrupt()
    path = tmp_path / "a"
    write_atomically(path, "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.time, "sleep", lambda seconds: None)
        patch.setattr(files, "open", failing_open(step, error), raising=False)
        if step in ("fsync", "replace"):
            patch.setattr(os, step, raising(error))
        with pytest.raises(type(error)) as caught:
            write_atomically(path, "new")
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert ".part" not in str(caught.value)
        assert caught.value.errno == number
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


def failing_open(step, error):
    """Return an `open` that fails, or whose files fail, at one step."""

    def opened(*arguments, **options):
        if step == "open":
            raise error
        file = open(*arguments, **options)  # noqa: SIM115  the caller closes it
        if step in ("write", "flush"):
            return Failing(file, step, error)
        return file

    return opened


class Failing:
    """A file with one method that writes half of the data, if any, and raises an error."""

    def __init__(self, file, step, error):
        self.file, self.step, self.error = file, step, error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        if self.step == "write":
            raise self.error

    def flush(self):
        raise self.error


def test_the_bytes_are_on_the_disk_before_they_take_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "a", "new")
    assert order == ["fsync", "replace"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    program = (
        "import sys; from tinyvit.files import write_atomically\n"
        "for i in range(100): write_atomically(sys.argv[1], sys.argv[2] * 50_000)"
    )
    path = tmp_path / "a"
    command = [sys.executable, "-c", program, str(path)]
    writers = [subprocess.Popen([*command, letter], stderr=subprocess.PIPE) for letter in "xy"]
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            assert path.read_text() in ("x" * 50_000, "y" * 50_000)
    for writer in writers:
        assert writer.communicate()[1] == b""
        assert writer.returncode == 0
    assert os.listdir(tmp_path) == ["a"]


# ---- what the file system refuses ----


@pytest.mark.parametrize("failures", [1, len(RENAME_PAUSES)])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY, errno.EIO, errno.ESTALE, errno.EAGAIN])
def test_a_rename_is_repeated_with_growing_pauses(tmp_path, monkeypatch, no_pauses, failures, number):
    replace, left = os.replace, [OSError(number, "in use by another program")] * failures

    def sometimes(source, target):
        if left:
            raise left.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert no_pauses == list(RENAME_PAUSES[:failures])
    assert 1 <= sum(RENAME_PAUSES) <= 2
    assert list(RENAME_PAUSES) == sorted(set(RENAME_PAUSES))


def test_a_rename_that_stays_refused_is_an_error_and_other_errors_are_not_repeated(tmp_path, monkeypatch, no_pauses):
    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError, match=f"Permission denied: '{re.escape(str(tmp_path / 'a'))}'"):
        write_atomically(tmp_path / "a", "new")
    assert len(no_pauses) == len(RENAME_PAUSES)
    monkeypatch.setattr(os, "replace", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "a", "new")
    assert len(no_pauses) == len(RENAME_PAUSES)
    assert (tmp_path / "a").read_text() == "old"


def test_the_longest_names_can_be_written_and_longer_ones_are_named(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    write_atomically(tmp_path / ("x" * longest), "new")
    with pytest.raises(OSError, match=f"File name too long: '{re.escape(str(tmp_path))}/x+'"):
        write_atomically(tmp_path / ("x" * (longest + 1)), "new")
    assert os.listdir(tmp_path) == ["x" * longest]


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"this is a folder, not a file: give the name of a file: '.*folder'"):
        write_atomically(tmp_path / "folder", "new")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/full")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/full", "/dev/null"):
        with pytest.raises(OSError, match=f"this is a device or a pipe, not a file.*: '{path}'"):
            write_atomically(path, "new")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_missing_folder_is_named(tmp_path, parent):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"{parent} is not a folder: '.*{parent}/a'"):
        write_atomically(tmp_path / parent / "a", "new")


def test_a_link_stays_a_link_and_its_target_gets_the_content(tmp_path):
    for name in ("old", "dangling"):
        (tmp_path / f"{name}-link").symlink_to(tmp_path / name)
    (tmp_path / "old").write_text("old")
    for name in ("old", "dangling"):
        write_atomically(tmp_path / f"{name}-link", "new")
        assert (tmp_path / f"{name}-link").is_symlink()
        assert (tmp_path / name).read_text() == "new"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "a")
    with pytest.raises(OSError, match=r"nowhere is not a folder: '.*link'"):
        write_atomically(tmp_path / "link", "new")


def test_a_file_that_is_too_large_is_named(tmp_path):
    """The limit of the shell, which the kernel reports while the file is written."""
    program = (
        "import resource, sys; from tinyvit.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomically(sys.argv[1], 'x' * 5000)"
    )
    (tmp_path / "a").write_text("old")
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"File too large: '{tmp_path / 'a'}'" in done.stderr
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


# ---- one run in a folder ----

HOLD = """
import os, sys, time
from tinyvit.files import locked_folder
with locked_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""
WRITE = """
import os, sys, time
from tinyvit import files
files._rename = lambda *paths: (print("locked", flush=True), sys.stdin.read())
files.write_atomically(sys.argv[1] + "/a", "x")
"""


@contextlib.contextmanager
def other_process(program, folder):
    """Run a program until it has printed a line. It ends when its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_with_the_process_of_the_first(tmp_path):
    with other_process(HOLD, tmp_path) as process:
        with pytest.raises(BlockingIOError) as caught, locked_folder(tmp_path):
            pass
        text = str(caught.value)
        owner = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(rf"another run uses this folder \({owner}\): wait for its end, or give another", text), text
        assert str(tmp_path) in text
        assert LOCK in os.listdir(tmp_path)
        process.communicate()
        with locked_folder(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_run_does_not_block(tmp_path, number):
    with other_process(HOLD, tmp_path) as process:
        process.send_signal(number)
        process.wait()
        assert LOCK in os.listdir(tmp_path)
        with locked_folder(tmp_path):
            text = (tmp_path / LOCK).read_text()
            assert text.startswith(f"process {os.getpid()} on")
            assert text.count("process") == 1
    assert os.listdir(tmp_path) == []


def test_unfinished_files_of_killed_runs_are_removed_and_no_others(tmp_path):
    (tmp_path / ".mine.part").write_text("")
    with other_process(WRITE, tmp_path) as process:
        (unfinished,) = tmp_path.glob(".tinyvit-*.part")
        with locked_folder(tmp_path):
            assert unfinished.exists()  # its process is about to rename it
        process.kill()
        process.wait()
        assert unfinished.exists()
        with locked_folder(tmp_path):
            assert not unfinished.exists()
    assert os.listdir(tmp_path) == [".mine.part"]


def test_the_same_thread_may_lock_again_and_another_thread_may_not(tmp_path):
    found = []

    def try_to_lock():
        try:
            with locked_folder(tmp_path):
                found.append("locked")
        except BlockingIOError:
            found.append("refused")

    (tmp_path / "link").symlink_to(tmp_path)
    with locked_folder(tmp_path):
        with locked_folder(tmp_path / "link"):
            pass
        for _ in range(2):  # the inner context has not released the lock
            thread = threading.Thread(target=try_to_lock)
            thread.start()
            thread.join()
    try_to_lock()
    assert found == ["refused", "refused", "locked"]


def test_the_lock_ends_with_an_error(tmp_path):
    with pytest.raises(KeyError), locked_folder(tmp_path):
        raise KeyError
    with locked_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_its_owner_removes_is_no_lock(tmp_path, monkeypatch):
    """The owner removes the file after it was opened here. A third run would create and lock another file."""
    lock, calls = files._lock, []

    def late(file):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(file)
        lock(file)

    monkeypatch.setattr(files, "_lock", late)
    with locked_folder(tmp_path), other_attempt(tmp_path) as refused:
        assert refused
    assert len(calls) == 3


@contextlib.contextmanager
def other_attempt(folder):
    """Return whether another thread is kept out of the folder."""
    with ThreadPoolExecutor(1) as pool:
        yield isinstance(pool.submit(locked_folder(folder).__enter__).exception(), BlockingIOError)


def test_many_runs_take_turns(tmp_path):
    program = (
        "import os, sys, time\n"
        "from tinyvit.files import locked_folder\n"
        "done = 0\n"
        "while done < 150:\n"
        "    try:\n"
        "        with locked_folder(sys.argv[1]):\n"
        "            os.close(os.open(sys.argv[1] + '/owner', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(sys.argv[1] + '/owner')\n"
        "            done += 1\n"
        "    except BlockingIOError:\n"
        "        time.sleep(0)\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(3)
    ]
    for run in runs:
        assert run.communicate(timeout=60)[1] == b""
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(OSError, match=r"this folder cannot be used \(No such file or directory\): '.*missing'"):
        locked_folder(tmp_path / "missing").__enter__()


def test_file_systems_without_locks_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    with locked_folder(tmp_path):
        write_atomically(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_does_not_prevent_the_lock(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)  # noqa: SIM115
            self.fileno, self.close, self.truncate = self.file.fileno, self.file.close, self.file.truncate

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", Full, raising=False)
    with locked_folder(tmp_path):
        pass


def test_without_flock_an_open_file_is_the_lock(tmp_path, monkeypatch):
    """As on Windows, where a file that a process has open cannot be removed."""
    monkeypatch.setattr(files, "fcntl", None)
    with locked_folder(tmp_path):
        write_atomically(tmp_path / "a", "new")
        assert sorted(os.listdir(tmp_path)) == [LOCK, "a"]
        (tmp_path / ".tinyvit-1-2.part").touch()
    assert (tmp_path / "a").read_text() == "new"
    (tmp_path / LOCK).write_text("process 5 on elsewhere")
    with locked_folder(tmp_path):  # the file that a killed run left
        assert sorted(os.listdir(tmp_path)) == [LOCK, "a"]
    (tmp_path / LOCK).write_text("process 5 on elsewhere")
    monkeypatch.setattr(Path, "unlink", raising(PermissionError(13, "open elsewhere")))
    with pytest.raises(BlockingIOError, match=r"another run uses this folder \(process 5 on elsewhere\)"):
        locked_folder(tmp_path).__enter__()


def test_files_of_the_user_are_kept(tmp_path):
    (tmp_path / ".lock").write_text("precious")
    with locked_folder(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "precious"
    (tmp_path / "other").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="this folder cannot be used"), locked_folder(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "precious"


def test_the_lock_of_a_folder_that_was_replaced_stays(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked_folder(folder):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        other = other_process(HOLD, folder)
        other.__enter__()
    with other_attempt(folder) as refused:
        assert refused
    other.__exit__(None, None, None)
    with locked_folder(folder):
        pass
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name", ["file", "file/run", "dangling", "dangling/run"])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    reason = "file is a file" if name.startswith("file") else "dangling is a link to nowhere, which is missing"
    expected = rf"cannot create this folder \({reason}\): give another folder: '{name}'"
    with pytest.raises(OSError, match=expected):
        make_folder(name)
    make_folder("new/one")
    make_folder("new/one")
    assert Path("new/one").is_dir()
