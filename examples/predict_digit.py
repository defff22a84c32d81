"""Read the handwritten digit in a picture: a photograph, a scan, a drawing, dark on light or light on dark.

    python examples/predict_digit.py photo.jpg drawing.png
    python examples/predict_digit.py photo.jpg --explain out.png    and draw what the model sees and where it looks

One digit a picture, large and alone. It is looked for, scaled and centred as MNIST's digits were.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from tinyvit.checkpoint import CheckpointError, load_model
from tinyvit.evaluate import attention_rollout, patch_maps
from tinyvit.plots import explanations
from tinyvit.pretrained import load_pretrained
from tinyvit.pretrained.pictures import PictureError, load_picture, prepare_picture


def read_pictures(paths):
    """Return [(path, grey levels, 28 x 28 image)] of pictures with a digit, and what is wrong with others."""
    found, errors = [], []
    for path in paths:
        try:
            grey = load_picture(path)
            found.append((path, grey, prepare_picture(grey).image))
        except PictureError as error:
            text = str(error)
            errors.append(text if text.startswith(str(path)) else f"{path}: {text}")
    return found, errors


def percent(share):
    """Return a share in percent, never rounded up to a certainty."""
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def in_words(path, probabilities):
    """Return what is printed of one picture."""
    best = int(probabilities.argmax())
    shares = [f"{digit}: {percent(share):>7}" for digit, share in enumerate(probabilities)]
    rows = ["    " + "   ".join(shares[start : start + 5]) for start in (0, 5)]
    return "\n".join([f"{path}: {best} ({percent(probabilities[best])})", *rows])


def same_file(path, other):
    """Say whether two paths lead to one file that is there."""
    return path == other or (path.exists() and other.exists() and path.samefile(other))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="pictures: PNG, JPEG, WebP, TIFF...")
    text = "draw each picture, what the model sees of it, and its attention rollout"
    parser.add_argument("--explain", type=Path, metavar="PNG", help=text)
    parser.add_argument("--model", type=Path, metavar="FILE", help="of train_mnist.py (the one in the package)")
    options = parser.parse_args(arguments)
    try:
        if options.explain and any(same_file(options.explain, file) for file in options.files):
            raise ValueError(f"--explain {options.explain} would overwrite the picture: give another name")
        model = load_pretrained() if options.model is None else load_model(options.model)
        if (model.config.image_size, model.config.classes) != (28, 10):
            raise ValueError(f"{options.model}: expected a model for 28 x 28 pixels and 10 digits")
        found, errors = read_pictures(options.files)
        if found:
            images = np.stack([image for _, _, image in found])
            probabilities = model.predict_proba(images)
            for (path, _, _), row in zip(found, probabilities, strict=True):
                print(in_words(path, row))
            if options.explain:
                maps = patch_maps(attention_rollout(images, model.parameters, model.config))
                titles = [f"{path.name}: {row.argmax()}, {percent(row.max())}" for (path, _, _), row in
                          zip(found, probabilities, strict=True)]  # fmt: skip
                explanations([grey for _, grey, _ in found], images, maps, titles, options.explain)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
