"""The stand-in for CuPy is strict: each refusal, each difference from NumPy, and the counting of waits."""

import contextlib
import copy
import math
import operator
import pickle
import threading
from fractions import Fraction

import emulate
import numpy as np
import pytest
import scipy.special
import strict_cupy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strict_cupy import SynchronisationError, cupy, no_synchronisation

pytestmark = pytest.mark.extended

HOST = np.arange(6, dtype=np.float32).reshape(2, 3)

BINARY = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
    *(operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, operator.pow),
    operator.matmul,  # the last: it takes no numbers
]
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv]


@pytest.fixture
def x():
    return cupy.asarray(HOST)


def host(array):
    """The values of a device array, which must be one."""
    assert type(array) is cupy.ndarray
    return cupy.asnumpy(array)


def assert_same(array, expected):
    got = host(array)
    assert got.shape == np.shape(expected)
    assert got.dtype == np.asarray(expected).dtype
    np.testing.assert_array_equal(got, expected)


# host and device do not mix


def test_no_implicit_conversion(x):
    for convert in (np.asarray, np.array, lambda a: np.array([a, a]), np.float32, memoryview):
        with pytest.raises(TypeError):
            convert(x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.zeros((2, 3))[...] = x


@pytest.mark.parametrize("function", [np.add, np.exp, np.sum, np.concatenate, np.where, np.shape, np.matmul])
def test_numpy_functions_are_refused(function, x):
    with pytest.raises(TypeError):
        function(*[x] * (2 if function in (np.add, np.matmul) else 1))


@pytest.mark.parametrize("stranger", [HOST, np.array(2.0), [1.0, 2.0, 3.0], (1, 2, 3), None])
def test_operators_refuse_what_is_not_on_the_device(stranger, x):
    for function in BINARY:
        with pytest.raises(TypeError):
            function(x, stranger)
        with pytest.raises(TypeError):
            function(stranger, x)
    for function in IN_PLACE:
        with pytest.raises(TypeError):
            function(x, stranger)
    with pytest.raises(TypeError):
        x[...] = stranger
    with pytest.raises(TypeError):
        HOST.copy().__iadd__(x)
    assert_same(x, HOST)


@pytest.mark.parametrize("number", [2, 2.5, True, np.float32(2), np.float64(2), np.int64(2)])
def test_operators_accept_numbers_and_promote_as_numpy_does(number, x):
    for function in BINARY[:-1]:
        # the operator ** of NumPy before 2.3 squares by a way of its own, which ignores the dtype of the exponent
        expected = np.power if function is operator.pow else function
        assert_same(function(x, number), expected(HOST, number))
        assert_same(function(x + 1, x * 2 + 1), function(HOST + 1, HOST * 2 + 1))
    assert_same(number - x, number - HOST)
    assert_same(number / (x + 1), number / (HOST + 1))
    for function in IN_PLACE:
        mine, theirs = x.copy(), HOST.copy()
        kept = mine
        mine, theirs = function(mine, number), function(theirs, number)
        assert mine is kept
        assert_same(mine, theirs)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: cupy.exp([1.0, 2.0]),
        lambda a: cupy.exp(np.array(1.0)),
        lambda a: cupy.exp(HOST),
        lambda a: cupy.add(a, HOST),
        lambda a: cupy.add(a, Fraction(1, 2)),
        lambda a: cupy.maximum(HOST, 0),
        lambda a: cupy.sum(HOST),
        lambda a: cupy.sum([1, 2]),
        lambda a: cupy.clip(HOST, 0, 1),
        lambda a: cupy.clip(a, HOST, 1),
        lambda a: cupy.where(HOST > 1, a, a),
        lambda a: cupy.where(True, a, a),
        lambda a: cupy.concatenate([a, HOST]),
        lambda a: cupy.stack([HOST, HOST]),
        lambda a: cupy.matmul(a, HOST.T),
        lambda a: cupy.dot(HOST, a),
        lambda a: cupy.dot(a, 2),
        lambda a: cupy.einsum("ij,kj->ik", a, HOST),
        lambda a: cupy.zeros_like(HOST),
        lambda a: cupy.full((2,), [1, 2]),
        lambda a: cupy.take(a, [0]),
        lambda a: cupy.arange(a[0, 0]),
        lambda a: cupy.zeros(a.astype(cupy.int64)[0]),
        lambda a: cupy.asarray([a]),
    ],
)
def test_functions_refuse_what_is_not_on_the_device(call, x):
    with pytest.raises(TypeError):
        call(x)


# what CuPy lacks


@pytest.mark.parametrize(
    "name", ["nditer", "ndenumerate", "seterr", "frompyfunc", "longdouble", "str_", "erf"]
)
def test_what_cupy_lacks_is_missing(name):
    with pytest.raises(AttributeError):
        getattr(cupy, name)


@pytest.mark.parametrize("name", ["ctypes", "__array_interface__", "__index__", "setflags", "byteswapped"])
def test_attributes_that_cupy_lacks_are_missing(name, x):
    with pytest.raises(AttributeError):
        getattr(x, name)
    with pytest.raises(AttributeError):
        x.shape = (3, 2)
    with pytest.raises(AttributeError):
        x.note = 1


@pytest.mark.parametrize(
    "call",
    [
        lambda a: cupy.add(a, a, where=a > 1),
        lambda a: cupy.exp(a, order="F"),
        lambda a: cupy.exp(a, subok=True),
        lambda a: cupy.sum(a, where=a > 1),
        lambda a: cupy.sum(a, initial=0),
        lambda a: a.max(initial=0),
        lambda a: cupy.max(a, where=a > 1),
        lambda a: cupy.mean(a, where=a > 1),
        lambda a: cupy.take(a, a.astype(cupy.int64), mode="clip"),
        lambda a: cupy.einsum("ij->i", a, out=a[:, 0]),
        lambda a: cupy.einsum("ij->i", a, order="C"),
        lambda a: cupy.matmul(a, a.T, order="C"),
        lambda a: a.astype(cupy.float64, casting="safe"),
        lambda a: cupy.empty((2,), like=a),
        lambda a: cupy.clip(a, min=0, max=1),  # the method knows these names, the function does not
        lambda a: cupy.add(a),
        lambda a: cupy.add(a, a, a, out=a),
        lambda a: cupy.exp(a, a, a),
        lambda a: {a: 1},
    ],
)
def test_keywords_that_cupy_lacks_are_refused(call, x):
    with pytest.raises(TypeError):
        call(x)


@pytest.mark.parametrize("bad", [np.array(["a"]), np.array([None]), np.zeros(2, np.longdouble)])
def test_unsupported_dtypes_are_refused(bad):
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.asarray(bad)


# out and in-place operators


def test_out_is_written_and_returned(x):
    out = cupy.empty((2, 3), cupy.float32)
    assert cupy.add(x, 1, out=out) is out
    assert_same(out, HOST + 1)
    assert cupy.exp(x, out) is out
    assert_same(out, np.exp(HOST))
    square = cupy.empty((2, 2), cupy.float32)
    assert cupy.matmul(x, x.T, out=square) is square
    assert_same(square, HOST @ HOST.T)


def test_out_may_overlap_the_operands():
    line = cupy.arange(5)
    cupy.add(line[:-1], line[1:], out=line[1:])
    assert_same(line, np.array([0, 1, 3, 5, 7]))


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.empty((2, 3), np.float32), TypeError),
        ([0.0], TypeError),
        (cupy.empty((2, 3), cupy.float64), TypeError),
        (cupy.empty((2, 3), cupy.int32), TypeError),
        (cupy.empty((3, 2), cupy.float32), ValueError),
        (cupy.empty((1, 2, 3), cupy.float32), ValueError),  # to which NumPy would broadcast
    ],
)
def test_out_must_fit_exactly(out, error, x):
    with pytest.raises(error):
        cupy.add(x, x, out=out)
    with pytest.raises(error):
        x.clip(0, 1, out=out)


def test_dot_needs_a_contiguous_out(x):
    with pytest.raises(ValueError, match="contiguous"):
        cupy.dot(x, x.T, out=cupy.empty((2, 2), cupy.float32, order="F"))


def test_in_place_operators_keep_dtype_and_shape(x):
    double = cupy.asarray(HOST.astype(np.float64))
    before = x
    x += double
    assert x is before
    assert x.dtype == np.float32
    whole = cupy.arange(3)
    for wrong in (0.5, cupy.asarray(0.5)):
        with pytest.raises(TypeError, match="same_kind"):
            whole += wrong
    with pytest.raises(TypeError, match="same_kind"):
        whole /= 2
    with pytest.raises(ValueError, match="mismatch"):
        whole += cupy.zeros((2, 3), cupy.int64)


# results stay on the device


def test_reductions_and_elements_are_arrays_of_no_dimension(x):
    reductions = [x.sum(), x.mean(), x.max(), x.std(), x.argmax(), (x > 1).all(), cupy.sum(x)]
    others = [cupy.allclose(x, x), cupy.array_equal(x, x), cupy.exp(1.0), cupy.dot(x[0], x[0])]
    for result in (*reductions, *others, x[0, 0], x[0][1], -x[0, 0]):
        assert type(result) is cupy.ndarray
        assert result.shape == ()
    with pytest.raises(TypeError):
        len(x.sum())
    with pytest.raises(TypeError):
        iter(x.sum())


def test_an_element_is_a_view(x):
    x[0, 1] += 5
    element = x[1, 2]
    element += 1
    assert_same(x, HOST + np.array([[0, 5, 0], [0, 0, 1]], np.float32))


def test_device_numbers_are_no_indices_of_the_host(x):
    three = cupy.asarray(3)
    for use in (range, lambda n: [0, 1, 2, 3][n], lambda n: x[:n], lambda n: [0] * n, cupy.zeros):
        with pytest.raises(TypeError):
            use(three)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "var", "std", "all", "any"])
def test_reductions_are_numpys(name, axis, x):
    for keepdims in (False, True):
        expected = getattr(np, name)(HOST, axis=axis, keepdims=keepdims)
        assert_same(getattr(cupy, name)(x, axis=axis, keepdims=keepdims), expected)
        assert_same(getattr(x, name)(axis=axis, keepdims=keepdims), expected)


@pytest.mark.parametrize("name", strict_cupy._UFUNCS.split())
def test_elementwise_functions_are_numpys(name):
    function = getattr(np, name)
    dtype = np.int32 if name.startswith("bitwise") or name == "invert" else np.float32
    operands = [np.array([1, 2, 3]).astype(dtype), np.array([3, 2, 1]).astype(dtype)][: function.nin]
    assert_same(getattr(cupy, name)(*map(cupy.asarray, operands)), function(*operands))


def test_other_functions_are_numpys(x):
    assert_same(cupy.where(x > 2, x, 0), np.where(HOST > 2, HOST, 0).astype(np.float32))
    assert_same(cupy.concatenate([x, x], axis=1), np.concatenate([HOST, HOST], axis=1))
    assert_same(cupy.stack([x, x]), np.stack([HOST, HOST]))
    assert_same(cupy.einsum("ij,kj->ik", x, x), HOST @ HOST.T)
    assert_same(x.argmax(axis=1), HOST.argmax(axis=1))
    assert_same(cupy.clip(x, 1, 2.5), np.clip(HOST, 1, 2.5))
    assert_same(cupy.arange(3), np.arange(3))
    assert_same(cupy.full((2,), 3.0), np.full((2,), 3.0))
    assert_same(cupy.zeros((2, 1), cupy.int32), np.zeros((2, 1), np.int32))
    assert_same(strict_cupy.modules["cupyx.scipy.special"].erf(x), scipy.special.erf(HOST))
    assert_same(copy.deepcopy(x), HOST)
    assert_same(pickle.loads(pickle.dumps(x)), HOST)


def test_arrays_are_copied_on_the_way_in_and_out():
    source = HOST.copy()
    x = cupy.asarray(source)
    source[...] = 0
    x.get()[...] = 0
    assert_same(x, HOST)
    assert cupy.asarray(x) is x
    assert_same(cupy.asarray(HOST.astype(">f4")), HOST)


# what differs from NumPy on purpose


def test_results_are_in_c_order_whatever_the_operands(x):
    turned = x.T
    assert not turned.flags.c_contiguous
    assert (HOST.T * 2).flags.f_contiguous  # NumPy keeps the layout
    for result in (turned * 2, turned + turned, cupy.exp(turned), -turned, turned.copy(), turned > 1):
        assert result.flags.c_contiguous
    places = cupy.asarray(np.array([1, 0]))
    turned_cube = cupy.zeros((4, 3, 2)).T
    for result in (
        *(turned.clip(0, 1), turned.round(), cupy.where(turned > 1, turned, 0), turned[:, places]),
        *(turned_cube.sum(0), turned_cube.max(2, keepdims=True), turned_cube[:, places], turned_cube[places]),
        *(cupy.concatenate([turned, turned]), cupy.stack([turned, turned]), turned.take(places, 1)),
    ):
        assert result.flags.c_contiguous
    assert turned.astype(cupy.float64).flags.f_contiguous  # astype keeps the layout in CuPy too
    assert cupy.zeros_like(turned).flags.f_contiguous
    assert cupy.asarray(np.asfortranarray(HOST)).flags.f_contiguous
    with pytest.raises(AttributeError):
        _ = x.flags.writeable


def test_reshape_is_a_view_only_where_the_layout_allows_it(x):
    x.reshape(-1)[0] = 9
    assert float(x[0, 0]) == 9
    x.T.reshape(-1)[0] = 7  # a copy, which nobody keeps
    assert float(x[0, 0]) == 9


def test_arrays_of_indices_wrap_around_where_numbers_raise(x):
    wild = cupy.asarray(np.array([0, 3, -4, 7]))
    assert_same(x[:, wild], HOST[:, [0, 0, 2, 1]])
    assert_same(x[wild], HOST[[0, 1, 0, 1]])
    assert_same(x[..., None, wild], HOST[..., None, [0, 0, 2, 1]])
    assert_same(cupy.take(x, wild, axis=1), HOST[:, [0, 0, 2, 1]])
    assert_same(x.take(cupy.asarray(8)), HOST[0, 2])
    x[:, cupy.asarray(np.array([4]))] = 5
    assert_same(x[:, 1], np.full(2, 5, np.float32))
    for outside in (2, -3, (0, 3), (0, 0, 0)):
        with pytest.raises(IndexError):
            x[outside]


@pytest.mark.parametrize(
    "index", [[0], [[0, 1]], np.array([0]), np.array([True, False]), True, (0, [1]), 1.0]
)
def test_indices_that_are_not_on_the_device_are_refused(index, x):
    with pytest.raises(TypeError):
        x[index]
    with pytest.raises(TypeError):
        x[index] = 0
    with pytest.raises(IndexError):
        x[x]  # floats
    with pytest.raises(IndexError):
        x[x[:, 0] > 0, x[0] > 0]


def test_of_several_values_for_one_place_the_last_need_not_stay():
    places = np.array([1, 1, 0])
    line, same = np.zeros(3), cupy.zeros(3)
    line[places] = [5.0, 6.0, 7.0]
    same[cupy.asarray(places)] = cupy.asarray([5.0, 6.0, 7.0])
    assert line[1] == 6
    assert float(same[1]) == 5


@given(hnp.array_shapes(max_dims=3, max_side=4).flatmap(lambda shape: st.tuples(st.just(shape), st.data())))
def test_indexing_is_numpys(drawn):
    shape, data = drawn
    values = np.arange(math.prod(shape)).reshape(shape)
    basic = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    assert_same(cupy.asarray(values)[basic], values[basic])
    several = data.draw(hnp.integer_array_indices(shape))
    found = cupy.asarray(values)[tuple(map(cupy.asarray, several))]
    assert_same(found, values[several])
    assert found.flags.c_contiguous
    for index in (basic, several):
        mine, theirs = cupy.asarray(values), values.copy()
        mine[tuple(map(cupy.asarray, several)) if index is several else index] = -1
        theirs[index] = -1
        assert_same(mine, theirs)


def test_memory_nobody_wrote_is_spoilt():
    assert np.isnan(host(cupy.empty((2, 2)))).all()
    assert np.isnan(host(cupy.empty_like(cupy.zeros(3, cupy.float32)))).all()
    assert host(cupy.empty(2, cupy.uint8)).tolist() == [128, 128]
    assert host(cupy.empty(2, cupy.int32)).min() > 2**29
    assert host(cupy.empty(1, cupy.bool_)).all()


def test_a_device_does_not_warn():
    zero = cupy.zeros(2)
    assert np.isnan(host(zero / zero)).all()
    assert np.isinf(host(cupy.log(zero))).all()
    (zero / zero).astype(cupy.int32)
    zero /= 0


# waiting for the device


@pytest.mark.parametrize(
    "wait",
    [
        lambda a: float(a.sum()),
        lambda a: int(a.sum()),
        lambda a: bool(a.sum()),
        lambda a: complex(a.sum()),
        lambda a: 1 if a.sum() > 0 else 0,
        lambda a: a.sum() > 0 and True,
        lambda a: math.sqrt(a.sum()),
        lambda a: a.sum().item(),
        lambda a: a.get(),
        lambda a: a.tolist(),
        lambda a: a.tobytes(),
        lambda a: cupy.asnumpy(a),
        lambda a: [row for row in a],
        lambda a: 3 in a[0],
        lambda a: max(a[0, 0], a[0, 1]),
        lambda a: repr(a),
        lambda a: f"{a.sum():.3f}",
        lambda a: a[a > 1],
        lambda a: cupy.nonzero(a),
        lambda a: cupy.where(a),
        lambda a: cupy.cuda.get_current_stream().synchronize(),
        lambda a: pickle.dumps(a),
    ],
)
def test_waits_are_counted_and_can_be_forbidden(wait, x):
    before = strict_cupy.synchronisations
    wait(x)
    assert strict_cupy.synchronisations > before
    with pytest.raises(SynchronisationError, match=r"waits for the device$"), no_synchronisation():
        wait(x)
    wait(x)


def test_work_on_the_device_does_not_wait(x):
    with no_synchronisation():
        y = cupy.exp(x - x.max(axis=1, keepdims=True))
        y /= y.sum()
        y[x > 1] = 0
        y[:, 0] = x[:, cupy.argmax(x[0])]
        y.reshape(3, 2) @ cupy.asarray(HOST)
        assert len(y) == 2
        assert cupy.asnumpy(HOST) is HOST  # nothing to fetch


def test_a_swallowed_wait_is_noticed(x):
    swallow = contextlib.suppress(AssertionError)
    with pytest.raises(SynchronisationError, match="swallowed"), no_synchronisation(), swallow:
        float(x[0, 0])


def test_a_wait_in_another_thread_is_noticed(x):
    threading.excepthook, kept = lambda caught: None, threading.excepthook
    try:
        with pytest.raises(SynchronisationError), no_synchronisation():  # noqa: PT012
            thread = threading.Thread(target=x.get)
            thread.start()
            thread.join()
    finally:
        threading.excepthook = kept


# kernels from text, streams and graphs

needs_compiler = pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER)
TEXT = r"""
extern "C" __global__ void add(float* __restrict__ x, float number, int count) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) x[i] += number;
}
"""


@pytest.fixture
def add():
    """The kernel that adds a number, of which a launch is `add((1,), (32,), (x, number, count))`."""
    return cupy.RawModule(code=TEXT, options=("--std=c++17",), backend="nvrtc").get_function("add")


def arguments(array, number=1):
    return array, np.float32(number), np.int32(array.size)


@needs_compiler
def test_a_kernel_computes_in_place_and_waits_for_nothing(add, x):
    with no_synchronisation():
        add((1,), (32,), arguments(x))
    assert_same(x, HOST + 1)
    add((1,), (32,), arguments(x[1], 5))  # a view of its memory
    assert_same(x, HOST + np.array([[1], [6]], np.float32))


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (HOST.copy(), np.float32(1), np.int32(6)),
        lambda x: ([0.0], np.float32(1), np.int32(6)),
        lambda x: (None, np.float32(1), np.int32(6)),
        lambda x: (x, 1.0, np.int32(6)),  # of which the kernel could not know the size
        lambda x: (x, np.float32(1), 6),
        lambda x: (x, np.float64(1), np.int32(6)),
        lambda x: (x, np.float32(1), np.int64(6)),
        lambda x: (x.astype(cupy.float64), np.float32(1), np.int32(6)),
        lambda x: (x.T, np.float32(1), np.int32(6)),
        lambda x: (x, np.float32(1)),
        lambda x: (x, np.float32(1), x),
    ],
)
def test_arguments_that_a_kernel_would_misread_are_refused(add, x, wrong):
    with pytest.raises(TypeError, match="add"):
        add((1,), (32,), wrong(x))


@needs_compiler
def test_a_module_has_the_kernels_of_its_text_alone():
    with pytest.raises(RuntimeError, match="named symbol not found: subtract"):
        cupy.RawModule(code=TEXT).get_function("subtract")
    with pytest.raises(NotImplementedError, match="NVRTC alone"):
        cupy.RawModule(code=TEXT, backend="nvcc")
    with pytest.raises(TypeError):
        cupy.RawModule(TEXT)
    broken = cupy.RawModule(code=TEXT.replace("number;", "nothing;")).get_function("add")
    with pytest.raises(RuntimeError, match="do not compile"):
        broken((1,), (32,), arguments(cupy.zeros(3, cupy.float32)))


@needs_compiler
def test_a_graph_repeats_what_was_captured_and_capturing_does_nothing(add, x):
    stream = cupy.cuda.Stream()
    with stream:
        stream.begin_capture()
        add((1,), (32,), arguments(x))
        add((1,), (32,), arguments(x[0], 10))
        graph = stream.end_capture()
        assert_same(x, HOST)
        with no_synchronisation():
            for _ in range(3):
                graph.launch(stream)
    assert_same(x, HOST + np.array([[33], [3]], np.float32))
    x[...] = 0  # the graph has the address, not the values
    graph.launch(stream)
    assert_same(x, np.array([[11] * 3, [1] * 3], np.float32))


@needs_compiler
def test_a_graph_keeps_no_array_alive(add):
    stream, y = cupy.cuda.Stream(), cupy.zeros((2, 3), cupy.float32)
    with stream:
        stream.begin_capture()
        add((1,), (32,), arguments(y[1]))
        graph = stream.end_capture()
    view = y[0]
    del y
    graph.launch(stream)  # another view keeps the memory
    del view
    with pytest.raises(RuntimeError, match="memory that has been given back"):
        graph.launch(stream)


@pytest.fixture
def capturing():
    """A stream that is being captured."""
    stream = cupy.cuda.Stream()
    with stream:
        stream.begin_capture()
        try:
            yield stream
        finally:
            if strict_cupy._captured is not None:
                stream.end_capture()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: cupy.exp(x),
        lambda x: x.sum(),
        lambda x: x @ x.T,
        lambda x: x.copy(),
        lambda x: x.astype(cupy.float64),
        lambda x: x.__setitem__(0, 1),
        lambda x: x.fill(1),
        lambda x: cupy.asarray(HOST),
        lambda x: cupy.zeros(3),
        lambda x: cupy.ones_like(x),
        lambda x: cupy.full(3, 1.0),
        lambda x: x.get(),
        lambda x: float(x[0, 0]),
        lambda x: cupy.cuda.get_current_stream().synchronize(),
    ],
)
def test_cupys_own_operations_are_refused_while_a_stream_is_captured(operation, x, capturing):
    with pytest.raises(RuntimeError, match="captured"):
        operation(x)
    capturing.end_capture()
    operation(x)


def test_views_and_empty_memory_need_no_stream(x, capturing):
    assert x.T.reshape(3, 2)[1:].shape == (2, 2)
    assert cupy.empty((2, 3)).shape == (2, 3)


def test_what_can_be_captured_and_when(capturing):
    default = cupy.cuda.Stream(null=True)
    other = cupy.cuda.Stream()
    with pytest.raises(RuntimeError, match="one stream at a time"):
        capturing.begin_capture()
    with pytest.raises(RuntimeError, match="not being captured"):
        other.end_capture()
    graph = capturing.end_capture()
    graph.launch()  # of nothing
    with pytest.raises(RuntimeError, match="not being captured"):
        capturing.end_capture()
    with pytest.raises(RuntimeError, match="the current one"):
        other.begin_capture()
    with default, pytest.raises(RuntimeError, match="cannot capture the default stream"):
        default.begin_capture()
    capturing.begin_capture()
    with pytest.raises(RuntimeError, match="captured"):
        graph.launch()


def test_a_stream_that_does_not_wait_for_the_default_stream_is_not_emulated():
    with pytest.raises(NotImplementedError):
        cupy.cuda.Stream(non_blocking=True)


def test_time_passes_between_events(x):
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        cupy.cuda.get_elapsed_time(start, end)
    start.record()
    cupy.exp(x)
    end.record()
    end.synchronize()
    assert 0 < cupy.cuda.get_elapsed_time(start, end) < 1e4


def test_a_view_knows_whose_memory_it_is(x):
    assert x.base is None
    row = x[1].reshape(3, 1)
    assert row.base.shape == x.shape
    assert row.data.ptr - row.base.data.ptr == 3 * x.itemsize
    assert row.base.data.ptr == x.data.ptr
