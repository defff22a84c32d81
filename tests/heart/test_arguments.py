"""Every operation gives the result of the reference or one error that names the argument, whatever its arguments are.

The table of operations is that of `operations.py`. Here each argument is damaged in all ways of `damaged`.
"""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from operations import LAYOUTS, OPERATIONS, Sizes, evaluate
from strategies import normal

from tinyvit import ops
from tinyvit.checks import arguments_checked, as_array, as_images, as_labels, require_arrays, require_scalar
from tinyvit.gradcheck import relative_error
from tinyvit.optim import Adam, clip_by_global_norm
from tinyvit.parameters import Parameters

# No two axes have the same length by chance, so that an exchange cannot go unnoticed.
SIZES = Sizes(
    leading=(2, 3),
    batch=5,
    queries=7,
    tokens=11,
    inputs=8,
    outputs=9,
    heads=2,
    per_head=3,
    down=2,
    across=4,
    side=2,
)
every_operation = pytest.mark.parametrize("name", OPERATIONS)
REFUSED_DTYPES = (np.float16, np.longdouble, np.int64, np.uint8, bool, np.complex64, object, ">f8")
PIXEL_DTYPES = (np.float16, np.longdouble, ">f8")  # images become the dtype of the weights, so any float is right


def shapes_of(array):
    """Yield the array with a shape that may not fit: an axis more, less, empty, of length 1, shorter or longer."""
    yield array[None]
    yield array[..., None]
    for axis in range(array.ndim):
        yield array.take(0, axis=axis)
        yield array.take([], axis=axis)
        yield array.take([0], axis=axis)
        yield array.take(range(array.shape[axis] - 1), axis=axis)
        yield np.concatenate([array, array], axis=axis)


def damaged(array):
    """Yield everything that a float64 array is replaced by."""
    yield from shapes_of(array)
    for dtype in (*REFUSED_DTYPES, np.float32):
        yield array.astype(dtype)
    for arrange in LAYOUTS.values():
        yield arrange(array)
    frozen = array.copy()
    frozen.flags.writeable = False
    yield frozen
    yield from (array.tolist(), None, "x", {}, 1.5, np.ma.array(array))
    for value in (np.nan, np.inf, -np.inf):
        changed = array.copy()
        changed.flat[0] = value
        yield changed


def names_of(function):
    return list(inspect.signature(function).parameters)


def assert_names(error, names):
    assert any(re.search(rf"\b{name}\b", str(error)) for name in [*names, "labels"]), str(error)


def as_double(arguments):
    arrays = map(np.asarray, arguments)
    return [a if a.dtype == np.uint8 else a.astype(np.result_type(a.dtype, np.float64)) for a in arrays]


@every_operation
def test_a_damaged_argument_gives_the_right_result_or_an_error_that_names_it(name):
    operation = OPERATIONS[name]
    arrays, constants, _ = operation.draw(SIZES, 0)
    forward, backward = operation.pair("ops")
    plain_forward, _ = operation.pair("reference" if operation.reference else "ops")
    refused = accepted = 0
    for place, array in enumerate(arrays):
        for other in damaged(array):
            if name.startswith("patches") and isinstance(other, list):  # the table's pair reads the shape itself
                continue
            arguments = [*arrays[:place], other, *arrays[place + 1 :]]
            with np.errstate(all="ignore"):
                try:
                    out, cache = forward(*arguments, *constants)
                except (TypeError, ValueError) as error:
                    assert_names(error, names_of(forward))
                    refused += 1
                    continue
                # An argument that was broadcast in silence would have a gradient of another shape.
                gradients = backward(np.ones(out.shape), cache)
                gradients = gradients if isinstance(gradients, tuple) else (gradients,)
                assert [g.shape for g in gradients] == [np.shape(a) for a in arguments]
                accepted += 1
                if out.size == 0:  # the reference cannot split an empty batch into heads and patches
                    assert not any(g.any() for g in gradients)
                    continue
                expected, _ = plain_forward(*as_double(arguments), *constants)
                if name == "gelu":  # the plain form gives NaN for the product of minus infinity and 0
                    expected = np.where(np.isneginf(as_double(arguments)[0]), 0, expected)
            np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
            finite = np.isfinite(expected)
            assert relative_error(np.asarray(out)[finite], np.asarray(expected)[finite]) < 1e-3
    assert refused >= 10
    assert accepted >= 7


@every_operation
def test_dtypes_that_lose_digits_and_other_objects_are_refused(name):
    operation = OPERATIONS[name]
    arrays, constants, _ = operation.draw(SIZES, 0)
    forward, _ = operation.pair("ops")
    for place, (array, argument) in enumerate(zip(arrays, names_of(forward), strict=False)):
        for other in [*(array.astype(dtype) for dtype in REFUSED_DTYPES), None, "x", {}, np.ma.array(array)]:
            if argument == "images" and (name.startswith("patches") or getattr(other, "dtype", None) in PIXEL_DTYPES):
                continue
            if argument == "images" and getattr(other, "dtype", None) == np.uint8:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
                forward(*arrays[:place], other, *arrays[place + 1 :], *constants)


@every_operation
def test_a_damaged_gradient_or_place_for_one_is_refused(name):
    operation = OPERATIONS[name]
    arrays, constants, dout = operation.draw(SIZES, 0)
    forward, backward = operation.pair("ops")
    _, gradients, cache = evaluate((forward, backward), arrays, constants, dout)
    wrong_types = [[1.0], "x", {}]
    if dout.ndim:
        shapes = [other for other in shapes_of(dout) if other.shape != dout.shape]
        dtypes = () if name.startswith("patches") else REFUSED_DTYPES  # patches are moved, whatever their dtype
        wrong_types = wrong_types[1:] if name.startswith("patches") else wrong_types
        if name.startswith("layer_norm"):  # its cache does not have the leading axes of the output
            shapes = [other for other in shapes if other.size != dout.size or other.shape[-1] != dout.shape[-1]]
        for other in [*shapes, *map(dout.astype, dtypes), None, *wrong_types]:
            with pytest.raises((TypeError, ValueError), match=r"\bd\w+ must|\bd\w+ of shape"):
                backward(other, cache)
    for place in range(len(gradients) - operation.places, len(gradients)):
        good = [np.zeros_like(gradient) for gradient in gradients]
        for other in [*shapes_of(good[place]), *map(good[place].astype, REFUSED_DTYPES), *wrong_types]:
            given = [*good[:place], other, *good[place + 1 :]][-operation.places :]
            with pytest.raises((TypeError, ValueError), match=r"\bd\w+ must"):
                backward(dout, cache, *given)


@pytest.mark.parametrize("value", [0, -1, 4, 2.0, True, "2", None, np.nan])
@pytest.mark.parametrize("forward", [ops.multi_head_attention_forward, ops.class_attention_forward])
def test_heads_are_a_divisor_of_the_width(forward, value):
    arrays = normal(0, (2, 5, 6), (6, 18), (18,), (6, 6), (6,))
    with pytest.raises(ValueError, match="heads must be an integer that divides the width of a token"):
        forward(*arrays, value)
    assert forward(*arrays, np.int64(3))[0].shape[-1] == 6


@pytest.mark.parametrize("value", [0, -2, 3, 2.0, True, "2", None])
def test_a_patch_size_is_a_divisor_of_rows_and_columns(value):
    images, *weights = normal(0, (2, 4, 6), (4, 5), (5,), (5,), (7, 5))
    for forward in (ops.patches_forward, lambda images, size: ops.patch_embedding_forward(images, *weights, size)):
        with pytest.raises(ValueError, match="patch_size must be an integer that divides the rows and columns"):
            forward(images, value)


NUMBERS = {  # a call with a number, and the numbers that it must refuse
    "epsilon": (lambda x: ops.layer_norm_forward(*normal(0, (2, 3), (3,), (3,)), x), [-1e-6]),
    "scale": (lambda x: ops.attention_forward(*normal(0, (2, 3), (4, 3), (4, 3)), scale=x), []),
    "mean": (lambda x: embed(mean=x), []),
    "deviation": (lambda x: embed(deviation=x), [0, -1.0]),
    "smoothing": (lambda x: ops.cross_entropy_forward(np.zeros((1, 3)), np.array([0]), x), [-0.1, 1, 1.5]),
}


def embed(**numbers):
    return ops.patch_embedding_forward(*normal(0, (2, 4, 4), (4, 5), (5,), (5,), (5, 5)), 2, **numbers)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_and_those_of_numpy_accepted(name):
    call, wrong = NUMBERS[name]
    for value in [*wrong, np.nan, np.inf if name != "epsilon" else -np.inf, "0.5", True, [0.5, 0.5], np.ones(2)]:
        with pytest.raises(ValueError, match=f"^{name} must be a (finite )?number"):
            call(value)
    for good in (0.5, np.float32(0.5), np.float64(0.5)):
        call(good)


def test_epsilon_0_is_that_of_the_definition():
    x, w, b = normal(0, (2, 3), (3,), (3,))
    expected = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) * w + b
    np.testing.assert_allclose(ops.layer_norm_forward(x, w, b, 0)[0], expected)


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 6, 3), (2, 4), (2, 4, 4, 3), (3, 4, 4)])
def test_patches_go_back_only_to_an_image_of_their_size(shape):
    with pytest.raises(ValueError, match="image"):
        ops.patches_backward(np.zeros((2, 4, 4)), shape, 2)


def test_attention_does_not_broadcast():
    q, k, v = normal(0, (2, 3, 4), (1, 5, 4), (1, 5, 4))
    match = r"k must have the shape \(..., T, K\) for ... = \(2,\), .*, not \(1, 5, 4\)"
    with pytest.raises(ValueError, match=match):
        ops.attention_forward(q, k, v)


def test_a_list_of_images_or_labels_is_converted():
    images, *weights = normal(0, (2, 4, 6), (4, 5), (5,), (5,), (7, 5))
    expected, _ = ops.patch_embedding_forward(images, *weights, 2)
    np.testing.assert_array_equal(ops.patch_embedding_forward(images.tolist(), *weights, 2)[0], expected)
    logits = normal(0, (3, 4))
    loss, _ = ops.cross_entropy_forward(logits, np.array([0, 1, 3]))
    assert ops.cross_entropy_forward(logits, [0, 1, 3])[0] == loss


def test_arrays_of_two_devices_are_refused(accelerator):
    x, w, b = normal(0, (2, 3), (3, 4), (4,))
    for arguments, text in (
        ((accelerator.asarray(x), w, b), "w must be on the GPU, where x is, not on the CPU"),
        ((x, w, accelerator.asarray(b)), "b must be on the CPU, where x is, not on the GPU"),
    ):
        with pytest.raises(TypeError, match=text):
            ops.linear_forward(*arguments)
    logits, labels = np.zeros((2, 3)), np.array([0, 1])
    for targets in (labels, np.full((2, 3), 1 / 3)):
        with pytest.raises(TypeError, match="targets must be on the device of the logits"):
            ops.cross_entropy_forward(accelerator.asarray(logits), targets)


# ---- the helpers ----


def test_a_check_is_not_skipped_after_one_that_passed():
    form = "x (N, D), w (D)"
    for _ in range(2):
        require_arrays(form, np.ones((3, 2)), np.ones(2))
        with pytest.raises(ValueError, match=r"w must have the shape \(D\) for D = 2, not \(3,\)"):
            require_arrays(form, np.ones((3, 2)), np.ones(3))
        with pytest.raises(TypeError, match=r"w must be float32 or float64, not int64: use w\.astype"):
            require_arrays(form, np.ones((3, 2)), np.ones(2, int))


def test_checks_are_skipped_only_inside_the_context():
    with arguments_checked():
        require_arrays("x (D)", None)
    with pytest.raises(TypeError, match="x must be a NumPy or CuPy array, not NoneType"):
        require_arrays("x (D)", None)
    with pytest.raises(KeyError), arguments_checked():
        raise KeyError
    with pytest.raises(TypeError, match="x must be"):
        require_arrays("x (D)", None)


def test_only_what_may_be_empty_may():
    require_arrays("x (N, D), y (B, D), z (..., D)", np.ones((0, 2)), np.ones((0, 2)), np.ones((3, 0, 2)))
    for form in ("x (N, D)", "x (..., D)"):
        with pytest.raises(ValueError, match=r"x must have the shape \(.*\) with D at least 1, not \(2, 0\)"):
            require_arrays(form, np.ones((2, 0)))


def test_an_integer_setting_is_no_float():
    with pytest.raises(ValueError, match=r"n must be an integer from 1, not 1\.5"):
        require_scalar("n", 1.5, minimum=1, maximum=np.inf, integer=True)
    require_scalar("n", np.uint8(2), minimum=1, maximum=np.inf, integer=True)


# ---- images ----

BYTES = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8)


class Frame:
    """An object that NumPy converts, such as a table of pandas or a tensor of PyTorch."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize(
    "images",
    [
        BYTES,
        BYTES.tolist(),
        tuple(map(tuple, BYTES.tolist())),
        list(BYTES),
        Frame(BYTES),
        Frame(BYTES.astype(np.int64)),
        BYTES[::-1][::-1],
    ],
)
def test_what_has_one_meaning_becomes_bytes(images):
    for options in ({}, {"shape": (4, 4)}, {"bytes_only": True}):
        got = as_images(images, **options)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, BYTES)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_stay_what_they_are(dtype):
    images = (BYTES / 255).astype(dtype)
    assert as_images(images) is images
    assert as_images(images.tolist()).dtype == np.float64
    for edge in (-1e-6, 1 + 1e-6):  # the rounding of a resized picture
        assert as_images(np.full((1, 2, 2), edge)).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("images", "error", "advice"),
    [
        (BYTES[0], ValueError, "not (4, 4): give one image as images[None]"),
        (BYTES.reshape(3, 16), ValueError, "not (3, 16): use images.reshape(-1, 4, 4)"),
        (BYTES[0].ravel(), ValueError, "not (16,): use images.reshape(-1, 4, 4)"),
        (np.zeros((3, 4, 4, 5), np.uint8), ValueError, "with B at least 1, not (3, 4, 4, 5)"),
        (BYTES[:0], ValueError, "with B at least 1, not (0, 4, 4)"),
        ([], ValueError, "not (0,)"),
        (7, ValueError, "not ()"),
        (BYTES.astype(np.int64), ValueError, "use images.astype(np.uint8) if white is 255"),
        (BYTES.astype(np.int64) - 9, ValueError, "int64 with pixels from -5 to 239: scale them so that black is"),
        (BYTES * np.uint16(257), ValueError, "uint16 with pixels from 1028 to 63736: scale them so that black is 0"),
        (BYTES > 9, ValueError, "from 0 to 1: use (255.0 * images).round().astype(np.uint8) if white is 1"),
        ((BYTES > 9).astype(np.uint8), ValueError, "not uint8 with pixels from 0 to 1: use (255.0 * images)"),
        ((BYTES > 9).astype(int).tolist(), ValueError, "use (255.0 * np.asarray(images)).round().astype"),
        (BYTES.astype(np.complex64), ValueError, "images must be uint8 (0 to 255) or float (0 to 1), not complex64"),
        ((BYTES > 9).astype(int).tolist(), ValueError, "not int64"),  # 1 may mean white or almost black
        ((BYTES.astype(int) + 256).tolist(), ValueError, "not int64"),
        ((BYTES.astype(int) - 256).tolist(), ValueError, "not int64"),
        (BYTES.astype(object), TypeError, "images must be an array of numbers, not ndarray of object"),
        ([[[0, 1], [2]]], ValueError, "images must be an array, or lists of equal lengths"),
        (["a.png", "b.png"], TypeError, "not the path 'a.png': type tinyvit predict a.png in a shell"),
        ([Path("a.png")], TypeError, "not the path 'a.png': type tinyvit predict a.png in a shell"),
        ("digit.png", TypeError, "not the path 'digit.png': type tinyvit predict digit.png in a shell"),
        (b"digit.png", TypeError, "type tinyvit predict digit.png"),
        (None, TypeError, "images must be an array of numbers, not NoneType"),
        ({"images": BYTES}, TypeError, "not dict"),
        (np.ma.array(BYTES), TypeError, "images must not be a masked array: use images.filled(0)"),
    ],
)
def test_other_images_are_refused_with_advice(images, error, advice):
    for options in ({"shape": (4, 4), "channels": 1}, {}):
        with pytest.raises(error, match=re.escape(advice)):
            as_images(images, **options)


def test_channels_before_the_rows_are_refused_with_advice():
    for images, options in ((BYTES[:, None], {"shape": (4, 4), "channels": 1}), (np.zeros((2, 3, 32, 32)), {})):
        with pytest.raises(ValueError, match=re.escape("use images.transpose(0, 2, 3, 1), which moves the channels")):
            as_images(images, **options)


@pytest.mark.parametrize("images", [BYTES[:, :, :3], np.zeros((3, 4, 4, 3), np.uint8), BYTES[..., None]])
def test_without_a_shape_any_rows_columns_and_channels_are_accepted(images):
    np.testing.assert_array_equal(as_images(images), images)
    if images.shape[-1] == 1:  # one channel needs no axis, but may have one
        np.testing.assert_array_equal(as_images(images, shape=(4, 4), channels=1), images)
    else:
        with pytest.raises(ValueError, match=re.escape(f"(B, 4, 4) with B at least 1, not {images.shape}")):
            as_images(images, shape=(4, 4), channels=1)


def test_paths_are_refused_too(tmp_path):
    with pytest.raises(TypeError, match="tinyvit predict"):
        as_images(tmp_path / "digit.png")


def with_image(image, index, count=4):
    images = np.full((count, 4, 4), 0.5)
    images[index] = image
    return images


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (255 * with_image(1.0, 2), "image 0 has pixels from 127.5 to 127.5: divide by 255 if white is 255"),
        (with_image(BYTES[0], 1), "image 1 has pixels from"),
        (with_image(np.linspace(-0.4242, 2.8215, 16).reshape(4, 4), 3), "image 3 has pixels from -0.4242 to 2.8215"),
        (with_image(-1.0, 2), "image 2 has pixels from -1 to -1: undo the standardisation"),
        (with_image(1.001, 0), "image 0 has pixels from 1.001 to 1.001: use np.clip(images, 0, 1)"),
        (with_image(-0.001, 0), "image 0 has pixels from -0.001 to -0.001: use np.clip(images, 0, 1)"),
        (with_image(np.nan, 3), "image 3 has pixels that are NaN or infinite"),
        (with_image(np.inf, 1), "image 1 has pixels that are NaN or infinite"),
        (with_image(-np.inf, 1), "image 1 has pixels that are NaN or infinite"),
        (with_image(np.nan, 1, count=2) + with_image(0.4, 0, count=2), "image 1 has pixels that are NaN"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_pixels_outside_0_to_1_name_the_first_wrong_image(images, text, dtype):
    with pytest.raises(ValueError, match=re.escape(f"float images must have pixels from 0 to 1, but {text}")):
        as_images(images.astype(dtype), (4, 4))


def test_on_a_device_pixels_are_checked_only_where_waiting_is_allowed(accelerator):
    images = accelerator.asarray(with_image(2.0, 1))
    assert as_images(images) is images
    with pytest.raises(ValueError, match="image 1 has pixels from 2 to 2"):
        as_images(images, wait=True)


def test_training_needs_bytes():
    for images, text in (
        (BYTES / 255, "0.01568627 to 0.972549: use (255.0 * images).round().astype(np.uint8) if white is 1"),
        ((BYTES / 255).tolist(), "use (255.0 * np.asarray(images)).round().astype(np.uint8) if white is 1"),
        (BYTES.astype(np.float32), "use images.astype(np.uint8) if white is 255"),
        (BYTES.astype(np.int32), "use images.astype(np.uint8) if white is 255"),
        (2.0 * BYTES, "float64 with pixels from 8 to 496: scale them so that black is 0 and white is 255"),
    ):
        with pytest.raises(ValueError, match=rf"images must be uint8 \(0 to 255\), not .*{re.escape(text)}"):
            as_images(images, bytes_only=True)


def test_black_images_are_no_question_of_white():
    for images in (np.zeros((2, 4, 4), np.uint8), np.full((2, 4, 4), 2, np.uint8)):
        assert as_images(images) is images
    with arguments_checked():  # one batch of a data set may be almost black
        assert as_images(BYTES // 128).max() == 1


# ---- labels ----


@pytest.mark.parametrize(
    "labels", [[0, 2, 1], (0, 2, 1), np.uint8([0, 2, 1]), np.uint64([0, 2, 1]), Frame(np.array([0, 2, 1]))]
)
def test_integer_labels_are_accepted(labels):
    for classes in (None, 3):
        got = as_labels(labels, 3, classes)
        np.testing.assert_array_equal(got, [0, 2, 1])
        assert got is labels or not isinstance(labels, np.ndarray)


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        ([0, -1, 2], ValueError, "labels must be {range}, but one is -1"),
        (np.int8([0, -128, 2]), ValueError, "labels must be {range}, but one is -128"),
        ([0.0, 1.0, 2.0], ValueError, "not float64 (3,): use labels.astype(int)"),
        ([True, False, True], ValueError, "not bool (3,): use labels.astype(int)"),
        (np.eye(3, dtype=int), ValueError, "not int64 (3, 3): use labels.argmax(axis=1)"),
        ([[0], [1], [2]], ValueError, "not int64 (3, 1): use labels.ravel()"),
        ([0, 1], ValueError, "labels must be integers of shape (3,), one per image, not int64 (2,)"),
        (1, ValueError, "not int64 ()"),
        (["0", "1", "2"], TypeError, "labels must be an array of numbers, not list of <U1"),
        ([0, None, 1], TypeError, "labels must be an array of numbers, not list of object"),
        (None, TypeError, "not NoneType"),
        ([[0], [1, 2], [3]], ValueError, "lists of equal lengths"),
    ],
)
def test_other_labels_are_refused_with_advice(labels, error, text):
    for classes, names in ((None, "from 0"), (3, "in 0 to 2, the classes of the model")):
        with pytest.raises(error, match=re.escape(text.format(range=names))):
            as_labels(labels, 3, classes)
    with pytest.raises(ValueError, match="labels must be in 0 to 2, the classes of the model, but one is 3"):
        as_labels([0, 3, 1], 3, 3)


def test_an_array_on_a_device_stays_there(accelerator):
    array = accelerator.asarray(np.ones(3))
    assert as_array("x", array) is array


# ---- other arguments ----


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("cache", [None, (), "x", (1,)])
def test_another_cache_is_refused(name, cache):
    if name.startswith("patches"):  # its backward pass has no cache
        return
    operation = OPERATIONS[name]
    _, _, dout = operation.draw(SIZES, 0)
    with pytest.raises(TypeError, match=r"cache must be (the cache of \w+|a NumPy or CuPy array), not ") as caught:
        operation.pair("ops")[1](dout, cache)
    assert cache is not None or "asarray" not in str(caught.value)


def test_a_masked_array_keeps_its_mask():
    with pytest.raises(TypeError, match=r"x must be a NumPy or CuPy array, not MaskedArray: use x\.filled\(0\)"):
        require_arrays("x (D)", np.ma.array([1.0, 2.0], mask=[0, 1]))


@pytest.mark.parametrize("shape", [(-2, 4, 4), (2.0, 4, 4), (2, 4, None), (2, 0, 4), None, 3, "abc"])
def test_patches_go_back_only_to_a_shape(shape):
    with pytest.raises(ValueError, match=r"images must have the shape \(B, R, C\) or .*, not "):
        ops.patches_backward(np.zeros((2, 4, 4)), shape, 2)


def test_an_integer_beyond_all_floats_is_refused():
    q = np.ones((1, 2, 2))
    for value in (10**400, -(10**400)):
        with pytest.raises(ValueError, match=r"^scale must be a finite number, not -?10+$"):
            ops.attention_forward(q, q, q, scale=value)
    assert ops.attention_forward(q, q, q, scale=2)[0].shape == q.shape


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_endless_number_is_called_so(value):
    with pytest.raises(ValueError, match=r"^epsilon must be a finite number from 0, not (inf|nan)"):
        ops.layer_norm_forward(*normal(0, (2, 3), (3,), (3,)), epsilon=value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.cross_entropy_forward(np.ones((0, 3)), []), "(batch, classes) with batch at least 1, not (0,"),
        (lambda: ops.softmax_forward(np.ones((2, 0))), "x must have the shape (..., K) with K at least 1, not"),
        (lambda: Adam(np.ones(0)), "flat must have the shape (P) with P at least 1, not (0,)"),
        (lambda: clip_by_global_norm(np.ones(0), 1), "gradient must have the shape (P) with P at least 1"),
    ],
)
def test_an_empty_axis_is_named(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "shapes", [{"a": (2, -1)}, {"a": (-1,), "b": (1,)}, {"a": (2.0,)}, {"a": (None,)}, {"a": ("2",)}]
)
def test_shapes_of_parameters_consist_of_lengths(shapes):
    with pytest.raises(ValueError, match="shapes must consist of integers from 0, but one contains"):
        Parameters(shapes, np.zeros(2))
