"""Every cause for which a GPU does not compute gets its own line, which says what is wrong and what to type."""

import os
import re
import subprocess
import sys
import warnings
from types import ModuleType

import fake_cuda
import pytest
import strict_cupy
from fake_cuda import CUBLASError, CUDARuntimeError, OutOfMemoryError

from tinyvit.gpu import CuPyMissing, DeviceError, diagnosis, get_backend, import_cupy
from tinyvit.gpu.diagnosis import cuda_versions, cupy_packages, explain, is_out_of_memory, one_line


@pytest.fixture
def installed(monkeypatch):
    """Return a function that makes these packages the ones of CuPy that are installed."""

    def install(*names):
        def version(name):
            if name in names:
                return "14.2.0"
            raise diagnosis.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr("importlib.metadata.version", version)

    install("cupy-cuda13x")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def message(monkeypatch, **fake):
    """What `--device gpu` says with such a fake of CuPy."""
    for name, module in strict_cupy.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupy", fake_cuda.make(**fake))
    with pytest.raises(DeviceError) as caught:
        get_backend("gpu")
    text = str(caught.value)
    assert text.startswith("device 'gpu' ")
    assert text.endswith(", or use --device cpu.")
    assert "\n" not in text
    assert len(text) < 500
    return text


CTK = "Type 'pip install --upgrade \"cupy-cuda13x[ctk]\"'"  # CuPy's own libraries of CUDA
CAUSES = {
    "no driver": (
        {"error": fake_cuda.TOO_OLD, "driver": 0},
        "was not found, because no NVIDIA driver is installed",
        "Install one from nvidia.com/drivers; in a container, start it with 'docker run --gpus all'",
    ),
    "a driver of CUDA 12 for CuPy of CUDA 13": (
        {"error": fake_cuda.TOO_OLD, "driver": 12040},
        "needs a newer driver: this one supports CUDA up to 12.4, and CuPy was built for CUDA 13.2",
        "Type 'pip uninstall -y cupy-cuda13x' and 'pip install -e \".[gpu-cuda12]\"', or update the driver",
    ),
    "a driver of CUDA 11": (
        {"error": fake_cuda.TOO_OLD, "driver": 11080, "runtime": 12090},
        "this one supports CUDA up to 11.8, and CuPy was built for CUDA 12.9",
        "Update the driver from nvidia.com/drivers (CUDA 13 needs version 580 or newer, CUDA 12 525)",
    ),
    "no card": ({"error": fake_cuda.NO_DEVICE}, "the NVIDIA driver sees no card", "with 'nvidia-smi -L'"),
    "an updated driver before the restart": (
        {"error": CUDARuntimeError("cudaErrorSystemDriverMismatch: system has unsupported display driver")},
        "the parts of the NVIDIA driver differ in version",
        "Restart the machine",
    ),
    "a card that another program holds": (
        {"error": CUDARuntimeError("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable")},
        "another program has reserved it",
        "nvidia-smi",
    ),
    "a compiler newer than the driver": (
        {"error": CUDARuntimeError("cudaErrorUnsupportedPtxVersion: the provided PTX was compiled with an")},
        "this one supports CUDA up to 13.0, and CuPy was built for CUDA 13.2",
        "Update the driver",
    ),
    **{
        name: ({"error": error}, "needs NVRTC, CUDA's compiler library", CTK)
        for name, error in {
            "no compiler": fake_cuda.NO_NVRTC,
            "no compiler, CuPy 13": fake_cuda.NO_NVRTC_13,
            "no compiler, Windows": fake_cuda.NO_NVRTC_WINDOWS,
        }.items()
    },
    **{
        name: ({"error": error}, "needs cuBLAS, CUDA's library of matrix", CTK)
        for name, error in {"no cuBLAS": fake_cuda.NO_CUBLAS, "no cuBLAS, CuPy 13": fake_cuda.NO_CUBLAS_13}.items()
    },
    **{
        name: ({"error": error}, "needs CUDA's header files", CTK)
        for name, error in {
            "no headers": fake_cuda.NO_HEADERS,
            "no headers, CUDA 12": fake_cuda.NO_HEADERS_12,
            "no headers, CuPy 14": fake_cuda.NO_HEADERS_14,
            "no CUDA": fake_cuda.NO_CUDA_ROOT,
        }.items()
    },
    "no runtime library": (
        {"error": ImportError("libcudart.so.13: cannot open shared object file: No such file or directory")},
        "needs CUDA's runtime library",
        "Type 'pip install --upgrade \"cupy-cuda13x[ctk]\"'",
    ),
    "a card that is too old for CUDA 13": (
        {"error": fake_cuda.UNKNOWN_CARD, "capability": (6, 1)},
        "is a card that CUDA 13.2 does not compile for",
        "Type 'pip uninstall -y cupy-cuda13x' and 'pip install -e \".[gpu-cuda12]\"'",
    ),
    "a card that is too new": (
        {"error": CUDARuntimeError("cudaErrorNoKernelImageForDevice: no kernel image is"), "runtime": 12000},
        "is a card that CUDA 12.0 does not compile for",
        "Type 'pip install --upgrade cupy-cuda13x'",
    ),
    "no memory": (
        {"error": OutOfMemoryError()},
        "has no memory left: 60,000 MB of 80,000 MB are free (OutOfMemoryError: Out of memory allocating 100 bytes",
        "See with nvidia-smi which programs use it",
    ),
    "no memory, by CUDA's own name": (
        {"error": CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")},
        "has no memory left",
        "nvidia-smi",
    ),
    **{
        f"rare: {error}": ({"error": error}, f"was found but fails ({one_line(error)})", "python -m tinyvit doctor")
        for error in (
            CUDARuntimeError("cudaErrorUnknown: unknown error"),
            CUDARuntimeError("cudaErrorStubLibrary: CUDA driver is a stub library"),
            CUDARuntimeError("cudaErrorCompatNotSupportedOnDevice: forward compatibility was attempted on"),
            fake_cuda.NO_CUBLAS_START,
        )
    },
    "a text without end": ({"error": RuntimeError("word\n" * 10_000)}, "RuntimeError: word word", "doctor"),
    "an error with no text": ({"error": KeyError()}, "(KeyError)", "doctor"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_says_what_is_wrong_and_what_to_type(installed, monkeypatch, cause):
    fake, what, todo = CAUSES[cause]
    text = message(monkeypatch, **fake)
    assert what in text
    assert todo in text
    assert f"({type(fake['error']).__name__}" in text  # so that a search engine finds it


def test_no_two_causes_share_their_words():
    own = {re.sub(r"[\d.]+", "N", what) for _, what, _ in CAUSES.values()}
    assert len(own) >= 15


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_a_card_that_is_hidden(installed, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    text = message(monkeypatch, error=fake_cuda.NO_DEVICE)
    assert f"CUDA_VISIBLE_DEVICES is {value!r}" in text
    assert "unset CUDA_VISIBLE_DEVICES" in text


def test_the_command_names_the_package_that_is_installed(installed, monkeypatch):
    installed("cupy-cuda12x")
    assert "pip install --upgrade \"cupy-cuda12x[ctk]\"'" in message(monkeypatch, error=fake_cuda.NO_NVRTC)
    installed("cupy")  # built from source, or by conda: it has no such extra
    assert "Install the CUDA Toolkit" in message(monkeypatch, error=fake_cuda.NO_NVRTC)


def test_a_product_that_fails_where_a_kernel_works(installed, monkeypatch):
    class Sum:
        __matmul__ = fake_cuda.raising(fake_cuda.NO_CUBLAS)

    assert "needs cuBLAS" in message(monkeypatch, ones=lambda shape, dtype: Sum())


def test_what_cupy_does_not_tell_is_left_out(installed, monkeypatch):
    text = message(monkeypatch, error=OutOfMemoryError(), cuda=None)
    assert "has no memory left (OutOfMemoryError" in text
    assert "no NVIDIA driver" in message(monkeypatch, error=fake_cuda.TOO_OLD, cuda=None)


# what comes before a computation


def test_two_packages(installed, monkeypatch, caplog):
    installed("cupy-cuda12x", "cupy-cuda13x")
    text = message(monkeypatch)  # it would compute
    assert "needs one CuPy package: several overwrite each other's files" in text
    assert "both cupy-cuda12x and cupy-cuda13x are installed" in text
    assert "Type 'pip uninstall -y cupy-cuda12x cupy-cuda13x', then 'pip install -e" in text
    assert get_backend("auto").device == "cpu"
    assert caplog.messages == [f"note: the CPU computes, because {text}"]


def test_cupy_is_found_by_its_package():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "PACKAGES", ("numpy", "no-such-package", "pytest"))
        assert cupy_packages() == ["numpy", "pytest"]


def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ModuleNotFoundError


def test_cupy_that_is_not_installed(installed, monkeypatch):
    installed()
    absent(monkeypatch)
    expected = r"needs CuPy, which is not installed \(.*\)\. Type 'pip install -e"
    with pytest.raises(CuPyMissing, match=expected) as caught:
        import_cupy()
    assert '".[gpu-cuda12]"\' if it shows CUDA 12' in str(caught.value)


def test_an_installed_package_and_a_checkout_install_cupy_in_their_own_way(installed, monkeypatch):
    too_old = explain(fake_cuda.TOO_OLD, fake_cuda.make(driver=12040))
    assert "'pip install -e \".[gpu-cuda12]\"'" in too_old
    monkeypatch.setattr(diagnosis, "CHECKOUT", None)
    assert too_old.replace('-e ".[gpu-cuda12]"', '"tinyvit[gpu-cuda12]"') == explain(
        fake_cuda.TOO_OLD, fake_cuda.make(driver=12040)
    )
    installed()
    text = explain(ModuleNotFoundError("No module named 'cupy'"))
    assert "Type 'pip install \"tinyvit[gpu]\"' if nvidia-smi shows CUDA 13 or newer, " in text
    assert "'pip install \"tinyvit[gpu-cuda12]\"' if it shows CUDA 12" in text


def test_cupy_whose_files_are_gone(installed, monkeypatch, caplog):
    absent(monkeypatch)
    with pytest.raises(DeviceError, match="needs CuPy, which cannot be imported") as caught:
        import_cupy()
    assert not isinstance(caught.value, CuPyMissing)
    assert "Type 'pip uninstall -y cupy-cuda13x', then 'pip install -e" in str(caught.value)
    get_backend("auto")
    assert len(caplog.messages) == 1


BANNER = "raise ImportError('==\\nFailed to import CuPy.\\n==')"


@pytest.mark.parametrize("text", [BANNER, "import numpy; numpy.no"])
def test_cupy_that_fails_on_import(installed, monkeypatch, tmp_path, text):
    (tmp_path / "cupy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    for names in ((), ("cupy-cuda12x",)):
        installed(*names)
        with pytest.raises(DeviceError, match=r"cannot be imported \((Import|Attribute)Error: ") as caught:
            import_cupy()
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, CuPyMissing)


@pytest.mark.parametrize(
    ("folder", "error"),
    [
        ("/proc/x", FileNotFoundError(2, "No such file or directory", "/proc/x")),
        ("/proc/x/y", FileNotFoundError(2, "No such file or directory", "/proc/x")),
        ("/srv/cache", PermissionError(13, "Permission denied", "/srv/cache/tmpk3yq2")),
        ("/srv/cache", OSError(30, "Read-only file system", "/srv/cache")),
        (None, PermissionError(13, "Permission denied", "/nonexistent/.cupy")),
    ],
)
def test_a_cache_folder_that_cannot_be_written(installed, monkeypatch, folder, error):
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("USERPROFILE", "/nonexistent")
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    if folder is not None:
        monkeypatch.setenv("CUPY_CACHE_DIR", folder)
    place = folder or "/nonexistent/.cupy/kernel_cache"
    for cupy in (None, fake_cuda.make()):  # CuPy 14 fails on import, and CuPy 13 when it compiles
        text = explain(error, cupy)
        assert f"needs a folder for CuPy's compiled kernels, and {place!r} cannot be written" in text
        assert "Set the environment variable CUPY_CACHE_DIR to a folder that can be written" in text
        assert "uninstall" not in text


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/srv/site-packages/cupy/_core/include"),
        OSError("libsomething.so: cannot open"),
        OSError(9, "Bad file descriptor", 7),
    ],
)
def test_another_file_is_not_the_cache_folder(installed, monkeypatch, error):
    monkeypatch.setenv("CUPY_CACHE_DIR", "/srv/cache")
    assert "needs CuPy, which cannot be imported" in explain(error)
    assert "was found but fails" in explain(error, fake_cuda.make())


@pytest.mark.parametrize("error", [fake_cuda.NO_CUBLAS_13, fake_cuda.NO_NVRTC_13, fake_cuda.NO_HEADERS_14])
def test_a_library_that_is_missing_on_import_is_not_mended_by_a_new_cupy(installed, error):
    assert CTK in explain(error)


def test_something_else_under_the_name(installed, monkeypatch):
    installed()
    other = ModuleType("cupy")
    other.__file__ = "/home/me/cupy.py"
    monkeypatch.setitem(sys.modules, "cupy", other)
    expected = r"another module .*\(ImportError: not CuPy: /home/me/cupy\.py\)\. Remove or rename it"
    with pytest.raises(DeviceError, match=expected):
        import_cupy()
    other.__file__, other.__path__ = None, ["/somewhere/cupy"]  # a folder without an __init__.py
    with pytest.raises(DeviceError, match="not CuPy: /somewhere/cupy"):
        import_cupy()


def test_auto_says_it_in_one_line_on_standard_error(tmp_path):
    program = "from tinyvit.gpu import get_backend; print(get_backend('auto').device)"
    paths = os.pathsep.join([str(tmp_path), *sys.path])

    def said():
        command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "cpu\n"
        return done.stderr

    (tmp_path / "cupy.py").write_text("raise ImportError('two\\nlines')")
    expected = r"note: the CPU computes, because device 'gpu' needs CuPy, .*ImportError: two lines.*\n"
    assert re.fullmatch(expected, said())


def test_auto_says_nothing_of_a_gpu_that_computes(installed, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", fake_cuda.make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend("auto").device == "gpu"
    assert caplog.messages == []


# parts


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError(),
        CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"),
        CUBLASError("CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ],
)
def test_out_of_memory_has_many_names(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("no"), fake_cuda.TOO_OLD, OSError(28, "No space left on device")])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_versions_of_cuda():
    assert cuda_versions(fake_cuda.make(driver=13000, runtime=13020)) == ("13.0", "13.2")
    assert cuda_versions(fake_cuda.make(driver=12090, runtime=11080)) == ("12.9", "11.8")
    assert cuda_versions(fake_cuda.make(driver=0)) == ("none", "13.2")
    assert cuda_versions(None) == ("none", "none")


def test_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "ValueError: a b c"
    assert one_line(ValueError("x" * 100), limit=20) == "ValueError: xxxxxxxx..."
