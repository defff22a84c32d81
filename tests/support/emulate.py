"""Runs the library's `.cu` files on the CPU: compiles them behind `emulate.h` and calls their kernels.

    Emulated(path).launch("layer_norm_forward", grid, block, [x, w, b, out, np.int32(rows)])

Arguments are checked against the kernel's own signature, which a GPU would not do: an array of the wrong type, a
number of the wrong size or one too few is a `TypeError`.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COMPILER = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
COMPILER = COMPILER if sys.platform == "linux" else None  # whose linker tells where a section begins and ends
NO_COMPILER = "emulating kernels needs g++ or clang++, on Linux"
CLANG = COMPILER is not None and "clang" in COMPILER
SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(([^)]*)\)')
TYPES = {
    "float": np.float32,
    "double": np.float64,
    "int": np.int32,
    "unsigned char": np.uint8,
    "word64": np.uint64,
}


class EmulationError(AssertionError):
    """The kernel did what it must not: a race, a place out of bounds, a barrier that not all threads reach."""


def signatures(text):
    """Return, for each kernel in `text`, the NumPy types of its parameters and whether each is a pointer."""
    found = {}
    for name, parameters in SIGNATURE.findall(re.sub(r"//[^\n]*", "", text)):
        types = []
        for parameter in " ".join(parameters.split()).split(", "):
            match = re.fullmatch(r"(?:const )?([\w ]+?)(\*)? (?:__restrict__ )?\w+", parameter)
            types.append((np.dtype(TYPES[match[1]]), match[2] is not None))
        found[name] = types
    return found


class Emulated:
    """The kernels of one file or text, compiled for the CPU.

    source: a path, or the text itself; options: as NVRTC takes them, of which -I and -D count; draft: compile
    quickly, without a look at warnings, which else are errors. It is compiled when a kernel is first launched: that
    raises `RuntimeError` with the compiler's words if it cannot be.
    """

    def __init__(self, source, options=(), draft=False):
        self.text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        folders = (f"-I{source.parent}",) if isinstance(source, Path) else ()
        self.options = (*folders, *(option for option in options if option[:2] in ("-I", "-D")))
        if not isinstance(source, Path):  # then no header is read, and a macro that is not in the text means nothing
            words = set(re.findall(r"\w+", self.text))
            self.options = tuple(x for x in self.options if x[:2] == "-I" or re.match(r"-D(\w+)", x)[1] in words)
        self.options += ("-w", "-O0") if draft else _WITH_WARNINGS
        self.signatures = signatures(self.text)
        if not self.signatures:
            raise RuntimeError("there is no kernel in this text")

    def check(self, name, arguments):
        """Raise `TypeError` unless the arguments are what the kernel's signature says."""
        self._pointers(name, arguments)

    def launch(self, name, grid, block, arguments, order=0):
        """Run one kernel; arrays are NumPy's, C-contiguous, and written in place. Raises `EmulationError`."""
        pointers = self._pointers(name, arguments)
        library = self._library()
        array = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
        three = ctypes.c_uint * 3
        error = library.emulate(name.encode(), three(*_three(grid)), three(*_three(block)), array, order)
        if error:
            raise EmulationError(f"{name}: {error.decode()}")

    def launch_checked(self, name, grid, block, arguments, sanitizer, order=0):
        """As `launch`, in a process of its own under "thread" or "address": races and wrong places raise as well.

        With None for a sanitizer it is just a process of its own, which may die; it has twenty seconds.
        """
        self._pointers(name, arguments)
        sanitize = (f"-fsanitize={sanitizer}",) if sanitizer else ()
        program = _compiled(self._source(main=True), (*self.options, *sanitize), "")
        call, memories = _call(name, grid, block, arguments, order)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "call"
            path.write_bytes(call)
            done = _run([program, path], sanitizer)
            if done.returncode:
                raise EmulationError(f"{name}: {done.stderr.strip()[:4000]} (exit code {done.returncode})")
            results = path.read_bytes()
        for memory in memories:
            memory[...] = np.frombuffer(results[: memory.nbytes], np.uint8)
            results = results[memory.nbytes :]

    def _pointers(self, name, arguments):
        if name not in self.signatures:
            raise EmulationError(f"there is no kernel {name!r} here, only {', '.join(self.signatures)}")
        types = self.signatures[name]
        if len(types) != len(arguments):
            raise TypeError(f"{name} takes {len(types)} arguments, not {len(arguments)}")
        pointers = []
        for place, (argument, (dtype, is_pointer)) in enumerate(zip(arguments, types, strict=True), 1):
            if not is_pointer:
                if not isinstance(argument, np.generic) or argument.dtype != dtype:
                    raise TypeError(f"{name}, argument {place}: a number of {dtype} is needed, not {argument!r}")
                pointers.append(np.ctypeslib.as_ctypes_type(dtype)(argument.item()))
                continue
            if isinstance(argument, np.uint64) and argument == 0:
                pointers.append(ctypes.c_void_p(0))
                continue
            if not isinstance(argument, np.ndarray) or argument.dtype != dtype:
                found = getattr(argument, "dtype", type(argument).__name__)
                raise TypeError(f"{name}, argument {place}: an array of {dtype} is needed, not {found}")
            if not argument.flags.c_contiguous:
                raise TypeError(f"{name}, argument {place}: the array must be C-contiguous")
            pointers.append(ctypes.c_void_p(argument.ctypes.data))
        return pointers

    @functools.cache  # noqa: B019 - an emulated file lives as long as the tests
    def _library(self):
        options = (*self.options, "-shared", "-fPIC")
        library = ctypes.CDLL(_compiled(self._source(main=False), options, ".so"))
        library.emulate.restype = ctypes.c_char_p
        return library

    def _source(self, main):
        before, *kernels = re.split(r'(?=extern "C" __global__)', self.text)  # each with its own shared memory
        named = zip(self.signatures, kernels, strict=True)
        text = before + "".join(text.replace("__shared__", f"EMULATED_SHARED({name})") for name, text in named)
        sections = "".join(f"EMULATED_SECTION({name})\n" for name in self.signatures)
        table = ",\n".join(f"EMULATED_KERNEL({name})" for name in self.signatures)
        table = f"static const std::map<std::string, emulated::Kernel> kernels = {{{table}}};\n"
        end = _MAIN if main else _LIBRARY
        header = '#include "emulate_main.h"\n' if main else ""
        return f'#include "emulate.h"\n{header}#line 1 "kernel.cu"\n{text}\n{sections}{table}{end}'


def _run(command, sanitizer):
    """Run a program that was compiled with a sanitizer, or with None."""
    environment = os.environ | {
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:history_size=0",
        "ASAN_OPTIONS": "exitcode=66:detect_stack_use_after_return=0:detect_leaks=0",
    }
    if sanitizer == "thread":
        command = [*_without_shuffled_addresses(), *command]
    timeout = None if sanitizer else 20
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"it ran for more than {timeout} seconds")


@functools.cache
def _without_shuffled_addresses():
    """What goes before a command to keep the thread sanitizer's places free; some systems forbid it."""
    prefix = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


@functools.cache
def why_not_under(sanitizer):
    """Return why not even an empty program runs under a sanitizer here, or None if one does."""
    try:
        program = _compiled("int main() { return 0; }", (f"-fsanitize={sanitizer}",), "")
    except RuntimeError as error:
        return str(error)
    done = _run([program], sanitizer)
    return f"no program runs under the {sanitizer} sanitizer here: {done.stderr[:500]}" if done.returncode else None


def preprocessed(text, options=()):
    """Return a text without comments, and of its branches those that the options and this emulation choose."""
    command = [COMPILER, "-E", "-P", "-x", "c++", "-DEMULATED", *(x for x in options if x[:2] == "-D"), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def variants(texts, options=(), draft=False):
    """Compile several forms of one text together, which takes less time than one by one.

    Returns the `Emulated`, and for each text a dict from the kernels' names to those that they have there.
    """
    whole, names = "", []
    for i, text in enumerate(texts):
        names.append({name: f"{name}_{i}" for name in signatures(text)})
        body = SIGNATURE.sub(lambda match, i=i: match[0].replace(f"{match[1]}(", f"{match[1]}_{i}(", 1), text)
        macros = "".join(f"#undef {name}\n" for name in re.findall(r"^#define (\w+)", text, re.MULTILINE))
        used = "".join(f"using variant_{i}::{name};\n" for name in names[-1].values())
        whole += f"namespace variant_{i} {{\n#line 1\n{body}\n{macros}}}\n{used}"
    return Emulated(whole, options, draft), names


def _call(name, grid, block, arguments, order):
    """Write a launch as `emulate_main.h` reads it; return it, and the memories it has, as arrays of bytes.

    Two views of one array are places in one memory, as they are on a GPU: a kernel may go from one to the other.
    """
    owners, entries = {}, b""
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            owner = owner_of(argument)
            owners.setdefault(id(owner), owner)
            place = list(owners).index(id(owner))
            start = argument.ctypes.data - owner.ctypes.data
            entries += struct.pack("=IQQ", 1, place, start)
        else:
            entries += struct.pack("=I16s", 0, argument.tobytes())  # the rest is zeros
    memories = [owner.reshape(-1).view(np.uint8) for owner in owners.values()]
    words = [*_three(grid), *_three(block), order, len(memories), len(arguments)]
    blocks = b"".join(struct.pack("=Q", memory.nbytes) + memory.tobytes() for memory in memories)
    return name.encode() + b"\n" + struct.pack("9I", *words) + blocks + entries, memories


def owner_of(array):
    """Return the array whose memory `array` is a view of, or itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


_MAIN = "int main(int, char** arguments) { return emulate_main(kernels, arguments[1]); }\n"
_LIBRARY = """
extern "C" const char* emulate(const char* name, const unsigned* grid, const unsigned* block, void** arguments,
                               unsigned order) {
    return emulated::launch(kernels.at(name), arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                            order);
}
"""


_WITH_WARNINGS = ("-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-ignored-attributes")


@functools.cache
def _folder():
    folder = tempfile.mkdtemp(prefix="emulated-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _compiled(source, options, suffix):
    """Compile a text, once a process, and return the path of what came of it."""
    if COMPILER is None:
        raise RuntimeError(NO_COMPILER)
    digest = hashlib.sha256(repr((source, options)).encode()).hexdigest()[:16]
    text, result = _folder() / f"{digest}.cpp", _folder() / f"{digest}{suffix or '.out'}"
    text.write_text(source, encoding="utf-8")
    if not CLANG:
        options = (*options, "-fno-gnu-unique")  # every library has an emulation of its own
    if "-fsanitize=address" in options and not CLANG:
        options = (*options, "-fsanitize-sections=emulated_shared_*")  # or it would not guard them
    # no fused multiply-add of its own choice: the same bits on every machine
    arithmetic = ["-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    command = [COMPILER, "-std=c++17", *arithmetic, f"-I{HERE}", *options]
    done = subprocess.run([*command, text, "-o", result], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile:\n{done.stderr[:6000]}")
    return result


def _three(size):
    size = tuple(size) if isinstance(size, tuple | list) else (size,)
    return (*size, 1, 1)[:3]
