"""Models and arrays survive the way to disk and back, and a damaged file gets one clear error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.checkpoint import CheckpointError, load_arrays, save_arrays
from tinyvit.classifier import VisionTransformer
from tinyvit.model import ViTConfig, initialise

CONFIG = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12, classes=5, epsilon=1e-5)


@pytest.fixture
def model():
    return VisionTransformer(CONFIG, initialise(CONFIG, seed=3))


def test_a_model_comes_back_bit_for_bit(model, tmp_path):
    model.save(tmp_path / "m")
    back = VisionTransformer.load(tmp_path / "m")
    assert back.config == CONFIG
    assert back.parameters.flat.dtype == np.float32
    np.testing.assert_array_equal(back.parameters.flat, model.parameters.flat)


def test_other_readers_of_safetensors_find_the_names(model, tmp_path):
    from safetensors.numpy import load_file

    model.save(tmp_path / "m")
    arrays = load_file(tmp_path / "m")
    assert list(sorted(arrays)) == sorted(CONFIG.shapes())
    assert arrays["blocks.0.attention.qkv.weight"].shape == (8, 24)


def test_a_model_moves_between_devices(model, tmp_path, backend):
    model.save(tmp_path / "m")
    moved = VisionTransformer.load(tmp_path / "m", backend)
    moved.save(tmp_path / "n")
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()


def test_arrays_keep_dtype_shape_and_info(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.float64(3.5), "c": np.zeros((0, 2), np.float32)}
    info = {"loss": 0.1 + 0.2, "history": [{"epoch": 1, "validation": None}], "text": "é"}
    save_arrays(tmp_path / "x", arrays, info)
    back, info_back = load_arrays(tmp_path / "x")
    assert info_back == info
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


@given(st.data())
def test_a_damaged_file_is_one_error_that_names_it_or_still_a_whole_file(tmp_path, data):
    path = tmp_path / "x"
    save_arrays(path, {"a": np.arange(4.0)}, {"epoch": 1})
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:where]
    else:
        content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        load_arrays(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(path)  # a bit of an array or of the info: still a whole file
    assert str(path) in message


def test_missing_and_foreign_files_are_named(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"gone: cannot be read: No such file"):
        VisionTransformer.load(tmp_path / "gone")
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"text: not a complete tinyvit file"):
        VisionTransformer.load(tmp_path / "text")


def test_a_model_whose_arrays_do_not_fit_its_settings_is_refused(tmp_path, model):
    arrays = dict(model.parameters)
    info = {"config": CONFIG.as_dict()}
    save_arrays(tmp_path / "m", {**arrays, "head.bias": np.zeros(7, np.float32)}, info)
    with pytest.raises(CheckpointError, match=r"head.bias should have the shape \(5,\), not \(7,\)"):
        VisionTransformer.load(tmp_path / "m")
    save_arrays(tmp_path / "m", {n: a for n, a in arrays.items() if n != "norm.bias"}, info)
    with pytest.raises(CheckpointError, match=r"norm.bias should have the shape \(8,\), but is missing"):
        VisionTransformer.load(tmp_path / "m")
    save_arrays(tmp_path / "m", {**arrays, "surplus": np.zeros(1, np.float32)}, info)
    with pytest.raises(CheckpointError, match=r"arrays that its settings do not name: surplus"):
        VisionTransformer.load(tmp_path / "m")
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    save_arrays(tmp_path / "m", halves, info)
    with pytest.raises(CheckpointError, match="should all be float32 or all be float64, not float16"):
        VisionTransformer.load(tmp_path / "m")
    save_arrays(tmp_path / "m", arrays, {"config": {**CONFIG.as_dict(), "heads": 3}})
    with pytest.raises(CheckpointError, match=r"its settings are not those of a model \(heads must divide width"):
        VisionTransformer.load(tmp_path / "m")
