"""What every test may use: the devices, Hypothesis's settings, and one BLAS thread."""

import sys

import emulate
import numpy as np
import pytest
import strict_cupy
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

from tinyvit.backend import Backend
from tinyvit.gpu import DeviceError, get_backend

settings.register_profile(
    "tinyvit",
    derandomize=True,  # the same examples in every run: a failure can be repeated by running again
    deadline=None,  # a shared machine is slow at times, which is no defect
    # slow data is the machine's too; and the fixture `backend` is the same object for every example
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tinyvit")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: run the tests with the fixture `backend` or `accelerator` on CuPy and a GPU, "
        "and only these unless -m says otherwise",
    )


def pytest_configure(config):
    if config.getoption("--device") == "gpu":
        try:
            get_backend("gpu")
        except DeviceError as error:
            raise pytest.UsageError(f"--device gpu: {error}") from error
        if config.option.markexpr == "not extended":  # the default, which setup.cfg gives
            config.option.markexpr = "gpu"


def pytest_generate_tests(metafunc):
    accelerators = ["strict", "gpu"] if metafunc.config.getoption("--device") == "gpu" else ["strict"]
    if "accelerator" in metafunc.fixturenames:
        metafunc.parametrize("accelerator", accelerators, indirect=True)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["cpu", *accelerators], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Mark as `gpu` every test that runs on the GPU itself."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "gpu" in (parameters.get("backend"), parameters.get("accelerator")):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """Sums in an order that does not depend on how many cores the machine has."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield


def make_backend(name, monkeypatch):
    """Return the backend "cpu", "strict" (the stand-in, which `import cupy` then gives) or "gpu"."""
    if name == "cpu":
        return Backend("cpu", np)
    if name == "strict":
        for module, stand_in in strict_cupy.modules.items():
            monkeypatch.setitem(sys.modules, module, stand_in)
    return get_backend("gpu")


@pytest.fixture
def strict_gpu(monkeypatch):
    """The backend "gpu" on the strict stand-in for CuPy, which `import cupy` gives until the test ends."""
    return make_backend("strict", monkeypatch)


@pytest.fixture
def backend(request, monkeypatch):
    """Every backend in turn: the CPU, the strict stand-in, and the GPU itself under `--device gpu`."""
    return make_backend(request.param, monkeypatch)


@pytest.fixture
def accelerator(request, monkeypatch):
    """Every backend but the CPU in turn: what is compared with NumPy."""
    return make_backend(request.param, monkeypatch)


@pytest.fixture
def sanitizers():
    """Skip the test where the compiler's sanitizers are not installed, or may not run."""
    for sanitizer in ("thread", "address"):
        if reason := emulate.why_not_under(sanitizer):
            pytest.skip(reason)


def to_device(backend, *arrays):
    """Return the NumPy arrays on the backend's device: one as it is, several as a tuple."""
    moved = tuple(backend.asarray(array) for array in arrays)
    return moved[0] if len(moved) == 1 else moved


@pytest.fixture
def cpu():
    """The backend "cpu", to compare with."""
    return Backend("cpu", np)
