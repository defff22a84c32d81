"""Save and load weights and training states as safetensors files, which never contain a pickle."""

import hashlib
import json
import logging
import math
import os
import shlex
import stat
import struct
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from tinyvit.backend import Backend, to_host
from tinyvit.checks import require_backend
from tinyvit.files import write_atomically
from tinyvit.model import ViTConfig, check_parameters
from tinyvit.parameters import Parameters
from tinyvit.signatures import DOWNLOAD, PULL, broken_link, identify

MODEL = "model.safetensors"  # the model in the folder of a run
CHECKPOINT = "checkpoint.safetensors"
LATER_SETTINGS = {"channels", "class_names"}  # missing in files of version 0.1, where the defaults apply
NO_CHECKSUM = "0" * 64  # stands in the place of the checksum until it is known
ADVICE = "give a file that `tinyvit train` or `VisionTransformer.save` wrote"

# The programs that write models in these forms.
WRITERS = {"a zip archive": "PyTorch", "a Python pickle, which can run any code": "PyTorch", "an HDF5 file": "Keras"}


class CheckpointError(ValueError):
    """A file is missing, damaged or not the expected checkpoint; the message names the file."""


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
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
    ValueError
        If a value is NaN or infinite.
    OSError
        If the file cannot be written.

    Notes
    -----
    The file's metadata has two entries. "info" is the metadata as JSON. "checksum" is the SHA-256 of all other bytes
    of the file.
    """
    host = {name: np.asarray(to_host(array), order="C") for name, array in arrays.items()}
    if reason := _not_finite(host):
        raise ValueError(f"{path}: {reason}: only finite values can be saved")
    content = safetensors.numpy.save(host)
    (size,) = struct.unpack_from("<Q", content)  # a file begins with 8 bytes of size and a JSON header
    metadata = {"checksum": NO_CHECKSUM, "info": json.dumps(info)}
    header = json.dumps({"__metadata__": metadata, **json.loads(content[8 : 8 + size])}).encode()
    # The checksum is the first entry, so its zeros come before any in the info or in the name of an array.
    header += b" " * (-len(header) % 8)  # the arrays begin at a multiple of 8 bytes
    before, after = (struct.pack("<Q", len(header)) + header).split(NO_CHECKSUM.encode(), 1)
    data = memoryview(content)[8 + size :]
    write_atomically(path, b"".join((before, _checksum(before, after, data), after, data)))


def load_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays and the metadata of a file that `save_arrays` wrote.

    Parameters
    ----------
    path : path-like
        The file to read.

    Returns
    -------
    arrays : dict of ndarray
        NumPy arrays by name. All values are finite.
    info : dict
        The metadata.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or of another format.

    Notes
    -----
    Files of tinyvit 0.1 have no checksum. They are loaded, and the logger "tinyvit" gets a warning.
    """
    path = as_path(path)
    content = _read(path)
    try:
        (size,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        if (checksum := metadata.get("checksum")) is not None:
            start, view = content.index(checksum.encode(), 8), memoryview(content)
            if _checksum(view[:start], view[start + 64 :]) != checksum.encode():
                raise ValueError("its content does not match its checksum")
        arrays = safetensors.numpy.load(content)
        foreign = not {"checksum", "info"} & set(metadata)
        if not foreign and set(metadata) not in ({"checksum", "info"}, {"info"}):
            raise ValueError("its metadata is not that of tinyvit")
        info = {} if foreign else json.loads(metadata["info"])
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {in_short(error)}"
        raise CheckpointError(f"{path}: not a complete tinyvit file ({reason}): copy or save it again") from error
    if foreign:
        kind = f"a safetensors file of another program, with arrays such as {min(arrays, default='none')}"
        raise CheckpointError(f"{path}: {kind}: {ADVICE}")
    if reason := _not_finite(arrays):
        raise CheckpointError(f"{path}: {reason}: give another file")
    if checksum is None:
        text = "note: %s has no checksum, so that damage could remain unnoticed; to add one, save it again"
        logging.getLogger("tinyvit").warning(text, path)
    return arrays, info


def as_path(path: Any) -> Path:
    """Return a path as a `Path`.

    Parameters
    ----------
    path : path-like
        The path, also as bytes.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    TypeError
        If it is another object.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"path must be the path of a file or a folder, not {path!r:.40}")
    return Path(os.fsdecode(path))


def _checksum(*parts):
    """Return the SHA-256 of the parts of a file, in 64 characters."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def _not_finite(arrays):
    """Return a description of the first array that contains NaN or infinity, or None."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = array.size - np.count_nonzero(np.isfinite(array))
            return f"{name} contains {count:,} values that are NaN or infinite"
    return None


def _read(path):
    """Return the bytes of a file. Raise `CheckpointError` if it is unreadable or begins like another format."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: this is a folder: {_advice_on_folder(path)}")
        if not stat.S_ISREG(mode):  # a pipe may never end
            raise CheckpointError(f"{path}: this is a device or a pipe: give a file")
        with open(path, "rb", buffering=0) as file:
            start = file.read(512)
            if start[8:9] == b"{":  # as in every safetensors file
                file.seek(0)
                return file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {broken_link(path) or error.strerror or error}") from error
    kind, advice = identify(start) or ("a file of an unknown format", ADVICE)
    writer = f", such as {WRITERS[kind]} writes" if kind in WRITERS else ""
    advice = advice if advice in (DOWNLOAD, PULL) else ADVICE
    raise CheckpointError(f"{path}: not a complete tinyvit file, but {kind}{writer}: {advice}")


def _advice_on_folder(folder):
    """Return what to load instead of a folder."""
    if (folder / MODEL).exists():
        return f"load {folder / MODEL}"
    if (folder / CHECKPOINT).exists():
        command = f"tinyvit train --resume {shlex.quote(str(folder))}"
        return f"its run has no {MODEL} before its end: continue it with {command}"
    return "give a model file"


def parameter_count(config: ViTConfig) -> int:
    """Return the number of weights of a model, without a list of its shapes, which is long for a large depth.

    Parameters
    ----------
    config : ViTConfig
        The settings of the model.

    Returns
    -------
    int
        The number of weights.
    """
    one, two = (sum(map(math.prod, replace(config, depth=depth).shapes().values())) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


def in_short(error: object) -> str:
    """Return the text of an error in one line of at most 300 characters.

    Parameters
    ----------
    error : Exception or str
        The error. Its text may contain a long value from a damaged file.

    Returns
    -------
    str
        The line. It ends with "..." if something is left out.
    """
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def save_model(
    path: str | os.PathLike[str], parameters: Parameters, config: ViTConfig, info: dict | None = None
) -> None:
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
        Further metadata that JSON can represent, under other names than "config" and "adam_steps".

    Raises
    ------
    ValueError
        If a weight is NaN or infinite, the weights do not fit the settings, or a name in `info` is reserved.
    OSError
        If the file cannot be written.
    """
    check_parameters("parameters", parameters, config.shapes())
    if reserved := sorted({"config", "adam_steps"} & set(info or {})):
        raise ValueError(f"info must not have the name {reserved[0]!r}, which tinyvit uses: give another name")
    save_arrays(path, dict(parameters), {"config": config.as_dict(), **(info or {})})


def load_model(path: str | os.PathLike[str], backend: Backend | None = None) -> tuple[Parameters, ViTConfig]:
    """Return the model of a file that `save_model` wrote.

    Parameters
    ----------
    path : path-like
        The file to read, such as model.safetensors in the folder of a run. The checkpoint of a run is refused,
        because the model is in another file.
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
        If the file is missing or damaged, its arrays do not fit its settings, or a weight is not finite.
    """
    if backend is not None:
        require_backend(backend)
    path = as_path(path)
    arrays, info = load_arrays(path)
    if isinstance(info, dict) and "adam_steps" in info:
        advice = _advice_on_folder(path.parent)
        raise CheckpointError(f"{path}: the checkpoint of a run, not a model: {advice}")
    try:
        config = ViTConfig(**info["config"])  # the metadata of another program's file may be any JSON
        require_all_settings(config, info["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its settings are not those of a model ({in_short(error)})") from error
    if config.depth > len(arrays):
        raise CheckpointError(f"{path}: its settings have {config.depth} blocks, but it has {len(arrays)} arrays")
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
        names = in_short(", ".join(surplus))
        raise CheckpointError(f"{path}: contains arrays that its settings do not name: {names}")
    flat = np.concatenate([arrays[name].ravel() for name in shapes])
    return Parameters(shapes, flat if backend is None else backend.asarray(flat)), config


def require_all_settings(config: Any, settings: Mapping[str, Any]) -> None:
    """Check that a file contains every setting, so that no default takes the place of a lost one.

    Parameters
    ----------
    config : ViTConfig or TrainingConfig
        The settings.
    settings : dict
        The dict from the file that they were made from.

    Raises
    ------
    ValueError
        If a setting is missing.
    """
    for name, value in config.as_dict().items():
        if name not in settings and name not in LATER_SETTINGS:
            raise ValueError(f"{name} is missing")
        if isinstance(value, dict) and (missing := set(value) - set(settings[name])):
            raise ValueError(f"{name} {min(missing)} is missing")
