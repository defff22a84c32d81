"""Every kernel, through its launcher, computes what the plain operation does, and refuses what does not fit.

Here on the strict stand-in, which emulates the kernels' own text on the CPU; under `--device gpu` on a GPU as well.
"""

import copy
import dataclasses
import re

import emulate
import kernel_cases
import numpy as np
import pytest
import strict_cupy
from devices import to_device
from emulate import EmulationError
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, CONFIGS, ROUNDED, UNTOUCHED
from strategies import seeds
from strict_cupy import no_synchronisation

from tinyvit import ops
from tinyvit.backend import to_host
from tinyvit.data.augment import Augmentation, warp
from tinyvit.kernels import Kernels, launch
from tinyvit.model import ViTConfig
from tinyvit.optim import Adam, ExponentialMovingAverage, clip_by_global_norm

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER),
]

PRECISIONS = pytest.mark.parametrize("precision", launch.PRECISIONS)
ALL_CONFIGS = pytest.mark.parametrize("config", CONFIGS)
FEW = settings(max_examples=12, deadline=None, derandomize=True)
MORE = settings(max_examples=25, deadline=None, derandomize=True)

# Of an error, relative to the case's scale. An operand rounded to 11 bits is off by 2**-12 of itself, to 8 bits by
# 2**-9, and a product has two: these are bounds, not guesses. Sums and all the rest are float32.
FLOAT32 = 1e-6
BOUNDS = {"float32": FLOAT32, "tf32": 2 * 2.0**-11, "bfloat16": 2 * 2.0**-8}

sizes = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 40, 63, 64, 65]))
booleans = st.booleans()

_compiled = {}


def kernels_for(backend, config="odd", precision="float32"):
    """The kernels of one of the configurations, compiled once."""
    key = backend.xp, config, precision
    if key not in _compiled:
        _compiled[key] = Kernels(backend, CONFIGS[config], precision)
    return _compiled[key]


def emulated(backend):
    return backend.xp is strict_cupy.cupy


def launched(backend, kernels, case):
    def moved(array):
        return to_device(backend, array)

    with no_synchronisation():
        arrays = {name: moved(array) for name, array in case.arrays.items()}
        case.call(kernels, arrays)
    return {name: to_host(array) for name, array in arrays.items()}


def check(backend, name, config="odd", precision="float32", tolerance=None, kernels=None, **sizes):
    """Launch a case; what it writes is near the plain operation's in float64, and nothing else is written."""
    kernels = kernels or kernels_for(backend, config, precision)
    case = CASES[name](kernels.config, **sizes)
    results = launched(backend, kernels, case)
    errors = kernel_cases.errors(case, results)
    assert max(errors.values()) <= (tolerance or BOUNDS[precision]), (errors, sizes)
    return results


def test_every_kernel_has_a_case():
    assert set(CASES) == {name for names in launch.FUNCTIONS.values() for name in names}
    for file, names in launch.FUNCTIONS.items():
        assert set(emulate.signatures(launch.source(file))) == set(names)


@pytest.mark.parametrize("launcher", CASES)
def test_the_table_is_what_the_text_says(launcher):
    """The same parameters in the same order, with their types, pointers and arrays' names; and as many threads."""
    signature = launch.SIGNATURES[launcher]
    text = re.sub(r"//[^\n]*", "", launch.source(signature.file))
    found = re.search(rf"__launch_bounds__\((\d+)\)\s+{launcher}\(([^)]*)\)", text)
    names = [re.search(r"\w+$", parameter.strip())[0] for parameter in found[2].split(",")]
    arrays = [(array.dtype, True) for array in signature.arrays]
    numbers = [(number.dtype, False) for number in signature.numbers]
    assert emulate.signatures(text)[launcher] == arrays + numbers
    assert names[: len(arrays)] == [array.name for array in signature.arrays]
    assert int(found[1]) == signature.threads


# ---- the linear layer, in all precisions ----

LINEAR = {
    "linear_forward": {"bias": booleans, "residual": booleans, "every": st.integers(1, 4)},
    "linear_gelu_forward": {},
    "linear_backward": {"partials": st.integers(1, 9), "dx": booleans, "db": booleans, "derivative": booleans},
}


@PRECISIONS
@pytest.mark.parametrize("name", LINEAR)
def test_linear(accelerator, name, precision):
    options = {option: strategy for option, strategy in LINEAR[name].items()}

    @FEW
    @given(seed=seeds, rows=sizes, inputs=sizes, outputs=sizes, **options)
    def check_all(**sizes):
        check(accelerator, name, "one patch", precision, **sizes)
        if precision != "float32":  # what comes of rounded operands and float32 sums, which tensor cores cut off
            tolerance = 3e-6 if emulated(accelerator) else 3e-5
            check(accelerator, name, "one patch", precision, tolerance, rounded=ROUNDED[precision], **sizes)

    check_all()


def test_the_tanh_form_of_gelu(accelerator):
    for scale in (1.0, 4.0, 30.0):
        check(accelerator, "linear_gelu_forward", "odd", scale=scale)
        check(accelerator, "linear_gelu_forward", "one patch", scale=scale)


@pytest.mark.parametrize("name", LINEAR)
def test_a_precision_is_no_better_than_it_can_be(accelerator, name):
    """The flag does something: TF32 costs more than a decimal, and bfloat16 another half."""
    errors = {}
    for precision in launch.PRECISIONS:
        kernels = kernels_for(accelerator, "one patch", precision)
        case = CASES[name](kernels.config, rows=70, inputs=65, outputs=65)
        errors[precision] = max(kernel_cases.errors(case, launched(accelerator, kernels, case)).values())
    assert errors["float32"] < 3e-7, errors
    assert 1e-5 < errors["tf32"] < errors["bfloat16"] / 3, errors
    assert errors["bfloat16"] > 1e-4, errors


@PRECISIONS
def test_a_bias_has_the_gradient_of_unrounded_numbers(accelerator, precision):
    kernels = kernels_for(accelerator, "one patch", precision)
    case = CASES["linear_backward"](kernels.config, rows=70, partials=2)
    results = launched(accelerator, kernels, case)["partial_gradients"]
    biases = results[:, -38:-5]  # of 33 columns, with five numbers behind them
    for partial in range(2):
        expected = case.arrays["dout"][35 * partial : 35 * (partial + 1)].astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(biases[partial], expected, atol=1e-5)
    assert (results[:, -5:] == UNTOUCHED).all()


def test_more_partials_than_rows_leaves_zeros(accelerator):
    results = check(accelerator, "linear_backward", "one patch", rows=3, partials=8)["partial_gradients"]
    assert (results[3:, 3:100] == 0).all()
    check(accelerator, "layer_norm_backward", "one patch", rows=3, partials=8)


@PRECISIONS
def test_not_a_number_goes_through_a_product(accelerator, precision):
    """And reaches just those sums that it is a term of."""
    kernels = kernels_for(accelerator, "one patch", precision)
    case = CASES["linear_forward"](kernels.config, rows=35, inputs=40, outputs=33)
    for value in (np.nan, np.inf):
        case.arrays["x"][33, 7] = value
        out = launched(accelerator, kernels, case)["out"]
        assert not np.isfinite(out[33]).any()
        assert np.isfinite(np.delete(out, 33, axis=0)).all()


# ---- layer norm and attention ----


@ALL_CONFIGS
def test_layer_norm(accelerator, config):
    @FEW
    @given(seeds, st.integers(1, 40), st.integers(1, 9), booleans, st.integers(1, 5), st.sampled_from([0.0, 3.0]))
    def check_all(seed, rows, partials, residual, every, offset):
        check(accelerator, "layer_norm_forward", config, seed=seed, rows=rows, offset=offset)
        arguments = {"partials": partials, "residual": residual, "every": every}
        check(accelerator, "layer_norm_backward", config, seed=seed, rows=rows, **arguments)

    check_all()


def test_layer_norm_of_equal_numbers(accelerator):
    """A deviation of zero, which epsilon alone keeps from dividing by zero; and numbers far from zero."""
    kernels = kernels_for(accelerator)
    case = CASES["layer_norm_forward"](kernels.config, rows=4)
    case.arrays["x"][...] = 5
    results = launched(accelerator, kernels, case)
    np.testing.assert_array_equal(results["normalised"], 0)
    np.testing.assert_allclose(results["inverse_deviation"], kernels.config.epsilon**-0.5, rtol=1e-6)
    check(accelerator, "layer_norm_forward", rows=4, offset=300.0, tolerance=1e-4)  # as x itself is rounded


@ALL_CONFIGS
def test_attention(accelerator, config):
    @FEW
    @given(seeds, st.integers(1, 3), booleans, st.sampled_from([0.0, 0.3, 1.0, 3.0]))
    def check_all(seed, batch, class_only, scale):
        sizes = {"seed": seed, "batch": batch, "class_only": class_only}
        # an exponential makes of the error of a large score one as many times larger
        check(accelerator, "attention_forward", config, tolerance=FLOAT32 * max(1, scale**2), scale=scale, **sizes)
        check(accelerator, "attention_backward", config, **sizes)

    check_all()


def test_attention_with_large_scores_does_not_overflow(accelerator):
    for config in CONFIGS:
        results = check(accelerator, "attention_forward", config, scale=100.0, tolerance=1e-2)
        np.testing.assert_allclose(results["weights"].sum(axis=-1), 1, rtol=1e-6)


# ---- cross-entropy ----


def classes_kernels(backend, classes):
    kernels = copy.copy(kernels_for(backend))  # no kernel is compiled for a number of classes
    kernels.config = dataclasses.replace(kernels.config, classes=classes)
    return kernels


def test_layer_norm_of_a_vector_whose_variance_overflows_is_nan_and_not_zero(accelerator):
    kernels = kernels_for(accelerator)
    case = CASES["layer_norm_forward"](kernels.config, rows=4)
    case.arrays["x"][1, :2] = 1e20, -1e20
    results = launched(accelerator, kernels, case)
    assert np.isnan(results["out"]).all(axis=1).tolist() == [False, True, False, False]
    np.testing.assert_allclose(results["out"][2], case.expected["out"][2], rtol=1e-4, atol=1e-5)


def test_cross_entropy(accelerator):
    @MORE
    @given(
        seed=seeds,
        batch=st.integers(1, 40),
        classes=st.one_of(st.integers(1, 12), st.integers(30, 70)),
        smoothing=st.sampled_from([0.0, 0.1, 0.9]),
        scale=st.sampled_from([0.1, 1.0, 5.0]),
        ties=booleans,
    )
    def check_all(seed, batch, classes, smoothing, scale, ties):
        kernels = classes_kernels(accelerator, classes)
        arguments = {"seed": seed, "batch": batch, "smoothing": smoothing, "scale": scale, "ties": ties}
        check(accelerator, "cross_entropy", kernels=kernels, **arguments)

    check_all()


def test_cross_entropy_of_large_logits_does_not_overflow(accelerator):
    results = check(accelerator, "cross_entropy", kernels=classes_kernels(accelerator, 40), scale=1e4, smoothing=0.0)
    assert np.isfinite(results["totals"]).all()


def test_cross_entropy_of_more_classes_than_a_byte_can_count(accelerator):
    check(accelerator, "cross_entropy", kernels=classes_kernels(accelerator, 300))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_logit_of_minus_infinity_has_probability_zero(accelerator, smoothing):
    kernels = classes_kernels(accelerator, 40)
    case = CASES["cross_entropy"](kernels.config, batch=3, smoothing=smoothing)
    logits, labels = case.arrays["logits"], case.arrays["labels"]
    logits[0, (labels[0] + 1) % 40] = -np.inf
    losses = np.array(cross_entropy_losses(logits.astype(np.float64), labels, smoothing))
    case.arrays["totals"][...] = 0
    results = launched(accelerator, kernels, case)
    np.testing.assert_allclose(results["totals"][0], losses.sum(), rtol=1e-6)
    assert np.isinf(losses).any() == (smoothing > 0)
    assert np.isfinite(results["dlogits"]).all()


def cross_entropy_losses(logits, labels, smoothing):
    return [ops.cross_entropy_forward(logits[i : i + 1], labels[i : i + 1], smoothing)[0] for i in range(len(logits))]


def test_of_equal_logits_the_first_is_the_class(accelerator):
    kernels = classes_kernels(accelerator, 70)
    case = CASES["cross_entropy"](kernels.config, batch=70)
    case.arrays["logits"][...] = 0
    for first in (0, 5, 31, 32, 69):
        case.arrays["logits"][...] = -1
        case.arrays["logits"][:, first:] = 2
        case.arrays["labels"][...] = np.arange(70)
        case.arrays["totals"][...] = 0
        assert launched(accelerator, kernels, case)["totals"][1] == 1  # only the label `first` is right


@pytest.mark.parametrize("label", [-1, 5, 6, 2**31 - 1, -(2**31)])
def test_a_label_that_is_no_class_gives_not_a_number(accelerator, label):
    """As the plain operation on a device does: nothing is read beyond the logits, and nothing waits."""
    kernels = kernels_for(accelerator)
    case = CASES["cross_entropy"](kernels.config, batch=9)
    case.arrays["labels"][4] = label
    results = launched(accelerator, kernels, case)
    logits, labels = to_device(accelerator, case.arrays["logits"], case.arrays["labels"])
    loss, cache = ops.cross_entropy_forward(logits, labels, 0.1)
    plain = to_host(ops.cross_entropy_backward(1.0, cache))
    assert np.isnan(to_host(loss))
    assert np.isnan(results["totals"][0])
    np.testing.assert_array_equal(np.isnan(results["dlogits"]), np.isnan(plain))
    assert np.isnan(plain[4]).all()
    assert np.isfinite(np.delete(plain, 4, axis=0)).all()


def test_a_logit_that_is_not_a_number_is_found_in_the_loss(accelerator):
    kernels = kernels_for(accelerator)
    for value in (np.nan, np.inf):
        case = CASES["cross_entropy"](kernels.config, batch=9)
        case.arrays["logits"][3, 2] = value
        results = launched(accelerator, kernels, case)
        assert np.isnan(results["totals"][0])
        assert np.isnan(results["dlogits"][3]).any()


# ---- the batch: Philox, maps, pixels ----


def test_maps(accelerator):
    @MORE
    @given(
        seed=seeds,
        count=st.integers(1, 300),
        drawn=st.integers(0, 9),
        counter=st.sampled_from([0, 1, 2**40]),
        rotation=st.floats(0, 180),
        scale=st.floats(0, 0.9),
        shear=st.floats(0, 60),
        shift=st.floats(0, 1000),
        flip=st.floats(0, 1),
    )
    def check_all(seed, count, drawn, counter, rotation, scale, shear, shift, flip):
        augmentation = Augmentation(rotation, scale, shear, shift, flip)
        arguments = {"seed": seed, "count": count, "drawn": drawn, "counter": counter}
        check(accelerator, "draw_maps", augmentation=augmentation, tolerance=2.0**-23, **arguments)

    check_all()


def test_flips_are_just_numpys(accelerator):
    """A probability of 0 and of 1, and in between the same images."""
    for flip in (0.0, 0.5, 1.0):
        results = check(accelerator, "draw_maps", count=500, augmentation=Augmentation(flip=flip))
        mirrored = results["maps"][:, 1, 1] < 0
        assert mirrored.mean() == flip if flip != 0.5 else 0.4 < mirrored.mean() < 0.6


UNIFORM = r"""
extern "C" __global__ void uniforms(double* __restrict__ out, int count, word64 key0, word64 key1, word64 first) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) out[i] = uniform(first + (word64)i, key0, key1);
}
"""


@MORE
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**61), st.integers(0, 9), booleans)
def test_uniform_numbers_are_numpys_bit_for_bit(key0, key1, counter, drawn, permuted):
    philox = np.random.Philox(key=key0 + (key1 << 64), counter=counter)
    rng = np.random.Generator(philox)
    rng.random(drawn)
    if permuted:
        rng.permutation(7)  # which draws 32 bits at a time, and may leave half a word behind
    state = philox.state
    first = 4 * int(state["state"]["counter"][0]) + state["buffer_pos"]
    expected, out = rng.uniform(-1, 1, 77), np.zeros(77)
    words = [np.uint64(word) for word in (key0, key1, first)]
    _uniforms.launch("uniforms", 3, 32, [out, np.int32(77), *words])
    np.testing.assert_array_equal(out, expected)


_uniforms = emulate.Emulated(launch.source("patches") + UNIFORM)


@ALL_CONFIGS
def test_a_batch(accelerator, config):
    @FEW
    @given(seeds, st.integers(1, 12), st.integers(1, 5), booleans, booleans)
    def check_all(seed, images, batch, augmented, last):
        batch = min(batch, images)
        step = (images - 1) // batch if last else 0
        arguments = {"seed": seed, "images": images, "batch": batch, "step": step, "augmented": augmented}
        check(accelerator, "gather_patches", config, tolerance=5e-6, **arguments)  # of places up to 1,000 pixels off

    check_all()


@pytest.mark.parametrize("extreme", [Augmentation(shift=1000), Augmentation(180, 0.9, 60, 40, 1)])
def test_images_that_are_moved_far_away(accelerator, extreme):
    check(accelerator, "gather_patches", "many tokens", images=7, batch=3, augmentation=extreme, tolerance=1e-3)


@pytest.mark.parametrize("config", ["odd", "colours"])
def test_rows_times_the_embedding_are_the_patch_embedding(accelerator, config):
    kernels = kernels_for(accelerator, config)
    config = kernels.config
    case = CASES["gather_patches"](config, images=9, batch=4, step=1)
    results = launched(accelerator, kernels, case)
    rng = np.random.default_rng(0)
    shapes = [(config.patch_length, config.width), (config.width,), (config.width,), (config.tokens, config.width)]
    parameters = [rng.standard_normal(shape) for shape in shapes]
    chosen = case.arrays["order"][4:8]
    images = warp(case.arrays["images"][chosen], case.arrays["maps"][4:8])
    expected, _ = ops.patch_embedding_forward(
        images.astype(np.float64), *parameters, config.patch_size, config.pixel_mean, config.pixel_deviation
    )
    got = results["rows"] @ np.concatenate([array.reshape(-1, config.width) for array in parameters])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


# ---- clipping and Adam ----


def test_sum_of_partials(accelerator):
    @FEW
    @given(seeds, st.sampled_from([1, 3, 255, 1023, 1024, 1025, 2100]), st.integers(1, 9), st.integers(0, 40))
    def check_all(seed, count, partials, gap):
        check(accelerator, "sum_partials", seed=seed, count=count, partials=partials, gap=gap)

    check_all()


def test_one_step_of_adam(accelerator):
    @MORE
    @given(
        seed=seeds,
        count=st.sampled_from([1, 3, 255, 1023, 1024, 1025, 2100]),
        clip=st.sampled_from([0.0, 0.7, 1e4]),
        decay=st.sampled_from([0.0, 0.1]),
        masked=booleans,
        averaged=booleans,
        step=st.integers(1, 5),
    )
    def check_all(seed, count, clip, decay, masked, averaged, step):
        arguments = {"count": count, "clip": clip, "decay": decay, "masked": masked, "averaged": averaged}
        check(accelerator, "adam_step", seed=seed, step=step, **arguments)

    check_all()


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("averaged", [True, False])
def test_several_steps_of_adam(accelerator, clip, decay, averaged):
    """The sum of partial gradients, the clipping and Adam, launched in turn, equal optim.py in float64."""
    kernels, count, partials, steps = kernels_for(accelerator), 2100, 3, 6
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(count).astype(np.float32)
    gradients = rng.standard_normal((steps, partials, count + 4)).astype(np.float32)
    gradients[:, :, 2000:2050] = 0  # whose moments stay zero
    decayed = (np.arange(count) % 3 > 0).astype(np.float32)
    rates = [0.01 / (1 + i) for i in range(steps)]

    plain = weights.astype(np.float64)
    adam = Adam(plain, weight_decay=decay, decayed=decayed.astype(np.float64))
    average = ExponentialMovingAverage(plain, 0.8)
    norms = []
    for gradient, rate in zip(gradients.astype(np.float64), rates, strict=True):
        total = gradient[:, :count].sum(axis=0)
        norms.append(np.linalg.norm(total))
        if clip:
            clip_by_global_norm(total, clip)
        adam.step(plain, total, rate)
        average.step(plain)
    assert clip == 0 or (clip < min(norms)) == (clip == 0.5)

    xp = accelerator.xp
    flat, mean = to_device(accelerator, weights, weights)
    mine = Adam(flat, weight_decay=decay, decayed=accelerator.asarray(decayed))
    rows = [
        [rate, rate / (1 - 0.9**t), 1 / np.sqrt(1 - 0.999**t), 1 - min(0.8, (t - 1) / (t + 8))]
        for t, rate in enumerate(rates, 1)
    ]
    schedule = accelerator.asarray(np.array(rows, np.float32))
    counter, squares = xp.zeros(1, np.int32), xp.empty(3, np.float32)
    summed = xp.empty(count, np.float32)
    for gradient in gradients:
        kernels.sum_partials(accelerator.asarray(gradient), summed, squares, counter)
        kernels.adam_step(flat, summed, mine, mean if averaged else None, squares, schedule, counter, clip)
    assert to_host(counter).tolist() == [steps]
    pairs = [(flat, plain), (mine.first_moment, adam.first_moment), (mine.second_moment, adam.second_moment)]
    pairs += [(mean, average.average)] if averaged else []
    for got, expected in pairs:
        assert kernel_cases.error(to_host(got), expected, np.abs(expected).max()) < 3e-6
    if not averaged:
        np.testing.assert_array_equal(to_host(mean), weights)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_found_in_the_weights(accelerator, clip, value):
    """With clipping all weights are not-a-number, as the norm is none; without, those whose gradient it is."""
    kernels = kernels_for(accelerator)
    case = CASES["adam_step"](kernels.config, count=1100, clip=clip)
    case.arrays["gradient"][1050] = case.arrays["squares"][1] = value
    results = launched(accelerator, kernels, case)["weights"]
    gradient = case.arrays["gradient"].copy()
    plain, adam = case.arrays["weights"].copy(), Adam(case.arrays["weights"])
    with np.errstate(all="ignore"):
        if clip:
            clip_by_global_norm(gradient, clip)
        adam.step(plain, gradient, 0.1)
    np.testing.assert_array_equal(np.isnan(results), np.isnan(plain))
    assert np.isnan(results[1050])


def test_a_gradient_whose_square_overflows_makes_its_second_moment_infinite(accelerator):
    """`State.require_finite` finds this moment, so a weight that can no longer change never stays unnoticed."""
    kernels = kernels_for(accelerator)
    case = CASES["adam_step"](kernels.config, clip=0.0, averaged=False)
    case.arrays["gradient"][3] = 1e20
    moment = launched(accelerator, kernels, case)["second_moment"]
    assert np.flatnonzero(~np.isfinite(moment)).tolist() == [3]


def test_a_gradient_of_zero_is_not_divided_by(accelerator):
    kernels = kernels_for(accelerator)
    case = CASES["adam_step"](kernels.config, decay=0.0)
    for name in ("gradient", "squares", "first_moment", "second_moment"):
        case.arrays[name][...] = 0
    results = launched(accelerator, kernels, case)
    np.testing.assert_array_equal(results["weights"], case.arrays["weights"])


# ---- which models ----


def test_the_reason_is_what_the_kernels_have_room_for(accelerator):
    """Just within 48 KiB of shared memory the attention runs, and just above it neither runs nor is begun."""
    within = ViTConfig(image_size=49, patch_size=7, width=37, heads=1)  # 50 tokens of width 37: 50,400 bytes
    within = dataclasses.replace(within, width=35)  # 50 tokens of width 35: 48,800 bytes, of 49,152
    above = dataclasses.replace(within, width=36)
    assert launch.unsupported_reason(within) is None
    check(accelerator, "attention_backward", kernels=Kernels(accelerator, within), batch=1)
    reason = launch.unsupported_reason(above)
    expected = "the attention kernel needs 49,600 bytes of shared memory for a head of 50 tokens of width 36"
    assert reason.startswith(expected)
    with pytest.raises(ValueError, match="needs 49,600 bytes"):
        Kernels(accelerator, above)
    if emulated(accelerator):
        options = launch.macros(above, "float32")
        attention = emulate.Emulated(launch.source("attention"), options)
        case = CASES["attention_backward"](above, batch=1)
        scale = np.float32(36**-0.5)
        with pytest.raises(EmulationError, match=r"48 KiB of shared memory, and this kernel wants 49\d\d\d b"):
            attention.launch(
                "attention_backward", (1, 1), 128, [*case.arrays.values(), np.int32(1), np.int32(50), scale]
            )


def test_models_and_cards_that_the_kernels_cannot_serve_are_told():
    reason = launch.unsupported_reason(ViTConfig(width=2080, heads=65))
    assert "which allows a width of 2,048, and the model has 2,080: plain operations" in reason
    assert launch.unsupported_reason(ViTConfig(width=2048, heads=64)) is None
    assert launch.unsupported_reason(ViTConfig(classes=1000)) is None
    for precision in ("tf32", "bfloat16"):
        reason = launch.unsupported_reason(ViTConfig(), precision, 75)
        assert "compute capability 8.0 or above, and this one has 7.5: use precision 'float32'" in reason
        assert launch.unsupported_reason(ViTConfig(), precision, 80) is None
    assert launch.unsupported_reason(ViTConfig(), "float32", 75) is None
    with pytest.raises(ValueError, match="precision 'half' is unknown: give 'float32', 'tf32', 'bfloat16'"):
        launch.unsupported_reason(ViTConfig(), "half")


# ---- launchers refuse ----


class NoLaunch:
    """In the place of a kernel: it must not be reached."""

    def __call__(self, grid, block, arguments):
        raise AssertionError("launched")


OPTIONAL = {
    ("linear_forward", "b"),
    ("linear_forward", "residual"),
    ("linear_backward", "dx"),
    ("linear_backward", "derivative"),
    ("layer_norm_backward", "residual"),
    ("gather_patches", "maps"),
    ("adam_step", "decayed"),
    ("adam_step", "average"),
}
ANY_SIZE = {  # the axes along which an array may have any length
    ("draw_maps", "maps", 0),
    ("adam_step", "schedule", 0),
    ("sum_partials", "partial_gradients", 0),
    ("sum_partials", "partial_gradients", 1),
}


SHAPE = "must have the shape|must not be empty"


def bad_arrays(launcher, name, array):
    """Yield (what, array, error, message) for all that an argument must not be; array: NumPy."""
    yield "host", array, TypeError, "must be an array on the GPU, not ndarray"
    yield "list", array.tolist(), TypeError, "must be an array on the GPU, not list"
    yield "a number", 3, TypeError, "must be an array on the GPU, not int"
    if (launcher, name) not in OPTIONAL:
        yield "nothing", None, TypeError, "must be an array on the GPU, not NoneType"
    for dtype in (np.float64, np.float32, np.int32, np.int64, np.uint8, np.int8):
        if dtype != array.dtype:
            with np.errstate(invalid="ignore"):
                other = array.astype(dtype)
            yield dtype.__name__, ("device", other), TypeError, f"{name} must be {array.dtype}, not {other.dtype}"
    for axis in range(array.ndim):
        if (launcher, name, axis) not in ANY_SIZE:
            longer = np.concatenate([array, array], axis=axis)
            yield f"long along {axis}", ("device", longer), ValueError, SHAPE
        none = array.take([], axis=axis)
        yield f"empty along {axis}", ("device", none), ValueError, SHAPE
    yield "flat", ("device", array.reshape(-1, 1, 1, 1, 1)), ValueError, "must have the shape"
    if array.ndim > 1:
        yield "one axis less", ("device", array[0].copy()), ValueError, "must have the shape"
    if array.size > 1:
        wide = np.repeat(array, 2, axis=-1)
        yield "not contiguous", ("strided", wide), ValueError, f"{name} must be C-contiguous"


def small_case(launcher):
    """A case in which no two axes are of one length, so that what is exchanged shows."""
    few = {"attention_forward": {"batch": 3}, "attention_backward": {"batch": 3}, "adam_step": {"count": 1500}}
    return CASES[launcher](CONFIGS["odd"], **few.get(launcher, {}))


@pytest.mark.parametrize("launcher", CASES)
def test_launchers_refuse_every_argument_that_does_not_fit(accelerator, launcher, monkeypatch):
    kernels = copy.copy(kernels_for(accelerator))
    kernels._functions = {launcher: NoLaunch()}
    case = small_case(launcher)
    good = {name: to_device(accelerator, array) for name, array in case.arrays.items()}
    with pytest.raises(AssertionError, match="launched"):
        case.call(kernels, good)
    tried = 0
    for name, array in case.arrays.items():
        if launcher.endswith("_backward") and name == "partial_gradients":
            continue  # of which a launcher gets views: see below
        for what, bad, error, message in bad_arrays(launcher, name, array):
            match bad:
                case "device", values:
                    bad = to_device(accelerator, values)
                case "strided", values:
                    bad = to_device(accelerator, values)[..., ::2]
            with pytest.raises(error, match=message) as caught:
                case.call(kernels, good | {name: bad})
            assert str(caught.value).startswith(f"{launcher}: "), (name, what, str(caught.value))
            tried += 1
        with monkeypatch.context() as patched:
            patched.setattr(launch, "LARGEST", array.size - 1)
            with pytest.raises(ValueError, match=r"must have at most [\d,]+ numbers, not [\d,]+"):
                case.call(kernels, good)
    assert tried >= 15


PARTIAL_GRADIENTS = {  # launcher: its arguments by place, of 35 rows; dw and db lie in `memory`
    "linear_backward": {"dout": (35, 33), "x": (35, 40), "w": (40, 33), "dx": (35, 40), "dw": (40, 33), "db": (33,)},
    "layer_norm_backward": dict(
        zip(
            ("dout", "normalised", "inverse_deviation", "w", "dx", "dw", "db"),
            ((35, 40), (35, 40), (35,), (40,), (35, 40), (40,), (40,)),
            strict=True,
        )
    ),
}


@pytest.mark.parametrize("launcher", PARTIAL_GRADIENTS)
def test_partials_must_lie_in_the_memory_that_is_given(accelerator, launcher):
    kernels = copy.copy(kernels_for(accelerator))
    kernels._functions = {launcher: NoLaunch()}
    xp = accelerator.xp
    arrays = {name: xp.zeros(shape, np.float32) for name, shape in PARTIAL_GRADIENTS[launcher].items()}
    dw_size, db_size = arrays["dw"].size, arrays["db"].size
    step = dw_size + db_size + 3
    memory = xp.zeros((4, step), np.float32)
    arrays["dw"] = memory[0, 1 : dw_size + 1].reshape(arrays["dw"].shape)
    arrays["db"] = memory[0, dw_size + 1 : dw_size + 1 + db_size]

    def call(partials=4, partial_step=step, **others):
        getattr(kernels, launcher)(**(arrays | others), partials=partials, partial_step=partial_step)

    for partials in (1, 3, 4):
        with pytest.raises(AssertionError, match="launched"):
            call(partials)
    for partials in (0, -1):
        with pytest.raises(ValueError, match=f"{launcher}: partials must be at least 1, not {partials}"):
            call(partials)
    for partials, partial_step in ((5, step), (4, step + 2), (2, db_size - 1), (2, 0), (2, -step), (2, 4 * step)):
        with pytest.raises(ValueError, match=rf"{launcher}: {partials} partials of d[wb], .* do not fit"):
            call(partials, partial_step)
    with pytest.raises(ValueError, match=r"2 partials of d[wb]"):  # memory of their own, for one partial
        call(2, dw=xp.zeros(arrays["dw"].shape, np.float32), db=xp.zeros(db_size, np.float32))
    for name in ("dw", "db"):
        shape = arrays[name].shape
        for what, bad, error, message in bad_arrays(launcher, name, np.zeros(shape, np.float32)):
            if what == "nothing" and name == "db" and launcher == "linear_backward":
                continue  # then it is not computed
            match bad:
                case "device", values:
                    bad = accelerator.asarray(values)
                case "strided", values:
                    bad = accelerator.asarray(values)[..., ::2]
            with pytest.raises(error, match=message):
                call(1, **{name: bad})


@pytest.mark.parametrize("launcher", ["linear_forward", "layer_norm_backward"])
def test_a_residual_is_of_every_so_many_rows_at_least_one(accelerator, launcher):
    kernels = copy.copy(kernels_for(accelerator))
    kernels._functions = {launcher: NoLaunch()}
    for every in (0, -1):
        case = CASES[launcher](kernels.config, every=1)
        arrays = {name: accelerator.asarray(array) for name, array in case.arrays.items()}
        if launcher == "linear_forward":
            arguments = {**arrays, "residual_every": every}
        else:
            first = accelerator.xp.zeros((2, 200), np.float32)
            arguments = {name: array for name, array in arrays.items() if name != "partial_gradients"}
            arguments |= {"dw": first[0, :40], "db": first[0, 40:80], "partials": 1, "partial_step": 200}
            arguments["residual_every"] = every
        with pytest.raises(ValueError, match=f"{launcher}: residual_every must be at least 1, not {every}"):
            getattr(kernels, launcher)(**arguments)


def test_numbers_out_of_range_are_refused(accelerator):
    kernels = copy.copy(kernels_for(accelerator))
    kernels._functions = dict.fromkeys(CASES, NoLaunch())
    maps = accelerator.asarray(np.zeros((10, 2, 3), np.float32))
    for key, first in (((2**64 - 1, 0), 0), ((0, 0), 2**64 - 1)):
        with pytest.raises(AssertionError, match="launched"):
            kernels.draw_maps(maps, key, first, kernel_cases.EVERYTHING)
    for key, first, what in (((2**64, 0), 0, "key[0]"), ((0, -1), 0, "key[1]"), ((0, 0), 0.5, "first")):
        message = f"draw_maps: {what} must be an integer of uint64, not "
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            kernels.draw_maps(maps, key, first, kernel_cases.EVERYTHING)
    arrays = CASES["gather_patches"](kernels.config).arrays
    arrays = {name: accelerator.asarray(array) for name, array in arrays.items()}
    for size, message in (
        (0, "batch_size must be at least 1, not 0"),
        (2**31, "batch_size must be an integer of int32, not 2147483648"),
    ):
        with pytest.raises(ValueError, match=f"^gather_patches: {message}"):
            kernels.gather_patches(**arrays, batch_size=size)
    x, w, out = (accelerator.asarray(np.zeros(shape, np.float32)) for shape in ((3, 4), (4, 5), (3, 5)))
    with pytest.raises(ValueError, match=r"^linear_forward: residual_every \* outputs must be an integer of int32"):
        kernels.linear_forward(x, w, None, out, residual_every=2**29)


def test_a_shape_that_does_not_fit_is_explained(accelerator):
    """One sentence names the kernel and the array, what is expected, with its sizes, and what is given."""
    kernels = copy.copy(kernels_for(accelerator))
    x, w, out = (accelerator.asarray(np.zeros(shape, np.float32)) for shape in ((3, 4), (4, 5), (3, 6)))
    message = "linear_forward: out must have the shape (rows, outputs) for rows = 3, outputs = 5, not (3, 6)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kernels.linear_forward(x, w, None, out)
    message = "linear_forward: x must have the shape (rows, inputs), not (2, 2, 1)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kernels.linear_forward(accelerator.asarray(np.zeros((2, 2, 1), np.float32)), w, None, out)
    case = CASES["attention_forward"](kernels.config, batch=2)
    arrays = {name: accelerator.asarray(array) for name, array in case.arrays.items()}
    arrays["out"] = accelerator.asarray(np.zeros((2, 3, 40), np.float32))
    message = (
        "attention_forward: out must have the shape (batch, queries, D) where queries in (1, T) "
        "for batch = 2, queries = 3, D = 40, T = 10, not (2, 3, 40)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kernels.attention_forward(**arrays)


def test_grids_that_no_gpu_has_are_refused(accelerator, monkeypatch):
    kernels = copy.copy(kernels_for(accelerator))
    kernels._functions = dict.fromkeys(CASES, NoLaunch())
    monkeypatch.setattr(launch, "MOST_BLOCKS", (2**31 - 1, 2, 2))
    for launcher, big, small in (
        ("linear_forward", {"rows": 65}, {"rows": 64}),
        ("attention_forward", {"batch": 3}, {"batch": 2}),
    ):
        for arguments, error, message in ((big, ValueError, "a GPU allows"), (small, AssertionError, "launched")):
            case = CASES[launcher](kernels.config, **arguments)
            with pytest.raises(error, match=message):
                case.call(kernels, {name: accelerator.asarray(array) for name, array in case.arrays.items()})


def test_an_image_size_of_another_model_is_refused(accelerator):
    """The kernels are compiled for one model: arrays of another do not fit it."""
    kernels = copy.copy(kernels_for(accelerator, "odd"))
    kernels._functions = dict.fromkeys(CASES, NoLaunch())
    for launcher in ("gather_patches", "layer_norm_forward", "layer_norm_backward", "attention_forward"):
        case = CASES[launcher](CONFIGS["one patch"])
        with pytest.raises(ValueError, match=f"^{launcher}: "):
            case.call(kernels, {name: accelerator.asarray(array) for name, array in case.arrays.items()})


# ---- the order of the threads, and the sanitizers ----

SMALL_SIZES = {  # for the sanitizers, to which every thread of every block is a thread
    "linear_forward": {"rows": 33, "inputs": 37, "outputs": 5},
    "linear_gelu_forward": {"rows": 33, "inputs": 37, "outputs": 5},
    "linear_backward": {"rows": 33, "inputs": 33, "outputs": 5, "partials": 2},
    "layer_norm_backward": {"rows": 9, "partials": 2},
    "layer_norm_forward": {"rows": 9},
    "attention_forward": {"batch": 2},
    "attention_backward": {"batch": 2},
}


class Recorder:
    """In the place of a kernel on the stand-in: keeps how it is called, with NumPy arrays."""

    def __init__(self, function):
        self.emulated, self.name = function._emulated, function._name

    def __call__(self, grid, block, arguments):
        self.grid, self.block = grid, block
        self.arguments = [getattr(argument, "_values", argument) for argument in arguments]


def recorded(strict_gpu, launcher, config="odd", precision="float32", **sizes):
    """A case, its arrays on the stand-in's device, and the recorded launch."""
    kernels = copy.copy(kernels_for(strict_gpu, config, precision))
    recorder = Recorder(kernels._functions[launcher])
    kernels._functions = {launcher: recorder}
    case = CASES[launcher](kernels.config, **(SMALL_SIZES.get(launcher, {}) | sizes))
    arrays = {name: strict_gpu.asarray(array) for name, array in case.arrays.items()}
    case.call(kernels, arrays)
    return case, arrays, recorder


def assert_right(case, arrays, precision="float32"):
    errors = kernel_cases.errors(case, {name: to_host(array) for name, array in arrays.items()})
    assert max(errors.values()) <= 5 * BOUNDS[precision], errors


EVERY_KERNEL = [
    *((launcher, "odd", "float32") for launcher in CASES),
    *((launcher, "many tokens", "float32") for launcher in ("attention_forward", "attention_backward")),
    *((launcher, "one patch", precision) for launcher in LINEAR for precision in ("tf32", "bfloat16")),
]


@pytest.mark.parametrize(("launcher", "config", "precision"), EVERY_KERNEL)
def test_the_order_of_the_threads_changes_no_bit(strict_gpu, launcher, config, precision):
    results = set()
    for order in (0, 1, 2, 3):
        case, arrays, call = recorded(strict_gpu, launcher, config, precision)
        call.emulated.launch(launcher, call.grid, call.block, call.arguments, order)
        assert_right(case, arrays, precision)
        results.add(b"".join(to_host(array).tobytes() for array in arrays.values()))
    assert len(results) == 1


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize(("launcher", "config", "precision"), EVERY_KERNEL)
def test_no_race_and_no_place_out_of_bounds(strict_gpu, launcher, config, precision, sanitizer, sanitizers):
    batch = {"batch": 1} if config == "many tokens" else {}
    case, arrays, call = recorded(strict_gpu, launcher, config, precision, **batch)
    call.emulated.launch_checked(launcher, call.grid, call.block, call.arguments, sanitizer, order=1)
    assert_right(case, arrays, precision)


NULL = {
    "linear_forward": {"bias": False, "residual": False},
    "linear_backward": {"dx": False, "db": False, "derivative": False},
    "layer_norm_backward": {"residual": False},
    "gather_patches": {"augmented": False},
    "adam_step": {"masked": False, "averaged": False, "clip": 0.0},
    "attention_forward": {"class_only": True},
    "attention_backward": {"class_only": True},
}


@pytest.mark.parametrize("launcher", NULL)
def test_what_is_left_out_is_not_read(strict_gpu, launcher, sanitizers):
    case, arrays, call = recorded(strict_gpu, launcher, **NULL[launcher])
    call.emulated.launch_checked(launcher, call.grid, call.block, call.arguments, "address")
    assert_right(case, arrays)


def test_a_label_that_is_no_class_is_not_looked_up(strict_gpu, sanitizers):
    for label in (-1, 5, 2**31 - 1, -(2**31)):
        _, arrays, call = recorded(strict_gpu, "cross_entropy")
        call.arguments[1][4] = label
        call.emulated.launch_checked("cross_entropy", call.grid, call.block, call.arguments, "address")
        assert np.isnan(to_host(arrays["totals"])[0])
