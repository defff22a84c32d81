"""The properties that all operations share. The file of an operation tests its own laws, values and errors."""

import numpy as np
import pytest
from devices import assert_device_agrees
from hypothesis import given
from hypothesis import strategies as st
from operations import (
    LAYOUTS,
    MEDIUM,
    MODULES,
    OPERATIONS,
    PAIRS,
    any_sizes,
    evaluate,
    in_places,
    odd_sizes,
    out_and_gradients,
    with_constants,
)
from strategies import EQUAL, SHAPES, TOLERANCE, assert_float32_agrees, assert_workspace_changes_nothing, seeds

from tinyvit.gradcheck import analytical_gradients, gradient_error, numerical_gradients, relative_error

LARGER = MEDIUM._replace(leading=(3, 5), batch=5, inputs=16, outputs=12, heads=2, per_head=8)
WITHOUT_WORKSPACE = {name for name in OPERATIONS if name.startswith(("patches", "cross_entropy"))}

every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_pair = pytest.mark.parametrize(("name", "module"), PAIRS.values(), ids=PAIRS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


# ---- gradients ----


@every_pair
@SHAPES
@given(sizes=any_sizes, seed=seeds)
@odd_sizes()
def test_gradients_equal_central_differences(name, module, sizes, seed):
    operation = OPERATIONS[name]
    arrays, constants, _ = operation.draw(sizes, seed)
    forward, backward = operation.pair(module)
    errors = gradient_error(with_constants(forward, constants), backward, arrays, rng=seed)
    assert max(errors) < TOLERANCE, errors


@every_pair
def test_central_differences_see_every_damaged_gradient(name, module):
    operation = OPERATIONS[name]
    arrays, constants, _ = operation.draw(MEDIUM, 0)
    forward, backward = operation.pair(module)
    forward = with_constants(forward, constants)
    dout, gradients = analytical_gradients(forward, backward, arrays)
    for gradient, truth in zip(gradients, numerical_gradients(forward, arrays, dout), strict=True):
        assert relative_error(gradient, truth) < TOLERANCE
        reordered = gradient.ravel()[::-1].reshape(gradient.shape)
        for damaged in (1.01 * gradient, reordered, 0 * gradient):
            assert relative_error(damaged, truth) > 1e-3


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.reference])
@SHAPES
@given(sizes=any_sizes, seed=seeds)
@odd_sizes()
def test_values_and_gradients_equal_the_reference(name, sizes, seed):
    operation = OPERATIONS[name]
    drawn = operation.draw(sizes, seed)
    got, expected = (out_and_gradients(operation.pair(module), *drawn) for module in ("ops", "reference"))
    assert [array.shape for array in got] == [array.shape for array in expected]
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(errors) < EQUAL, errors


# ---- arguments and memory ----


@every_pair
@both_dtypes
def test_arguments_are_unchanged(name, module, dtype):
    operation = OPERATIONS[name]
    arrays, constants, dout = operation.draw(MEDIUM, 0, dtype)
    watched = [*arrays, *constants, dout]
    before = [np.array(argument).tobytes() for argument in watched]
    evaluate(operation.pair(module), arrays, constants, dout)
    assert [np.array(argument).tobytes() for argument in watched] == before


@every_pair
@every_layout
def test_the_layout_in_memory_changes_nothing(name, module, layout):
    operation = OPERATIONS[name]
    arrays, constants, dout = operation.draw(MEDIUM, 0)
    arranged = [LAYOUTS[layout](array) for array in arrays]
    got = out_and_gradients(operation.pair(module), arranged, constants, LAYOUTS[layout](dout))
    expected = out_and_gradients(operation.pair(module), arrays, constants, dout)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14 * np.abs(b).max())  # a sum rounds like its terms


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.places])
def test_gradients_are_written_into_given_arrays(name):
    operation = OPERATIONS[name]
    forward, backward = operation.pair("ops")
    evaluate((forward, in_places(backward, operation.places)), *operation.draw(MEDIUM, 0))


@every_operation
@both_dtypes
def test_a_workspace_changes_nothing(name, dtype):
    operation = OPERATIONS[name]
    drawn = operation.draw(LARGER, 0, dtype)
    assert_workspace_changes_nothing(
        lambda: out_and_gradients(operation.pair("ops"), *drawn),
        is_used=name not in WITHOUT_WORKSPACE,
    )


# ---- dtypes and devices ----


@every_operation
def test_float32_agrees_with_float64(name):
    operation = OPERATIONS[name]
    arrays, constants, dout = operation.draw(LARGER, 0)

    def function(*arrays_and_dout):
        *arrays, dout = arrays_and_dout
        return out_and_gradients(operation.pair("ops"), arrays, constants, dout)

    assert_float32_agrees(function, [*arrays, dout], operation.float32_tolerance)


@every_operation
@both_dtypes
@SHAPES
@given(sizes=any_sizes, seed=seeds, layout=st.sampled_from([None, *LAYOUTS]))
@odd_sizes(layout=None)
def test_a_device_agrees(accelerator, name, dtype, sizes, seed, layout):
    operation = OPERATIONS[name]
    arrays, constants, dout = operation.draw(sizes, seed, dtype)
    on_device = [constant for constant in constants if isinstance(constant, np.ndarray)]
    arrange = LAYOUTS.get(layout, lambda x: x)

    def function(dout, *arguments):
        drawn, moved = arguments[: len(arrays)], iter(arguments[len(arrays) :])
        every = [next(moved) if isinstance(constant, np.ndarray) else constant for constant in constants]
        arranged = [arrange(array) for array in drawn]
        out, gradients, cache = evaluate(operation.pair("ops"), arranged, every, arrange(dout))
        return out, gradients, arrays_in(cache)

    assert_device_agrees(accelerator, function, dout, *arrays, *on_device)


def arrays_in(cache):
    """Return the arrays of a nested cache."""
    if isinstance(cache, tuple | list):
        return [array for part in cache for array in arrays_in(part)]
    return [cache] if hasattr(cache, "dtype") else []


# ---- the table ----


class Recording(dict):
    """A mapping that records which keys were read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize(("module", "others"), [("ops", set()), ("reference", {"block", "vit"})])
def test_every_pair_is_in_the_table(module, others):
    names = Recording(vars(MODULES[module]))
    for name, operation in OPERATIONS.items():
        if (name, module) in PAIRS.values():
            arrays, constants, dout = operation.draw(MEDIUM, 0)
            evaluate(getattr(operation, module)(names), arrays, constants, dout)
    public = {name for name in names if name.endswith(("_forward", "_backward"))}
    assert names.read == {name for name in public if name.rsplit("_", 1)[0] not in others}
