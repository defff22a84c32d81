"""Folders of pictures, with one sub-folder per class."""

import os
import unicodedata
import warnings
from functools import partial

import numpy as np

from tinyvit.data.arrays import SPLITS, Found, Part, Source
from tinyvit.data.contents import MOST_BYTES, is_file, listing, one_error, visible
from tinyvit.data.mnist import DatasetError
from tinyvit.signatures import broken_link

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF")  # their decoders start no other program
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".pgm", ".ppm", ".pbm", ".webp", ".tif", ".tiff")
MOST_PIXELS = 4096 * 4096  # per picture


def find_folders(folder, paths):
    """Return a `Source` for a folder with one sub-folder of pictures per class, or with such folders per split."""
    splits, notes = {}, []
    for path in paths:
        split = SPLITS.get(os.path.basename(path).lower())
        if split and _classes(path):
            if split in splits:
                raise DatasetError(folder, "one folder per split", f"{splits[split]} and {path}: rename one")
            splits[split] = path
        elif split and os.path.isdir(path) and pictures_in(path):
            notes.append(f"the pictures in {os.path.basename(path)} have no labels")
    splits, notes = (splits, notes) if "train" in splits else ({"train": folder}, [])
    names = {name.lower() for name in _classes(splits["train"])}
    return [Source(folder, (), partial(_read, splits, notes))] * (len(names) > 1 and not names <= SPLITS.keys())


def _classes(folder):
    """Return the names of the sub-folders of a folder that have pictures."""
    return [_name(path) for path in _folders(folder) if pictures_in(path)]


def _name(path):
    """Return the name of a class. macOS stores accents in another form of Unicode than other systems."""
    return unicodedata.normalize("NFC", os.path.basename(path))


def _folders(path):
    """Return the paths of the sub-folders of a folder, and of links to missing ones, which cannot be read."""
    paths = visible(path) if os.path.isdir(path) else []
    return [path for path in paths if os.path.isdir(path) or broken_link(path)]


def pictures_in(folder):
    """Return the paths of the pictures in a folder."""
    return [path for path in visible(folder) if path.lower().endswith(SUFFIXES) and is_file(path)]


def _read(splits, notes):
    """Return the `Found` of the folders of each split."""
    names = list(dict.fromkeys(map(_name, _folders(splits["train"]))))
    names.sort(key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    files = {split: _files(folder, names) for split, folder in splits.items()}
    pictures, notes = _decode_all([file for pairs in files.values() for file, _ in pairs]), [*notes]
    images, parts = _stack(pictures, notes), {}
    for split, pairs in files.items():
        labels = np.array([label for _, label in pairs], int)
        parts[split] = Part(images[: len(pairs)], labels, splits[split], splits[split])
        images = images[len(pairs) :]
    return Found("folders of pictures", parts, tuple(names), file="", notes=notes)


def _files(folder, classes):
    """Return the pairs of path and class of the pictures in the sub-folders of a split."""
    pairs = []
    for path in _folders(folder):
        name, pictures = _name(path), pictures_in(path)
        if name not in classes:
            raise DatasetError(folder, f"folders of the classes {', '.join(classes[:8])}", f"a folder {name}")
        if not pictures:
            raise DatasetError(path, "pictures, PNG or JPEG for example", listing(path))
        pairs += [(picture, classes.index(name)) for picture in pictures]
    return pairs


def _decode_all(files):
    """Return the pictures of files as a list of arrays, which have one size."""
    pictures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about odd metadata, and about sizes, which are checked here
        for file in files:
            pictures.append(_decode(file))
            size, first = pictures[-1].shape, pictures[0].shape
            if size[:2] != first[:2]:
                found = f"{size[0]} x {size[1]} pixels: resize all pictures to one size first"
                raise DatasetError(file, f"{first[0]} x {first[1]} pixels as in {files[0]}", found)
            if len(files) * pictures[0].size > MOST_BYTES:
                raise DatasetError(file, f"at most {MOST_BYTES:,} bytes of pixels in all", f"{len(files):,} pictures")
    return pictures


def _decode(file):
    """Return a picture as uint8 of shape (R, C), (R, C, 3), or (R, C, 4) with its opacity."""
    from PIL import Image, ImageOps  # imported here so that tinyvit starts quickly

    with one_error(file, f"an intact picture, {' or '.join(FORMATS)}"), Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise DatasetError(file, f"at most {MOST_PIXELS:,} pixels", f"{image.width} x {image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would keep only the lowest 8
            return (np.clip(np.asarray(image).astype(int), 0, 65535) // 257).astype(np.uint8)
        transparent = "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa")
        grey = image.mode in ("1", "L") and not transparent
        return np.array(image.convert("RGBA" if transparent else "L" if grey else "RGB"))


def _stack(pictures, notes):
    """Return pictures as one array, (N, R, C) if none has colour and (N, R, C, 3) otherwise.

    All transparent pictures get one background: white if their opaque pixels are mostly dark, and black otherwise.
    """
    sheer = [picture for picture in pictures if picture.shape[2:] == (4,) and picture[..., 3].min() < 255]
    solid = [picture[picture[..., 3] > 127, :3] for picture in sheer]
    background = 255 if solid and np.concatenate(solid).mean() < 128 else 0
    if solid:
        notes.append(f"transparent pixels became {'white' if background else 'black'}")
    for i, picture in enumerate(pictures):
        pictures[i] = picture if picture.ndim == 3 else picture[..., None]
        if picture.shape[2:] == (4,):
            opacity = picture[..., 3:] / 255
            pictures[i] = np.rint(picture[..., :3] * opacity + background * (1 - opacity)).astype(np.uint8)
    if any((picture != picture[..., :1]).any() for picture in pictures):
        return np.stack([np.broadcast_to(picture, (*picture.shape[:2], 3)) for picture in pictures])
    return np.stack([picture[..., 0] for picture in pictures])
