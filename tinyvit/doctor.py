"""Can this machine train? Checks all that training stands on, on the CPU and on a GPU, by really computing."""

import importlib.metadata
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from tinyvit import diagnosis
from tinyvit.backend import CuPyMissing, DeviceError, get_backend, import_cupy, to_host
from tinyvit.data import DataError, load_mnist
from tinyvit.data.mnist import SHA256
from tinyvit.model import ViTConfig
from tinyvit.training import Training, TrainingConfig, available_cores

NEEDED = {  # what setup.cfg asks for: at least these versions
    "numpy": "2.0",
    "scipy": "1.13",
    "matplotlib": "3.9",
    "scikit-learn": "1.5",
    "tqdm": "4.66",
    "safetensors": "0.4.3",
    "threadpoolctl": "3.5",
    "joblib": "1.3",
    "pillow": "10.1",
}
TRIAL = TrainingConfig(epochs=2, batch_size=64, learning_rate=1e-3, validation=0)
TRIAL_IMAGES = 256
AGREEMENT = 2e-2  # how far the trial's loss on a GPU may be from the CPU's, relative: bfloat16 is within it
HERE = Path(__file__).resolve().parent
OK, FAILED, NOTED = "ok", "FAIL", "--"


@dataclass(frozen=True)
class Finding:
    """One line of the examination: how it is, what was looked at, and what was found, with what to do about it."""

    state: str  # OK, FAILED, or NOTED for what is not well and not needed
    name: str
    found: str


def main(device="auto"):
    """Examine this machine and print a line for each finding as it comes. Returns the exit status.

    device: "cpu" looks at no GPU, "gpu" needs one, "auto" says how it is. The status is 0 if training works on the
    CPU and, under "gpu", on the GPU as well, else 1.
    """
    failed = False
    for finding in examine(device):
        failed |= finding.state == FAILED
        print(f"{finding.state:<4}  {finding.name:<13} {finding.found}", flush=True)
    print("Something above needs mending first." if failed else "Ready: python examples/train_mnist.py")
    return int(failed)


def examine(device="auto"):
    """Yield every `Finding` of this machine, each as soon as it is known."""
    yield from libraries()
    yield cores()
    yield blas()
    yield memory()
    data, finding = data_set()
    yield finding
    loss = None
    if data is not None:
        loss, finding = training(data, get_backend("cpu"), FAILED)
        yield finding
    if device != "cpu":
        yield from gpu(data, loss, FAILED if device == "gpu" else NOTED)


def libraries():
    """Yield a finding for tinyvit, for Python, and for each library that is needed."""
    yield Finding(OK, "tinyvit", f"{version('tinyvit') or 'not installed, but used from source'}, in {HERE}")
    yield Finding(OK, "Python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    for name, least in NEEDED.items():
        found = version(name)
        if found is None or parts(found) < parts(least):
            have = "not installed" if found is None else f"{found}, which is too old"
            yield Finding(FAILED, name, f"{have}. Type: pip install '{name}>={least}'")
        else:
            yield Finding(OK, name, found)


def version(name):
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def parts(text):
    """Return the numbers that a version begins with, to compare: (2, 0, 1) for "2.0.1rc2"."""
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", text)[0].split("."))


def cores():
    """Return the finding for the cores that this process may use."""
    return Finding(OK, "cores", f"{available_cores()} of {os.cpu_count()} are for this process")


def blas():
    """Return the finding for the library that computes the matrix products of NumPy."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    texts = [
        f"{pool['internal_api']} {pool['version']}, kernels for {pool.get('architecture', 'an unknown processor')}, "
        f"{pool['num_threads']} threads"
        for pool in pools
    ]
    return Finding(OK, "BLAS", "; ".join(dict.fromkeys(texts)) or "one that threadpoolctl does not know")


def memory():
    """Return the finding for the host's memory."""
    free, total = host_memory()
    if total is None:
        return Finding(OK, "memory", "this system does not say how much there is; training takes 0.3 GB")
    known = "how much of it is free is not known" if free is None else f"{free / 1e9:.1f} GB of it free"
    return Finding(OK, "memory", f"{total / 1e9:.1f} GB, {known}; training takes 0.3 GB")


def host_memory(proc="/proc/meminfo", group="/sys/fs/cgroup"):
    """Return the bytes of memory that are free and that there are, (free, total), each None where it is not known.

    proc: Linux's own account; group: that of a container, whose limit is often below what the machine has.
    """
    try:
        lines = dict(line.split(":") for line in Path(proc).read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        try:
            return None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # Windows has no such call
            return None, None
    try:
        limit, used = (int((Path(group) / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)


def data_set():
    """Return the data set that comes with the package, or None, and the finding."""
    try:
        data = load_mnist()
    except DataError as error:
        return None, Finding(FAILED, "data", f"{error}. Type: git checkout {HERE / 'data' / 'mnist'}")
    counts = f"{len(data.train_images):,} training and {len(data.test_images):,} test images"
    return data, Finding(OK, "data", f"{data.name}, {counts}, all {len(SHA256)} checksums hold, in {data.source}")


def training(data, backend, otherwise, expected=None):
    """Train the default model for a moment; return the loss of the last pass, or None, and the finding.

    otherwise: the state if it does not work; expected: the loss that it should come to, if that is known.
    """
    name = f"train on {backend.device}"
    try:
        began = time.perf_counter()
        images, labels = data.train_images[:TRIAL_IMAGES], data.train_labels[:TRIAL_IMAGES]
        run = Training(ViTConfig(), TRIAL, images, labels, backend)
        run.run()
        total = time.perf_counter() - began
    except Exception as error:
        if backend.device == "gpu":
            return None, Finding(otherwise, name, diagnosis.explain(error, backend.xp))
        text = f"{diagnosis.one_line(error, limit=500)}. Try: python examples/train_mnist.py --workers 1"
        return None, Finding(otherwise, name, text)
    first, last = (record["train_loss"] for record in run.history)
    steps = TRIAL.epochs * TRIAL_IMAGES // TRIAL.batch_size
    text = f"loss {first:.3f} to {last:.3f} in {steps} steps with {run.workers} workers, {total:.1f} s with all"
    if not last < first:
        return None, Finding(otherwise, name, f"does not learn: {text}. Type: pytest, and report what fails")
    if expected is None:
        return last, Finding(OK, name, text)
    apart = abs(last - expected) / expected
    if not apart < AGREEMENT:
        text += f", but the CPU comes to {expected:.3f}. Type: pytest --device gpu, and report what fails"
        return None, Finding(otherwise, name, text)
    return last, Finding(OK, name, f"{text}; within {apart:.0e} of the CPU's loss")


def gpu(data, expected, otherwise):
    """Yield the findings for CuPy and the GPU; whatever is not well has the state `otherwise`.

    data: what to train on for a moment, or None not to; expected: the loss which the CPU came to, or None.
    """
    try:
        cupy = import_cupy()
    except DeviceError as error:
        text = str(error)
        if isinstance(error, CuPyMissing) and otherwise == NOTED:
            text = f"none is used, as CuPy is not installed. With an NVIDIA GPU, type {diagnosis.INSTALL}"
        yield Finding(otherwise, "GPU", text)
        return
    yield from cuda_libraries(cupy, otherwise)
    try:
        backend = get_backend("gpu")
    except DeviceError as error:
        yield Finding(otherwise, "GPU", str(error))
        return
    yield Finding(OK, "cuBLAS", cublas_version(cupy))
    yield card(cupy)
    yield computation(backend, otherwise)
    if data is not None:
        yield training(data, backend, otherwise, expected)[1]


def cuda_libraries(cupy, otherwise):
    """Yield the findings for CuPy, the driver, and CUDA's libraries, which need no GPU to be looked at."""
    package = ", ".join(diagnosis.cupy_packages()) or "of no package"
    built = diagnosis.cuda_version(diagnosis.runtime_version(cupy))
    yield Finding(OK, "CuPy", f"{cupy.__version__} ({package}), built for CUDA {built}")
    serves = diagnosis.driver_version(cupy)
    if serves:
        yield Finding(OK, "driver", f"{driver_release()} serves CUDA up to {diagnosis.cuda_version(serves)}")
    else:
        yield Finding(otherwise, "driver", "none that answers. Install one from nvidia.com/drivers")
    try:
        yield Finding(OK, "NVRTC", "{}.{}".format(*cupy.cuda.nvrtc.getVersion()))
    except Exception as error:  # each version of CuPy has its own kind
        yield Finding(otherwise, "NVRTC", diagnosis.explain(error, cupy))
    try:
        cupy.cuda.cublas  # noqa: B018  it is loaded here; its version needs a GPU, and comes with that
    except Exception as error:
        yield Finding(otherwise, "cuBLAS", diagnosis.explain(error, cupy))


def driver_release(path="/proc/driver/nvidia/version"):
    """Return the driver's own version, such as "580.65.06", or words where the system does not show it."""
    try:
        return re.search(r"\d{3}(\.\d+)+", Path(path).read_text())[0]
    except (OSError, TypeError):
        return "of a version that is not shown here"


def cublas_version(cupy):
    """Return the version of CUDA's matrix products, which needs a GPU."""
    number = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def card(cupy):
    """Return the finding for the card: its name, what it is capable of, and its memory."""
    device = cupy.cuda.runtime.getDevice()
    properties = cupy.cuda.runtime.getDeviceProperties(device)
    major, minor = properties["major"], properties["minor"]
    free, total = cupy.cuda.runtime.memGetInfo()
    count = cupy.cuda.runtime.getDeviceCount()
    text = f"{properties['name'].decode()}, number {device} of {count}, compute capability {major}.{minor}, "
    text += f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free; it has {precisions((major, minor))}"
    return Finding(OK, "card", text)


def precisions(capability):
    """Return which precisions a card of a compute capability (major, minor) has for training, as a text."""
    if capability >= (8, 0):  # NVIDIA's Ampere and later
        return "float32, TF32 and bfloat16"
    return "float32 (TF32 and bfloat16 need compute capability 8.0)"


def computation(backend, otherwise):
    """Return the finding for a kernel and a matrix product, both compared with NumPy's."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 512, 512)).astype(np.float32)
    on_device = backend.asarray(a), backend.asarray(b)
    try:
        errors = {
            "kernel": relative_error(to_host(backend.xp.exp(on_device[0])), np.exp(a.astype(np.float64))),
            "matrix product": relative_error(to_host(on_device[0] @ on_device[1]), a.astype(np.float64) @ b),
        }
    except Exception as error:
        return Finding(otherwise, "GPU", diagnosis.explain(error, backend.xp))
    text = " and ".join(f"a {name} within {error:.0e}" for name, error in errors.items())
    if not (errors["kernel"] < 1e-5 and errors["matrix product"] < 5e-3):  # TF32, by CUPY_TF32=1, is within that
        text += " of NumPy's, which is wrong. Update the driver and CuPy, or use --device cpu"
        return Finding(otherwise, "GPU", f"computes {text}")
    return Finding(OK, "GPU", f"computes {text} of NumPy's")


def relative_error(found, expected):
    """Return the largest difference of two arrays, as a share of the largest value that is expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
