"""The Gaussian error linear unit, its tanh form, and its float32 polynomial."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from strategies import VALUES, assert_float32_agrees

from tinyvit.backend import use_loops
from tinyvit.ops import gelu_forward, gelu_tanh_forward
from tinyvit.ops.gelu import _LARGEST_SQUARE, _TANH_SERIES, normal_cdf

FORMS = [gelu_forward, gelu_tanh_forward]


def cdf32(x):
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        return normal_cdf(x, x * x)


def test_values():
    x = np.linspace(-10, 10, 1001)
    np.testing.assert_allclose(gelu_forward(x)[0], x * scipy.special.ndtr(x), rtol=1e-13, atol=1e-15)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    np.testing.assert_allclose(gelu_tanh_forward(x)[0], 0.5 * x * (1 + tanh), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("forward", FORMS)
@VALUES
@given(x=st.floats(-20, 20))
def test_x_minus_its_mirror_image_is_x(forward, x):
    # cdf(x) + cdf(-x) = 1, so gelu(x) - gelu(-x) = x, and the two derivatives sum to 1.
    x = np.array([x])
    (right, right_slope), (left, left_slope) = forward(x), forward(-x)
    np.testing.assert_allclose(right - left, x, atol=1e-14)
    np.testing.assert_allclose(right_slope + left_slope, 1, atol=1e-14)


def test_the_tanh_form_is_within_5e_4_of_the_other():
    x = np.linspace(-10, 10, 10001)
    assert 4e-4 < np.abs(gelu_forward(x)[0] - gelu_tanh_forward(x)[0]).max() < 5e-4


@pytest.mark.parametrize("forward", FORMS)
def test_float32_agrees_with_float64_far_out(forward):
    # The cache is the derivative.
    assert_float32_agrees(forward, [np.linspace(-12, 12, 4801)], tolerance=2e-6)


# ---- the float32 polynomial ----


def test_the_polynomial_is_within_one_float32_epsilon_of_the_distribution_function():
    # The error is 0.95e-7 where NumPy has fused multiply-add, and 1.13e-7 elsewhere.
    x = np.linspace(-12, 12, 2_400_001, dtype=np.float32)
    assert np.abs(cdf32(x) - scipy.special.ndtr(x.astype(np.float64))).max() < np.finfo(np.float32).eps


def test_the_polynomial_far_out():
    huge = np.float32([13, 50, 1e4, 1e18, 3e38])
    assert cdf32(huge).tolist() == [1] * 5
    assert cdf32(-huge).tolist() == [0] * 5
    assert cdf32([0.0, -0.0]).tolist() == [0.5, 0.5]
    assert cdf32([np.inf, -np.inf]).tolist() == [1, 0]
    assert np.isnan(cdf32([np.nan, 1])).tolist() == [True, False]


@pytest.mark.parametrize("forward", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loops", ["off", "auto"])
def test_the_limits_of_gelu(forward, dtype, loops):
    x = np.array([-np.inf, np.inf, np.nan, -1e13, 1e13, -1e20, 1e20, 0, -np.inf], dtype)
    with use_loops(loops), np.errstate(over="ignore"):
        for out in (forward(x)[0], forward(x, with_cache=False)[0]):
            np.testing.assert_array_equal(out, np.where(x < 0, 0, x))
        np.testing.assert_array_equal(forward(x)[1], [0, 1, np.nan, 0, 1, 0, 1, 0.5, 0])
        ordinary = dtype([-2, 0.5, 40, -41, 3])
        for got, expected in zip(forward(np.append(ordinary, dtype(-np.inf))), forward(ordinary), strict=True):
            np.testing.assert_allclose(got[:-1], expected, rtol=1e-6)


@pytest.mark.parametrize("forward", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_far_out(forward, dtype):
    # GELU approaches the identity for large x and 0 for large -x. The square 1e12 still fits float32.
    huge = np.array([50, 1e4, 1e6], dtype)
    for x, value, slope in ((huge, huge, 1), (-huge, 0 * huge, 0)):
        out, derivative = forward(x)
        np.testing.assert_array_equal(out, value)
        np.testing.assert_array_equal(derivative, slope)
    out, derivative = forward(np.array([0.0, np.nan], dtype))
    assert out[0] == 0
    assert derivative[0] == 0.5
    assert np.isnan(out[1])
    assert np.isnan(derivative[1])


def weighted_error(coefficients, x):
    """Return 0.5 (1 + tanh(x P(x**2))) minus the distribution function, in float64."""
    polynomial = np.polynomial.polynomial.polyval(x**2, np.asarray(coefficients, np.float64))
    return 0.5 * (1 + np.tanh(x * polynomial)) - scipy.special.ndtr(x)


def test_the_coefficients_are_those_of_the_best_fit():
    # The best fit is a linear programme. Near the true argument u, the derivative of 0.5 tanh is 0.5 sech(u)**2. This
    # weight times |x P(x**2) - u| is the error of the distribution, and the programme minimises the largest error.
    end = math.sqrt(_LARGEST_SQUARE)
    x = end * np.sin(np.linspace(0, np.pi / 2, 600)[1:])
    truth = 0.5 * (scipy.special.log_ndtr(x) - scipy.special.log_ndtr(-x))  # artanh(2 cdf(x) - 1)
    weight = 0.5 / np.cosh(truth) ** 2 / 1e-8  # in units of 1e-8, because the solver's tolerance is 1e-7
    scaled = 2 * (x / end) ** 2 - 1
    terms = (weight * x)[:, None] * np.polynomial.chebyshev.chebvander(scaled, len(_TANH_SERIES) - 1)
    column = np.ones((len(x), 1))
    best = scipy.optimize.linprog(
        [0] * len(_TANH_SERIES) + [1],
        A_ub=np.block([[terms, -column], [-terms, -column]]),
        b_ub=np.concatenate([weight * truth, -weight * truth]),
        bounds=(None, None),
    )
    assert best.success
    least = best.fun * 1e-8
    shipped = np.abs(weighted_error(_TANH_SERIES, np.linspace(0, end, 100_001))).max()
    assert 2e-8 < least < 3e-8
    assert shipped < 1.1 * least


def test_a_wrong_digit_in_a_coefficient_is_seen():
    x = np.linspace(0, math.sqrt(_LARGEST_SQUARE), 2001)
    for i in range(len(_TANH_SERIES)):
        changed = [c * (1 + 1e-3 * (i == j)) for j, c in enumerate(_TANH_SERIES)]
        assert np.abs(weighted_error(changed, x)).max() > 1.1 * 2.9e-8


@pytest.mark.parametrize("forward", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_a_cache_the_values_are_the_same_bits(forward, dtype):
    x = np.linspace(-9, 9, 500, dtype=dtype)
    out, cache = forward(x, with_cache=False)
    assert cache is None
    np.testing.assert_array_equal(out, forward(x)[0])
