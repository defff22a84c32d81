"""Read the digit in a picture, or classify the images of a CSV file.

    tinyvit predict photo.jpg drawing.png
    tinyvit predict photo.jpg --explain out.png    shows where the model looks
    tinyvit predict test.csv --csv submission.csv    writes a class per row

A picture must show one large digit, dark on light or light on dark. The command
finds the digit, scales it and centres it like the digits of MNIST. A CSV file
has one image per row and one column per pixel, as Kaggle's test.csv.
"""

import csv
import io
import sys
import warnings

import numpy as np

from tinyvit import console
from tinyvit.classifier import VisionTransformer
from tinyvit.commands import in_words, load_digit_model, model_file, path, require_new_file, require_size
from tinyvit.data.arrays import to_images
from tinyvit.data.families import family_of
from tinyvit.data.tables import read_table
from tinyvit.evaluate import attention_rollout, patch_maps
from tinyvit.files import write_atomically
from tinyvit.pretrained.pictures import PictureError, load_picture, prepare_picture


def add_arguments(parser):
    text = "picture of a digit (PNG, JPEG, WebP, BMP, GIF, TIFF or PPM), or with --csv one CSV file"
    parser.add_argument("files", nargs="+", type=path, metavar="FILE", help=text)
    text = "write a PNG file with each picture, the input of the model and the attention rollout (default: none)"
    parser.add_argument("--explain", type=path, metavar="PNG", help=text)
    text = "classify the images of a CSV file, and write a CSV file with the columns ImageId and Label"
    parser.add_argument("--csv", type=path, metavar="OUT", help=text)
    text = "model file or folder of a run (default: the model in the package); for pictures, one of 28 x 28 pixels "
    text += "and ten digits"
    parser.add_argument("--model", type=path, metavar="MODEL", help=text)


def memory_advice(options):
    return "try fewer pictures at a time"


def run(options):
    if options.csv:
        write_classes(options)
        return 0
    for file in options.files:
        if file.suffix.lower() == ".csv":
            raise ValueError(f"{file}: to classify the images of a CSV file, give --csv OUT")
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
            print(result(file, row, model.config.names))
        if options.explain:
            from tinyvit.plots import explanations  # imported here because matplotlib takes half a second

            names = model.config.names
            pairs = zip(map(printable, files), probabilities, strict=True)
            try:
                with console.cleanup_after_signals(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the font lacks a character of a name
                    explanations(
                        pictures,
                        images=images,
                        maps=patch_maps(attention_rollout(images, model.parameters, model.config), model.config.grid),
                        titles=[f"{file}: {names[row.argmax()]}, {percent(row.max())}" for file, row in pairs],
                        path=options.explain,
                    )
            except OSError as error:
                reason = error.strerror or in_words(error)
                text = f"--explain {options.explain}: cannot write this file ({reason}): give another file"
                raise ValueError(text) from error
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return 2 if errors else 0


def write_classes(options):
    """Write the class of each image of a CSV file, with the number of the image from 1."""
    file, *others = options.files
    if others or options.explain:
        raise ValueError("--csv classifies one CSV file: leave out other files and --explain")
    if same_file(options.csv, file):
        raise ValueError(f"--csv {options.csv} would overwrite the images: give another file")
    if file.is_dir():
        raise ValueError(f"{file}: expected a CSV file, found a folder")
    require_new_file("--csv", options.csv)
    model = VisionTransformer.load(model_file(options.model)) if options.model else load_digit_model(None)
    images, notes = read_images(file)
    require_size(file, images, model.config)
    classes = [model.config.names[i] for i in model.predict(images)]
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows([("ImageId", "Label"), *enumerate(classes, 1)])
    if notes:
        print(f"data: {', '.join(notes)}")
    write_atomically(options.csv, rows.getvalue())
    print(f"{len(images):,} classes: {options.csv}")


def read_images(file):
    """Return the images of a CSV file, in the form that the data set had for training, and notes on conversions."""
    table, notes = read_table(str(file)), []
    (images,) = to_images([table], notes)
    notes = [note + ", judged by this file only" * ("became 0 to 255" in note) for note in notes]
    labels = [] if table.labels is None else table.labels
    family = family_of(file.name, file.absolute().parent.name, images, labels)
    if family and family.transposed:
        images = np.ascontiguousarray(images.swapaxes(1, 2))
        notes.insert(0, f"{family.kind}, transposed back")
    return images, notes


def read_pictures(files):
    """Return [(file, grey levels, 28 x 28 image)] for pictures with a digit, and error messages for the others."""
    found, errors = [], []
    for file in files:
        if file.is_dir():
            errors.append(f"{file}: expected a picture, found a folder: give the pictures in it")
            continue
        try:
            grey = load_picture(file)
            found.append((file, grey, prepare_picture(grey).image))
        except PictureError as error:
            text = str(error)
            errors.append(text if text.startswith(str(file)) else f"{file}: {text}")
    return found, errors


def printable(file):
    """Return the name of a file, in which bytes that are not text are spelled out."""
    return file.name.encode(errors="backslashreplace").decode()


def result(file, probabilities, names):
    """Return the three lines to print for one picture."""
    best = int(probabilities.argmax())
    cells = [f"{name}: {percent(probability):>7}" for name, probability in zip(names, probabilities, strict=True)]
    rows = ["    " + "   ".join(cells[start : start + 5]) for start in (0, 5)]
    return "\n".join([f"{file}: {names[best]} ({percent(probabilities[best])})", *rows])


def percent(probability):
    """Return a probability in percent. Only 1 is shown as 100.0 %."""
    return "> 99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"


def same_file(file, other):
    """Return whether two paths are equal or name the same existing file."""
    return file == other or (file.exists() and other.exists() and file.samefile(other))
