"""A whole training step in kernels: augmentation, forward, backward, clipping and Adam, and one CUDA graph of it.

The model is that of `model.py`, whose forward and backward are read here as launches: down `forward`, and up
`backward`. Three things are other than there. The embedding is one product (`patches.cu` says how). The weights'
gradients are summed over `SHARDS` parts of the batch each, because a sum over all rows in one block would be the
longest thing in the step. And every buffer is made once and keeps its address, so that the launches of a step are the
same every time and can be recorded as a graph: what changes from step to step, the kernels read from memory.
"""

import numpy as np

from tinyvit.kernels.launch import ADAM_NUMBERS

SHARDS = 8  # parts of a batch whose weight gradients are summed apart
LINE = 32  # numbers: where a shard begins in memory


class KernelStep:
    """Takes training steps on a GPU and never waits for it: what an epoch gives stays there until it is asked for.

    kernels: `Kernels`; parameters: the `Parameters`, adam: the `Adam`, average: the array of averaged weights (P,) or
    None: all on the device and updated in place; images: (N, S, S) uint8; labels: (N,) uint8, on the device, in
    0..classes-1; batch_size: images a step; smoothing, clip: as `TrainingConfig` has them; graph: whether a step is
    recorded as a CUDA graph after its first time, or launched anew each time.

    `totals` (2,) float64, on the device: the sum of the losses and the number of images classified rightly in the
    epoch so far. Read them, and whatever else the steps write, after `synchronise`.
    """

    def __init__(
        self, kernels, parameters, adam, average, images, labels, batch_size, smoothing=0.0, clip=0.0, graph=True
    ):
        xp = self.xp = kernels.backend.xp
        self.kernels, self.config = kernels, kernels.config
        self.parameters, self.adam, self.average = parameters, adam, average
        self.images, self.labels = images, labels
        self.batch_size, self.smoothing, self.clip = batch_size, smoothing, clip
        self.totals = xp.zeros(2, np.float64)
        self.stream = xp.cuda.Stream()  # it waits for the (legacy) default stream, and that one for it
        self._record = graph
        self._graphs, self._buffers = {}, {}  # by the number of images in the batch

        count = parameters.flat.size
        self.shard_step = -(-count // LINE) * LINE
        self._shard_gradients = xp.zeros((SHARDS, self.shard_step), np.float32)
        self._first_shard = parameters.with_flat(self._shard_gradients[0, :count])
        self.gradient = xp.empty(count, np.float32)
        self._squares = xp.empty(-(-count // ADAM_NUMBERS), np.float32)

        steps = -(-len(images) // batch_size)
        self._order = xp.empty(len(images), np.int32)
        self._maps = xp.empty((len(images), 2, 3), np.float32)
        self._schedule = xp.empty((steps, 4), np.float32)
        self._counter = xp.zeros(1, np.int32)
        self._augmented = None
        self._place = len(images)  # no epoch has begun
        kernels.backend.synchronise()  # all that was made is there before another stream reads it

    def synchronise(self):
        """Wait until all steps are done, as whoever reads what they wrote must."""
        self.stream.synchronize()

    def begin_epoch(self, order, draw, schedule, step=0, totals=(0.0, 0)):
        """Set out on an epoch, or in the middle of one.

        order: (N,) whole numbers, NumPy: the places of all images in the order of the epoch; draw: (augmentation,
        key, first) as `Kernels.draw_maps` takes them, or None if nothing is changed; schedule: (steps, 4) float32,
        NumPy, as the kernel `adam_step` reads it; step: how many steps of the epoch are done; totals: the sum of
        their losses, and how many images they classified rightly. Raises `ValueError` if the order is not one of all
        images, or the schedule or the step does not fit it.
        """
        count, steps = len(self.images), len(self._schedule)
        if order.shape != (count,) or order.min() < 0 or not (np.bincount(order, minlength=count) == 1).all():
            raise ValueError(f"the order must have each of the {count:,} images once")
        if schedule.shape != (steps, 4) or not 0 <= step <= steps:
            raise ValueError(f"{steps} steps need a schedule of ({steps}, 4), not {schedule.shape}, and begin within")
        if self._augmented is not None and self._augmented != (draw is not None):
            raise ValueError("images are changed in all epochs or in none: the graph is recorded for one of them")
        self._augmented = draw is not None
        self._place = min(step * self.batch_size, count)
        to_device = self.kernels.backend.asarray
        with self.stream:
            self._order[...] = to_device(order.astype(np.int32))
            self._schedule[...] = to_device(schedule.astype(np.float32))
            self._counter[...] = step
            self.totals[0], self.totals[1] = totals
            if draw is not None:
                augmentation, key, first = draw
                self.kernels.draw_maps(self._maps, key, first, augmentation)

    def __call__(self, count):
        """Take the next step of the epoch, on `count` images: the batch size, or what is left at the epoch's end.

        Raises `IndexError` on another count, and after the epoch's end: the kernels would not notice, and read on.
        """
        left = len(self.images) - self._place
        if left == 0 or count != min(self.batch_size, left):
            raise IndexError(
                f"{left} images of the epoch are left: its next step takes {min(self.batch_size, left)}, not {count}"
            )
        self._place += count
        with self.stream:
            graph = self._graphs.get(count)
            if graph is not None:
                graph.launch(self.stream)
                return
            buffers = self._buffers.get(count)
            if buffers is None:  # the first step of its size is launched: a driver loads kernels when they first run
                buffers = self._buffers[count] = _Buffers(self.xp, self.config, count)
                self._launch(buffers)
            elif self._record:
                self.stream.begin_capture()
                try:
                    self._launch(buffers)
                finally:
                    graph = self.stream.end_capture()
                self._graphs[count] = graph
                graph.launch(self.stream)
            else:
                self._launch(buffers)

    def _launch(self, buffers):
        kernels = self.kernels
        maps = self._maps if self._augmented else None
        kernels.gather_patches(
            *(self.images, self.labels, self._order, maps, self._counter, self.batch_size),
            *(buffers.pixels, buffers.labels),
        )
        self.forward(buffers)
        kernels.cross_entropy(buffers.logits, buffers.labels, buffers.dlogits, self.totals, self.smoothing)
        self.backward(buffers)
        kernels.sum_shards(self._shard_gradients, self.gradient, self._squares, self._counter)
        kernels.adam_step(
            *(self.parameters.flat, self.gradient, self.adam, self.average),
            *(self._squares, self._schedule, self._counter, self.clip),
        )

    def forward(self, buffers):
        """Launch the forward pass from `buffers.pixels` to `buffers.logits`."""
        kernels, parameters, config = self.kernels, self.parameters, self.config
        kernels.linear_forward(buffers.pixel_rows, _embedding(parameters, config), None, buffers.tokens)
        x = buffers.tokens
        for i, block in enumerate(buffers.blocks):
            name = f"blocks.{i}"
            kernels.layer_norm_forward(x, *parameters.pair(f"{name}.norm1"), *block.norm1)
            kernels.linear_forward(block.norm1[0], *parameters.pair(f"{name}.attention.qkv"), block.qkv_rows)
            kernels.attention_forward(block.qkv, block.attended, block.weights)
            # the last block lets the class token ask alone, and only its rows of x go on
            projection = parameters.pair(f"{name}.attention.projection")
            kernels.linear_forward(block.attended_rows, *projection, block.middle, x, block.every)
            kernels.layer_norm_forward(block.middle, *parameters.pair(f"{name}.norm2"), *block.norm2)
            kernels.linear_gelu_forward(
                block.norm2[0], *parameters.pair(f"{name}.mlp.fc1"), block.active, block.derivative
            )
            kernels.linear_forward(block.active, *parameters.pair(f"{name}.mlp.fc2"), block.out, block.middle)
            x = block.out
        kernels.layer_norm_forward(x, *parameters.pair("norm"), *buffers.norm)
        kernels.linear_forward(buffers.norm[0], *parameters.pair("head"), buffers.logits)

    def backward(self, buffers):
        """Launch the backward pass from `buffers.dlogits` to the gradients of all shards."""
        config, first = self.config, self._first_shard

        def linear(name, dout, x, dx, derivative=None):
            w, _ = self.parameters.pair(name)
            shards = (*first.pair(name), SHARDS, self.shard_step)
            self.kernels.linear_backward(dout, x, w, dx, *shards, derivative)

        def norm(name, dout, cache, dx, residual=None, every=1):
            w, _ = self.parameters.pair(name)
            shards = (*first.pair(name), SHARDS, self.shard_step)
            _, normalised, inverse_deviation = cache
            self.kernels.layer_norm_backward(dout, normalised, inverse_deviation, w, dx, *shards, residual, every)

        last = buffers.blocks[-1]
        linear("head", buffers.dlogits, buffers.norm[0], last.dnormed)
        norm("norm", last.dnormed, buffers.norm, last.dout)
        for i in reversed(range(config.depth)):
            block, name = buffers.blocks[i], f"blocks.{i}"
            dx = buffers.blocks[i - 1].dout if i else buffers.dtokens
            linear(f"{name}.mlp.fc2", block.dout, block.active, block.dhidden, block.derivative)
            linear(f"{name}.mlp.fc1", block.dhidden, block.norm2[0], block.dnormed)
            norm(f"{name}.norm2", block.dnormed, block.norm2, block.dmiddle, block.dout)
            linear(f"{name}.attention.projection", block.dmiddle, block.attended_rows, block.dattended_rows)
            self.kernels.attention_backward(block.dattended, block.qkv, block.weights, block.dqkv)
            linear(f"{name}.attention.qkv", block.dqkv_rows, block.norm1[0], buffers.dnormed)
            norm(f"{name}.norm1", buffers.dnormed, block.norm1, dx, block.dmiddle, block.every)
        w = _embedding(self.parameters, config)
        dw = _embedding(first, config)
        self.kernels.linear_backward(buffers.dtokens, buffers.pixel_rows, w, None, dw, None, SHARDS, self.shard_step)


def _embedding(parameters, config):
    """View the embedding's weight, bias, class token and positions, which lie one after the other, as one matrix."""
    rows = config.patch_size**2 + 2 + config.tokens
    return parameters.flat[: rows * config.width].reshape(rows, config.width)


class _Buffers:
    """Everything between the pixels and the gradients, for one number of images."""

    def __init__(self, xp, config, images):
        def empty(*shape, dtype=np.float32):
            return xp.empty(shape, dtype)

        tokens, width = config.tokens, config.width
        rows = images * tokens
        self.labels = empty(images, dtype=np.int32)
        self.pixels = empty(images, tokens, config.patch_size**2 + 2 + tokens)
        self.pixel_rows = self.pixels.reshape(rows, -1)
        self.tokens, self.dtokens, self.dnormed = (empty(rows, width) for _ in range(3))
        self.blocks = [_Block(empty, config, images, i == config.depth - 1) for i in range(config.depth)]
        self.norm = _norm_buffers(empty, images, width)
        self.logits, self.dlogits = empty(images, config.classes), empty(images, config.classes)


class _Block:
    """What one block of the model computes, forward and backward; of the last one only the class token goes on."""

    def __init__(self, empty, config, images, last):
        tokens, width, heads = config.tokens, config.width, config.heads
        self.every = tokens if last else 1  # of x's rows one in so many goes on
        asking = 1 if last else tokens
        rows = images * asking
        self.norm1 = _norm_buffers(empty, images * tokens, width)
        self.qkv, self.dqkv = empty(images, tokens, 3 * width), empty(images, tokens, 3 * width)
        self.weights = empty(images, heads, asking, tokens)
        self.attended, self.dattended = empty(images, asking, width), empty(images, asking, width)
        self.qkv_rows, self.dqkv_rows = (x.reshape(images * tokens, 3 * width) for x in (self.qkv, self.dqkv))
        self.attended_rows, self.dattended_rows = (x.reshape(rows, width) for x in (self.attended, self.dattended))
        self.middle, self.dmiddle = empty(rows, width), empty(rows, width)  # between attention and MLP
        self.norm2, self.dnormed = _norm_buffers(empty, rows, width), empty(rows, width)
        self.active, self.derivative, self.dhidden = (empty(rows, config.mlp_width) for _ in range(3))
        self.out, self.dout = empty(rows, width), empty(rows, width)


def _norm_buffers(empty, rows, width):
    return empty(rows, width), empty(rows, width), empty(rows)  # out, normalised, inverse deviation
