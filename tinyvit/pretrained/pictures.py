"""Pictures and pen strokes of one digit, prepared as MNIST was: any size and colours to 28 x 28, white on black.

MNIST's digits were cut to their ink, scaled into 20 x 20 pixels keeping their aspect, which anti-aliased them, and
laid into 28 x 28 so that their centre of mass is in the middle (measured: between the 14th and 15th pixel, at 14.5).
Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86(11), 1998, section III.A.
"""

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

SIDE, INK_SIDE, MIDDLE = 28, 20, 14.5  # pixels: of an image, of a digit's longer side, and where its mass centres
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that start no other program
MOST_BYTES = 64 * 2**20  # of a file
MOST_PIXELS = 60_000_000  # of a picture: phones take up to 50 million
WORKING_SIDE = 768  # pixels: to what a photograph is reduced before its ink is looked for
PEN = 2.6  # pixels of 28: how thick the strokes of MNIST's digits are
THIN, FELT = 1.2, 2.0  # pixels of 28: strokes of a picture that are thinner than the first get the second
OVERSAMPLING = 8  # strokes are drawn so much finer than they are kept
SMALLEST = 0.12  # share of the drawing's side that a drawing is taken to have at least: a dot stays a dot


class PictureError(ValueError):
    """A picture that cannot be read, or has no digit to be read; the message says what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A digit as the model wants it, and where in the original that square lies."""

    image: np.ndarray  # (28, 28) uint8, 0 is background
    frame: tuple  # left, top, side of the 28 x 28 square, in the original's own unit; may reach beyond it


def load_picture(path):
    """Return the grey levels (R, C) float32 in 0 to 1 of the picture in the file at `path`.

    PNG, JPEG, WebP, BMP, GIF (its first frame), TIFF or PPM, turned as its EXIF orientation says, transparency laid
    on a background that its ink stands out from, and reduced to 768 pixels a side where it is larger. Raises
    `PictureError` if it is no such picture, damaged, or larger than 64 MiB or 60 million pixels.
    """
    try:
        found = os.stat(path)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a pipe may never end
            raise PictureError(f"{path}: expected a file")
        size, content = found.st_size, b""
        if size <= MOST_BYTES:
            content = Path(path).read_bytes()
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > MOST_BYTES:
        raise PictureError(
            f"{path}: {size / 2**20:.0f} MiB are too large: a picture may have {MOST_BYTES // 2**20} MiB"
        )
    if not content:
        raise PictureError(f"{path}: the file is empty: expected a picture, PNG or JPEG for example")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which are looked at here
            return _decode(content)
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: {_too_large()}") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        text = f"not a picture in a form that is known here ({known}): save it as PNG or JPEG"
        raise PictureError(f"{path}: {text}") from error
    except MemoryError as error:
        raise PictureError(f"{path}: not enough memory for it: make it smaller first") from error
    except Exception as error:  # of a damaged file a decoder raises nearly anything: OSError, SyntaxError, ...
        raise PictureError(f"{path}: a damaged picture ({type(error).__name__}: {error})") from error


def _decode(content):
    Image.init()  # only then are all of Pillow's decoders there
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise PictureError(f"{image.width} x {image.height} pixels; {_too_large()}")
        if image.format in ("JPEG", "MPO"):  # which is several JPEGs, as some phones write them
            image.draft(None, (WORKING_SIDE, WORKING_SIDE))  # decodes a large photograph at a fraction of its size
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # damaged metadata beside sound pixels: the picture is read as it lies
            image = image.copy()
        return _grey(image)


def _too_large():
    return f"a picture may have {MOST_PIXELS // 1_000_000} million pixels: make it smaller first"


def _grey(image):
    """Return a PIL image of any mode as grey levels (R, C) float32 in 0 to 1, reduced to the working side."""
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, of which Pillow's own conversion keeps the lowest 8
        levels = np.asarray(_reduced(image.convert("F")), np.float64)
        levels = np.nan_to_num(levels, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = levels.min(), levels.max()
        image = Image.fromarray(((levels - low) / max(high - low, 1e-30) * 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        return _on_background(_reduced(image.convert("RGBa")))  # premultiplied: what is hidden must not bleed
    return np.asarray(_reduced(image.convert("L")), np.float32) / 255


def _reduced(image):
    if max(image.size) <= WORKING_SIDE:
        return image
    scale = WORKING_SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BOX, reducing_gap=3.0)


def _on_background(image):
    """Lay a premultiplied image on its own background's grey, or, if it is ink alone, on what the ink contrasts with.

    A cut-out has ink alone and nothing around it: black ink wants white paper, white ink wants black.
    """
    channels = np.asarray(image, np.float32) / 255
    opacity = channels[..., 3]
    light = channels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's "L"
    solid = opacity > max(0.02, 0.5 * float(opacity.max()))
    if not solid.any():
        raise PictureError("nothing but transparency: there is no digit to read")
    levels = light[solid] / opacity[solid]
    if np.percentile(levels, 95) - np.percentile(levels, 5) > 0.25:  # paper and ink are both there
        background = np.median(levels)
    else:
        background = 1.0 if levels.mean() < 0.5 else 0.0
    return light + (1 - opacity) * np.float32(background)


def find_ink(grey):
    """Return how much ink each pixel of a grey picture has, (R, C) float32 in 0 to 1, whatever the colours.

    grey: (R, C) float in 0 to 1, dark on light or light on dark. Light that falls off across a photograph is
    levelled; the ink is what stands out on the rarer side; a threshold (Otsu 1979) parts it from the paper; specks,
    and things that reach in from the border, are left out. Raises `PictureError` if nothing stands out.
    """
    grey = np.asarray(grey, np.float32)
    if grey.ndim != 2 or grey.size == 0 or not np.isfinite(grey).all():
        raise PictureError(f"a picture has the shape (R, C) and finite grey levels, not {grey.dtype} {grey.shape}")
    contrast = grey - _background(grey)
    noise = _grain(grey)
    if (contrast.astype(np.float64) ** 3).sum() < 0:  # the long tail of the grey levels is dark: dark ink
        contrast = -contrast
    contrast = np.maximum(contrast, 0)
    peak = float(contrast.max())
    if peak < max(0.08, 6 * noise):
        raise PictureError("blank: nothing stands out from the background, so there is no digit to read")
    threshold = max(_otsu(contrast), 0.3 * peak)
    strong = contrast > threshold
    kept = _digit_alone(strong)
    ramp = np.clip(contrast / threshold - 0.5, 0, 1)  # half-way at the threshold, so that grey edges stay grey
    return np.where(_grown(kept), ramp, 0).astype(np.float32)


def _grain(grey):
    """Return the standard deviation of the paper's grain, from the quietest quarter of steps to the next pixel."""
    steps = np.abs(np.diff(grey, axis=1)) if grey.shape[1] > 1 else np.zeros(1)
    return float(np.percentile(steps, 25)) / (0.3186 * np.sqrt(2))  # of a normal distribution's absolute values


def _background(grey):
    """Return the paper's light in every pixel: the quadratic surface near to most of a coarse copy's pixels.

    Iteratively reweighted, so that ink, which is rare and far from any smooth surface, has next to no say.
    """
    rows, columns = grey.shape
    coarse = Image.fromarray(grey).resize((min(64, columns), min(64, rows)), Image.Resampling.BOX)
    levels = np.asarray(coarse, np.float64)
    terms = _quadratic(*levels.shape)
    surface = np.median(levels)
    for _ in range(12):
        residual = np.abs(levels - surface)
        weight = 1 / np.maximum(residual, 0.01)  # of least absolute differences
        weighted = terms * weight.ravel()[:, None]
        # a small ridge holds the bent terms down, where a thin picture or a large digit leaves them open
        normal = weighted.T @ terms + 1e-3 * weight.sum() * np.diag([0, 1, 1, 1, 1, 1])
        surface = (terms @ np.linalg.solve(normal, weighted.T @ levels.ravel())).reshape(levels.shape)
    fine = Image.fromarray(surface.astype(np.float32)).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(fine)


def _quadratic(rows, columns):
    """Return the terms 1, y, x, yy, xy, xx of every pixel, (rows * columns, 6), with x and y in -1 to 1."""
    y = ((np.arange(rows) + 0.5) / rows * 2 - 1)[:, None] * np.ones(columns)
    x = ((np.arange(columns) + 0.5) / columns * 2 - 1)[None] * np.ones((rows, 1))
    return np.stack([np.ones_like(x), y, x, y * y, x * y, x * x], axis=-1).reshape(-1, 6)


def _otsu(values):
    """Return the threshold that parts `values` into two groups with means as far apart as can be (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):  # where a group is empty
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(between)])


def _digit_alone(mask):
    """Return `mask` without specks, and without what reaches in from the border, if anything else is there."""
    from scipy import ndimage  # here, as strokes have no use for it

    parts, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    at_border = np.zeros(count + 1, bool)
    at_border[np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])] = True
    inner = np.where(at_border, 0, sizes)
    if inner.max() >= 0.001 * mask.size and inner.max() >= 12:
        sizes = inner
    return (sizes >= 0.05 * sizes.max())[parts] & mask


def _grown(mask):
    """Return `mask` grown by one pixel on every side."""
    padded = np.pad(mask, 1)
    across = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return across[:-2] | across[1:-1] | across[2:]


def centre(ink, size=None):
    """Scale ink (R, C), float in 0 to 1, into 20 x 20 pixels and lay it into 28 x 28 with its mass in the middle.

    size: how many of its pixels become 20, by default the longer side of the box around all ink. One resampling does
    all of it, so that the place is exact to a fraction of a pixel. Where a digit's mass is so far to one side that
    the other would be cut off, it stays a little off the middle. Returns `Prepared`, its frame in pixels of `ink`.
    Raises `PictureError` if there is no ink.
    """
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.25), np.flatnonzero(ink.max(axis=0) > 0.25)
    if not len(rows):
        raise PictureError("blank: there is no ink, so there is no digit to read")
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    longest = max(bottom - top, right - left)
    pixel = max(longest, size or 0) / INK_SIDE  # the side of one of the 28 x 28 pixels
    ink = ink[top:bottom, left:right].astype(np.float64)
    total = ink.sum()
    y = top + (ink.sum(axis=1) @ (np.arange(len(ink)) + 0.5)) / total
    x = left + (ink.sum(axis=0) @ (np.arange(ink.shape[1]) + 0.5)) / total
    side = SIDE * pixel
    frame_left = np.clip(x - MIDDLE * pixel, right - side, left)
    frame_top = np.clip(y - MIDDLE * pixel, bottom - side, top)

    # the frame reaches beyond the ink on every side: that is background
    before = [int(np.ceil(gap)) for gap in (top - frame_top, left - frame_left)]
    after = [int(np.ceil(gap)) for gap in (frame_top + side - bottom, frame_left + side - right)]
    padded = np.pad(ink, list(zip(before, after, strict=True)))
    padded = Image.fromarray((padded * 255).round().astype(np.uint8))
    x0, y0 = frame_left - left + before[1], frame_top - top + before[0]
    box = x0, y0, min(x0 + side, padded.width), min(y0 + side, padded.height)  # a rounding error is outside
    small = padded.resize((SIDE, SIDE), Image.Resampling.HAMMING, box=box)
    image = np.asarray(small, np.float64)
    image *= 255 / image.max()  # a thin line is grey when it is reduced, and MNIST's brightest pixels are white
    return Prepared(image.round().astype(np.uint8), (float(frame_left), float(frame_top), float(side)))


def prepare_picture(grey):
    """Return the digit in a grey picture, (R, C) float in 0 to 1, as `Prepared`: `find_ink`, `thicken`, `centre`."""
    return centre(thicken(find_ink(grey)))


def thicken(ink):
    """Return `ink` (R, C), float in 0 to 1, with strokes like a felt pen's where they are as thin as a ballpoint's.

    MNIST's digits have strokes of about an eighth of their size. A ballpoint's would be faint threads of half a pixel
    in 20 x 20, which the model has never seen. The picture keeps its size; ink that would leave it is lost.
    """
    mask = ink > 0.5
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return ink
    pixel = max(rows[-1] - rows[0], columns[-1] - columns[0]) / INK_SIDE
    # a stroke's two edges are each as long as it is; steps at a slant are counted twice, of which pi / 4 remain
    edge = sum(int((mask != np.roll(mask, 1, axis)).sum()) for axis in (0, 1)) * np.pi / 4
    width = 2 * mask.sum() / max(edge, 1)
    if width >= THIN * pixel:
        return ink
    from scipy import ndimage  # here, as strokes have no use for it

    reach = (FELT * pixel - width) / 2
    away = ndimage.distance_transform_edt(~mask)  # pixels to the nearest ink
    return np.maximum(ink, np.clip(reach + 0.5 - away, 0, 1)).astype(np.float32)


def prepare_strokes(strokes):
    """Return pen strokes, drawn on a square of side 1, as `Prepared`; its frame is in that unit.

    strokes: lists of points (x, y) in 0 to 1, y downwards; one point is a dot. They are drawn with a pen as thick as
    MNIST's after scaling, however large the drawing is. Raises `PictureError` if there is no point, a point that
    is no pair of numbers in 0 to 1, or an empty stroke.
    """
    try:
        lines = [np.asarray(stroke, np.float64) for stroke in strokes]
    except (TypeError, ValueError) as error:
        raise PictureError(f"strokes are lists of points [x, y], numbers in 0 to 1 ({error})") from error
    if not lines or any(line.ndim != 2 or line.shape[1] != 2 or not len(line) for line in lines):
        raise PictureError("strokes are one or more lists of one or more points [x, y] in 0 to 1")
    points = np.concatenate(lines)
    if not ((points >= 0) & (points <= 1)).all():  # NaN is refused too
        raise PictureError("every x and y of a stroke is a number from 0 to 1")

    start = points.min(axis=0)
    extent = max(float((points.max(axis=0) - start).max()), SMALLEST)
    pen = PEN * OVERSAMPLING
    scale = ((INK_SIDE - PEN) * OVERSAMPLING) / extent  # the pen makes the drawing larger by its own width
    margin = pen / 2 + 1
    width, height = np.ceil((points.max(axis=0) - start) * scale + 2 * margin).astype(int)
    canvas = Image.new("L", (int(width), int(height)))
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        _draw_stroke(draw, (line - start) * scale + margin, pen)
    prepared = centre(np.asarray(canvas, np.float32) / 255, size=INK_SIDE * OVERSAMPLING)
    left, top, side = prepared.frame
    frame = (left - margin) / scale + start[0], (top - margin) / scale + start[1], side / scale
    return Prepared(prepared.image, tuple(float(value) for value in frame))


def _draw_stroke(draw, points, pen):
    """Draw a line of `points` (n, 2) with round ends and corners."""
    places = np.round(points * 2) / 2  # of a fine pixel: where the pen rested there is nothing to draw twice
    moved = (np.diff(places, axis=0) != 0).any(axis=1)
    flat = [tuple(point) for point in places[np.concatenate([[True], moved])].tolist()]
    if len(flat) > 1:
        draw.line(flat, fill=255, width=round(pen))
    radius = pen / 2
    for x, y in flat:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
