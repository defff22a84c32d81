"""Measure contestants in turns. Each is a process, and one works while the others wait, round after round.

On a shared machine the fair figure is a ratio of two times from the same round. Each contestant is built in its own
process, because thread pools and BLAS limits belong to a process and must not slow the other contestants. A turn
begins with two steps that are not counted, which bring the contestant's data back into the caches.
"""

import contextlib
import importlib
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from checkout import ROOT

PEERS = ("torch", "jax", "jaxlib", "onnx", "onnxruntime")  # may be missing
LIMIT = 3600  # seconds until a contestant that does not answer is ended


class RemoteError(RuntimeError):
    """A call in another process failed.

    kind: the name of the error's class there, "absent" if a peer is not installed, or "ended" if the process is gone;
    log: the last lines that the process printed.
    """

    def __init__(self, kind, text, log=""):
        super().__init__(text)
        self.kind, self.log = kind, log


class Remote:
    """A process that builds an object with `module`.`function`(**arguments) and runs its methods.

    A failure there raises `RemoteError` here and ends that process only. seconds: the time limit for building.
    """

    def __init__(self, module, function, *, seconds, **arguments):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        handle, self._log = tempfile.mkstemp(prefix="tinyvit-", suffix=".log")
        os.close(handle)
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._log, module, function, arguments),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._receive("while it was built", seconds)

    def call(self, method, *arguments, seconds):
        """Return the result of a method. Raises `RemoteError`, also if it takes longer than `seconds`."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._failed("ended", f"the process is gone ({error})") from None
        return self._receive(f"in {method}", seconds)

    def _receive(self, when, seconds):
        try:
            if not self._connection.poll(max(0.0, seconds)):
                raise self._failed("ended", f"ended because it took longer than {seconds:.3g} s {when}")
            state, *rest = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise self._failed("ended", f"the process died {when}, exit code {self._process.exitcode}") from None
        if state == "failed":
            raise self._failed(*rest)
        return rest[0]

    def _failed(self, kind, text):
        printed = ""
        with contextlib.suppress(OSError), open(self._log, encoding="utf-8", errors="replace") as log:
            printed = log.read()
        self._process.kill()
        self.close()
        return RemoteError(kind, text, "\n".join(printed.splitlines()[-25:]))

    def close(self):
        """End the process. It has ten seconds to end by itself."""
        self._connection.close()
        self._process.join(10)
        self._process.kill()
        self._process.join(10)
        with contextlib.suppress(OSError):
            os.remove(self._log)


def _serve(connection, log, module, function, arguments):
    """Build an object and run its methods until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the parent, which ends this process
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)

    def answer(function, *arguments, **named):
        try:
            connection.send(("done", function(*arguments, **named)))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            absent = isinstance(error, ImportError) and (error.name or "").partition(".")[0] in PEERS
            lines = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {lines[0]}"[:800]
            connection.send(("failed", "absent" if absent else type(error).__name__, text))
            return False
        return True

    built = []

    def build():
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        built.append(getattr(importlib.import_module(module), function)(**arguments))

    if answer(build):
        with contextlib.suppress(EOFError):
            while True:
                method, values = connection.recv()
                answer(getattr(built[0], method), *values)


class Steps:
    """A step and its time. `step` is (module, function, arguments), and the function returns the step."""

    def __init__(self, step):
        module, function, arguments = step
        self._step = getattr(importlib.import_module(module), function)(**arguments)
        self._step()

    def turn(self, count):
        """Return the median time of `count` steps in seconds, and the peak memory of all processes in megabytes."""
        for _ in range(2):
            self._step()
        times = []
        for _ in range(count):
            began = time.perf_counter()
            self._step()
            times.append(time.perf_counter() - began)
        return statistics.median(times), sum(most for _, most in processes().values())


class Contestant:
    """A process that takes steps, which `module`.`function`(**arguments) builds."""

    def __init__(self, name, module, function, **arguments):
        self.name = name
        self.seconds = []  # the median time of a step, for each round
        self.megabytes = 0.0  # the peak memory of the process so far
        self.missing = ""  # the error, if a peer is not installed
        try:
            self._remote = Remote("turns", "Steps", seconds=LIMIT, step=(module, function, arguments))
        except RemoteError as error:
            if error.kind != "absent":
                raise RuntimeError(f"{name}: {error}\n{error.log}") from None
            self.missing = str(error)

    def run(self, seconds):
        """Take steps for about `seconds`, at least three, and keep their median time."""
        count = 3 if not self.seconds else max(3, round(seconds / self.seconds[-1]))
        try:
            median, self.megabytes = self._remote.call("turn", count, seconds=LIMIT)
        except RemoteError as error:
            raise RuntimeError(f"{self.name}: {error}\n{error.log}") from None
        self.seconds.append(median)

    def close(self):
        self._remote.close()


def processes(process="self"):
    """Return {process: (megabytes resident now, peak)} for a process and all its children, or {} without /proc."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        threads = list(Path(f"/proc/{process}/task").iterdir())
        started = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # the process has just ended, or the system is not Linux
        return {}
    found = {}
    if "VmRSS" in status:  # missing while the process ends
        now, most = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("VmRSS", "VmHWM"))
        found[process] = now, most
    for child in started:
        found |= processes(child)
    return found


def compare(contestants, rounds, seconds):
    """Let the contestants take turns, in reverse order every other round. The first round is a warm-up."""
    for number in range(rounds + 1):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            contestant.run(seconds)
    for contestant in contestants:
        contestant.seconds = contestant.seconds[1:]
        contestant.close()


def quartiles(values):
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratio(slower, faster):
    """Return the quartiles over the rounds of the time of `slower` divided by that of `faster`."""
    return quartiles([a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)])


def conditions(*packages):
    """Return the conditions of a measurement: machine, versions, BLAS, its environment variables, and the command."""
    from tinyvit.gpu import get_backend  # imported here to save memory in the contestants
    from tinyvit.training.results import versions

    found = versions(get_backend("cpu"))
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    prefixes = ("OPENBLAS_", "GOTO_", "OMP_", "MKL_", "BLIS_", "VECLIB_")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
    return found | {"environment": settings, "command": shlex.join(["python", *map(_shortened, sys.argv)])}


def _shortened(argument):
    """Return a path in the project relative to its root, and only the name of any other path."""
    try:
        return str(Path(argument).resolve().relative_to(ROOT)) if os.sep in argument else argument
    except ValueError:
        return Path(argument).name
