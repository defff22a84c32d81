"""Fixtures of all tests: the devices, the settings of Hypothesis, and one BLAS thread."""

import emulate
import numpy as np
import pytest
from devices import make_backend, select_gpu_tests
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

from tinyvit.backend import Backend, quiet_joblib

with quiet_joblib():
    import joblib  # noqa: F401  later imports of it, also by scikit-learn, have no warning without /dev/shm

settings.register_profile(
    "tinyvit",
    derandomize=True,  # every run uses the same examples, so a failure repeats
    deadline=None,  # a shared machine is slow at times, which is no defect of the code
    # A busy machine also draws data slowly. The fixture `backend` is the same object for every example.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tinyvit")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: run the tests that have the fixture `backend` or `accelerator` on CuPy and a GPU; "
        "select only these unless -m is given",
    )


def pytest_configure(config):
    select_gpu_tests(config)


def pytest_generate_tests(metafunc):
    accelerators = ["strict", "gpu"] if metafunc.config.getoption("--device") == "gpu" else ["strict"]
    if "accelerator" in metafunc.fixturenames:
        metafunc.parametrize("accelerator", accelerators, indirect=True)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["cpu", *accelerators], indirect=True)


@pytest.hookimpl(tryfirst=True)  # the marker must be set before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark every test that runs on a GPU as `gpu`."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "gpu" in (parameters.get("backend"), parameters.get("accelerator")):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """Use one BLAS thread, so that the order of sums does not depend on the number of cores."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield


@pytest.fixture
def strict_gpu(monkeypatch):
    """Return the backend "gpu" on the strict stand-in for CuPy, which `import cupy` returns during the test."""
    return make_backend("strict", monkeypatch)


@pytest.fixture
def backend(request, monkeypatch):
    """Return each backend in turn: the CPU, the strict stand-in and, under `--device gpu`, the GPU."""
    return make_backend(request.param, monkeypatch)


@pytest.fixture
def accelerator(request, monkeypatch):
    """Return each backend except the CPU in turn, to compare with NumPy."""
    return make_backend(request.param, monkeypatch)


@pytest.fixture
def sanitizers():
    """Skip the test if the compiler's sanitizers are missing or cannot run."""
    for sanitizer in ("thread", "address"):
        if reason := emulate.why_not_under(sanitizer):
            pytest.skip(reason)


@pytest.fixture
def cpu():
    """Return the backend "cpu", to compare with."""
    return Backend("cpu", np)
