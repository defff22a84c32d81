"""Draw the pictures of a run. Only this file imports matplotlib.

Every function draws on its own figure and never uses pyplot. So it needs no display, leaves no global state behind
and may run in any thread. Each PNG is replaced as a whole, and the same data give the same bytes.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tinyvit.files import write_atomically

DPI = 150  # 8 inches are 1200 pixels, which stay sharp where a README shows 900
WIDTH = 8.0  # inches
TEXT, SMALL = 9, 7.5  # points
LONGEST = 130  # points of the name of a class, about 25 characters

# Okabe and Ito 2008, "Color Universal Design": these colours differ for colour-blind readers, too.
TRAIN, VALIDATION = "#0072B2", "#D55E00"
INK, MUTED, FAINT, PAPER = "#222222", "#666666", "#E3E3E3", "#F8F8F8"

# Both maps end before they become too dark for black ink.
RELEVANCE = LinearSegmentedColormap.from_list("relevance", colormaps["YlOrBr"](np.linspace(0, 0.68, 256)))
MISTAKES = LinearSegmentedColormap.from_list("mistakes", colormaps["YlOrBr"](np.linspace(0.12, 0.68, 256)))

LEAST_ERROR = 0.01  # percent, one image of 10,000, since a logarithmic axis has no zero


def training_curves(history: list[dict[str, Any]], path: str | PathLike[str], note: str = "") -> None:
    """Draw loss and error per epoch, both on logarithmic axes, where 98 % and 99.5 % are far apart.

    A run of one epoch is a point with its value beside it. An error below 0.01 % is drawn at 0.01 %.

    Parameters
    ----------
    history : list of dict
        One record per epoch with "epoch" (from 1), "train_loss", "train_accuracy" and, if they exist,
        "validation_loss" and "validation_accuracy". Values that are not finite are left out.
    path : path-like
        The PNG to write, 1200 x 600 pixels.
    note : str, optional
        One line below the curves.

    Raises
    ------
    ValueError
        If the history is empty.
    """
    _check_history(history)
    figure = _figure(WIDTH, 4.0)
    figure.get_layout_engine().set(wspace=0.05)
    epochs = f"over {len(history)} epochs" if len(history) > 1 else "after one epoch"
    _write_title_and_note(figure, title=f"Training curves: loss and error {epochs}", note=note)
    loss, error = figure.subplots(1, 2)
    _loss_panel(loss, history)
    _error_panel(error, history)
    _save(figure, path)


def confusion_matrix(
    counts: npt.ArrayLike, path: str | PathLike[str], class_names: Sequence[str] | None = None
) -> None:
    """Draw a confusion matrix with the number of images in each cell.

    Only mistakes are coloured. The diagonal is grey. The right margin gives the recall of each class in percent.

    Parameters
    ----------
    counts : array_like of shape (C, C)
        Integers, with the true class in rows and the predicted class in columns.
    path : path-like
        The PNG to write, 960 x 1008 pixels for up to 20 classes of short names, and larger otherwise.
    class_names : sequence of str, optional
        One name per class. Default: "0", "1" and so on. Long names are shortened, and "class 3" takes the place of a
        name that the font cannot draw.
    """
    counts = np.asarray(counts)
    classes = len(counts)
    names = _class_labels(range(classes) if class_names is None else class_names, most=LONGEST, size=TEXT)
    diagonal = np.eye(classes, dtype=bool)
    mistaken = ~diagonal & (counts > 0)
    most = max(2, counts[mistaken].max(initial=0))

    cells = np.full((classes, classes, 3), to_rgb(PAPER))
    cells[diagonal] = to_rgb(FAINT)
    cells[mistaken] = MISTAKES(LogNorm(1, most)(counts[mistaken]))[:, :3]
    longest = max(_text_width(name, TEXT) for name in names)
    side = max(6.4, 0.3 * min(classes, 100))  # inches, so that three figures fit into a cell
    side += max(0, longest - 50) / 72  # long names do not make the cells smaller
    figure = _figure(side, side + 0.32)
    title = f"Confusion matrix: {counts.sum() - np.trace(counts):,} of {counts.sum():,} images misclassified"
    note = "Grey cells count correct predictions. Coloured cells count mistakes; a darker colour means more of them."
    _write_title_and_note(figure, title, note)
    axes = figure.subplots()
    axes.imshow(cells)
    if classes <= 100:  # more would not be readable
        _write_counts(axes, counts)
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 5 else {}
    if slant and classes > 20:
        slant["rotation"] = 90
    axes.set_xticks(range(classes), names, parse_math=False, **slant)
    axes.set_yticks(range(classes), names, parse_math=False)
    for edge in np.arange(1, classes) - 0.5:
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    axes.tick_params(length=0, labelsize=TEXT, colors=INK)
    axes.set_xlabel("predicted class", fontsize=TEXT, color=INK)
    axes.set_ylabel("true class", fontsize=TEXT, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    _save(figure, path)


def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    confidences: np.ndarray,
    wrong: Sequence[int] | np.ndarray,
    path: str | PathLike[str],
    limit: int = 36,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw misclassified images, each with its true class, its predicted class and the confidence.

    If nothing is misclassified, the picture says so.

    Parameters
    ----------
    images : ndarray of shape (N, R, C)
        Either uint8, or float in 0 to 1. Of 2 channels, or of more than 3, the mean is drawn.
    labels : ndarray of shape (N,)
        The true classes, integers.
    predictions : ndarray of shape (N,)
        The predicted classes, integers.
    confidences : ndarray of shape (N,)
        The probability of each prediction, 0 to 1.
    wrong : sequence of int
        Indices of the mistakes, the most confident first, as `evaluate.misclassified` returns them.
    path : path-like
        The PNG to write, 1200 pixels wide.
    limit : int, optional
        The largest number of images to draw.
    class_names : sequence of str, optional
        One name per class. Default: "0", "1" and so on. Names are replaced as in `confusion_matrix`.
    """
    shown = wrong[:limit]
    names = range(int(max(labels.max(), predictions.max())) + 1) if class_names is None else class_names
    names = _class_labels(names, most=LONGEST, size=SMALL)
    title = f"{len(wrong):,} of {len(labels):,} images misclassified"
    if not len(shown):
        figure = _figure(WIDTH, 1.2)
        figure.text(0.5, 0.5, title, ha="center", va="center", fontsize=TEXT + 3, color=INK)
        _save(figure, path)
        return

    title = f"Mistakes: {title}, the most confident first"
    title += f" ({len(shown)} shown)" if len(shown) < len(wrong) else ""
    used = {i for drawn in shown for i in (labels[drawn], predictions[drawn])}
    longest = max(_text_width(f"predicted {names[i]}", SMALL) for i in used)
    room = {columns: 72 * WIDTH / columns - 8 for columns in (6, 5, 4, 3)}  # points of a caption
    columns = next((columns for columns in room if longest <= room[columns]), 3)
    rows = math.ceil(len(shown) / columns)
    figure = _figure(WIDTH, 1.42 * rows + 0.65)
    _write_title_and_note(figure, title, "The percentage is the probability that the model gives its prediction.")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, shown, strict=False):
        _show_digit(axes, _unit(images[i]))
        true, predicted = names[labels[i]], names[predictions[i]]
        width = _text_width(f"true {true}, predicted {predicted}", SMALL)
        between = " " if width <= room[columns] else "\n"
        caption = f"true {true},{between}predicted {predicted}\n{_percent(confidences[i])}"
        axes.set_title(caption, fontsize=SMALL, color=INK, pad=3, linespacing=1.15, parse_math=False)
    _save(figure, path)


def augmentation_sheet(rows: Sequence[npt.ArrayLike] | np.ndarray, path: str | PathLike[str], note: str = "") -> None:
    """Draw images and random variants of them, one row per image, with the original in the first column.

    Parameters
    ----------
    rows : sequence of array_like of shape (n, R, C)
        Per row the original image and its variants, uint8 or float in 0 to 1. All rows have the same n.
    path : path-like
        The PNG to write, 1200 pixels wide.
    note : str, optional
        One line below the images.

    Raises
    ------
    ValueError
        If there is no image, or the rows differ in shape.
    """
    if not len(rows) or len({np.shape(row) for row in rows}) > 1 or not np.size(rows[0]):
        raise ValueError(f"give rows of equally many images, at least one, not {[np.shape(row) for row in rows]}")
    images = np.asarray([_unit(row) for row in rows])  # (rows, n, R, C)
    count, columns = images.shape[:2]
    figure = _figure(WIDTH, 0.85 + count * WIDTH / columns)
    _write_title_and_note(figure, "Augmentation: original training images and random variants", note)
    grid = figure.subplots(count, columns, squeeze=False)
    for axes, image in zip(grid.flat, images.reshape(-1, *images.shape[2:]), strict=True):
        _show_digit(axes, image)
    for column, axes in enumerate(grid[0]):
        heading = f"variant {column}" if column else "original"
        axes.set_title(heading, fontsize=SMALL, color=INK if column == 0 else MUTED, pad=4)
    _save(figure, path)


def explanations(
    pictures: Sequence[np.ndarray] | np.ndarray,
    images: np.ndarray,
    maps: np.ndarray,
    titles: Sequence[str],
    path: str | PathLike[str],
) -> None:
    """Draw one row per picture: the picture, the model's input, and the relevance of each patch.

    All rows share one colour scale, which begins at zero.

    Parameters
    ----------
    pictures : sequence of ndarray of shape (R, C)
        Grey levels in 0 to 1. The sizes may differ.
    images : ndarray of shape (B, R, C)
        The model's inputs, uint8 or float in 0 to 1.
    maps : ndarray of shape (B, rows, columns)
        The relevance of each patch, 0 to 1, from `attention_rollout` and `patch_maps`.
    titles : sequence of str
        One title per picture.
    path : path-like
        The PNG to write, 900 pixels wide.

    Raises
    ------
    ValueError
        If there are no pictures, or the numbers of pictures, images, maps and titles differ.
    """
    _check_maps(images, maps)
    if not len(pictures) == len(titles) == len(images):
        raise ValueError(
            f"{len(images)} images need as many pictures and titles, not {len(pictures)} and {len(titles)}"
        )
    figure = _figure(6.0, 2.05 * len(images))
    grid = figure.subplots(len(images), 3, squeeze=False)
    _overlay_panel(figure, grid[:, 2:], images, maps)
    for row, picture, image, title in zip(grid, pictures, images, titles, strict=True):
        row[0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        row[0].set_axis_off()
        _show_digit(row[1], _unit(image))
        title = _shortened(title, most=115, size=SMALL)
        for axes, text in zip(row, (title, "model input", "attention rollout"), strict=True):
            axes.set_title(text, fontsize=SMALL, color=INK, pad=4, parse_math=False)
    _save(figure, path)


def hero(history: list[dict[str, Any]], images: np.ndarray, maps: np.ndarray, path: str | PathLike[str]) -> None:
    """Draw the picture of the README: the error per epoch beside attention maps.

    Parameters
    ----------
    history : list of dict
        Records as in `training_curves`.
    images : ndarray of shape (B, R, C)
        Images as in `explanations`. The first eight are drawn.
    maps : ndarray of shape (B, rows, columns)
        Relevance as in `explanations`.
    path : path-like
        The PNG to write, 1200 x 420 pixels.

    Raises
    ------
    ValueError
        If the history is empty, there are no images, or the numbers of images and maps differ.
    """
    _check_history(history)
    _check_maps(images, maps)
    figure = _figure(WIDTH, 2.8)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.45), wspace=0.03)
    axes = left.subplots()
    _error_panel(axes, history)
    axes.set_title("Error while training", fontsize=TEXT + 1, color=INK, loc="left")
    title = "What it looks at: attention rollout of the class token"
    right.suptitle(title, fontsize=TEXT + 1, color=INK, x=0.01, ha="left")
    _overlay_panel(right, right.subplots(2, 4), images[:8], maps[:8])
    _save(figure, path)


def _write_title_and_note(figure, title, note):
    """Write a title at the top left of a figure, and a note, unless it is empty, at the bottom left."""
    figure.suptitle(title, fontsize=TEXT + 1, color=INK, x=0.01, ha="left", parse_math=False)
    if note:
        figure.supxlabel(note, fontsize=SMALL, color=MUTED, x=0.01, ha="left", parse_math=False)


def _loss_panel(axes, history):
    """Draw training and validation loss per epoch."""
    for kind in ("train", "validation"):
        _draw_line(axes, history, _series(history, f"{kind}_loss"), kind=kind, form="{:.3f}", least=1e-6)
    _finish_panel(axes, title="Loss", quantity="mean cross-entropy in nats")


def _error_panel(axes, history):
    """Draw training and validation error in percent per epoch."""
    for kind in ("train", "validation"):
        errors = 100 * (1 - _series(history, f"{kind}_accuracy"))
        _draw_line(axes, history, errors, kind=kind, form="{:.2f} %", least=LEAST_ERROR)
    _finish_panel(axes, title="Error", quantity="misclassified images in %")


def _series(records, name):
    """Return one value per epoch, (E,) float64, NaN where a record has no value."""
    values = [record.get(name) for record in records]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _draw_line(axes, records, values, kind, form, least):
    """Draw the finite values, at least `least`, of one kind of images. A single value is written beside its point."""
    finite = np.isfinite(values)
    if not finite.any():
        return
    name, colour, style = ("training", TRAIN, "--") if kind == "train" else ("validation", VALIDATION, "-")
    last = form.format(values[finite][-1])
    epochs = _series(records, "epoch")
    drawn = np.where(finite, np.maximum(values, least), np.nan)
    single = finite.sum() == 1
    axes.plot(
        epochs,
        drawn,
        linestyle="none" if single else style,
        color=colour,
        marker="o" if len(epochs) <= 30 else None,
        markersize=6 if single else 3.5,
        linewidth=1.6,
        label=name if single else f"{name}, last {last}",
    )
    if single:
        # Training's value goes to the left and validation's to the right, so that close values do not overlap.
        side = -1 if kind == "train" else 1
        axes.annotate(
            last,
            (epochs[finite][0], drawn[finite][0]),
            xytext=(8 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=TEXT,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # hides the grid behind the digits
        )


def _finish_panel(axes, title, quantity):
    """Give a panel its logarithmic axis with round numbers, its epochs, grid, title, names and legend."""
    axes.set_yscale("log")
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [[1.0]])
    low, high = np.nanmin(values), np.nanmax(values)
    spare = max(1.25, math.sqrt(6 * low / high))  # a factor of 6 at least, which contains a round number
    low, high = low / spare, high * spare
    axes.set_ylim(low, high)
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [step * 10.0**power for power in range(-7, 7) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())

    epochs = np.concatenate([line.get_xdata() for line in axes.lines] or [[1.0]])
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", fontsize=TEXT, color=INK)
    axes.set_ylabel(f"{quantity} (log scale)", fontsize=TEXT, color=INK)
    axes.set_title(title, fontsize=TEXT, color=INK, loc="left")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(MUTED)
    if axes.lines:
        legend = axes.legend(fontsize=SMALL, framealpha=1, edgecolor="none", labelcolor=INK, handlelength=2.2)
        legend.set_zorder(3)  # above the grid and the lines, so that neither crosses the text


def _overlay_panel(figure, grid, images, maps):
    """Fill a grid of axes with images over their relevance maps, and add one colour bar for all."""
    maps = 100 * np.asarray(maps, np.float64)
    norm = Normalize(0, maps.max())
    for axes in grid.flat:
        axes.set_axis_off()
    for i, axes in zip(range(len(images)), grid.flat, strict=False):
        _show_relevance(axes, _unit(images[i]), maps[i], norm)
    shades = grid.flat[0].images[0]
    bar = figure.colorbar(shades, ax=grid, aspect=25, pad=0.02, fraction=0.04)
    bar.set_label("relevance, %", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=0)
    bar.outline.set_visible(False)


def _show_relevance(axes, image, relevance, norm):
    """Draw a relevance map (rows, columns) with thin lines between its blocks, and the image over it.

    A grey image is drawn in ink, and a colour image (R, C, 3) half transparent.
    """
    image = _grey_or_colour(image)
    rows, columns = relevance.shape
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(relevance, cmap=RELEVANCE, norm=norm, extent=extent, interpolation="nearest")
    axes.hlines(np.arange(1, rows) * height / rows, 0, width, color="white", linewidth=0.7)
    axes.vlines(np.arange(1, columns) * width / columns, 0, height, color="white", linewidth=0.7)
    ink = np.zeros((height, width, 4))
    ink[..., 3] = image if image.ndim == 2 else 0.5
    if image.ndim == 3:
        ink[..., :3] = image
    axes.imshow(ink, extent=extent, interpolation="nearest", zorder=3)


def _show_digit(axes, image):
    """Draw an image in a faint frame: a grey one (R, C) as ink on paper, and a colour image (R, C, 3) as it is."""
    axes.set_axis_on()
    axes.imshow(_grey_or_colour(image), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(FAINT)


def _write_counts(axes, counts):
    """Write every count except zeros into its cell, and the recall of each class beside its row."""
    classes = len(counts)
    size = min(TEXT, max(90 / classes, 6.5))
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=size, color=INK)
    for row, total in enumerate(counts.sum(axis=1)):
        recall = f"{100 * counts[row, row] / total:.1f}" if total else "–"
        axes.text(classes - 0.35, row, recall, ha="left", va="center", fontsize=size, color=INK)
    axes.text(classes - 0.35, -0.62, "recall, %", ha="left", va="bottom", fontsize=SMALL, color=MUTED)


def _check_history(history):
    """Raise `ValueError` if there is no epoch to draw."""
    if not history:
        raise ValueError("training curves need at least one finished epoch")


def _check_maps(images, maps):
    """Raise `ValueError` unless there are images and one map per image."""
    if len(images) == 0 or len(maps) != len(images):
        raise ValueError(f"give images and one map per image, not {len(images)} images and {len(maps)} maps")


def _unit(images):
    """Return images as float64 in 0 to 1."""
    images = np.asarray(images)
    return images / 255 if images.dtype == np.uint8 else np.clip(images.astype(np.float64), 0, 1)


def _grey_or_colour(image):
    """Return an image as (R, C) or (R, C, 3): other channels than red, green and blue become their mean."""
    return image if image.ndim == 2 or image.shape[2] == 3 else image.mean(axis=2)


def printable(text: str) -> str:
    """Return a text in which escapes such as "\\x1b" replace control characters and lone surrogates.

    Parameters
    ----------
    text : str
        A text from a user, such as the name of a class.

    Returns
    -------
    str
        One line that can be printed, drawn and encoded.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _font():
    """Return the font of the pictures."""
    return get_font(findfont(FontProperties()))


def _text_width(text, size):
    """Return the width in points of a text of `size` points."""
    font = _font()
    font.set_size(size, 72)
    font.set_text(text, 0.0)
    return font.get_width_height()[0] / 64  # the font counts in 64ths


def _shortened(text, most, size):
    """Return a text that the font can draw in at most `most` points. The middle of a longer one becomes "…"."""
    glyphs = _font().get_charmap()
    text = text if len(text) <= 200 else text[:100] + text[-100:]  # more does not fit
    short = text = "".join(c if ord(c) in glyphs else "\ufffd" for c in printable(text))
    kept = len(text)
    while _text_width(short, size) > most:
        kept -= 1
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def _class_labels(names, most, size):
    """Return one label per class of at most `most` points. The labels differ, as the names do."""
    names, glyphs = [printable(str(name)) for name in names], _font().get_charmap()
    drawable = [bool(name.strip()) and all(ord(c) in glyphs for c in name) for name in names]
    names = [name if fits else f"class {i}" for i, (name, fits) in enumerate(zip(names, drawable, strict=True))]
    labels = [_shortened(name, most, size) for name in names]
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    return [
        _shortened(f"{i}: {name}", most, size) if label in repeated else label
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
    ]


def _percent(share):
    """Return a share as text in percent. Only a share of exactly 1 is shown as 100 %."""
    percent = 100 * float(share)
    return "> 99.9 %" if 99.95 <= percent < 100 else f"{percent:.1f} %"


def _figure(width, height):
    """Return a white figure of width x height inches that needs no display."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    """Write `figure` as a PNG, all at once, without matplotlib's version in its metadata."""
    content = io.BytesIO()
    figure.canvas.print_png(content, metadata={"Software": None})
    write_atomically(path, content.getvalue())
