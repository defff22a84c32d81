"""One flat array, and the views into it."""

import numpy as np
import pytest

from tinyvit.memory import Workspace
from tinyvit.parameters import Parameters

SHAPES = {"layer.weight": (2, 3), "layer.bias": (3,), "scale": ()}


def make(dtype=np.float64):
    return Parameters(SHAPES, np.arange(10, dtype=dtype))


def test_views_lie_in_the_flat_array_one_after_the_other():
    parameters = make()
    assert parameters["layer.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parameters["layer.bias"].tolist() == [6, 7, 8]
    assert parameters["scale"] == 9


def test_writing_into_a_view_writes_into_the_flat_array_and_the_reverse():
    parameters = make()
    parameters["layer.bias"][1] = 70
    parameters.flat[0] = -1
    assert parameters.flat[7] == 70
    assert parameters["layer.weight"][0, 0] == -1
    assert all(np.shares_memory(view, parameters.flat) for view in parameters.values())


def test_it_is_a_mapping_in_the_order_of_the_shapes():
    parameters = make()
    assert list(parameters) == list(SHAPES)
    assert len(parameters) == 3
    assert "scale" in parameters
    assert "bias" not in parameters
    assert {name: view.shape for name, view in parameters.items()} == SHAPES
    with pytest.raises(KeyError):
        parameters["bias"]


def test_pairs():
    parameters = make()
    weight, bias = parameters.pair("layer")
    assert weight is parameters["layer.weight"]
    assert bias is parameters["layer.bias"]
    parameters.set_pair("layer", np.ones((2, 3)), np.full(3, 2.0))
    assert parameters.flat.tolist() == [1] * 6 + [2] * 3 + [9]


def test_another_flat_array_under_the_same_names():
    parameters = make()
    gradients = parameters.with_flat(np.zeros(10))
    gradients["scale"][...] = 5
    assert gradients.flat.tolist() == [0] * 9 + [5]
    assert parameters.flat.tolist() == list(range(10))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_empty_like_keeps_names_and_type_and_comes_from_the_workspace(dtype):
    parameters, workspace = make(dtype), Workspace()
    assert not np.shares_memory(parameters.empty_like().flat, parameters.flat)
    with workspace:
        first = parameters.empty_like()
    assert first.shapes == SHAPES
    assert first.flat.dtype == dtype
    address = first.flat.ctypes.data
    del first
    with workspace:
        assert parameters.empty_like().flat.ctypes.data == address


@pytest.mark.parametrize("shape", [(9,), (11,), (10, 1), ()])
def test_a_flat_array_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"the shapes need a flat array of shape \(10,\), not "):
        Parameters(SHAPES, np.zeros(shape))
