"""Read the digit in a picture: a photograph, a scan or a drawing.

    tinyvit predict photo.jpg drawing.png
    tinyvit predict photo.jpg --explain out.png    shows where the model looks

A picture must show one large digit, dark on light or light on dark. The command
finds the digit, scales it and centres it like the digits of MNIST.
"""

import sys

import numpy as np

from tinyvit.commands import in_words, load_digit_model, path, require_new_file
from tinyvit.evaluate import attention_rollout, patch_maps
from tinyvit.pretrained.pictures import PictureError, load_picture, prepare_picture


def add_arguments(parser):
    text = "picture of a digit, in the format PNG, JPEG, WebP, BMP, GIF, TIFF or PPM"
    parser.add_argument("files", nargs="+", type=path, metavar="FILE", help=text)
    text = "write a PNG file with each picture, the input of the model and the attention rollout (default: none)"
    parser.add_argument("--explain", type=path, metavar="PNG", help=text)
    text = "model file or folder of a run, for 28 x 28 pixels and ten digits (default: the model in the package)"
    parser.add_argument("--model", type=path, metavar="MODEL", help=text)


def memory_advice(options):
    return "try fewer pictures at a time"


def run(options):
    if options.explain:
        if any(same_file(options.explain, file) for file in options.files):
            raise ValueError(f"--explain {options.explain} would overwrite the picture: give another file")
        require_new_file("--explain", options.explain)
    model = load_digit_model(options.model)
    found, errors = read_pictures(options.files)
    if found:
        files, pictures, images = zip(*found, strict=True)
        images = np.stack(images)
        probabilities = model.predict_proba(images)
        for file, row in zip(files, probabilities, strict=True):
            print(result(file, row))
        if options.explain:
            from tinyvit.plots import explanations  # imported here because matplotlib takes half a second

            pairs = zip(files, probabilities, strict=True)
            try:
                explanations(
                    pictures,
                    images=images,
                    maps=patch_maps(attention_rollout(images, model.parameters, model.config)),
                    titles=[f"{file.name}: {row.argmax()}, {percent(row.max())}" for file, row in pairs],
                    path=options.explain,
                )
            except OSError as error:
                reason = error.strerror or in_words(error)
                text = f"--explain {options.explain}: cannot write this file ({reason}): give another file"
                raise ValueError(text) from error
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return 2 if errors else 0


def read_pictures(files):
    """Return [(file, grey levels, 28 x 28 image)] for pictures with a digit, and error messages for the others."""
    found, errors = [], []
    for file in files:
        try:
            grey = load_picture(file)
            found.append((file, grey, prepare_picture(grey).image))
        except PictureError as error:
            text = str(error)
            errors.append(text if text.startswith(str(file)) else f"{file}: {text}")
    return found, errors


def result(file, probabilities):
    """Return the three lines to print for one picture."""
    best = int(probabilities.argmax())
    cells = [f"{digit}: {percent(probability):>7}" for digit, probability in enumerate(probabilities)]
    rows = ["    " + "   ".join(cells[start : start + 5]) for start in (0, 5)]
    return "\n".join([f"{file}: {best} ({percent(probabilities[best])})", *rows])


def percent(probability):
    """Return a probability in percent. Only 1 is shown as 100.0 %."""
    return "> 99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"


def same_file(file, other):
    """Return whether two paths are equal or name the same existing file."""
    return file == other or (file.exists() and other.exists() and file.samefile(other))
