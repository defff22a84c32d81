"""Read the digit in a picture: a photograph, a scan or a drawing.

    tinyvit predict photo.jpg drawing.png
    tinyvit predict photo.jpg --explain out.png    draw where the model looks

One large digit per picture, dark on light or light on dark. The command finds
it, scales it and centres it as MNIST's digits are.
"""

import sys
from pathlib import Path

import numpy as np

from tinyvit.commands import load_digit_model
from tinyvit.evaluate import attention_rollout, patch_maps
from tinyvit.pretrained.pictures import PictureError, load_picture, prepare_picture


def add_arguments(parser):
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="pictures: PNG, JPEG, WebP, TIFF...")
    text = "draw each picture, the model's input and its attention rollout"
    parser.add_argument("--explain", type=Path, metavar="PNG", help=text)
    text = "a trained model for 28 x 28 pixels and ten digits (the one in the package)"
    parser.add_argument("--model", type=Path, metavar="FILE", help=text)


def memory_advice(options):
    return "try fewer pictures at a time"


def run(options):
    if options.explain and any(same_file(options.explain, file) for file in options.files):
        raise ValueError(f"--explain {options.explain} would overwrite the picture: give another name")
    model = load_digit_model(options.model)
    found, errors = read_pictures(options.files)
    if found:
        paths, pictures, images = zip(*found, strict=True)
        images = np.stack(images)
        probabilities = model.predict_proba(images)
        for path, row in zip(paths, probabilities, strict=True):
            print(in_words(path, row))
        if options.explain:
            from tinyvit.plots import explanations  # matplotlib takes half a second

            maps = patch_maps(attention_rollout(images, model.parameters, model.config))
            pairs = zip(paths, probabilities, strict=True)
            titles = [f"{path.name}: {row.argmax()}, {percent(row.max())}" for path, row in pairs]
            explanations(pictures, images, maps, titles, options.explain)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


def read_pictures(paths):
    """Return [(path, grey levels, 28 x 28 image)] for the pictures with a digit, and messages for the others."""
    found, errors = [], []
    for path in paths:
        try:
            grey = load_picture(path)
            found.append((path, grey, prepare_picture(grey).image))
        except PictureError as error:
            text = str(error)
            errors.append(text if text.startswith(str(path)) else f"{path}: {text}")
    return found, errors


def in_words(path, probabilities):
    """Return the three lines to print for one picture."""
    best = int(probabilities.argmax())
    shares = [f"{digit}: {percent(share):>7}" for digit, share in enumerate(probabilities)]
    rows = ["    " + "   ".join(shares[start : start + 5]) for start in (0, 5)]
    return "\n".join([f"{path}: {best} ({percent(probabilities[best])})", *rows])


def percent(share):
    """Return a share in percent; only 1 is rounded to 100.0 %."""
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def same_file(path, other):
    """Return whether two paths are equal or lead to one existing file."""
    return path == other or (path.exists() and other.exists() and path.samefile(other))
