"""Which device is chosen, and what the message says if a GPU does not compute."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import strict_cupy
from devices import select_gpu_tests

from tinyvit.backend import CPU, Backend
from tinyvit.gpu import DeviceError, get_backend


def broken_cupy(monkeypatch, **functions):
    """Make `import cupy` give the stand-in, in which `functions` replace its own."""
    module = ModuleType("cupy")
    vars(module).update(vars(strict_cupy.cupy))
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "cupy", module)


def test_cpu():
    assert get_backend("cpu") is CPU
    assert Backend("cpu", np) == CPU


@pytest.mark.parametrize("name", ["cuda", "GPU", "", None, 0, np])
def test_unknown_device(name):
    with pytest.raises(ValueError, match="'auto', 'cpu' or 'gpu'"):
        get_backend(name)


def test_gpu_and_auto_with_cupy(strict_gpu):
    assert strict_gpu == Backend("gpu", strict_cupy.cupy)
    assert get_backend() == get_backend("auto") == get_backend("gpu") == strict_gpu


def test_a_gpu_must_have_computed_something(strict_gpu):
    before = strict_cupy.synchronisations
    get_backend("gpu")
    assert strict_cupy.synchronisations == before + 1


def test_without_cupy(monkeypatch, caplog):
    monkeypatch.setattr("tinyvit.gpu.diagnosis.PACKAGES", ())
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    with pytest.raises(DeviceError) as caught:
        get_backend("gpu")
    for words in ("pip install -e", "[gpu]", "[gpu-cuda12]", "--device cpu"):
        assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)
    assert get_backend("auto").device == "cpu"
    assert caplog.text == ""  # because this is normal on a machine without a GPU


@pytest.mark.parametrize(
    "error",  # each of these is what CuPy raises somewhere: no driver, no library, no memory
    [RuntimeError("cudaErrorInsufficientDriver"), OSError("libcublas.so.12: not found"), MemoryError("2 MB")],
)
def test_cupy_that_does_not_compute(monkeypatch, caplog, error):  # `test_diagnosis.py` has the message for each cause
    def ones(*args, **kwargs):
        raise error

    broken_cupy(monkeypatch, ones=ones)
    with pytest.raises(DeviceError) as caught:
        get_backend("gpu")
    for words in (type(error).__name__, str(error), "--device cpu"):
        assert words in str(caught.value)
    assert caught.value.__cause__ is error
    assert get_backend("auto").device == "cpu"
    assert caplog.messages == [f"note: the CPU computes, because {caught.value}"]


def test_cupy_that_computes_wrongly(monkeypatch):
    broken_cupy(monkeypatch, exp=strict_cupy.cupy.zeros_like)
    with pytest.raises(DeviceError, match="wrong results"):
        get_backend("gpu")
    assert get_backend("auto").device == "cpu"


def test_cupy_that_computes_nan(monkeypatch):
    broken_cupy(monkeypatch, exp=strict_cupy.cupy.empty_like)
    with pytest.raises(DeviceError, match=r"wrong results \(ArithmeticError: the result is nan, expected 29\.5562\)"):
        get_backend("gpu")


def test_device_gpu_without_one_says_so(pytestconfig):
    if pytestconfig.getoption("--device") == "gpu":
        pytest.skip("there is one")
    asked = SimpleNamespace(getoption=lambda name: "gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", None)
        with pytest.raises(pytest.UsageError, match=r"--device gpu: .*pip install"):
            select_gpu_tests(asked)
