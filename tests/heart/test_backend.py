"""Arrays move to a device and back, and a workspace reuses buffers."""

import contextlib
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import strict_cupy
from devices import make_backend, to_device

from tinyvit.backend import CPU, Backend, array_module, erf, to_host
from tinyvit.memory import Workspace, empty, empty_like, matmul, ones


def test_the_cpu_does_not_need_cupy():
    program = """
import sys
sys.modules["cupy"] = sys.modules["cupyx"] = None  # importing either raises ImportError
import numpy as np
from tinyvit import VisionTransformer, ViTConfig, initialise
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
    assert type(CPU.asarray(x)) is np.ndarray


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
    given = backend.xp.empty((*out.shape, 2), dtype=dtype)[..., 0]  # a part of something larger
    assert matmul(*to_device(backend, a, b), out=given) is given
    np.testing.assert_allclose(to_host(given), a @ b, rtol=1e-4 if dtype == np.float32 else 1e-12)


def test_ones(backend):
    result = ones(3, like=backend.asarray(np.zeros(2, np.float32)))
    assert array_module(result) is backend.xp
    assert result.dtype == np.float32
    assert to_host(result).tolist() == [1, 1, 1]


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


def address(array):
    return array.ctypes.data


def test_empty_like_keeps_the_order_of_the_axes_in_memory(backend):
    plain = backend.asarray(np.ones((2, 3, 4), np.float32))
    for x in (plain, plain.transpose(2, 0, 1), plain.swapaxes(0, 1), plain[:, 1], plain[..., ::2], plain.T):
        for context in (contextlib.nullcontext(), Workspace()):
            with context:
                result = empty_like(x)
            assert array_module(result) is backend.xp
            assert (result.shape, result.dtype) == (x.shape, x.dtype)
            order = np.argsort(x.strides, kind="stable").tolist()
            assert np.argsort(result.strides, kind="stable").tolist() == order
            assert sorted(result.strides)[0] == 4  # and no gaps


@pytest.mark.parametrize("part", [lambda x: x, lambda x: x[1:].reshape(-1), lambda x: x.T[0]])
def test_memory_is_free_when_the_last_view_of_an_array_goes(part):
    like, workspace = np.ones(2), Workspace()
    with workspace:
        array = empty((2, 3), like)
        where = address(array)
        view = part(array)
        del array
        assert address(empty((2, 3), like)) != where  # the view still needs it
        del view
        assert address(empty((2, 3), like)) == where


def test_the_memory_that_was_freed_last_is_handed_out_first():
    like = np.ones(2)
    with Workspace():
        first, second = empty((4,), like), empty((4,), like)
        addresses = address(first), address(second)
        del first, second
        third, fourth = empty((4,), like), empty((4,), like)
        assert (address(third), address(fourth)) == addresses[::-1]


def test_arrays_of_a_workspace_are_plain_and_begin_at_a_cache_line():
    with Workspace():
        for shape in ((), (1,), (3, 5), (0, 2), (1000,)):
            for dtype in (np.float32, np.float64, np.uint8):
                array = empty(shape, np.ones(1, dtype))
                assert type(array) is np.ndarray
                assert (array.shape, array.dtype) == (shape, dtype)
                assert array.flags.c_contiguous
                assert array.flags.writeable
                assert address(array) % 64 == 0


def test_memory_serves_arrays_of_another_shape_and_type_but_the_same_size():
    with Workspace():
        where = address(empty((2, 3), np.ones(1)))
        array = empty((12,), np.ones(1, np.float32))
        assert address(array) == where
        assert array.dtype == np.float32


def test_values_stay_as_long_as_someone_has_them(backend):
    like, workspace = backend.asarray(np.ones(2)), Workspace()
    with workspace:
        kept = empty((3,), like)
        kept[...] = 7
    for _ in range(3):
        with workspace:
            empty((3,), like)[...] = 9
    assert to_host(kept).tolist() == [7, 7, 7]


def test_memory_of_a_size_that_is_not_asked_for_any_more_is_let_go():
    like, workspace = np.ones(2), Workspace()
    for sizes in [(4, 5), (5,), (6,)]:
        with workspace:
            for size in sizes:
                empty((size,), like)
        assert sorted(workspace._free) == [8 * size for size in sizes]


def test_a_workspace_serves_once_at_a_time():
    workspace = Workspace()
    with workspace, pytest.raises(RuntimeError, match="this workspace is in use"), workspace:
        pass
    with workspace:
        where = address(empty((2,), np.ones(2)))
    assert address(empty((2,), np.ones(2))) != where


def test_a_copy_of_what_stands_behind_an_array_has_nothing_to_give_back():
    with Workspace() as workspace:
        array = empty((2,), np.ones(2))
        copy = array.base.copy()
        del copy
        assert workspace._free == {16: []}


def test_workspaces_nest():
    like, outer, inner = np.ones(2), Workspace(), Workspace()
    with outer:
        of_outer = address(empty((2,), like))
        with inner:
            taken = empty((2,), like)
            assert address(taken) != of_outer
        assert address(empty((2,), like)) == of_outer
    with inner:
        assert address(empty((2,), like)) not in (of_outer, address(taken))
    del taken


def test_a_workspace_is_left_after_an_error():
    with pytest.raises(KeyError), Workspace() as workspace:
        raise KeyError
    empty((2,), np.ones(2))
    assert workspace._free == {}


def test_a_workspace_serves_its_own_thread_only():
    like, mine, theirs = np.ones(2), Workspace(), Workspace()
    inside, done = threading.Event(), threading.Event()

    def other():
        empty((2,), like)  # no workspace is active here
        with theirs:
            inside.set()
            done.wait(10)
            empty((3,), like)

    with mine:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        empty((4,), like)
        done.set()
        thread.join()
    assert list(mine._free) == [32]
    assert list(theirs._free) == [24]
