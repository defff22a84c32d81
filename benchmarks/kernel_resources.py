"""List the registers, shared memory, stack and spills of every kernel, and the blocks per multiprocessor.

    python benchmarks/kernel_resources.py                 the note's model, for every architecture and precision
    python benchmarks/kernel_resources.py --json FILE     also write the figures to FILE

This needs neither a GPU nor a driver. NVRTC from the package nvidia-cuda-nvrtc compiles for real architectures
(Linux). The figures come from the compiler. Only a GPU can measure their effect on time.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import re
from pathlib import Path

from turns import conditions

from tinyvit.kernels import launch
from tinyvit.model import ViTConfig

TARGETS = {  # the precisions of matrix products of each architecture
    "sm_75": ("float32",),
    "sm_80": ("float32", "tf32", "bfloat16"),
    "sm_90": ("float32", "tf32", "bfloat16"),
}
# Limits of one multiprocessor, from "Technical Specifications per Compute Capability", CUDA C++ Programming Guide.
REGISTERS = 64 * 1024
MOST_THREADS = {"sm_75": 1024, "sm_80": 2048, "sm_90": 2048}
MOST_BLOCKS = {"sm_75": 16, "sm_80": 32, "sm_90": 32}
SHARED_BYTES = {"sm_75": 64 * 1024, "sm_80": 164 * 1024, "sm_90": 228 * 1024}
RESERVED = {"sm_75": 0, "sm_80": 1024, "sm_90": 1024}  # bytes of shared memory per block that CUDA reserves


class CompilationError(Exception):
    """NVRTC could not compile a text. The message is its log."""


@functools.cache
def nvrtc():
    """Load NVRTC from its PyPI package. Raises `FileNotFoundError` if the package is not installed."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so*"))
    if not found:
        raise FileNotFoundError("NVRTC is not installed: pip install nvidia-cuda-nvrtc (Linux)")
    return ctypes.CDLL(str(found[-1]))


def compile_cubin(text, name, options):
    """Compile a CUDA text to machine code. Return the code and the log. Raises `CompilationError`."""
    return _compile(text, name, options, "CUBIN")


def compile_ptx(text, name, options):
    """Compile a CUDA text to PTX for a virtual architecture. Raises `CompilationError`."""
    return _compile(text, name, options, "PTX")[0].decode()


def _compile(text, name, options, form):
    library, program = nvrtc(), ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    if created:
        raise CompilationError(f"NVRTC does not start: error {created}")
    try:
        encoded = [option.encode() for option in options]
        failed = library.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        log = _fetch(library, program, "ProgramLog").decode().rstrip("\0")
        if failed:
            raise CompilationError(log)
        return _fetch(library, program, form), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(library, program, what):
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, content)
    return content.raw


def compile_file(file, architecture, precision="float32", config=None):
    """Compile `file`.cu as the library does, for one architecture. Return the machine code and the log."""
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += launch.macros(config or ViTConfig(), precision)
    return compile_cubin(launch.source(file), f"{file}.cu", options)


def threads_of(file):
    """Return the threads per block of every kernel in a file, a dict by name."""
    bounds = re.findall(r"__launch_bounds__\((\d+)\)\s+(\w+)\(", launch.source(file))
    return {name: int(threads) for threads, name in bounds}


def resources(log):
    """Return the figures of ptxas for every kernel in a log of NVRTC or nvcc, a dict by name."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        numbers = {
            "registers": r"Used (\d+) registers",
            "shared_bytes": r"(\d+) bytes smem",
            "stack_bytes": r"(\d+) bytes stack frame",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
        }
        matches = {key: re.search(pattern, text) for key, pattern in numbers.items()}
        found[name] = {key: int(match[1]) if match else 0 for key, match in matches.items()}
    return found


def blocks_a_multiprocessor(architecture, threads, registers, shared_bytes):
    """Return the number of blocks that fit a multiprocessor. A warp gets registers in units of 256."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (warps * -(-registers * 32 // 256) * 256)
    by_shared = SHARED_BYTES[architecture] // (shared_bytes + RESERVED[architecture] or 1)
    return min(by_registers, by_shared, MOST_THREADS[architecture] // threads, MOST_BLOCKS[architecture])


def survey(architectures=TARGETS):
    """Yield a record per kernel, architecture and precision. Kernels without matrix products have one precision."""
    for architecture in architectures:
        for file in launch.FUNCTIONS:
            has_products = "PRECISION" in launch.source(file)
            for precision in TARGETS[architecture] if has_products else ("float32",):
                _, log = compile_file(file, architecture, precision)
                for name, numbers in resources(log).items():
                    threads = threads_of(file)[name]
                    of_blocks = numbers["registers"], numbers["shared_bytes"]
                    record = {"kernel": name, "architecture": architecture, "precision": precision}
                    record |= {"threads": threads, **numbers}
                    yield record | {"blocks": blocks_a_multiprocessor(architecture, threads, *of_blocks)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    try:
        nvrtc()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    heads = ("arch", "precision", "kernel", "threads", "registers", "shared", "stack", "spilled", "blocks")
    form = "{:6} {:9} {:20} {:>7} {:>9} {:>7} {:>6} {:>7} {:>7}"
    print(form.format(*heads))
    records = []
    for record in survey():
        records.append(record)
        spilled = record["spill_stores"] + record["spill_loads"]
        columns = [record[key] for key in ("architecture", "precision", "kernel", "threads", "registers")]
        print(form.format(*columns, record["shared_bytes"], record["stack_bytes"], spilled, record["blocks"]))
    if options.json:
        found = {"conditions": conditions("nvidia-cuda-nvrtc"), "records": records}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
