"""A classifier with the interface of scikit-learn, for pipelines, cross-validation and searches over settings."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from tinyvit.checks import require_number
from tinyvit.classifier import VisionTransformer, fitting_config
from tinyvit.data.augment import Augmentation
from tinyvit.evaluate import parallel_logits
from tinyvit.gpu import get_backend
from tinyvit.ops import softmax_forward
from tinyvit.training import RECIPES, Training, TrainingConfig, TrainingStopped
from tinyvit.training.progress import Progress

try:
    from sklearn.utils.validation import validate_data as _validate_data
except ImportError:  # scikit-learn 1.5 has a method in its place
    _validate_data = BaseEstimator._validate_data


BLOCK = 1000  # images that are scaled at a time, since a float64 copy of all images would be large
LEAST_SQUARE = 64  # numbers of the smallest row that is taken for a square image
MOST_PATCHES = 16  # in an image with one row or column
FEWEST_STEPS = 8  # per epoch of all images, unless a batch size is given
TRAINING = {"max_iter": "epochs", "learning_rate_init": "learning_rate", "batch_size": "batch_size"}
LIMITS = {  # of numbers that are not checked elsewhere
    "max_iter": {"minimum": 1, "maximum": 2**32, "integer": True, "below": True},
    "width": {"minimum": 1, "maximum": 25_000, "integer": True},  # a quarter of the limit for the MLP
    "validation_fraction": {"minimum": 0, "maximum": 1, "above": True, "below": True},
    "n_iter_no_change": {"minimum": 1, "maximum": math.inf, "integer": True},
    "tol": {"minimum": 0, "maximum": math.inf},
}


class TinyViTClassifier(ClassifierMixin, BaseEstimator):
    """A Vision Transformer with the interface of a classifier of scikit-learn.

    Parameters have the names of `sklearn.neural_network.MLPClassifier` where both have them. They are checked in
    `fit`.

    Parameters
    ----------
    recipe : {"tuned", "note"} or TrainingConfig, optional
        The settings of the training that have no parameter here. The validation of a `TrainingConfig` is ignored.
    max_iter : int, optional
        Number of epochs. The learning rate of a recipe with a schedule decreases over this number.
    learning_rate_init : float, optional
        The learning rate of Adam. Default: that of the recipe.
    batch_size : int, optional
        Number of images per step. Default: that of the recipe, 64. If there are few images, batches are smaller by
        default, so that an epoch has about 8 steps.
    image_shape : tuple of int, optional
        Rows and columns of an image, and channels if there are several. By default the images or the length of the
        rows of numbers define it, as described below.
    patch_size : int or tuple of int, optional
        Rows and columns of a patch in pixels, divisors of those of an image. Default: derived from the images.
    width : int, optional
        Length of a token. The MLP of each block is four times as wide.
    depth : int, optional
        Number of blocks.
    heads : int, optional
        Number of heads per block, a divisor of `width`.
    early_stopping : bool, optional
        Whether to hold out images for validation, to stop when their accuracy no longer improves, and to keep the
        weights of the best epoch.
    validation_fraction : float, optional
        Share of the images of each class that early stopping holds out.
    n_iter_no_change : int, optional
        Number of epochs without an improvement that early stopping accepts. One more ends the training.
    tol : float, optional
        Smallest change of the validation accuracy that counts as an improvement.
    random_state : int, RandomState or None, optional
        Source of the weights, the order of the images, the augmentation and the held-out images. With an integer,
        each `fit` gives the same result.
    device : {"cpu", "gpu", "auto"}, optional
        Where to compute.
    workers : int, optional
        Number of processes that train and of threads that predict. With the default, 1, `n_jobs` of scikit-learn
        decides how many cores compute. None means one per core.
    verbose : bool, optional
        Whether to print a line per epoch.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    n_features_in_ : int
        Count of numbers per image, P.
    feature_names_in_ : ndarray of shape (P,)
        Names of the columns, if the images were a data frame whose column names are all strings.
    image_shape_ : tuple of (int, int, int)
        Rows, columns and channels of an image.
    pixel_range_ : tuple of (float, float)
        The smallest and the largest number in the training images, which become black and white.
    n_iter_ : int
        Number of finished epochs.
    loss_curve_ : list of float
        Mean training loss of each epoch, with the label smoothing and the augmentation of the recipe.
    validation_scores_ : list of float or None
        Validation accuracy after each epoch, with early stopping.
    best_validation_score_ : float or None
        The accuracy of the epoch whose weights were kept, with early stopping.
    model_ : VisionTransformer
        The trained model, whose `save` writes a file for the other interfaces of tinyvit.

    Notes
    -----
    X has the shape (N, rows, columns) or (N, rows, columns, channels), or (N, P) if each row of numbers is one image.
    Such rows are images of `image_shape`. By default they are square images of one channel if P is a square number
    from 64 on. Any other row is a list of features, which becomes an image of 1 x P pixels.

    Images with only one row or one column are divided into at most 16 patches. Black pixels fill the last patch.
    These images are not augmented, because a feature in the place of another one means something else.

    All numbers share one scale. The smallest number in the training images becomes 0, the largest 255, and the others
    are rounded to integers between them. `predict` clips numbers outside this range. If features have different
    units, put a scaler before this classifier in a pipeline.

    Sample weights, several labels per image, `warm_start` and `partial_fit` are not supported.
    """

    def __init__(
        self,
        recipe: str | TrainingConfig = "tuned",
        *,
        max_iter: int = 20,
        learning_rate_init: float | None = None,
        batch_size: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
        workers: int | None = 1,
        verbose: bool = False,
    ) -> None:
        self.recipe = recipe
        self.max_iter = max_iter
        self.learning_rate_init = learning_rate_init
        self.batch_size = batch_size
        self.image_shape = image_shape
        self.patch_size = patch_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.random_state = random_state
        self.device = device
        self.workers = workers
        self.verbose = verbose

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> "TinyViTClassifier":
        """Train a new model.

        Parameters
        ----------
        X : array_like of shape (N, R, C), (N, R, C, channels) or (N, P)
            Images, or rows of numbers.
        y : array_like of shape (N,)
            Labels, integers or strings.

        Returns
        -------
        TinyViTClassifier
            This object.

        Raises
        ------
        ValueError
            If images, labels and parameters do not fit each other.
        TrainingDiverged
            If the loss or a weight becomes NaN or infinite.
        """
        self.__dict__.pop("model_", None)  # after an error this object is not fitted
        numbers, shape = _rows_and_shape(X)
        numbers, y = _validate_data(self, numbers, y)
        rng = check_random_state(self.random_state)
        config, model = self._settings(count=len(numbers), seed=int(rng.randint(2**31 - 1)))
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self.image_shape_ = _shape_of_images(shape, _plain(self.image_shape))
        self.pixel_range_ = float(numbers.min()), float(numbers.max())

        rows, columns, channels = self.image_shape_
        if 1 in (rows, columns):
            config = replace(config, augmentation=Augmentation())
            if self.patch_size is None:
                height, width = model["patch_size"] = -(-rows // MOST_PATCHES), -(-columns // MOST_PATCHES)
                rows, columns = -(-rows // height) * height, -(-columns // width) * width
        images = self._pixels(numbers, (rows, columns, channels))

        if self.early_stopping:  # the images for validation are the last ones
            parts = train_test_split(images, labels, test_size=self.validation_fraction, stratify=y, random_state=rng)
            images, labels = np.concatenate(parts[:2]), np.concatenate(parts[2:])
            config = replace(config, validation=len(parts[1]))
        fitting = fitting_config(images, labels, class_names=tuple(map(str, self.classes_)), **model)
        run = Training(fitting, config, images, labels, get_backend(self.device), workers=self.workers)
        self.model_ = VisionTransformer(fitting, self._trained_weights(run))
        self.n_iter_ = run.state.epoch
        self.loss_curve_ = [record["train_loss"] for record in run.state.history]
        scores = [record["validation_accuracy"] for record in run.state.history] if self.early_stopping else None
        self.validation_scores_, self.best_validation_score_ = scores, max(scores) if scores else None
        return self

    def predict(self, X: npt.ArrayLike) -> np.ndarray:
        """Return the most probable label of each image.

        Parameters
        ----------
        X : array_like of shape (N, R, C), (N, R, C, channels) or (N, P)
            Images of the shape of the training images, or rows of numbers.

        Returns
        -------
        ndarray of shape (N,)
            Labels.
        """
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def predict_proba(self, X: npt.ArrayLike) -> np.ndarray:
        """Return the probability of each label.

        Parameters
        ----------
        X : array_like of shape (N, R, C), (N, R, C, channels) or (N, P)
            Images of the shape of the training images, or rows of numbers.

        Returns
        -------
        ndarray of shape (N, n_classes)
            Probabilities, float32 as the weights, in the order of `classes_`.
        """
        return softmax_forward(self._logits(X).astype(np.float64))[0].astype(np.float32)

    def __sklearn_tags__(self):  # called by scikit-learn from 1.6 on
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _settings(self, count, seed):
        """Check the parameters, and return the settings of a training on `count` images and a dict of the model's."""
        given = {name: _plain(value) for name, value in self.get_params(deep=False).items() if value is not None}
        recipe = RECIPES.get(self.recipe) if isinstance(self.recipe, str) else self.recipe
        if not isinstance(recipe, TrainingConfig):
            raise ValueError(f"recipe must be {', '.join(RECIPES)} or a TrainingConfig, not {self.recipe!r}")
        if self.early_stopping not in (True, False):
            raise ValueError(f"early_stopping must be True or False, not {self.early_stopping!r}")
        for name, limit in LIMITS.items():
            require_number(name, given.get(name), **limit)
        changes = {"batch_size": max(1, min(recipe.batch_size, count // FEWEST_STEPS))}
        changes |= {setting: given[name] for name, setting in TRAINING.items() if name in given}
        model = {name: given[name] for name in ("patch_size", "width", "depth", "heads") if name in given}
        return replace(recipe, validation=0, seed=seed, **changes), model | {"mlp_width": 4 * given["width"]}

    def _trained_weights(self, run):
        """Train, and return the weights of the last epoch or, with early stopping, of the best one."""
        best = SimpleNamespace(score=-math.inf, epochs_since=0, weights=run.state.weights)

        def on_epoch(run):
            progress.on_epoch(run)
            if self.early_stopping:
                score = run.state.history[-1]["validation_accuracy"]
                best.epochs_since = best.epochs_since + 1 if score < best.score + self.tol else 0
                if score > best.score:
                    best.score, best.weights = score, copy.copy(run.state.weights)
                run.stop_requested |= best.epochs_since > self.n_iter_no_change

        try:
            with Progress(run, silent=not self.verbose) as progress:
                run.run(on_step=progress.on_step, on_epoch=on_epoch)
        except TrainingStopped as error:
            if error.signal is not None:  # Ctrl-C or SIGTERM, not early stopping
                raise KeyboardInterrupt from error
        return best.weights

    def _pixels(self, X, shape):
        """Return rows of numbers as images of a shape, uint8."""
        pixels = np.zeros((len(X), math.prod(shape)), np.uint8)
        for block in gen_batches(len(X), BLOCK):  # `interp` clips
            pixels[block, : X.shape[1]] = np.interp(X[block], self.pixel_range_, (0, 255)).round()
        return pixels.reshape(len(X), *shape[: 2 if shape[2] == 1 else 3])

    def _logits(self, X):
        """Return the logits of images."""
        check_is_fitted(self, "model_")
        X, shape = _rows_and_shape(X)
        X, config = _validate_data(self, X, reset=False), self.model_.config
        _shape_of_images(shape, self.image_shape_)
        images = self._pixels(X, (*config.image_shape, config.channels))
        return parallel_logits(images, self.model_.parameters, config, workers=self.workers)


def _plain(value):
    """Return NumPy's numbers as those of Python, and sequences of numbers as tuples."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _rows_and_shape(X):
    """Return images as rows of numbers, and the shape of one image. Rows of numbers and tables are unchanged."""
    X = X if hasattr(X, "shape") else np.asarray(X)
    rows = np.asarray(X).reshape(X.shape[0], math.prod(X.shape[1:])) if len(X.shape) > 2 else X
    return rows, tuple(X.shape[1:])


def _shape_of_images(shape, expected=None):
    """Return rows, columns and channels of images, from the shape of an image or of a row of numbers.

    expected: rows, columns and any channels that the images must have, or None.
    """
    side = math.isqrt(shape[0])
    row = (side, side) if side**2 == shape[0] >= LEAST_SQUARE else (1, shape[0])
    found = expected if expected is not None else shape if len(shape) > 1 else row
    fits = isinstance(found, tuple) and len(found) in (2, 3) and all(isinstance(n, int) and n > 0 for n in found)
    if not fits or math.prod(found) != math.prod(shape) or (len(shape) > 1 and (*found, 1)[:3] != (*shape, 1)[:3]):
        raise ValueError(f"images of shape {shape} are not {found}: give rows, columns and any channels")
    return (*found, 1)[:3]
