"""Compute the loss and the gradient of a batch in several processes.

Each worker computes a share of the batch. The workers are processes because threads are slower for this model. After
each NumPy call a thread needs the interpreter's lock and sleeps while another thread holds it. Two threads take a
tenth longer than two processes (`benchmarks/NOTES.md`), and more threads lose more.

The first worker is the calling process. The others are helper processes, which share a block of memory with it for
the weights, the images and the gradients. Per step, a helper reads one line with the range of its share from a pipe,
and answers with one line that contains the loss.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import logging
import math
import mmap
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit import console
from tinyvit.backend import (
    MOST_WORKERS,
    array_module,
    available_cores,
    loops_choice,
    one_blas_thread,
    use_loops,
)
from tinyvit.checks import as_array, require_scalar
from tinyvit.data.augment import warp
from tinyvit.memory import Workspace
from tinyvit.model import ViTConfig, loss_and_gradient
from tinyvit.parameters import Parameters

CHUNK_TOKENS = 1088  # 64 images of 17 tokens, enough for fast matrix products and few enough for the cache
START_SECONDS = 60  # the limit for a helper's first answer; it imports NumPy, and disks may be slow


class WorkerError(RuntimeError):
    """A helper process failed or died; the message contains its error or its exit status."""


class ParallelGradient:
    """A context manager that computes the loss and the gradient of batches in several processes.

    Inside the context, BLAS uses one thread per process. All processes use compiled loops if the context is entered
    inside `use_loops`. The bits of the result depend on the number of workers but not on timing.

    Parameters
    ----------
    config : ViTConfig
        The settings of the model.
    workers : int, optional
        Number of processes. Default: one per core. A GPU needs 1.
    smoothing : float, optional
        Label smoothing.
    chunk_size : int, optional
        Number of images per computation within a share. Default: as many as have 1,088 tokens.

    Raises
    ------
    ValueError
        If `workers`, `smoothing` or `chunk_size` is out of range.
    WorkerError
        On entering the context, if a process does not start.
    OSError
        On entering the context, if the memory cannot be shared.
    """

    def __init__(
        self, config: ViTConfig, workers: int | None = None, smoothing: float = 0.0, chunk_size: int | None = None
    ) -> None:
        chunk_size = max(1, CHUNK_TOKENS // config.tokens) if chunk_size is None else chunk_size
        workers = available_cores() if workers is None else workers
        require_scalar("smoothing", smoothing, minimum=0, maximum=1, below=True)
        require_scalar("workers", workers, minimum=1, maximum=MOST_WORKERS, integer=True)
        require_scalar("chunk_size", chunk_size, minimum=1, maximum=math.inf, integer=True)
        self.config, self.smoothing = config, float(smoothing)
        self.workers, self.chunk_size = int(workers), int(chunk_size)
        self._turn = threading.Lock()
        self._resources: Any = None
        self._workspace: Any  # in the context, a `Workspace`

    def __enter__(self) -> "ParallelGradient":
        if self._resources is not None:
            raise RuntimeError("this parallel gradient is already in use: make another one")
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_blas_thread())
            self._workspace, self._process = Workspace(), os.getpid()
            self._loops = "on" if loops_choice() == "on" else "off"
            self._helpers: list[_Helper] = []
            self._layout = self._shared = None
            if self.workers > 1:
                weights = sum(math.prod(shape) for shape in self.config.shapes().values())
                with _standard_descriptors():
                    self._memory = stack.enter_context(_SharedMemory(8 * weights * self.workers))
                stack.callback(self._stop_helpers)
                self._start_helpers()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        resources, self._resources = self._resources, None
        self._workspace = self._shared = None  # releases their memory
        resources.__exit__(*exception)

    def _start_helpers(self):
        settings = {
            "config": self.config.as_dict(),
            "smoothing": self.smoothing,
            "chunk_size": self.chunk_size,
            "memory": self._memory.address,
            "loops": self._loops,
        }
        try:
            with _standard_descriptors():
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

    def __call__(
        self, parameters: Parameters, images: np.ndarray, labels: np.ndarray, maps: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, Parameters]:
        """Compute the loss and the gradient of a batch. After an error, the next call starts new helpers.

        Parameters
        ----------
        parameters : Parameters
            The weights.
        images : ndarray of shape (B, R, C)
            Either uint8, or float in 0 to 1.
        labels : ndarray of shape (B,)
            Classes, integers.
        maps : ndarray of shape (B, 2, 3), optional
            Changes from `Augmentation.draw`, which each worker applies to its share. The images are uint8 then.

        Returns
        -------
        loss : ndarray of shape ()
            Mean loss of the batch.
        correct : ndarray of shape ()
            Number of correctly classified images.
        gradients : Parameters
            The gradient.

        Raises
        ------
        WorkerError
            If another process failed or died.
        OSError
            If there is not enough memory to share.
        ValueError
            If images or labels do not fit.
        RuntimeError
            Outside the context, or if another thread or process uses the object.
        """
        if self._resources is None:
            raise RuntimeError("use the object as a context manager: with ParallelGradient(...) as gradient:")
        images, labels = as_array("images", images), as_array("labels", labels)
        if not len(images) == len(labels) > 0:
            raise ValueError(f"give images and one label each, not {len(images)} images and {len(labels)} labels")
        if self.workers > 1 and array_module(parameters.flat) is not np:
            raise ValueError(f"workers must be 1 on a GPU, not {self.workers}")
        if os.getpid() != self._process or not self._turn.acquire(blocking=False):
            raise RuntimeError("only one thread of one process can use a parallel gradient: make one per thread")
        try:
            if self.workers > 1 and not self._helpers:
                self._start_helpers()
            return self._compute(parameters, images, labels, maps)
        except BaseException:  # a helper may still compute, and the next call must not read its old answer
            self._stop_helpers()
            raise
        finally:
            self._turn.release()

    def _compute(self, parameters, images, labels, maps):
        batch_size = len(images)
        first, *others = (slice(*ends) for ends in split(batch_size, min(self.workers, batch_size)))
        helpers = self._helpers[: len(others)]
        if helpers:
            self._publish(parameters, images, labels, maps)
        for helper, share in zip(helpers, others, strict=True):
            helper.send(
                {"layout": self._layout, "first": share.start, "last": share.stop, "batch_size": batch_size}
            )
        with self._workspace, use_loops(self._loops):
            loss, correct, gradients = gradient_of_share(
                images=images[first],
                labels=labels[first],
                maps=None if maps is None else maps[first],
                parameters=parameters,
                config=self.config,
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
        """Copy the weights and the batch to the shared memory."""
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
    images: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray | None,
    parameters: Parameters,
    config: ViTConfig,
    smoothing: float,
    chunk_size: int,
    batch_size: int,
    gradients: Parameters | None = None,
) -> tuple[np.ndarray, np.ndarray, Parameters]:
    """Compute the loss and the gradient of a share of a batch, one chunk at a time.

    Parameters
    ----------
    images : ndarray of shape (N, R, C)
        The images of the share.
    labels : ndarray of shape (N,)
        Their classes, integers.
    maps : ndarray of shape (N, 2, 3) or None
        Changes of the images, from `Augmentation.draw`.
    parameters : Parameters
        The weights.
    config : ViTConfig
        The settings of the model.
    smoothing : float
        Label smoothing.
    chunk_size : int
        The largest number of images per chunk.
    batch_size : int
        Number of images in the whole batch.
    gradients : Parameters, optional
        Where the gradient is written. Default: new arrays.

    Returns
    -------
    loss : ndarray of shape ()
        The share's part of the mean loss of the batch. The parts of all shares add up to the mean.
    correct : ndarray of shape ()
        Number of correctly classified images.
    gradients : Parameters
        The share's part of the gradient.
    """
    total_loss: Any = 0
    total_correct: Any = 0
    total: Any = None
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


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """Divide a range into parts whose sizes differ by at most one.

    Parameters
    ----------
    count : int
        Length of the range, which begins at 0.
    parts : int
        Number of parts.

    Returns
    -------
    list of tuple
        The start and the stop of each part.
    """
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


class _Helper:
    """A handle of another process that computes shares of batches."""

    def __init__(self, name, descriptors):
        if not sys.executable or getattr(sys, "frozen", False):
            raise WorkerError(f"{name} cannot start because there is no Python interpreter: train with one worker")
        self._name = name
        here = str(Path(__file__).resolve().parents[2])  # the helper must import this copy of the library
        path = [here, *(entry for entry in sys.path if isinstance(entry, str))]
        program = f"import sys; sys.path[:] = {path!r}\n{_end_with_parent()}\n"
        program += "from tinyvit.training.workers import serve; serve()"
        threads = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")
        start = functools.partial(
            subprocess.Popen,
            [sys.executable, "-c", program],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=os.environ | dict.fromkeys(threads, "1"),
            start_new_session=True,  # Ctrl-C interrupts only the calling process
        )
        is_main = threading.current_thread() is threading.main_thread()
        self._process = start() if is_main else _start_in_thread(start)
        self._answers = io.BufferedReader(self._process.stdout)

    def start(self, settings):
        """Send the settings, and wait until the helper is ready."""
        limit = threading.Timer(START_SECONDS, self._process.kill)
        limit.start()
        try:
            self.send(settings)
            self.receive()
        finally:
            limit.cancel()

    def stop(self):
        """End the process, even while it computes."""
        self._process.kill()  # it has no data to save
        self._process.wait()
        self._process.stdin.close()
        self._answers.close()

    def send(self, message):
        """Send a request, a dict. `receive` waits for the answer."""
        with contextlib.suppress(BrokenPipeError):  # if the helper has ended, `receive` raises an error
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self):
        """Return the answer, a dict, or raise `WorkerError`."""
        while line := self._answers.readline():
            if line.startswith(_ANSWER) and line.endswith(b"\n"):  # other lines are output of some library
                answer = json.loads(line.removeprefix(_ANSWER))
                if "no_memory" in answer:
                    raise MemoryError(f"{self._name}: {answer['no_memory']}")
                if "error" in answer:
                    raise WorkerError(f"{self._name} failed:\n{answer['error']}")
                return answer
        self._process.kill()  # it may have closed the pipe without ending
        code = self._process.wait()
        ending = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise WorkerError(
            f"{self._name} {ending}: if memory was short, try fewer workers or a smaller batch; "
            "one worker needs no other process"
        )


def _end_with_parent():
    """Return the statements with which a helper lets the system kill it when this process ends.

    Elsewhere than on Linux there are none. A helper then ends at the end of its input, unless it is stopped.
    """
    if sys.platform != "linux":
        return ""
    kill = f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})"
    return f"import ctypes, os; {kill}; os.getppid() == {os.getpid()} or os._exit(1)"  # it may have ended already


def _start_in_thread(start):
    """Return the process that `start` starts, from a thread that ends after it.

    Linux kills a helper when the thread that started it ends, and the calling thread may end before the helper.
    """
    answers = queue.SimpleQueue()

    def work():
        try:
            process = start()
        except BaseException as error:
            answers.put(error)
        else:
            answers.put(process)
            process.wait()

    threading.Thread(target=work, daemon=True).start()
    answer = answers.get()
    if isinstance(answer, BaseException):
        raise answer
    return answer


_PR_SET_PDEATHSIG = 1
_ANSWER = b"\x02tinyvit "  # the beginning of an answer, which no library prints


def serve() -> None:
    """Read requests from standard input, compute, and write answers to standard output, until the input ends."""
    requests = sys.stdin.buffer
    answers = os.dup(1)
    os.dup2(2, 1)  # output of libraries goes to standard error from now on

    def answer(message):
        with contextlib.suppress(BrokenPipeError):  # the caller has ended, and the next read returns nothing
            os.write(answers, b"\n" + _ANSWER + json.dumps(message).encode() + b"\n")

    layout = None
    first_line = requests.readline()
    if not first_line:  # the caller has already ended
        return
    try:
        settings = json.loads(first_line)
        config, workspace = ViTConfig(**settings["config"]), Workspace()
        memory = open(settings["memory"], "r+b")  # noqa: SIM115  it stays open until the process ends
        logging.getLogger("tinyvit").setLevel(logging.ERROR)  # the caller has logged the same notes
        loops = use_loops(settings["loops"])
        loops.__enter__()  # in use until the process ends
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
                        images=shared["images"][share],
                        labels=shared["labels"][share],
                        maps=maps,
                        parameters=parameters,
                        config=config,
                        smoothing=settings["smoothing"],
                        chunk_size=settings["chunk_size"],
                        batch_size=request["batch_size"],
                        gradients=gradients,
                    )
                answer({"loss": float(loss), "correct": int(correct)})
            except MemoryError as error:
                answer({"no_memory": str(error)})
            except Exception:
                answer({"error": traceback.format_exc()[-3000:]})  # a pipe takes a line of this size in one piece


@contextlib.contextmanager
def _standard_descriptors():
    """Keep files and pipes that open inside the context away from the descriptors 0 to 2, which a helper uses."""
    opened = console.open_standard_descriptors()
    try:
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)


class _SharedMemory:
    """A context manager for a file that all processes map into their memory.

    On POSIX systems the file has no name and vanishes with the processes, even if they are killed. On others it is
    removed when the context ends. On Linux it is in /dev/shm, which is kept in memory, if that has enough room.
    """

    def __init__(self, expected):
        folder = Path("/dev/shm")  # small in some containers
        roomy = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * expected
        self._folder = str(folder) if roomy else tempfile.gettempdir()
        if os.name == "posix":
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed when the context ends
            self.address = self._file.fileno()  # helpers inherit the descriptor with the same number
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
        """Return arrays of a layout, a dict of name to (shape, dtype). They replace all earlier arrays."""
        size = sum(_rounded(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in layout.values())
        if size > os.fstat(self._file.fileno()).st_size:
            try:
                self._file.truncate(size)
                _reserve(self._file.fileno(), size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"not enough room for the {size / 1e6:.0f} MB that the workers share ({error.strerror}): "
                    "free some space, or train with one worker",
                    self._folder,
                ) from error
        return _arrays(self._file, layout)


def _reserve(descriptor, size):
    """Reserve `size` bytes for a file, so that a full disk raises `OSError` here instead of a crash later."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # these file systems do not support it
                raise


def _arrays(file, layout):
    """Return arrays of a layout, a dict of name to (shape, dtype), in the mapped memory of `file`."""
    memory, offset, arrays = mmap.mmap(file.fileno(), 0), 0, {}
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.ndarray(tuple(shape), np.dtype(dtype), memory, offset)
        offset += _rounded(arrays[name].nbytes)
    return arrays


def _rounded(size, line=64):
    """Return `size` bytes rounded up to whole cache lines."""
    return -(-size // line) * line
