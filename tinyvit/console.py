"""The process of the command `tinyvit`: standard streams that work, and an answer to Ctrl-C at any moment.

`tinyvit/__init__.py` imports this file first. In a process that was started as the command, `take_over` runs at once,
since the other imports take most of a second. In any other program, nothing happens.
"""

import _thread
import atexit
import contextlib
import mmap
import os
import signal
import sys
import time
from types import SimpleNamespace

# Megabytes of address space, without which libraries fail or hang while they are imported.
NEEDED_MEGABYTES = {"train": 700, "evaluate": 700, "doctor": 700, "predict": 350, "serve": 350}

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_process = SimpleNamespace(
    taken_over=False, raising=False, received=None, repeating=False, status=None, limited=False
)


def take_over():
    """Prepare the standard streams and the signals of this process for a command."""
    if _process.taken_over:
        return
    _process.taken_over = True
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell lets a program in the background ignore Ctrl-C
            signal.signal(number, _on_signal)
    sys.unraisablehook = _on_unraisable
    open_standard_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  open until the process ends
        else:
            stream.reconfigure(errors="backslashreplace")  # the terminal may lack characters of a path
    atexit.register(_end)  # called last, because it is registered first
    _require_memory(sys.argv[1] if len(sys.argv) > 1 else "")


def _require_memory(command):
    """End the process with one line if the memory that it may use is too small for the command."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    needed = NEEDED_MEGABYTES.get(command, 250)
    for kind, letter, share in ((resource.RLIMIT_AS, "v", 1.0), (resource.RLIMIT_DATA, "d", 0.5)):
        limit, _ = resource.getrlimit(kind)
        if limit == resource.RLIM_INFINITY:
            continue
        _process.limited = True
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each thread reserves memory, and no command uses them
        if limit < share * needed * 1e6:
            needs = f"tinyvit {command} needs about {share * needed:.0f} MB".replace("  ", " ")
            todo = f"type ulimit -{letter} unlimited, or start it where more memory is allowed"
            text = f"error: not enough memory: {needs}, and ulimit -{letter} allows {limit / 1e6:.0f} MB: {todo}"
            print(text, file=sys.stderr, flush=True)
            os._exit(1)


def memory_is_limited():
    """Return whether a command runs under `ulimit -v` or `ulimit -d`."""
    return _process.limited


def require_memory(size):
    """Raise `MemoryError` unless a command may allocate `size` more bytes.

    Without a limit, this does nothing: the system then ends a process that takes too much, and no error is raised.
    """
    if _process.limited:
        try:
            mmap.mmap(-1, int(size)).close()
        except (OSError, OverflowError) as error:
            text = f"it needs about {size / 1e6:.0f} MB more, and ulimit allows less"
            raise MemoryError(text) from error


def open_standard_descriptors():
    """Open the null device under those of the descriptors 0 to 2 that are closed, and return these descriptors.

    Otherwise the next file or pipe gets such a number, and other programs and libraries write into it.
    """
    opened = []
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number
        os.set_inheritable(descriptor, True)
        opened.append(descriptor)
    os.close(descriptor)
    return opened


def _on_signal(number, frame):
    second = _process.received is not None and not _process.repeating
    _process.received, _process.repeating = number, False
    if _process.raising and not second:
        raise KeyboardInterrupt
    _leave(number)


def _on_unraisable(unraisable):
    """Repeat a signal whose exception was raised where Python ignores exceptions, as in a destructor."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = _process.received or signal.SIGINT
    if not _process.raising:
        _leave(number)
    _process.repeating = True
    _thread.start_new_thread(_repeat, (number,))  # takes no lock, which the interrupted code might hold


def _repeat(number):
    time.sleep(0.01)
    if _process.repeating:
        os.kill(os.getpid(), number)


def _leave(number):
    """End the process at once. An exception could be lost in an import, or leave a traceback there."""
    with contextlib.suppress(Exception):  # the signal may have come while the stream was in use
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, _WORDS[number].encode() + b"\n")
    os._exit(128 + number)


@contextlib.contextmanager
def cleanup_after_signals():
    """Let Ctrl-C and SIGTERM of a command raise `KeyboardInterrupt`, so that files and processes are cleaned up.

    Outside the context they end a command at once.
    """
    _process.raising = _process.taken_over
    try:
        yield
    finally:
        _process.raising = _process.repeating = False
        if _process.received is not None:  # a library may have replaced the exception or ignored it
            raise KeyboardInterrupt


def interruption():
    """Return the word for the cause of a `KeyboardInterrupt` and the exit status: 143 for SIGTERM, otherwise 130."""
    number = _process.received or signal.SIGINT
    return _WORDS[number], 128 + number


def end_with(status):
    """Set the exit status of this process, and return it. Until the process ends, Ctrl-C still changes it."""
    _process.status = status
    return status


def _end():
    """End the process without the rest of Python's own ending, in which a signal has no handler."""
    if _process.status is None:  # an unexpected error, whose traceback Python prints
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_process.status)


_program = os.path.basename((sys.argv or [""])[0]).removesuffix(".exe")
# While `python -m tinyvit` imports the package, the name of the program is "-m".
if _program == "tinyvit" or (_program == "-m" and {"tinyvit", "-mtinyvit"} & set(sys.orig_argv)):
    take_over()
