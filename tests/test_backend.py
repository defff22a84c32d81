"""Which backend one gets, what is said when there is none, and whose buffers a workspace hands out."""

import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.special
import strict_cupy
from conftest import make_backend, pytest_configure, to_device

from tinyvit.backend import (
    Backend,
    DeviceError,
    Workspace,
    array_module,
    empty,
    erf,
    get_backend,
    matmul,
    to_host,
)


def broken_cupy(monkeypatch, **functions):
    """A CuPy that can be imported, with these functions instead of its own."""
    module = ModuleType("cupy")
    vars(module).update(vars(strict_cupy.cupy))
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "cupy", module)


# which backend


def test_cpu():
    assert get_backend("cpu") == Backend("cpu", np)


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


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    with pytest.raises(DeviceError) as caught:
        get_backend("gpu")
    for words in ("pip install -e", "[gpu]", "[gpu-cuda12]", "--device cpu"):
        assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)
    assert get_backend("auto").device == "cpu"


@pytest.mark.parametrize(
    "error",  # each of these is what CuPy raises somewhere: no driver, no library, no memory
    [RuntimeError("cudaErrorInsufficientDriver"), OSError("libcublas.so.12: not found"), MemoryError("2 MB")],
)
def test_cupy_that_does_not_compute(monkeypatch, error):
    def ones(*args, **kwargs):
        raise error

    broken_cupy(monkeypatch, ones=ones)
    with pytest.raises(DeviceError) as caught:
        get_backend("gpu")
    for words in (type(error).__name__, str(error), "nvidia-smi", "--device cpu"):
        assert words in str(caught.value)
    assert caught.value.__cause__ is error
    assert get_backend("auto").device == "cpu"


def test_cupy_that_computes_wrongly(monkeypatch):
    broken_cupy(monkeypatch, exp=strict_cupy.cupy.zeros_like)
    with pytest.raises(DeviceError, match="wrong results"):
        get_backend("gpu")
    assert get_backend("auto").device == "cpu"


def test_cupy_that_computes_nan(monkeypatch):
    broken_cupy(monkeypatch, exp=strict_cupy.cupy.empty_like)
    with pytest.raises(DeviceError):
        get_backend("gpu")


def test_the_cpu_does_not_need_cupy():
    program = """
import sys
sys.modules["cupy"] = sys.modules["cupyx"] = None  # importing either raises ImportError
import numpy as np
from tinyvit.model import VisionTransformer, ViTConfig, initialise
config = ViTConfig(depth=1)
VisionTransformer(config, initialise(config)).predict(np.zeros((1, 28, 28), np.uint8))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_the_stand_in_is_gone_after_the_test():
    before = [sys.modules.get(name) for name in strict_cupy.modules]
    with pytest.MonkeyPatch.context() as patch:
        make_backend("strict", patch)
        assert sys.modules["cupy"] is strict_cupy.cupy
    assert [sys.modules.get(name) for name in strict_cupy.modules] == before
    assert strict_cupy.cupy not in before


# in and out


def test_in_and_out(backend):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = backend.asarray(values)
    assert array_module(x) is backend.xp
    assert isinstance(x, backend.xp.ndarray)
    back = to_host(x)
    assert type(back) is np.ndarray
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, values)
    assert backend.asarray(x) is x
    assert backend.asarray(values, dtype=np.float64).dtype == np.float64


def test_the_cpu_fetches_what_is_on_a_device(strict_gpu):
    x = strict_gpu.asarray(np.ones(3))
    assert type(get_backend("cpu").asarray(x)) is np.ndarray


@pytest.mark.parametrize("value", [3, 2.5, [1, 2], (1, 2), np.float32(3), np.ones(2)])
def test_what_is_on_the_host_stays_there(value):
    np.testing.assert_array_equal(to_host(value), value)
    assert type(to_host(value)) is np.ndarray


def test_numbers_of_the_device_come_out(accelerator):
    total = accelerator.xp.ones(3).sum()
    assert array_module(total) is accelerator.xp
    assert to_host(total).shape == ()
    assert float(to_host(total)) == 3


def test_synchronise(backend):
    before = strict_cupy.synchronisations
    backend.synchronise()
    if backend.xp is strict_cupy.cupy:
        assert strict_cupy.synchronisations == before + 1


def test_a_cpu_needs_no_stream():
    Backend("cpu", SimpleNamespace()).synchronise()  # nothing is asked of the module


def test_erf(backend):
    values = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(to_host(erf(backend.asarray(values))), scipy.special.erf(values), rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("a", "b"), [((3, 4), (4, 2)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (2, 1, 4, 1)), ((4,), (4, 2))]
)
def test_matmul(backend, dtype, a, b):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(a).astype(dtype), rng.standard_normal(b).astype(dtype)
    out = matmul(*to_device(backend, a, b))
    assert out.dtype == dtype
    np.testing.assert_allclose(to_host(out), a @ b, rtol=1e-4 if dtype == np.float32 else 1e-12)
    with Workspace() as workspace:
        assert matmul(*to_device(backend, a, b)) is workspace._buffers[0]


# buffers


def test_empty_without_a_workspace(backend):
    like = backend.asarray(np.ones(2, np.float32))
    first, second = empty((2, 3), like), empty((2, 3), like)
    for array in (first, second):
        assert array_module(array) is backend.xp
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
        assert array.flags.c_contiguous
    first[...] = 1
    second[...] = 2
    assert to_host(first).max() == 1


def step(like, *shapes):
    return [empty(shape, like) for shape in shapes]


def test_a_workspace_hands_out_the_same_buffers_in_the_same_order(backend):
    like = backend.asarray(np.ones(2))
    workspace = Workspace()
    with workspace:
        first = step(like, (2, 3), (2, 3), (4,), ())
    with workspace:
        second = step(like, (2, 3), (2, 3), (4,), ())
    assert len({id(buffer) for buffer in first}) == 4
    assert all(a is b for a, b in zip(first, second, strict=True))
    with workspace:  # a shorter step, then a longer one
        assert step(like, (2, 3))[0] is first[0]
    with workspace:
        longer = step(like, (2, 3), (2, 3), (4,), (), (5,))
    assert all(a is b for a, b in zip(first, longer[:4], strict=True))


def test_values_stay_until_the_workspace_is_entered_again(backend):
    like = backend.asarray(np.ones(2))
    with Workspace():
        (kept,) = step(like, (3,))
        kept[...] = 7
    (other,) = step(like, (3,))
    other[...] = 8
    with Workspace():
        step(like, (3,))[0][...] = 9
    assert to_host(kept).tolist() == [7, 7, 7]


def test_a_buffer_is_replaced_where_shape_or_dtype_changes(backend):
    double, single = to_device(backend, np.ones(1), np.ones(1, np.float32))
    workspace = Workspace()
    with workspace:
        first = step(double, (2,), (3,), (4,))
    with workspace:
        second = [*step(double, (2,), (5,)), *step(single, (4,))]
    assert second[0] is first[0]
    assert second[1].shape == (5,)
    assert second[2].dtype == np.float32
    with workspace:
        third = [*step(double, (2,), (5,)), *step(single, (4,))]
    assert all(a is b for a, b in zip(second, third, strict=True))


def test_workspaces_nest(backend):
    like = backend.asarray(np.ones(2))
    outer, inner = Workspace(), Workspace()
    seen = []
    for _ in range(2):
        with outer:
            a = empty((2,), like)
            with inner:
                b = empty((2,), like)
            c = empty((2,), like)  # the outer one goes on where it was
        d = empty((2,), like)
        seen.append((a, b, c, d))
    (a, b, c, d), again = seen
    assert len({id(x) for x in (a, b, c, d, again[3])}) == 5
    assert all(x is y for x, y in zip((a, b, c), again, strict=False))
    assert outer._buffers[0] is a
    assert outer._buffers[1] is c
    assert inner._buffers[0] is b


def test_a_workspace_is_left_after_an_error():
    like = np.ones(2)
    with pytest.raises(KeyError), Workspace() as workspace:
        raise KeyError
    empty((2,), like)
    assert workspace._buffers == []


def test_a_workspace_serves_its_own_thread_only(backend):
    like = backend.asarray(np.ones(2))
    mine, theirs = Workspace(), Workspace()
    inside, done = threading.Event(), threading.Event()
    found = {}

    def other():
        found["none"] = empty((2,), like)  # no workspace is active here
        with theirs:
            inside.set()
            done.wait(10)
            found["theirs"] = empty((2,), like)

    with mine:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        found["mine"] = empty((2,), like)
        done.set()
        thread.join()
    assert mine._buffers[0] is found["mine"]
    assert len(mine._buffers) == len(theirs._buffers) == 1
    assert theirs._buffers[0] is found["theirs"]
    assert found["none"] is not found["mine"]


# no GPU, no tests on it


def test_device_gpu_without_one_says_so(pytestconfig):
    if pytestconfig.getoption("--device") == "gpu":
        pytest.skip("there is one")
    asked = SimpleNamespace(getoption=lambda name: "gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", None)
        with pytest.raises(pytest.UsageError, match=r"--device gpu: .*pip install"):
            pytest_configure(asked)


def test_a_workspace_is_not_entered_twice():
    workspace = Workspace()
    with workspace, pytest.raises(RuntimeError, match="this workspace is in use"), workspace:
        pass
    with workspace:
        first = empty((2,), like=np.zeros(1))
    assert empty((2,), like=np.zeros(1)) is not first
