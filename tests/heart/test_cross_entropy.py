"""Softmax cross-entropy of labels and of probabilities, with and without label smoothing."""

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from devices import to_device
from hypothesis import given
from hypothesis import strategies as st
from strategies import SHAPES, VALUES, normal, seeds
from strict_cupy import no_synchronisation

from tinyvit import reference
from tinyvit.backend import to_host
from tinyvit.gradcheck import gradient_error
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward

sizes = st.tuples(st.integers(1, 5), st.integers(2, 6))
smoothings = st.sampled_from([0.0, 0.1, 0.9])


def draw(seed, size):
    """Draw logits and labels."""
    return 3 * normal(seed, size), np.random.default_rng(seed).integers(0, size[1], size[0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda dloss, cache: (cache[0] - cache[1]) * dloss,  # of the sum in place of the mean
        lambda dloss, cache: (cache[0] - cache[1]) / 3,  # dloss is ignored
        lambda dloss, cache: cache[0] * dloss / 3,  # the target is ignored
    ],
)
def test_the_check_sees_a_wrong_gradient(wrong):
    logits, labels = draw(0, (3, 5))
    assert gradient_error(lambda x: cross_entropy_forward(x, labels, 0.1), wrong, [logits])[0] > 0.05


@SHAPES
@given(sizes, seeds)
def test_the_loss_is_the_mean_of_minus_log_softmax(size, seed):
    logits, labels = draw(seed, size)
    loss, _ = cross_entropy_forward(logits, labels)
    expected = -scipy.special.log_softmax(logits, axis=1)[np.arange(size[0]), labels].mean()
    assert loss == pytest.approx(expected, rel=1e-12)
    probabilities = scipy.special.softmax(logits, axis=1)
    assert loss == pytest.approx(sklearn.metrics.log_loss(labels, probabilities, labels=range(size[1])))


@SHAPES
@given(sizes, smoothings, seeds)
def test_smoothing_is_a_target_spread_over_all_classes(size, smoothing, seed):
    logits, labels = draw(seed, size)
    loss, cache = cross_entropy_forward(logits, labels, smoothing)
    target = np.full(size, smoothing / size[1])
    target[np.arange(size[0]), labels] += 1 - smoothing
    assert loss == pytest.approx(-(target * scipy.special.log_softmax(logits, axis=1)).sum() / size[0], rel=1e-12)
    expected = (scipy.special.softmax(logits, axis=1) - target) / size[0]
    np.testing.assert_allclose(cross_entropy_backward(1.0, cache), expected, atol=1e-14)


@VALUES
@given(st.floats(-1e4, 1e4), smoothings, seeds)
def test_a_shift_of_the_logits_is_ignored(shift, smoothing, seed):
    logits, labels = draw(seed, (3, 5))
    loss, _ = cross_entropy_forward(logits, labels, smoothing)
    assert cross_entropy_forward(logits + shift, labels, smoothing)[0] == pytest.approx(loss, abs=1e-10)


def test_the_rows_of_the_gradient_sum_to_zero():
    logits, labels = draw(0, (4, 6))
    _, cache = cross_entropy_forward(logits, labels, 0.1)
    np.testing.assert_allclose(cross_entropy_backward(1.0, cache).sum(axis=1), 0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_logits_give_a_finite_loss_and_gradient(dtype):
    logits = np.array([[1e4, 0, -1e4], [1e4, 0, -1e4]], dtype)
    loss, cache = cross_entropy_forward(logits, np.array([0, 2]))
    assert loss == 1e4  # 0 for the first image, 20,000 for the second
    np.testing.assert_array_equal(cross_entropy_backward(1.0, cache), dtype([[0, 0, 0], [0.5, 0, -0.5]]))


def test_the_loss_of_equal_logits_is_the_logarithm_of_the_number_of_classes():
    assert cross_entropy_forward(np.zeros((4, 10)), np.arange(4))[0] == pytest.approx(np.log(10), rel=1e-14)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_labels_of_any_integer_dtype(kind):
    logits, labels = draw(0, (4, 6))
    assert cross_entropy_forward(logits, labels.astype(kind))[0] == cross_entropy_forward(logits, labels)[0]


WRONG_LABELS = pytest.mark.parametrize("wrong", [-1, 6, 255])


@WRONG_LABELS
def test_a_label_out_of_range_raises(wrong):
    logits, labels = draw(0, (4, 6))
    labels[2] = wrong
    with pytest.raises(ValueError, match=f"a label is {wrong}, but labels must be integers from 0 to 5"):
        cross_entropy_forward(logits, labels, 0.1)


@WRONG_LABELS
def test_a_label_out_of_range_gives_nan_on_a_device_without_a_wait(accelerator, wrong):
    logits, labels = draw(0, (4, 6))
    labels[2] = wrong
    with no_synchronisation():
        loss, cache = cross_entropy_forward(*to_device(accelerator, logits, labels), 0.1)
        dlogits = cross_entropy_backward(1.0, cache)
    assert np.isnan(float(loss))
    np.testing.assert_array_equal(np.isnan(to_host(dlogits)).all(axis=1), [False, False, True, False])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, bool])
def test_labels_that_are_not_integers_are_refused(backend, dtype):
    logits, labels = draw(0, (4, 6))
    with pytest.raises(TypeError, match="labels must be integers from 0 to 5, not"):
        cross_entropy_forward(*to_device(backend, logits, labels.astype(dtype)))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((3, 4), (4,)), ((3, 4), (3, 5)), ((3, 4), (4, 3)), ((3, 4), ())],
)
def test_shapes_that_do_not_fit_are_refused(logits, labels):
    with pytest.raises(ValueError, match=r"needs logits of shape \(B, classes\) with labels of shape \(B,\) or"):
        cross_entropy_forward(np.zeros(logits), np.zeros(labels, np.int64))


@pytest.mark.parametrize("logits", [(3, 4, 5), (3,), (0, 4), (3, 0)])
def test_logits_of_another_shape_are_refused(logits):
    with pytest.raises(ValueError, match=r"logits must have the shape \(batch, classes\)"):
        cross_entropy_forward(np.zeros(logits), np.zeros(logits[:1], np.int64))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5, np.nan, np.inf, "0.1", None])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="smoothing must be a number from 0 to below 1"):
        cross_entropy_forward(np.zeros((2, 3)), np.array([0, 1]), smoothing)


def test_a_class_that_is_impossible_costs_nothing_unless_it_is_the_target(backend):
    logits = np.array([[0.0, -np.inf, 1.0]])
    expected, _ = reference.cross_entropy_forward(logits, np.array([0]))
    assert expected == pytest.approx(np.log1p(np.e))
    one_hot = np.array([[1.0, 0.0, 0.0]])
    for targets in (np.array([0]), one_hot):
        loss, cache = cross_entropy_forward(*to_device(backend, logits, targets))
        assert float(loss) == pytest.approx(expected)
        np.testing.assert_allclose(to_host(cross_entropy_backward(1.0, cache)), [[-0.73105858, 0, 0.73105858]])
    for smoothing, label in ((0.0, 1), (0.1, 0)):
        loss, _ = cross_entropy_forward(*to_device(backend, logits, np.array([label])), smoothing)
        assert float(loss) == np.inf
    loss, _ = cross_entropy_forward(*to_device(backend, np.array([[0.0, np.nan, 1.0]]), np.array([0])))
    assert np.isnan(float(loss))


@pytest.mark.parametrize("dloss", [np.ones(3), np.ones((1, 1)), [1.0], "1", None])
def test_dloss_is_a_number(dloss):
    _, cache = cross_entropy_forward(np.zeros((3, 3)), np.arange(3))
    with pytest.raises(TypeError, match="dloss must be a number"):
        cross_entropy_backward(dloss, cache)


def draw_probabilities(seed, size):
    """Draw logits and target probabilities."""
    first, second = normal(seed, size, size)
    return 3 * first, scipy.special.softmax(second, axis=1)


@VALUES
@given(sizes, smoothings, seeds)
def test_the_loss_for_probabilities_is_the_mean_of_the_losses_of_all_labels(size, smoothing, seed):
    logits, targets = draw_probabilities(seed, size)
    expected = 0.0
    for image in range(size[0]):
        for label in range(size[1]):
            loss, _ = cross_entropy_forward(logits[image : image + 1], np.array([label]), smoothing)
            expected += targets[image, label] * loss / size[0]
    np.testing.assert_allclose(cross_entropy_forward(logits, targets, smoothing)[0], expected, rtol=1e-12)


def test_one_hot_probabilities_are_labels(backend):
    logits, labels = draw(3, (5, 4))
    on_device = to_device(backend, logits, labels, np.eye(4)[labels])
    for smoothing in (0.0, 0.2):
        by_label = cross_entropy_forward(on_device[0], on_device[1], smoothing)
        by_row = cross_entropy_forward(on_device[0], on_device[2], smoothing)
        assert float(by_label[0]) == float(by_row[0])
        for a, b in zip(by_label[1], by_row[1], strict=True):
            assert to_host(a).tobytes() == to_host(b).tobytes()


@pytest.mark.parametrize("wrong", [[0.5, 0.6, 0.0], [1.2, -0.2, 0.0], [0.0, 0.0, 0.0], [np.nan, 0.5, 0.5]])
def test_invalid_probabilities_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 0 and sum to 1"):
        cross_entropy_forward(np.zeros((2, 3)), np.array([[0.2, 0.3, 0.5], wrong]))
