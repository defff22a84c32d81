"""A launcher refuses every argument that its kernel would misread, before the launch. No kernel is compiled here."""

from types import SimpleNamespace

import numpy as np
import pytest
from kernel_cases import CASES, CONFIGS

from tinyvit.kernels import Kernels
from tinyvit.kernels.launch import SIGNATURES, TABLE


class Launched(Exception):
    """The arguments of a launch passed all checks."""


def launch(grid, block, arguments):
    raise Launched


@pytest.fixture
def kernels(accelerator):
    """Return kernels for the strict stand-in, or for a GPU, whose launch raises `Launched`."""
    made = object.__new__(Kernels)
    made.backend, made.config, made.precision = accelerator, CONFIGS["odd"], "float32"
    made._functions = dict.fromkeys(TABLE, launch)
    return made


# Sizes of axes that may change without any other array.
FREE = {
    ("draw_maps", "maps", 0),
    ("adam_step", "schedule", 0),
    ("sum_partials", "partial_gradients", 0),
    ("sum_partials", "partial_gradients", 1),
    ("sum_partials", "gradient", 0),  # at most the length of a partial gradient
}
# In these cases no two axes of an array have the same length.
SIZES = {"attention_forward": {"batch": 3}, "attention_backward": {"batch": 3}, "adam_step": {"count": 1500}}


def case_of(name, backend):
    """Return the arguments of a launch by name, on the device."""
    given = {}
    recorder = SimpleNamespace(**{launcher: given.update for launcher in TABLE})
    names = "maps", "key", "first", "augmentation"
    recorder.draw_maps = lambda *arguments: given.update(zip(names, arguments, strict=True))
    case = CASES[name](CONFIGS["odd"], **SIZES.get(name, {}))
    case.call(recorder, {key: backend.asarray(array) for key, array in case.arrays.items()})
    return given


def arrays_of(arguments):
    """Yield the name and the array of every argument, those of Adam among them."""
    for name, value in arguments.items():
        if name == "adam":
            yield from ((part, getattr(value, part)) for part in ("first_moment", "second_moment", "decayed"))
        elif hasattr(value, "dtype"):
            yield name, value


def replaced(arguments, name, value):
    if name in arguments:
        return {**arguments, name: value}
    return {**arguments, "adam": SimpleNamespace(**{**vars(arguments["adam"]), name: value})}


def damaged(xp, array, launcher, name):
    """Yield everything that an array is replaced by."""
    host = array.get()
    yield from (host, host.tolist(), "x", 1.0, {})
    for dtype in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, bool):
        if dtype != array.dtype:
            with np.errstate(invalid="ignore"):
                yield xp.asarray(host.astype(dtype))
    yield array.reshape(1, *array.shape)
    yield array.reshape(*array.shape, 1)
    if array.ndim > 1:
        yield array[0]
    if array.size > 1:
        yield xp.asarray(np.repeat(host, 2, axis=-1))[..., ::2]
    for axis in range(array.ndim):
        yield xp.asarray(np.take(host, [], axis=axis))
        if (launcher, name, axis) not in FREE:
            yield xp.asarray(np.concatenate([host, host], axis=axis))
            if host.shape[axis] > 1:
                yield xp.asarray(np.take(host, range(host.shape[axis] - 1), axis=axis))
                yield xp.asarray(np.take(host, [0], axis=axis))


@pytest.mark.parametrize("launcher", TABLE)
def test_no_damaged_array_is_launched(kernels, launcher):
    xp = kernels.backend.xp
    good = case_of(launcher, kernels.backend)
    call = getattr(kernels, launcher)
    with pytest.raises(Launched):
        call(**good)
    optional = {array.name for array in SIGNATURES[launcher].arrays if array.optional}
    tried = 0
    for name, array in arrays_of(good):
        for other in damaged(xp, array, launcher, name):
            with pytest.raises((TypeError, ValueError), match=f"^{launcher}: "):
                call(**replaced(good, name, other))
            tried += 1
        if name not in optional:
            with pytest.raises(TypeError, match=f"^{launcher}: {name} must be an array on the GPU, not NoneType"):
                call(**replaced(good, name, None))
    assert tried >= 20


INTEGERS = {"batch_size", "residual_every", "partials", "partial_step", "first"}


@pytest.mark.parametrize("launcher", TABLE)
def test_no_damaged_number_is_launched(kernels, launcher):
    good = case_of(launcher, kernels.backend)
    for name, value in good.items():
        if isinstance(value, int | float):
            wrong = ["1", None, [1], {}, np.ones(2), True, 2**70 if name in INTEGERS else 1e300]
            wrong += [1.5, -1] if name in INTEGERS else [np.nan, np.inf, -np.inf]
            for other in wrong:
                with pytest.raises((TypeError, ValueError), match=f"^{launcher}: "):
                    getattr(kernels, launcher)(**{**good, name: other})


@pytest.mark.parametrize(
    ("launcher", "name", "wrong"),
    [
        ("draw_maps", "key", [None, 3, (1,), (1, "2"), (1.5, 2), (-1, 2), (1, 2**64)]),
        ("draw_maps", "augmentation", [None, 3, "flip", SimpleNamespace(rotation=None, scale=0, shear=0)]),
        ("adam_step", "adam", [None, 3, "adam", SimpleNamespace()]),
    ],
)
def test_other_objects_are_refused(kernels, launcher, name, wrong):
    good = case_of(launcher, kernels.backend)
    for other in wrong:
        with pytest.raises((TypeError, ValueError), match=f"^{launcher}: "):
            getattr(kernels, launcher)(**{**good, name: other})


@pytest.mark.parametrize("name", ["beta1", "beta2", "epsilon", "weight_decay"])
@pytest.mark.parametrize("value", [None, "0.9", np.nan, np.inf, [0.9]])
def test_the_numbers_of_adam_are_checked(kernels, name, value):
    good = case_of("adam_step", kernels.backend)
    with pytest.raises((TypeError, ValueError), match=r"^adam_step: "):
        kernels.adam_step(**replaced(good, name, value))


def test_an_error_names_the_argument_and_says_what_is_expected(kernels):
    good = case_of("cross_entropy", kernels.backend)
    for smoothing in (None, np.nan, 1, 1.5, -0.1):
        message = f"^cross_entropy: smoothing must be a number from 0 to below 1, not {smoothing}"
        with pytest.raises(ValueError, match=message):
            kernels.cross_entropy(**{**good, "smoothing": smoothing})
    good = case_of("adam_step", kernels.backend)
    for clip in (None, np.nan, -1.0):
        with pytest.raises(ValueError, match=f"^adam_step: clip must be a number from 0 to .*, not {clip}"):
            kernels.adam_step(**{**good, "clip": clip})
    with pytest.raises(TypeError, match=r"^adam_step: first_moment cannot be computed .* 'NoneType' object"):
        kernels.adam_step(**{**good, "adam": None})


def test_every_launcher_is_tried():
    assert set(TABLE) == set(CASES)
