"""The devices that tests run on, and comparisons of their results with those of NumPy."""

import sys

import numpy as np
import pytest
import strict_cupy
from strict_cupy import no_synchronisation

from tinyvit.backend import Backend, to_host
from tinyvit.gpu import DeviceError, get_backend
from tinyvit.memory import Workspace
from tinyvit.parameters import Parameters

TOLERANCES = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}


def make_backend(name, monkeypatch):
    """Return the backend "cpu", "strict" or "gpu"; "strict" makes `import cupy` return the strict stand-in."""
    if name == "cpu":
        return Backend("cpu", np)
    if name == "strict":
        for module, stand_in in strict_cupy.modules.items():
            monkeypatch.setitem(sys.modules, module, stand_in)
    return get_backend("gpu")


def select_gpu_tests(config):
    """Under `--device gpu`, select the tests that run on a GPU, unless `-m` selects others.

    Raises `pytest.UsageError` if no GPU computes.
    """
    if config.getoption("--device") != "gpu":
        return
    try:
        get_backend("gpu")
    except DeviceError as error:
        raise pytest.UsageError(f"--device gpu: {error}") from error
    if config.option.markexpr == "not extended":  # the default from setup.cfg
        config.option.markexpr = "gpu"


def to_device(backend, *arrays):
    """Return the NumPy arrays on the backend's device: one array as an array, several as a tuple."""
    moved = tuple(backend.asarray(array) for array in arrays)
    return moved[0] if len(moved) == 1 else moved


def leaves(result):
    """Return every array in nested tuples, lists and `Parameters`, in order."""
    if isinstance(result, Parameters):
        return [result.flat]
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in leaves(part)]
    return [result]


def assert_agree(got, expected, xp, tolerance=None):
    """Assert that `got` is on the device and equals NumPy's `expected` in shape, dtype and values."""
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected) > 0
    for mine, theirs in zip(got, expected, strict=True):
        assert isinstance(mine, xp.ndarray)
        assert (mine.shape, mine.dtype) == (np.shape(theirs), theirs.dtype)
        if theirs.dtype.kind != "f":
            np.testing.assert_array_equal(to_host(mine), theirs)
            continue
        allowed = tolerance or TOLERANCES[theirs.dtype]
        scale = max(1.0, float(np.abs(theirs).max(initial=0)))
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(to_host(mine), theirs, rtol=0, atol=allowed * scale)


def assert_device_agrees(backend, function, *arrays):
    """Assert that `function` gives the same for device arrays as for NumPy arrays, also within a workspace.

    The function may neither wait for the device nor change its arguments.
    """
    expected = function(*arrays)
    moved = [backend.asarray(array) for array in arrays]
    with no_synchronisation():
        got = function(*moved)
    assert_agree(got, expected, backend.xp)
    workspace = Workspace()
    for _ in range(2):
        with workspace, no_synchronisation():
            got = function(*moved)
    assert_agree(got, expected, backend.xp)
    for array, before in zip(moved, arrays, strict=True):
        np.testing.assert_array_equal(to_host(array), before)
