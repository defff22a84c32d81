"""What all lessons share: the flag --quick, the look and the place of pictures, and the check of an exercise.

    lesson = Lesson("02_linear_layer")
    figure, axes = lesson.figure(7, 3)     # inches
    show(axes, image, "a digit")           # the picture of an image
    lesson.save(figure, "steps")           # lessons/output/02_steps.png
    lesson.check(1, exercise_1)            # asks check_1 of lessons/checks/02_linear_layer.py

Nothing here is needed to understand a lesson; all of the subject is in the lessons themselves.
"""

import argparse
import importlib.util
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from tinyvit.plots import DPI, FAINT, INK, MUTED, SMALL, TEXT, TRAIN, VALIDATION

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # pictures go to files: no window, no display
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "output"

# Okabe and Ito 2008, "Color Universal Design", the first two as in tinyvit.plots; take them in this order
BLUE, ORANGE, GREEN, PINK = COLOURS = TRAIN, VALIDATION, "#009E73", "#CC79A7"
SIGNED = "PuOr"  # the colour map for numbers of either sign, with white at zero

LOOK = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT + 1,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "grid.color": FAINT,
    "image.cmap": "gray_r",  # pixels as they were written: ink on paper
    "image.interpolation": "nearest",
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": DPI,
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": SMALL,
    "ytick.color": INK,
    "ytick.labelsize": SMALL,
}


class Lesson:
    """One lesson: `name` is that of its file, without .py; `quick` is whether --quick asks for less data."""

    def __init__(self, name):
        self.name = name
        self.number = name[:2]
        self.quick = self._parse_flags()
        matplotlib.rcParams.update(LOOK)

    def _parse_flags(self):
        if IN_NOTEBOOK or Path(sys.argv[0]).stem != self.name:  # the arguments are somebody else's
            return False
        parser = argparse.ArgumentParser(description=f"Lesson {self.name}; its pictures go to {OUTPUT}.")
        parser.add_argument("--quick", action="store_true", help="less data and fewer steps: done in seconds")
        return parser.parse_args().quick

    def figure(self, width, height, rows=1, columns=1, **options):
        """Return a new figure of width x height inches, and its axes as `plt.subplots` gives them."""
        return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)

    def save(self, figure, name):
        """Write `figure` to lessons/output/NN_name.png, NN being the lesson's number, and say so."""
        OUTPUT.mkdir(exist_ok=True)
        path = OUTPUT / f"{self.number}_{name}.png"
        figure.savefig(path, metadata={"Software": None})
        print(f"picture: lessons/output/{path.name}")
        return path

    def check(self, number, answer):
        """Ask exercise `number`'s check about an answer, print what it says, and return whether it is right."""
        return check(number, self.checks()[number], answer)

    def checks(self):
        """Return the checks of this lesson's exercises, {1: check_1, 2: check_2, ...}."""
        module = load(HERE / "checks" / f"{self.name}.py")
        found = {int(name[6:]): value for name, value in vars(module).items() if name.startswith("check_")}
        return dict(sorted(found.items()))

    def check_all(self, solutions):
        """Check exercise_1, exercise_2 and so on of `solutions`, a dict; end the program with 1 if one is wrong."""
        verdicts = [self.check(number, solutions[f"exercise_{number}"]) for number in self.checks()]
        if not all(verdicts):
            raise SystemExit(1)


def check(number, cases, answer):
    """Compare an answer, case by case, with what `cases(answer)` yields: (what it is, yours, expected).

    answer: a function or a value. expected: an array, whose shape and dtype count; a number, text or truth value;
    a `Between`; or a tuple of these. An optional fourth entry is the tolerance, relative to the largest expected
    number, 1e-6 by default. Never raises, whatever the answer does: prints, and returns whether it is right.
    """
    watched = Watched(answer) if callable(answer) else answer
    right = 0
    for complaint, *case in _compared(cases, watched):
        if complaint:
            _report(number, complaint, *case)
            return False
        right += 1
    print(f"Exercise {number}: right. Yours is what is expected, in {right} of {right} cases.")
    return True


def _compared(cases, watched):
    """Yield (complaint, what, yours, expected) for every case; the complaint alone if the check itself stumbles."""
    try:
        for what, yours, expected, *tolerance in cases(watched):
            complaint = getattr(watched, "failure", "") or difference(yours, expected, *tolerance)
            yield complaint, what, yours, expected
    except Exception as error:
        # A check that has to compute with an answer stumbles over None: that is an unsolved exercise, no accident.
        given = watched.last if isinstance(watched, Watched) else watched
        stumbled = f"the check could not use what you gave ({type(given).__name__}): {type(error).__name__}: {error}"
        yield (getattr(watched, "failure", "") or ("not solved yet" if unsolved(given) else stumbled),)


class Watched:
    """The learner's function: remembers what it returned last, and catches what it raises or does to its inputs."""

    def __init__(self, function):
        self.function, self.last, self.failure = function, None, ""

    def __call__(self, *inputs):
        before = [x.copy() if isinstance(x, np.ndarray) else None for x in inputs]
        try:
            self.last = self.function(*inputs)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(line.filename).name}, line {line.lineno}"
            self.failure = f"your function raised {type(error).__name__}: {error}\n({where})"
            self.last = None
        for i, (x, old) in enumerate(zip(inputs, before, strict=True)):
            if old is not None and not np.array_equal(x, old, equal_nan=x.dtype.kind in "fc"):
                self.failure = f"your function wrote into its input {i + 1}: work on a copy, others need the original"
        return self.last


@dataclass(frozen=True)
class Between:
    """An expected number that may lie anywhere from low to high."""

    low: float
    high: float

    def __str__(self):
        return f"a number from {self.low:g} to {self.high:g}"


def show(axes, image, title="", signed=False):
    """Draw a small image (R, C) as sharp squares in a faint frame: ink on paper, or numbers of either sign in colour.

    uint8 runs from 0 to 255; what is `signed` is centred at zero; else the lightest is white and the darkest black.
    Returns what `figure.colorbar` takes.
    """
    low, high = (0, 255) if image.dtype == np.uint8 else (None, None)
    if signed:
        high = np.abs(image).max()
        low = -high
    drawn = axes.imshow(image, vmin=low, vmax=high, cmap=SIGNED if signed else "gray_r")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color=FAINT)
    return drawn


def unsolved(yours):
    """Say whether this is the blank that an exercise starts with: None, ... or a tuple that holds one."""
    return yours is None or yours is ... or (isinstance(yours, tuple) and any(unsolved(part) for part in yours))


def difference(yours, expected, tolerance=1e-6):
    """Say what is wrong with `yours`, beside `expected`, or return an empty string."""
    if unsolved(yours):
        return "not solved yet"
    if isinstance(expected, tuple):
        if not isinstance(yours, tuple | list) or len(yours) != len(expected):
            return f"{len(expected)} results are expected, together in a tuple: return a, b"
        complaints = [difference(y, e, tolerance) for y, e in zip(yours, expected, strict=True)]
        return next((f"result {i + 1}: {text}" for i, text in enumerate(complaints) if text), "")
    if isinstance(expected, Between):
        inside = np.ndim(yours) == 0 and np.isreal(yours) and expected.low <= yours <= expected.high
        return "" if inside else "not there yet: it lies outside"
    if isinstance(expected, str | bool):
        return "" if yours == expected else "not the expected answer"
    return _array_difference(yours, expected, tolerance)


def _array_difference(yours, expected, tolerance):
    dtype = getattr(expected, "dtype", None)
    try:
        array = np.asarray(yours)
    except ValueError:
        return "this is no array: its rows have different lengths"
    expected = np.asarray(expected)
    if array.dtype.kind not in "biuf":
        return f"numbers are expected, and this is {type(yours).__name__}"
    if array.shape != expected.shape:
        return f"its shape is {array.shape}, and {expected.shape} is expected"
    if dtype is not None and array.dtype != dtype:
        return f"its dtype is {array.dtype}, and {dtype} is expected"
    if not np.isfinite(array).all():
        return "some of it is not finite: look for a division by zero or an overflow"
    exact = expected.dtype.kind in "biu"
    gap = np.abs(array.astype(np.float64) - expected)
    if gap.max(initial=0) > (0 if exact else tolerance * np.abs(expected).max(initial=0)):
        place = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
        at = f", most at {list(place)}" if place else ""
        return f"the values differ{at}: yours {array[place]:.6g}, expected {expected[place]:.6g}"
    return ""


def _report(number, complaint, what=None, yours=None, expected=None):
    """Print what is not right yet, and the two side by side."""
    print(f"Exercise {number}: " + complaint.replace("\n", "\n    "))
    if what is not None:
        print(f"    {what}")
        for name, value in (("yours", yours), ("expected", expected)):
            print(textwrap.indent(f"{name:<9}{_shown(value)}", "    "))


def _shown(value):
    """Return a value as text of a few lines, the later ones indented to stand below the first."""
    if isinstance(value, tuple) and not any(isinstance(part, np.ndarray) for part in value):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, tuple):
        return textwrap.indent(",\n".join(_shown(part).replace("\n" + " " * 9, "\n") for part in value), " " * 9)[9:]
    if value is ...:
        return "... (nothing yet)"
    if not isinstance(value, np.ndarray):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    text = np.array2string(value, precision=4, threshold=40, edgeitems=2, suppress_small=True)
    note = "" if value.size <= 40 else f"\nshape {value.shape}, {value.dtype}"
    return textwrap.indent(text + note, " " * 9)[9:]


def load(path):
    """Import a file whose name no import statement can spell, as it begins with a digit."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
