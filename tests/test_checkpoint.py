"""Models and arrays survive the way to disk and back, and a damaged file gets one clear error."""

import gzip
import io
import json
import logging
import os
import pickle
import re
import shlex
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from damaged_files import opened, sealed
from safetensors import safe_open

from tinyvit.checkpoint import CheckpointError, load_arrays, load_model, parameter_count, save_arrays, save_model
from tinyvit.classifier import VisionTransformer, load_pretrained
from tinyvit.model import ViTConfig, initialise
from tinyvit.training.state import read_checkpoint

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


def test_other_readers_of_safetensors_find_names_values_and_settings(model, tmp_path):
    model.save(tmp_path / "m", {"note": "é"})
    with safe_open(tmp_path / "m", "numpy") as file:
        assert sorted(file.keys()) == sorted(CONFIG.shapes())
        for name in file.keys():  # noqa: SIM118  the file is no dict
            np.testing.assert_array_equal(file.get_tensor(name), model.parameters[name])
        assert json.loads(file.metadata()["info"]) == {"config": CONFIG.as_dict(), "note": "é"}
    (size,) = np.frombuffer((tmp_path / "m").read_bytes()[:8], "<u8")
    assert size % 8 == 0  # other readers map the arrays into memory


def test_the_same_model_gives_the_same_file(model, tmp_path):
    for name in ("m", "n"):
        model.save(tmp_path / name, {"b": 1, "a": 2})
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()


def test_a_model_moves_between_devices(model, tmp_path, backend):
    model.save(tmp_path / "m")
    moved = VisionTransformer.load(tmp_path / "m", backend)
    moved.save(tmp_path / "n")
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()


def test_arrays_keep_dtype_shape_and_info(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.float64(3.5), "c": np.zeros((0, 2), np.float32)}
    arrays["d"] = arrays["a"].T  # not contiguous
    info = {"loss": 0.1 + 0.2, "history": [{"epoch": 1, "validation": None}], "text": "é"}
    save_arrays(tmp_path / "x", arrays, info)
    back, info_back = load_arrays(tmp_path / "x")
    assert info_back == info
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.extended)])
def test_every_flipped_bit_and_every_missing_byte_is_one_error_that_names_the_file(tmp_path, step):
    path = tmp_path / "x"
    save_arrays(path, {"a": np.arange(4.0), "b": np.arange(3, dtype=np.float32)}, {"epoch": 1})
    content = path.read_bytes()
    damaged = [content[:size] for size in range(0, len(content), step)]
    for bit in range(0, 8 * len(content), step):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        damaged.append(bytes(changed))
    for changed in damaged:
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: ") as caught:
            load_arrays(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["offsets", "names", "order", "info", "dtype", "data"])
def test_a_change_that_leaves_a_valid_safetensors_file_is_found(tmp_path, change):
    path = tmp_path / "x"
    save_arrays(path, {"a": np.arange(4.0), "b": 2 * np.arange(4.0)}, {"epoch": 1})
    header, info, data = opened(path.read_bytes())
    checksum = header["__metadata__"]["checksum"]
    first, second = header["a"], header["b"]
    if change == "offsets":
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    elif change == "names":
        header["a"], header["b"] = second, first
    elif change == "order":
        header = {"__metadata__": header["__metadata__"], "b": second, "a": first}
    elif change == "info":
        info["epoch"] = 2
    elif change == "dtype":
        first["dtype"] = "I64"
    else:
        data[:] = data[32:] + data[:32]
    path.write_bytes(sealed(header, info, data, checksum))
    safetensors.numpy.load_file(path)  # other readers notice nothing
    with pytest.raises(CheckpointError, match=r"not a complete tinyvit file .*does not match its checksum"):
        load_arrays(path)
    path.write_bytes(sealed(header, info, data, None))
    load_arrays(path)


def without_checksum(arrays, info):
    return safetensors.numpy.save(arrays, metadata={"info": json.dumps(info)})


def test_a_file_without_a_checksum_is_loaded_with_a_note(model, tmp_path, caplog):
    path = tmp_path / "old"
    path.write_bytes(without_checksum(dict(model.parameters), {"config": CONFIG.as_dict()}))
    back = VisionTransformer.load(path)
    np.testing.assert_array_equal(back.parameters.flat, model.parameters.flat)
    expected = f"note: {path} has no checksum, so that damage could remain unnoticed; to add one, save it again"
    assert caplog.record_tuples == [("tinyvit", logging.WARNING, expected)]
    caplog.clear()
    back.save(path)
    VisionTransformer.load(path)
    assert caplog.records == []


def test_a_removed_checksum_does_not_make_an_old_file(tmp_path):
    """Otherwise a flipped bit in its name would switch the comparison off."""
    save_arrays(tmp_path / "x", {"a": np.arange(4.0)}, {"epoch": 1})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(CheckpointError, match="its metadata is not that of tinyvit"):
        load_arrays(tmp_path / "x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(model, tmp_path, value):
    path = tmp_path / "m"
    model.save(path)
    before = path.read_bytes()
    header, info, data = opened(before)
    start = header["norm.bias"]["data_offsets"][0]
    data[start : start + 4] = np.float32(value).tobytes()
    path.write_bytes(sealed(header, info, data, None))
    expected = f"^{re.escape(str(path))}: norm.bias contains 1 values that are NaN or infinite: "
    with pytest.raises(CheckpointError, match=expected + "give another file"):
        VisionTransformer.load(path)
    path.write_bytes(before)
    model.parameters["norm.bias"][3] = value
    with pytest.raises(ValueError, match=expected + "only finite values can be saved"):
        model.save(path)
    for dtype in (np.float16, np.float64):
        with pytest.raises(ValueError, match="b contains 2 values that are NaN or infinite"):
            save_arrays(path, {"a": np.arange(3), "b": np.array([value, 1, value], dtype)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"depth": 1}, {"depth": 3, "width": 12, "heads": 3, "image_size": 14, "mlp_width": 5, "classes": 7}],
)
def test_the_number_of_weights_is_that_of_the_shapes(settings):
    config = ViTConfig(**settings)
    assert parameter_count(config) == initialise(config).flat.size


def test_a_large_depth_is_refused_before_the_shapes_are_listed(model, tmp_path, monkeypatch):
    save_arrays(tmp_path / "m", dict(model.parameters), {"config": CONFIG.as_dict() | {"depth": 100_000}})
    monkeypatch.setattr(ViTConfig, "shapes", lambda config: pytest.fail("the shapes are listed"))
    with pytest.raises(CheckpointError, match="its settings have 100000 blocks, but it has 20 arrays"):
        VisionTransformer.load(tmp_path / "m")


def test_a_missing_setting_does_not_get_the_default(model, tmp_path):
    settings = CONFIG.as_dict()
    del settings["epsilon"]
    save_arrays(tmp_path / "m", dict(model.parameters), {"config": settings})
    with pytest.raises(CheckpointError, match=r"its settings are not those of a model \(epsilon is missing\)"):
        VisionTransformer.load(tmp_path / "m")


def test_a_long_value_does_not_make_a_long_message(model, tmp_path):
    save_arrays(tmp_path / "m", dict(model.parameters), {"config": CONFIG.as_dict() | {"gelu": "x y\n" * 9999}})
    with pytest.raises(CheckpointError, match=r"gelu must be 'erf' or 'tanh', not .*\.\.\.\)$") as caught:
        VisionTransformer.load(tmp_path / "m")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


# ---- other files ----


def archive(name):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, "content")
    return stream.getvalue()


def numpy_bytes(save, *arrays):
    stream = io.BytesIO()
    save(stream, *arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "but an empty file: give a file that `tinyvit train` or `VisionTransformer.save` wrote"),
        (b"not a model", "but a file of an unknown format: give a file that `tinyvit train` or `VisionTr"),
        (b"12345678{model}", r"not a complete tinyvit file \(.*\): copy or save it again"),
        (archive("archive/data.pkl"), "but a zip archive, such as PyTorch writes: give a file"),
        (numpy_bytes(np.savez, np.arange(3)), "but a zip archive of NumPy arrays: give a file"),
        (numpy_bytes(np.save, np.arange(3)), "but a single NumPy array: give a file"),
        (pickle.dumps({"a": 1}, protocol=2), "a Python pickle, which can run any code, such as PyTorch writes: give"),
        (pickle.dumps({"a": 1}), "a Python pickle, which can run any code, such as PyTorch writes: give"),
        (b"\n<!DOCTYPE html><html>", "but an HTML page, so the download failed: download the file again$"),
        (b"<HTML><head>", "but an HTML page, so the download failed: download the file again$"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer in place of the content: run git lfs pull$"),
        (b"\x89HDF\r\n\x1a\n", "but an HDF5 file, such as Keras writes: give a file"),
        (gzip.compress(b"model", mtime=0), "but a gzip file: give a file"),
        (b"\0" * 257 + b"ustar", "but a tar archive: give a file"),
        (
            safetensors.numpy.save({"vit.embeddings.cls_token": np.zeros(3)}, metadata={"format": "pt"}),
            "a safetensors file of another program, with arrays such as vit.embeddings.cls_token: give a file that",
        ),
        (safetensors.numpy.save({}), "a safetensors file of another program, with arrays such as none: give a"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content)
    for load in (load_model, load_arrays):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{expected}") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_folder_leads_to_the_model_inside(model, tmp_path):
    tmp_path = tmp_path / "my run"
    tmp_path.mkdir()
    with pytest.raises(CheckpointError, match=r"this is a folder: give a model file$"):
        load_model(tmp_path)
    save_arrays(tmp_path / "checkpoint.safetensors", {}, {"adam_steps": 0})
    resume = re.escape(f"continue it with tinyvit train --resume {shlex.quote(str(tmp_path))}")
    with pytest.raises(CheckpointError, match=f"this is a folder: its run has no model.safetensors .*: {resume}$"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"the checkpoint of a run, not a model: its run has no.*: {resume}$"):
        load_model(tmp_path / "checkpoint.safetensors")
    model.save(tmp_path / "model.safetensors")
    inside = re.escape(f"load {tmp_path / 'model.safetensors'}")
    with pytest.raises(CheckpointError, match=f"this is a folder: {inside}$"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"the checkpoint of a run, not a model: {inside}$"):
        load_model(tmp_path / "checkpoint.safetensors")


def test_links_and_devices_are_named(model, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"link: cannot be read: a link to .*gone, which is missing$"):
        load_model(tmp_path / "link")
    model.save(tmp_path / "link")
    assert load_model(tmp_path / "gone")[1] == CONFIG
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CheckpointError, match=f"{path}: this is a device or a pipe: give a file"):
            load_model(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone: cannot be read: No such file"):
        VisionTransformer.load(tmp_path / "gone")


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


@pytest.mark.parametrize("name", ["config", "adam_steps"])
def test_a_name_that_would_make_the_file_unreadable_is_refused(model, tmp_path, name):
    with pytest.raises(ValueError, match=f"info must not have the name '{name}'"):
        model.save(tmp_path / "m", info={name: 1, "note": "x"})
    assert not (tmp_path / "m").exists()
    model.save(tmp_path / "m", info={"note": "x", "0" * 64: "0" * 64})  # like the place of the checksum
    assert VisionTransformer.load(tmp_path / "m").config == CONFIG


def test_weights_of_other_settings_are_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="parameters must have the shapes of the model"):
        save_model(tmp_path / "m", model.parameters, ViTConfig())


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu", 0])
def test_the_name_of_a_device_is_no_backend(model, tmp_path, device):
    model.save(tmp_path / "m")
    advice = re.escape(f"backend must be a tinyvit.backend.Backend, not {device!r}")
    advice += re.escape(f": use tinyvit.gpu.get_backend({device!r})") if isinstance(device, str) else "$"
    for load in (
        lambda: load_model(tmp_path / "m", device),
        lambda: VisionTransformer.load(tmp_path / "m", device),
        lambda: load_pretrained(backend=device),
    ):
        with pytest.raises(TypeError, match=advice):
            load()


def test_a_path_may_be_bytes_and_another_object_is_named(model, tmp_path):
    model.save(tmp_path / "m")
    assert load_model(os.fsencode(tmp_path / "m"))[1] == CONFIG
    for load in (load_model, load_arrays, read_checkpoint):
        with pytest.raises(TypeError, match="path must be the path of a file or a folder, not None"):
            load(None)
