"""`python -m tinyvit`: what the doctor finds on a machine that is well, and what to type on one that is not."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import strict_cupy

from tinyvit import doctor
from tinyvit.backend import CPU
from tinyvit.commands import main
from tinyvit.data import DatasetError, load_mnist
from tinyvit.doctor import FAILED, NOTED, OK, Finding, examine, libraries
from tinyvit.gpu import get_backend
from tinyvit.kernels import KernelStep

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
ADVICE = r"Type|Try|Install|Update|Restart|See|Check|type 'pip"  # how a sentence begins that says what to do


def command(*arguments, path=ROOT, expect=0):
    """Run `python -m tinyvit` as a stranger does, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tinyvit", *arguments],
        env=environment,
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def no_cupy(monkeypatch):
    monkeypatch.setattr("tinyvit.gpu.diagnosis.PACKAGES", ())
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that makes `import cupy` give a fake CuPy with a GPU."""

    def install(**fake):
        monkeypatch.setattr("tinyvit.gpu.diagnosis.PACKAGES", ())
        for name, module in strict_cupy.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "cupy", fake_cuda.make(**fake))

    return install


@pytest.fixture(scope="module")
def data():
    return load_mnist()


def by_name(findings):
    return {finding.name: finding for finding in findings}


# as a command


def test_a_machine_that_trains_on_its_cpu():
    printed = command("doctor", "--device", "cpu")
    *lines, last = printed.splitlines()
    assert all(re.match(r"ok    \S", line) for line in lines), printed
    assert last == "Ready: tinyvit train"
    names = ("tinyvit", "Python", "numpy", "scipy", "cores", "BLAS", "loops", "memory", "data", "train on cpu")
    assert [line for name in names for line in lines if line[6:].startswith(name + " ")]
    assert f"numpy         {np.__version__}" in printed
    assert "MNIST, 60,000 training and 10,000 test images, all 4 checksums hold, in " in printed
    assert "GPU" not in printed


@pytest.mark.parametrize(("device", "state", "status"), [("auto", "--", 0), ("gpu", "FAIL", 1)])
def test_a_cupy_that_cannot_be_imported(tmp_path, device, state, status):
    (tmp_path / "cupy.py").write_text("raise ImportError('libsomething.so: cannot open')")
    printed = command("doctor", "--device", device, path=tmp_path, expect=status)
    assert re.search(rf"(?m)^{state:<4}  GPU +device 'gpu' needs CuPy, which .*libsomething.*pip install", printed)
    assert printed.splitlines()[-1].startswith("Not ready: see the lines marked FAIL." if status else "Ready: ")


def test_help_says_what_it_does():
    assert "whether this machine can train" in command("--help")
    assert "--device {auto,cpu,gpu}" in command("doctor", "--help")


def test_the_status_is_whether_something_needed_failed(monkeypatch, capsys):
    for states, status in (((OK, NOTED), 0), ((OK, FAILED, OK), 1)):
        findings = [Finding(state, "x", "y") for state in states]
        monkeypatch.setattr(doctor, "examine", lambda device, findings=findings: findings)
        assert main(["doctor"]) == status
    assert "FAIL  x             y\n" in capsys.readouterr().out


# without a GPU


def test_no_cupy_is_no_fault_unless_a_gpu_is_asked_for(no_cupy):
    (finding,) = doctor.gpu(None, None, NOTED)
    assert finding.state == NOTED
    assert re.match("unused, because CuPy is not installed. With an NVIDIA GPU, type 'pip", finding.found)
    (finding,) = doctor.gpu(None, None, FAILED)
    assert finding.state == FAILED
    assert re.match(r"device 'gpu' needs CuPy, which is not installed \(.*\)\. Type 'pip install -e", finding.found)


def test_what_is_needed_is_what_the_package_asks_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = set(setup["options"]["install_requires"].split())
    assert asked == set(doctor.NEEDED)


def test_a_library_that_is_missing_or_too_old(monkeypatch):
    versions = dict.fromkeys((requirement.split(">=")[0] for requirement in doctor.NEEDED), "99.1.dev0")
    versions |= {"tqdm": None, "numpy": "1.26.4", "scipy": "1.13.0rc1"}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name))
    found = by_name(libraries())
    assert found["tqdm"] == Finding(FAILED, "tqdm", "not installed. Type: pip install 'tqdm>=4.66'")
    assert found["numpy"].found == "1.26.4, which is too old. Type: pip install 'numpy>=2.0'"
    assert found["scipy"].state == found["joblib"].state == OK
    assert "not installed, run from source" in found["tinyvit"].found


def test_damaged_data_is_found(monkeypatch):
    def damaged():
        raise DatasetError("train-images-idx3-ubyte.gz", "SHA-256 00", "11")

    monkeypatch.setattr(doctor, "load_mnist", damaged)
    monkeypatch.setattr(doctor, "training", None)  # there is nothing to train on
    findings = by_name(examine("cpu"))
    assert findings["data"].state == FAILED
    assert re.search(r"expected SHA-256 00, found 11\. Type: git checkout .*mnist", findings["data"].found)
    assert "train on cpu" not in findings


def test_an_installed_package_is_reinstalled_and_has_no_tests_to_run(monkeypatch, no_cupy):
    def damaged():
        raise DatasetError("train-images-idx3-ubyte.gz", "SHA-256 00", "11")

    monkeypatch.setattr("tinyvit.gpu.diagnosis.CHECKOUT", None)
    monkeypatch.setattr(doctor, "load_mnist", damaged)
    _, finding = doctor.data_set()
    assert finding.found.endswith("Type: pip install --force-reinstall --no-deps tinyvit")
    (finding,) = doctor.gpu(None, None, NOTED)
    assert "type 'pip install \"tinyvit[gpu]\"' if nvidia-smi shows CUDA 13 or newer" in finding.found
    assert "-e" not in finding.found


def test_training_that_fails_is_one_line(monkeypatch, data):
    monkeypatch.setattr(doctor, "trial", fake_cuda.raising(OSError(28, "no room for 6 MB\nof shared memory")))
    losses, finding = doctor.training(CPU, data, FAILED)
    assert losses is None
    assert finding.state == FAILED
    assert "no room for 6 MB of shared memory. Type: pytest, and report what fails" in finding.found


@pytest.mark.parametrize("last", [2.3, 2.4, float("nan")])
def test_training_that_does_not_learn_is_found(monkeypatch, data, last):
    monkeypatch.setattr(doctor, "trial", lambda backend, data: [2.3, 2.2, last])
    losses, finding = doctor.training(CPU, data, FAILED)
    assert (losses, finding.state) == (None, FAILED)
    assert f"does not learn: loss 2.300 to {last:.3f}" in finding.found


def test_the_trial_really_trains(data):
    losses = doctor.trial(CPU, data)
    assert len(losses) == doctor.STEPS
    assert losses == doctor.trial(CPU, data)
    assert losses[-1] < 0.9 * losses[0]


MEMINFO = "MemTotal:       8000000 kB\nMemFree:         100000 kB\nMemAvailable:    5000000 kB\n"


def test_memory_of_the_host_and_of_a_container(tmp_path):
    def found():
        return doctor.memory(tmp_path / "meminfo", tmp_path).found

    (tmp_path / "meminfo").write_text(MEMINFO)
    assert found().startswith("5.1 of 8.2 GB are free")
    (tmp_path / "memory.current").write_text("700000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert found().startswith("5.1 of 8.2 GB are free")
    (tmp_path / "memory.max").write_text("1000000000\n")
    assert found().startswith("0.3 of 1.0 GB are free")
    (tmp_path / "memory.max").write_text("600000000\n")
    assert found().startswith("0.0 of 0.6 GB are free")


def test_memory_where_there_is_no_meminfo(tmp_path):
    (tmp_path / "odd").write_text("something else\n")
    for name in ("none", "odd"):
        finding = doctor.memory(tmp_path / name, tmp_path)
        assert finding.state == OK
        assert finding.found == "unknown on this system; training needs 0.3 GB, or 0.6 GB with compiled loops"


# with a fake of one


def test_a_gpu_that_trains(gpu):
    gpu()
    findings = list(examine("gpu"))
    assert {finding.state for finding in findings} == {OK}
    found = by_name(findings)
    assert re.search(r"^14\.\S+ \(not from a package\) for CUDA 13\.2; the driver's CUDA: 13.0", found["CuPy"].found)
    assert found["GPU"].found == (
        "NVIDIA Fake, compute capability 9.0, 60.0 of 80.0 GB free; it supports float32, TF32 and bfloat16; "
        "NVRTC 13.2, cuBLAS 13.2.0"
    )
    assert re.search(r"; the losses differ from the CPU's by \de[-+]\d\d$", found["train on gpu"].found)


@pytest.mark.parametrize(
    ("fake", "driver", "words"),
    [
        ({"error": fake_cuda.TOO_OLD, "driver": 12040}, "12.4", "this one supports CUDA up to 12.4"),
        ({"error": fake_cuda.TOO_OLD, "driver": 0}, "none", r"no NVIDIA driver is installed .*\. Install one"),
        ({"error": fake_cuda.NO_NVRTC}, "13.0", "needs NVRTC"),
        ({"error": fake_cuda.NO_CUBLAS}, "13.0", "needs cuBLAS"),
        ({"error": fake_cuda.NO_HEADERS}, "13.0", "needs CUDA's header files"),
        ({"exp": lambda x: x}, "13.0", "computes wrong results .* update the driver"),
    ],
)
def test_a_gpu_that_does_not_compute(gpu, fake, driver, words):
    gpu(**fake)
    for state in (NOTED, FAILED):
        versions, finding = doctor.gpu(None, None, state)  # nothing is computed after a failure
        assert versions.state == OK
        assert f"the driver's CUDA: {driver}" in versions.found
        assert (finding.state, finding.name) == (state, "GPU")
        assert re.search(words, finding.found)
        assert re.search(ADVICE, finding.found)


@pytest.mark.parametrize("place", [0, 3, -1])
def test_a_gpu_that_trains_to_other_losses(gpu, data, monkeypatch, place):
    gpu()
    expected = [2.4, 3.0, 2.5, 2.0, 1.8]
    found = list(expected)
    monkeypatch.setattr(doctor, "trial", lambda backend, data: found)
    found[place] = expected[place] * (1 + 0.8 * doctor.AGREEMENT)
    assert doctor.training(get_backend("gpu"), data, FAILED, expected)[1].state == OK
    for wrong in (expected[place] * (1 + 1.2 * doctor.AGREEMENT), expected[place] * 0.9):
        found[place] = wrong
        losses, finding = doctor.training(get_backend("gpu"), data, FAILED, expected)
        assert (losses, finding.state) == (None, FAILED)
        assert ", more than 2e-03. Type: pytest --device gpu, and report what fails" in finding.found
    found[place] = float("nan")
    assert doctor.training(get_backend("gpu"), data, FAILED, expected)[1].state == FAILED


def test_a_gpu_on_which_training_fails(gpu, data, monkeypatch):
    gpu()
    monkeypatch.setattr(KernelStep, "__call__", fake_cuda.raising(fake_cuda.OutOfMemoryError()))
    _, finding = doctor.training(get_backend("gpu"), data, NOTED, expected=[2.0])
    assert finding.state == NOTED
    assert "has no memory left: 60,000 MB of 80,000 MB are free" in finding.found


def test_workers_that_do_not_start_are_found(data, monkeypatch):
    monkeypatch.setattr("tinyvit.training.step.available_cores", lambda: 2)
    monkeypatch.setattr(sys, "executable", "")
    _, finding = doctor.training(doctor.CPU, data, FAILED)
    assert finding.state == FAILED
    assert "train with one worker" in finding.found


def test_kernels_that_do_not_compile(gpu, data, monkeypatch):
    gpu()
    monkeypatch.setattr("tinyvit.training.step.Kernels", fake_cuda.raising(fake_cuda.UNKNOWN_CARD))
    _, finding = doctor.training(get_backend("gpu"), data, FAILED)
    assert finding.state == FAILED
    assert "is a card that CUDA 13.2 does not compile for" in finding.found


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), "compute capability 7.5, .*; it supports float32 only; "),
        ((8, 0), "float32, TF32 and bfloat16"),
        ((12, 0), "float32, TF32"),
    ],
)
def test_precisions(capability, words):
    assert re.search(words, doctor.card(fake_cuda.make(capability=capability).cuda))
