"""One worker needs nothing that only Linux or POSIX has, and a missing /dev/shm or home folder gives no warning.

Windows and macOS themselves are untested. `benchmarks/environments.py` runs all tests in such environments.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinyvit.backend import available_cores, compiled_loops

pytestmark = pytest.mark.extended

# Python without these, and with a /dev/shm that cannot be found, stands for another system.
WITHOUT = """
import os, pathlib, subprocess, sys

for name in ("posix_fallocate", "memfd_create", "O_DIRECTORY", "O_TMPFILE"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("fcntl", "resource", "termios", "pty", "tty", "grp"):
    sys.modules[name] = None  # importing it raises ImportError

start, is_dir, exists = subprocess.Popen.__init__, pathlib.Path.is_dir, pathlib.Path.exists

def start_without(self, *arguments, **named):
    for name in ("pass_fds", "start_new_session", "preexec_fn", "process_group"):
        if named.get(name):
            raise ValueError(f"{name} is not supported on this system")
    start(self, *arguments, **named)

def refuse(event, arguments):
    if event in ("open", "os.listdir") and str(arguments[0]).startswith("/dev/shm"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

subprocess.Popen.__init__ = start_without
pathlib.Path.is_dir = lambda path: str(path) != "/dev/shm" and is_dir(path)
pathlib.Path.exists = lambda path, **named: str(path) != "/dev/shm" and exists(path, **named)
sys.addaudithook(refuse)
"""
ROOT = Path(__file__).resolve().parents[2]
COMMAND = "from tinyvit.commands import main; sys.exit(main(sys.argv[1:]))"


def run(program, *arguments, folder):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_stand_in_refuses_what_other_systems_lack(tmp_path):
    for program, error in {
        "os.posix_fallocate": "AttributeError",
        "import fcntl": "ModuleNotFoundError",
        "subprocess.Popen(['true'], start_new_session=True)": "start_new_session is not supported",
        "subprocess.Popen(['true'], pass_fds=(1,))": "pass_fds is not supported",
        "open('/dev/shm/file', 'w')": "FileNotFoundError",
        "assert pathlib.Path('/dev/shm').is_dir()": "AssertionError",
    }.items():
        assert error in run(program, folder=tmp_path).stderr, program
    assert run("subprocess.run(['true'], check=True); open('file', 'w').close()", folder=tmp_path).stderr == ""


def test_one_worker_trains_resumes_and_tests(tmp_path):
    training = ["train", "--workers", 1, "--train-limit", 300, "--test-limit", 100, "--loops", "off"]
    for arguments in (
        [*training, "--epochs", 2, "--stop-after", 1, "--out", "run"],
        ["train", "--resume", "run"],
        ["evaluate", "run", "--test-limit", 100],
    ):
        done = run(COMMAND, *arguments, folder=tmp_path)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 3


# ---- no /dev/shm, and no folder for caches ----


def python(*arguments, folder, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPLCONFIGDIR"))}
    kept["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


NO_SEMAPHORES = """
import _multiprocessing

class SemLock(_multiprocessing.SemLock):
    def __new__(self, *arguments, **named):
        raise FileNotFoundError(2, "No such file or directory")

_multiprocessing.SemLock = SemLock  # as without /dev/shm
"""
CORES = "from tinyvit.backend import available_cores; print(available_cores())\n"
REPORT = """
import numpy as np
from tinyvit.evaluate import classification_report, confusion, evaluation_of_logits
evaluation = evaluation_of_logits(np.eye(3), np.arange(3))
"""


@pytest.mark.parametrize("rest", ["", f"{REPORT}confusion(evaluation)", f"{REPORT}classification_report(evaluation)"])
def test_without_semaphores_all_cores_are_used_and_nothing_warns(rest, tmp_path):
    assert "serial mode" in python("-c", NO_SEMAPHORES + "import joblib", folder=tmp_path).stderr
    done = python("-W", "error", "-c", f"{NO_SEMAPHORES}{rest}\n{CORES}", folder=tmp_path)
    assert done.stderr == ""
    assert done.stdout == f"{available_cores()}\n"


def test_without_a_home_folder_a_picture_is_drawn_and_nothing_warns(tmp_path):
    command = ["-m", "tinyvit", "predict", ROOT / "examples" / "five.png", "--explain", "explained.png"]
    done = python(*command, folder=tmp_path, HOME="/dev/null")
    assert done.stderr == ""
    assert (tmp_path / "explained.png").is_file()


@pytest.mark.parametrize(("folder", "expected"), [("/cache", "later runs load them"), (None, "set NUMBA_CACHE_DIR")])
def test_the_note_about_compilation_says_how_later_runs_save_it(folder, expected, monkeypatch, caplog):
    stats = SimpleNamespace(cache_path=folder)
    loops = SimpleNamespace(prepare=lambda: 2.5, gelu_forward=SimpleNamespace(stats=stats))
    monkeypatch.setattr("tinyvit.backend.importlib.import_module", lambda name: loops)
    assert compiled_loops.__wrapped__() is loops
    assert "in 2.5 s; " in caplog.text
    assert expected in caplog.text
