"""How well a model does and what it looks at: accuracy, report, confusion, errors, attention rollout."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from tinyvit.backend import array_module, one_blas_thread, to_host
from tinyvit.model import block_attention, check_images, vit_forward, vit_logits
from tinyvit.ops import cross_entropy_forward, softmax_forward

CHUNK = 500  # images: a moment of work, so that progress shows; `vit_logits` cuts it smaller


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Evaluation:
    """What a model said about some labelled images; every array is NumPy's, for N images and C classes."""

    probabilities: np.ndarray  # (N, C) float64, every row sums to 1
    predictions: np.ndarray  # (N,) integers, the most probable class
    labels: np.ndarray  # (N,) integers in 0..C-1
    accuracy: float  # share of right predictions, 0 to 1
    loss: float  # mean cross-entropy in nats, without label smoothing

    def __repr__(self):
        return f"Evaluation(accuracy={self.accuracy:.4f}, loss={self.loss:.4f}, {len(self.labels):,} images)"

    @property
    def confidences(self):
        """How probable each prediction was said to be, (N,) float64 in 0 to 1."""
        return self.probabilities.max(axis=1)


def evaluate(images, labels, parameters, config, batch_size=CHUNK, workers=1, progress=None):
    """Classify `images` and compare with `labels`.

    images: (N, R, C), uint8 or float in 0 to 1, on the parameters' device or on the CPU (then moved there one chunk
    at a time); labels: (N,) integers in 0..classes-1; parameters, config: of the model; batch_size: images per
    chunk; workers: chunks side by side, each with one BLAS thread, so that their number changes no bit of the
    result; progress: called with the number of images of each chunk that is done, as `tqdm.update` is.
    Returns an `Evaluation`. Raises `ValueError` if images or labels do not fit the model or each other, or if
    batch_size or workers is below 1, and `ArithmeticError` if a logit is not a finite number.
    """
    labels = to_host(labels)
    check_images(images, config)
    check_labels(labels, len(images), config.classes)
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, not {batch_size} and {workers}")

    def chunk_logits(start):
        # what overflows gives a logit that is not finite, and that is an error below: NumPy need not warn of it
        with np.errstate(over="ignore", invalid="ignore"):
            return vit_logits(images[start : start + batch_size], parameters, config)

    chunks = []
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        run = map if workers == 1 else stack.enter_context(ThreadPoolExecutor(workers)).map
        for logits in run(chunk_logits, range(0, len(images), batch_size)):
            chunks.append(logits)
            if progress is not None:
                progress(len(logits))
    return evaluation_of_logits(np.concatenate(chunks), labels)


def check_labels(labels, count, classes):
    """Raise `ValueError` unless `labels` are `count` integers in 0..classes-1."""
    if labels.shape != (count,) or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{count} images need {count} whole-number labels, not {labels.dtype} {labels.shape}"
        )
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ValueError(f"a label is {wrong[0]}, but the model has the classes 0 to {classes - 1}")


def evaluation_of_logits(logits, labels):
    """Return the `Evaluation` of logits (N, C) float against labels (N,), all sums in float64.

    Raises `ArithmeticError` if a logit is not a finite number: such a model has no prediction.
    """
    if not np.isfinite(logits).all():
        raise ArithmeticError("the model gives logits that are not finite numbers: look at its weights")
    logits = logits.astype(np.float64)
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


def classification_report(evaluation, class_names=None):
    """Return a text table of precision, recall and F1 for every class, with four digits.

    class_names: one string a class, by default "0", "1" and so on. A class that never occurs, or is never
    predicted, has 0.0000 where there is nothing to divide by. Raises `ValueError` on another number of names.
    """
    classes = evaluation.probabilities.shape[1]
    names = [str(i) for i in range(classes)] if class_names is None else list(class_names)
    if len(names) != classes:
        raise ValueError(f"{classes} classes need as many names, not {len(names)}")
    from sklearn import metrics  # here, as it takes 60 MB that training has no use for

    return metrics.classification_report(
        evaluation.labels,
        evaluation.predictions,
        labels=range(classes),
        target_names=names,
        digits=4,
        zero_division=0,
    )


def confusion(evaluation):
    """Return how many images of each class (rows) were taken for each class (columns): (C, C) integers."""
    from sklearn import metrics

    classes = evaluation.probabilities.shape[1]
    return metrics.confusion_matrix(evaluation.labels, evaluation.predictions, labels=range(classes))


def misclassified(evaluation, limit=None):
    """Return the indices of the wrong predictions, the most confident first, at most `limit` of them.

    Where two are equally confident, the one that comes first in the data comes first.
    """
    wrong = np.flatnonzero(evaluation.predictions != evaluation.labels)
    order = np.argsort(-evaluation.confidences[wrong], kind="stable")
    return wrong[order][:limit]


def calibration_error(evaluation, bins=15):
    """Return the expected calibration error, 0 to 1: how far confidence and accuracy lie apart on average.

    bins: into how many even parts the confidences from 0 to 1 are put.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    confidences = evaluation.confidences
    surplus = confidences - (evaluation.predictions == evaluation.labels)
    # a bin holds its upper edge, not its lower one, as in the paper
    places = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(places, weights=surplus, minlength=bins)).sum() / len(surplus))


def attention_rollout(images, parameters, config):
    """Return how much of what the class token holds in the end came from each patch: (B, N) float64, NumPy.

    images: (B, R, C) as `vit_forward` takes them, on the CPU or the parameters' device; N: patches, row by
    row. In every block a token is taken to be half itself (the residual branch) and half the mean of what its
    heads attend to; these shares multiply from the last block down to the patches. They are neither rescaled
    nor cut: what a row lacks of 1 is the class token's share of its own beginning.
    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3, attention
    rollout.
    """
    images = array_module(parameters.flat).asarray(images)
    _, cache = vit_forward(images, parameters, config)
    return rollout_of_attention([to_host(weights) for weights in block_attention(cache)])


def rollout_of_attention(blocks):
    """Return `attention_rollout` (B, N) of the attention weights of all blocks, as `block_attention` gives them."""
    shares = [residual_attention(weights) for weights in blocks]
    # The product of all blocks is (T, T), but only its class token's row is wanted. The last block kept just
    # that row; a row times the blocks below it is still that row, exactly the one of the whole product.
    row = shares[-1][:, :1]  # (B, 1, T)
    for block in reversed(shares[:-1]):
        row = row @ block
    return row[:, 0, 1:]


def residual_attention(weights):
    """Return half the identity plus half the mean over heads of `weights` (B, H, S, T): (B, S, T) float64.

    The S tokens that ask are the first of the T. Every row sums to 1.
    """
    mean = weights.mean(axis=1, dtype=np.float64)
    mean += np.eye(*mean.shape[1:])
    return mean / mean.sum(axis=-1, keepdims=True)


def patch_maps(relevance):
    """Return `relevance` (B, N) of N patches, row by row, as square maps (B, sqrt(N), sqrt(N)).

    Raises `ValueError` if N is not a square.
    """
    batch, patches = relevance.shape
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches do not make a square")
    return relevance.reshape(batch, side, side)
