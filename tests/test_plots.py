"""The pictures: what is drawn, and that a file is whole, the same every time, and made without a display."""

import itertools
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinyvit import plots
from tinyvit.data.augment import Augmentation
from tinyvit.training import TrainingConfig
from tinyvit.training.results import describe_augmentation, describe_losses

pytestmark = pytest.mark.extended


def epoch(number, **values):
    record = {
        "epoch": number,
        "train_loss": 0.5 / number,
        "train_accuracy": 1 - 0.1 / number,
        "validation_loss": 0.3 / number,
        "validation_accuracy": 1 - 0.06 / number,
        "first_learning_rate": 1e-3,
        "last_learning_rate": 1e-3,
        "seconds": 30.0 * number,
    }
    return {**record, **values}


HISTORY = [epoch(number) for number in range(1, 11)]
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
MAPS = np.random.default_rng(1).uniform(0, 0.1, (40, 4, 4))
COUNTS = np.array([[980, 0, 2], [1, 1134, 0], [0, 30, 0]])
LABELS = np.arange(40) % 10
CONFIDENCES = np.linspace(0.5, 0.9, 40)

PICTURES = {
    "training_curves": (lambda path: plots.training_curves(HISTORY, path), (1200, 600)),
    "confusion_matrix": (lambda path: plots.confusion_matrix(COUNTS, path), (960, 1008)),
    "misclassified": (
        lambda path: plots.misclassified(IMAGES, LABELS, (LABELS + 1) % 10, CONFIDENCES, range(40), path, limit=8),
        (1200, 523),
    ),
    "augmentation_sheet": (lambda path: plots.augmentation_sheet([IMAGES[:3], IMAGES[:3] / 255], path), (1200, 927)),
    "explanations": (
        lambda path: plots.explanations(IMAGES[:2] / 255, IMAGES[:2], MAPS[:2], ["a", "b"], path),
        (900, 615),
    ),
    "hero": (lambda path: plots.hero(HISTORY, IMAGES, MAPS, path), (1200, 420)),
}


def size_of(path):
    """Width and height in pixels, from the header of the PNG."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, to look at before they become pixels."""
    seen = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure))
    return seen


def texts(figure):
    """Every text on a figure's axes, in the order of drawing."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_its_size_and_the_same_bytes_in_any_thread(name, tmp_path):
    draw, size = PICTURES[name]
    draw(tmp_path / "first.png")
    assert size_of(tmp_path / "first.png") == size
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: draw(tmp_path / f"{i}.png"), range(2)))
    first = (tmp_path / "first.png").read_bytes()
    assert b"Software" not in first
    assert (tmp_path / "0.png").read_bytes() == first
    assert (tmp_path / "1.png").read_bytes() == first
    assert len(first) < 300_000
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    plots.training_curves(HISTORY[:1], path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        plots.training_curves(HISTORY, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_never_imported(tmp_path):
    program = f"""
import sys
from tinyvit import plots
plots.training_curves([{epoch(1)!r}], {str(tmp_path / "curves.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_curves_draw_errors_in_percent_with_good_accuracies_far_apart(figures):
    accuracies = (0.98, 0.99, 0.995)
    plots.training_curves([epoch(i + 1, validation_accuracy=a) for i, a in enumerate(accuracies)], "unused")
    error = figures[0].axes[1]
    validation = error.lines[1]
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 0.5])
    assert validation.get_label() == "validation, last 0.50 %"
    figures[0].canvas.draw()
    places = error.transData.transform(np.column_stack([[1, 2, 3], [2, 1, 0.5]]))[:, 1]
    assert (-np.diff(places) > 50).all()  # pixels
    written = {text.get_text() for text in error.get_yticklabels()}
    assert {"0.5", "1", "2", "5"} <= written


def test_curves_stand_what_a_run_may_leave_out(figures):
    history = [
        epoch(1, validation_loss=None),
        epoch(2, train_loss=float("nan")),
        epoch(3, train_accuracy=1.0),
    ]
    del history[1]["validation_accuracy"]
    plots.training_curves(history, "unused")
    loss, error = figures[0].axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [0.5, np.nan, 0.5 / 3])
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [np.nan, 0.15, 0.1])
    np.testing.assert_allclose(error.lines[0].get_ydata(), [10, 5, 0.01])  # no error is at the foot,
    assert error.lines[0].get_label() == "training, last 0.00 %"  # and is written as what it is
    np.testing.assert_allclose(error.lines[1].get_ydata(), [6, np.nan, 2])


def test_curves_have_titles_and_a_note(figures):
    plots.training_curves(HISTORY, "unused", note="what is seen")
    figure = figures[0]
    assert figure.get_suptitle() == "Training curves: loss and error over 10 epochs"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Error"]
    assert figure.get_supxlabel() == "what is seen"


def boxes_of(figure):
    """Return title and note of a figure and the labels, titles and texts of its axes, with their boxes in pixels."""
    figure.canvas.draw()
    shown = [figure._suptitle, figure._supxlabel]
    for axes in figure.axes:
        shown += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
    shown = [text for text in shown if text is not None and text.get_text()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


@pytest.mark.parametrize("epochs", [1, 3, 100])
def test_no_text_overlaps_another_or_leaves_the_picture(figures, epochs):
    """The longest notes of a run, and training and validation so close that their points coincide."""
    numbers = range(1, epochs + 1)
    history = [epoch(n, validation_loss=0.5 / n, validation_accuracy=1 - 0.1 / n) for n in numbers]
    augmentation = Augmentation(rotation=12.5, scale=0.15, shear=12.5, shift=1.5, flip=0.125)
    config = TrainingConfig(smoothing=0.1, augmentation=augmentation)
    losses = [{**record, "train_loss": 1.0, "validation_loss": loss} for record in history for loss in (0.5, 2.0)]
    for note in (describe_losses(losses[:1], config), describe_losses(losses, config)):
        plots.training_curves(history, "unused", note)
    plots.augmentation_sheet([IMAGES[:10]] * 2, "unused", describe_augmentation(config.augmentation))
    plots.confusion_matrix(COUNTS, "unused")
    plots.misclassified(
        images=IMAGES,
        labels=LABELS,
        predictions=(LABELS + 1) % 10,
        confidences=np.ones(40) - 1e-6,
        wrong=range(40),
        path="unused",
    )
    for figure in figures:
        boxes = boxes_of(figure)
        for i, (text, box) in enumerate(boxes):
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, text
            for other, another in boxes[:i]:
                assert not box.overlaps(another), (text, other)


TISSUES = ["fat", "debris", "mucus", "smooth muscle", "normal colon mucosa", "cancer-associated stroma"]
ALIKE = [f"a very long beginning that all share, {i}, and an end that all share" for i in range(10)]


@pytest.mark.parametrize(
    "names",
    [["T-shirt", "WWWW", "wwww", "dog"], TISSUES, ["a", "W" * 62, *"bcdefghi"], ["a", "w" * 100_000], ALIKE],
)
def test_long_names_of_classes_fit_and_differ(figures, names):
    classes = len(names)
    labels = np.arange(40) % classes
    plots.misclassified(
        images=IMAGES,
        labels=labels,
        predictions=(labels + 1) % classes,
        confidences=CONFIDENCES,
        wrong=range(12),
        path="unused",
        class_names=names,
    )
    plots.confusion_matrix(np.full((classes, classes), 1234), "unused", names)
    plots.explanations(IMAGES[:4] / 255, IMAGES[:4], MAPS[:4], [*names, *names][:4], "unused")
    mistakes, matrix, maps = figures
    for figure in (mistakes, maps):
        boxes = boxes_of(figure)
        for i, (text, box) in enumerate(boxes):
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text
            for other, another in boxes[:i]:
                assert not box.overlaps(another), (text, other)
    captions = [axes.get_title() for axes in mistakes.axes if axes.images]
    assert len({caption.partition("predicted")[0] for caption in captions}) == classes
    matrix.canvas.draw()
    axes = matrix.axes[0]
    assert axes.get_window_extent().width > 500  # pixels, of 960 for short names
    shown = axes.get_yticklabels()
    assert len({label.get_text() for label in shown}) == classes
    assert [label.get_text() for label in axes.get_xticklabels()] == [label.get_text() for label in shown]
    for label in [*shown, *axes.get_xticklabels()]:
        box = label.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= matrix.bbox.width, label
        assert 0 <= box.y0 <= box.y1 <= matrix.bbox.height, label


def test_no_text_of_a_user_is_read_as_a_formula(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", lambda *arguments: pytest.fail("a formula"))
    names = ["$\\badcommand$", "x$y", "cost $5 to $10"]
    path, labels = tmp_path / "picture.png", LABELS % 3
    plots.confusion_matrix(COUNTS, path, names)
    plots.misclassified(IMAGES, labels, (labels + 1) % 3, CONFIDENCES, range(6), path, class_names=names)
    plots.explanations(IMAGES[:3] / 255, IMAGES[:3], MAPS[:3], names, path)
    plots.training_curves(HISTORY, path, note=names[2])
    plots.augmentation_sheet([IMAGES[:3]], path, note=names[2])


@pytest.mark.filterwarnings("error")  # matplotlib warns of each missing glyph
def test_characters_that_cannot_be_drawn_are_replaced(figures):
    names = ["字", "数字", "", "\x1b[31mred", "line\nbreak", "caf\udce9", "größe"]
    drawn = ["class 0", "class 1", "class 2", "\\x1b[31mred", "line\\nbreak", "caf\\udce9", "größe"]
    plots.confusion_matrix(np.ones((7, 7), int), "unused", names)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == drawn
    labels = np.arange(7)
    plots.misclassified(IMAGES[:7], labels, labels, CONFIDENCES[:7], labels, "unused", class_names=names)
    captions = [axes.get_title() for axes in figures[1].axes if axes.images]
    assert [caption.splitlines()[0].removesuffix(",") for caption in captions[:6]] == [f"true {n}" for n in drawn[:6]]
    plots.explanations(IMAGES[:1] / 255, IMAGES[:1], MAPS[:1], ["数.png\x07: 7"], "unused")
    assert figures[2].axes[0].get_title() == "\ufffd.png\\x07: 7"
    for figure in figures:
        figure.canvas.draw()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels_are_drawn(figures, channels):
    images = np.random.default_rng(2).integers(0, 256, (4, 8, 8, channels)).astype(np.uint8)
    expected = images / 255 if channels == 3 else images.mean(axis=3) / 255
    labels = np.arange(4)
    plots.misclassified(images, labels, labels[::-1], CONFIDENCES[:4], labels, "unused")
    plots.augmentation_sheet([images[:2], images[2:]], "unused")
    plots.explanations(images.mean(axis=3) / 255, images, MAPS[:4], ["a", "b", "c", "d"], "unused")
    for i in range(4):
        axes = [figures[0].axes[i], figures[1].axes[i], figures[2].axes[3 * i + 1]]
        for each in axes:
            np.testing.assert_allclose(each.images[0].get_array(), expected[i])
        ink = figures[2].axes[3 * i + 2].images[1].get_array()
        np.testing.assert_allclose(ink[..., :3] if channels == 3 else ink[..., 3], expected[i])


def test_curves_of_one_epoch_are_points_with_their_values_beside_them(tmp_path, figures):
    plots.training_curves([epoch(1)], "unused")
    assert figures[0].get_suptitle() == "Training curves: loss and error after one epoch"
    loss, error = figures[0].axes
    assert [text.get_text() for text in loss.texts] == ["0.500", "0.300"]
    assert [text.get_text() for text in error.texts] == ["10.00 %", "6.00 %"]
    assert [text.xy for text in loss.texts] == [(1, 0.5), (1, 0.3)]
    plots.training_curves(HISTORY, "unused")
    assert texts(figures[1]) == []  # a curve has its last value in the legend


def test_curves_of_one_epoch_are_points_at_a_whole_number(tmp_path, figures):
    only = {"epoch": 1, "train_loss": 0.3, "train_accuracy": 0.9, "validation_loss": None}
    plots.training_curves([only], "unused")
    for axes in figures[0].axes:
        assert [line.get_marker() for line in axes.lines] == ["o"]
        left, right = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if left <= tick <= right] == [1]
        assert len(axes.get_yticks()) >= 2
    for draw in (plots.training_curves, lambda h, p: plots.hero(h, IMAGES, MAPS, p)):
        with pytest.raises(ValueError, match="at least one finished epoch"):
            draw([], tmp_path / "none.png")


def test_confusion_colours_mistakes_alone_and_writes_counts_and_recall(figures):
    plots.confusion_matrix(COUNTS, "unused", class_names=["ant", "bee", "cat"])
    axes = figures[0].axes[0]
    cells = axes.images[0].get_array()
    grey = [cells[i, j].max() - cells[i, j].min() < 1e-6 for i in range(3) for j in range(3)]
    assert grey == [True, True, False, False, True, True, True, False, True]  # the diagonal, and zeros
    assert cells[1, 0].sum() > cells[0, 2].sum() > cells[2, 1].sum()  # 1, 2, 30: darker and darker
    assert texts(figures[0]) == ["980", "2", "1", "1134", "30", "99.8", "99.9", "0.0", "recall, %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee", "cat"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert figures[0].get_suptitle() == "Confusion matrix: 33 of 2,147 images misclassified"
    assert figures[0].get_supxlabel().startswith("Grey cells count correct predictions.")


@pytest.mark.parametrize("counts", [np.zeros((3, 3), int), np.diag([5, 0, 7]), np.ones((20, 20), int)])
def test_confusion_of_odd_counts_can_be_drawn(counts, tmp_path):
    plots.confusion_matrix(counts, tmp_path / "counts.png")
    assert size_of(tmp_path / "counts.png") == (960, 1008)


@pytest.mark.parametrize("classes", [26, 62])
def test_numbers_of_many_classes_fit_into_their_cells(figures, classes):
    counts = np.full((classes, classes), 888)
    plots.confusion_matrix(counts, "unused", class_names=[f"class {i}" for i in range(classes)])
    axes = figures[0].axes[0]
    figures[0].canvas.draw()
    cell = axes.transData.transform((1, 1)) - axes.transData.transform((0, 0))
    for number in axes.texts[: classes**2]:
        extent = number.get_window_extent()
        assert extent.width < abs(cell[0])
        assert extent.height < abs(cell[1])
    labels = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(labels))


def test_a_matrix_of_more_than_a_hundred_classes_has_no_numbers(figures):
    plots.confusion_matrix(np.eye(101, dtype=int), "unused")
    assert len(figures[0].axes[0].texts) == 0


def test_misclassified_digits_are_captioned_the_most_confident_first(figures):
    predictions = LABELS.copy()
    predictions[[4, 9, 30]] = [9, 7, 8]
    confidences = CONFIDENCES.copy()
    confidences[9] = 0.9999
    plots.misclassified(IMAGES, LABELS, predictions, confidences, [9, 30, 4], "unused")
    drawn = [axes for axes in figures[0].axes if axes.images]
    assert [axes.get_title() for axes in drawn] == [
        "true 9, predicted 7\n> 99.9 %",
        "true 0, predicted 8\n80.8 %",
        "true 4, predicted 9\n54.1 %",
    ]
    for axes, i in zip(drawn, (9, 30, 4), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), IMAGES[i] / 255)
    assert figures[0].get_suptitle() == "Mistakes: 3 of 40 images misclassified, the most confident first"
    assert figures[0].get_supxlabel() == "The percentage is the probability that the model gives its prediction."

    names = ["T-shirt", *"12345678", "ankle boot"]
    plots.misclassified(IMAGES, LABELS, predictions, confidences, [9, 30], "unused", class_names=names)
    drawn = [axes.get_title() for axes in figures[1].axes if axes.images]
    assert drawn == ["true ankle boot,\npredicted 7\n> 99.9 %", "true T-shirt,\npredicted 8\n80.8 %"]
    del figures[1]

    plots.misclassified(IMAGES, LABELS, predictions, confidences, [9, 30, 4], "unused", limit=2)
    assert len([axes for axes in figures[1].axes if axes.images]) == 2
    assert figures[1].get_suptitle().endswith("(2 shown)")


def test_no_mistakes_make_a_picture_that_says_so(figures, tmp_path):
    plots.misclassified(IMAGES, LABELS, LABELS, CONFIDENCES, [], "unused")
    assert [text.get_text() for text in figures[0].texts] == ["0 of 40 images misclassified"]


def test_augmentation_sheet_shows_every_image_in_its_place(figures):
    plots.augmentation_sheet([IMAGES[:3], IMAGES[3:6] / 255], "unused")
    drawn = [axes.images[0].get_array() for axes in figures[0].axes]
    np.testing.assert_allclose(drawn, IMAGES[:6] / 255)
    assert [axes.get_title() for axes in figures[0].axes[:3]] == ["original", "variant 1", "variant 2"]
    assert figures[0].get_suptitle() == "Augmentation: original training images and random variants"


@pytest.mark.parametrize("rows", [[], [IMAGES[:0]], [IMAGES[:2], IMAGES[:3]]])
def test_augmentation_sheet_refuses_what_does_not_fit(rows, tmp_path):
    with pytest.raises(ValueError, match="give rows of equally many images"):
        plots.augmentation_sheet(rows, tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


def test_relevance_is_drawn_as_blocks_under_the_ink_on_one_scale_from_zero(figures):
    plots.hero(HISTORY, IMAGES[:7], MAPS[:7], "unused")
    drawn = [axes for axes in figures[0].axes if len(axes.images) == 2]
    assert len(drawn) == 7
    for i, axes in enumerate(drawn):
        blocks, ink = axes.images
        np.testing.assert_allclose(blocks.get_array(), 100 * MAPS[i])  # percent
        assert blocks.get_interpolation() == "nearest"
        assert blocks.get_extent() == ink.get_extent()
        assert (blocks.norm.vmin, blocks.norm.vmax) == (0, 100 * MAPS[:7].max())
        np.testing.assert_allclose(ink.get_array()[..., 3], IMAGES[i] / 255)


@pytest.mark.parametrize(("images", "maps"), [(IMAGES[:0], MAPS[:0]), (IMAGES[:2], MAPS[:3])])
def test_overlay_refuses_images_without_a_map_each(images, maps, tmp_path):
    titles = ["a"] * len(images)
    for draw in (
        lambda path: plots.explanations(images, images, maps, titles, path),
        lambda path: plots.hero(HISTORY, images, maps, path),
    ):
        with pytest.raises(ValueError, match="give images and one map per image"):
            draw(tmp_path / "overlay.png")
