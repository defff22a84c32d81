"""One flat array, and the views into it."""

import copy
import pickle

import joblib
import numpy as np
import pytest

from tinyvit.backend import to_host
from tinyvit.classifier import VisionTransformer
from tinyvit.data import ImageDataset
from tinyvit.evaluate import evaluation_of_logits
from tinyvit.gpu import get_backend
from tinyvit.memory import Workspace
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_backward, vit_forward
from tinyvit.ops import cross_entropy_backward, layer_norm_forward, multi_head_attention_forward
from tinyvit.optim import Adam, ExponentialMovingAverage
from tinyvit.parameters import Parameters
from tinyvit.training import TrainingConfig
from tinyvit.training.state import new_state

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


@pytest.mark.parametrize("flat", [list(range(10)), tuple(range(10))])
def test_a_list_becomes_a_flat_array(flat):
    assert Parameters(SHAPES, flat).flat.tolist() == list(range(10))


# ---- copies ----

CONFIG = ViTConfig(image_size=4, patch_size=2, width=4, depth=1, heads=2, mlp_width=3, classes=3)
IMAGES, LABELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8), np.arange(6) % 3


def through_joblib(thing, folder):
    joblib.dump(thing, folder / "thing")
    return joblib.load(folder / "thing")


COPIES = {
    "deepcopy": lambda thing, folder: copy.deepcopy(thing),
    "copy": lambda thing, folder: copy.copy(thing),
    "pickle": lambda thing, folder: pickle.loads(pickle.dumps(thing)),
    "joblib": through_joblib,
}
every_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


def train(parameters, adam):
    """Take a step in the views, as `vit_forward` reads them, and in the flat array, as Adam writes it."""
    _, _, gradients = loss_and_gradient(IMAGES, LABELS, parameters, CONFIG)
    adam.step(parameters.flat, gradients.flat, 0.01)


@every_copy
def test_a_copy_of_parameters_is_whole_and_its_own(make_copy, tmp_path):
    original = initialise(CONFIG)
    before = original.flat.tobytes()
    copied = make_copy(original, tmp_path)
    assert copied.flat.tobytes() == before
    assert copied.shapes == original.shapes
    assert all(np.shares_memory(view, copied.flat) for view in copied.values())
    assert not np.shares_memory(copied.flat, original.flat)
    train(copied, Adam(copied.flat))
    assert copied.flat.tobytes() != before
    assert original.flat.tobytes() == before
    loss, _, _ = loss_and_gradient(IMAGES, LABELS, copied, CONFIG)
    assert loss < loss_and_gradient(IMAGES, LABELS, original, CONFIG)[0]


@every_copy
def test_a_copy_of_a_model_learns_and_the_original_does_not(make_copy, tmp_path):
    model = VisionTransformer(CONFIG, initialise(CONFIG))
    before = model.logits(IMAGES).tobytes()
    copied = make_copy(model, tmp_path)
    assert copied.config == CONFIG
    assert copied.logits(IMAGES).tobytes() == before
    train(copied.parameters, Adam(copied.parameters.flat))
    assert copied.logits(IMAGES).tobytes() != before
    assert model.logits(IMAGES).tobytes() == before


@every_copy
@pytest.mark.parametrize("threads", [1, 2])
def test_a_copy_of_adam_and_of_an_average_is_its_own(make_copy, threads, tmp_path):
    parameters = initialise(CONFIG)
    adam = Adam(parameters.flat, weight_decay=0.1, threads=threads)
    average = ExponentialMovingAverage(parameters.flat)
    train(parameters, adam)
    average.step(parameters.flat)
    results = []
    for chosen in (make_copy(adam, tmp_path), adam):  # the copy steps first, and the original does not notice
        copied = copy.deepcopy(parameters)
        train(copied, chosen)
        arrays = copied.flat, chosen.first_moment, chosen.second_moment
        results.append(([array.tobytes() for array in arrays], chosen.steps))
    assert results[0] == results[1]
    results = []
    for chosen in (make_copy(average, tmp_path), average):
        chosen.step(2 * parameters.flat)
        results.append((chosen.average.tobytes(), chosen.steps))
    assert results[0] == results[1]


@every_copy
def test_a_copy_of_a_state_is_its_own(make_copy, tmp_path):
    state = new_state(CONFIG, TrainingConfig(average=0.9), get_backend("cpu"))
    before = [array.tobytes() for array in state.arrays().values()]
    copied = make_copy(state, tmp_path)
    train(copied.parameters, copied.adam)
    copied.average.step(copied.parameters.flat)
    copied.history.append({})
    assert all(a.tobytes() != b for a, b in zip(copied.arrays().values(), before, strict=True))
    assert [array.tobytes() for array in state.arrays().values()] == before
    assert state.history == []
    assert state.adam.steps == 0


@pytest.mark.parametrize("name", ["deepcopy", "copy", "pickle"])
def test_a_copy_on_a_device(accelerator, name, tmp_path):
    original = initialise(CONFIG)
    original = original.with_flat(accelerator.asarray(original.flat))
    copied = COPIES[name](original, tmp_path)
    copied.flat[...] = 2.0
    assert all((to_host(view) == 2).all() for view in copied.values())
    assert not (to_host(original.flat) == 2).any()


def test_a_copy_of_parameters_of_a_workspace_keeps_its_values():
    with Workspace():
        first = make().empty_like()
        first.flat[...] = 3
        copied = copy.copy(first), copy.deepcopy(first)
    del first
    assert all((each.flat == 3).all() for each in copied)


# ---- comparisons ----


def objects():
    """Yield two equal objects with arrays of each kind."""
    for _ in range(2):
        parameters = initialise(CONFIG)
        logits, cache = vit_forward(IMAGES, parameters, CONFIG)
        state = new_state(CONFIG, TrainingConfig(), get_backend("cpu"))
        arrays = [np.ones(shape) for shape in [(1, 2, 2), (2, 6), 6, (2, 2), 2]]
        _, attention = multi_head_attention_forward(*arrays, heads=1)
        yield {
            "parameters": parameters,
            "gradients": vit_backward(logits, cache),
            "model": VisionTransformer(CONFIG, parameters),
            "cache": cache,
            "cache of a block": cache.blocks[0],
            "cache of the embedding": cache.embedding,
            "cache of class attention": cache.blocks[0].attention,
            "cache of attention": attention,
            "cache of one head": attention.attention,
            "cache of layer norm": layer_norm_forward(np.ones((2, 3)), np.ones(3), np.ones(3))[1],
            "evaluation": evaluation_of_logits(logits, LABELS),
            "adam": state.adam,
            "state": state,
            "data": ImageDataset(IMAGES, LABELS, IMAGES, LABELS, classes=3, name="a", source="b"),
        }


def test_objects_with_arrays_equal_only_themselves():
    first, second = objects()
    for name, thing in first.items():
        assert thing == thing, name
        assert not thing != thing, name  # noqa: SIM202
        assert thing != second[name], name
        assert not thing == second[name], name  # noqa: SIM201
        assert thing is not None
        assert thing != "x"
        assert {thing: 1, second[name]: 2}[thing] == 1, name
        assert thing in [second[name], thing]
        if isinstance(thing, tuple):
            assert thing != tuple(second[name])
            assert tuple(second[name]) != thing


def test_a_cache_is_still_a_tuple():
    _, cache = layer_norm_forward(np.ones((2, 3)), np.ones(3), np.ones(3))
    normalised, inverse_deviation, w = cache
    assert cache.w is w
    assert cache._replace(w=None).normalised is normalised
    assert len(cache) == 3
    assert cross_entropy_backward(1.0, (np.ones((1, 2)), np.ones((1, 2)))).shape == (1, 2)
    assert inverse_deviation.shape == (2, 1)
