"""`python -m tinyvit`: what the doctor finds on a machine that is well, and what to type on one that is not."""

import configparser
import functools
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
from tinyvit.__main__ import main
from tinyvit.backend import get_backend
from tinyvit.data import DatasetError, load_mnist
from tinyvit.doctor import FAILED, NOTED, OK, Finding, examine, host_memory, libraries, precisions
from tinyvit.training import Training

ROOT = Path(__file__).resolve().parent.parent
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
    monkeypatch.setattr("tinyvit.diagnosis.PACKAGES", ())
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that puts a fake CuPy, with all it tells of a GPU, where `import cupy` finds it."""

    def install(**fake):
        monkeypatch.setattr("tinyvit.diagnosis.PACKAGES", ())
        for name, module in strict_cupy.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "cupy", fake_cuda.make(**fake))
        # the default model is too much for kernels that are emulated
        monkeypatch.setattr(doctor, "Training", functools.partial(Training, kernels="off"))

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
    assert last == "Ready: python examples/train_mnist.py"
    names = ("tinyvit", "Python", "numpy", "scipy", "cores", "BLAS", "memory", "data", "train on cpu")
    assert [line for name in names for line in lines if line[6:].startswith(name + " ")]
    assert f"numpy         {np.__version__}" in printed
    assert "MNIST, 60,000 training and 10,000 test images, all 4 checksums hold, in " in printed
    assert "GPU" not in printed


@pytest.mark.parametrize(("device", "state", "status"), [("auto", "--", 0), ("gpu", "FAIL", 1)])
def test_a_cupy_that_cannot_be_imported(tmp_path, device, state, status):
    (tmp_path / "cupy.py").write_text("raise ImportError('libsomething.so: cannot open')")
    printed = command("doctor", "--device", device, path=tmp_path, expect=status)
    assert re.search(rf"(?m)^{state:<4}  GPU +device 'gpu' needs CuPy, which .*libsomething.*pip install", printed)
    assert printed.splitlines()[-1].startswith("Something above needs mending" if status else "Ready: ")


def test_alone_it_says_what_there_is():
    alone, asked = command(), command("--help")
    assert alone == asked
    for words in ("doctor", "examples/train_mnist.py", "whether this machine can train"):
        assert words in alone
    assert "--device {auto,cpu,gpu}" in command("doctor", "--help")


def test_a_command_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["nurse"])
    assert caught.value.code == 2
    assert "invalid choice: 'nurse'" in capsys.readouterr().err


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
    assert finding.found.startswith("none is used, as CuPy is not installed. With an NVIDIA GPU, type 'pip install")
    (finding,) = doctor.gpu(None, None, FAILED)
    assert finding.state == FAILED
    assert finding.found.startswith("device 'gpu' needs CuPy, which is not installed. Type 'pip install -e")


def test_what_is_needed_is_what_the_package_asks_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = set(setup["options"]["install_requires"].split())
    assert asked == {f"{name}>={least}" for name, least in doctor.NEEDED.items()}


def test_a_library_that_is_missing_or_too_old(monkeypatch):
    versions = dict.fromkeys(doctor.NEEDED, "99.1.dev0") | {"tqdm": None, "numpy": "1.26.4", "scipy": "1.13.0rc1"}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name))
    found = by_name(libraries())
    assert found["tqdm"] == Finding(FAILED, "tqdm", "not installed. Type: pip install 'tqdm>=4.66'")
    assert found["numpy"].found == "1.26.4, which is too old. Type: pip install 'numpy>=2.0'"
    assert found["scipy"].state == found["joblib"].state == OK
    assert "not installed, but used from source" in found["tinyvit"].found


def test_damaged_data_is_found(monkeypatch):
    def damaged():
        raise DatasetError("train-images-idx3-ubyte.gz", "SHA-256 00", "11")

    monkeypatch.setattr(doctor, "load_mnist", damaged)
    monkeypatch.setattr(doctor, "training", None)  # there is nothing to train on
    findings = by_name(examine("cpu"))
    assert findings["data"].state == FAILED
    assert re.search(r"expected SHA-256 00, found 11\. Type: git checkout .*mnist", findings["data"].found)
    assert "train on cpu" not in findings


def test_training_that_fails_is_one_line(monkeypatch, data):
    def fail(*arguments):
        raise OSError(28, "no room for 6 MB\nthat the workers share")

    monkeypatch.setattr(Training, "run", fail)
    loss, finding = doctor.training(data, get_backend("cpu"), FAILED)
    assert loss is None
    assert finding.state == FAILED
    assert "no room for 6 MB that the workers share. Try: python examples/train_mnist.py --workers 1" in finding.found


def test_training_that_does_not_learn_is_found(monkeypatch, data):
    def stay(run, *arguments):
        run.history = [{"train_loss": 2.3}, {"train_loss": float("nan")}]

    monkeypatch.setattr(Training, "run", stay)
    loss, finding = doctor.training(data, get_backend("cpu"), FAILED)
    assert (loss, finding.state) == (None, FAILED)
    assert "does not learn: loss 2.300 to nan" in finding.found


MEMINFO = "MemTotal:       8000000 kB\nMemFree:         100000 kB\nMemAvailable:    5000000 kB\n"


def test_memory_of_the_host_and_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert host_memory(tmp_path / "meminfo", tmp_path) == (5_120_000_000, 8_192_000_000)
    (tmp_path / "memory.current").write_text("700000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path / "meminfo", tmp_path) == (5_120_000_000, 8_192_000_000)
    (tmp_path / "memory.max").write_text("1000000000\n")
    assert host_memory(tmp_path / "meminfo", tmp_path) == (300_000_000, 1_000_000_000)


def test_memory_where_there_is_no_meminfo(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert host_memory(tmp_path / "none") == (None, 4_096_000)
    (tmp_path / "odd").write_text("something else\n")
    assert host_memory(tmp_path / "odd") == (None, 4_096_000)
    monkeypatch.delattr(os, "sysconf")  # Windows
    assert host_memory(tmp_path / "none") == (None, None)
    said = {(None, None): "does not say", (None, 8e9): "8.0 GB, how much", (2e9, 8e9): "2.0 GB of it"}
    for known, words in said.items():
        monkeypatch.setattr(doctor, "host_memory", lambda known=known: known)
        assert words in doctor.memory().found


# with a fake of one


def test_a_gpu_that_trains(gpu):
    gpu()
    findings = list(examine("gpu"))
    assert {finding.state for finding in findings} == {OK}
    found = by_name(findings)
    assert re.search(r"^14\..*built for CUDA 13.2", found["CuPy"].found)
    assert found["driver"].found.endswith("serves CUDA up to 13.0")
    assert (found["NVRTC"].found, found["cuBLAS"].found) == ("13.2", "13.2.0")
    assert found["card"].found == (
        "NVIDIA Fake, number 0 of 1, compute capability 9.0, 60.0 of 80.0 GB free; it has float32, TF32 and bfloat16"
    )
    form = r"computes a kernel within \de-\d\d and a matrix product within \de-\d\d of NumPy's"
    assert re.fullmatch(form, found["GPU"].found)
    assert "of the CPU's loss" in found["train on gpu"].found


@pytest.mark.parametrize(
    ("fake", "name", "words"),
    [
        ({"error": fake_cuda.TOO_OLD, "driver": 12040}, "GPU", "this one serves CUDA up to 12.4"),
        ({"error": fake_cuda.TOO_OLD, "driver": 0}, "driver", "none that answers. Install one"),
        ({"error": fake_cuda.NO_NVRTC, "nvrtc_error": fake_cuda.NO_NVRTC}, "NVRTC", "needs NVRTC"),
        ({"error": fake_cuda.NO_CUBLAS, "cublas_error": fake_cuda.NO_CUBLAS}, "cuBLAS", "needs cuBLAS"),
        ({"error": fake_cuda.NO_HEADERS}, "GPU", "needs CUDA's header files"),
    ],
)
def test_a_gpu_that_does_not_compute(gpu, fake, name, words):
    gpu(**fake)
    for state in (NOTED, FAILED):
        findings = list(doctor.gpu(None, None, state))
        assert words in by_name(findings)[name].found
        assert {finding.state for finding in findings} == {OK, state}
        assert all(re.search(ADVICE, finding.found) for finding in findings if finding.state == state)
        assert findings[-1].name == "GPU"  # nothing is computed after that


def test_a_gpu_that_computes_another_product_than_numpy(gpu):
    gpu()
    backend = get_backend("gpu")
    assert doctor.computation(backend, FAILED).state == OK
    backend.xp.exp = lambda x: x
    finding = doctor.computation(backend, FAILED)
    assert finding.state == FAILED
    assert "which is wrong. Update the driver and CuPy" in finding.found
    backend.xp.exp = fake_cuda.raising(fake_cuda.OutOfMemoryError())
    assert "has no memory left" in doctor.computation(backend, FAILED).found


def test_a_gpu_that_trains_to_another_loss(gpu, data):
    gpu()
    _, finding = doctor.training(data, get_backend("gpu"), FAILED, expected=1.5)
    assert finding.state == FAILED
    assert "but the CPU comes to 1.500. Type: pytest --device gpu" in finding.found


def test_a_gpu_on_which_training_fails(gpu, data, monkeypatch):
    gpu()
    monkeypatch.setattr(Training, "run", fake_cuda.raising(fake_cuda.OutOfMemoryError()))
    _, finding = doctor.training(data, get_backend("gpu"), NOTED, expected=2.0)
    assert finding.state == NOTED
    assert "has no memory left: 60,000 MB of 80,000 MB are free" in finding.found


def test_precisions():
    assert precisions((7, 5)) == "float32 (TF32 and bfloat16 need compute capability 8.0)"
    assert precisions((8, 0)) == precisions((12, 0)) == "float32, TF32 and bfloat16"


def test_the_release_of_the_driver(tmp_path):
    path = tmp_path / "version"
    assert doctor.driver_release(path) == "of a version that is not shown here"
    path.write_text("something")
    assert doctor.driver_release(path) == "of a version that is not shown here"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert doctor.driver_release(path) == "580.65.06"
