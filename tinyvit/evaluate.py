"""Measure a model: accuracy, loss, confusion, mistakes, calibration, and where its attention goes."""

import contextvars
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyvit.backend import (
    array_module,
    available_cores,
    one_blas_thread,
    quiet_joblib,
    to_host,
    use_loops_for_many,
)
from tinyvit.checks import arguments_checked, as_array, as_labels, require_scalar
from tinyvit.model import ViTConfig, block_attention, check_inputs, vit_forward, vit_logits
from tinyvit.ops import cross_entropy_forward, softmax_forward
from tinyvit.parameters import Parameters

CHUNK, GPU_CHUNK = 128, 500  # images that one thread computes before it takes the next ones


@dataclass(frozen=True, eq=False)  # comparing arrays with == gives no single truth value
class Evaluation:
    """The predictions of a model for N labelled images of C classes.

    Parameters
    ----------
    probabilities : ndarray of shape (N, C)
        The probability of each class, float64. Each row sums to 1.
    predictions : ndarray of shape (N,)
        The most probable class of each image, integers.
    labels : ndarray of shape (N,)
        The true classes, integers in 0 to C - 1.
    accuracy : float
        Share of correct predictions, 0 to 1.
    loss : float
        Mean cross-entropy in nats, without label smoothing.
    """

    probabilities: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    accuracy: float
    loss: float

    def __repr__(self):
        return f"Evaluation(accuracy={self.accuracy:.4f}, loss={self.loss:.4f}, {len(self.labels):,} images)"

    @property
    def confidences(self) -> np.ndarray:
        """The probability of each prediction, (N,) float64."""
        return self.probabilities.max(axis=1)


def evaluate(
    images: npt.ArrayLike,
    labels: npt.ArrayLike,
    parameters: Parameters,
    config: ViTConfig,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Classify images and compare the predictions with the labels.

    Parameters
    ----------
    images : array_like of shape (N, R, C)
        Either uint8, or float in 0 to 1, on the CPU or on the device of the parameters.
    labels : array_like of shape (N,)
        The true classes, integers in 0 to classes - 1.
    parameters : Parameters
        The weights.
    config : ViTConfig
        The settings of the model.
    batch_size : int, optional
        Number of images per chunk. Default: 128, and 500 on a GPU.
    workers : int, optional
        Number of threads. Default: one per core. Each computes one chunk at a time with one BLAS thread, so their
        number does not change the result.
    progress : callable, optional
        Called after each chunk with its number of images, as `tqdm.update`.

    Returns
    -------
    Evaluation
        The predictions, the accuracy and the loss.

    Raises
    ------
    ValueError
        If images or labels do not fit the model, or `batch_size` or `workers` is below 1.
    ArithmeticError
        If a logit is not finite.
    """
    images = check_inputs(images, parameters, config, wait=True)
    labels = as_labels(labels, len(images), config.classes)
    logits = parallel_logits(
        images,
        parameters,
        config,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    return evaluation_of_logits(logits, labels)


def parallel_logits(
    images: npt.ArrayLike,
    parameters: Parameters,
    config: ViTConfig,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Return the logits of images, computed by several threads with one BLAS thread each.

    From 5,000 images on, compiled loops are used if they are available (`use_loops_for_many`).

    Parameters
    ----------
    images : array_like of shape (N, R, C)
        Either uint8, or float in 0 to 1, on the CPU or on the device of the parameters.
    parameters : Parameters
        The weights.
    config : ViTConfig
        The settings of the model.
    batch_size : int, optional
        Number of images per chunk. Default: 128, and 500 on a GPU.
    workers : int, optional
        Number of threads. Default: one per core. Their number does not change the result.
    progress : callable, optional
        Called after each chunk with its number of images.

    Returns
    -------
    ndarray of shape (N, classes)
        The logits.

    Raises
    ------
    ValueError
        If images do not fit the model, or `batch_size` or `workers` is below 1.
    ArithmeticError
        If a logit is not finite.
    """
    images = check_inputs(images, parameters, config, wait=True)
    on_cpu = array_module(parameters.flat) is np
    batch_size = (CHUNK if on_cpu else GPU_CHUNK) if batch_size is None else batch_size
    for name, value in (("batch_size", batch_size), ("workers", 1 if workers is None else workers)):
        require_scalar(name, value, minimum=1, maximum=math.inf, integer=True)
    starts = range(0, len(images), batch_size)
    several = on_cpu and len(starts) > 1
    threads = min(available_cores() if workers is None else workers, len(starts)) if several else 1
    chunks = []
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        stack.enter_context(use_loops_for_many(len(images)))
        stack.enter_context(arguments_checked())
        context = contextvars.copy_context()  # each thread gets the caller's choice of loops and of NumPy's warnings

        def chunk_logits(start):
            chunk = images[start : start + batch_size]
            return context.copy().run(vit_logits, chunk, parameters, config)

        run = map if threads == 1 else stack.enter_context(ThreadPoolExecutor(threads)).map
        for logits in run(chunk_logits, starts):
            chunks.append(logits)
            if progress is not None:
                progress(len(logits))
    return np.concatenate(chunks)


def evaluation_of_logits(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Evaluation:
    """Return the evaluation of logits that are already computed. All sums are in float64.

    Parameters
    ----------
    logits : array_like of shape (N, C)
        The output of the model, float.
    labels : array_like of shape (N,)
        The true classes, integers in 0 to C - 1.

    Returns
    -------
    Evaluation
        The predictions, the accuracy and the loss.

    Raises
    ------
    ValueError
        If logits and labels do not fit each other.
    ArithmeticError
        If a logit is not finite.
    """
    logits = to_host(as_array("logits", logits)).astype(np.float64)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must have the shape (N, C), not {logits.shape}")
    labels = as_labels(labels, *logits.shape)
    if not np.isfinite(logits).all():
        raise ArithmeticError("the model's logits contain NaN or infinity: check its weights")
    probabilities, _ = softmax_forward(logits)
    loss, _ = cross_entropy_forward(logits, labels)
    predictions = logits.argmax(axis=1)
    return Evaluation(
        probabilities=probabilities,
        predictions=predictions,
        labels=labels,
        accuracy=float((predictions == labels).mean()),
        loss=float(loss),
    )


def classification_report(evaluation: Evaluation, class_names: Sequence[str] | None = None) -> str:
    """Return a text table with the precision, recall and F1 score of each class.

    Parameters
    ----------
    evaluation : Evaluation
        The predictions and labels.
    class_names : sequence of str, optional
        One name per class. Default: "0", "1" and so on.

    Returns
    -------
    str
        The table, with four decimals. A score whose denominator is zero is 0.0000.

    Raises
    ------
    ValueError
        If the number of names is not the number of classes.
    """
    classes = evaluation.probabilities.shape[1]
    names = [str(i) for i in range(classes)] if class_names is None else list(class_names)
    if len(names) != classes:
        raise ValueError(f"give one name per class: {classes} names, not {len(names)}")
    with quiet_joblib():
        from sklearn import metrics  # imported here because it takes 60 MB, which training does not need

    return metrics.classification_report(
        evaluation.labels,
        evaluation.predictions,
        labels=range(classes),
        target_names=names,
        digits=4,
        zero_division=0,
    )


def confusion(evaluation: Evaluation) -> np.ndarray:
    """Return the confusion matrix.

    Parameters
    ----------
    evaluation : Evaluation
        The predictions and labels.

    Returns
    -------
    ndarray of shape (C, C)
        Number of images per true class (row) and predicted class (column).
    """
    with quiet_joblib():
        from sklearn import metrics

    classes = evaluation.probabilities.shape[1]
    return metrics.confusion_matrix(evaluation.labels, evaluation.predictions, labels=range(classes))


def misclassified(evaluation: Evaluation, limit: int | None = None) -> np.ndarray:
    """Return the indices of the misclassified images, the most confident first.

    Parameters
    ----------
    evaluation : Evaluation
        The predictions and labels.
    limit : int, optional
        The largest number of indices. Default: no limit.

    Returns
    -------
    ndarray of int
        The indices. Equally confident mistakes are in the order of the data.
    """
    if limit is not None:
        require_scalar("limit", limit, minimum=0, maximum=math.inf, integer=True)
    wrong = np.flatnonzero(evaluation.predictions != evaluation.labels)
    order = np.argsort(-evaluation.confidences[wrong], kind="stable")
    return wrong[order][:limit]


def calibration_error(evaluation: Evaluation, bins: int = 15) -> float:
    """Return the expected calibration error [1]_, the mean difference between confidence and accuracy per bin.

    Parameters
    ----------
    evaluation : Evaluation
        The predictions and labels.
    bins : int, optional
        Number of equal intervals into which the confidences from 0 to 1 are divided.

    Returns
    -------
    float
        The error, 0 to 1.

    References
    ----------
    .. [1] Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    require_scalar("bins", bins, minimum=1, maximum=math.inf, integer=True)
    confidences = evaluation.confidences
    surplus = confidences - (evaluation.predictions == evaluation.labels)
    # As in the paper, a bin contains its upper edge but not its lower edge.
    places = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(places, weights=surplus, minlength=bins)).sum() / len(surplus))


def attention_rollout(images: npt.ArrayLike, parameters: Parameters, config: ViTConfig) -> np.ndarray:
    """Return the relevance of each patch for the class token, by attention rollout [1]_.

    Each block is modelled as a mixing of tokens, half from the residual branch and half from the mean attention of
    its heads. The product of these matrices over all blocks gives the share of each patch in the class token.

    Parameters
    ----------
    images : array_like of shape (B, R, C)
        Images as for `vit_forward`, on the CPU or on the device of the parameters.
    parameters : Parameters
        The weights.
    config : ViTConfig
        The settings of the model.

    Returns
    -------
    ndarray of shape (B, N)
        NumPy, float64. One share per patch, row by row. The shares of an image and that of the initial class token
        add up to 1.

    Raises
    ------
    ValueError
        If the images do not fit the model.
    ArithmeticError
        If an attention weight is NaN.

    References
    ----------
    .. [1] Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    images = check_inputs(images, parameters, config, wait=True)
    _, cache = vit_forward(array_module(parameters.flat).asarray(images), parameters, config)
    relevance = rollout_of_attention([to_host(weights) for weights in block_attention(cache)])
    if not np.isfinite(relevance).all():
        raise ArithmeticError("the model's attention contains NaN: check its weights")
    return relevance


def rollout_of_attention(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the attention rollout of attention weights that are already computed.

    Parameters
    ----------
    blocks : list of ndarray
        The attention weights of all blocks, (B, H, S, T) each, as `block_attention` returns them.

    Returns
    -------
    ndarray of shape (B, N)
        The relevance of each patch, as from `attention_rollout`.
    """
    shares = [residual_attention(weights) for weights in blocks]
    # The result needs only the class token's row of the product of all blocks, so the product is computed as that
    # row times one block after the other. The last block computes no other row.
    row = shares[-1][:, :1]  # (B, 1, T)
    for block in reversed(shares[:-1]):
        row = row @ block
    return row[:, 0, 1:]


def residual_attention(weights: np.ndarray) -> np.ndarray:
    """Return half the identity plus half the mean of the attention weights over the heads.

    Parameters
    ----------
    weights : ndarray of shape (B, H, S, T)
        Attention weights. The S tokens with a query are the first of all T tokens.

    Returns
    -------
    ndarray of shape (B, S, T)
        Shares, float64. Each row sums to 1.
    """
    mean = weights.mean(axis=1, dtype=np.float64)
    mean += np.eye(*mean.shape[1:])
    return mean / mean.sum(axis=-1, keepdims=True)


def patch_maps(relevance: np.ndarray, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Return the relevance of the patches as maps.

    Parameters
    ----------
    relevance : ndarray of shape (B, N)
        One number per patch, row by row.
    grid : tuple of int, optional
        Number of patches from top to bottom and from left to right, `ViTConfig.grid`. Default: a square.

    Returns
    -------
    ndarray of shape (B, down, across)
        One map per image.

    Raises
    ------
    ValueError
        If the grid does not have N patches, or no grid is given and N is not a square number.
    """
    batch, patches = relevance.shape
    down, across = (round(patches**0.5),) * 2 if grid is None else grid
    if down * across != patches:
        expected = "a square, or give the grid" if grid is None else f"{down} x {across}"
        raise ValueError(f"the number of patches must be {expected}, not {patches}")
    return relevance.reshape(batch, down, across)
