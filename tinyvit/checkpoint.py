"""Weights and the state of a training run in safetensors files: written at once, and never a pickle."""

import json
import struct
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from tinyvit.backend import to_host
from tinyvit.files import write_atomically
from tinyvit.model import ViTConfig
from tinyvit.parameters import Parameters


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one that fits; the message names the file and what is wrong."""


def save_arrays(path, arrays, info):
    """Write `arrays`, a dict of arrays of either device, and `info`, a JSON dict, to one safetensors file."""
    host = {name: np.ascontiguousarray(to_host(array)) for name, array in arrays.items()}
    write_atomically(path, safetensors.numpy.save(host, metadata={"info": json.dumps(info, allow_nan=True)}))


def load_arrays(path):
    """Return the NumPy arrays and the info of a file that `save_arrays` wrote.

    Raises `CheckpointError` if there is no such file or it is not whole.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        arrays = safetensors.numpy.load(content)
        (header_size,) = struct.unpack_from("<Q", content)  # the format: 8 bytes of size, then a JSON header
        info = json.loads(json.loads(content[8 : 8 + header_size])["__metadata__"]["info"])
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole tinyvit file ({type(error).__name__}: {error})") from error
    return arrays, info


def save_model(path, parameters, config, info=None):
    """Write a model to a safetensors file: an array for each name of `parameters`, and the `ViTConfig`."""
    save_arrays(path, dict(parameters), {"config": config.as_dict(), **(info or {})})


def load_model(path, backend=None):
    """Return the `Parameters` and the `ViTConfig` that `save_model` wrote, on the `backend`'s device or the CPU.

    Raises `CheckpointError` if the file is not whole, or its arrays are not those of its settings.
    """
    arrays, info = load_arrays(path)
    try:
        config = ViTConfig(**info["config"])  # KeyError and TypeError: it may be any JSON
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings are not a model's ({error})") from error
    shapes = config.shapes()
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise CheckpointError(f"{path}: {name} should have the shape {shape}, found {found}")
    kinds = {array.dtype for array in arrays.values()}
    if kinds not in ({np.dtype(np.float32)}, {np.dtype(np.float64)}):
        found = ", ".join(sorted(kind.name for kind in kinds))
        raise CheckpointError(f"{path}: its arrays should all be float32, or all float64, found {found}")
    if surplus := sorted(set(arrays) - set(shapes)):
        raise CheckpointError(f"{path}: holds arrays that its settings do not name: {', '.join(surplus[:5])}")
    flat = np.concatenate([arrays[name].ravel() for name in shapes])
    return Parameters(shapes, flat if backend is None else backend.asarray(flat)), config
