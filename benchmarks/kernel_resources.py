"""What every CUDA kernel needs of a card: registers, shared memory, stack and spills, as the compiler reports them.

    python benchmarks/kernel_resources.py                          a table; compiles by NVRTC, needs no GPU
    python benchmarks/kernel_resources.py --json FILE              and keeps it

Compiled for the note's model and the compute capabilities 7.5, 8.0 and 9.0; TF32 and bfloat16 from 8.0 on.
"""

import argparse
import ctypes
import importlib.util
import itertools
import json
import re
from pathlib import Path

from tinyvit.kernels import launch
from tinyvit.model import ViTConfig

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
# what CuPy adds on its own is here too, so that this is what a card would run
OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?",
    re.DOTALL,
)


class CompilerMissing(RuntimeError):
    """There is no NVRTC to load."""


def nvrtc():
    """Return NVRTC's library, of the package nvidia-cuda-nvrtc. Raises `CompilerMissing` if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in spec.submodule_search_locations] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*"))
    if not found:
        raise CompilerMissing("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(str(found[-1]))


def compiled(text, *options):
    """Return the machine code of a CUDA text and the compiler's words; if there is none, `ValueError` has these."""
    library, program = nvrtc(), ctypes.c_void_p()
    failed = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    if failed:
        raise ValueError(f"NVRTC refuses the text: error {failed}")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), array)
        words = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode().rstrip("\0")
        if failed:
            raise ValueError(words)
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), words
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of, read, program):
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def compile_file(file, architecture, precision="float32", config=None):
    """Compile one `.cu` file as the library does; return the machine code and the compiler's words."""
    options = (*OPTIONS, f"--gpu-architecture={architecture}", *launch.macros(config or ViTConfig(), precision))
    return compiled(launch.source(file), *options)


def resources(file, architecture, precision="float32"):
    """Return, for each kernel of a file, what it needs: a dict."""
    _, words = compile_file(file, architecture, precision)
    names = ("stack", "spill_stores", "spill_loads", "registers", "shared")
    found = {}
    for kernel, *numbers in ENTRY.findall(words):
        found[kernel] = dict(zip(names, (int(number or 0) for number in numbers), strict=True))
    return found


def report():
    """Return the resources of all kernels: a list of dicts."""
    rows = []
    for file, architecture, precision in itertools.product(launch.FUNCTIONS, ARCHITECTURES, launch.PRECISIONS):
        if precision != "float32" and (architecture == "sm_75" or file != "linear"):
            continue
        for kernel, needs in resources(file, architecture, precision).items():
            rows.append({"kernel": kernel, "architecture": architecture, "precision": precision, **needs})
    return rows


def version():
    """Return NVRTC's version, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the report")
    options = parser.parse_args(arguments)
    try:
        rows = report()
    except CompilerMissing as error:
        parser.error(str(error))
    print(f"NVRTC {version()}; registers are of a thread, bytes of a block (shared) or of a thread (stack, spills)\n")
    print(f"{'kernel':22}{'card':8}{'precision':11}{'registers':>10}{'shared':>9}{'stack':>7}{'spilled':>9}")
    for row in rows:
        spilled = row["spill_stores"] + row["spill_loads"]
        print(
            f"{row['kernel']:22}{row['architecture']:8}{row['precision']:11}{row['registers']:10}{row['shared']:9}"
            f"{row['stack']:7}{spilled:9}"
        )
    if options.json:
        made_by = {"command": "python benchmarks/kernel_resources.py", "nvrtc": version()}
        record = made_by | {"model": ViTConfig().as_dict(), "kernels": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
