"""Pictures and strokes become what the model was trained on: whatever their size, place, colours and form."""

import importlib
import io
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw, PngImagePlugin

from tinyvit.classifier import load_pretrained
from tinyvit.data import load_mnist
from tinyvit.pretrained import pictures
from tinyvit.pretrained.pictures import (
    PictureError,
    Prepared,
    centre,
    find_ink,
    load_picture,
    prepare_picture,
    prepare_strokes,
    thicken,
)

pytestmark = pytest.mark.extended

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
drawing = importlib.import_module("serve").drawing

FEW = settings(max_examples=25)
DIGITS = st.integers(0, 9)


@pytest.fixture(scope="module")
def model():
    return load_pretrained()


@pytest.fixture(scope="module")
def digits():
    data = load_mnist()
    return data.test_images[:300], data.test_labels[:300]


def paint(digit, side=200, size=0.6, shift=(0.0, 0.0), pen=0.06, ink=0, paper=255):
    """Return a square grey picture with `digit` in it: floats in 0 to 1."""
    picture = Image.new("L", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    for stroke in drawing(digit):
        points = [tuple((np.array(p) - 0.5) * size + 0.5 + shift) for p in stroke]
        points = [(x * side, y * side) for x, y in points]
        draw.line(points, fill=ink, width=max(1, round(pen * side)), joint="curve")
    return np.asarray(picture, np.float32) / 255


def moved(model, images):
    """Return how far the second of two images moved the model's answer: the total variation, 0 to 1."""
    one, other = model.predict_proba(np.stack(images))
    return float(np.abs(one - other).sum() / 2)


# ---- what does not matter ----


@pytest.mark.parametrize("digit", range(10))
def test_strokes_and_pictures_of_a_digit_are_read(model, digit):
    images = [prepare_strokes(drawing(digit)).image, prepare_picture(paint(digit)).image]
    assert model.predict(np.stack(images)).tolist() == [digit, digit]


@FEW
@given(DIGITS, st.floats(0.35, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_moving_and_resizing_a_drawing_hardly_moves_the_answer(model, digit, size, x, y):
    strokes = [np.array(stroke) for stroke in drawing(digit)]
    points = (np.concatenate(strokes) - 0.5) * size + 0.5
    free = np.minimum(points.min(axis=0), 1 - points.max(axis=0)).min()  # how far it may go without leaving
    other = [((stroke - 0.5) * size + 0.5 + free * np.array([x, y])).clip(0, 1).tolist() for stroke in strokes]
    images = [prepare_strokes(drawing(digit)).image, prepare_strokes(other).image]
    assert np.abs(images[0].astype(float) - images[1]).mean() < 3
    assert moved(model, images) < 0.02


@FEW
@given(DIGITS, st.floats(0.45, 0.9), st.floats(-0.05, 0.05), st.floats(-0.05, 0.05), st.integers(90, 400))
def test_moving_and_resizing_a_picture_hardly_moves_the_answer(model, digit, size, x, y, side):
    pen = 0.1 * size  # a photograph from nearer has a thicker line
    images = [prepare_picture(paint(digit, pen=0.06)), prepare_picture(paint(digit, side, size, (x, y), pen))]
    assert moved(model, [prepared.image for prepared in images]) < 0.15


def test_the_model_itself_minds_where_a_digit_is_and_how_large(model, digits):
    """What the two tests above could not show if the model did not care."""
    images, labels = digits
    aside = np.roll(images, 6, axis=2)
    assert (model.predict(aside) == labels).mean() < 0.8
    small = np.stack([np.pad(np.asarray(Image.fromarray(i).resize((12, 12))), 8) for i in images])
    assert (model.predict(small) == labels).mean() < 0.8


@FEW
@given(DIGITS, st.integers(0, 90), st.integers(150, 255))
def test_colours_do_not_matter(model, digit, dark, light):
    whole = prepare_picture(paint(digit)).image
    for ink, paper in ((dark, light), (light, dark)):
        image = prepare_picture(paint(digit, ink=ink, paper=paper)).image
        assert np.abs(image.astype(float) - whole).mean() < 2
    assert moved(model, [whole, image]) < 0.02


@pytest.mark.parametrize(
    "change",
    [
        lambda image: 255 - image,
        lambda image: np.asarray(Image.fromarray(image).resize((280, 280), Image.Resampling.BICUBIC)),
        lambda image: 180 - (0.3 * image).astype(np.uint8),
        lambda image: 240 - np.pad(image, ((20, 90), (70, 5))) // 2,
    ],
    ids=["inverted", "enlarged", "pale", "aside"],
)
def test_test_images_as_pictures_are_read_as_well_as_before(model, digits, change):
    images, labels = digits
    prepared = np.stack([prepare_picture(change(image) / np.float32(255)).image for image in images])
    before, after = (model.predict(images) == labels).mean(), (model.predict(prepared) == labels).mean()
    assert after >= before - 0.015


def test_uneven_light_noise_and_the_edge_of_the_desk_do_not_matter(model):
    rng = np.random.default_rng(0)
    right = 0
    for digit in range(10):
        grey = paint(digit, side=300, ink=60, paper=235)
        light = np.linspace(1, 0.45, 300)[None] * np.linspace(1, 0.8, 300)[:, None]
        grey = (grey * light + rng.normal(0, 0.02, grey.shape)).clip(0, 1)
        grey[:, :20] = 0.1
        right += int(model.predict(prepare_picture(grey).image[None])[0] == digit)
    assert right >= 9


@pytest.mark.parametrize("pen", [0.004, 0.01])
def test_a_ballpoint_is_made_a_felt_pen(pen):
    grey = paint(3, side=500, pen=pen)
    thin, thick = centre(find_ink(grey)).image, prepare_picture(grey).image
    ink = thick.astype(float).sum()
    assert ink > 1.3 * thin.astype(float).sum()
    assert 0.5 < ink / load_mnist().test_images[:500].reshape(500, -1).sum(axis=1).mean() < 1.3


def test_a_felt_pen_is_left_as_it_is(digits):
    for image in digits[0][:50]:
        ink = image / np.float32(255)
        wide = np.asarray(Image.fromarray(ink).resize((280, 280), Image.Resampling.BICUBIC))
        if (thicken(wide) != wide).any():  # a thin one among them, which is allowed
            assert (image > 127).sum() < 75


# ---- as MNIST was ----


def inks():
    shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
    values = st.floats(0, 1, width=32)
    return arrays.arrays(np.float32, shapes, elements=values).filter(lambda ink: ink.max() > 0.3)


@settings(max_examples=150)
@given(inks())
def test_ink_of_any_form_is_scaled_and_centred(ink):
    prepared = centre(ink)
    image = prepared.image
    assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
    left, top, side = prepared.frame
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.25), np.flatnonzero(ink.max(axis=0) > 0.25)
    longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    assert side == pytest.approx(longest * 28 / 20)
    assert left <= columns[0] + 1e-6  # the whole digit is inside
    assert left + side >= columns[-1] + 1 - 1e-6
    assert top <= rows[0] + 1e-6
    assert top + side >= rows[-1] + 1 - 1e-6


def test_the_mass_of_a_digit_is_where_mnists_is(digits):
    images, _ = digits
    for strokes in [drawing(digit) for digit in range(10)]:
        image = prepare_strokes(strokes).image.astype(float)
        box = [np.flatnonzero(image.max(axis=axis) > 60) for axis in (0, 1)]
        assert 19 <= max(b[-1] - b[0] + 1 for b in box) <= 21
        for axis, inside in ((0, box[0]), (1, box[1])):
            place = (image.sum(axis=axis) @ (np.arange(28) + 0.5)) / image.sum()
            assert abs(place - 14.5) < 0.35 or inside[0] == 0 or inside[-1] == 27  # held back by the border
    theirs = images.astype(float)
    places = (theirs.sum(axis=1) @ (np.arange(28) + 0.5)) / theirs.sum(axis=(1, 2))
    assert abs(places.mean() - 14.5) < 0.05


def test_a_test_image_is_nearly_what_it_was(digits):
    images = digits[0][:50]
    prepared = [centre(image / 255).image.astype(float) for image in images]
    # MNIST moved its digits by whole pixels, `centre` by parts of them: edges are up to half a pixel elsewhere
    assert np.abs(np.stack(prepared) - images).mean() < 6
    for image in images:
        # a digit that lies a whole number of pixels elsewhere becomes exactly the same one
        elsewhere = np.pad(image, ((3, 9), (11, 1)))
        np.testing.assert_array_equal(centre(elsewhere / 255).image, centre(image / 255).image)


@FEW
@given(DIGITS, st.floats(0.3, 1))
def test_the_frame_says_where_in_the_drawing_the_pixels_are(digit, size):
    strokes = [((np.array(stroke) - 0.5) * size + 0.5).tolist() for stroke in drawing(digit)]
    prepared = prepare_strokes(strokes)
    left, top, side = prepared.frame
    for x, y in (point for stroke in strokes for point in stroke):  # where there is a point there is ink
        column, row = int((x - left) / side * 28), int((y - top) / side * 28)
        assert prepared.image[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].max() > 100


def test_a_dot_stays_a_dot():
    image = prepare_strokes([[[0.5, 0.5]]]).image
    assert 4 <= (image > 100).sum() <= 12
    assert image[12:17, 12:17].max() == 255


def test_a_slow_pen_draws_what_a_fast_one_does():
    fast = [[[0.2, 0.2], [0.8, 0.8]]]
    slow = [np.linspace(0.2, 0.8, 2000)[:, None].repeat(2, axis=1).tolist()]
    difference = prepare_strokes(fast).image.astype(float) - prepare_strokes(slow).image
    assert np.abs(difference).mean() < 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("strokes", "expected"),
    [
        ([], "one or more lists"),
        ([[]], "one or more lists"),
        ([[[0.1, 0.2, 0.3]]], "lists of one or more points"),
        ([[0.1, 0.2]], "lists of one or more points"),
        ([[[0.1, 0.2], [0.3]]], "lists of points"),
        ([[["a", "b"]]], "lists of points"),
        (None, "lists of points"),
        ([[[float("nan"), 0.2]]], "from 0 to 1"),
        ([[[float("inf"), 0.2]]], "from 0 to 1"),
        ([[[0.1, 1.1]]], "from 0 to 1"),
        ([[[0.1, -0.1]]], "from 0 to 1"),
    ],
)
def test_what_is_no_stroke_is_said(strokes, expected):
    with pytest.raises(PictureError, match=expected):
        prepare_strokes(strokes)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_blank_picture_is_said(level):
    with pytest.raises(PictureError, match="the picture is blank: nothing stands out"):
        prepare_picture(np.full((50, 60), level))
    with pytest.raises(PictureError, match="blank"):
        centre(np.zeros((5, 5)))
    for grain in (0.005, 0.02, 0.05):  # of the paper, or of a photograph in the evening
        with pytest.raises(PictureError, match="blank"):
            prepare_picture(level * 0.8 + 0.1 + np.random.default_rng(0).normal(0, grain, (300, 300)))


def test_ink_is_told_from_a_coarse_grain(model):
    right = 0
    for digit in range(10):
        grey = paint(digit, side=300, ink=70, paper=200) + np.random.default_rng(digit).normal(0, 0.05, (300, 300))
        right += int(model.predict(prepare_picture(grey.clip(0, 1)).image[None])[0] == digit)
    assert right >= 9


@pytest.mark.parametrize("grey", [np.zeros((3, 3, 3)), np.zeros((0, 4)), np.full((4, 4), np.nan)])
def test_what_is_no_grey_picture_is_said(grey):
    with pytest.raises(PictureError, match="grey must have the shape"):
        find_ink(grey)


# ---- files ----


def save(path, picture, **options):
    picture.save(path, **options)
    return path


def coloured(digit, mode="RGB"):
    return Image.fromarray((255 * paint(digit)).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *[(name, "RGB") for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.ppm")],
        *[("a.png", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")],
        ("a.gif", "P"),
        ("a.jpg", "CMYK"),
        ("a.jpg", "L"),
        ("a.tiff", "F"),
        ("a.tiff", "LA"),
    ],
)
def test_every_usual_form_is_read(model, tmp_path, name, mode):
    sixteen_bits = Image.fromarray((paint(7) * 65535).astype(np.uint16))
    picture = sixteen_bits if mode == "I;16" else coloured(7, mode)
    grey = load_picture(save(tmp_path / name, picture))
    assert (grey.shape, grey.dtype) == ((200, 200), np.float32)
    assert 0 <= grey.min() < 0.1 < 0.9 < grey.max() <= 1
    assert model.predict(prepare_picture(grey).image[None])[0] == 7


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phones_orientation_is_heeded(tmp_path, orientation):
    turned = {  # what a camera that is held so stores of an upright digit
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    picture = coloured(4)
    for turn in turned:
        picture = picture.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = load_picture(save(tmp_path / "a.png", picture, exif=exif))
    np.testing.assert_allclose(grey, paint(4), atol=0.01)


def cut_out(digit, level, margin=False):
    """Return ink of one grey level on nothing, or with `margin` a whole picture with nothing around it."""
    grey = paint(digit)
    image = np.full((*grey.shape, 4), level, np.uint8)
    image[..., 3] = 255 * (1 - grey)
    if margin:
        image[..., :3] = (255 * grey)[..., None]
        image[..., 3] = 255
        image[:15] = image[-15:] = 0
        image[:, :15] = image[:, -15:] = 0
    return Image.fromarray(image)


@pytest.mark.parametrize("level", [0, 60, 200, 255])
def test_a_cut_out_digit_of_any_colour_is_read(model, tmp_path, level):
    grey = load_picture(save(tmp_path / "a.png", cut_out(6, level)))
    assert model.predict(prepare_picture(grey).image[None])[0] == 6


def test_a_picture_with_nothing_around_it_is_read(model, tmp_path):
    grey = load_picture(save(tmp_path / "a.png", cut_out(6, 0, margin=True)))
    assert model.predict(prepare_picture(grey).image[None])[0] == 6


def test_a_transparent_colour_of_a_palette_is_heeded(model, tmp_path):
    picture = coloured(5, "L").point(lambda level: 1 if level < 128 else 0).convert("P")
    picture.putpalette([255, 255, 255, 255, 255, 255])  # white ink on a white that is to be seen through
    grey = load_picture(save(tmp_path / "a.png", picture, transparency=0))
    assert model.predict(prepare_picture(grey).image[None])[0] == 5


def test_nothing_but_transparency_is_said(tmp_path):
    with pytest.raises(PictureError, match=r"a\.png: the picture is fully transparent"):
        load_picture(save(tmp_path / "a.png", Image.new("RGBA", (20, 20), (0, 0, 0, 0))))


def test_a_large_photograph_is_reduced(tmp_path):
    grey = load_picture(save(tmp_path / "a.jpg", coloured(3).resize((4000, 3000))))
    assert max(grey.shape) <= pictures.WORKING_SIDE + 1


def test_a_long_thin_picture_is_read(tmp_path):
    picture = Image.new("L", (5000, 3), 255)
    picture.paste(0, (100, 0, 300, 3))
    assert load_picture(save(tmp_path / "a.png", picture)).shape[0] >= 1


def png_that_says(width, height):
    """Return a PNG whose header promises so many pixels."""
    out = io.BytesIO()
    Image.new("1", (1, 1)).save(out, "PNG")
    content = bytearray(out.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_what_is_no_picture_is_said_in_one_line(tmp_path, monkeypatch):
    good = save(tmp_path / "good.png", coloured(1)).read_bytes()
    cases = {
        "nowhere.png": (None, "cannot be read: No such file"),
        "empty.png": (b"", "the file is empty"),
        "text.png": (b"a text, not a picture" * 10, "not a picture in a supported format"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a supported format"),
        "cut.png": (good[: len(good) // 2], "the picture is damaged"),
        "bomb.png": (png_that_says(50_000, 50_000), "give a picture of at most 60 million pixels"),
        "large.png": (png_that_says(10_000, 10_000), "10000 x 10000 pixels are too many"),
    }
    for name, (content, expected) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PictureError) as caught:
            load_picture(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(str(tmp_path / name))
        assert expected in message
        assert "\n" not in message
    with pytest.raises(PictureError, match="cannot be read: Is a directory"):
        load_picture(tmp_path)
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(PictureError, match="are too large"):
        load_picture(tmp_path / "good.png")


def test_a_text_chunk_that_unpacks_to_much_is_no_way_in(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 80_000_000, zip=True)
    path = save(tmp_path / "a.png", coloured(1), pnginfo=info)
    assert path.stat().st_size < 200_000
    with pytest.raises(PictureError, match="damaged"):
        load_picture(path)


@settings(max_examples=150)
@given(st.data())
def test_damage_of_any_kind_is_a_picture_or_a_picture_error(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm"]))
    out = io.BytesIO()
    coloured(2).resize((40, 30)).save(out, kind)
    content = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(content)
    try:
        prepared = prepare_picture(load_picture(path))
    except PictureError:
        return
    assert isinstance(prepared, Prepared)
