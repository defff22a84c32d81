"""Measure the seconds of training until the test accuracy first reaches a target.

    python benchmarks/time_to_accuracy.py --json FILE --picture FILE.png               one short recipe per target
    python benchmarks/time_to_accuracy.py --epochs 1 3 10                              the tuned recipe, some lengths
    python benchmarks/time_to_accuracy.py --recipe note --epochs 10 --seeds 0          another recipe, one seed
    python benchmarks/time_to_accuracy.py --recorded FILE --picture FILE.png           draw a recorded result again

By default each target has a recipe of its own, `SHORT`. That for 97.77 % was chosen by its accuracy on the validation
images, and the others are extrapolated (`NOTES.md`). A recipe of the library trains on its 55,000 images for every
length in epochs. Both train with every seed. After every hundred steps and every epoch, the current model classifies
the test set, with averaged weights if the recipe averages. The seconds are those of training steps with augmentation
(`State.seconds`), without tests and validation.

The time of a run is that of the first test at or above the target, even if a later test is below it. The time of a
length is the median over its seeds, where a run that misses the target counts as infinite. A schedule ends with its
run, so a short run improves early and a long run ends better. The result for a target is the length with the smallest
median. Only this choice depends on the test set. The technical note reports 97.77 % after 20 minutes on an unnamed
machine.
"""

import argparse
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
from turns import conditions

from tinyvit.classifier import VisionTransformer
from tinyvit.data import load_mnist
from tinyvit.data.augment import Augmentation
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig
from tinyvit.training import RECIPES, Training, available_cores

NOTE_ACCURACY, NOTE_SECONDS = 97.77, 20 * 60
LITTLE = Augmentation(rotation=5, scale=0.05, shift=1)
QUICK = replace(RECIPES["tuned"], learning_rate=2e-3, warmup_steps=100, average=0.99)
SHORT = {  # for each target the settings of the training and the number of its first training images
    NOTE_ACCURACY: (
        replace(QUICK, epochs=1, learning_rate=1.5e-3, smoothing=0.0, average=0.0, augmentation=LITTLE),
        40_000,
    ),
    99: (replace(QUICK, epochs=4), 55_000),
    99.3: (replace(QUICK, epochs=8), 55_000),
}


def train(config, data, every, workers, count):
    """Train on the first `count` training images and return the record.

    Its curve is a list of (seconds, epochs, test accuracy in percent). An epoch is one pass over all training images
    that are not for validation.
    """
    whole = len(data.train_images) - config.validation
    chosen = np.r_[:count, whole : len(data.train_images)]
    run = Training(
        ViTConfig(),
        config,
        data.train_images[chosen],
        data.train_labels[chosen],
        get_backend("cpu"),
        workers=workers,
    )
    state, curve = run.state, []

    def on_step(run):
        if state.adam.steps % every == 0 or run.images_done == run.train_images:
            model = VisionTransformer(run.model_config, state.weights)
            result = model.evaluate(data.test_images, data.test_labels, workers=run.step.workers)
            epochs = (state.epoch * count + run.images_done) / whole
            curve.append((round(state.seconds, 3), round(epochs, 4), round(100 * result.accuracy, 6)))

    def on_epoch(run):
        seconds, _, accuracy = curve[-1]
        print(
            f"{config.epochs} epochs of {count:,} images, seed {config.seed}: epoch {state.epoch} done, "
            f"{seconds:.1f} s of steps, test accuracy {accuracy:.2f} %",
            flush=True,
        )

    run.run(on_step=on_step, on_epoch=on_epoch)
    return {
        "epochs": round(config.epochs * count / whole, 2),
        "seed": config.seed,
        "settings": config.as_dict(),
        "validation_accuracy": state.history[-1]["validation_accuracy"],
        "steps": state.adam.steps,
        "seconds": state.seconds,
        "curve": curve,
    }


def seconds_to(curve, target):
    """Return the seconds of the first test at or above `target` percent, or None."""
    return next((seconds for seconds, _, accuracy in curve if accuracy >= target), None)


def summary(runs, targets):
    """Return a list with a dict per target: the times of every length, and the best length."""
    found = []
    for target in targets:
        lengths = []
        for epochs in sorted({run["epochs"] for run in runs}):
            seconds = [seconds_to(run["curve"], target) for run in runs if run["epochs"] == epochs]
            median = statistics.median(math.inf if value is None else value for value in seconds)
            reached = [value for value in seconds if value is not None]
            lengths.append(
                {
                    "epochs": epochs,
                    "seconds": seconds,
                    "median": median if math.isfinite(median) else None,
                    "range": [min(reached), max(reached)] if reached else None,
                }
            )
        reaching = [length for length in lengths if length["median"] is not None]
        best = min(reaching, key=lambda length: length["median"])["epochs"] if reaching else None
        found.append({"target": target, "best_epochs": best, "lengths": lengths})
    return found


def show(found):
    """Print the summary as a table."""
    seeds = sorted({run["seed"] for run in found["runs"]})
    print(f"\n{'test accuracy':14} {'run, epochs':>11} {'seconds, median (range)':>28}   each seed: {seeds}")
    for target in found["summary"]:
        for length in target["lengths"]:
            each = ", ".join("never" if value is None else f"{value:.1f}" for value in length["seconds"])
            between = "({:.1f}-{:.1f})".format(*length["range"]) if length["range"] else ""
            median = "never" if length["median"] is None else f"{length['median']:.1f}"
            best = " *" if length["epochs"] == target["best_epochs"] else "  "
            taken = f"{median} {between}".strip()
            print(f"{target['target']:>12g} % {length['epochs']:11g} {taken:>26}{best}   {each}")
    print("* the best length for this target", end="")
    note = next((target for target in found["summary"] if target["target"] == NOTE_ACCURACY), None)
    if note and note["best_epochs"] is not None:
        seconds = best_length(note)["median"]
        print(f"; the technical note took {NOTE_SECONDS / seconds:,.0f} times as long for {NOTE_ACCURACY} %", end="")
    print()


def best_length(target):
    """Return the figures of a target's best length."""
    return next(length for length in target["lengths"] if length["epochs"] == target["best_epochs"])


def draw(found, path):
    """Draw the result of `main`: test error against seconds on logarithmic scales, with one line per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from tinyvit.plots import DPI, FAINT, INK, MUTED, SMALL, TEXT, WIDTH

    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")

    # Colour-blind readers can distinguish these colours (Okabe and Ito 2008, "Color Universal Design").
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    lengths = sorted({run["epochs"] for run in found["runs"]})
    least = 100 / found["test_images"]  # the error of one image in percent, because a logarithmic axis has no zero
    seconds, errors = [], []
    for run in found["runs"]:
        rank = lengths.index(run["epochs"])
        x = [reading[0] for reading in run["curve"]]
        y = [max(least / 2, 100 - reading[2]) for reading in run["curve"]]
        first = run is next(other for other in found["runs"] if other["epochs"] == run["epochs"])
        label = f"{run['epochs']:g} epoch{'s' if run['epochs'] != 1 else ''}, one line per seed" if first else None
        axes.plot(x, y, color=colours[rank % len(colours)], linewidth=1.1, alpha=0.85, label=label)
        seconds, errors = seconds + x, errors + y

    style = {"linestyle": "", "markersize": 7, "markeredgecolor": "white", "zorder": 4}
    label = "the technical note: 97.77 % in 20 minutes"
    axes.plot(NOTE_SECONDS, 100 - NOTE_ACCURACY, "s", color=INK, label=label, **style)
    axes.plot([], [], "D", color=MUTED, label="target reached: median of the seeds, best length", **style)
    for target in found["summary"]:
        error = 100 - target["target"]
        axes.axhline(error, color=MUTED, linewidth=1, linestyle="--", zorder=1)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        text = {"fontsize": SMALL, "color": INK, "zorder": 5}
        name = f"accuracy {target['target']:g} %"
        if target["best_epochs"] is not None:
            best = best_length(target)
            rank, median = lengths.index(best["epochs"]), best["median"]
            axes.plot(median, error, "D", color=colours[rank % len(colours)], **style)
            where = {"xytext": (6, 5), "textcoords": "offset points", "ha": "left", "va": "bottom"}
            axes.annotate(f"{median:.0f} s", (median, error), fontweight="bold", bbox=box, **where, **text)
        else:
            name += " (not reached)"
        where = {"xytext": (4, 2), "textcoords": "offset points", "ha": "left", "va": "bottom"}
        axes.annotate(name, (0, error), xycoords=("axes fraction", "data"), bbox=box, **where, **text)

    limits = [100 - NOTE_ACCURACY, *errors] + [100 - target["target"] for target in found["summary"]]
    axes.set_xlim(min(seconds) / 1.5, max(NOTE_SECONDS, *seconds) * 1.4)
    axes.set_ylim(min(limits) / 1.25, max(limits) * 1.25)
    for axis, text in ((axes.xaxis, "training time, seconds (log scale)"), (axes.yaxis, "test error, % (log scale)")):
        low, high = axis.get_view_interval()
        ticks = [step * 10.0**power for power in range(-4, 7) for step in (1, 2, 5)]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_locator(NullLocator())
        axis.set_label_text(text, fontsize=TEXT, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(MUTED)
    title = f"Seconds of training to a test accuracy (recipe: {found['recipe']}, {found['workers']} workers)"
    axes.set_title(title, fontsize=TEXT + 1, color=INK, loc="left")
    axes.legend(fontsize=SMALL, labelcolor=INK, loc="upper right", frameon=True, edgecolor="none", framealpha=0.9)
    figure.savefig(path)


def as_text(found):
    """Return `found` as JSON with one line per point of a curve."""
    text = json.dumps(found, indent=2) + "\n"
    return re.sub(r"\[\s+([^][{}]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", choices=list(RECIPES), help="recipe of all runs (one per target; with --epochs: tuned)")
    add("--epochs", nargs="+", type=int, metavar="N", help="lengths of the runs of one recipe (with --recipe: 10)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of every length (0 1 2)")
    add("--every", type=int, default=100, metavar="N", help="steps between two tests (100)")
    targets = [NOTE_ACCURACY, 99, 99.3]
    add("--targets", nargs="+", type=float, default=targets, metavar="X", help="accuracies in %% (97.77 99 99.3)")
    add("--workers", type=int, default=available_cores(), metavar="N", help="worker processes (one per core)")
    add("--limit", type=int, metavar="N", help="use only the first N training and test images")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE after every run")
    add("--picture", type=Path, metavar="FILE", help="draw the results into FILE, a PNG")
    add("--recorded", type=Path, metavar="FILE", help="measure nothing and read a file from --json")
    options = parser.parse_args()
    if options.recorded:
        found = json.loads(options.recorded.read_text())
    else:
        data = load_mnist()
        if options.limit:
            names = ("train_images", "train_labels", "test_images", "test_labels")
            data = replace(data, **{name: getattr(data, name)[: options.limit] for name in names})
        recipe = options.recipe or ("tuned" if options.epochs else None)
        found = {
            "conditions": conditions(),
            "recipe": recipe or "one per target",
            "workers": options.workers,
            "every": options.every,
            "test_images": len(data.test_images),
            "runs": [],
        }
        if recipe:
            lengths = [(replace(RECIPES[recipe], epochs=epochs), 55_000) for epochs in options.epochs or [10]]
        else:
            lengths = [SHORT[target] for target in options.targets if target in SHORT]
        for config, count in lengths:
            validation = min(config.validation, len(data.train_images) // 12)
            count = min(count, len(data.train_images) - validation)
            for seed in options.seeds:
                config = replace(config, seed=seed, validation=validation)
                found["runs"].append(train(config, data, options.every, options.workers, count))
                found["summary"] = summary(found["runs"], options.targets)
                if options.json:
                    options.json.write_text(as_text(found))
    show(found)
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
