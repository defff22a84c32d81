"""Measure contestants in turns: a process each, one at work while the others wait, round after round.

On a machine that others use too, the fair figure is a ratio of what two took in the same round. Each contestant is
built by a function of a module, in a process of its own, because thread pools and BLAS limits are a process's: what
one sets must not slow another. A round asks each for some steps after two that are not counted, which bring its own
data back into the caches.
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

PEERS = ("torch", "jax", "jaxlib", "onnx", "onnxruntime")  # may be absent


def _serve(connection, module, function, arguments):
    """Build a contestant and answer: the time of a number of steps, or how much memory it took."""
    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        step = getattr(importlib.import_module(module), function)(**arguments)
        step()
        connection.send(("ready", ""))
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in PEERS:
            raise
        connection.send(("absent", str(error)))
        return
    while (steps := connection.recv()) is not None:
        for _ in range(2):
            step()
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        connection.send((statistics.median(times), sum(most for _, most in processes().values())))


def processes(process="self"):
    """Return {process: (megabytes resident now, most so far)} for a process and all it started; {} without /proc."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        threads = list(Path(f"/proc/{process}/task").iterdir())
        started = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has just ended, or the system is not Linux
        return {}
    found = {}
    if "VmRSS" in status:  # not so in its last moment
        now, most = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("VmRSS", "VmHWM"))
        found[process] = now, most
    for child in started:
        found |= processes(child)
    return found


class Contestant:
    """A process that has built `module`.`function`(**arguments), a step, and takes as many of it as one asks for."""

    def __init__(self, name, module, function, **arguments):
        self.name = name
        self.seconds = []  # a step, the median of a round's
        self.megabytes = 0.0  # the process's peak so far
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, module, function, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            answer, self.detail = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{name} died while it was being built: its error is above") from None
        self.present = answer == "ready"

    def run(self, seconds):
        """Take steps for about `seconds`, at least three, and note the median."""
        steps = 3 if not self.seconds else max(3, round(seconds / self.seconds[-1]))
        self._connection.send(steps)
        try:
            median, self.megabytes = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} died at work: its error, if it had time for one, is above") from None
        self.seconds.append(median)

    def close(self):
        if self.present:
            self._connection.send(None)
        self._process.join(10)


class RemoteError(RuntimeError):
    """What another process was asked for failed there.

    kind: the name of its error's class, "absent" if a peer is not installed, "ended" if the process is gone; log: the
    end of what it has printed.
    """

    def __init__(self, kind, text, log=""):
        super().__init__(text)
        self.kind, self.log = kind, log


class Remote:
    """A process that has built `module`.`function`(**arguments), an object, and calls its methods when asked to.

    What fails there raises `RemoteError` here and ends that process, and no other. seconds: how long it may take to
    be built; then it is ended.
    """

    def __init__(self, module, function, *, seconds, **arguments):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        handle, self._log = tempfile.mkstemp(prefix="tinyvit-", suffix=".log")
        os.close(handle)
        given = theirs, self._log, module, function, arguments
        self._process = context.Process(target=_obey, args=given, daemon=True)
        self._process.start()
        theirs.close()
        self._answer("it was built", seconds)

    def call(self, method, *arguments, seconds):
        """Return what the object's method returns, within so many seconds, or raise `RemoteError`."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._failed("ended", f"the process is gone ({error})") from None
        return self._answer(f"at {method}", seconds)

    def _answer(self, when, seconds):
        try:
            if not self._connection.poll(max(0.0, seconds)):
                raise self._failed("ended", f"ended, as it took longer than {seconds:.3g} s {when}")
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
        self.close()
        return RemoteError(kind, text, "\n".join(printed.splitlines()[-25:]))

    def close(self):
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.join(10)
        self._connection.close()
        with contextlib.suppress(OSError):
            os.remove(self._log)


def _obey(connection, log, module, function, arguments):
    """Build an object and call its methods as they are asked for, until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which ends this one
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
                method, given = connection.recv()
                answer(getattr(built[0], method), *given)


def compare(contestants, rounds, seconds):
    """Let the contestants run in turns, every other round backwards; the first round warms up and is not kept."""
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
    """Return quartiles of how many times as long `slower` took as `faster`, round by round."""
    return quartiles([a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)])


def conditions(*packages):
    """Return what a measurement depends on: machine, versions, BLAS, and the settings of it in the environment."""
    from tinyvit.gpu import get_backend  # here, and so not in the memory of every contestant
    from tinyvit.training.results import versions

    found = versions(get_backend("cpu"))
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    prefixes = ("OPENBLAS_", "GOTO_", "OMP_", "MKL_", "BLIS_", "VECLIB_")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
    return found | {"environment": settings, "command": shlex.join(["python", *map(_shortened, sys.argv)])}


def _shortened(argument):
    """Return a path below the project as one from there, and anything else as it is."""
    try:
        return str(Path(argument).resolve().relative_to(ROOT)) if os.sep in argument else argument
    except ValueError:
        return Path(argument).name
