"""Evaluation against scikit-learn and plain loops; attention rollout against the whole attention."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import tinyvit.evaluate
from tinyvit.classifier import VisionTransformer
from tinyvit.evaluate import (
    attention_rollout,
    calibration_error,
    classification_report,
    confusion,
    evaluation_of_logits,
    misclassified,
    patch_maps,
)
from tinyvit.model import ViTConfig, block_forward, initialise, vit_logits
from tinyvit.ops import patch_embedding_forward

SMALL = {"image_size": 6, "patch_size": 2, "width": 8, "heads": 2, "mlp_width": 12, "classes": 5}


def random_model(seed=0, dtype=np.float64, **settings):
    """A small model whose every parameter is random: zeros and ones would hide mistakes."""
    config = ViTConfig(**{**SMALL, "depth": 3, **settings})
    parameters = initialise(config, seed, dtype)
    parameters.flat[...] = np.random.default_rng(seed).normal(0, 0.6, parameters.flat.shape)
    return VisionTransformer(config, parameters)


def random_images(count, config, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, config.image_size, config.image_size)).astype(np.uint8)
    return images, rng.integers(0, config.classes, count)


def random_evaluation(seed=0, count=200, classes=5, scale=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = scale * (rng.standard_normal((count, classes)) + 1.5 * np.eye(classes)[labels])
    return evaluation_of_logits(logits, labels)


def test_evaluation_agrees_with_the_model_and_with_scikit_learn():
    model = random_model()
    images, labels = random_images(23, model.config)
    result = model.evaluate(images, labels, batch_size=5)
    np.testing.assert_allclose(result.probabilities, model.predict_proba(images), rtol=1e-9)
    np.testing.assert_array_equal(result.predictions, model.predict(images))
    assert result.labels is labels
    assert result.accuracy == sum(result.predictions == labels) / 23
    expected = sklearn.metrics.log_loss(labels, model.predict_proba(images), labels=range(5))
    assert result.loss == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(result.confidences, result.probabilities[np.arange(23), result.predictions])


def test_any_number_of_workers_gives_the_same_bits():
    model = random_model(dtype=np.float32)
    images, labels = random_images(40, model.config)
    first = model.evaluate(images, labels, batch_size=7)
    for workers in (2, 3, 8):
        other = model.evaluate(images, labels, batch_size=7, workers=workers)
        assert other.probabilities.tobytes() == first.probabilities.tobytes()
        assert other.loss == first.loss


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chunk_has_one_blas_thread_which_ends_with_the_evaluation(workers, monkeypatch):
    seen = []

    def spy(images, parameters, config):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return np.zeros((len(images), 5))

    monkeypatch.setattr(tinyvit.evaluate, "vit_logits", spy)
    model = random_model()
    images, labels = random_images(9, model.config)
    with threadpool_limits(limits=2, user_api="blas"):  # the other tests run with one thread as it is
        before = threadpool_info()
        model.evaluate(images, labels, batch_size=2, workers=workers)
        assert threadpool_info() == before
    assert set(seen) == {1}


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_counts_every_image(workers):
    model = random_model()
    images, labels = random_images(23, model.config)
    seen = []
    model.evaluate(images, labels, batch_size=10, workers=workers, progress=seen.append)
    assert seen == [10, 10, 3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), r"labels must be integers of shape \(4,\), one per image"),
        (np.zeros(4), "float64"),
        (np.zeros((4, 1), int), r"\(4, 1\)"),
        (np.array([0, 1, 5, 2]), "labels must be in 0 to 4, the classes of the model, but one is 5"),
        (np.array([0, -1, 4, 2]), "but one is -1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        model.evaluate(random_images(4, model.config)[0], labels)


def test_other_arguments_that_do_not_fit_are_refused():
    model = random_model()
    images, labels = random_images(4, model.config)
    for name in ("batch_size", "workers"):
        for value in (0, -1, 1.5, 2.0, "3", True, np.nan):
            with pytest.raises(ValueError, match=f"^{name} must be an integer from 1, not "):
                model.evaluate(images, labels, **{name: value})
        assert len(model.evaluate(images, labels, **{name: np.int64(2)}).labels) == 4
    with pytest.raises(ValueError, match=r"batch_size must be an integer from 1, not 1\.5"):
        vit_logits(images, model.parameters, model.config, batch_size=1.5)
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 6, 6\)"):
        model.evaluate(images[:, :5], labels)
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 6, 6\)"):
        model.evaluate(images[:0], labels[:0])


def test_a_failure_in_a_thread_reaches_the_caller():
    model = random_model()
    images, labels = random_images(9, model.config)
    model.parameters.flat[...] = np.nan
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        model.evaluate(images, labels, batch_size=2, workers=2)


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    result = evaluation_of_logits(np.array([[1e30, 0.0], [0.0, 5000.0]], np.float32), np.array([0, 0]))
    assert result.loss == 2500
    assert result.accuracy == 0.5
    np.testing.assert_array_equal(result.probabilities, [[1, 0], [0, 1]])


def test_report_holds_each_class_as_counted_by_hand():
    result = random_evaluation()
    report = classification_report(result, class_names=["ant", "bee", "cat", "dog", "eel"])
    for c, name in enumerate(["ant", "bee", "cat", "dog", "eel"]):
        hits = sum((result.predictions == c) & (result.labels == c))
        precision, recall = hits / sum(result.predictions == c), hits / sum(result.labels == c)
        f1 = 2 * precision * recall / (precision + recall)
        line = next(line for line in report.splitlines() if name in line)
        assert line.split()[1:] == [
            f"{precision:.4f}",
            f"{recall:.4f}",
            f"{f1:.4f}",
            str(sum(result.labels == c)),
        ]
    assert f"{result.accuracy:.4f}" in report


def test_report_of_absent_classes_warns_of_nothing():
    logits = np.array([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0]])
    result = evaluation_of_logits(logits, np.array([0, 2, 0]))  # 3 is absent, 2 never predicted, 1 never true
    lines = {line.split()[0]: line.split()[1:] for line in classification_report(result).splitlines() if line}
    assert lines["0"] == ["0.5000", "0.5000", "0.5000", "2"]
    assert lines["3"] == ["0.0000", "0.0000", "0.0000", "0"]
    assert lines["accuracy"] == ["0.3333", "3"]
    with pytest.raises(ValueError, match="give one name per class: 4 names, not 2"):
        classification_report(result, ["a", "b"])


def test_confusion_has_the_truth_in_rows():
    result = random_evaluation(classes=4)
    expected = np.zeros((4, 4), int)
    for label, prediction in zip(result.labels, result.predictions, strict=True):
        expected[label, prediction] += 1
    np.testing.assert_array_equal(confusion(result), expected)
    logits = np.array([[0, 0, 1.0]])
    np.testing.assert_array_equal(
        confusion(evaluation_of_logits(logits, np.array([1]))), [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    )


def test_misclassified_are_the_wrong_ones_the_most_confident_first():
    result = random_evaluation()
    wrong = [i for i in range(200) if result.predictions[i] != result.labels[i]]
    wrong.sort(key=lambda i: -result.probabilities[i, result.predictions[i]])
    assert misclassified(result).tolist() == wrong
    assert misclassified(result, limit=3).tolist() == wrong[:3]


def test_misclassified_keeps_the_order_of_equals_and_may_be_empty():
    logits = np.tile([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]], (40, 1))
    expected = [*range(1, 120, 3), *range(2, 120, 3), *range(0, 120, 3)]
    assert misclassified(evaluation_of_logits(logits, np.zeros(120, int))).tolist() == expected
    assert misclassified(evaluation_of_logits(logits, np.ones(120, int))).tolist() == []


def test_calibration_error_agrees_with_its_definition():
    result = random_evaluation(scale=1.5)  # well calibrated: what differs in a bin has either sign
    expected = 0
    for m in range(15):
        inside = [i for i in range(200) if m / 15 < result.confidences[i] <= (m + 1) / 15]
        if inside:
            accuracy = np.mean([result.predictions[i] == result.labels[i] for i in inside])
            expected += len(inside) / 200 * abs(accuracy - np.mean(result.confidences[inside]))
    assert calibration_error(result) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.01


def rollout_with_every_query(images, parameters, config):
    """Rollout as the paper has it: all tokens ask in every block, and whole matrices are multiplied."""
    x, _ = patch_embedding_forward(
        images,
        *parameters.pair("patch_embedding"),
        parameters["class_token"],
        parameters["positions"],
        config.patch_size,
        config.pixel_mean,
        config.pixel_deviation,
    )
    tokens = config.tokens
    products = [np.eye(tokens) for _ in images]
    for i in range(config.depth):
        x, cache = block_forward(x, parameters, f"blocks.{i}", config)
        weights = cache.attention.attention.weights
        for b in range(len(images)):
            flow = np.eye(tokens)
            for head in range(config.heads):
                flow = flow + weights[b, head] / config.heads
            for row in range(tokens):
                flow[row] /= flow[row].sum()
            products[b] = flow @ products[b]
    return np.array([product[0, 1:] for product in products])


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 2**16))
def test_rollout_equals_that_of_the_whole_attention(depth, heads, batch, seed):
    model = random_model(seed, depth=depth, heads=heads)
    images, _ = random_images(batch, model.config, seed)
    relevance = attention_rollout(images, model.parameters, model.config)
    expected = rollout_with_every_query(images, model.parameters, model.config)
    assert relevance.shape == (batch, 9)
    np.testing.assert_allclose(relevance, expected, rtol=1e-12)
    assert (relevance.sum(axis=1) < 1).all()


@pytest.mark.parametrize("depth", [1, 4])
def test_rollout_of_uniform_attention_is_uniform(depth):
    model = random_model(depth=depth)
    for i in range(depth):  # no query and no key: every score is zero
        model.parameters[f"blocks.{i}.attention.qkv.weight"][:, :16] = 0
        model.parameters[f"blocks.{i}.attention.qkv.bias"][:16] = 0
    images, _ = random_images(2, model.config)
    # in each block half of what is not yet spread out evenly stays where it is
    expected = (1 - 0.5**depth) / model.config.tokens
    relevance = attention_rollout(images, model.parameters, model.config)
    np.testing.assert_allclose(relevance, np.full((2, 9), expected), rtol=1e-12)
    assert math.isclose(1 - relevance[0].sum(), 0.5**depth + expected)


def test_patch_maps_lie_as_the_patches_do():
    np.testing.assert_array_equal(
        patch_maps(np.arange(8).reshape(2, 4)), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    )
    with pytest.raises(ValueError, match="the number of patches must be a square, or give the grid, not 8"):
        patch_maps(np.zeros((1, 8)))
    np.testing.assert_array_equal(patch_maps(np.arange(6)[None], (2, 3)), [[[0, 1, 2], [3, 4, 5]]])
    with pytest.raises(ValueError, match="must be 2 x 3, not 8"):
        patch_maps(np.zeros((1, 8)), (2, 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_logits_that_overflow_are_one_error_and_no_warning(workers):
    model = random_model()
    images, labels = random_images(9, model.config)
    model.parameters.flat[...] = 1e300
    with pytest.raises(ArithmeticError, match="logits contain NaN or infinity"):
        model.evaluate(images, labels, batch_size=5, workers=workers)


@pytest.mark.parametrize("bins", [0, -1, 1.5, None])
def test_calibration_needs_a_bin(bins):
    with pytest.raises(ValueError, match="bins must be an integer from 1"):
        calibration_error(random_evaluation(), bins)


@pytest.mark.parametrize("limit", [-1, 1.5, "3"])
def test_a_limit_of_mistakes_is_a_count(limit):
    with pytest.raises(ValueError, match="limit must be an integer from 0"):
        misclassified(random_evaluation(), limit)
    assert len(misclassified(random_evaluation(), 0)) == 0


def test_one_dark_image_among_others_is_read_and_images_of_0_and_1_are_refused():
    model = random_model()
    images, labels = random_images(4, model.config)
    images[2] = np.arange(images[2].size).reshape(images[2].shape) % 2
    together, one_by_one = (model.logits(images, batch_size=size) for size in (4, 1))
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"not uint8 with pixels from 0 to 1: use \(255\.0 \* images"):
        model.evaluate(images // 128, labels)
