"""Check whether this machine can train. A line about a fault says what to type."""

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

from tinyvit.backend import CPU, available_cores, compiled_loops, one_blas_thread, use_loops
from tinyvit.data import DataError, load_mnist
from tinyvit.data.mnist import SHA256
from tinyvit.gpu import CuPyMissing, DeviceError, diagnosis, get_backend, import_cupy
from tinyvit.memory import Workspace
from tinyvit.model import ViTConfig, initialise, loss_and_gradient
from tinyvit.training import TrainingConfig
from tinyvit.training.state import new_state
from tinyvit.training.step import make_step

NEEDED = (  # equal to install_requires in setup.cfg
    "numpy>=2.0", "scipy>=1.13", "matplotlib>=3.9", "scikit-learn>=1.5", "tqdm>=4.66", "safetensors>=0.4.3",
    "threadpoolctl>=3.5", "joblib>=1.3", "pillow>=10.1",
)  # fmt: skip
BATCH, STEPS = 64, 8
NEEDED_MEMORY = "0.3 GB, or 0.6 GB with compiled loops"
IMAGES = 32  # the share of one of two workers
AGREEMENT = 2e-3  # largest allowed relative difference between the losses of a GPU and of the CPU; TF32 is below
HERE = Path(__file__).resolve().parent
OK, FAILED, NOTED = "ok", "FAIL", "--"
REPORT = "Type: pytest, and report what fails" if diagnosis.CHECKOUT else "Please report this line"


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # OK, FAILED, or NOTED for a fault that does not prevent training
    name: str
    found: str  # the result, and what to type after a fault


def main(device="auto"):
    """Examine this machine and print each finding.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}, optional
        "cpu" ignores GPUs, "gpu" requires one, and "auto" reports on one without requiring it.

    Returns
    -------
    int
        The exit status: 0 if training works on the CPU and, with "gpu", also on the GPU, and 1 otherwise.
    """
    failed = False
    for finding in examine(device):
        failed |= finding.state == FAILED
        print(f"{finding.state:<4}  {finding.name:<13} {finding.found}", flush=True)
    print("Not ready: see the lines marked FAIL." if failed else "Ready: tinyvit train")
    return int(failed)


def examine(device="auto"):
    """Yield every `Finding` of this machine as soon as its check ends."""
    yield from libraries()
    yield Finding(OK, "cores", f"this process may use {available_cores()} of {os.cpu_count()}")
    yield blas()
    yield loops()
    yield memory()
    data, finding = data_set()
    yield finding
    losses = None
    if data is not None:
        losses, finding = training(CPU, data, FAILED)
        yield finding
    if device != "cpu":
        yield from gpu(data, losses, FAILED if device == "gpu" else NOTED)


def libraries():
    """Yield a finding for tinyvit, for Python, and for each required library."""
    yield Finding(OK, "tinyvit", f"{version('tinyvit') or 'not installed, run from source'}, in {HERE}")
    yield Finding(OK, "Python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    for requirement in NEEDED:
        name, least = requirement.split(">=")
        found = version(name)
        fault = "not installed" if found is None else f"{found}, which is too old"
        if found is not None and numbers(found) >= numbers(least):
            yield Finding(OK, name, found)
        else:
            yield Finding(FAILED, name, f"{fault}. Type: pip install '{requirement}'")


def version(name):
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(text):
    """Return the leading numbers of a version for comparisons, such as (2, 0, 1) for "2.0.1rc2"."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", text)[0].split(".")))


def blas():
    """Return the finding for the library that computes NumPy's matrix products, with its speed in this model."""
    form = "{internal_api} {version}, kernels for {architecture}, {num_threads} threads"
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    texts = {form.format_map({"architecture": "an unknown processor"} | pool) for pool in pools}
    config = ViTConfig()
    rows = IMAGES * config.tokens  # one thread's rows
    x, w = np.ones((rows, config.width), np.float32), np.ones((config.width, config.mlp_width), np.float32)
    with one_blas_thread():
        rate = 2 * x.size * config.mlp_width / least_seconds(lambda: x @ w) / 1e9
    name = "; ".join(sorted(texts)) or "a library that threadpoolctl does not recognise"
    return Finding(OK, "BLAS", f"{name}; {rate:.0f} GFLOP/s per thread on the products of this model")


def loops():
    """Return the finding for the compiled loops, with the time of a gradient with and without them."""
    if compiled_loops() is None:
        text = f"unused, because Numba is missing or fails. To train faster, type {diagnosis.pip_install('fast')}"
        return Finding(OK, "loops", text)
    config, workspace = ViTConfig(), Workspace()
    parameters = initialise(config)
    images, labels = np.zeros((IMAGES, *config.image_shape)), np.zeros(IMAGES, int)

    def gradient():
        with workspace:
            loss_and_gradient(images, labels, parameters, config)

    seconds = {}
    for choice in ("off", "on"):
        with one_blas_thread(), use_loops(choice):
            seconds[choice] = least_seconds(gradient)
    took = f"a gradient takes {1e3 * seconds['on']:.0f} ms, and {1e3 * seconds['off']:.0f} ms with NumPy alone"
    return Finding(OK, "loops", f"compiled by Numba {version('numba')}; for {IMAGES} images {took}")


def least_seconds(function, rounds=5):
    """Return the least time that a call took, after one that is not counted."""
    function()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def memory(meminfo="/proc/meminfo", group="/sys/fs/cgroup"):
    """Return the finding for the memory of a Linux system, or of the container `group` if that is smaller."""
    try:
        lines = dict(line.split(":") for line in Path(meminfo).read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return Finding(OK, "memory", f"unknown on this system; training needs {NEEDED_MEMORY}")
    with contextlib.suppress(OSError, ValueError):  # outside a container, or a container without a limit
        limit, used = (int((Path(group) / name).read_text()) for name in ("memory.max", "memory.current"))
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return Finding(OK, "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free; training needs {NEEDED_MEMORY}")


def data_set():
    """Return the data set in the package, or None, and the finding."""
    try:
        data = load_mnist()
    except DataError as error:
        files = f"git checkout {HERE / 'data' / 'mnist'}"
        todo = files if diagnosis.CHECKOUT else "pip install --force-reinstall --no-deps tinyvit"
        return None, Finding(FAILED, "data", f"{error}. Type: {todo}")
    counts = f"{len(data.train_images):,} training and {len(data.test_images):,} test images"
    return data, Finding(OK, "data", f"{data.name}, {counts}, all {len(SHA256)} checksums hold, in {data.source}")


def trial(backend, data):
    """Train the default model on one batch, and return the loss of each step as a list of floats.

    The steps are those of `tinyvit train`, with workers on a CPU and with kernels on a GPU.
    """
    config = TrainingConfig(epochs=STEPS, batch_size=BATCH, learning_rate=1e-3, validation=0)
    state = new_state(ViTConfig(), config, backend)
    images, labels = data.train_images[:BATCH], data.train_labels[:BATCH]
    losses = []
    step = make_step(
        state,
        images=images,
        labels=labels,
        model_config=ViTConfig(),
        config=config,
        backend=backend,
    )
    with step:
        for epoch in range(STEPS):
            step.begin_epoch(epoch)
            step()
            losses.append(step.totals()[0] / BATCH)
    return losses


def training(backend, data, fault, expected=None):
    """Return the losses of `trial`, or None, and the finding.

    The state of the finding is `fault` if the trial fails, if the loss does not fall, or if the losses differ from
    the list `expected`.
    """
    name, began = f"train on {backend.device}", time.perf_counter()
    try:
        losses = trial(backend, data)
    except Exception as error:  # a broken machine or CuPy may raise any type of error
        text = f"{diagnosis.one_line(error, limit=500)}. {REPORT}"
        return None, Finding(fault, name, text if backend.device == "cpu" else diagnosis.explain(error, backend.xp))
    text = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps and {time.perf_counter() - began:.1f} s"
    if not losses[-1] < losses[0]:
        return None, Finding(fault, name, f"does not learn: {text}. {REPORT}")
    if expected is not None:
        differences = [abs(found - right) / right for found, right in zip(losses, expected, strict=True)]
        text += f"; the losses differ from the CPU's by {max(differences):.0e}"
        if not all(difference < AGREEMENT for difference in differences):
            text += f", more than {AGREEMENT:.0e}. {REPORT.replace('pytest', f'pytest --device {backend.device}')}"
            return None, Finding(fault, name, text)
    return losses, Finding(OK, name, text)


def gpu(data, expected, fault):
    """Yield the findings for CuPy and the GPU. A fault has the state `fault`.

    With data=None there is no trial. expected: the losses of the CPU, or None.
    """
    try:
        cupy = import_cupy()
        driver, built = diagnosis.cuda_versions(cupy)
        package = ", ".join(diagnosis.cupy_packages()) or "not from a package"
        yield Finding(OK, "CuPy", f"{cupy.__version__} ({package}) for CUDA {built}; the driver's CUDA: {driver}")
        backend = get_backend("gpu")
    except DeviceError as error:
        text = f"unused, because CuPy is not installed. With an NVIDIA GPU, type {diagnosis.install_cupy()}"
        harmless = isinstance(error, CuPyMissing) and fault == NOTED
        yield Finding(fault, "GPU", text if harmless else str(error))
        return
    yield Finding(OK, "GPU", card(cupy.cuda))
    if data is not None:
        yield training(backend, data, fault, expected)[1]


def card(cuda):
    """Describe the card and CUDA's libraries. cuda: the module `cupy.cuda`, with a GPU that computes."""
    properties = cuda.runtime.getDeviceProperties(cuda.runtime.getDevice())
    free, total = cuda.runtime.memGetInfo()
    text = "{name}, compute capability {major}.{minor}".format_map(properties | {"name": properties["name"].decode()})
    text += f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free; it supports "
    text += "float32, TF32 and bfloat16" if properties["major"] >= 8 else "float32 only"
    number = cuda.cublas.getVersion(cuda.device.get_cublas_handle())
    cublas = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return "{}; NVRTC {}.{}, cuBLAS {}".format(text, *cuda.nvrtc.getVersion(), cublas)
