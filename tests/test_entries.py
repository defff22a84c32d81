"""Every function that takes images or labels accepts the same ones and refuses the others with the same advice."""

import numpy as np
import pytest

import tinyvit
from tinyvit.classifier import VisionTransformer, fitting_config
from tinyvit.evaluate import attention_rollout, evaluate, evaluation_of_logits, parallel_logits
from tinyvit.gpu import get_backend
from tinyvit.model import (
    ViTConfig,
    block_attention,
    block_backward,
    block_forward,
    initialise,
    loss_and_gradient,
    vit_backward,
    vit_forward,
    vit_logits,
)
from tinyvit.parameters import Parameters
from tinyvit.training import Training, TrainingConfig

CONFIG = ViTConfig(image_size=4, patch_size=2, width=4, depth=2, heads=2, mlp_width=3, classes=3)
PARAMETERS = initialise(CONFIG)
MODEL = VisionTransformer(CONFIG, PARAMETERS)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
LABELS = np.array([0, 1, 2, 1, 0])
SMALL = {"width": 4, "depth": 1, "heads": 2, "mlp_width": 3, "patch_size": 2}


def gradient(images, labels):
    loss, correct, gradients = loss_and_gradient(images, labels, PARAMETERS, CONFIG)
    return float(loss), int(correct), gradients.flat


def trained(images, labels):
    return tinyvit.train(images, labels, model=SMALL, workers=1, verbose=0).parameters.flat


def run(images, labels):
    training = Training(CONFIG, TrainingConfig(validation=1), images, labels, get_backend("cpu"), workers=1)
    training.run()
    return training.fingerprint, training.state.parameters.flat


OF_IMAGES = {
    "predict": lambda images, labels: MODEL.predict(images),
    "predict_proba": lambda images, labels: MODEL.predict_proba(images),
    "logits": lambda images, labels: MODEL.logits(images),
    "parallel_logits": lambda images, labels: parallel_logits(images, PARAMETERS, CONFIG),
    "vit_forward": lambda images, labels: vit_forward(images, PARAMETERS, CONFIG)[0],
    "vit_logits": lambda images, labels: vit_logits(images, PARAMETERS, CONFIG),
    "attention_rollout": lambda images, labels: attention_rollout(images, PARAMETERS, CONFIG),
}
OF_LABELS_TOO = {
    "evaluate": lambda images, labels: MODEL.evaluate(images, labels).probabilities,
    "evaluate.evaluate": lambda images, labels: evaluate(images, labels, PARAMETERS, CONFIG).loss,
    "loss_and_gradient": gradient,
}
OF_BYTES = {
    "train": trained,
    "fitting_config": lambda images, labels: fitting_config(images, labels).pixel_mean,
    "Training": run,
}
READING = OF_IMAGES | OF_LABELS_TOO
ENTRIES = READING | OF_BYTES
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


@every_entry
def test_lists_are_read_as_arrays(entry):
    expected = entry(IMAGES, LABELS)
    for images, labels in ((IMAGES.tolist(), LABELS.tolist()), (list(IMAGES), tuple(LABELS))):
        np.testing.assert_equal(entry(images, labels), expected)


@every_entry
@pytest.mark.parametrize(
    ("images", "error", "advice"),
    [
        (IMAGES[0], ValueError, r"images\[None\]"),
        (IMAGES.reshape(5, 16), ValueError, r"images\.reshape\(-1, 4, 4\)"),
        (IMAGES[:0], ValueError, "B at least 1"),
        (IMAGES[:, :, :, None, None], ValueError, r"not \(5, 4, 4, 1, 1\)"),
        (IMAGES.astype(np.int64), ValueError, r"images\.astype\(np\.uint8\)"),
        (IMAGES.astype(object), TypeError, "images must be an array of numbers"),
        (IMAGES > 5, ValueError, "images must be uint8"),
        ((IMAGES > 5).astype(int).tolist(), ValueError, "if white is 1"),
        (["a.png", "b.png"], TypeError, r"tinyvit predict a\.png"),
        ("digit.png", TypeError, r"tinyvit predict digit\.png"),
        ([[[1]], [[1, 2]]], ValueError, "equal lengths"),
        (None, TypeError, "images must be an array"),
    ],
)
def test_other_images_are_refused_with_advice(entry, images, error, advice):
    with pytest.raises(error, match=advice):
        entry(images, LABELS)


@pytest.mark.parametrize("entry", [entry for name, entry in ENTRIES.items() if name != "loss_and_gradient"])
def test_bytes_of_only_0_and_1_are_refused(entry):
    with pytest.raises(ValueError, match=r"use \(255\.0 \* images\)\.round\(\)\.astype\(np\.uint8\) if white is 1"):
        entry((IMAGES > 127).astype(np.uint8), LABELS)


def test_a_batch_of_a_training_may_be_almost_black():
    assert np.isfinite(gradient(np.eye(4, dtype=np.uint8)[None], LABELS[:1])[0])


def changed(index, value):
    images = IMAGES / 255
    images[index] = value
    return images


@pytest.mark.parametrize("entry", READING.values(), ids=READING)
@pytest.mark.parametrize(
    ("images", "text"),
    [
        (IMAGES.astype(np.float64), "image 0 has pixels from .* to .*: divide by 255"),
        (IMAGES.astype(np.float32), "image 0 has pixels from .* to .*: divide by 255"),
        (changed(3, 7.0), "image 3 has pixels from 7 to 7"),
        (changed(2, -0.4242), "image 2 has pixels from -0.4242 .* the model normalises pixels itself"),
        (changed((4, 1, 1), np.nan), "image 4 has pixels that are NaN or infinite"),
        (changed((1, 1, 1), -np.inf), "image 1 has pixels that are NaN or infinite"),
    ],
)
def test_float_pixels_outside_0_to_1_are_refused(entry, images, text):
    with pytest.raises(ValueError, match=text):
        entry(images, LABELS)


@pytest.mark.parametrize("entry", READING.values(), ids=READING)
def test_float_pixels_from_0_to_1_are_read_as_bytes_are(entry):
    def results(images):
        result = entry(images, LABELS)
        return result if isinstance(result, tuple) else [result]

    for images in (IMAGES / 255, (IMAGES / np.float32(255)).astype(np.float32), (IMAGES / 255).tolist()):
        for got, expected in zip(results(images), results(IMAGES), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", OF_BYTES.values(), ids=OF_BYTES)
def test_training_refuses_floats_with_advice(entry):
    with pytest.raises(ValueError, match=r"\(255\.0 \* images\)\.round\(\)\.astype\(np\.uint8\) if white is 1"):
        entry(IMAGES / 255, LABELS)


WITH_LABELS = {name: entry for name, entry in (OF_LABELS_TOO | OF_BYTES).items() if name != "loss_and_gradient"}


@pytest.mark.parametrize("entry", WITH_LABELS.values(), ids=WITH_LABELS)
@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        ([0, 1, -1, 1, 0], ValueError, "labels must be .*, but one is -1"),
        (np.int8([0, 1, -100, 1, 0]), ValueError, "but one is -100"),
        (LABELS[:4], ValueError, "labels must be integers of shape"),
        (LABELS.astype(float), ValueError, r"labels\.astype\(int\)"),
        (LABELS == 1, ValueError, r"labels\.astype\(int\)"),
        (np.eye(3)[LABELS], ValueError, r"labels\.argmax\(axis=1\)"),
        (LABELS[:, None], ValueError, r"labels\.ravel\(\)"),
        (LABELS.astype(str), TypeError, "labels must be an array of numbers"),
        (None, TypeError, "labels must be an array of numbers"),
        ([[0], [1, 2]], ValueError, "equal lengths"),
    ],
)
def test_other_labels_are_refused_with_advice(entry, labels, error, text):
    with pytest.raises(error, match=text):
        entry(IMAGES, labels)


@pytest.mark.parametrize(
    "labels", [LABELS - 1, LABELS + 1, LABELS.astype(float), LABELS == 1, LABELS[:4], "01210", None]
)
def test_targets_that_are_no_labels_are_refused(labels):
    with pytest.raises((TypeError, ValueError), match=r"label|targets"):
        gradient(IMAGES, labels)


# ---- models that are not finite, and parameters of another model ----


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("entry", ["predict", "predict_proba", "logits", "evaluate"])
def test_a_model_that_is_not_finite_answers_nothing(value, entry):
    parameters = initialise(CONFIG)
    parameters["head.weight"][...] = value
    parameters["norm.weight"][...] *= 1e10
    model = VisionTransformer(CONFIG, parameters)
    with pytest.raises(ArithmeticError, match="the model's logits contain NaN or infinity: check its weights"):
        getattr(model, entry)(IMAGES, *[LABELS] * (entry == "evaluate"))
    with pytest.raises(ArithmeticError, match="logits contain NaN"):
        vit_logits(IMAGES, parameters, CONFIG)


def test_attention_that_is_not_finite_is_no_map():
    parameters = initialise(CONFIG)
    parameters["blocks.0.norm1.weight"][0] = np.nan
    with pytest.raises(ArithmeticError, match="the model's attention contains NaN"):
        attention_rollout(IMAGES, parameters, CONFIG)


def test_evaluation_of_logits_takes_lists_and_checks_labels():
    result = evaluation_of_logits([[0.0, 1.0], [1.0, 0.0]], [1, 1])
    assert result.accuracy == 0.5
    for logits in ([1.0, 2.0], np.zeros((0, 2)), np.zeros((2, 0))):
        with pytest.raises(ValueError, match="logits must have the shape"):
            evaluation_of_logits(logits, [0, 1])
    for labels in ([0, 2], [0, -1], [0.0, 1.0], [0]):
        with pytest.raises(ValueError, match="labels must be"):
            evaluation_of_logits([[0.0, 1.0], [1.0, 0.0]], labels)


OTHER = ViTConfig(**{**CONFIG.as_dict(), "depth": 3})


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        (initialise(OTHER), ValueError, r"parameters must have the shapes of the model, .* but blocks\.2\."),
        (initialise(ViTConfig(**{**CONFIG.as_dict(), "classes": 4})), ValueError, r"but head\.bias differs"),
        (PARAMETERS.flat, TypeError, r"parameters must be tinyvit\.parameters\.Parameters, not ndarray"),
        (dict(PARAMETERS), TypeError, r"parameters must be tinyvit\.parameters\.Parameters, not dict"),
        (PARAMETERS.with_flat(PARAMETERS.flat.astype(np.float16)), TypeError, "float32 or float64, not float16"),
        (PARAMETERS.with_flat(PARAMETERS.flat.astype(int)), TypeError, "float32 or float64, not int64"),
        (CONFIG, TypeError, r"parameters must be tinyvit\.parameters\.Parameters, not ViTConfig"),
    ],
)
def test_parameters_of_another_model_are_refused(parameters, error, text):
    for call in (
        lambda: vit_forward(IMAGES, parameters, CONFIG),
        lambda: vit_logits(IMAGES, parameters, CONFIG),
        lambda: loss_and_gradient(IMAGES, LABELS, parameters, CONFIG),
        lambda: evaluate(IMAGES, LABELS, parameters, CONFIG),
        lambda: parallel_logits(IMAGES, parameters, CONFIG),
        lambda: attention_rollout(IMAGES, parameters, CONFIG),
        lambda: VisionTransformer(CONFIG, parameters),
    ):
        with pytest.raises(error, match=text):
            call()


def test_other_arguments_of_the_model_are_named():
    logits, cache = vit_forward(IMAGES, PARAMETERS, CONFIG)
    _, no_cache = vit_forward(IMAGES, PARAMETERS, CONFIG, with_cache=False)
    for call, error, text in (
        (lambda: vit_forward(IMAGES, PARAMETERS, PARAMETERS), TypeError, "config must be a ViTConfig"),
        (lambda: VisionTransformer(PARAMETERS, CONFIG), TypeError, "config must be a ViTConfig"),
        (lambda: vit_backward(logits, no_cache), TypeError, "the cache of vit_forward with with_cache=True"),
        (lambda: block_attention(None), TypeError, "cache must be the cache of vit_forward, not None"),
        (lambda: block_backward(logits, None, PARAMETERS, "blocks.0"), TypeError, "the cache of block_forward, not"),
        (lambda: vit_backward(logits[:1], cache), ValueError, "dlogits must have the shape"),
        (lambda: vit_backward(logits[:, :1], cache), ValueError, "dlogits must have the shape"),
        (lambda: vit_backward(logits.astype(np.float16), cache), TypeError, "dlogits must be float32 or float64"),
        (lambda: vit_backward(logits, cache, initialise(OTHER)), ValueError, "gradients must have the shapes"),
        (lambda: vit_backward(logits, cache, np.zeros(3)), TypeError, "gradients must be tinyvit"),
        (lambda: initialise(CONFIG, dtype=np.float16), ValueError, "dtype must be float32 or float64, not float16"),
        (lambda: initialise(CONFIG, dtype=int), ValueError, "dtype must be float32 or float64, not int64"),
        (lambda: Parameters({"a": (2,)}, "x"), TypeError, "flat must be an array of numbers"),
        (lambda: block_forward(np.zeros((1, 5, 3)), PARAMETERS, "blocks.0", CONFIG), ValueError, "w must have"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_images_and_parameters_are_on_one_device(accelerator):
    there = PARAMETERS.with_flat(accelerator.asarray(PARAMETERS.flat))
    with pytest.raises(TypeError, match="images must be on the device of the parameters"):
        vit_forward(IMAGES, there, CONFIG)
    with pytest.raises(TypeError, match="images must be on the device of the parameters"):
        vit_forward(accelerator.asarray(IMAGES), PARAMETERS, CONFIG)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_float_pixels_of_a_device_are_checked_where_the_result_is_on_the_host(accelerator, name):
    there = PARAMETERS.with_flat(accelerator.asarray(PARAMETERS.flat))
    model, images = VisionTransformer(CONFIG, there), accelerator.asarray(changed(3, 7.0))
    calls = {
        "predict": lambda: model.predict(images),
        "predict_proba": lambda: model.predict_proba(images),
        "logits": lambda: model.logits(images),
        "parallel_logits": lambda: parallel_logits(images, there, CONFIG),
        "vit_logits": lambda: vit_logits(images, there, CONFIG),
        "attention_rollout": lambda: attention_rollout(images, there, CONFIG),
    }
    if name == "vit_forward":  # it may not wait for the device
        vit_forward(images, there, CONFIG)
        return
    with pytest.raises(ValueError, match="image 3 has pixels from 7 to 7"):
        calls[name]()
