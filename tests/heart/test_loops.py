"""The compiled loops give what `reference.py` gives, are used where they should be, and keep NaN and infinities."""

import contextvars
import sys
import threading

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SHAPES, assert_workspace_changes_nothing, decayed_adam_step, normal, seeds

from tinyvit import backend, reference
from tinyvit.backend import loops_for, use_loops
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_logits
from tinyvit.ops import gelu_forward, layer_norm_backward, layer_norm_forward
from tinyvit.optim import Adam

numba = pytest.importorskip("numba", reason='needs the extra: pip install -e ".[fast]"')

from tinyvit import loops  # noqa: E402

INTERPRETED = [loops.gelu_forward.py_func, loops.layer_norm_forward.py_func, loops.layer_norm_backward.py_func]
widths, counts = st.integers(1, 70), st.integers(1, 9)  # longer and shorter than a vector register


def run_gelu(x, dtype=np.float32, function=loops.gelu_forward):
    out, derivative = np.empty_like(x, dtype), np.empty_like(x, dtype)
    function(x.astype(dtype), out, derivative)
    return out, derivative


def run_layer_norm(x, w, b, dout, epsilon=0.1, forward=loops.layer_norm_forward, backward=loops.layer_norm_backward):
    """Return out, dx, dw and db of the loops, in the dtype of the arrays."""
    out, normalised, dx = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    inverse_deviation, dw, db = np.empty((len(x), 1), x.dtype), np.empty_like(w), np.empty_like(w)
    forward(x, w, b, x.dtype.type(epsilon), out, normalised, inverse_deviation)
    backward(dout, normalised, inverse_deviation, w, dx, dw, db)
    return out, dx, dw, db


def reference_gelu(x):
    out, cache = reference.gelu_forward(x)
    return out, reference.gelu_backward(np.ones_like(x), cache)


def reference_layer_norm(x, w, b, dout, epsilon=0.1):
    out, cache = reference.layer_norm_forward(x, w, b, epsilon)
    return out, *reference.layer_norm_backward(dout, cache)


def assert_near(got, expected, tolerance):
    for mine, theirs in zip(got, expected, strict=True):
        scale = max(1, np.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


# ---- values ----


@SHAPES
@given(counts, widths, seeds)
@example(1, 1, 0)
@example(3, 16, 0)
@example(3, 17, 0)
def test_layer_norm_equals_the_reference(count, width, seed):
    arrays = normal(seed, (count, width), (width,), (width,), (count, width))
    expected = reference_layer_norm(*arrays)
    assert_near(run_layer_norm(*(array.astype(np.float32) for array in arrays)), expected, 1e-5)
    interpreted = {"forward": INTERPRETED[1], "backward": INTERPRETED[2]}
    assert_near(run_layer_norm(*arrays, **interpreted), expected, 1e-12)


@SHAPES
@given(widths, seeds)
@example(1, 0)
@example(17, 0)
def test_gelu_equals_the_reference(count, seed):
    x = 3 * normal(seed, (count,))
    expected = reference_gelu(x)
    assert_near(run_gelu(x), expected, 1e-6)
    assert_near(run_gelu(x, np.float64, INTERPRETED[0]), expected, 1.5e-7)
    values = np.empty_like(x, np.float32)
    loops.gelu_values(x.astype(np.float32), values)
    np.testing.assert_array_equal(values, run_gelu(x)[0])


def test_gelu_is_right_to_a_few_units_in_the_last_place():
    x = np.linspace(-12, 12, 200_001).astype(np.float32)
    out, derivative = run_gelu(x)
    expected_out, expected_derivative = reference_gelu(x.astype(np.float64))
    unit = np.finfo(np.float32).eps
    assert (np.abs(out - expected_out) <= 2 * unit * np.maximum(1, np.abs(x))).all()
    assert (np.abs(derivative - expected_derivative) <= 6 * unit).all()


@SHAPES
@given(st.integers(1, 200), st.integers(1, 5), seeds)
@example(1, 1, 0)
def test_adam_equals_the_reference(count, steps, seed):
    weights, *gradients = normal(seed, *[(count,)] * (steps + 1))
    expected, first, second = weights, np.zeros(count), np.zeros(count)
    for dtype, used, tolerance in ((np.float32, "on", 1e-5), (np.float64, "off", 1e-12)):
        expected, first, second = weights, np.zeros(count), np.zeros(count)
        flat = weights.astype(dtype)
        adam = Adam(flat, beta1=0.7, beta2=0.8, epsilon=0.05, weight_decay=0.3)
        with use_loops(used):
            for step, gradient in enumerate(gradients, start=1):
                adam.step(flat, gradient.astype(dtype), 0.1)
                settings = {"beta1": 0.7, "beta2": 0.8, "epsilon": 0.05, "decay": 0.3}
                expected, first, second = decayed_adam_step(
                    expected, gradient, first, second, step, 0.1, **settings
                )
        assert_near([flat, adam.first_moment, adam.second_moment], [expected, first, second], tolerance)


def test_the_model_has_the_same_loss_and_gradient():
    config = ViTConfig(image_size=14, depth=2, width=32, mlp_width=48)
    parameters = initialise(config)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 14, 14), np.uint8), rng.integers(0, 10, 5)
    results = {}
    for choice in ("off", "on"):
        with use_loops(choice):
            loss, _, gradients = loss_and_gradient(images, labels, parameters, config)
            results[choice] = [loss, gradients.flat, vit_logits(images, parameters, config)]
    assert_near(results["on"], results["off"], 1e-5)
    assert results["on"][1].tobytes() != results["off"][1].tobytes()  # the loops did run


@pytest.mark.parametrize("beta2", [0.999, 0.999999])
def test_adam_keeps_the_digits_of_betas_near_one(beta2):
    results = []
    for choice in ("off", "on"):
        flat = np.ones(3, np.float32)
        adam = Adam(flat, beta2=beta2)
        with use_loops(choice):
            for _ in range(3):
                adam.step(flat, np.full(3, 0.5, np.float32), 1e-3)
        results.append([flat, adam.second_moment])
    for with_numpy, with_loops in zip(*results, strict=True):
        np.testing.assert_allclose(with_loops, with_numpy, rtol=1e-6)


# ---- arrays that do not fit ----


def test_shapes_that_do_not_fit_are_refused_before_a_loop_reads_them():
    x, w, b, dout = (array.astype(np.float32) for array in normal(0, (5, 8), (8,), (8,), (5, 8)))
    with use_loops("on"):
        for wrong in (w[:1], w[:3], np.ones(12, np.float32)):
            for name, arguments in (("w", (x, wrong, b)), ("b", (x, w, wrong))):
                with pytest.raises(ValueError, match=f"^{name} must have the shape"):
                    layer_norm_forward(*arguments)
        _, cache = layer_norm_forward(x, w, b)
        for name in ("dw", "db"):
            with pytest.raises(ValueError, match=f"^{name} must have the shape"):
                layer_norm_backward(dout, cache, **{name: np.zeros(12, np.float32)})
        with pytest.raises(ValueError, match=r"^gradient must have the shape"):
            Adam(np.zeros(10, np.float32)).step(np.zeros(10, np.float32), np.zeros(7, np.float32), 1e-3)


@pytest.mark.parametrize("place", range(4))
def test_one_array_that_does_not_suit_the_loops_is_enough(place):
    """In float64, strided or read-only, each argument sends the operation to NumPy."""
    arrays = [array.astype(np.float32) for array in normal(0, (5, 8), (8,), (8,), (5, 8))]
    expected = run_layer_norm(*arrays, epsilon=1e-6)
    frozen = arrays[place].copy()
    frozen.flags.writeable = False
    for other in (arrays[place].astype(np.float64), np.repeat(arrays[place], 2, axis=-1)[..., ::2], frozen):
        x, w, b, dout = [*arrays[:place], other, *arrays[place + 1 :]]
        with use_loops("on"):
            out, cache = layer_norm_forward(x, w, b)
            assert_near([out, *layer_norm_backward(dout, cache)], expected, 1e-5)
    strided, wide = np.zeros(16, np.float32)[::2], np.zeros(8)
    for dw in (strided, wide):
        with use_loops("on"):
            layer_norm_backward(arrays[3], layer_norm_forward(*arrays[:3])[1], dw=dw)
        assert_near([dw], [expected[2]], 1e-5)


# ---- coefficients ----


def error_of_gelu(**changed):
    """Return how far the polynomials are from the normal distribution function and, relatively, from its density."""
    from scipy.special import ndtr

    c = {name: np.float64(getattr(loops, name)) for name in dir(loops) if name[0] in "PQE" and name[1:].isdigit()}
    c |= changed
    x = np.linspace(-6, 6, 5001)
    s, u = x * x, x * x / 32
    p = np.polynomial.polynomial.polyval(s, [c[f"P{i}"] for i in range(7)])
    q = np.polynomial.polynomial.polyval(s, [1, *(c[f"Q{i}"] for i in range(1, 6))])
    e = np.polynomial.polynomial.polyval(u, [1, *(c[f"E{i}"] for i in range(1, 8))])
    cdf = np.abs((1 + x * p / q) / 2 - ndtr(x)).max()
    return max(cdf, np.abs(e**16 / np.exp(-s / 2) - 1).max())


def test_the_coefficients_are_right_and_a_wrong_digit_is_seen():
    assert error_of_gelu() < 4e-7
    for name in [f"P{i}" for i in range(7)] + [f"Q{i}" for i in range(1, 6)] + [f"E{i}" for i in range(1, 8)]:
        assert error_of_gelu(**{name: 1.001 * float(getattr(loops, name))}) > 2e-6, name


# ---- NaN and infinity ----


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_special_values_keep_their_meaning(special):
    x, w, b, dout = (array.astype(np.float32) for array in normal(0, (4, 33), (33,), (33,), (4, 33)))
    with np.errstate(invalid="ignore"):
        for place in (0, 15, 16, 32):
            damaged = x.copy()
            damaged[1, place] = special
            near = np.clip(damaged.ravel(), -40, 40)  # here the reference does not multiply infinity by 0
            out, derivative = reference_gelu(near)
            expected = np.where(damaged.ravel() > 40, damaged.ravel(), out), derivative
            for mine, theirs in zip(run_gelu(damaged.ravel()), expected, strict=True):
                np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(theirs))
                np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))
            for mine, theirs in zip(
                run_layer_norm(damaged, w, b, dout), reference_layer_norm(damaged, w, b, dout), strict=True
            ):
                np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))
            flat, moments = w.copy(), (np.zeros_like(w), np.zeros_like(w))
            loops.adam_step(flat, damaged[1], *moments, *np.float32([0.9, 0.1, 0.99, 0.01, 0.1, 1, 1e-8]))
            assert not np.isfinite(flat[place])
            assert np.isfinite(np.delete(flat, place)).all()


def test_gelu_far_out():
    huge = np.float32([6.1, 50, 1e4, 1e30])
    for x, values, slope in ((huge, huge, 1), (-huge, 0 * huge, 0)):
        out, derivative = run_gelu(x)
        np.testing.assert_array_equal(out, values)
        np.testing.assert_array_equal(derivative, slope)


# ---- when they are used ----


def test_loops_are_off_unless_one_says_otherwise():
    x = np.ones((2, 3), np.float32)
    assert loops_for(x) is None
    with use_loops("on") as used:
        assert used
        assert loops_for(x) is loops
        with use_loops("off") as used_inside:
            assert not used_inside
            assert loops_for(x) is None
        assert loops_for(x) is loops
    assert loops_for(x) is None


def test_other_dtypes_and_layouts_take_numpy():
    with use_loops("on"):
        assert loops_for(np.ones((4, 4))) is None
        assert loops_for(np.ones((4, 4), np.float32), np.ones((4, 4))) is None
        assert loops_for(np.ones((4, 6), np.float32)[:, :3]) is None
        x, w, b, dout = (a.astype(np.float32) for a in normal(0, (3, 4, 7), (7,), (7,), (3, 7)))
        out, cache = layer_norm_forward(x[:, 0], w, b)
        expected, _ = layer_norm_forward(x[:, 0].copy(), w, b)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert layer_norm_backward(dout, cache)[0].shape == (3, 7)


def test_a_thread_takes_the_choice_from_a_copy_of_the_context():
    found = {}
    x = np.ones(3, np.float32)
    with use_loops("on"):
        context = contextvars.copy_context()
        threads = [
            threading.Thread(target=lambda: found.update(alone=loops_for(x))),
            threading.Thread(target=context.run, args=(lambda: found.update(copied=loops_for(x)),)),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert found == {"alone": None, "copied": loops}


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "tinyvit.loops")
    backend.compiled_loops.cache_clear()
    try:
        with use_loops("auto") as used:
            assert not used
        with pytest.raises(ValueError, match=r"pip install 'tinyvit\[fast\]'"), use_loops("on"):
            pass
    finally:
        backend.compiled_loops.cache_clear()


@pytest.mark.parametrize("error", [AttributeError("no module core"), EOFError(), OSError("disk full")])
def test_a_numba_that_fails_is_noted_and_not_used(monkeypatch, caplog, error):
    def fail():
        raise error

    monkeypatch.setattr(loops, "prepare", fail)
    backend.compiled_loops.cache_clear()
    try:
        with use_loops("auto") as used:
            assert not used
        assert "without compiled loops" in caplog.text
    finally:
        backend.compiled_loops.cache_clear()


def test_the_first_compilation_is_noted(monkeypatch, caplog):
    monkeypatch.setattr(loops, "prepare", lambda: 1.25)
    backend.compiled_loops.cache_clear()
    try:
        assert backend.compiled_loops() is loops
        assert "Numba compiled the loops of the CPU in 1.2 s" in caplog.text
    finally:
        backend.compiled_loops.cache_clear()


def test_many_images_use_loops_unless_the_caller_chose():
    for images, expected in ((backend.MANY_IMAGES - 1, "auto"), (backend.MANY_IMAGES, "on")):
        with backend.use_loops_for_many(images):
            assert backend.loops_choice() == expected
    with use_loops("off"), backend.use_loops_for_many(backend.MANY_IMAGES):
        assert backend.loops_choice() == "off"
    assert backend.loops_choice() == "auto"


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="'auto', 'on', 'off'"), use_loops("maybe"):
        pass


def test_a_workspace_changes_nothing():
    x, w, b, dout = (a.astype(np.float32) for a in normal(0, (3, 5, 4), (4,), (4,), (3, 5, 4)))

    def compute():
        with use_loops("on"):
            out, cache = layer_norm_forward(x, w, b)
            return out, *layer_norm_backward(dout, cache), *gelu_forward(x), gelu_forward(x, with_cache=False)[0]

    assert_workspace_changes_nothing(compute)
