"""Ctrl-C, SIGTERM, closed streams, encodings and little memory: a command ends with one line and its own status."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyvit
from tinyvit import console

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
TINYVIT = [sys.executable, "-m", "tinyvit"]
EXAMPLE = [sys.executable, str(ROOT / "examples" / "train_mnist.py")]
MODEL = ["--width", "16", "--depth", "2", "--heads", "2", "--mlp-width", "24"]
TINY = [*MODEL, "--train-limit", "600", "--test-limit", "200", "--workers", "2", "--epochs", "2"]
SCRIPT = shutil.which("tinyvit", path=os.path.dirname(sys.executable))
extended = pytest.mark.extended


def start(command, cwd, **options):
    """Start a command that heeds Ctrl-C, also where these tests run in the background and ignore it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, preexec_fn=heed, **pipes | options)


def wait_for_first_line(tmp_path):
    """Start a program that says when Python reaches its first line, and return the seconds until then."""
    began = time.monotonic()
    process = start([sys.executable, "-c", "print(flush=True)"], tmp_path)
    process.stdout.readline()
    seconds = time.monotonic() - began
    process.communicate()
    return seconds


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a finished run, with a picture of a seven beside it."""
    folder = tmp_path_factory.mktemp("finished")
    _, err = (process := start([*TINYVIT, "train", *TINY, "--out", "run"], folder)).communicate(timeout=120)
    assert process.returncode == 0
    assert re.sub("note: Numba compiled .*\n", "", err) == ""  # the first run on a machine compiles
    seven = 255 - tinyvit.load_mnist().test_images[0]
    Image.fromarray(seven).resize((280, 280)).save(folder / "seven.png")
    return folder


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, task.read_text().split())
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def signal_at(delay, command, cwd, number):
    """Send a signal after `delay` seconds. Return the status, both outputs, and the children at that time."""
    process = start(command, cwd)
    time.sleep(delay)
    workers = children(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, workers


COMMANDS = {
    "module": ([*TINYVIT, "train", *TINY], signal.SIGINT),
    "example": ([*EXAMPLE, *TINY], signal.SIGINT),
    "script": ([SCRIPT, "train", *TINY], signal.SIGINT),
    "evaluate": ([*TINYVIT, "evaluate", "{folder}/run", "--out", "again"], signal.SIGINT),
    "predict": ([*TINYVIT, "predict", "{folder}/seven.png", "--explain", "explained.png"], signal.SIGINT),
    "terminated": ([*TINYVIT, "train", *TINY], signal.SIGTERM),
}


@extended
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_moment_is_one_line_and_its_status(run_folder, tmp_path, name):
    """Until Python reaches our first line, a signal ends it as it ends any Python program. This is measured here."""
    command, number = COMMANDS[name]
    if command[0] is None:
        pytest.skip("needs an installation: pip install -e .")
    command = [part.format(folder=run_folder) for part in command]
    began = time.monotonic()
    out, err = (process := start(command, tmp_path)).communicate(timeout=120)
    whole = time.monotonic() - began
    assert (process.returncode, err) == (0, "")
    ours = 3 * max(wait_for_first_line(tmp_path) for _ in range(3))  # Python's start, and a few standard modules
    rng, answered = random.Random(f"signals of {name}"), 0
    for _ in range(12):
        status, out, err, workers = signal_at(rng.uniform(ours, whole), command, tmp_path, number)
        if status == 0:  # it has ended already, or is ending: its last line is there
            assert out.splitlines()[-1].startswith(("results: ", "    5:"))
            continue
        assert (status, err.count("\n")) == (128 + number, 1), err
        assert err.startswith(("interrupted", "terminated", "stopped"))
        answered += 1
        deadline = time.monotonic() + 10
        while any(map(alive, workers)):
            assert time.monotonic() < deadline, "a helper outlived the command"
            time.sleep(0.02)
        assert not list(tmp_path.glob("**/.*.part"))
    assert answered >= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_answered(tmp_path, number):
    """The sitecustomize of this Python sends the signal from inside the import of NumPy."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        name == 'numpy.linalg' and os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = start([*TINYVIT, "--help"], tmp_path, env=environment)
    _, err = process.communicate(timeout=60)
    line = "interrupted\n" if number == signal.SIGINT else "terminated\n"
    assert (process.returncode, err) == (128 + number, line)


def in_a_command(statements, tmp_path):
    """Run statements in a process that a command has taken over, and return its status and its errors."""
    program = f"import os, signal\nfrom tinyvit import console\nconsole.take_over()\n{statements}"
    process = start([sys.executable, "-c", program], tmp_path)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


LOST = {  # where Python or a library loses an exception
    "destructor": "Lost()",
    "ignored": "try: signal.raise_signal(2)\n        except BaseException: pass",
    "replaced": "try: signal.raise_signal(2)\n        except BaseException: 1 / 0",
}
INSIDE = """
class Lost:
    def __del__(self):
        signal.raise_signal(2)
try:
    with console.cleanup_after_signals():
        {}
except KeyboardInterrupt:
    print(*console.interruption(), flush=True)
"""


@pytest.mark.parametrize("name", LOST)
def test_an_interrupt_that_a_library_loses_ends_the_command(tmp_path, name):
    for number, word in ((2, "interrupted"), (15, "terminated")):
        program = INSIDE.format(LOST[name]).replace("raise_signal(2)", f"raise_signal({number})")
        found = in_a_command(f"{program}os._exit(0)", tmp_path)
        assert found in [(0, f"{word} {128 + number}\n", ""), (128 + number, "", f"{word}\n")]


def test_an_interrupt_that_a_destructor_loses_comes_again_while_the_work_goes_on(tmp_path):
    work = "try:\n            Lost()\n            while True: time.sleep(0.1)\n        finally: print('cleaned')"
    for number, word in ((2, "interrupted"), (15, "terminated")):
        program = f"import time{INSIDE.format(work)}".replace("raise_signal(2)", f"raise_signal({number})")
        process = start([sys.executable, "-c", f"import os, signal\nfrom tinyvit import console\n"
                         f"console.take_over()\n{program}"], tmp_path)  # fmt: skip
        assert process.communicate(timeout=60) == (f"cleaned\n{word} {128 + number}\n", "")


def test_the_context_cleans_up_and_a_second_interrupt_ends_at_once(tmp_path):
    statements = INSIDE.format("signal.raise_signal(15)") + "signal.raise_signal(2)"
    assert in_a_command(statements, tmp_path) == (130, "terminated 143\n", "interrupted\n")


def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path):
    program = "import signal\nsignal.signal(2, signal.SIG_IGN)\nfrom tinyvit import console\nconsole.take_over()\n"
    process = start([sys.executable, "-c", f"{program}signal.raise_signal(2)\nprint('alive')"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "alive\n", "")


def test_a_library_keeps_the_handlers_of_its_program():
    assert not console._process.taken_over
    assert console._on_signal not in map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))


@extended
def test_the_server_stops_with_status_0(tmp_path):
    pytest.importorskip("uvicorn", reason='needs the extra: pip install -e ".[app]"')
    for number in (signal.SIGINT, signal.SIGTERM):
        for delay in (0.0, 0.05, 1.0):
            process = start([*TINYVIT, "serve", "--port", "0", "--no-browser"], tmp_path)
            assert process.stdout.readline().startswith("the page is at")
            time.sleep(delay)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, "")


# ---- streams ----


@extended
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_every_command_works_with_closed_streams(run_folder, tmp_path, closed):
    python = f"{sys.executable} -m tinyvit"
    commands = {
        f"train {' '.join(TINY)} --out run": "run/metrics.json",
        f"evaluate {run_folder}/run --out again": "again/metrics.json",
        f"predict {run_folder}/seven.png --explain x.png": "x.png",
        "doctor --device cpu": None,
        "--version": None,
    }
    for command, result in commands.items():
        process = start(["sh", "-c", f"exec {python} {command} {closed}"], tmp_path)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, ""), command
        assert bool(out) == (">&-" not in closed.replace("2>&-", ""))
        assert result is None or (tmp_path / result).stat().st_size > 0
    model = Path("run") / "model.safetensors"
    assert (tmp_path / model).read_bytes() == (run_folder / model).read_bytes()


@extended
def test_the_server_starts_with_closed_streams(tmp_path):
    pytest.importorskip("uvicorn", reason='needs the extra: pip install -e ".[app]"')
    command = f"exec {sys.executable} -m tinyvit serve --port 0 --no-browser <&- 2>&-"
    process = start(["sh", "-c", command], tmp_path)
    assert process.stdout.readline().startswith("the page is at")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


@extended
@pytest.mark.skipif(os.name != "posix", reason="needs file names of any bytes")
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_name_that_the_terminal_lacks_is_printed_and_the_work_goes_on(tmp_path, encoding):
    names = [b"good.png", b"bad\xff.png", "手写.png".encode(), b"other.png"]
    seven = Image.fromarray(255 - np.asarray(tinyvit.load_mnist().test_images[0])).resize((280, 280))
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            seven.save(file, "png")
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    command = [*TINYVIT, "predict", *names, "nowhere.png", "--explain", b"\xffexplained.png"]
    process = start(command, tmp_path, env=environment, text=False)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2  # one file is missing
    assert out.count(b".png: 7 (") == 4
    assert b"bad\\udcff.png: 7 (" in out
    assert err == b"error: nowhere.png: cannot be read: No such file or directory\n"
    assert os.path.exists(os.path.join(os.fsencode(tmp_path), b"\xffexplained.png"))


@extended
def test_a_folder_that_the_terminal_lacks_holds_a_run(tmp_path):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"}
    process = start([*TINYVIT, "train", *TINY, "--out", "runs_手写"], tmp_path, env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.count("results: runs_\\u624b\\u5199\n") == 2
    assert (tmp_path / "runs_手写" / "metrics.json").exists()


# ---- memory ----


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count address space in other ways")
@pytest.mark.parametrize("kind", ["v", "d"])
@pytest.mark.parametrize("command", ["train", "evaluate x", "predict x", "doctor", "serve"])
def test_too_little_memory_is_one_line_before_the_imports(tmp_path, kind, command):
    script = f"ulimit -{kind} 150000; exec {sys.executable} -m tinyvit {command}"
    process = start(["sh", "-c", script], tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert err.startswith(f"error: not enough memory: tinyvit {command.split()[0]} needs about ")
    assert f"and ulimit -{kind} allows 154 MB" in err


@extended
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count address space in other ways")
def test_whatever_the_limit_a_run_ends_well_or_with_one_line_before_its_first_step(tmp_path):
    outcomes = []
    for limit in range(500_000, 1_300_001, 100_000):
        command = [*TINYVIT, "train", *TINY, "--out", f"run{limit}"]
        script = f"ulimit -v {limit}; exec {' '.join(command)}"
        process = start(["sh", "-c", script], tmp_path)
        out, err = process.communicate(timeout=120)
        outcomes.append(process.returncode)
        if process.returncode:
            assert (process.returncode, err.count("\n")) == (1, 1), err
            assert err.startswith("error: not enough memory: ")
            assert "epoch" not in out
    assert outcomes == sorted(outcomes, reverse=True)  # more memory never makes it worse
    assert (outcomes[0], outcomes[-1]) == (1, 0)


@extended
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_ten_kills_lose_nothing(tmp_path):
    script, record = ROOT / "benchmarks" / "kills.py", tmp_path / "kills.json"
    process = start([sys.executable, str(script), "--count", "10", "--json", str(record)], tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    counts = json.loads(record.read_text())["counts"]
    assert sum(row["count"] for row in counts) == 10
    assert {row["outcome"] for row in counts} == {"same bits"}


# ---- outputs that cannot be written, and too few files ----


@extended
def test_a_full_device_and_a_closed_pipe_are_named(tmp_path):
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["doctor", "--device", "cpu"]):
        with open("/dev/full", "w") as full:
            process = start([*TINYVIT, *arguments], tmp_path, stdout=full)
            _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (2, "error: standard output: No space left on device\n")
    process = start([*TINYVIT, "train", *TINY, "--out", "run"], tmp_path)
    with process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 2
    assert err.startswith("error: standard output: Broken pipe")
    advice = "to continue from the last checkpoint: tinyvit train --resume run"
    assert (advice in err) == (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert err.count("\n") == 1


@extended
def test_too_few_open_files_are_said(tmp_path):
    command = ["bash", "-c", 'ulimit -n 16; exec "$@"', "bash", *TINYVIT, "train", *TINY, "--out", "run"]
    process = start(command, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 or "Too many open files: type ulimit -n 256" in err.splitlines()[-1]
    assert "Traceback" not in err


@extended
def test_a_second_signal_ends_a_run_whose_helper_is_stopped(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start([*TINYVIT, "train", *TINY, "--epochs", "500", "--out", f"run-{number}"], tmp_path)
        while not process.stdout.readline().startswith("epoch"):
            pass
        (helper,) = children(process.pid)
        os.kill(helper, signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(number)
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert f"to continue from the last checkpoint: tinyvit train --resume run-{number}" in err
        assert not alive(helper)


def test_files_in_place_of_folders_and_folders_in_place_of_files(run_folder, tmp_path):
    for arguments, expected in (
        (["train", "--resume", f"{run_folder}/run/checkpoint.safetensors"], f"give {run_folder}/run"),
        (["predict", str(run_folder)], "expected a picture, found a folder: give the pictures in it"),
        (["predict", str(run_folder), "--csv", "o.csv"], "expected a CSV file, found a folder"),
    ):
        process = start([*TINYVIT, *arguments], tmp_path)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert err.startswith("error: ")
        assert expected in err
        assert err.count("\n") == 1
