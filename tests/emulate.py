"""Runs the library's `.cu` files on the CPU: compiles them behind `emulate.h` and calls their kernels.

    Emulated(path).launch("layer_norm_forward", grid, block, [x, w, b, out, np.int32(rows)])

Arguments are checked against the kernel's own signature, which a GPU would not do: an array of the wrong type, a
number of the wrong size or one too few is a `TypeError`.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COMPILER = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
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

    source: a path, or the text itself; options: as NVRTC takes them, of which -I and -D count. Raises `RuntimeError`
    with the compiler's words if it cannot be compiled.
    """

    def __init__(self, source, options=()):
        self.text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        folders = (f"-I{source.parent}",) if isinstance(source, Path) else ()
        self.options = (*folders, *(option for option in options if option[:2] in ("-I", "-D")))
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
        """As `launch`, in a process of its own under "thread" or "address": races and wrong places raise as well."""
        self._pointers(name, arguments)
        program = _compiled(self._source(main=True), (*self.options, f"-fsanitize={sanitizer}"), "")
        words = [*_three(grid), *_three(block), order, len(arguments)]
        call = name.encode() + b"\n" + struct.pack("8I", *words)
        for argument in arguments:
            data = argument.tobytes()
            call += struct.pack("=IQ", isinstance(argument, np.ndarray), len(data)) + data
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "call"
            path.write_bytes(call)
            # threads of the emulation live at fixed places of an address space that must not be shuffled
            prefix = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
            environment = os.environ | {
                "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
                "ASAN_OPTIONS": "exitcode=66:detect_stack_use_after_return=0:detect_leaks=0",
            }
            done = subprocess.run([*prefix, program, path], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise EmulationError(f"{name}: {done.stderr.strip()[:4000]} (exit code {done.returncode})")
            results = path.read_bytes()
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                argument[...] = np.frombuffer(results[: argument.nbytes], argument.dtype).reshape(argument.shape)
                results = results[argument.nbytes :]

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
        table = "".join(f'{{"{kernel}", emulated::unpacked({kernel})}},\n' for kernel in self.signatures)
        kernels = f"static const std::map<std::string, emulated::Launcher> kernels = {{{table}}};\n"
        end = _MAIN if main else _LIBRARY
        header = '#include "emulate_main.h"\n' if main else ""
        return f'#include "emulate.h"\n{header}#line 1 "kernel.cu"\n{self.text}\n{kernels}{end}'


_MAIN = "int main(int, char** arguments) { return emulate_main(kernels, arguments[1]); }\n"
_LIBRARY = """
extern "C" const char* emulate(const char* name, const unsigned* grid, const unsigned* block, void** arguments,
                               unsigned order) {
    auto kernel = kernels.at(name);
    return emulated::launch([=] { kernel(arguments); }, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                            order);
}
"""


@functools.cache
def _folder():
    return Path(tempfile.mkdtemp(prefix="emulated-kernels-"))


@functools.cache
def _compiled(source, options, suffix):
    """Compile a text, once a process, and return the path of what came of it."""
    if COMPILER is None:
        raise RuntimeError("emulating kernels needs a C++ compiler: g++ or clang++")
    digest = hashlib.sha256(repr((source, options)).encode()).hexdigest()[:16]
    text, result = _folder() / f"{digest}.cpp", _folder() / f"{digest}{suffix or '.out'}"
    text.write_text(source, encoding="utf-8")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-ignored-attributes"]
    if "-fsanitize=address" in options and COMPILER == "g++":
        options = (*options, "-fsanitize-sections=emulated_shared")  # or it would not guard the ends of shared arrays
    # no fused multiply-add of its own choice: the same bits on every machine
    arithmetic = ["-ffp-contract=off", "-fno-strict-aliasing"]
    command = [COMPILER, "-std=c++17", "-O1", "-g1", *arithmetic, *warnings, f"-I{HERE}", *options]
    done = subprocess.run([*command, text, "-o", result], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile:\n{done.stderr[:6000]}")
    return result


def _three(size):
    size = tuple(size) if isinstance(size, tuple | list) else (size,)
    return (*size, 1, 1)[:3]
