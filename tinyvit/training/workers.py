"""The loss and the gradient of a batch, a share of it in each of several processes.

Threads would be simpler, but every NumPy call that ends asks for the interpreter's lock, and falls asleep if another
thread has it: two threads take a tenth longer than two processes for this model (`benchmarks/NOTES.md`), and more of
them lose more. The processes share a block of memory with the weights, the images and the gradients. Through a pipe
to each goes one line per step, which says which images are its share, and one comes back, with the loss.
"""

import contextlib
import errno
import io
import itertools
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import numpy as np

from tinyvit.backend import array_module, available_cores, one_blas_thread
from tinyvit.data.augment import warp
from tinyvit.memory import Workspace
from tinyvit.model import ViTConfig, loss_and_gradient
from tinyvit.parameters import Parameters

CHUNK_TOKENS = 1088  # 64 images of 17: enough for matrix products to run well, and few enough for the cache
START_SECONDS = 60  # for a helper to answer for the first time: it imports NumPy, and disks may be slow


class WorkerError(RuntimeError):
    """A process that computed a share of a step failed or died; the message says what is known."""


class ParallelGradient:
    """Computes a batch's loss and gradient, a share of it in each of `workers` processes. Use it as a context.

    config: `ViTConfig`; workers: how many, by default one per core; smoothing: of the labels; chunk_size: images of
    a share computed at once, by default as many as have `CHUNK_TOKENS` tokens. Raises `ValueError` if one of them
    is below 1, and on entering `WorkerError` or `OSError` if a process does not start or the memory for all is not
    there. Inside the context BLAS keeps to one thread per process.

    The batch is cut and the gradients are summed in an order that depends on its size and the number of workers
    only, so that timing changes no bit. The first worker is this process, the others are its helpers: one worker
    needs no other process, and is what a GPU needs, with a chunk_size of the whole batch.
    """

    def __init__(self, config, workers=None, smoothing=0.0, chunk_size=None):
        self.config, self.smoothing = config, float(smoothing)
        self.chunk_size = max(1, CHUNK_TOKENS // config.tokens) if chunk_size is None else chunk_size
        self.workers = available_cores() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {self.chunk_size}")
        self._turn = threading.Lock()
        self._resources = None

    def __enter__(self):
        if self._resources is not None:
            raise RuntimeError("this parallel gradient is in use already")
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_blas_thread())
            self._workspace, self._process = Workspace(), os.getpid()
            self._helpers, self._layout, self._shared = [], None, None
            if self.workers > 1:
                weights = sum(math.prod(shape) for shape in self.config.shapes().values())
                self._memory = stack.enter_context(_SharedMemory(8 * weights * self.workers))
                stack.callback(self._stop_helpers)
                self._start_helpers()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception):
        resources, self._resources = self._resources, None
        self._workspace = self._shared = None  # and with them their memory
        resources.__exit__(*exception)

    def _start_helpers(self):
        settings = {
            "config": self.config.as_dict(),
            "smoothing": self.smoothing,
            "chunk_size": self.chunk_size,
            "memory": self._memory.address,
        }
        try:
            for number in range(2, self.workers + 1):
                self._helpers.append(_Helper(f"worker {number} of {self.workers}", self._memory.descriptors))
            for index, helper in enumerate(self._helpers):
                helper.start(settings | {"index": index})
        except BaseException:
            self._stop_helpers()
            raise

    def _stop_helpers(self):
        while self._helpers:
            self._helpers.pop().stop()

    def __call__(self, parameters, images, labels, maps=None):
        """Return the loss, how many images were classified correctly, and the gradient of a batch.

        images: (B, R, C), uint8 or float in 0 to 1; labels: (B,) integers; maps: (B, 2, 3) as `Augmentation.draw`
        gives them, or None: each worker changes the images of its share by them (they are uint8 then). Loss and
        count are 0-d arrays; the gradient is `Parameters`. Raises `WorkerError` if another process failed or died,
        `OSError` if there is no room for what they share, `ValueError` on images or labels that do not fit, and
        `RuntimeError` outside the context or if another thread uses it. After an error the next call begins with
        new helpers.
        """
        if self._resources is None:
            raise RuntimeError("use a parallel gradient as a context: with ParallelGradient(...) as gradient:")
        if not len(images) == len(labels) > 0:
            raise ValueError(f"a batch has one label per image and at least one, not {len(images)} and {len(labels)}")
        if self.workers > 1 and array_module(parameters.flat) is not np:
            raise ValueError(f"a GPU computes a batch as a whole: it needs one worker, not {self.workers}")
        if os.getpid() != self._process or not self._turn.acquire(blocking=False):
            raise RuntimeError("a parallel gradient serves one thread of one process: give each its own")
        try:
            if self.workers > 1 and not self._helpers:
                self._start_helpers()
            return self._compute(parameters, images, labels, maps)
        except BaseException:  # a helper may still be at work, and its answer must not be taken for the next one
            self._stop_helpers()
            raise
        finally:
            self._turn.release()

    def _compute(self, parameters, images, labels, maps):
        batch_size = len(images)
        mine, *others = (slice(*ends) for ends in split(batch_size, min(self.workers, batch_size)))
        helpers = self._helpers[: len(others)]
        if helpers:
            self._publish(parameters, images, labels, maps)
        for helper, share in zip(helpers, others, strict=True):
            helper.send(
                {"layout": self._layout, "first": share.start, "last": share.stop, "batch_size": batch_size}
            )
        with self._workspace:
            loss, correct, gradients = gradient_of_share(
                images[mine],
                labels[mine],
                None if maps is None else maps[mine],
                parameters,
                self.config,
                smoothing=self.smoothing,
                chunk_size=self.chunk_size,
                batch_size=batch_size,
            )
        for index, helper in enumerate(helpers):
            answer = helper.receive()
            with np.errstate(over="ignore", invalid="ignore"):  # as in `gradient_of_share`
                loss = loss + answer["loss"]
                correct = correct + answer["correct"]
                gradients.flat += self._shared["gradients"][index]
        return loss, correct, gradients

    def _publish(self, parameters, images, labels, maps):
        """Copy the weights and the batch to where the helpers read them."""
        arrays = {"weights": parameters.flat, "images": images, "labels": labels}
        if maps is not None:
            arrays["maps"] = maps
        layout = {name: (array.shape, array.dtype.str) for name, array in arrays.items()}
        layout["gradients"] = ((len(self._helpers), *parameters.flat.shape), parameters.flat.dtype.str)
        if layout != self._layout:
            self._shared, self._layout = self._memory.arrays(layout), layout
        for name, array in arrays.items():
            self._shared[name][...] = array


def gradient_of_share(
    images, labels, maps, parameters, config, smoothing, chunk_size, batch_size, gradients=None
):
    """Return loss, count of correct answers and gradient of a share of a batch of batch_size, one chunk at a time.

    images: (N, R, C); labels: (N,); maps: (N, 2, 3) by which the images are changed, or None. Loss and gradient are
    parts of the mean over the whole batch: those of all shares add up to it. gradients: the `Parameters` to write the
    gradient into, new ones by default.
    """
    total_loss, total_correct, total = 0, 0, None
    for start, stop in split(len(images), -(-len(images) // chunk_size)):
        chunk = images[start:stop]
        if maps is not None:
            chunk = warp(chunk, maps[start:stop])
        with np.errstate(over="ignore", invalid="ignore"):  # the step checks whether the loss is finite
            loss, correct, chunk_gradients = loss_and_gradient(
                chunk,
                labels[start:stop],
                parameters,
                config,
                smoothing=smoothing,
                weight=(stop - start) / batch_size,
                gradients=gradients if total is None else None,
            )
            if total is None:
                total = chunk_gradients
            else:
                total.flat += chunk_gradients.flat
        total_loss = total_loss + loss
        total_correct = total_correct + correct
    return total_loss, total_correct, total


def split(count, parts):
    """Split the places 0 to `count` into `parts` of sizes as even as possible: a list of (start, stop)."""
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


class _Helper:
    """Another process that computes shares of batches, as this process sees it."""

    def __init__(self, name, descriptors):
        if not sys.executable or getattr(sys, "frozen", False):
            raise WorkerError(f"{name} cannot be started, as there is no Python to start: train with one worker")
        self._name = name
        here = str(Path(__file__).resolve().parents[2])  # first, so that the helper has this very library
        path = [here, *(entry for entry in sys.path if isinstance(entry, str))]
        program = f"import sys; sys.path[:] = {path!r}; from tinyvit.training.workers import serve; serve()"
        threads = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=os.environ | dict.fromkeys(threads, "1"),
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        self._answers = io.BufferedReader(self._process.stdout)

    def start(self, settings):
        """Tell it what it is to do, and wait until it is ready."""
        patience = threading.Timer(START_SECONDS, self._process.kill)
        patience.start()
        try:
            self.send(settings)
            self.receive()
        finally:
            patience.cancel()

    def stop(self):
        """End it, whatever it is doing."""
        self._process.kill()  # it has nothing that could be lost
        self._process.wait()
        self._process.stdin.close()
        self._answers.close()

    def send(self, message):
        """Ask for something, a dict; `receive` waits for the answer."""
        with contextlib.suppress(BrokenPipeError):  # `receive` raises if the helper is gone
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self):
        """Return the answer, a dict; raise `WorkerError` if there is none."""
        while line := self._answers.readline():
            if line.startswith(_ANSWER) and line.endswith(b"\n"):  # and is not what some library has printed
                answer = json.loads(line.removeprefix(_ANSWER))
                if "error" in answer:
                    raise WorkerError(f"{self._name} failed:\n{answer['error']}")
                return answer
        self._process.kill()  # in case it has closed its end and lives
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise WorkerError(
            f"{self._name} is gone ({how}); if memory was short, fewer workers or a smaller batch need less, "
            "and one worker needs no other process"
        )


_ANSWER = b"\x02tinyvit "  # what a helper's lines begin with, and nothing that libraries print does


def serve():
    """Answer a `_Helper`, on standard input and output, until there is nothing more to read."""
    requests = sys.stdin.buffer
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever is printed from now on, by whatever library, is no answer

    def answer(message):
        with contextlib.suppress(BrokenPipeError):  # the program has ended, which the next read shows
            os.write(answers, b"\n" + _ANSWER + json.dumps(message).encode() + b"\n")

    layout = None
    first_line = requests.readline()
    if not first_line:  # the program has ended already
        return
    try:
        settings = json.loads(first_line)
        config, workspace = ViTConfig(**settings["config"]), Workspace()
        memory = open(settings["memory"], "r+b")  # noqa: SIM115  open as long as the process
        answer({"ready": True})
    except Exception:
        answer({"error": traceback.format_exc()})
        return
    with one_blas_thread():
        for line in requests:
            request = json.loads(line)
            try:
                if layout != request["layout"]:
                    shared = _arrays(memory, request["layout"])
                    parameters = Parameters(config.shapes(), shared["weights"])
                    gradients = parameters.with_flat(shared["gradients"][settings["index"]])
                    layout = request["layout"]
                share = slice(request["first"], request["last"])
                maps = shared["maps"][share] if "maps" in shared else None
                with workspace:
                    loss, correct, _ = gradient_of_share(
                        shared["images"][share],
                        shared["labels"][share],
                        maps,
                        parameters,
                        config,
                        smoothing=settings["smoothing"],
                        chunk_size=settings["chunk_size"],
                        batch_size=request["batch_size"],
                        gradients=gradients,
                    )
                answer({"loss": float(loss), "correct": int(correct)})
            except Exception:
                answer({"error": traceback.format_exc()[-3000:]})  # a line that a pipe takes at once


class _SharedMemory:
    """A file that all processes map into their memory. A context.

    It has no name, so that nothing is left of it when they end, however they end; where the system cannot pass it on
    without one, it is removed on leaving. On Linux it is in a folder that is kept in memory, if that has room.
    """

    def __init__(self, expected):
        folder = Path("/dev/shm")  # small in some containers
        roomy = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * expected
        self._folder = str(folder) if roomy else tempfile.gettempdir()
        if os.name == "posix":
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed on leaving
            self.address = self._file.fileno()  # the same number there, as it is passed on
            self.descriptors = (self.address,)
        else:
            self._file = tempfile.NamedTemporaryFile(dir=self._folder, delete=False)  # noqa: SIM115
            self.address, self.descriptors = self._file.name, ()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
        if isinstance(self.address, str):
            with contextlib.suppress(OSError):
                os.unlink(self.address)

    def arrays(self, layout):
        """Return arrays of this layout, a dict from name to (shape, dtype), in the place of all earlier ones."""
        size = sum(_rounded(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in layout.values())
        if size > os.fstat(self._file.fileno()).st_size:
            try:
                self._file.truncate(size)
                _reserve(self._file.fileno(), size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"no room for {size / 1e6:.0f} MB that the workers share ({error.strerror}): "
                    "make some, or train with one worker",
                    self._folder,
                ) from error
        return _arrays(self._file, layout)


def _reserve(descriptor, size):
    """Take all the room that a file of `size` bytes needs: `OSError` if there is none, and not a crash later."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems cannot say
                raise


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
