"""Save and load weights and training states as safetensors files, which never contain a pickle."""

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
    """A file is missing, damaged or not the expected checkpoint; the message names the file."""


def save_arrays(path, arrays, info):
    """Write arrays and their metadata to one safetensors file.

    Parameters
    ----------
    path : path-like
        The file to write. It is replaced as a whole.
    arrays : dict of ndarray
        NumPy or CuPy arrays by name.
    info : dict
        Metadata that JSON can represent.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    host = {name: np.ascontiguousarray(to_host(array)) for name, array in arrays.items()}
    write_atomically(path, safetensors.numpy.save(host, metadata={"info": json.dumps(info, allow_nan=True)}))


def load_arrays(path):
    """Return the arrays and the metadata of a file that `save_arrays` wrote.

    Parameters
    ----------
    path : path-like
        The file to read.

    Returns
    -------
    arrays : dict of ndarray
        NumPy arrays by name.
    info : dict
        The metadata.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or of another format.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        arrays = safetensors.numpy.load(content)
        (header_size,) = struct.unpack_from("<Q", content)  # a file begins with 8 bytes of size and a JSON header
        info = json.loads(json.loads(content[8 : 8 + header_size])["__metadata__"]["info"])
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not a complete tinyvit file ({reason}): copy or save it again") from error
    return arrays, info


def save_model(path, parameters, config, info=None):
    """Write a model to a safetensors file.

    Parameters
    ----------
    path : path-like
        The file to write. It is replaced as a whole.
    parameters : Parameters
        The weights. Each name becomes an array of the file.
    config : ViTConfig
        The settings of the model.
    info : dict, optional
        Further metadata that JSON can represent.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    save_arrays(path, dict(parameters), {"config": config.as_dict(), **(info or {})})


def load_model(path, backend=None):
    """Return the model of a file that `save_model` wrote.

    Parameters
    ----------
    path : path-like
        The file to read.
    backend : Backend, optional
        Where the weights go. Default: the CPU.

    Returns
    -------
    parameters : Parameters
        The weights, float32 or float64 as in the file.
    config : ViTConfig
        The settings of the model.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged, or its arrays do not fit its settings.
    """
    arrays, info = load_arrays(path)
    try:
        config = ViTConfig(**info["config"])  # the metadata of another program's file may be any JSON
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings are not those of a model ({error})") from error
    shapes = config.shapes()
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            found = f"not {arrays[name].shape}" if name in arrays else "but is missing"
            raise CheckpointError(f"{path}: {name} should have the shape {shape}, {found}")
    kinds = {array.dtype for array in arrays.values()}
    if kinds not in ({np.dtype(np.float32)}, {np.dtype(np.float64)}):
        found = ", ".join(sorted(kind.name for kind in kinds))
        raise CheckpointError(f"{path}: its arrays should all be float32 or all be float64, not {found}")
    if surplus := sorted(set(arrays) - set(shapes)):
        raise CheckpointError(f"{path}: contains arrays that its settings do not name: {', '.join(surplus[:5])}")
    flat = np.concatenate([arrays[name].ravel() for name in shapes])
    return Parameters(shapes, flat if backend is None else backend.asarray(flat)), config
