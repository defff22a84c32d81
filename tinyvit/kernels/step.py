"""A whole training step in kernels: augmentation, forward, backward, clipping and Adam, and one CUDA graph of it.

The model is that of `model.py`, whose forward and backward passes are read here as launches: down `forward`, and up
`backward`. Three things differ. The embedding is one product (`patches.cu` says how). The weights' gradients are
summed over `SHARDS` parts of the batch each, because a sum over all rows in one block would be the longest thing in
the step. And every buffer is made once and keeps its address, so that the launches of a step are the same every time
and can be recorded as a graph: what changes from step to step, the kernels read from memory.
"""

import math

import numpy as np

from tinyvit.backend import to_host
from tinyvit.data.batches import draw_order, stream_of
from tinyvit.kernels.launch import ADAM_NUMBERS

SHARDS = 8  # parts of a batch whose weight gradients are summed apart
LINE = 32  # numbers: where a shard begins in memory


class KernelStep:
    """Takes training steps on a GPU and never waits for it: what an epoch gives stays there until `totals` reads it.

    It answers the same calls as `tinyvit.training.step.PlainStep`. kernels: `Kernels`; state: the `State` that is
    updated, on the device; images: (N, S, S) uint8; labels: (N,) integers in 0..classes-1; config: `TrainingConfig`;
    graph: whether a step is recorded as a CUDA graph after its first time, or launched every time.
    """

    asynchronous = True  # `totals` waits for the device
    compile_seconds = 0.0

    def __init__(self, kernels, state, images, labels, config, graph=True):
        xp = self.xp = kernels.backend.xp
        to_device = kernels.backend.asarray
        self.kernels, self.state, self.config = kernels, state, config
        self.model_config, self.precision = kernels.config, kernels.precision
        self.images, self.labels = to_device(images), to_device(labels).astype(np.uint8)
        self.mode = "graph" if graph else "launches"
        self.workers, self.record = 1, {"workers": 1}
        self.steps = -(-len(images) // config.batch_size)  # of an epoch
        self.stream = xp.cuda.Stream()  # it waits for the (legacy) default stream, and that one for it
        self._graphs, self._buffers = {}, {}  # by the number of images in the batch

        parameters = self.parameters = state.parameters
        count = parameters.flat.size
        self.shard_step = -(-count // LINE) * LINE
        self._shard_gradients = xp.zeros((SHARDS, self.shard_step), np.float32)
        self._first_shard = parameters.with_flat(self._shard_gradients[0, :count])
        self.gradient = xp.empty(count, np.float32)
        self._squares = xp.empty(-(-count // ADAM_NUMBERS), np.float32)

        self._totals = xp.zeros(2, np.float64)  # the losses' sum, and the images classified correctly
        self._order = xp.empty(len(images), np.int32)
        self._maps = xp.empty((len(images), 2, 3), np.float32) if config.augmentation else None
        self._schedule = xp.empty((self.steps, 4), np.float32)
        self._counter = xp.zeros(1, np.int32)
        self._done = self.steps  # no epoch has begun
        kernels.backend.synchronise()  # all that was made is there before another stream reads it

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def begin_epoch(self, epoch, done=0, totals=(0.0, 0)):
        """Begin an epoch, or resume it: put on the device what the steps that are left will need.

        epoch: its number, from 0; done: how many of its steps are done; totals: what `totals` gave after them.
        """
        if not 0 <= done <= self.steps:
            raise ValueError(f"an epoch has {self.steps} steps: {done} of them cannot be done")
        config, to_device = self.config, self.kernels.backend.asarray
        order, rng = draw_order(len(self.images), config.seed, epoch)
        self._done = done
        self._averages_after = config.averages_after(epoch, self.steps)
        with self.stream:
            self._order[...] = to_device(order.astype(np.int32))
            self._schedule[...] = to_device(self._schedule_rows(epoch, done))
            self._counter[...] = done
            self._totals[0], self._totals[1] = totals
            if self._maps is not None:
                self.kernels.draw_maps(self._maps, *stream_of(rng), config.augmentation)

    def _schedule_rows(self, epoch, done):
        """Return (steps, 4) float32, what the kernel `adam_step` reads for each step of the epoch."""
        adam, average = self.state.adam, self.state.average
        rows = np.zeros((self.steps, 4))
        averaged = average.steps if average else 0
        rates = self.config.learning_rates(epoch, self.steps)
        for i in range(done, self.steps):
            step = adam.steps - done + i + 1  # counted from 1 over all epochs
            rows[i, 0] = rates[i]
            rows[i, 1] = rates[i] / (1 - adam.beta1**step)
            rows[i, 2] = 1 / math.sqrt(1 - adam.beta2**step)
            if self._averages_after[i]:
                averaged += 1
                rows[i, 3] = average.share(averaged)
        return rows.astype(np.float32)

    def __call__(self):
        """Take the next step and return its number of images. Raises `IndexError` after the end of the epoch."""
        if self._done == self.steps:
            raise IndexError("the epoch has no step left: call begin_epoch first")
        batch_size = self.config.batch_size
        count = min(batch_size, len(self.images) - self._done * batch_size)
        self._launch_or_replay(count)
        self.state.adam.steps += 1
        if self._averages_after[self._done]:
            self.state.average.steps += 1
        self._done += 1
        return count

    def totals(self):
        """Return the sum of the losses and the number of images classified correctly in the epoch so far.

        This waits for the device. After it, the arrays of the state may be read.
        """
        self.stream.synchronize()
        loss_sum, correct = to_host(self._totals)
        return float(loss_sum), int(correct)

    def _launch_or_replay(self, count):
        with self.stream:
            graph = self._graphs.get(count)
            if graph is not None:
                graph.launch(self.stream)
                return
            buffers = self._buffers.get(count)
            if buffers is None:  # the first step of its size is launched: a driver loads kernels when they first run
                buffers = self._buffers[count] = _Buffers(self.xp, self.model_config, count)
                self._launch(buffers)
            elif self.mode == "graph":
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
        kernels, state, config = self.kernels, self.state, self.config
        kernels.gather_patches(
            self.images,
            self.labels,
            self._order,
            self._maps,
            self._counter,
            config.batch_size,
            buffers.pixels,
            buffers.labels,
        )
        self.forward(buffers)
        kernels.cross_entropy(buffers.logits, buffers.labels, buffers.dlogits, self._totals, config.smoothing)
        self.backward(buffers)
        kernels.sum_shards(self._shard_gradients, self.gradient, self._squares, self._counter)
        kernels.adam_step(
            self.parameters.flat,
            self.gradient,
            state.adam,
            state.average.average if state.average else None,
            self._squares,
            self._schedule,
            self._counter,
            config.clip,
        )

    def forward(self, buffers):
        """Launch the forward pass from `buffers.pixels` to `buffers.logits`."""
        kernels, parameters, config = self.kernels, self.parameters, self.model_config
        kernels.linear_forward(buffers.pixel_rows, _embedding(parameters, config), None, buffers.tokens)
        x = buffers.tokens
        for i, block in enumerate(buffers.blocks):
            name = f"blocks.{i}"
            kernels.layer_norm_forward(x, *parameters.pair(f"{name}.norm1"), *block.norm1)
            kernels.linear_forward(block.norm1[0], *parameters.pair(f"{name}.attention.qkv"), block.qkv_rows)
            kernels.attention_forward(block.qkv, block.attended, block.weights)
            # the last block lets the class token ask alone, and only its rows of x go on
            projection = parameters.pair(f"{name}.attention.projection")
            kernels.linear_forward(block.attended_rows, *projection, block.residual, x, block.every)
            kernels.layer_norm_forward(block.residual, *parameters.pair(f"{name}.norm2"), *block.norm2)
            kernels.linear_gelu_forward(
                block.norm2[0], *parameters.pair(f"{name}.mlp.fc1"), block.active, block.derivative
            )
            kernels.linear_forward(block.active, *parameters.pair(f"{name}.mlp.fc2"), block.out, block.residual)
            x = block.out
        kernels.layer_norm_forward(x, *parameters.pair("norm"), *buffers.norm)
        kernels.linear_forward(buffers.norm[0], *parameters.pair("head"), buffers.logits)

    def backward(self, buffers):
        """Launch the backward pass from `buffers.dlogits` to the gradients of all shards."""
        config, first = self.model_config, self._first_shard

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
            norm(f"{name}.norm2", block.dnormed, block.norm2, block.dresidual, block.dout)
            linear(f"{name}.attention.projection", block.dresidual, block.attended_rows, block.dattended_rows)
            self.kernels.attention_backward(block.dattended, block.qkv, block.weights, block.dqkv)
            linear(f"{name}.attention.qkv", block.dqkv_rows, block.norm1[0], buffers.dnormed)
            norm(f"{name}.norm1", buffers.dnormed, block.norm1, dx, block.dresidual, block.every)
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
    """What one block of the model computes, forward and backward; only the class token leaves the last one."""

    def __init__(self, empty, config, images, last):
        tokens, width, heads = config.tokens, config.width, config.heads
        self.every = tokens if last else 1  # one row of x in so many leaves the block
        asking = 1 if last else tokens
        rows = images * asking
        self.norm1 = _norm_buffers(empty, images * tokens, width)
        self.qkv, self.dqkv = empty(images, tokens, 3 * width), empty(images, tokens, 3 * width)
        self.weights = empty(images, heads, asking, tokens)
        self.attended, self.dattended = empty(images, asking, width), empty(images, asking, width)
        self.qkv_rows, self.dqkv_rows = (x.reshape(images * tokens, 3 * width) for x in (self.qkv, self.dqkv))
        self.attended_rows, self.dattended_rows = (x.reshape(rows, width) for x in (self.attended, self.dattended))
        self.residual, self.dresidual = empty(rows, width), empty(rows, width)  # between attention and MLP
        self.norm2, self.dnormed = _norm_buffers(empty, rows, width), empty(rows, width)
        self.active, self.derivative, self.dhidden = (empty(rows, config.mlp_width) for _ in range(3))
        self.out, self.dout = empty(rows, width), empty(rows, width)


def _norm_buffers(empty, rows, width):
    return empty(rows, width), empty(rows, width), empty(rows)  # out, normalised, inverse deviation
