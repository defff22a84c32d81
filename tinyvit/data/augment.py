"""Random rotations, scales, shears, shifts and flips of a batch, with one affine map per image."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from tinyvit.backend import array_module
from tinyvit.checks import as_array, require_arrays, require_number


@dataclass(frozen=True)
class Augmentation:
    """Limits of random changes of an image. A limit of 0 switches a change off.

    Parameters
    ----------
    rotation : float, default 0.0
        Largest angle in degrees, in both directions, at most 180.
    scale : float, default 0.0
        Largest change of size, at most 0.9. For example, 0.1 gives factors from 1 / 1.1 to 1.1.
    shear : float, default 0.0
        Largest angle of a shear in degrees, in both directions, at most 60.
    shift : float, default 0.0
        Largest shift in pixels, in each of the four directions, at most 1000.
    flip : float, default 0.0
        Probability of a flip from left to right, at most 1.

    Raises
    ------
    ValueError
        If a value is not a number within its limits.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    flip: float = 0.0

    def __post_init__(self):
        limits = {"rotation": 180, "scale": 0.9, "shear": 60, "shift": 1000, "flip": 1}
        for name, limit in limits.items():
            require_number(f"augmentation {name}", getattr(self, name), minimum=0, maximum=limit)

    def __bool__(self):
        return any(asdict(self).values())

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw random maps for `warp`.

        Parameters
        ----------
        rng : numpy.random.Generator
            Source of the random numbers.
        count : int
            Number of maps.

        Returns
        -------
        ndarray of shape (count, 2, 3)
            Float32 maps. A map times (row, column, 1), the place of a pixel in the new image, is the place in the old
            image that the pixel shows. Rows and columns are measured in pixels from the centre.

        Notes
        -----
        Angles and shifts are uniform, and so is the logarithm of the scale. Changes that are off draw random numbers
        too, so that switching one on does not affect the others.
        """
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng must be a numpy.random.Generator, not {type(rng).__name__}")
        uniform = rng.uniform(-1, 1, (6, count))
        # From a place in the new image to one in the old image, a map flips, shears, rotates, scales and shifts.
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


def warp(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Transform each image by its map with bilinear interpolation. Pixels outside the image are black.

    Parameters
    ----------
    images : ndarray of shape (B, R, C) or (B, R, C, channels)
        Images, uint8 from 0 to 255.
    maps : ndarray of shape (B, 2, 3)
        Float32 maps of `Augmentation.draw`, on the device of the images.

    Returns
    -------
    ndarray of the shape of `images`
        Float32 images from 0 to 1.

    Raises
    ------
    TypeError
        If the maps are not float or not on the device of the images.
    ValueError
        If the images are not uint8, there is not one map per image, or a map is not finite.

    Notes
    -----
    On a GPU, maps are not checked for NaN and infinity, because this would wait for the device. There, an image with
    such a map becomes black or NaN.
    """
    images = as_array("images", images)
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        expected = "uint8 of shape (B, R, C) or (B, R, C, channels)"
        raise ValueError(f"images must be {expected}, not {images.dtype} {images.shape}")
    xp = array_module(images)
    batch, rows, columns, *channels = images.shape
    require_arrays("maps (B, 2, 3)", maps)
    if array_module(maps) is not xp:
        raise TypeError("maps must be on the device of the images: use Backend.asarray")
    if maps.shape != (batch, 2, 3):
        raise ValueError(f"{batch} images need maps of shape ({batch}, 2, 3), not {maps.shape}")
    if xp is np and not np.isfinite(maps).all():
        raise ValueError("every entry of maps must be a finite number, but some are NaN or infinite")

    # A black frame surrounds the image, with a width of one pixel above and left, and of two pixels below and right.
    # Places outside the image are clipped to the frame, which also contains their lower and right neighbours.
    height, width = rows + 3, columns + 3
    framed = xp.zeros((batch, height, width, *channels), xp.float32)
    framed[:, 1:-2, 1:-2] = images

    row_centre, column_centre = (rows - 1) / 2, (columns - 1) / 2
    grid = xp.ones((3, rows, columns), xp.float32)
    grid[0] = xp.arange(rows, dtype=xp.float32)[:, None] - row_centre
    grid[1] = xp.arange(columns, dtype=xp.float32) - column_centre
    places = maps.reshape(batch * 2, 3) @ grid.reshape(3, rows * columns)
    places = places.reshape(batch, 2, rows * columns)
    row = xp.clip(places[:, 0] + (row_centre + 1), 0, rows + 1)  # (B, R*C), in framed pixels
    column = xp.clip(places[:, 1] + (column_centre + 1), 0, columns + 1)

    upper, left = row.astype(xp.int32), column.astype(xp.int32)  # truncation rounds down, because neither is negative
    row -= upper
    column -= left
    corner = upper  # reuses the memory of upper for the index of the upper left pixel in `flat`
    corner *= width
    corner += left
    corner += xp.arange(batch, dtype=xp.int32)[:, None] * (height * width)

    flat = framed.reshape(-1, *channels)
    row, column = (x.reshape(*x.shape, *(1 for _ in channels)) for x in (row, column))
    upper_left, lower_left = flat[corner], flat[corner + width]
    corner += 1
    upper_right, lower_right = flat[corner], flat[corner + width]
    above = upper_left + column * (upper_right - upper_left)
    below = lower_left + column * (lower_right - lower_left)
    moved = above + row * (below - above)
    moved *= 1 / 255
    return moved.reshape(images.shape)
