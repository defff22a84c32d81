"""Prepare pictures and pen strokes of one digit as MNIST's images: 28 x 28 pixels, white on black.

The authors of MNIST [1]_ cropped each digit to its ink, scaled it to fit 20 x 20 pixels with its aspect ratio
unchanged, and placed its centre of mass at the centre of 28 x 28 pixels. In their files the centre of mass is at 14.5
pixels on average.

References
----------
.. [1] Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
   Proceedings of the IEEE 86(11), 1998, section III.A.
"""

import io
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

SIDE, INK_SIDE = 28, 20  # pixels, the sides of an image and of the box around its ink
CENTRE_OF_MASS = 14.5  # pixels from the top and from the left
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # their decoders start no other program
MOST_BYTES = 64 * 2**20  # per file
MOST_PIXELS = 60_000_000  # per picture; phones have up to 50 million
WORKING_SIDE = 768  # pixels; larger pictures are reduced to this side before the ink is searched
PEN = 2.6  # thickness of the strokes in MNIST, in pixels of the 28 x 28 image
THIN, FELT = 1.2, 2.0  # strokes of a picture that are thinner than THIN become as thick as FELT, in the same unit
OVERSAMPLING = 8  # strokes are drawn this much finer than the image
SMALLEST = 0.12  # the least extent of a drawing as a share of its square, so that a dot is not enlarged to a disc


class PictureError(ValueError):
    """A picture is unreadable or contains no digit; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A digit prepared for the model, and its position in the original.

    Parameters
    ----------
    image : ndarray of shape (28, 28)
        The digit, uint8. 0 is background.
    frame : tuple of float
        Left edge, top edge and side of the square that became the image, in the unit of the original. The square
        may extend beyond the original.
    """

    image: np.ndarray
    frame: tuple[float, float, float]


def load_picture(path: str | PathLike[str]) -> np.ndarray:
    """Return the grey levels of a picture file.

    The picture is rotated by its EXIF orientation, a transparent one gets a background, and a large one is reduced
    to 768 pixels per side.

    Parameters
    ----------
    path : path-like
        A PNG, JPEG, WebP, BMP, TIFF or PPM file, or a GIF file whose first frame is used.

    Returns
    -------
    ndarray of shape (R, C)
        Grey levels in 0 to 1, float32.

    Raises
    ------
    PictureError
        If the file is missing, damaged, of another format, or larger than 64 MiB or 60 million pixels.
    """
    try:
        found = os.stat(path)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a pipe may never end
            raise PictureError(f"{path}: not a regular file: give a picture, PNG or JPEG for example")
        size, content = found.st_size, b""
        if size <= MOST_BYTES:
            content = Path(path).read_bytes()
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > MOST_BYTES:
        raise PictureError(
            f"{path}: {size / 2**20:.0f} MiB are too large: give a file of at most {MOST_BYTES // 2**20} MiB"
        )
    if not content:
        raise PictureError(f"{path}: the file is empty: give a picture, PNG or JPEG for example")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about odd metadata, and about sizes, which are checked here
            return _decode(content)
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: too many pixels: {_too_large()}") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        text = f"not a picture in a supported format ({known}): save it as PNG or JPEG"
        raise PictureError(f"{path}: {text}") from error
    except MemoryError as error:
        raise PictureError(f"{path}: not enough memory for the picture: reduce its size") from error
    except Exception as error:  # decoders raise errors of many types for damaged files
        reason = f"{type(error).__name__}: {error}"
        raise PictureError(f"{path}: the picture is damaged ({reason}): copy or save it again") from error


def _decode(content):
    """Return the grey levels of the bytes of a picture file, float32 (R, C)."""
    Image.init()  # loads all of Pillow's decoders
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise PictureError(f"{image.width} x {image.height} pixels are too many: {_too_large()}")
        if image.format in ("JPEG", "MPO"):  # an MPO file contains several JPEGs; some phones write it
            image.draft(None, (WORKING_SIDE, WORKING_SIDE))  # decodes a large photograph at a fraction of its size
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # damaged metadata; the picture is used without a rotation
            image = image.copy()
        return _grey(image)


def _too_large():
    """Return the end of the message for a picture with too many pixels."""
    return f"give a picture of at most {MOST_PIXELS // 1_000_000} million pixels"


def _grey(image):
    """Return a PIL image of any mode as grey levels (R, C) float32 in 0 to 1, reduced to the working side."""
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, of which Pillow's conversion keeps only the lowest 8
        levels = np.asarray(_reduced(image.convert("F")), np.float64)
        levels = np.nan_to_num(levels, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = levels.min(), levels.max()
        image = Image.fromarray(((levels - low) / max(high - low, 1e-30) * 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        return _on_background(_reduced(image.convert("RGBa")))  # premultiplied, so that hidden colours do not bleed
    return np.asarray(_reduced(image.convert("L")), np.float32) / 255


def _reduced(image):
    """Return an image with at most `WORKING_SIDE` pixels per side."""
    if max(image.size) <= WORKING_SIDE:
        return image
    scale = WORKING_SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BOX, reducing_gap=3.0)


def _on_background(image):
    """Return a premultiplied image on an opaque background.

    If the opaque pixels have light and dark levels, their median is the background. Otherwise they are only ink, and
    the background is white for dark ink and black for light ink.
    """
    channels = np.asarray(image, np.float32) / 255
    opacity = channels[..., 3]
    light = channels[..., :3] @ np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's "L"
    solid = opacity > max(0.02, 0.5 * float(opacity.max()))
    if not solid.any():
        raise PictureError("the picture is fully transparent: give one with a digit")
    levels = light[solid] / opacity[solid]
    if np.percentile(levels, 95) - np.percentile(levels, 5) > 0.25:  # there are paper and ink
        background = np.median(levels)
    else:
        background = 1.0 if levels.mean() < 0.5 else 0.0
    return light + (1 - opacity) * np.float32(background)


def find_ink(grey: np.ndarray) -> np.ndarray:
    """Return the amount of ink in each pixel of a grey picture.

    Uneven light is removed first. Ink is what differs from the background in the rarer direction, dark or light, by
    more than a threshold [1]_. Specks and objects that touch the border are removed.

    Parameters
    ----------
    grey : ndarray of shape (R, C)
        Grey levels in 0 to 1, dark on light or light on dark.

    Returns
    -------
    ndarray of shape (R, C)
        Ink in 0 to 1, float32.

    Raises
    ------
    PictureError
        If the shape is another, or nothing differs enough from the background.

    References
    ----------
    .. [1] N. Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    grey = np.asarray(grey, np.float32)
    if grey.ndim != 2 or grey.size == 0 or not np.isfinite(grey).all():
        raise PictureError(f"grey must have the shape (R, C) and finite levels, not {grey.dtype} {grey.shape}")
    contrast = grey - _background(grey)
    noise = _grain(grey)
    if (contrast.astype(np.float64) ** 3).sum() < 0:  # the long tail of the grey levels is dark, so the ink is dark
        contrast = -contrast
    contrast = np.maximum(contrast, 0)
    peak = float(contrast.max())
    if peak < max(0.08, 6 * noise):
        raise PictureError("the picture is blank: nothing stands out from the background; give one with a digit")
    threshold = max(_otsu(contrast), 0.3 * peak)
    strong = contrast > threshold
    kept = _without_specks(strong)
    ramp = np.clip(contrast / threshold - 0.5, 0, 1)  # 0.5 at the threshold, so that grey edges remain grey
    return np.where(_grown(kept), ramp, 0).astype(np.float32)


def _grain(grey):
    """Estimate the standard deviation of the noise from the lower quartile of differences of neighbouring pixels."""
    steps = np.abs(np.diff(grey, axis=1)) if grey.shape[1] > 1 else np.zeros(1)
    return float(np.percentile(steps, 25)) / (0.3186 * np.sqrt(2))  # 0.3186 is the quartile of a normal |x|


def _background(grey):
    """Fit a quadratic surface to the grey levels by least absolute differences, and return it for each pixel.

    The fit is iteratively reweighted least squares on a coarse copy. Ink has little influence because it is rare and
    far from a smooth surface.
    """
    rows, columns = grey.shape
    coarse = Image.fromarray(grey).resize((min(64, columns), min(64, rows)), Image.Resampling.BOX)
    levels = np.asarray(coarse, np.float64)
    terms = _quadratic(*levels.shape)
    surface = np.median(levels)
    for _ in range(12):
        residual = np.abs(levels - surface)
        weight = 1 / np.maximum(residual, 0.01)  # the weights of least absolute differences
        weighted = terms * weight.ravel()[:, None]
        # A small ridge determines the quadratic terms where a thin picture or a large digit does not.
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
    """Return the threshold that maximises the variance between two groups of `values` (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):  # a group may be empty
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(between)])


def _without_specks(mask):
    """Return `mask` without small parts and, if other parts remain, without parts that touch the border."""
    from scipy import ndimage  # imported here because strokes do not need it

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


def centre(ink: np.ndarray, size: float | None = None) -> Prepared:
    """Scale ink to fit 20 x 20 pixels, and centre its mass in an image of 28 x 28 pixels.

    Scaling and shifting are one resampling, so the position is exact to a fraction of a pixel. If centring would
    move ink out of the image, the shift is smaller.

    Parameters
    ----------
    ink : ndarray of shape (R, C)
        Ink in 0 to 1.
    size : float, optional
        Length in pixels that becomes 20 pixels. Default: the longer side of the box around all ink, which is also
        the minimum.

    Returns
    -------
    Prepared
        The image. Its frame is in pixels of `ink`.

    Raises
    ------
    PictureError
        If there is no ink.
    """
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.25), np.flatnonzero(ink.max(axis=0) > 0.25)
    if not len(rows):
        raise PictureError("the picture is blank: there is no ink; give one with a digit")
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    longest = max(bottom - top, right - left)
    pixel = max(longest, size or 0) / INK_SIDE  # side of a pixel of the image, in pixels of the ink
    ink = ink[top:bottom, left:right].astype(np.float64)
    total = ink.sum()
    y = top + (ink.sum(axis=1) @ (np.arange(len(ink)) + 0.5)) / total
    x = left + (ink.sum(axis=0) @ (np.arange(ink.shape[1]) + 0.5)) / total
    side = SIDE * pixel
    frame_left = np.clip(x - CENTRE_OF_MASS * pixel, right - side, left)
    frame_top = np.clip(y - CENTRE_OF_MASS * pixel, bottom - side, top)

    # The frame extends beyond the ink on every side, so the ink is padded with background.
    before = [int(np.ceil(gap)) for gap in (top - frame_top, left - frame_left)]
    after = [int(np.ceil(gap)) for gap in (frame_top + side - bottom, frame_left + side - right)]
    padded = np.pad(ink, list(zip(before, after, strict=True)))
    image = Image.fromarray((padded * 255).round().astype(np.uint8))
    x0, y0 = frame_left - left + before[1], frame_top - top + before[0]
    box = x0, y0, min(x0 + side, image.width), min(y0 + side, image.height)  # a rounding error may exceed the size
    small = image.resize((SIDE, SIDE), Image.Resampling.HAMMING, box=box)
    digit = np.asarray(small, np.float64)
    digit *= 255 / digit.max()  # reducing makes thin lines grey, but the brightest pixels of MNIST are white
    return Prepared(digit.round().astype(np.uint8), (float(frame_left), float(frame_top), float(side)))


def prepare_picture(grey: np.ndarray) -> Prepared:
    """Prepare the digit in a grey picture with `find_ink`, `thicken` and `centre`.

    Parameters
    ----------
    grey : ndarray of shape (R, C)
        Grey levels in 0 to 1, dark on light or light on dark.

    Returns
    -------
    Prepared
        The image. Its frame is in pixels of the picture.

    Raises
    ------
    PictureError
        If there is no ink.
    """
    return centre(thicken(find_ink(grey)))


def thicken(ink: np.ndarray) -> np.ndarray:
    """Thicken strokes that are as thin as those of a ballpoint pen.

    The strokes in MNIST are about an eighth of the digit wide. Those of a ballpoint pen would be half a pixel wide in
    20 x 20 pixels, and the training set has no such digits.

    Parameters
    ----------
    ink : ndarray of shape (R, C)
        Ink in 0 to 1.

    Returns
    -------
    ndarray of shape (R, C)
        Ink with thicker strokes, or `ink` itself if its strokes are not thin.
    """
    mask = ink > 0.5
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return ink
    pixel = max(rows[-1] - rows[0], columns[-1] - columns[0]) / INK_SIDE
    # The two edges of a stroke are each as long as the stroke. Counting pixel steps overestimates the length of
    # slanted edges, on average by 4 / pi.
    edge = sum(int((mask != np.roll(mask, 1, axis)).sum()) for axis in (0, 1)) * np.pi / 4
    width = 2 * mask.sum() / max(edge, 1)
    if width >= THIN * pixel:
        return ink
    from scipy import ndimage  # imported here because strokes do not need it

    reach = (FELT * pixel - width) / 2
    away = ndimage.distance_transform_edt(~mask)  # pixels to the nearest ink
    return np.maximum(ink, np.clip(reach + 0.5 - away, 0, 1)).astype(np.float32)


def prepare_strokes(strokes: Sequence[npt.ArrayLike] | np.ndarray) -> Prepared:
    """Prepare pen strokes that were drawn on a square of side 1.

    After scaling, the pen is as thick as the strokes in MNIST for drawings of any size.

    Parameters
    ----------
    strokes : sequence of array_like of shape (n, 2)
        Points (x, y) in 0 to 1, with y downwards. A stroke of one point is a dot.

    Returns
    -------
    Prepared
        The image. Its frame is in the unit of the square.

    Raises
    ------
    PictureError
        If there is no stroke, a stroke is empty, or a point is not a pair of numbers in 0 to 1.
    """
    try:
        lines = [np.asarray(stroke, np.float64) for stroke in strokes]
    except (TypeError, ValueError) as error:
        raise PictureError(f"strokes must be lists of points [x, y], numbers in 0 to 1 ({error})") from error
    if not lines or any(line.ndim != 2 or line.shape[1] != 2 or not len(line) for line in lines):
        raise PictureError("strokes must be one or more lists of one or more points [x, y] in 0 to 1")
    points = np.concatenate(lines)
    if not ((points >= 0) & (points <= 1)).all():  # this is true for NaN, too
        raise PictureError("every x and y of a stroke must be a number from 0 to 1")

    start = points.min(axis=0)
    extent = max(float((points.max(axis=0) - start).max()), SMALLEST)
    pen = PEN * OVERSAMPLING
    scale = ((INK_SIDE - PEN) * OVERSAMPLING) / extent  # the drawing grows by the width of the pen
    margin = pen / 2 + 1
    width, height = np.ceil((points.max(axis=0) - start) * scale + 2 * margin).astype(int)
    canvas = Image.new("L", (int(width), int(height)))
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        _draw_stroke(draw, (line - start) * scale + margin, pen)
    prepared = centre(np.asarray(canvas, np.float32) / 255, size=INK_SIDE * OVERSAMPLING)
    left, top, side = prepared.frame
    frame = float((left - margin) / scale + start[0]), float((top - margin) / scale + start[1]), float(side / scale)
    return Prepared(prepared.image, frame)


def _draw_stroke(draw, points, pen):
    """Draw a line of `points` (n, 2) with round ends and corners."""
    places = np.round(points * 2) / 2  # points of a resting pen become equal and are drawn once
    moved = (np.diff(places, axis=0) != 0).any(axis=1)
    flat = [tuple(point) for point in places[np.concatenate([[True], moved])].tolist()]
    if len(flat) > 1:
        draw.line(flat, fill=255, width=round(pen))
    radius = pen / 2
    for x, y in flat:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
