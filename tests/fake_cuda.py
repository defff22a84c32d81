"""A fake of what CuPy tells of driver, card and libraries, around the strict stand-in for its arrays.

The names, types and texts of errors were taken down from CuPy 13.6 and 14.2 on machines without a driver, with and
without the extra `ctk`, and those of a driver from what CuPy's own exceptions say by their number.
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


class LazyCuda:
    """`cupy.cuda`, which loads cuBLAS when it is first asked for."""

    def __init__(self, cublas_error, **parts):
        self._cublas_error = cublas_error
        vars(self).update(parts)

    def __getattr__(self, name):  # for whatever it has not: the stand-in's own
        return getattr(strict_cupy.cupy.cuda, name)

    @property
    def cublas(self):
        if self._cublas_error:
            raise self._cublas_error
        return SimpleNamespace(getVersion=lambda handle: 130200)


def make(
    driver=13000, runtime=13020, capability=(9, 0), error=None, nvrtc_error=None, cublas_error=None, **functions
):
    """Return a module to stand for `cupy`.

    driver, runtime: the CUDA that the driver serves and that CuPy was built for, in CUDA's numbers; capability: of
    the card; error: what every computation raises, None if it computes; nvrtc_error, cublas_error: what loading
    either library raises; functions: what else to replace, by name.
    """

    def version():
        if nvrtc_error:
            raise nvrtc_error
        return 13, 2

    properties = {"name": b"NVIDIA Fake", "major": capability[0], "minor": capability[1]}
    module = ModuleType("cupy")
    vars(module).update(vars(strict_cupy.cupy))
    module.cuda = LazyCuda(
        cublas_error,
        get_current_stream=strict_cupy.cupy.cuda.get_current_stream,
        device=SimpleNamespace(get_cublas_handle=lambda: 1),
        nvrtc=SimpleNamespace(getVersion=version),
        runtime=SimpleNamespace(
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: runtime,
            getDevice=lambda: 0,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda device: properties,
            memGetInfo=lambda: (60_000_000_000, 80_000_000_000),
        ),
    )
    if error is not None:
        functions["ones"] = raising(error)
    vars(module).update(functions)
    return module
