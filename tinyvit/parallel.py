"""A training step over shards of a batch, side by side on the cores: a process each.

Threads would be simpler, but every NumPy call that ends asks for the interpreter's lock, and if another thread has it
falls asleep: two threads take a tenth longer than two processes for this model (`benchmarks/NOTES.md`), and more of
them lose more. The processes share a block of memory with the weights, the images and the gradients. Through a pipe
to each goes one line a step, which says what images are its own, and one comes back, with the loss.
"""

import contextlib
import itertools
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

from tinyvit.backend import Workspace, array_module
from tinyvit.model import ViTConfig, vit_backward, vit_forward
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward
from tinyvit.parameters import Parameters

SHARD_TOKENS = 1088  # 64 images of 17: enough for matrix products to run well, and little enough for the memory


class WorkerError(RuntimeError):
    """A process that computed a share of a step failed or died; the message has what is known."""


def available_cores():
    """Return how many cores this process may use: by its affinity, and by a container's limit."""
    import joblib  # imported here alone: a helper process has no use for it

    return joblib.cpu_count()


class ShardedGradient:
    """Computes a batch's loss and gradient, a share of it in each of `workers` processes. Use it as a context.

    config: `ViTConfig`; workers: how many, by default the cores there are; smoothing: of the labels; shard_size:
    images computed at once, by default as many as have `SHARD_TOKENS` tokens. Raises `ValueError` if workers is
    below 1. Inside the context BLAS keeps to one thread a process, and gets its threads back on leaving.

    The batch is cut and the gradients are summed in an order that depends on its size and the number of workers
    alone: the same bits whatever the timing. The first worker is the process itself: one worker needs no other, and
    is what a GPU needs, with a shard_size of the whole batch.
    """

    def __init__(self, config, workers=None, smoothing=0.0, shard_size=None):
        self.config, self.smoothing = config, smoothing
        self.shard_size = max(1, SHARD_TOKENS // config.tokens) if shard_size is None else shard_size
        self.workers = available_cores() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        self._resources = None

    def __enter__(self):
        if self._resources is not None:
            raise RuntimeError("this sharded gradient is in use already")
        with contextlib.ExitStack() as stack:
            stack.enter_context(ThreadpoolController().limit(limits=1, user_api="blas"))
            self._workspace = Workspace()
            self._helpers, self._layout, self._shared = [], None, None
            if self.workers > 1:
                weights = sum(math.prod(shape) for shape in self.config.shapes().values())
                self._memory = stack.enter_context(_SharedMemory(8 * weights * self.workers))
                settings = {
                    "memory": self._memory.path,
                    "config": self.config.as_dict(),
                    "smoothing": self.smoothing,
                    "shard_size": self.shard_size,
                }
                for number in range(1, self.workers):
                    settings["number"] = number
                    self._helpers.append(stack.enter_context(_Helper(number, self.workers, settings)))
                for helper in self._helpers:
                    helper.end()  # it has opened the memory
                self._memory.forget_path()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception):
        resources, self._resources = self._resources, None
        self._workspace = self._shared = None  # and with them their memory
        resources.__exit__(*exception)

    def __call__(self, parameters, load, start, stop):
        """Return loss, how many were classified rightly, and the gradient, for places `start` to `stop`.

        load(start, stop) gives images and labels, as `Epoch.load` does. loss and the count are 0-d arrays; the
        gradient is `Parameters`. Raises `WorkerError` if another process failed or died.
        """
        if self._resources is None:
            raise RuntimeError("use a sharded gradient as a context: with ShardedGradient(...) as sharded_gradient:")
        if self.workers > 1 and array_module(parameters.flat) is not np:
            raise ValueError(f"a GPU computes a batch as a whole: it needs one worker, not {self.workers}")
        batch_size = stop - start
        mine, *others = cut(0, batch_size, min(self.workers, batch_size))
        helpers = self._helpers[: len(others)]
        for helper, (first, last) in zip(helpers, others, strict=True):
            images, labels = load(start + first, start + last)
            if helper is helpers[0]:
                self._share(parameters, images, labels, batch_size)
            self._shared["images"][first:last], self._shared["labels"][first:last] = images, labels
            helper.begin({"layout": self._layout, "first": first, "last": last, "batch_size": batch_size})

        with self._workspace:
            loss, correct, gradient = gradient_of_share(
                *load(start, start + mine[1]), parameters, self.config, self.smoothing, self.shard_size, batch_size
            )
        for number, helper in enumerate(helpers):
            answer = helper.end()
            loss = loss + answer["loss"]
            correct = correct + answer["correct"]
            gradient.flat += self._shared["gradients"][number]
        return loss, correct, gradient

    def _share(self, parameters, images, labels, batch_size):
        """Copy the weights to where the helpers read them; the shared memory is laid out anew if it does not fit."""
        flat = parameters.flat
        wanted = {
            "weights": (flat.shape, flat.dtype.str),
            "gradients": ((len(self._helpers), *flat.shape), flat.dtype.str),
            "images": ((batch_size, *images.shape[1:]), images.dtype.str),
            "labels": ((batch_size,), labels.dtype.str),
        }
        if self._layout is None or not _serves(self._layout, wanted):
            self._layout, self._shared = wanted, self._memory.arrays(wanted)
        self._shared["weights"][...] = flat


def gradient_of_share(images, labels, parameters, config, smoothing, shard_size, batch_size, total=None):
    """Return loss, count of right answers and gradient of some of a batch of batch_size, a shard after the other.

    Loss and gradient are parts of the mean over the whole batch: those of all shares add up to it. total: the
    `Parameters` to write the gradient into, new ones by default.
    """
    total_loss, total_correct = 0, 0
    for start, stop in cut(0, len(images), -(-len(images) // shard_size)):
        # whether the loss is finite is the caller's question, so NumPy need not warn of it
        with np.errstate(over="ignore", invalid="ignore"):
            logits, cache = vit_forward(images[start:stop], parameters, config)
            loss, loss_cache = cross_entropy_forward(logits, labels[start:stop], smoothing)
            share = (stop - start) / batch_size  # the batch's mean is the shards' means, weighted so
            dlogits = cross_entropy_backward(share, loss_cache)
            if start == 0:
                total = vit_backward(dlogits, cache, total)
            else:
                total.flat += vit_backward(dlogits, cache).flat
        total_loss = total_loss + loss * share
        total_correct = total_correct + (logits.argmax(axis=1) == labels[start:stop]).sum()
    return total_loss, total_correct, total


def cut(start, stop, parts):
    """Cut places `start` to `stop` into `parts` of as even a size as can be: a list of (start, stop)."""
    edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


class _Helper:
    """Another process that computes shares of batches, from the side of the one that asks. A context."""

    def __init__(self, number, workers, settings):
        self._name = f"worker {number + 1} of {workers}"
        program = f"import sys; sys.path[:] = {sys.path!r}; from tinyvit.parallel import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        self._owes = 0  # answers that were not read, because something went wrong before
        self._send(settings)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # it leaves when it reads the end
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def begin(self, request):
        """Ask for the gradient of a share; `end` waits for the answer."""
        while self._owes:
            self._receive()
        self._send(request)

    def end(self):
        """Return the answer to `begin`, a dict; raise `WorkerError` if there is none."""
        answer = self._receive()
        if "error" in answer:
            raise WorkerError(f"{self._name} failed:\n{answer['error']}")
        return answer

    def _send(self, message):
        with contextlib.suppress(BrokenPipeError):  # whoever reads the answer finds out
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        self._owes += 1

    def _receive(self):
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise WorkerError(
                f"{self._name} is gone ({how}); if that was for want of memory, try fewer workers or a smaller batch"
            )
        self._owes -= 1
        return json.loads(line)


def serve():
    """Answer a `_Helper`, on standard input and output, until there is nothing more to read."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what is printed must not get among the answers

    def answer(message):
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more: the next read will tell
            answers.write(json.dumps(message).encode() + b"\n")
            answers.flush()

    settings = json.loads(requests.readline())
    config, workspace, layout = ViTConfig(**settings["config"]), Workspace(), None
    one_thread = ThreadpoolController().limit(limits=1, user_api="blas")
    with open(settings["memory"], "r+b") as memory, one_thread, workspace:
        answer({"ready": True})
        for line in requests:
            request = json.loads(line)
            try:
                if layout != request["layout"]:
                    layout = request["layout"]
                    shared = _arrays(memory, layout)
                    parameters = Parameters(config.shapes(), shared["weights"])
                    gradients = parameters.with_flat(shared["gradients"][settings["number"] - 1])
                share = slice(request["first"], request["last"])
                loss, correct, _ = gradient_of_share(
                    shared["images"][share],
                    shared["labels"][share],
                    parameters,
                    config,
                    settings["smoothing"],
                    settings["shard_size"],
                    request["batch_size"],
                    gradients,
                )
                answer({"loss": float(loss), "correct": int(correct)})
            except Exception:
                answer({"error": traceback.format_exc()})


class _SharedMemory:
    """A file that all processes map into their memory; it lies in memory itself, where there is a folder for such."""

    def __init__(self, expected):
        folder = Path("/dev/shm")  # absent but on Linux, and small in some containers
        roomy = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * expected
        handle, self.path = tempfile.mkstemp(prefix="tinyvit-", dir=folder if roomy else None)
        self._file = os.fdopen(handle, "r+b")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
        self.forget_path()

    def forget_path(self):
        """Remove the file's name, once all who need the file have opened it: then it cannot outlive them."""
        with contextlib.suppress(OSError):  # gone already, or the system keeps names of open files
            os.unlink(self.path)

    def arrays(self, layout):
        """Return arrays of this layout, a dict from name to (shape, dtype), in place of all that there were."""
        size = sum(_rounded(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in layout.values())
        if size > os.fstat(self._file.fileno()).st_size:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, size)  # fails for want of room, so no write does
                else:
                    self._file.truncate(size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"no room for {size / 1e6:.0f} MB that the workers share ({error.strerror}): "
                    "make some, or train with one worker",
                    str(Path(self.path).parent),
                ) from error
        return _arrays(self._file, layout)


def _serves(layout, wanted):
    """Return whether arrays of one layout can serve as those of another: of the same kind, and as many or more."""
    return all(
        layout[name][1] == dtype and layout[name][0][1:] == shape[1:] and layout[name][0][0] >= shape[0]
        for name, (shape, dtype) in wanted.items()
    )


def _arrays(file, layout):
    """Return arrays of this layout, a dict from name to (shape, dtype), in the memory that `file` is mapped to."""
    memory, offset, arrays = mmap.mmap(file.fileno(), 0), 0, {}
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.ndarray(tuple(shape), np.dtype(dtype), memory, offset)
        offset += _rounded(arrays[name].nbytes)
    return arrays


def _rounded(size, line=64):
    """Return `size` bytes rounded up to whole cache lines."""
    return -(-size // line) * line
