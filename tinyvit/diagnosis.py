"""Why a GPU does not compute, in one line: what is wrong, and what to type. It knows CuPy's errors by their texts.

The texts are those of CuPy 13 and 14 and of CUDA 12 and 13. CuPy itself is not imported here: who asks hands it in.
"""

import importlib.metadata
import os
import re

# At most one of these can be installed: all of them put their files into the same folder, `cupy`.
PACKAGES = ("cupy", *(f"cupy-cuda{major}x" for major in range(11, 16)), "cupy-rocm-7-0", "cupy-rocm-7-1", "amd-cupy")
INSTALL = (
    "'pip install -e \".[gpu]\"' if nvidia-smi shows CUDA 13 or newer, "
    "'pip install -e \".[gpu-cuda12]\"' if it shows CUDA 12"
)

# What CUDA says by the name of an error: what is wrong with device 'gpu', and what to do
CUDA_ERRORS = {
    "cudaErrorSystemDriverMismatch": (
        "cannot be reached, as the two halves of the NVIDIA driver are of different versions",
        "Restart the machine, as an update of the driver needs",
    ),
    "cudaErrorCompatNotSupportedOnDevice": (
        "cannot be reached through CUDA's package for forward compatibility, which is not for this card",
        "Take its folder 'compat' out of LD_LIBRARY_PATH (echo $LD_LIBRARY_PATH), or update the driver",
    ),
    "cudaErrorStubLibrary": (
        "cannot be reached, as a stub of libcuda is found before the driver's own",
        "Take the folder 'stubs' out of LD_LIBRARY_PATH (echo $LD_LIBRARY_PATH)",
    ),
    "cudaErrorDevicesUnavailable": (
        "is taken by another program, which holds it alone",
        "See which with nvidia-smi, and end it or wait",
    ),
    "cudaErrorUnsupportedPtxVersion": (
        "needs a newer driver for what its compiler makes",
        "Update the driver from nvidia.com/drivers",
    ),
}


def cupy_packages():
    """Return the names of the CuPy packages that are installed, a list: one, if all is well."""
    found = []
    for name in PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def two_packages(packages):
    """Return the message for several of CuPy's packages in one environment."""
    names = ", ".join(packages)
    return _message(
        f"cannot be used with {len(packages)} CuPy packages, which overwrite each other's files: {names}",
        f"Type 'pip uninstall -y {' '.join(packages)}', then {INSTALL}",
    )


def not_importable(error, packages):
    """Return the message for an `import cupy` that raised `error`, with these packages installed."""
    if packages:
        return _message(
            f"needs CuPy, which is installed as {packages[0]} but cannot be imported ({one_line(error)})",
            f"Type 'pip uninstall -y {packages[0]}', then {INSTALL}",
        )
    if isinstance(error, ModuleNotFoundError):
        return _message("needs CuPy, which is not installed", f"Type {INSTALL}")
    return _message(f"needs CuPy, which cannot be imported ({one_line(error)})", f"Type {INSTALL}")


def not_cupy(module):
    """Return the message for an `import cupy` that gave a module which is something else."""
    place = getattr(module, "__file__", None) or ", ".join(getattr(module, "__path__", ["?"]))
    return _message(
        f"needs CuPy, but what Python imports under its name is another: {place}",
        f"Remove or rename that, then type {INSTALL}",
    )


def wrong_result(expected, found):
    """Return the message for a GPU that computed `found` for `expected`."""
    return _message(
        f"computes wrong results: {found:.6g} where {expected:.6g} is right",
        "Restart the machine and update the driver from nvidia.com/drivers",
    )


def explain(error, cupy):
    """Return the message for `error`, an exception of `cupy`, CuPy's module, at its first computation."""
    what, todo = _cause(f"{type(error).__name__}: {error}", cupy)
    if is_out_of_memory(error):
        free, total = _call(cupy, "cuda.runtime.memGetInfo") or (0, 0)
        room = f": {free / 1e6:,.0f} MB of {total / 1e6:,.0f} MB are free" if total else ""
        what, todo = f"has no memory left{room}", "See with nvidia-smi which programs hold it, and end them or wait"
    return _message(f"{what} ({one_line(error)})", todo)


def is_out_of_memory(error):
    """Return whether an exception says, in any of the ways CuPy knows, that there is not enough memory."""
    texts = r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(texts, str(error)) is not None


def one_line(error, limit=160):
    """Return an exception's type and text on one line, cut to `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    return text if len(text) <= limit else text[:limit].rstrip() + "..."


def cuda_version(number):
    """Return CUDA's version as people write it, for the number in which CUDA says it: "13.2" for 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version(cupy):
    """Return the newest CUDA that the driver serves, as CUDA's number: 12040 for 12.4; 0 if there is no driver."""
    return _call(cupy, "cuda.runtime.driverGetVersion") or 0


def runtime_version(cupy):
    """Return the CUDA that CuPy was built for, as CUDA's number; 0 if it does not say."""
    return _call(cupy, "cuda.runtime.runtimeGetVersion") or 0


def ctk_command():
    """Return what to type to get CUDA's own libraries and headers for the CuPy that is installed."""
    wheels = [name for name in cupy_packages() if name.startswith("cupy-cuda")]
    if wheels:
        return f"Type 'pip install --upgrade \"{wheels[0]}[ctk]\"'"
    return "Install the CUDA Toolkit that this CuPy was built for and set CUDA_PATH to its folder"


def _cause(text, cupy):
    """Return what is wrong with device 'gpu' and what to do about it, for an error of type and text `text`."""
    if "cudaErrorInsufficientDriver" in text or "cudaErrorCallRequiresNewerDriver" in text:
        return _driver(cupy)
    if "cudaErrorNoDevice" in text or "cudaErrorInvalidDevice" in text:
        return _no_device()
    if _names(text, "nvrtc"):
        return "needs NVRTC, CUDA's compiler library, which CuPy cannot load", ctk_command()
    if _names(text, "cublas"):
        return "needs cuBLAS, CUDA's library of matrix products, which CuPy cannot load", ctk_command()
    if _names(text, "cudart"):
        return "needs CUDA's runtime library, which CuPy cannot load", ctk_command()
    if re.search(r"(cannot|could not) open source file|auto-detect CUDA root directory", text):
        return "needs CUDA's header files, which its compiler cannot find", ctk_command()
    if "invalid value for --gpu-architecture" in text or "cudaErrorNoKernelImageForDevice" in text:
        return _unknown_card(cupy)
    if "CUBLAS_STATUS_NOT_INITIALIZED" in text:
        return "cannot start cuBLAS, mostly for want of memory", "See with nvidia-smi what holds the card's memory"
    for name, known in CUDA_ERRORS.items():
        if name in text:
            return known
    return "was found but fails", "Check the driver with nvidia-smi, and all with python -m tinyvit doctor"


def _driver(cupy):
    serves, built = driver_version(cupy), runtime_version(cupy)
    if serves == 0:
        return (
            "was not found, as no NVIDIA driver is installed",
            "Install one from nvidia.com/drivers; in a container, start it with 'docker run --gpus all'",
        )
    what = f"needs a newer driver: this one serves CUDA up to {cuda_version(serves)}, and CuPy was built for CUDA "
    what += cuda_version(built)
    update = "update the driver from nvidia.com/drivers (CUDA 13 needs version 580 or newer, CUDA 12 525)"
    if serves >= 12000 and built >= 13000:
        packages = " ".join(cupy_packages() or ["cupy"])
        return what, f"Type 'pip uninstall -y {packages}' and 'pip install -e \".[gpu-cuda12]\"', or {update}"
    return what, update[0].upper() + update[1:]


def _no_device():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return (
            f"was not found, as the environment variable CUDA_VISIBLE_DEVICES is {visible!r} and leaves none",
            "Type 'unset CUDA_VISIBLE_DEVICES', or set it to a number that 'nvidia-smi -L' shows",
        )
    return (
        "was not found, as the NVIDIA driver sees no card",
        "See with 'nvidia-smi -L' which there are; in a container, start it with 'docker run --gpus all'",
    )


def _unknown_card(cupy):
    what = f"is a card that CUDA {cuda_version(runtime_version(cupy))} does not compile for"
    packages = " ".join(cupy_packages() or ["cupy"])
    if runtime_version(cupy) >= 13000:  # which needs compute capability 7.5: CUDA 12 knows older cards too
        return what, f"Type 'pip uninstall -y {packages}' and 'pip install -e \".[gpu-cuda12]\"', which may know it"
    return what, f"Type 'pip install --upgrade {packages}', which may know it"


def _names(text, library):
    """Return whether a text says that a library, or what it stands on, cannot be loaded: on Linux or Windows."""
    missing = r"Failure finding|cannot open shared object|failed to load|Could not find module|not found|No such file"
    return re.search(rf"{library}\w*\.(so|dll)", text) and re.search(missing, text)


def _call(cupy, path):
    """Return what a function of CuPy returns, or None if it is not there or fails."""
    try:
        function = cupy
        for name in path.split("."):
            function = getattr(function, name)
        return function()
    except Exception:  # whatever it is: this is asked when all is broken already
        return None


def _message(what, todo):
    return f"device 'gpu' {what}. {todo}, or use --device cpu."
