"""Measure how the time and the memory of a training step grow with batch, width, depth, tokens and workers.

    python benchmarks/scaling.py --json FILE --picture FILE.png
    python benchmarks/scaling.py --only batch depth --batch 16 64 256 --rounds 5       two factors
    python benchmarks/scaling.py --recorded FILE --picture FILE.png                    draw a recorded result again

The default is the default model at batch 64 with the largest number of workers, and each point changes one factor.
Patches of 7, 4 and 2 pixels make 17, 50 and 197 tokens. The MLP is four times as wide as a token. A step is forward,
backward and Adam in float32 on digits in memory, without augmentation. Every point is a separate process, and all
take turns, round by round (`turns.py`). Together they need about 2 GB on two cores.

GFLOP counts the matrix products of a plain step (`peers.matrix_products`). "done" counts the matrix products that
tinyvit computes, including those that compute sums. There are fewer, because only the class token passes through the
whole last block. Memory is the peak resident memory of all processes of a step, with the interpreter and its
libraries. Shared memory counts once per worker.
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import numpy as np
import peers
from turns import Contestant, compare, conditions, quartiles, ratio

from tinyvit.data import load_mnist
from tinyvit.model import ViTConfig, initialise, loss_and_gradient
from tinyvit.optim import Adam
from tinyvit.training import ParallelGradient, available_cores

LEARNING_RATE = 3e-4
BATCHES = 2  # used in turn
FACTORS = {  # the label of each factor
    "batch": "batch, images",
    "width": "width of a token",
    "depth": "depth, blocks",
    "patch": "tokens per image",
    "workers": "workers",
}


def training_step(images, labels, batch, width, depth, patch, workers):
    """Return the training step of tinyvit on the next `batch` of the images (N, 28, 28) uint8."""
    config = model(width, depth, patch)
    parameters = initialise(config)
    images = images.astype(np.float32) / 255
    gradient_of = ParallelGradient(config, workers).__enter__()
    adam = Adam(parameters.flat, threads=workers)
    count = 0

    def step():
        nonlocal count
        start = count % BATCHES * batch
        count += 1
        part = slice(start, start + batch)
        _, _, gradients = gradient_of(parameters, images[part], labels[part])
        adam.step(parameters.flat, gradients.flat, LEARNING_RATE)

    return step


def model(width, depth, patch):
    """Return the settings of the model."""
    return ViTConfig(width=width, depth=depth, patch_size=patch, mlp_width=4 * width)


def operations_done(config, batch):
    """Return the number of floating-point operations in the matrix products of a step of tinyvit.

    A step computes all of them with `numpy.matmul`. This counts them for one image. They grow in proportion to the
    batch.
    """
    parameters, counted, matmul = initialise(config), [], np.matmul

    def counting(a, b, **settings):
        out = matmul(a, b, **settings)
        counted.append(2 * out.size * a.shape[-1])
        return out

    with mock.patch.object(np, "matmul", counting):
        image = np.zeros((1, config.image_size, config.image_size))
        loss_and_gradient(image, np.zeros(1, int), parameters, config)
    return sum(counted) * batch


def measure(values, default, rounds, seconds):
    """Return a list of records, one per point.

    values: a dict from each factor to its values; default: a dict of all factors, of which a point changes one.
    """
    data = load_mnist()
    points = [(factor, default | {factor: value}) for factor in values for value in values[factor]]
    contestants = {}
    for _, settings in points:
        name = name_of(settings)
        if name not in contestants:  # the default model belongs to every factor
            count = BATCHES * settings["batch"]
            digits = {"images": data.train_images[:count], "labels": data.train_labels[:count]}
            contestants[name] = Contestant(name, "scaling", "training_step", **digits, **settings)
    compare(list(contestants.values()), rounds, seconds)
    records = []
    for factor, settings in points:
        point = contestants[name_of(settings)]
        config = model(settings["width"], settings["depth"], settings["patch"])
        plain = peers.operations(peers.matrix_products(config, settings["batch"]))
        low, median, high = quartiles(point.seconds)
        records.append(
            {
                "factor": factor,
                **settings,
                "tokens": config.tokens,
                "milliseconds": [1e3 * value for value in (low, median, high)],
                "times_default": ratio(point, contestants[name_of(default)]),
                "gflop": plain / 1e9,
                "gflop_done": operations_done(config, settings["batch"]) / 1e9,
                "gflop_per_second": plain / 1e9 / median,
                "megabytes": round(point.megabytes),
            }
        )
    return records


def name_of(settings):
    """Return the name of a point."""
    return ", ".join(f"{factor} {value}" for factor, value in settings.items())


def show(records):
    """Print the records as a table, factor by factor."""
    columns = f"{'ms per step':>24} {'times default':>20} {'GFLOP':>7} {'done':>7} {'GFLOP/s':>8} {'peak MB':>8}"
    above = None
    for record in records:
        if record["factor"] != above:
            above = record["factor"]
            print(f"\n{FACTORS[above]:18} {columns}")
        low, median, high = record["milliseconds"]
        below, times, beyond = record["times_default"]
        print(
            f"{place(record):<18} {median:10.1f} ({low:.1f}-{high:.1f}) {times:9.2f} ({below:.2f}-{beyond:.2f})"
            f" {record['gflop']:7.2f} {record['gflop_done']:7.2f} {record['gflop_per_second']:8.0f}"
            f" {record['megabytes']:8}"
        )


def place(record):
    """Return the position of a record on the axis of its factor."""
    return record["tokens" if record["factor"] == "patch" else record["factor"]]


def draw(found, path):
    """Draw the result of `main`: one column per factor, time above and memory below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    from tinyvit.plots import DPI, FAINT, INK, MUTED, SMALL, TEXT, TRAIN, VALIDATION

    factors = list(dict.fromkeys(record["factor"] for record in found["records"]))
    figure = Figure(figsize=(max(7.5, 2.15 * len(factors)), 5.6), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(factors), sharex="col", sharey="row", squeeze=False)

    def write(axes, x, y, text):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        offset = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(text, (x, y), fontsize=SMALL, color=INK, bbox=box, zorder=4, **offset)

    for column, factor in enumerate(factors):
        time, memory = grid[:, column]
        records = [record for record in found["records"] if record["factor"] == factor]
        default = next(record for record in records if found["default"].items() <= record.items())
        x = [place(record) for record in records]
        low, median, high = zip(*(record["milliseconds"] for record in records), strict=True)
        megabytes = [record["megabytes"] for record in records]

        work = [record["gflop"] / record["workers"] for record in records]
        of_default = work[records.index(default)]
        same_speed = [default["milliseconds"][1] * share / of_default for share in work]
        time.plot(x, same_speed, "--", color=MUTED, linewidth=1.2, label="at the default's GFLOP/s per worker")
        bars = [np.subtract(median, low), np.subtract(high, median)]
        style = {"color": TRAIN, "linewidth": 1.6, "marker": "o", "markersize": 4}
        time.errorbar(x, median, bars, capsize=2, label="measured: median, quartiles", **style)
        memory.plot(x, megabytes, **style)
        marker = {"color": VALIDATION, "linestyle": "", "marker": "D", "markersize": 6, "zorder": 3}
        time.plot(place(default), default["milliseconds"][1], label=default_name(default), **marker)
        memory.plot(place(default), default["megabytes"], **marker)
        for record in records:
            taken = record["milliseconds"][1]
            write(time, place(record), taken, f"{taken:,.0f}" if taken >= 10 else f"{taken:.1f}")
            write(memory, place(record), record["megabytes"], f"{record['megabytes']:,}")

        time.set_title(FACTORS[factor], fontsize=TEXT + 1, color=INK)
        memory.set_xlabel(f"{FACTORS[factor]}\n(GFLOP per step)", fontsize=TEXT, color=INK)
        memory.set_xscale("log")
        memory.set_xlim(min(x) / 1.5, max(x) * 1.5)
        memory.xaxis.set_major_locator(FixedLocator(x))
        memory.xaxis.set_minor_locator(NullLocator())
        memory.set_xticklabels([f"{place(record)}\n({record['gflop']:.3g})" for record in records])

    drawn = np.concatenate([line.get_ydata() for axes in grid[0] for line in axes.lines])
    set_log_scale(grid[0, 0], drawn.min(), drawn.max())
    grid[1, 0].set_ylim(0, 1.2 * max(record["megabytes"] for record in found["records"]))
    grid[1, 0].yaxis.set_major_locator(MaxNLocator(5))
    grid[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    grid[0, 0].set_ylabel("time of a step, ms", fontsize=TEXT, color=INK)
    grid[1, 0].set_ylabel("peak memory, MB", fontsize=TEXT, color=INK)
    for axes in grid.flat:
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=SMALL, colors=INK, length=0)
        for name, side in axes.spines.items():
            side.set_visible(name == "bottom")
            side.set_color(MUTED)
    title = "A training step of tinyvit: its time (log scale) and its memory as one factor grows"
    figure.suptitle(title, fontsize=TEXT + 2, color=INK, x=0.01, ha="left")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    columns = 3 if len(factors) > 4 else 1
    style = {"fontsize": TEXT, "frameon": False, "labelcolor": INK}
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, **style)
    figure.savefig(path)


def default_name(default):
    """Return the label of the default model."""
    words = [f"{name} {default[name]}" for name in ("batch", "width", "depth")]
    words += [f"{default[name]} {name}" for name in ("tokens", "workers")]
    return "the default: " + ", ".join(words)


def set_log_scale(axes, low, high):
    """Give an axis of milliseconds a logarithmic scale with round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_yscale("log")
    low, high = low / 1.3, high * 1.9
    axes.set_ylim(low, high)
    ticks = [step * 10.0**power for power in range(-2, 7) for step in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def main():
    cores = available_cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    values = {
        "batch": ([16, 64, 256, 1024], "images per step (16 64 256 1024)"),
        "width": ([64, 128, 256], "widths of a token (64 128 256)"),
        "depth": ([2, 4, 8], "numbers of blocks (2 4 8)"),
        "patch": ([7, 4, 2], "sides of a patch in pixels (7 4 2)"),
        "workers": (sorted({2**n for n in range(cores.bit_length())} | {cores}), "worker processes (1 2 ... cores)"),
    }
    for name, (default, text) in values.items():
        add(f"--{name}", nargs="+", type=int, default=default, metavar="N", help=text)
    add("--only", nargs="+", choices=list(FACTORS), metavar="FACTOR", help=f"factors: {', '.join(FACTORS)}")
    add("--rounds", type=int, default=15, metavar="N", help="rounds after the warm-up (15)")
    add("--seconds", type=float, default=0.7, metavar="S", help="length of a turn (0.7)")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    add("--picture", type=Path, metavar="FILE", help="draw the results into FILE, a PNG")
    add("--recorded", type=Path, metavar="FILE", help="measure nothing and read a file from --json")
    options = parser.parse_args()
    if options.recorded:
        found = json.loads(options.recorded.read_text())
    else:
        default = {"batch": 64, "width": 128, "depth": 4, "patch": 7, "workers": max(options.workers)}
        chosen = {
            factor: sorted({*getattr(options, factor), default[factor]}, reverse=factor == "patch")
            for factor in options.only or FACTORS
        }
        found = {"conditions": conditions(), "default": default}
        found["records"] = measure(
            values=chosen,
            default=default,
            rounds=options.rounds,
            seconds=options.seconds,
        )
    show(found["records"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
