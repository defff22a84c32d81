"""A fake of what CuPy reports about driver, card and libraries, around the strict stand-in for its arrays.

The names, types and texts of errors were recorded from CuPy 13.6 and 14.2 on machines without a driver, with and
without the extra `ctk`. The driver's errors are the texts that CuPy's own exceptions give for their numbers.
"""

from types import ModuleType, SimpleNamespace

import strict_cupy


class CUDARuntimeError(RuntimeError):
    pass


class CUBLASError(RuntimeError):
    pass


class CompileException(Exception):
    pass


class DynamicLibNotFoundError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    def __init__(self, size=100, total=200):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


TOO_OLD = CUDARuntimeError(
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_DEVICE = CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
NO_NVRTC = DynamicLibNotFoundError(
    'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13 or libnvrtc.so.12, '
    "No such file: libnvrtc.so.13 or libnvrtc.so.12\n"
)
NO_NVRTC_13 = RuntimeError(
    "CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: cannot open shared object file: "
    "No such file or directory"
)
NO_NVRTC_WINDOWS = RuntimeError(
    "CuPy failed to load nvrtc64_120_0.dll: FileNotFoundError: Could not find module 'nvrtc64_120_0.dll' "
    "(or one of its dependencies). Try using the full path with constructor syntax."
)
NO_CUBLAS = ImportError(
    'Failure finding "libcublasLt.so.13 or libcublasLt.so.12": No such file: libcublasLt.so.13 or libcublasLt.so.12\n'
)
NO_CUBLAS_13 = ImportError("libcublas.so.12: cannot open shared object file: No such file or directory")
NO_HEADERS = CompileException(
    'x.cu(1): catastrophic error: could not open source file "cuda_fp16.h" (no directories in search list)\n'
    "  #include <cuda_fp16.h>\n                        ^\n\n1 catastrophic error detected in the compilation of "
    '"x.cu".\nCompilation terminated.\n'
)
NO_HEADERS_12 = CompileException('vector_types.h(1): catastrophic error: cannot open source file "vector_types.h"\n')
NO_HEADERS_14 = RuntimeError(
    "Failed to find CUDA headers. Please install CUDA toolkit headers (e.g., pip install cupy-cuda12x[ctk]) or "
    "specify CUDA_PATH environment variable."
)
NO_CUDA_ROOT = RuntimeError(
    "Failed to auto-detect CUDA root directory. Please specify `CUDA_PATH` environment variable if you are using "
    "CUDA versions not yet supported by CuPy."
)
UNKNOWN_CARD = CompileException("nvrtc: error: invalid value for --gpu-architecture (-arch)\n")
NO_CUBLAS_START = CUBLASError("CUBLAS_STATUS_NOT_INITIALIZED")


def raising(error):
    """Return a function that raises `error` whatever it is given."""

    def function(*args, **kwargs):
        raise error

    return function


def make(driver=13000, runtime=13020, capability=(9, 0), error=None, **functions):
    """Return a module that stands for `cupy`.

    driver, runtime: the CUDA that the driver supports and that CuPy was built for, as CUDA's numbers; capability: of
    the card; error: what every computation raises, or None if it computes; functions: other replacements, by name.
    """
    properties = {"name": b"NVIDIA Fake", "major": capability[0], "minor": capability[1]}
    module = ModuleType("cupy")
    vars(module).update(vars(strict_cupy.cupy))
    module.cuda = SimpleNamespace(**vars(strict_cupy.cupy.cuda))
    vars(module.cuda).update(
        device=SimpleNamespace(get_cublas_handle=lambda: 1),
        cublas=SimpleNamespace(getVersion=lambda handle: 130200),
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 2)),
        runtime=SimpleNamespace(
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: runtime,
            getDevice=lambda: 0,
            getDeviceProperties=lambda device: properties,
            memGetInfo=lambda: (60_000_000_000, 80_000_000_000),
        ),
    )
    if error is not None:
        functions["ones"] = raising(error)
    vars(module).update(functions)
    return module
