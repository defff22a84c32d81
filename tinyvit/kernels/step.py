"""A whole training step in CUDA kernels, from augmentation to Adam, which one CUDA graph records.

`forward` and `backward` launch the passes of `model.py` in the same order. Three things differ from the plain step:

* The patch embedding is one matrix product, which `patches.cu` explains.
* A weight gradient is computed as `PARTIALS` partial gradients, each a sum over one part of the rows. In a single sum
  over all rows, one block would work for longer than all the others.
* Every buffer is allocated once and keeps its address, so that all steps consist of the same launches and a graph can
  record them. Values that change from step to step, such as the learning rate, are in the memory of the GPU.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.backend import to_host
from tinyvit.data.batches import draw_order, stream_of
from tinyvit.kernels.launch import ADAM_NUMBERS, Kernels

if TYPE_CHECKING:
    from tinyvit.training.settings import TrainingConfig
    from tinyvit.training.state import State

PARTIALS = 8  # partial gradients per weight
LINE = 32  # numbers in 128 bytes; each partial gradient begins at a multiple


class KernelStep:
    """A training step on a GPU that never waits for the GPU; only `totals` does.

    It has the same interface as `tinyvit.training.step.PlainStep`.

    Parameters
    ----------
    kernels : Kernels
        The compiled kernels of the model.
    state : State
        The state on the GPU that a step updates in place.
    images : ndarray of shape (N, R, C) or (N, R, C, channels) and dtype uint8
        The training images.
    labels : ndarray of shape (N,)
        Integers from 0 to classes - 1.
    config : TrainingConfig
        The settings of the training.
    graph : bool, optional
        Whether to record a CUDA graph of a step and replay it (mode "graph"), or to launch the kernels one by one in
        every step (mode "launches").
    """

    asynchronous = True  # `totals` waits for the device
    compile_seconds = 0.0

    def __init__(
        self,
        kernels: Kernels,
        state: "State",
        images: np.ndarray,
        labels: np.ndarray,
        config: "TrainingConfig",
        graph: bool = True,
    ) -> None:
        xp = self.xp = kernels.backend.xp
        to_device = kernels.backend.asarray
        self.kernels, self.state, self.config = kernels, state, config
        self.model_config, self.precision = kernels.config, kernels.precision
        self.images = to_device(images).reshape(-1, *self.model_config.image_shape, self.model_config.channels)
        self.labels = to_device(labels).astype(np.int32)
        self.mode = "graph" if graph else "launches"
        self.workers, self.loops, self.record = 1, "off", {"workers": 1, "loops": "auto"}
        self.steps = -(-len(images) // config.batch_size)  # per epoch
        self.stream = xp.cuda.Stream()  # this stream and the legacy default stream wait for each other
        self._graphs: dict[int, Any] = {}  # keys: numbers of images in a batch
        self._buffers: dict[int, _Buffers] = {}

        parameters = self.parameters = state.parameters
        count = parameters.flat.size
        self.partial_step = -(-count // LINE) * LINE
        self._partial_gradients = xp.zeros((PARTIALS, self.partial_step), np.float32)
        self._first_partial = parameters.with_flat(self._partial_gradients[0, :count])
        self.gradient = xp.empty(count, np.float32)
        self._squares = xp.empty(-(-count // ADAM_NUMBERS), np.float32)

        self._totals = xp.zeros(2, np.float64)  # sum of the losses, number of images classified correctly
        self._order = xp.empty(len(images), np.int32)
        self._maps = xp.empty((len(images), 2, 3), np.float32) if config.augmentation else None
        self._schedule = xp.empty((self.steps, 4), np.float32)
        self._counter = xp.zeros(1, np.int32)
        self._done = self.steps  # no epoch has begun
        kernels.backend.synchronise()  # `self.stream` reads these arrays: they must be complete

    def __enter__(self) -> "KernelStep":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def begin_epoch(self, epoch: int, done: int = 0, totals: tuple[float, int] = (0.0, 0)) -> None:
        """Begin or resume an epoch: copy its order, its learning rates and its totals to the GPU.

        Parameters
        ----------
        epoch : int
            The number of the epoch, from 0.
        done : int, optional
            The number of its steps that have been taken already.
        totals : tuple, optional
            The result of `totals` after those steps.
        """
        if not 0 <= done <= self.steps:
            raise ValueError(f"done must be in 0 to {self.steps}, the steps of an epoch, not {done}")
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
                key, first = stream_of(rng)
                self.kernels.draw_maps(maps=self._maps, key=key, first=first, augmentation=config.augmentation)

    def _schedule_rows(self, epoch, done):
        """Return the schedule of `adam_step`, (steps, 4) float32, with one row per step of the epoch."""
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

    def __call__(self) -> int:
        """Take the next step and return its number of images. Raise `IndexError` if the epoch has no step left."""
        if self._done == self.steps:
            raise IndexError("the epoch has no step left: call begin_epoch first")
        batch_size = self.config.batch_size
        count = min(batch_size, len(self.images) - self._done * batch_size)
        self._launch_or_replay(count)
        self.state.adam.steps += 1
        if self.state.average is not None and self._averages_after[self._done]:
            self.state.average.steps += 1
        self._done += 1
        return count

    def totals(self) -> tuple[float, int]:
        """Return the sum of the losses and the number of images classified correctly in this epoch so far.

        It waits for the GPU. Afterwards, the arrays of the state are up to date.
        """
        self.stream.synchronize()
        loss_sum, correct = to_host(self._totals)
        return float(loss_sum), int(correct)

    def _launch_or_replay(self, count):
        """Take a step with `count` images: launch the first one, record the second one, and replay the record."""
        with self.stream:
            graph = self._graphs.get(count)
            if graph is not None:
                graph.launch(self.stream)
                return
            buffers = self._buffers.get(count)
            if buffers is None:  # the driver loads a kernel at its first launch, which no graph may record
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
        """Launch all kernels of one step."""
        kernels, state, config = self.kernels, self.state, self.config
        kernels.gather_patches(
            images=self.images,
            labels=self.labels,
            order=self._order,
            maps=self._maps,
            counter=self._counter,
            batch_size=config.batch_size,
            rows=buffers.pixels,
            batch_labels=buffers.labels,
        )
        self.forward(buffers)
        kernels.cross_entropy(
            logits=buffers.logits,
            labels=buffers.labels,
            dlogits=buffers.dlogits,
            totals=self._totals,
            smoothing=config.smoothing,
        )
        self.backward(buffers)
        kernels.sum_partials(
            partial_gradients=self._partial_gradients,
            gradient=self.gradient,
            squares=self._squares,
            counter=self._counter,
        )
        kernels.adam_step(
            weights=self.parameters.flat,
            gradient=self.gradient,
            adam=state.adam,
            average=state.average.average if state.average else None,
            squares=self._squares,
            schedule=self._schedule,
            counter=self._counter,
            clip=config.clip,
        )

    def forward(self, buffers: "_Buffers") -> None:
        """Launch the forward pass from `buffers.pixels` to `buffers.logits`."""
        kernels, config = self.kernels, self.model_config

        def linear(name, x, out, **residual):
            w, b = self.parameters.pair(name)
            kernels.linear_forward(x=x, w=w, b=b, out=out, **residual)

        def norm(name, x, results):
            w, b = self.parameters.pair(name)
            kernels.layer_norm_forward(x=x, w=w, b=b, **vars(results))

        kernels.linear_forward(
            x=buffers.pixel_rows,
            w=_embedding(self.parameters, config),
            b=None,
            out=buffers.tokens,
        )
        x = buffers.tokens
        for i, block in enumerate(buffers.blocks):
            name = f"blocks.{i}"
            norm(f"{name}.norm1", x, block.norm1)
            linear(f"{name}.attention.qkv", block.norm1.out, block.qkv_rows)
            kernels.attention_forward(qkv=block.qkv, out=block.attended, weights=block.weights)
            # In the last block only the class token is a query, so that only its rows of x are added here.
            linear(
                f"{name}.attention.projection",
                block.attended_rows,
                block.residual,
                residual=x,
                residual_every=block.every,
            )
            norm(f"{name}.norm2", block.residual, block.norm2)
            w, b = self.parameters.pair(f"{name}.mlp.fc1")
            kernels.linear_gelu_forward(x=block.norm2.out, w=w, b=b, out=block.active, derivative=block.derivative)
            linear(f"{name}.mlp.fc2", block.active, block.out, residual=block.residual)
            x = block.out
        norm("norm", x, buffers.norm)
        linear("head", buffers.norm.out, buffers.logits)

    def backward(self, buffers: "_Buffers") -> None:
        """Launch the backward pass from `buffers.dlogits` to all partial gradients."""
        kernels, config, first = self.kernels, self.model_config, self._first_partial
        partials: dict[str, Any] = {"partials": PARTIALS, "partial_step": self.partial_step}

        def linear(name, dout, x, dx, derivative=None):
            w, _ = self.parameters.pair(name)
            dw, db = first.pair(name)
            kernels.linear_backward(dout=dout, x=x, w=w, dx=dx, dw=dw, db=db, derivative=derivative, **partials)

        def norm(name, dout, cache, dx, **residual):
            w, _ = self.parameters.pair(name)
            dw, db = first.pair(name)
            kernels.layer_norm_backward(
                dout=dout,
                normalised=cache.normalised,
                inverse_deviation=cache.inverse_deviation,
                w=w,
                dx=dx,
                dw=dw,
                db=db,
                **partials,
                **residual,
            )

        last = buffers.blocks[-1]
        linear("head", dout=buffers.dlogits, x=buffers.norm.out, dx=last.dnormed)
        norm("norm", dout=last.dnormed, cache=buffers.norm, dx=last.dout)
        for i in reversed(range(config.depth)):
            block, name = buffers.blocks[i], f"blocks.{i}"
            dx = buffers.blocks[i - 1].dout if i else buffers.dtokens
            linear(
                f"{name}.mlp.fc2",
                dout=block.dout,
                x=block.active,
                dx=block.dhidden,
                derivative=block.derivative,
            )
            linear(f"{name}.mlp.fc1", dout=block.dhidden, x=block.norm2.out, dx=block.dnormed)
            norm(
                f"{name}.norm2",
                dout=block.dnormed,
                cache=block.norm2,
                dx=block.dresidual,
                residual=block.dout,
            )
            linear(
                f"{name}.attention.projection",
                dout=block.dresidual,
                x=block.attended_rows,
                dx=block.dattended_rows,
            )
            kernels.attention_backward(
                dout=block.dattended,
                qkv=block.qkv,
                weights=block.weights,
                dqkv=block.dqkv,
            )
            linear(f"{name}.attention.qkv", dout=block.dqkv_rows, x=block.norm1.out, dx=buffers.dnormed)
            norm(
                f"{name}.norm1",
                dout=buffers.dnormed,
                cache=block.norm1,
                dx=dx,
                residual=block.dresidual,
                residual_every=block.every,
            )
        kernels.linear_backward(
            dout=buffers.dtokens,
            x=buffers.pixel_rows,
            w=_embedding(self.parameters, config),
            dx=None,
            dw=_embedding(first, config),
            db=None,
            **partials,
        )


def _embedding(parameters, config):
    """View the embedding's weight and bias, the class token and the positions, which are adjacent, as one matrix."""
    rows = config.patch_length + 2 + config.tokens
    return parameters.flat[: rows * config.width].reshape(rows, config.width)


class _Buffers:
    """All arrays between the pixels and the gradients, for one number of images."""

    def __init__(self, xp, config, images):
        def empty(*shape, dtype=np.float32):
            return xp.empty(shape, dtype)

        tokens, width = config.tokens, config.width
        rows = images * tokens
        self.labels = empty(images, dtype=np.int32)
        self.pixels = empty(images, tokens, config.patch_length + 2 + tokens)
        self.pixel_rows = self.pixels.reshape(rows, -1)
        self.tokens, self.dtokens, self.dnormed = (empty(rows, width) for _ in range(3))
        self.blocks = [_Block(empty, config, images=images, last=i == config.depth - 1) for i in range(config.depth)]
        self.norm = _Norm(empty, images, width)
        self.logits, self.dlogits = empty(images, config.classes), empty(images, config.classes)


class _Block:
    """The arrays of one block of the model. The last block outputs the class token only."""

    def __init__(self, empty, config, images, last):
        tokens, width, heads = config.tokens, config.width, config.heads
        self.every = tokens if last else 1  # one in `every` rows of x leaves the block
        queries = 1 if last else tokens
        rows = images * queries
        self.norm1 = _Norm(empty, images * tokens, width)
        self.qkv, self.dqkv = empty(images, tokens, 3 * width), empty(images, tokens, 3 * width)
        self.weights = empty(images, heads, queries, tokens)
        self.attended, self.dattended = empty(images, queries, width), empty(images, queries, width)
        self.qkv_rows, self.dqkv_rows = (x.reshape(images * tokens, 3 * width) for x in (self.qkv, self.dqkv))
        self.attended_rows, self.dattended_rows = (x.reshape(rows, width) for x in (self.attended, self.dattended))
        self.residual, self.dresidual = empty(rows, width), empty(rows, width)  # between attention and MLP
        self.norm2, self.dnormed = _Norm(empty, rows, width), empty(rows, width)
        self.active, self.derivative, self.dhidden = (empty(rows, config.mlp_width) for _ in range(3))
        self.out, self.dout = empty(rows, width), empty(rows, width)


class _Norm:
    """The result and the cache of one layer norm."""

    def __init__(self, empty, rows, width):
        self.out, self.normalised = empty(rows, width), empty(rows, width)
        self.inverse_deviation = empty(rows)
