"""Adam against its paper, clipping, averaging and schedules."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import VALUES, normal, plain_adam, seeds
from strict_cupy import no_synchronisation

from tinyvit.backend import to_host, use_loops
from tinyvit.model import ViTConfig, initialise
from tinyvit.optim import (
    Adam,
    ExponentialMovingAverage,
    clip_by_global_norm,
    constant,
    matrices_only,
    warmup_cosine,
)


def run(adam, weights, gradients, rate):
    """The weights after a step for each of the gradients."""
    weights = weights.copy()
    for gradient in gradients:
        adam.step(weights, gradient, rate)
    return weights


# ---- Adam ----

betas = st.sampled_from([0.0, 0.5, 0.9, 0.999])


@VALUES
@given(
    seeds,
    st.integers(5, 12),
    st.sampled_from([1e-8, 1e-6, 1.0, 1e4]),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    betas,
    betas,
    st.sampled_from([1e-8, 1e-3]),
    st.sampled_from([0.0, 0.01, 0.5]),
    st.booleans(),
)
def test_adam_is_the_algorithm_of_the_paper(seed, steps, size, rate, beta1, beta2, epsilon, decay, masked):
    weights, gradients = normal(seed, (4,), (steps, 4))
    gradients *= size
    decayed = np.array([1.0, 0.0, 1.0, 0.0]) if masked else None
    adam = Adam(weights, beta1, beta2, epsilon, decay, decayed)
    expected = plain_adam(
        weights,
        gradients,
        rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        decay=decay,
        decayed=decayed if masked else 1.0,
    )
    np.testing.assert_allclose(run(adam, weights, gradients, rate), expected, rtol=1e-10, atol=1e-12)
    assert adam.steps == steps


class FrozenStepCount(Adam):
    def step(self, *arguments):
        self.steps = 0
        super().step(*arguments)


class WipedMoments(Adam):
    def step(self, *arguments):
        self.first_moment[...] = self.second_moment[...] = 0
        super().step(*arguments)


class NoBiasCorrection(Adam):
    def step(self, *arguments):
        self.steps = 10**9
        super().step(*arguments)


class DecayOfTheUpdatedWeight(Adam):
    def step(self, flat, gradient, learning_rate):
        decay, self.weight_decay = self.weight_decay, 0.0
        super().step(flat, gradient, learning_rate)
        flat *= 1 - learning_rate * decay
        self.weight_decay = decay


class DecayThroughTheGradient(Adam):
    def step(self, flat, gradient, learning_rate):
        decay, self.weight_decay = self.weight_decay, 0.0
        super().step(flat, gradient + decay * flat, learning_rate)
        self.weight_decay = decay


class NoDecay(Adam):
    def step(self, *arguments):
        self.weight_decay = 0.0
        super().step(*arguments)


class SharedMoment(Adam):
    def step(self, flat, gradient, learning_rate):
        super().step(flat, np.full_like(gradient, gradient.mean()), learning_rate)


SABOTAGED = [
    FrozenStepCount,
    WipedMoments,
    NoBiasCorrection,
    DecayOfTheUpdatedWeight,
    DecayThroughTheGradient,
    NoDecay,
    SharedMoment,
]


@pytest.mark.parametrize("kind", [Adam, *SABOTAGED])
def test_the_comparison_sees_sabotage(kind):
    weights, gradients = normal(0, (4,), (6, 4))
    result = run(kind(weights, weight_decay=0.1), weights, gradients, 0.1)
    expected = plain_adam(weights, gradients, 0.1, decay=0.1)
    assert (np.abs(result - expected).max() > 1e-4) == (kind is not Adam)


def test_the_first_step_has_the_length_of_the_learning_rate_whatever_the_gradient():
    weights, gradient = np.zeros(3), np.array([1e-3, -5.0, 1e6])
    np.testing.assert_allclose(run(Adam(weights), weights, [gradient], 0.01), [-0.01, 0.01, -0.01], rtol=1e-4)


def test_no_gradient_moves_nothing_but_the_decayed_weights():
    weights = np.array([2.0, 2.0])
    adam = Adam(weights, weight_decay=0.1, decayed=np.array([1.0, 0.0]))
    np.testing.assert_allclose(run(adam, weights, [np.zeros(2)], 0.5), [2 * (1 - 0.05), 2])


def test_the_gradient_is_left_as_it_is_and_the_weights_are_updated_in_place():
    weights, gradient = normal(0, (5,), (5,))
    before, old = gradient.tobytes(), weights.copy()
    Adam(weights, weight_decay=0.1).step(weights, gradient, 0.1)
    assert gradient.tobytes() == before
    assert (weights != old).all()


def test_a_step_allocates_no_state():
    weights, gradients = normal(0, (5,), (3, 5))
    adam = Adam(weights)
    first, second = adam.first_moment, adam.second_moment
    run(adam, weights, gradients, 0.1)
    assert adam.first_moment is first
    assert adam.second_moment is second


def test_float32_agrees_with_float64():
    weights, gradients = normal(0, (50,), (20, 50))
    double = run(Adam(weights, weight_decay=0.1), weights, gradients, 0.01)
    single = weights.astype(np.float32)
    single = run(Adam(single, weight_decay=0.1), single, gradients.astype(np.float32), 0.01)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("beta2", math.nan),
        ("beta2", "0.9"),
        ("epsilon", 0.0),
        ("epsilon", math.inf),
        ("weight_decay", -1.0),
        ("weight_decay", None),
        ("threads", 0),
        ("threads", 1.5),
        ("threads", True),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a"):
        Adam(np.zeros(3), **{name: value})


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_pytorch(decay):
    torch = pytest.importorskip("torch")
    weights, gradients = normal(0, (7,), (10, 7))
    theirs = torch.nn.Parameter(torch.tensor(weights))
    optimiser = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        optimiser.step()
    ours = run(Adam(weights, 0.8, 0.95, 1e-6, decay), weights, gradients, 0.01)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_decay_acts_on_matrices_only():
    config = ViTConfig(image_size=4, patch_size=2, width=4, depth=1, heads=1, mlp_width=3, classes=2)
    parameters = initialise(config)
    mask = parameters.with_flat(matrices_only(parameters))
    assert mask.flat.dtype == np.float32
    decayed = {name for name, view in mask.items() if view.all()}
    assert {name for name, view in mask.items() if not view.any()} == set(mask) - decayed
    assert decayed == {
        "patch_embedding.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.projection.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }


# ---- clipping ----


@VALUES
@given(seeds, st.sampled_from([1e-6, 1.0, 1e6]), st.sampled_from([0.1, 1.0, 100.0]))
def test_clipping_keeps_the_direction_and_limits_the_length(seed, size, limit):
    gradient = size * normal(seed, (6,))
    before = gradient.copy()
    norm = clip_by_global_norm(gradient, limit)
    assert norm == pytest.approx(np.linalg.norm(before), rel=1e-12)
    assert np.linalg.norm(gradient) == pytest.approx(min(norm, limit), rel=1e-12)
    np.testing.assert_allclose(gradient * norm, before * np.linalg.norm(gradient), rtol=1e-10)


def test_a_gradient_of_zeros_stays_so():
    gradient = np.zeros(3)
    assert clip_by_global_norm(gradient, 1.0) == 0
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, None])
def test_a_limit_that_cannot_be_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be a number above 0"):
        clip_by_global_norm(np.ones(3), limit)


# ---- averaging ----


def test_the_average_is_that_of_its_definition():
    series = normal(0, (40, 3))
    average = ExponentialMovingAverage(series[0], decay=0.7)
    expected = series[0].copy()
    for step, flat in enumerate(series[1:], start=1):
        average.step(flat)
        decay = min(0.7, (step - 1) / (step + 8))
        expected = decay * expected + (1 - decay) * flat
        np.testing.assert_allclose(average.average, expected, rtol=1e-12)


def test_the_first_update_is_the_average():
    average = ExponentialMovingAverage(np.array([100.0, 100.0]), decay=0.999)
    average.step(np.array([1.0, -2.0]))
    np.testing.assert_array_equal(average.average, [1.0, -2.0])


def test_the_average_of_the_same_weights_is_these_weights_and_a_copy():
    weights = np.array([1.0, -2.0])
    average = ExponentialMovingAverage(weights)
    average.step(weights)
    np.testing.assert_allclose(average.average, weights)
    assert not np.shares_memory(average.average, weights)


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be a number from 0 to below 1"):
        ExponentialMovingAverage(np.zeros(2), decay)


# ---- schedules ----


def test_constant():
    assert [constant(step, 10, 0.3) for step in range(10)] == [0.3] * 10


@VALUES
@given(st.integers(1, 200), st.integers(0, 50), st.floats(1e-6, 10), st.floats(0, 0.9))
def test_warmup_cosine_rises_in_a_line_and_falls_all_the_way(total, warmup, peak, share):
    warmup, final = min(warmup, total - 1), share * peak
    rates = [warmup_cosine(step, total, peak, warmup, final) for step in range(total)]
    np.testing.assert_allclose(rates[:warmup], peak * np.arange(1, warmup + 1) / max(1, warmup))
    falling = rates[warmup:]
    assert falling[0] == pytest.approx(peak)
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    assert falling[-1] > final
    assert warmup_cosine(total, total, peak, warmup, final) == pytest.approx(final)
    assert warmup_cosine(total + 5, total, peak, warmup, final) == pytest.approx(final)


def test_half_way_down_it_is_half_way():
    assert warmup_cosine(60, 110, 1.0, warmup_steps=10, final=0.2) == pytest.approx(0.6)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(threads):
    weights, gradients = normal(0, (10_007,), (4, 10_007), dtype=np.float32)  # no multiple of a vector's length
    decayed, results = (np.arange(10_007) % 3 > 0).astype(np.float32), []
    for count in (1, threads):
        flat, adam = weights.copy(), Adam(weights, weight_decay=0.1, decayed=decayed, threads=count)
        for gradient in gradients:
            adam.step(flat, gradient, 0.1)
        results.append((flat.tobytes(), adam.first_moment.tobytes(), adam.second_moment.tobytes()))
    assert results[0] == results[1]


def test_what_the_caller_says_of_overflow_holds_in_the_threads():
    weights, gradient = np.full(4, 3e38, np.float32), np.ones(4, np.float32)
    adam = Adam(weights, weight_decay=10.0, threads=2)  # the decay of a weight overflows
    with np.errstate(over="ignore", invalid="ignore"):
        adam.step(weights.copy(), gradient, 0.9)
    with pytest.raises(FloatingPointError), np.errstate(over="raise", invalid="ignore"):
        adam.step(weights.copy(), gradient, 0.9)


# ---- a gradient whose square overflows ----


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loops", ["off", "on"])
@pytest.mark.parametrize("element", [0, 2, 3])
def test_a_gradient_whose_square_overflows_raises_and_never_freezes_a_weight(threads, loops, element):
    if loops == "on":
        pytest.importorskip("numba", reason='needs the extra: pip install -e ".[fast]"')
    weights, gradient = np.ones(4, np.float32), np.ones(4, np.float32)
    gradient[element] = -1e20
    with use_loops(loops):
        adam = Adam(weights, threads=threads)
        with pytest.raises(ArithmeticError, match="too large for Adam's second moments"), np.errstate(over="ignore"):
            adam.step(weights, gradient, 0.1)
        assert weights[element] == 1
        assert adam.first_moment[element] == adam.second_moment[element] == 0
        adam.step(weights, np.ones(4, np.float32), 0.1)  # a caller that continues finds a weight that still moves
        assert weights[element] < 1
        double = weights.astype(np.float64)
        Adam(double).step(double, gradient.astype(np.float64), 0.1)
        assert np.isfinite(double).all()
        gradient[element] = 1.8e19  # nearly the largest whose square is finite
        single = np.ones(4, np.float32)
        Adam(single, threads=threads).step(single, gradient, 0.1)
        np.testing.assert_allclose(single, 0.9, rtol=1e-6)


def test_on_a_device_a_gradient_whose_square_overflows_makes_its_weight_nan(accelerator):
    weights, gradient = accelerator.xp.ones(3, np.float32), accelerator.asarray(np.float32([1, 1e20, 1]))
    with no_synchronisation():
        Adam(weights).step(weights, gradient, 0.1)
    np.testing.assert_array_equal(np.isnan(to_host(weights)), [False, True, False])


# ---- arguments that do not fit ----

FLAT = np.ones(4)
CALLS = {  # an argument, and a call with it
    "Adam: flat": lambda x: Adam(x),
    "Adam: decayed": lambda x: Adam(FLAT, decayed=x),
    "Adam.step: flat": lambda x: Adam(FLAT).step(x, FLAT, 0.1),
    "Adam.step: gradient": lambda x: Adam(FLAT).step(FLAT.copy(), x, 0.1),
    "clip: gradient": lambda x: clip_by_global_norm(x, 1.0),
    "average: flat": lambda x: ExponentialMovingAverage(x),
    "average.step: flat": lambda x: ExponentialMovingAverage(FLAT).step(x),
}
WRONG = {
    "shape (1,)": np.ones(1),
    "one more": np.ones(5),
    "two axes": np.ones((4, 4)),
    "a column": np.ones((4, 1)),
    "no axis": np.ones(()),
    "empty": np.ones(0),
    "float16": np.ones(4, np.float16),
    "int": np.ones(4, int),
    "bool": np.ones(4, bool),
    "complex": np.ones(4, complex),
    "list": [1.0] * 4,
    "text": "1111",
    "number": 1.0,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_that_do_not_fit_are_refused_by_name(name, wrong):
    call, argument = CALLS[name], name.split()[-1]
    call(FLAT.copy())
    call(np.repeat(FLAT, 2)[::2])
    if WRONG[wrong] is WRONG["one more"] and name in ("Adam: flat", "clip: gradient", "average: flat"):
        return  # these take arrays of any length
    if WRONG[wrong] is WRONG["shape (1,)"] and name in ("Adam: flat", "clip: gradient", "average: flat"):
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{argument} must"):
        call(WRONG[wrong])


def test_a_missing_array_is_named():
    for name, call in CALLS.items():
        if name != "Adam: decayed":
            with pytest.raises(TypeError, match=f"^{name.split()[-1]} must be a NumPy or CuPy array, not NoneType"):
                call(None)


def test_arrays_with_gaps_are_updated_in_place():
    wide, gradient = np.ones(8, np.float32), np.repeat(normal(0, (4,), dtype=np.float32), 2)[::2]
    flat = np.ones(4, np.float32)
    Adam(flat).step(flat, gradient, 0.1)
    Adam(wide[::2]).step(wide[::2], gradient, 0.1)
    np.testing.assert_array_equal(wide[::2], flat)
    np.testing.assert_array_equal(wide[1::2], 1)


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, "0.1", None, True, np.ones(2)])
def test_a_learning_rate_that_cannot_be_is_refused(rate):
    with pytest.raises(ValueError, match=r"learning_rate must be a (finite )?number from 0"):
        Adam(FLAT).step(FLAT.copy(), FLAT, rate)


@pytest.mark.parametrize("rate", [0, 1, np.float32(0.1), np.float64(0.1), np.int64(1)])
def test_numbers_of_numpy_are_numbers(rate):
    Adam(FLAT, beta1=np.float32(0.9), epsilon=np.float32(1e-8)).step(FLAT.copy(), FLAT, rate)


@pytest.mark.parametrize("schedule", [constant, warmup_cosine])
@pytest.mark.parametrize("name", ["step", "total_steps", "peak", "warmup_steps"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None])
def test_a_schedule_names_the_number_that_cannot_be(schedule, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a (finite )?number from 0"):
        schedule(**{"step": 1, "total_steps": 10, "peak": 0.1, "warmup_steps": 2, name: value})


def test_the_share_of_an_average_begins_at_update_1():
    average = ExponentialMovingAverage(FLAT)
    assert average.share(1) == 1
    with pytest.raises(ValueError, match="update must be a number from 1, not 0"):
        average.share(0)


@pytest.mark.parametrize("threads", [1, 2])
def test_read_only_parameters_are_refused_before_the_state_changes(threads):
    flat, gradient = normal(0, (9,), (9,))
    adam, other = Adam(flat, threads=threads), Adam(flat)
    frozen = flat.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"flat is read-only, but a step updates it in place: give a copy"):
        adam.step(frozen, gradient, 0.1)
    copies = flat.copy(), flat.copy()
    adam.step(copies[0], gradient, 0.1)
    other.step(copies[1], gradient, 0.1)
    np.testing.assert_array_equal(*copies)
    assert adam.steps == 1
