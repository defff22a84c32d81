"""The gradient check itself: it sees what is right, and above all what is wrong."""

import contextlib
import math
import re

import numpy as np
import pytest
from strategies import normal

from tinyvit.gradcheck import (
    analytical_gradients,
    directional_error,
    gradient_error,
    numerical_gradients,
    relative_error,
)
from tinyvit.ops import layer_norm_backward, layer_norm_forward, softmax_backward, softmax_forward

CHECKS = [lambda *args: max(gradient_error(*args)), directional_error]


def product_forward(x, y):
    return np.sin(x) * y, (x, y)


def product_backward(dout, cache):
    x, y = cache
    return dout * np.cos(x) * y, dout * np.sin(x)


@pytest.mark.parametrize("check", CHECKS)
def test_a_right_gradient_has_an_error_near_1e_10(check):
    assert check(product_forward, product_backward, normal(0, (3, 4), (3, 4))) < 1e-9


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        (lambda dx, dy: (0 * dx, 0 * dy), 0.99),
        (lambda dx, dy: (-dx, dy), 0.3),
        (lambda dx, dy: (dy, dx), 0.1),
        (lambda dx, dy: (1.001 * dx, dy), 1e-4),
        (lambda dx, dy: (dx, dy * [1, 1, 1, 0]), 1e-2),
        (lambda dx, dy: (dx, dy * [1, 1, math.nan, 1]), math.inf),
        (lambda dx, dy: (dx + math.inf, dy), math.inf),
    ],
)
def test_a_wrong_gradient_is_seen(check, wrong, least):
    def backward(dout, cache):
        return wrong(*product_backward(dout, cache))

    assert check(product_forward, backward, normal(0, (3, 4), (3, 4))) >= least


def test_the_wrong_input_is_told_from_the_right_one():
    def backward(dout, cache):
        dx, dy = product_backward(dout, cache)
        return dx, 2 * dy

    right, wrong = gradient_error(product_forward, backward, normal(0, (3, 4), (3, 4)))
    assert right < 1e-9
    assert wrong == pytest.approx(1 / 3)


def test_a_zero_gradient_of_softmax_is_seen_only_because_dout_is_random():
    x = normal(0, (3, 5))
    assert relative_error(0 * x, *numerical_gradients(softmax_forward, [x], np.ones((3, 5)))) < 1e-6
    assert gradient_error(softmax_forward, lambda dout, cache: 0 * dout, [x]) == [1.0]
    assert gradient_error(softmax_forward, softmax_backward, [x])[0] < 1e-8


def test_a_gradient_that_is_truly_zero_is_right():
    def constant_forward(x):
        return 1 + 0 * x, None

    x = normal(0, (3,))
    assert gradient_error(constant_forward, lambda dout, cache: 0 * dout, [x]) == [0]
    assert gradient_error(constant_forward, lambda dout, cache: dout, [x]) == [1]


def test_a_loss_without_axes_is_checked_too():
    forward, backward = (lambda x: (x.sum() ** 2, x)), (lambda dout, x: dout * 2 * x.sum() + 0 * x)
    assert gradient_error(forward, backward, [normal(0, (2, 3))])[0] < 1e-9


@pytest.mark.parametrize("check", [gradient_error, directional_error])
def test_one_seed_gives_one_result(check):
    arguments = (layer_norm_forward, layer_norm_backward, normal(0, (3, 4), (4,), (4,)))
    assert check(*arguments, rng=5) == check(*arguments, rng=5) != check(*arguments, rng=6)
    generators = np.random.default_rng(7), np.random.default_rng(7)
    assert check(*arguments, rng=generators[0]) == check(*arguments, rng=generators[1])


def test_dout_is_not_the_input_that_was_drawn_with_the_same_seed():
    def backward(dout, cache):
        x, y = cache
        return x * np.cos(x) * y, dout * np.sin(x)  # x, where dout belongs

    assert gradient_error(product_forward, backward, normal(0, (3, 4), (3, 4)), rng=0)[0] > 0.1


def test_inputs_of_any_layout():
    x = np.asfortranarray(normal(0, (6, 4)))[::2]
    assert max(gradient_error(product_forward, product_backward, [x, np.broadcast_to(x[0], (3, 4))])) < 1e-9


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("bad", [np.float32([1, 2]), np.array([1, 2]), [1.0, 2.0], 3.0])
def test_what_is_no_float64_array_is_refused(check, bad):
    with pytest.raises(TypeError, match="input 1 must be a float64 array"):
        check(product_forward, product_backward, [np.ones(2), bad])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("wrong", [lambda x, y: x, lambda x, y: (x, y[0]), lambda x, y: (x, y, y)])
def test_gradients_of_other_shapes_are_refused(check, wrong):
    def backward(dout, cache):
        return wrong(*product_backward(dout, cache))

    with pytest.raises(ValueError, match="for inputs of shapes"):
        check(product_forward, backward, normal(0, (3, 4), (3, 4)))


def write_into(array):
    array += 1


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("culprit", "names"),
    [
        (lambda dout, cache: write_into(dout), "backward wrote into dout"),
        (lambda dout, cache: write_into(cache[0]), r"backward wrote into input 0, cache\[0\]"),
        (lambda dout, cache: write_into(cache[2]["in"][0]), r"backward wrote into cache\[2\]\['in'\]\[0\]"),
        (lambda dout, cache: write_into(cache[1]), r"backward wrote into out, cache\[1\]"),
    ],
)
def test_a_backward_that_writes_where_it_must_not_is_named(check, culprit, names):
    def forward(x):
        out = x * 2
        return out, (x, out, {"in": [x.copy()]})

    def backward(dout, cache):
        dx = 2 * dout
        culprit(dout, cache)
        return dx

    with pytest.raises(AssertionError, match=names):
        check(forward, backward, [normal(0, (3, 4))])


@pytest.mark.parametrize("check", CHECKS)
def test_a_forward_that_writes_into_its_input_is_named(check):
    def forward(x):
        x += 1
        return x * 2, None

    with pytest.raises(AssertionError, match="forward wrote into input 0"):
        check(forward, lambda dout, cache: 2 * dout, [normal(0, (3, 4))])


def test_a_forward_that_is_not_finite_is_infinitely_wrong():
    def forward(x):
        return np.full_like(x, np.nan), None

    assert directional_error(forward, lambda dout, cache: np.zeros(3), [np.ones(3)]) == math.inf
    assert gradient_error(forward, lambda dout, cache: np.zeros(3), [np.ones(3)]) == [math.inf]


# ---- functions that cannot be checked ----


def dropout_forward(rng):
    def forward(x):
        mask = rng.random(x.shape) < 0.5
        return x * mask, mask

    return forward


def test_a_forward_with_dropout_is_named_and_not_called_wrong():
    rng = np.random.default_rng(0)
    for check in (*CHECKS, analytical_gradients):
        with pytest.raises(ValueError, match="forward returned two results for the same inputs: switch dropout off"):
            check(dropout_forward(rng), lambda dout, mask: dout * mask, [normal(0, (3, 4))])
    fixed = lambda x: dropout_forward(np.random.default_rng(0))(x)  # noqa: E731
    assert gradient_error(fixed, lambda dout, mask: dout * mask, [normal(0, (3, 4))])[0] < 1e-9


@pytest.mark.parametrize("check", CHECKS)
def test_a_forward_that_depends_on_earlier_calls_is_named(check):
    calls = []

    def forward(x):
        calls.append(x)
        return x[: len(calls)] if len(calls) < 3 else x, None

    with pytest.raises(ValueError, match="two results for the same inputs"):
        check(forward, lambda dout, cache: dout, [normal(0, (3,))])


def directional(*arguments):
    return [directional_error(*arguments)]


@pytest.mark.parametrize("check", [gradient_error, directional])
def test_a_rare_random_change_is_never_a_wrong_backward(check):
    def forward(x):
        mask = rng.random(x.shape) >= 0.05
        return x * mask, mask

    errors = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        with contextlib.suppress(ValueError):
            errors += check(forward, lambda dout, mask: dout * mask, [normal(seed, (2, 3))])
    assert max(errors, default=0) < 1e-7
    assert len(errors) < 40


@pytest.mark.parametrize("check", [gradient_error, directional])
def test_noise_that_is_small_beside_the_output_is_named(check):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="two results for the same inputs"):
        check(lambda x: (1e9 + x + 1e-3 * rng.random(3), None), lambda dout, cache: dout, [np.ones(3)])
    # The same backward is wrong if only rounding changes the results.
    forward = lambda x: (2 * x + 1e-15 * rng.random(3), None)  # noqa: E731
    assert max(check(forward, lambda dout, cache: dout, [np.ones(3)])) > 0.1


@pytest.mark.parametrize("check", [gradient_error, directional])
@pytest.mark.parametrize("last", [2, 3, 4])
def test_a_forward_that_changes_after_some_calls_is_named(check, last):
    calls = []

    def forward(x):
        calls.append(x)
        return x * (1 if len(calls) <= last else 2), None

    with pytest.raises(ValueError, match="two results for the same inputs"):
        check(forward, lambda dout, cache: dout, [normal(0, (3,))])


@pytest.mark.parametrize("rng", [None, "a", -1, 1.5])
def test_another_seed_is_refused(rng):
    for check in (gradient_error, directional_error):
        with pytest.raises(ValueError, match=r"rng must be a seed from 0 or a numpy\.random\.Generator"):
            check(product_forward, product_backward, normal(0, (3,), (3,)), rng=rng)


@pytest.mark.parametrize("change", [1e-12, -1e-12, 1e-6, -1e-6])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
def test_results_that_differ_only_by_rounding_are_one_result(size, change):
    changes = iter([0.0, change * max(size, 1e-3)])

    def forward(x):
        return np.full(3, size) + next(changes), None

    def check():
        return analytical_gradients(forward, lambda dout, cache: dout, [np.ones(3)])

    if abs(change) < 1e-9:
        check()
    else:
        with pytest.raises(ValueError, match="two results for the same inputs"):
            check()


def test_a_forward_may_fill_the_same_array_in_every_call():
    buffer = np.empty(4)

    def forward(x):
        np.multiply(x, 2, out=buffer)
        return buffer.copy(), None

    assert gradient_error(forward, lambda dout, cache: 2 * dout, [normal(0, (4,))])[0] < 1e-9


@pytest.mark.parametrize("number", [float, np.float64, np.asarray, lambda x: np.asarray(x).reshape(1)])
def test_a_loss_may_be_a_python_number(number):
    def forward(x):
        return number((x**2).sum()), x

    x = normal(0, (2, 3))
    right, wrong = (lambda dout, x, factor=factor: np.asarray(dout).sum() * factor * x for factor in (2, 3))
    for check in CHECKS:
        assert check(forward, right, [x]) < 1e-7
        assert check(forward, wrong, [x]) > 0.1


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x, "forward must return (out, cache), not ndarray"),
        (lambda x: float(x.sum()), "forward must return (out, cache), not float"),
        (lambda x: None, "forward must return (out, cache), not NoneType"),
        (lambda x: (x, x, x), "forward must return (out, cache), not tuple"),
        (lambda x: (x.astype(np.float32), x), "out must be a float64 array or a number, not float32"),
        (lambda x: (x.tolist(), x), "out must be a float64 array or a number, not list"),
        (lambda x: (x > 0, x), "out must be a float64 array or a number, not bool"),
    ],
)
def test_a_forward_that_returns_something_else_is_explained(check, result, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        check(result, lambda dout, cache: dout, [normal(0, (3,))])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: None, "gradient 0 must be a float64 array, not NoneType: return one gradient per input"),
        (lambda x, y: (x, None), "gradient 1 must be a float64 array, not NoneType"),
        (lambda x, y: (x.astype(np.float32), y), "gradient 0 must be a float64 array, not float32"),
        (lambda x, y: (x, y.astype(int)), "gradient 1 must be a float64 array, not int64"),
        (lambda x, y: (x, y.tolist()), "gradient 1 must be a float64 array, not list"),
        (lambda x, y: {"x": x, "y": y}, "gradient 0 must be a float64 array, not dict"),
    ],
)
def test_a_gradient_that_is_missing_or_of_another_dtype_is_named(check, wrong, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        check(product_forward, lambda dout, cache: wrong(*product_backward(dout, cache)), normal(0, (3, 4), (3, 4)))


def test_central_differences_alone_may_be_of_float32():
    x = normal(0, (3,), dtype=np.float32)
    numerical = numerical_gradients(lambda x: (x**2, None), [x], np.ones(3, np.float32), step=1e-2)
    np.testing.assert_allclose(numerical[0], 2 * x, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("inputs", [np.ones((2, 3)), [], (), {}, None, 3.0])
def test_inputs_are_a_list(check, inputs):
    with pytest.raises(TypeError, match="inputs must be a list of float64 arrays"):
        check(product_forward, product_backward, inputs)


@pytest.mark.parametrize("step", [0, -1e-5, math.nan, math.inf, "1e-5", None])
def test_a_step_is_a_positive_number(step):
    for check in (gradient_error, directional_error):
        with pytest.raises(ValueError, match=r"step must be a (finite )?number above 0"):
            check(product_forward, product_backward, normal(0, (3,), (3,)), step=step)


@pytest.mark.parametrize("directions", [0, -1, 1.5, True])
def test_no_direction_proves_nothing(directions):
    with pytest.raises(ValueError, match="directions must be an integer from 1"):
        directional_error(product_forward, product_backward, normal(0, (3,), (3,)), directions=directions)


def test_errors_of_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must have the same shape, but have \(3,\) and \(1,\)"):
        relative_error(np.ones(3), np.ones(1))
