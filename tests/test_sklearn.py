"""TinyViTClassifier behaves as a classifier of scikit-learn, alone and inside scikit-learn's tools."""

import copy
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  so that the next line finds the search
from sklearn.model_selection import GridSearchCV, HalvingRandomSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

import tinyvit
import tinyvit.sklearn
from tinyvit.sklearn import TinyViTClassifier
from tinyvit.training import NOTE, Training, TrainingConfig
from tinyvit.training.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
PLAIN = TrainingConfig(batch_size=16, learning_rate=1e-2)
TINY = {"recipe": PLAIN, "width": 8, "depth": 1, "heads": 2, "max_iter": 8, "random_state": 0}
NAMES = np.array(["above", "below", "left"])


def images_of_bars(count=90, rows=8, columns=8, seed=0):
    """Return images with one bright side, integers from 0 to 16, and the name of that side."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 4, (count, rows, columns)), np.arange(count) % 3
    images[labels == 0, : rows // 4] += 12
    images[labels == 1, -(rows // 4) :] += 12
    images[labels == 2, :, : columns // 4] += 12
    images[0, -1, -1], images[0, 0, 0] = 0, 16
    return images, NAMES[labels]


IMAGES, LABELS = images_of_bars()
OTHERS, OTHER_LABELS = images_of_bars(seed=1)


def fitted(X=IMAGES, y=LABELS, **parameters):
    return TinyViTClassifier(**TINY | parameters).fit(X, y)


@pytest.fixture
def runs(monkeypatch):
    """Return a list of all training runs of the test. Each has the images and the weights after each epoch."""
    found = []

    class Recorded(Training):
        def __init__(self, model_config, config, images, labels, backend, **options):
            super().__init__(model_config, config, images, labels, backend, **options)
            self.images, self.labels, self.weights = images, labels, []
            found.append(self)

        def run(self, on_epoch, **options):
            def record(run):
                self.weights.append(copy.copy(run.state.weights))
                on_epoch(run)

            super().run(on_epoch=record, **options)

    monkeypatch.setattr(tinyvit.sklearn, "Training", Recorded)
    return found


# ---- the interface of scikit-learn ----


def checks_of(estimator):
    """Return the checks that `check_estimator` runs. Those of scikit-learn 1.5 come from the function itself."""
    generate = getattr(estimator_checks, "estimator_checks_generator", None)
    found = generate(estimator) if generate else estimator_checks.check_estimator(estimator, generate_only=True)
    return [pytest.param(check, id=check.func.__name__) for _, check in found]


CHECKED = TinyViTClassifier(**TINY | {"recipe": "note", "learning_rate_init": 1e-2})


@pytest.mark.parametrize("check", checks_of(CHECKED))
def test_the_checks_of_scikit_learn(check):
    check(CHECKED)


def test_there_are_checks_of_scikit_learn():
    assert len(checks_of(CHECKED)) > 40


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:Skipping check:UserWarning")  # pandas may be missing
def test_the_default_settings_pass_the_checks_of_scikit_learn():
    estimator_checks.check_estimator(TinyViTClassifier())


def test_it_learns_images_with_any_labels():
    model = fitted()
    assert model.score(OTHERS, OTHER_LABELS) > 0.9
    assert model.classes_.tolist() == NAMES.tolist()
    assert model.n_iter_ == len(model.loss_curve_) == 8
    assert model.loss_curve_[-1] < 0.5 * model.loss_curve_[0]
    assert (model.validation_scores_, model.best_validation_score_) == (None, None)
    probabilities = model.predict_proba(OTHERS)
    assert (NAMES[probabilities.argmax(axis=1)] == model.predict(OTHERS)).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    numbers = fitted(y=5 * np.searchsorted(NAMES, LABELS) - 7)
    assert numbers.classes_.tolist() == [-7, -2, 3]
    assert np.array_equal(numbers.predict_proba(OTHERS), probabilities)


def test_the_trained_model_works_with_the_other_interfaces(tmp_path):
    model = fitted()
    model.model_.save(tmp_path / "model.safetensors")
    loaded = tinyvit.VisionTransformer.load(tmp_path / "model.safetensors")
    assert loaded.config.class_names == tuple(NAMES)
    pixels = np.round(OTHERS * (255 / 16)).astype(np.uint8)
    np.testing.assert_allclose(loaded.predict_proba(pixels), model.predict_proba(OTHERS), rtol=1e-5, atol=1e-7)


def test_copies_predict_the_same(tmp_path):
    model = fitted()
    joblib.dump(model, tmp_path / "model")
    copies = pickle.loads(pickle.dumps(model)), copy.deepcopy(model), joblib.load(tmp_path / "model")
    for other in (*copies, joblib.load(tmp_path / "model", mmap_mode="r")):
        assert np.array_equal(other.predict_proba(OTHERS), model.predict_proba(OTHERS))


def test_parameters_are_kept_and_clones_are_not_fitted():
    given = TINY | {"patch_size": [2, 4], "max_iter": np.int64(1), "tol": np.float64(0), "width": np.int32(8)}
    model = TinyViTClassifier(**given).fit(IMAGES, LABELS)
    for name, value in given.items():
        assert getattr(model, name) is value
    assert model.model_.config.patch_shape == (2, 4)
    assert (model.model_.config.mlp_width, model.n_iter_) == (32, 1)
    other = clone(model)
    assert other.get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        other.predict(IMAGES)


def test_the_parameters_reach_the_training(runs):
    fitted(recipe="note", max_iter=1, batch_size=45, learning_rate_init=0.25, depth=2, heads=4)
    assert runs[0].config.as_dict() == {
        **NOTE.as_dict(),
        "epochs": 1,
        "batch_size": 45,
        "learning_rate": 0.25,
        "validation": 0,
        "seed": runs[0].config.seed,
    }
    config = runs[0].model_config
    assert (config.depth, config.heads, config.classes, config.patch_size) == (2, 4, 3, 2)
    assert runs[0].step.workers == 1


@pytest.mark.parametrize(("count", "batch_size"), [(5, 1), (90, 11), (200, 16)])
def test_few_images_make_small_batches(runs, count, batch_size):
    fitted(np.resize(IMAGES, (count, 8, 8)), np.resize(LABELS, count), max_iter=1)
    assert runs[0].config.batch_size == batch_size


def test_an_integer_repeats_the_training_and_a_generator_draws_again():
    first, second = (fitted(max_iter=1).predict_proba(OTHERS) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, fitted(max_iter=1, random_state=1).predict_proba(OTHERS))
    model = TinyViTClassifier(**TINY | {"max_iter": 1, "random_state": np.random.RandomState(0)})
    results = [model.fit(IMAGES, LABELS).predict_proba(OTHERS) for _ in range(2)]
    assert np.array_equal(first, results[0])
    assert not np.array_equal(*results)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"recipe": "best"}, "recipe must be tuned, note or a TrainingConfig, not 'best'"),
        ({"recipe": None}, "recipe must be .* not None"),
        ({"max_iter": 0}, "max_iter must be an integer from 1 to below .*, not 0"),
        ({"max_iter": 2.0}, "max_iter must be an integer"),
        ({"learning_rate_init": 0}, "learning_rate .*must be a number above 0"),
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"width": None}, "width must be an integer from 1 .* not None"),
        ({"heads": 3}, "heads must divide width"),
        ({"patch_size": 3}, "patch_size must divide image_size"),
        ({"image_shape": 8}, r"images of shape \(8, 8\) are not 8: give rows, columns and any channels"),
        ({"image_shape": (8, 4)}, r"images of shape \(8, 8\) are not \(8, 4\)"),
        ({"image_shape": (4, 16)}, r"images of shape \(8, 8\) are not \(4, 16\)"),
        ({"early_stopping": "no"}, "early_stopping must be True or False, not 'no'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be a number above 0 to below 1, not 1.0"),
        ({"n_iter_no_change": 0}, "n_iter_no_change must be an integer from 1, not 0"),
        ({"tol": -1}, "tol must be a number from 0, not -1"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"random_state": "x"}, "'x' cannot be used to seed"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(parameters, message):
    model = TinyViTClassifier(**TINY | parameters)
    with pytest.raises(ValueError, match=message):
        model.fit(IMAGES, LABELS)


# ---- images and their scale ----


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)


@pytest.mark.parametrize(
    ("shape", "image_shape", "found"),
    [
        ((64,), None, (8, 8, 1)),
        ((784,), None, (28, 28, 1)),
        ((49,), None, (1, 49, 1)),
        ((65,), None, (1, 65, 1)),
        ((1,), None, (1, 1, 1)),
        ((64,), (1, 64), (1, 64, 1)),
        ((192,), [8, 8, 3], (8, 8, 3)),
        ((12,), np.array([4, 3]), (4, 3, 1)),
        ((8, 9), None, (8, 9, 1)),
        ((8, 9, 1), None, (8, 9, 1)),
        ((8, 9, 1), (8, 9), (8, 9, 1)),
        ((8, 9), (8, 9, 1), (8, 9, 1)),
        ((8, 8, 3), None, (8, 8, 3)),
    ],
)
def test_the_shape_of_images(shape, image_shape, found):
    model = fitted(random_images(*shape), LABELS[:6], max_iter=1, image_shape=image_shape)
    assert model.image_shape_ == found


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [((64,), (8, 9)), ((64,), (-8, -8)), ((64,), (64,)), ((64,), ()), ((64,), (8.0, 8.0)), ((64,), "88"),
     ((2, 2, 2, 2), None), ((8, 9), (9, 8)), ((8, 8, 3), (8, 24)), ((8, 24), (8, 8, 3))],
)  # fmt: skip
def test_shapes_that_are_not_those_of_images(shape, image_shape):
    with pytest.raises(ValueError, match="give rows, columns and any channels"):
        fitted(random_images(*shape), LABELS[:6], image_shape=image_shape)


def test_rows_of_numbers_are_the_images_that_they_contain():
    model = fitted(max_iter=2)
    for X in (IMAGES.reshape(90, 64), IMAGES[..., None], IMAGES.tolist()):
        other = fitted(X, max_iter=2)
        for images in (OTHERS, OTHERS.reshape(90, 64), OTHERS[..., None], OTHERS.tolist()):
            assert np.array_equal(other.predict_proba(images), model.predict_proba(OTHERS))


def test_colours():
    colours = np.stack([IMAGES, 16 - IMAGES, 0 * IMAGES], axis=3)
    model = fitted(colours)
    assert (model.image_shape_, model.model_.config.channels, model.n_features_in_) == ((8, 8, 3), 3, 192)
    assert model.score(colours, LABELS) > 0.9
    flat = fitted(colours.reshape(90, 192), image_shape=(8, 8, 3))
    assert np.array_equal(flat.predict_proba(colours), model.predict_proba(colours))
    with pytest.raises(ValueError, match="which moves the channels to the end"):
        fitted(np.moveaxis(colours, 3, 1))


def test_images_of_another_size_are_refused():
    model = fitted(IMAGES[:, :4], max_iter=1)
    with pytest.raises(ValueError, match="X has 64 features, but TinyViTClassifier is expecting 32 features"):
        model.predict(OTHERS)
    with pytest.raises(ValueError, match=r"images of shape \(8, 4\) are not \(4, 8, 1\)"):
        model.predict(OTHERS[:, :, :4])


@pytest.mark.parametrize(("features", "columns", "patch"), [(5, 5, 1), (16, 16, 1), (17, 18, 2), (49, 52, 4)])
def test_features_are_patches_of_one_row_without_augmentation(runs, features, columns, patch):
    X = np.random.default_rng(0).normal(size=(60, features))
    model = fitted(X, X[:, -1] > 0, recipe="tuned", max_iter=1)
    assert model.model_.config.image_shape == (1, columns)
    assert model.model_.config.patch_shape == (1, patch)
    assert not runs[0].config.augmentation
    pixels = runs[0].images.reshape(60, columns)
    assert np.array_equal(pixels[:, :features], np.round(255 * (X - X.min()) / np.ptp(X)))
    assert (pixels[:, features:] == 0).all()
    assert np.array_equal(model.predict_proba(X), model.model_.predict_proba(runs[0].images).astype(np.float32))


def test_images_of_one_column_are_features_too(runs):
    model = fitted(IMAGES.reshape(90, 64, 1)[:, :35], max_iter=1, recipe="tuned")
    assert (model.model_.config.image_shape, model.model_.config.patch_shape) == ((36, 1), (3, 1))
    assert not runs[0].config.augmentation
    assert fitted(IMAGES, max_iter=1, recipe="tuned").model_.config.image_shape == (8, 8)
    assert runs[1].config.augmentation


def test_a_patch_size_that_divides_is_used_for_features():
    assert fitted(IMAGES.reshape(90, 64)[:, :33], patch_size=(1, 11), max_iter=1).model_.config.grid == (1, 3)


def test_the_range_of_the_training_images_becomes_black_to_white(runs):
    model = fitted()
    assert model.pixel_range_ == (0.0, 16.0)
    assert runs[0].images.dtype == np.uint8
    assert np.array_equal(runs[0].images, np.round(IMAGES * (255 / 16)))
    for change in (lambda X: X / 16 - 3, lambda X: (X * 15).astype(np.uint8), lambda X: X.astype(np.float32) * 1e30):
        other = fitted(change(IMAGES))
        assert np.array_equal(other.predict_proba(change(OTHERS)), model.predict_proba(OTHERS))


def test_numbers_outside_the_range_are_clipped():
    model = fitted(max_iter=1)
    beyond = np.where(OTHERS > 8, OTHERS + 1000, OTHERS - 1000)
    clipped = np.where(OTHERS > 8, 16, 0)
    assert np.array_equal(model.predict_proba(beyond), model.predict_proba(clipped))
    assert not np.array_equal(model.predict_proba(beyond), model.predict_proba(OTHERS))


def test_more_images_than_one_block_are_scaled(monkeypatch):
    model = fitted(max_iter=1)
    expected = model.predict_proba(OTHERS)
    monkeypatch.setattr(tinyvit.sklearn, "BLOCK", 7)
    assert np.array_equal(model.predict_proba(OTHERS), expected)


def test_constant_images_are_no_error():
    assert np.isfinite(fitted(np.full((9, 8, 8), 3.5), LABELS[:9], max_iter=1).predict_proba(OTHERS)).all()


# ---- the training ----


def test_early_stopping_keeps_the_best_weights(runs):
    chance = np.random.default_rng(0).permutation(LABELS)  # nothing to learn, so the accuracy does not rise for long
    model = fitted(y=chance, early_stopping=True, validation_fraction=0.2, n_iter_no_change=2, max_iter=50)
    scores = model.validation_scores_
    assert len(scores) == len(model.loss_curve_) == model.n_iter_ == len(runs[0].weights) < 50
    best = int(np.argmax(scores))
    assert best == len(scores) - 4  # more than two epochs without an improvement
    assert model.best_validation_score_ == scores[best]
    assert np.array_equal(model.model_.parameters.flat, runs[0].weights[best].flat)
    held_out, labels = runs[0].validation
    assert np.bincount(labels).tolist() == [6, 6, 6]  # the same share of each class
    assert model.model_.evaluate(held_out, labels).accuracy == scores[best]
    assert runs[0].train_images == 72


def test_early_stopping_counts_only_improvements_of_at_least_tol():
    model = fitted(early_stopping=True, tol=2.0, n_iter_no_change=3)
    assert model.n_iter_ == 5
    assert model.best_validation_score_ == max(model.validation_scores_)


def test_early_stopping_ends_at_max_iter():
    model = fitted(early_stopping=True, n_iter_no_change=20)
    assert model.n_iter_ == len(model.validation_scores_) == 8


def test_held_out_images_follow_from_the_random_state(runs):
    for seed in (0, 0, 1):
        fitted(early_stopping=True, max_iter=1, random_state=seed)
    first, second, other = (run.validation[0] for run in runs)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_ctrl_c_is_a_keyboard_interrupt(monkeypatch):
    model = fitted(max_iter=1)
    monkeypatch.setattr(Progress, "on_epoch", lambda self, run: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        model.fit(IMAGES, LABELS == "left")
    with pytest.raises(NotFittedError):  # the old model has other classes
        model.predict(IMAGES)


def test_only_verbose_prints(capsys):
    fitted(max_iter=2)
    assert capsys.readouterr().out == ""
    fitted(max_iter=2, verbose=True)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/2", "2/2"]


@pytest.mark.extended
def test_several_workers(runs):
    model = fitted(workers=2, max_iter=1)
    assert runs[0].step.workers == 2
    np.testing.assert_allclose(model.predict_proba(OTHERS), fitted(max_iter=1).predict_proba(OTHERS), rtol=1e-3)


@pytest.mark.extended
def test_another_device(strict_gpu):
    model, expected = fitted(device="gpu", max_iter=1), fitted(max_iter=1)
    assert type(model.model_.parameters.flat) is not np.ndarray
    probabilities = model.predict_proba(OTHERS)
    assert type(probabilities) is np.ndarray
    np.testing.assert_allclose(probabilities, expected.predict_proba(OTHERS), rtol=1e-3)


# ---- the tools of scikit-learn ----


def test_a_search_in_a_pipeline():
    X = IMAGES.reshape(90, 64)
    pipeline = make_pipeline(StandardScaler(), TinyViTClassifier(**TINY))
    search = GridSearchCV(pipeline, {"tinyvitclassifier__learning_rate_init": [1e-2, 1e-7]}, cv=2)
    search.fit(X, LABELS)
    assert search.best_params_ == {"tinyvitclassifier__learning_rate_init": 1e-2}
    assert search.score(OTHERS.reshape(90, 64), OTHER_LABELS) > 0.9


def test_cross_validation_of_images():
    assert cross_val_score(TinyViTClassifier(**TINY), IMAGES, LABELS, cv=3).mean() > 0.9


@pytest.mark.extended
def test_cross_validation_in_processes_gives_the_same():
    one, several = (
        cross_val_score(TinyViTClassifier(**TINY | {"max_iter": 2}), IMAGES, LABELS, cv=3, n_jobs=jobs)
        for jobs in (1, 2)
    )
    assert np.array_equal(one, several)


@pytest.mark.extended
def test_a_halving_search_over_epochs():
    search = HalvingRandomSearchCV(
        TinyViTClassifier(**TINY),
        {"learning_rate_init": [1e-2, 1e-7], "width": np.array([8, 16]), "patch_size": [2, (4, 2)]},
        resource="max_iter",
        min_resources=1,
        max_resources=8,
        factor=2,
        cv=2,
        random_state=0,
    )
    search.fit(IMAGES, LABELS)
    assert search.best_params_["learning_rate_init"] == 1e-2
    assert search.best_estimator_.n_iter_ == 8
    assert search.score(OTHERS, OTHER_LABELS) > 0.9


@pytest.mark.extended
def test_calibration():
    model = CalibratedClassifierCV(TinyViTClassifier(**TINY), cv=2).fit(IMAGES, LABELS)
    assert model.score(OTHERS, OTHER_LABELS) > 0.9


@pytest.mark.extended
def test_it_learns_digits():
    X, y = load_digits(return_X_y=True)
    model = TinyViTClassifier(width=32, depth=2, learning_rate_init=5e-3, random_state=0).fit(X[:1400], y[:1400])
    assert model.score(X[1400:], y[1400:]) > 0.85


@pytest.mark.extended
def test_the_comparison_with_another_classifier_runs(tmp_path):
    script, path = ROOT / "benchmarks" / "sklearn_peers.py", tmp_path / "found.json"
    command = [sys.executable, str(script), "--images", "100", "--epochs", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert {"cpu", "numpy", "scikit-learn", "command"} <= set(found["conditions"])
    records = [(record["data"], record["classifier"]) for record in found["records"]]
    names = "MLPClassifier", "TinyViTClassifier"
    assert records == [(data, name) for data in ("digits", "mnist") for name in names]
    assert len(done.stdout.splitlines()) == 4
    for record in found["records"]:
        assert record["train_images"] == 100
        assert 0.05 < record["accuracy"] < 1
        assert record["epochs"] == 1 or record["classifier"] == "MLPClassifier"
