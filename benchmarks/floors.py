"""Compute the least time of a training step on a GPU, launch by launch. No GPU is needed.

    python benchmarks/floors.py                        batch 64 on an H100 and an H200, by their data sheets
    python benchmarks/floors.py --batch 1024 --gap 1   another batch, and 1 microsecond between two launches

Everything here follows from shapes, and nothing is measured. The floor of a kernel is the larger of two times. One is
the time to read each input and write each output once. The other is the time for its multiplications and additions.
`benchmarks/gpu.py` measures the speed of both on a card and compares every kernel with its floor.
`tests/project/test_benchmarks.py` compares this list with the launches of a step.
"""

import argparse
from dataclasses import dataclass

import checkout  # noqa: F401  makes tinyvit importable

from tinyvit.kernels.launch import ADAM_NUMBERS, NORM_ROWS, PRECISIONS, TILE
from tinyvit.kernels.step import PARTIALS
from tinyvit.model import ViTConfig

NUMBER = 4  # bytes of a float32
GAP = 1.3e-6  # seconds between two launches of a graph; an assumption, which gpu.py measures
BARRIER = 1.5e-6  # seconds of a barrier for all blocks of a card; an assumption
EPOCH = 60_000  # images


@dataclass(frozen=True)
class Card:
    """The figures of a data sheet, for dense matrices, and assumptions for what it lacks."""

    bandwidth: float  # bytes per second
    rates: dict  # operations per second, by precision
    cache_bandwidth: float = 5.5e12  # of the level-2 cache; not in the data sheet, about what others have measured
    processors: int = 132
    shared: int = 227 * 1024  # the most bytes of shared memory of a block; a processor holds one such block


_HOPPER = {"float32": 66.9e12, "tf32": 494.7e12, "bfloat16": 989.4e12}
CARDS = {"H100 SXM": Card(3.35e12, _HOPPER), "H200 SXM": Card(4.8e12, _HOPPER)}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel in a step: its name, its size and its cost."""

    name: str
    what: str  # the part of the model, with the name of its parameters without the block's number
    grid: tuple
    block: int
    bytes: int
    operations: int = 0  # in products with weights, in the chosen precision
    float32_operations: int = 0  # in the products of attention, always in float32
    fetched: int = 0  # bytes that a product reads from the level-2 cache: each number once per tile
    shape: tuple = ()  # rows, inputs and outputs of a product with a weight

    def work(self, bandwidth, rate, float32_rate):
        """Return the floor in seconds, for these bytes and operations per second."""
        return max(self.bytes / bandwidth, self.operations / rate + self.float32_operations / float32_rate)


def launches(config, batch, augmented=True, clip=False, decayed=False, average=False):
    """Return the launches of a training step in their order, a list of `Launch`.

    config: a `ViTConfig`; batch: number of images; augmented: augmentation changes the images; clip: the gradient is
    clipped; decayed: weight decay acts on some weights only; average: this step updates the average of the weights.
    """
    tokens, width, mlp = config.tokens, config.width, config.mlp_width
    embedding = config.patch_length + 2 + tokens
    last = config.depth - 1
    rows = batch * tokens
    forward, backward = [], []  # `backward` is in reverse order, so that both lists of a block have the same order

    forward.append(_gather(config, batch, embedding, augmented))
    forward.append(_product("embedding", rows, embedding, width, bias=False))
    backward.append(_gradients("embedding", rows, embedding, width, dx=False, db=False))
    for i in range(config.depth):
        queries = batch if i == last else rows
        forward += [
            _norm("norm1", rows, width),
            _product("attention.qkv", rows, width, 3 * width),
            _attention(config, batch, queries // batch),
            _product("attention.projection", queries, width, width, residual=True),
            _norm("norm2", queries, width),
            _product("mlp.fc1", queries, width, mlp, gelu=True),
            _product("mlp.fc2", queries, mlp, width, residual=True),
        ]
        backward += [
            _norm_gradients("norm1", rows, width, residual=queries),
            _gradients("attention.qkv", rows, width, 3 * width),
            _attention_gradients(config, batch, queries // batch),
            _gradients("attention.projection", queries, width, width),
            _norm_gradients("norm2", queries, width, residual=queries),
            _gradients("mlp.fc1", queries, width, mlp),
            _gradients("mlp.fc2", queries, mlp, width, derivative=True),
        ]
    forward += [_norm("norm", batch, width), _product("head", batch, width, config.classes)]
    backward += [_norm_gradients("norm", batch, width), _gradients("head", batch, width, config.classes)]
    loss = Launch(
        name="cross_entropy",
        what="loss",
        grid=(1,),
        block=256,
        bytes=NUMBER * (2 * batch * config.classes + batch) + 2 * 16,
    )
    return [*forward, loss, *reversed(backward), *_update(_numbers(config), clip, decayed, average)]


def _size(shape):
    size = 1
    for length in shape:
        size *= length
    return size


def _numbers(config):
    """Return the number of parameters of a model."""
    return sum(_size(shape) for shape in config.shapes().values())


def _tiles(count, size):
    return -(-count // size)


def _gather(config, batch, embedding, augmented):
    pixels = config.patch_length * (config.tokens - 1)
    image = pixels + (8 if augmented else 2) * NUMBER  # pixels, label, place, map
    written = NUMBER * (config.tokens * embedding + 1)
    bytes_moved = batch * (image + written) + NUMBER * (1 + 2 * config.channels)  # the counter, means and deviations
    return Launch("gather_patches", "batch", (batch,), 256, bytes=bytes_moved)


def _product(what, rows, inputs, outputs, bias=True, residual=False, gelu=False):
    numbers = rows * inputs + inputs * outputs + outputs * bias + rows * outputs * (1 + residual + gelu)
    name = "linear_gelu_forward" if gelu else "linear_forward"
    grid = _tiles(outputs, TILE), _tiles(rows, TILE)
    return Launch(
        name=name,
        what=what,
        grid=grid,
        block=128,
        bytes=NUMBER * numbers,
        operations=2 * rows * inputs * outputs,
        fetched=_size(grid) * 2 * TILE * inputs * NUMBER,
        shape=(rows, inputs, outputs),
    )


def _gradients(what, rows, inputs, outputs, dx=True, db=True, derivative=False):
    read = rows * outputs + rows * inputs + (inputs * outputs + rows * inputs * derivative) * dx
    written = rows * inputs * dx + PARTIALS * (inputs * outputs + outputs * db)
    input_tiles, output_tiles, row_tiles = (_tiles(size, TILE) for size in (inputs, outputs, rows))
    dx_tiles, dw_tiles = row_tiles * input_tiles * dx, input_tiles * output_tiles
    return Launch(
        name="linear_backward",
        what=what,
        grid=(dx_tiles + PARTIALS * dw_tiles,),
        block=128,
        bytes=NUMBER * (read + written),
        operations=2 * rows * inputs * outputs * (1 + dx),
        fetched=2 * TILE * NUMBER * (dx_tiles * outputs + dw_tiles * rows),
        shape=(rows, inputs, outputs),
    )


def _norm(what, rows, width):
    numbers = rows * width + 2 * width + 2 * rows * width + rows
    return Launch("layer_norm_forward", what, (_tiles(rows, NORM_ROWS),), 256, bytes=NUMBER * numbers)


def _norm_gradients(what, rows, width, residual=0):
    numbers = 3 * rows * width + rows + width + residual * width + PARTIALS * 2 * width
    grid = _tiles(rows, NORM_ROWS) + PARTIALS * _tiles(width, 32)
    return Launch("layer_norm_backward", what, (grid,), 256, bytes=NUMBER * numbers)


def _attention(config, batch, queries):
    products, weights = batch * queries * config.tokens * config.width, batch * config.heads * queries * config.tokens
    numbers = batch * (2 * config.tokens + 2 * queries) * config.width + weights
    return Launch(
        name="attention_forward",
        what="attention",
        grid=(config.heads, batch),
        block=128,
        bytes=NUMBER * numbers,
        float32_operations=2 * 2 * products,
    )


def _attention_gradients(config, batch, queries):
    products, weights = batch * queries * config.tokens * config.width, batch * config.heads * queries * config.tokens
    numbers = batch * (5 * config.tokens + 2 * queries) * config.width + weights
    return Launch(
        name="attention_backward",
        what="attention",
        grid=(config.heads, batch),
        block=128,
        bytes=NUMBER * numbers,
        float32_operations=4 * 2 * products,
    )


def _update(numbers, clip, decayed, average):
    blocks = _tiles(numbers, ADAM_NUMBERS)
    summed = NUMBER * (PARTIALS * numbers + numbers + blocks + 2)
    updated = NUMBER * ((7 + decayed + 2 * average) * numbers + blocks * clip + 4 + 1)
    return [
        Launch("sum_partials", "gradient", (blocks,), 256, bytes=summed),
        Launch("adam_step", "weights", (blocks,), 256, bytes=updated),
    ]


# ---- what it takes ----


def predict(steps_launches, bandwidth, rate, float32_rate, gap):
    """Return the time of a step in seconds, {"work", "gaps", "total"}, if every kernel takes its floor.

    bandwidth: bytes per second; rate: operations per second of products with weights; float32_rate: operations per
    second of everything else; gap: seconds between two launches.
    """
    work = sum(launch.work(bandwidth, rate, float32_rate) for launch in steps_launches)
    gaps = gap * len(steps_launches)
    return {"work": work, "gaps": gaps, "total": work + gaps}


def persistent(config, batch, card, precision, images=1, cluster=2, barriers=5):
    """Return the least time of a step in one persistent kernel, a dict of seconds by part and "total".

    A cluster of `cluster` processors computes the forward and the backward pass of `images` images, and keeps their
    activations. Each cluster reads all weights from the level-2 cache, once forward and once backward. After a
    barrier the gradients of the weights are products over the whole batch. Each processor computes a part of them and
    updates its weights.
    """
    step = launches(config, batch)
    shapes = [launch.shape for launch in step if launch.name == "linear_backward"]
    gradients = sum(2 * _size(shape) for shape in shapes)  # operations for the gradients of the weights
    there_and_back = sum(launch.operations for launch in step) - gradients
    numbers = _numbers(config)
    clusters = _tiles(batch, images)
    waves = _tiles(clusters, max(1, card.processors // cluster))  # a large batch has more clusters than fit at once
    share = cluster / card.processors
    rows = images * config.tokens
    padding = 1.0 if precision == "float32" else _tiles(rows, 16) * 16 / rows  # tensor cores take 16 rows at a time
    rate = card.rates[precision]
    number = 2 if precision == "bfloat16" else NUMBER
    kept = NUMBER * sum(rows * (inputs + outputs) for rows, inputs, outputs in shapes)
    parts = {
        "products there and back": waves * padding * there_and_back * images / batch / (rate * share),
        "weights from the cache": 2 * number * numbers * clusters / card.cache_bandwidth,
        "weights' gradients": max(gradients / rate, kept / card.cache_bandwidth),
        "Adam": 6 * NUMBER * numbers / card.cache_bandwidth,
        "barriers": barriers * BARRIER,
    }
    beside_each_other = max(parts["products there and back"], parts["weights from the cache"])
    rest = parts["weights' gradients"] + parts["Adam"] + parts["barriers"]
    return parts | {"total": beside_each_other + rest}


def activations(config):
    """Return the bytes that the forward pass keeps for the backward pass, for one image in float32."""
    tokens, width = config.tokens, config.width
    numbers = 0
    for i in range(config.depth):
        queries = 1 if i == config.depth - 1 else tokens
        numbers += tokens * (2 * width + 3 * width) + config.heads * queries * tokens  # norm1, qkv, weights
        numbers += queries * (width + 2 * width + 2 * config.mlp_width)  # attended, norm2, active and derivative
    return NUMBER * numbers


# ---- the command ----


def by_kernel(step):
    """Return rows (name, launches, bytes, operations, fetched) of a step, and a row of their sums."""
    rows = {}
    for launch in step:
        row = rows.setdefault(launch.name, [0, 0, 0, 0])
        operations = launch.operations + launch.float32_operations
        for i, value in enumerate((1, launch.bytes, operations, launch.fetched)):
            row[i] += value
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    return [(name, *row) for name, row in rows.items()] + [("step", *total)]


def show(batch, gap):
    """Print the launches of a step of the default model, and its least times by the data sheets."""
    config = ViTConfig()
    step = launches(config, batch)
    print(f"computed, not measured: a training step of the default model, batch {batch}, augmented\n")
    print(f"{'kernel':22} {'launches':>8} {'MB':>8} {'GFLOP':>8} {'MB by tiles':>12}")
    for name, count, size, operations, fetched in by_kernel(step):
        print(f"{name:22} {count:8} {size / 1e6:8.1f} {operations / 1e9:8.3f} {fetched / 1e6:12.1f}")
    steps = 10 * _tiles(EPOCH, batch)
    print(f"\n{'least microseconds':32} {'kernels':>8} {'gaps':>8} {'step':>8} {'10 epochs':>10}")
    for name, card in CARDS.items():
        for precision in PRECISIONS:
            found = predict(
                step,
                bandwidth=card.bandwidth,
                rate=card.rates[precision],
                float32_rate=card.rates["float32"],
                gap=gap,
            )
            work, gaps, total = (1e6 * found[part] for part in ("work", "gaps", "total"))
            label = f"{name}, {precision}"
            print(f"{label:32} {work:8.0f} {gaps:8.0f} {total:8.0f} {steps * total / 1e6:8.2f} s")
    card = CARDS["H100 SXM"]
    by_tiles = sum(launch.fetched for launch in step) / card.cache_bandwidth
    print(f"\nreads of the tiles, at {card.cache_bandwidth / 1e12:.1f} TB/s from the cache: {1e6 * by_tiles:.0f} us")
    kept, weights = activations(config) / 1e6, NUMBER * _numbers(config) / 1e6
    print(f"activations kept for backward: {kept:.2f} MB per image; all weights: {weights:.1f} MB")
    for images, cluster in ((1, 2), (2, 4)):
        read = 2 * weights * _tiles(batch, images)
        print(f"\none persistent kernel on an H100, images per cluster of {cluster} processors: {images}")
        shared = cluster * card.shared / 1e6
        print(f"  with {shared:.2f} MB of shared memory; all clusters together read {read:.0f} MB of weights")
        for precision in PRECISIONS:
            found = persistent(
                config,
                batch,
                card,
                precision,
                images=images,
                cluster=cluster,
            )
            parts = ", ".join(f"{part} {1e6 * seconds:.0f}" for part, seconds in found.items() if part != "total")
            total = found["total"]
            print(f"  {precision:9} {1e6 * total:4.0f} us, {steps * total:.2f} s for 10 epochs ({parts})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images per step (64)")
    text = f"microseconds between two launches of a graph ({1e6 * GAP:g}, an assumption)"
    parser.add_argument("--gap", type=float, default=1e6 * GAP, metavar="US", help=text)
    options = parser.parse_args()
    if options.batch < 1 or options.gap < 0:
        parser.error("--batch must be at least 1 and --gap at least 0")
    show(options.batch, options.gap / 1e6)


if __name__ == "__main__":
    main()
