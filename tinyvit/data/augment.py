"""Random rotations, scales, shears, shifts and flips: one affine map an image, a whole batch at once."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checks import require_number


@dataclass(frozen=True)
class Augmentation:
    """How far an image may be changed; every range is symmetric and uniform, and 0 leaves it out.

    rotation: degrees; scale: a share, 0.1 for 1/1.1 to 1.1 times (uniform in its logarithm); shear: degrees;
    shift: pixels, down and across alike; flip: the probability of a mirror image, left for right.
    Raises `ValueError` on a value out of range.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    flip: float = 0.0

    def __post_init__(self):
        limits = {"rotation": 180, "scale": 0.9, "shear": 60, "shift": 1000, "flip": 1}
        for name, limit in limits.items():
            require_number(f"augmentation {name}", getattr(self, name), 0, limit)

    def __bool__(self):
        return any(asdict(self).values())

    def draw(self, rng, count):
        """Draw `count` maps from a NumPy generator: (count, 2, 3) float32, for `warp`.

        A map takes a place (row, column, 1) of the new image, in pixels from its centre, to the place of the old
        image whose brightness it gets. Every range draws its numbers whether used or not, so that one flag does
        not change what the others do.
        """
        uniform = rng.uniform(-1, 1, (6, count))
        # new place -> mirror -> shear -> turn -> divide by the scale -> shift -> old place
        angle = np.deg2rad(self.rotation) * uniform[0]
        zoom = np.exp(math.log1p(self.scale) * uniform[1])
        shear = np.tan(np.deg2rad(self.shear) * uniform[2])
        down, across = self.shift * uniform[3], self.shift * uniform[4]
        mirror = np.where(uniform[5] < 2 * self.flip - 1, -1.0, 1.0)

        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        maps = np.empty((count, 2, 3), np.float32)
        maps[:, 0, 0] = cos
        maps[:, 0, 1] = (cos * shear - sin) * mirror
        maps[:, 1, 0] = sin
        maps[:, 1, 1] = (sin * shear + cos) * mirror
        maps[:, 0, 2] = down
        maps[:, 1, 2] = across
        return maps


def warp(images, maps):
    """Move every image through its map with bilinear interpolation. Pixels outside the image are black.

    images: (B, R, C) uint8 0 to 255; maps: (B, 2, 3) float32 from `Augmentation.draw`, on the same device.
    Returns (B, R, C) float32 in 0 to 1. Raises `ValueError` if there is not one map an image and, on a CPU, if a map
    is not finite; a GPU would have to be waited for, and makes such an image black or NaN.
    """
    xp = array_module(images)
    batch, rows, columns = images.shape
    if maps.shape != (batch, 2, 3):
        raise ValueError(f"{batch} images need maps of shape ({batch}, 2, 3), not {maps.shape}")
    if xp is np and not np.isfinite(maps).all():
        raise ValueError("a map has entries that are not finite numbers, and leads to no place of an image")

    # a black frame, two pixels wide below and to the right: a place outside is clipped onto it, and needs no test
    height, width = rows + 3, columns + 3
    framed = xp.zeros((batch, height, width), xp.float32)
    framed[:, 1:-2, 1:-2] = images

    row_centre, column_centre = (rows - 1) / 2, (columns - 1) / 2
    grid = xp.ones((3, rows, columns), xp.float32)
    grid[0] = xp.arange(rows, dtype=xp.float32)[:, None] - row_centre
    grid[1] = xp.arange(columns, dtype=xp.float32) - column_centre
    places = maps.reshape(batch * 2, 3) @ grid.reshape(3, rows * columns)
    places = places.reshape(batch, 2, rows * columns)
    row = xp.clip(places[:, 0] + (row_centre + 1), 0, rows + 1)  # (B, R*C), in framed pixels
    column = xp.clip(places[:, 1] + (column_centre + 1), 0, columns + 1)

    upper, left = row.astype(xp.int32), column.astype(xp.int32)  # both positive: this rounds down
    row -= upper
    column -= left
    corner = upper
    corner *= width
    corner += left
    corner += xp.arange(batch, dtype=xp.int32)[:, None] * (height * width)

    flat = framed.reshape(-1)
    upper_left, lower_left = flat[corner], flat[corner + width]
    corner += 1
    upper_right, lower_right = flat[corner], flat[corner + width]
    above = upper_left + column * (upper_right - upper_left)
    below = lower_left + column * (lower_right - lower_left)
    moved = above + row * (below - above)
    moved *= 1 / 255
    return moved.reshape(batch, rows, columns)
