"""The pictures of a run; the only file that imports matplotlib.

Every function draws on a figure of its own, never on pyplot's, so that it needs no display, leaves no state
behind and may run in any thread. A PNG takes its name only when it is whole, and the same data give the same
bytes.
"""

import io
import math

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tinyvit.files import write_atomically

DPI = 150  # 8 inches are 1200 pixels: sharp where a README shows 900
WIDTH = 8.0  # inches
TEXT, SMALL = 9, 7.5  # points

# Okabe and Ito 2008, "Color Universal Design": told apart by the colour-blind, too
TRAIN, VALIDATION = "#0072B2", "#D55E00"
INK, MUTED, FAINT, PAPER = "#222222", "#666666", "#E3E3E3", "#F8F8F8"

# light enough at its far end for black ink to be read on it
RELEVANCE = LinearSegmentedColormap.from_list("relevance", colormaps["YlOrBr"](np.linspace(0, 0.68, 256)))
MISTAKES = LinearSegmentedColormap.from_list("mistakes", colormaps["YlOrBr"](np.linspace(0.12, 0.78, 256)))

LEAST_ERROR = 0.01  # percent; one image of 10,000. A logarithmic axis has no zero


def training_curves(history, path):
    """Draw loss and error over the epochs, both on logarithmic axes, on which 98 % and 99.5 % lie far apart.

    history: a list of dicts, one per epoch, with epoch (from 1), train_loss, train_accuracy, and
    validation_loss, validation_accuracy (0 to 1), which may be None or missing; path: where the PNG (1200 x
    510) goes. An error below 0.01 % is drawn at 0.01 %; a value that is not finite is left out. Raises
    `ValueError` if history is empty.
    """
    _check_history(history)
    figure = _figure(WIDTH, 3.4)
    loss, error = figure.subplots(1, 2)
    _loss_panel(loss, history)
    _error_panel(error, history)
    _save(figure, path)


def confusion_matrix(counts, path, class_names=None):
    """Draw which class was taken for which; colour is for mistakes alone, the diagonal is grey.

    counts: (C, C) integers, rows true and columns predicted; path: where the PNG (960 x 960) goes;
    class_names: one a class, by default 0, 1 and so on. The margin gives each class's recall in percent.
    """
    counts = np.asarray(counts)
    classes = len(counts)
    names = [str(i) for i in range(classes)] if class_names is None else list(class_names)
    diagonal = np.eye(classes, dtype=bool)
    mistaken = ~diagonal & (counts > 0)
    most = max(2, counts[mistaken].max(initial=0))

    cells = np.full((classes, classes, 3), to_rgb(PAPER))
    cells[diagonal] = to_rgb(FAINT)
    cells[mistaken] = MISTAKES(LogNorm(1, most)(counts[mistaken]))[:, :3]
    figure = _figure(6.4, 6.4)
    axes = figure.subplots()
    axes.imshow(cells)
    if classes <= 20:  # more would not be readable
        _write_counts(axes, counts)
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 5 else {}
    axes.set_xticks(range(classes), names, **slant)
    axes.set_yticks(range(classes), names)
    for edge in np.arange(1, classes) - 0.5:
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    axes.tick_params(length=0, labelsize=TEXT, colors=INK)
    axes.set_xlabel("predicted", fontsize=TEXT, color=INK)
    axes.set_ylabel("true", fontsize=TEXT, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    wrong = f"{counts.sum() - np.trace(counts):,} of {counts.sum():,} misclassified"
    axes.set_title(wrong, fontsize=TEXT + 1, color=INK, loc="left")
    _save(figure, path)


def misclassified(images, labels, predictions, confidences, wrong, path, limit=36):
    """Draw the digits that were misclassified, the most confident first, at most `limit` of them.

    images: (N, R, C), uint8 or float in 0 to 1; labels, predictions: (N,) integers; confidences: (N,), how
    probable each prediction was said to be, 0 to 1: of all images; wrong: the indices of the mistakes in the
    order to draw them, as `evaluate.misclassified` gives them; path: where the PNG (1200 pixels wide) goes.
    If nothing is wrong, the picture says so.
    """
    shown = wrong[:limit]
    title = f"{len(wrong):,} of {len(labels):,} misclassified"
    if not len(shown):
        figure = _figure(WIDTH, 1.2)
        figure.text(0.5, 0.5, title, ha="center", va="center", fontsize=TEXT + 3, color=INK)
        _save(figure, path)
        return

    title += ", the most confident first" + (f" ({len(shown)} shown)" if len(shown) < len(wrong) else "")
    rows = math.ceil(len(shown) / 6)
    figure = _figure(WIDTH, 1.42 * rows + 0.45)
    figure.suptitle(title, fontsize=TEXT + 1, color=INK, x=0.01, ha="left")
    grid = figure.subplots(rows, 6, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, shown, strict=False):
        _show_digit(axes, _unit(images[i]))
        caption = f"true {labels[i]}, predicted {predictions[i]}\n{_percent(confidences[i])}"
        axes.set_title(caption, fontsize=SMALL, color=INK, pad=3, linespacing=1.15)
    _save(figure, path)


def augmentation_sheet(rows, path):
    """Draw what augmentation makes of some images: a row per image, the image itself first.

    rows: a list of (n, R, C) arrays, uint8 or float in 0 to 1, n the same for all; path: where the PNG, 1200 pixels
    wide, goes. Raises `ValueError` if there is no image.
    """
    rows = np.asarray([_unit(row) for row in rows])  # (rows, n, R, C)
    if rows.ndim != 4 or not rows.size:
        raise ValueError(f"the sheet needs rows of as many images each, at least one, not {rows.shape}")
    count, columns = rows.shape[:2]
    figure = _figure(WIDTH, 0.5 + count * WIDTH / columns)
    grid = figure.subplots(count, columns, squeeze=False)
    for axes, image in zip(grid.flat, rows.reshape(-1, *rows.shape[2:]), strict=True):
        _show_digit(axes, image)
    figure.suptitle("Augmentation: the original at the left, then random changes of it", fontsize=TEXT + 1, color=INK)
    _save(figure, path)


def explanations(pictures, images, maps, titles, path):
    """Draw a row per picture: itself, what the model sees of it, and what the model looks at.

    pictures: (R, C) arrays of grey levels in 0 to 1, of any sizes; images: (B, R, C), uint8 or float in 0 to 1;
    maps: (B, rows, columns), the share that came from each patch, 0 to 1, as `attention_rollout` and `patch_maps`
    give, one of each per picture; titles: one string per picture; path: where the PNG (900 pixels wide) goes. All
    rows share one scale, which begins at zero. Raises `ValueError` if there are no pictures, or not as many of
    something.
    """
    _check_maps(images, maps)
    if not len(pictures) == len(titles) == len(images):
        raise ValueError(f"{len(images)} images need as many pictures and titles")
    figure = _figure(6.0, 2.05 * len(images))
    grid = figure.subplots(len(images), 3, squeeze=False)
    _overlay_panel(figure, grid[:, 2:], images, maps)
    for (left, middle, right), picture, image, title in zip(grid, pictures, images, titles, strict=True):
        left.imshow(picture, cmap="gray", vmin=0, vmax=1)
        left.set_axis_off()
        _show_digit(middle, _unit(image))
        for axes, text in ((left, _shortened(title)), (middle, "as the model sees it"), (right, "attention rollout")):
            axes.set_title(text, fontsize=SMALL, color=INK, pad=4)
    _save(figure, path)


def hero(history, images, maps, path):
    """Draw the project in one picture (1200 x 420): how the error falls, and what the model looks at.

    history: as in `training_curves`; images (B, R, C) and maps (B, rows, columns): as in `explanations`, of
    which the first eight are drawn; path: where the PNG goes.
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


def _loss_panel(axes, history):
    """Draw training and validation loss over the epochs."""
    _line(axes, history, _series(history, "train_loss"), "training, as minimised", TRAIN, "{:.3f}", "--")
    _line(axes, history, _series(history, "validation_loss"), "validation", VALIDATION, "{:.3f}", "-")
    _finish_panel(axes, "mean cross-entropy, nats")


def _error_panel(axes, history):
    """Draw training and validation error in percent over the epochs."""

    values = 100 * (1 - _series(history, "train_accuracy"))
    _line(axes, history, values, "training", TRAIN, "{:.2f} %", "--", LEAST_ERROR)
    values = 100 * (1 - _series(history, "validation_accuracy"))
    _line(axes, history, values, "validation", VALIDATION, "{:.2f} %", "-", LEAST_ERROR)
    _finish_panel(axes, "misclassified, %")


def _series(records, name):
    """Return one value per epoch, (E,) float64, NaN where there is none."""
    values = [record.get(name) for record in records]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _line(axes, records, values, name, colour, form, style, least=1e-6):
    """Draw one line, with its last value in the legend; a marker an epoch while there are few."""
    finite = np.isfinite(values)
    if not finite.any():
        return
    epochs = _series(records, "epoch")
    label = f"{name}, last {form.format(values[finite][-1])}"
    marker = "o" if len(epochs) <= 30 else None
    drawn = np.where(finite, np.maximum(values, least), np.nan)
    axes.plot(epochs, drawn, style, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=label)


def _finish_panel(axes, quantity):
    """Give a panel its logarithmic axis with round numbers, its epochs, grid, names and legend."""
    axes.set_yscale("log")
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [[1.0]])
    low, high = np.nanmin(values), np.nanmax(values)
    spare = max(1.25, math.sqrt(6 * low / high))  # at least a factor of 6 in all: some round number is in it
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
    axes.set_ylabel(f"{quantity}, log scale", fontsize=TEXT, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(MUTED)
    if axes.lines:
        axes.legend(fontsize=SMALL, frameon=False, loc="best", labelcolor=INK, handlelength=2.2)


def _overlay_panel(figure, grid, images, maps):
    """Fill a grid of axes with digits over their relevance maps, and one colour bar for all."""
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
    """Draw one relevance map (rows, columns), thin lines between its blocks, and the digit over it in ink."""
    rows, columns = relevance.shape
    height, width = image.shape
    extent = (0, width, height, 0)
    axes.imshow(relevance, cmap=RELEVANCE, norm=norm, extent=extent, interpolation="nearest")
    axes.hlines(np.arange(1, rows) * height / rows, 0, width, color="white", linewidth=0.7)
    axes.vlines(np.arange(1, columns) * width / columns, 0, height, color="white", linewidth=0.7)
    ink = np.zeros((height, width, 4))
    ink[..., 3] = image
    axes.imshow(ink, extent=extent, interpolation="nearest", zorder=3)


def _show_digit(axes, image):
    """Draw one digit (R, C) as ink on paper, in a faint frame."""
    axes.set_axis_on()
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(FAINT)


def _write_counts(axes, counts):
    """Write every count but the zeros into its cell, and each class's recall beside its row."""
    classes = len(counts)
    size = min(TEXT, 90 / classes)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = MUTED if row == column else INK
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=size, color=colour)
    for row, total in enumerate(counts.sum(axis=1)):
        recall = f"{100 * counts[row, row] / total:.1f}" if total else "–"
        axes.text(classes - 0.35, row, recall, ha="left", va="center", fontsize=size, color=INK)
    axes.text(classes - 0.35, -0.62, "recall, %", ha="left", va="bottom", fontsize=SMALL, color=MUTED)


def _check_history(history):
    """Raise `ValueError` unless there is an epoch to draw."""
    if not history:
        raise ValueError("training curves need at least one finished epoch")


def _check_maps(images, maps):
    """Raise `ValueError` unless there are images, and a map for each."""
    if len(images) == 0 or len(maps) != len(images):
        raise ValueError(f"an overlay needs a map for each image, not {len(maps)} for {len(images)}")


def _unit(images):
    """Return images as float64 in 0 to 1."""
    images = np.asarray(images)
    return images / 255 if images.dtype == np.uint8 else np.clip(images.astype(np.float64), 0, 1)


def _shortened(title, most=34):
    """Return `title` with its middle left out if it is long; what the library would read as a formula is text."""
    cut = title if len(title) <= most else f"{title[: most // 2 - 1]}…{title[-(most // 2) :]}"
    return cut.replace("$", r"\$")


def _percent(share):
    """Return a share as text in percent, never rounded up to a certainty that it is not."""
    percent = 100 * float(share)
    return "> 99.9 %" if 99.95 <= percent < 100 else f"{percent:.1f} %"


def _figure(width, height):
    """Return a white figure of width x height inches that belongs to no display."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    """Write `figure` as a PNG, all at once, without the version of the library that drew it."""
    content = io.BytesIO()
    figure.canvas.print_png(content, metadata={"Software": None})
    write_atomically(path, content.getvalue())
