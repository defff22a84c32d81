"""Explain in one line why a GPU does not compute, with what to type.

The text of CuPy's error shows the cause. The texts are those of CuPy 13 and 14 and of CUDA 12 and 13. This file never
imports CuPy: the caller passes the module.
"""

import contextlib
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

# All of these packages write into the same folder, `cupy`, so that only one of them can be installed.
PACKAGES = ("cupy", *(f"cupy-cuda{major}x" for major in range(11, 16)), "cupy-rocm-7-0", "cupy-rocm-7-1", "amd-cupy")
HOME = Path(__file__).resolve().parents[2]
CHECKOUT = HOME if (HOME / "setup.cfg").is_file() else None  # the checkout's folder, or None for an installed package
TOOLKIT = "Install the CUDA Toolkit that this CuPy was built for and set CUDA_PATH to its folder"
DRIVER = "pdate the driver from nvidia.com/drivers"  # follows "U" or "u"
OUT_OF_MEMORY = r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED|^\w*MemoryError"
OLD_DRIVER = "cudaError(InsufficientDriver|CallRequiresNewerDriver|UnsupportedPtxVersion)"

# A pattern, the fault of device 'gpu', and what to do. The first pattern applies that occurs in the text of the error
# or in the facts that `explain` appends to it.
CAUSES = (
    (OUT_OF_MEMORY, "has no memory left{memory}", "See with nvidia-smi which programs use it, and end them or wait"),
    ("^ImportError: both cupy", "needs one CuPy package: several overwrite each other's files", "{reinstall}"),
    ("^ImportError: not CuPy", "needs CuPy, but Python imports another module under that name",
     "Remove or rename it, then type {install}"),
    ("^ModuleNotFoundError.*<importing no package", "needs CuPy, which is not installed", "{reinstall}"),
    ("<cache", "needs a folder for CuPy's compiled kernels, and {cache!r} cannot be written",
     "Set the environment variable CUPY_CACHE_DIR to a folder that can be written"),
    (r"nvrtc\w*\.(so|dll)", "needs NVRTC, CUDA's compiler library, which CuPy cannot load", "{ctk}"),
    (r"cublas\w*\.(so|dll)", "needs cuBLAS, CUDA's library of matrix products, which CuPy cannot load", "{ctk}"),
    (r"cudart\w*\.(so|dll)", "needs CUDA's runtime library, which CuPy cannot load", "{ctk}"),
    ("find CUDA headers|(cannot|could not) open source file|auto-detect CUDA root directory",
     "needs CUDA's header files, which its compiler cannot find", "{ctk}"),
    ("<importing", "needs CuPy, which cannot be imported", "{reinstall}"),
    (f"{OLD_DRIVER}.*<driver none", "was not found, because no NVIDIA driver is installed",
     "Install one from nvidia.com/drivers; in a container, start it with 'docker run --gpus all'"),
    (f"{OLD_DRIVER}.*<driver 12.*<CUDA 1[3-9]",
     "needs a newer driver: this one supports CUDA up to {driver}, and CuPy was built for CUDA {built}",
     f"Type 'pip uninstall -y {{packages}}' and {{cuda12}}, or u{DRIVER} (CUDA 13 needs version 580 or newer)"),
    (OLD_DRIVER,
     "needs a newer driver: this one supports CUDA up to {driver}, and CuPy was built for CUDA {built}",
     f"U{DRIVER} (CUDA 13 needs version 580 or newer, CUDA 12 525)"),
    ("cudaErrorSystemDriverMismatch", "cannot be reached, because the parts of the NVIDIA driver differ in version",
     "Restart the machine, which is necessary after an update of the driver"),
    ("cudaError(NoDevice|InvalidDevice).*<hidden",
     "was not found, because the environment variable CUDA_VISIBLE_DEVICES is {visible!r}",
     "Type 'unset CUDA_VISIBLE_DEVICES', or set it to a number that 'nvidia-smi -L' shows"),
    ("cudaError(NoDevice|InvalidDevice)", "was not found: the NVIDIA driver sees no card",
     "List the cards with 'nvidia-smi -L'; in a container, start it with 'docker run --gpus all'"),
    ("cudaErrorDevicesUnavailable", "is busy: another program has reserved it",
     "See which with nvidia-smi, and end it or wait"),
    # CUDA 13 needs compute capability 7.5. CUDA 12 supports older cards.
    ("(--gpu-architecture|cudaErrorNoKernelImageForDevice).*<CUDA 1[3-9]",
     "is a card that CUDA {built} does not compile for",
     "Type 'pip uninstall -y {packages}' and {cuda12}, which may support it"),
    ("--gpu-architecture|cudaErrorNoKernelImageForDevice", "is a card that CUDA {built} does not compile for",
     "Type 'pip install --upgrade {packages}', which may support it"),
    ("^ArithmeticError", "computes wrong results", f"Restart the machine and u{DRIVER}"),
    ("", "was found but fails", "Check the driver with nvidia-smi, and everything with python -m tinyvit doctor"),
)  # fmt: skip


def explain(error: BaseException, cupy: Any = None) -> str:
    """Return the message for `error`, which the module `cupy` raised, or its import if `cupy` is None."""
    packages, (driver, built), memory = cupy_packages(), cuda_versions(cupy), ask(cupy, "memGetInfo")
    install = install_cupy()
    wheel = next((name for name in packages if name.startswith("cupy-cuda")), None)
    facts: dict[str, Any] = {
        "driver": driver,
        "built": built,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cache": os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")),
        "memory": ": {:,.0f} MB of {:,.0f} MB are free".format(*(x / 1e6 for x in memory)) if memory else "",
        "packages": " ".join(packages) or "cupy",
        "cuda12": pip_install("gpu-cuda12"),
        "install": install,
        "reinstall": f"Type 'pip uninstall -y {' '.join(packages)}', then {install}"
        if packages
        else f"Type {install}",
        "ctk": f"Type 'pip install --upgrade \"{wheel}[ctk]\"'" if wheel else TOOLKIT,
    }
    text = f"{type(error).__name__}: {error}\n<driver {driver}> <CUDA {built}>"
    text += f" <importing {' '.join(packages) or 'no package'}>" if cupy is None else ""
    text += " <hidden>" if facts["visible"] is not None else ""
    text += " <cache>" if _concerns_folder(error, facts["cache"]) else ""
    what, todo = next(cause[1:] for cause in CAUSES if re.search(cause[0], text, re.DOTALL))
    return f"device 'gpu' {what} ({{error}}). {todo}, or use --device cpu.".format(error=one_line(error), **facts)


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of tinyvit, from the checkout if the library is in one."""
    return f"'pip install -e \".[{extra}]\"'" if CHECKOUT else f"'pip install \"tinyvit[{extra}]\"'"


def install_cupy() -> str:
    """Return the commands that install CuPy, one for each version of CUDA."""
    cuda13, cuda12 = pip_install("gpu"), pip_install("gpu-cuda12")
    return f"{cuda13} if nvidia-smi shows CUDA 13 or newer, {cuda12} if it shows CUDA 12"


def cupy_packages() -> list[str]:
    """Return the names of the installed CuPy packages, a list with one element in a healthy environment."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.append(name)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, of any type that CuPy raises, means that the memory is exhausted."""
    return isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)) is not None


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return the type and the text of an exception on one line, cut after `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    return text if len(text) <= limit else text[:limit].rstrip() + "..."


def ask(cupy: Any, name: str) -> Any:
    """Return the result of a function of CUDA's runtime, or None if it is missing or fails."""
    try:
        return getattr(cupy.cuda.runtime, name)()
    except Exception:  # CUDA is often broken when this is called, and may raise any type of error
        return None


def cuda_versions(cupy: Any) -> tuple[str, ...]:
    """Return the newest CUDA that the driver supports and the CUDA of CuPy, such as "13.2", or "none" for each."""
    numbers = ask(cupy, "driverGetVersion"), ask(cupy, "runtimeGetVersion")
    return tuple(f"{number // 1000}.{number % 1000 // 10}" if number else "none" for number in numbers)


def _concerns_folder(error: BaseException, folder: str) -> bool:
    """Return whether a system error names a folder, one of its parents or a file in it."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return False
    return Path(error.filename).is_relative_to(folder) or Path(folder).is_relative_to(error.filename)
