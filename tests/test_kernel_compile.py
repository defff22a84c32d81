"""The CUDA text is compiled for real cards, by NVRTC as CuPy does and by nvcc as it lies; neither needs a GPU."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tinyvit.kernels import launch
from tinyvit.model import ViTConfig

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "kernel_resources.json"
REGISTERS = 65_536  # of a multiprocessor
THREADS = {"linear": 128, "layer_norm": 256, "attention": 128, "cross_entropy": 256, "adam": 256, "patches": 256}
MODELS = [  # with rows that are no multiple of a warp, and the other GELU
    ViTConfig(),
    ViTConfig(image_size=8, patch_size=4, width=40, heads=2, gelu="tanh"),
]


def load_script():
    spec = importlib.util.spec_from_file_location("kernel_resources", ROOT / "benchmarks" / "kernel_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernel_resources = load_script()


@pytest.fixture
def nvrtc():
    try:
        return kernel_resources.nvrtc()
    except kernel_resources.CompilerMissing as error:
        pytest.skip(str(error))


def variants():
    for file in launch.FUNCTIONS:
        for architecture in kernel_resources.ARCHITECTURES:
            for precision in launch.PRECISIONS if file == "linear" and architecture != "sm_75" else ("float32",):
                yield file, architecture, precision


@pytest.mark.parametrize(("file", "architecture", "precision"), list(variants()))
def test_every_kernel_compiles_and_keeps_within_its_registers(nvrtc, file, architecture, precision):
    found = kernel_resources.resources(file, architecture, precision)
    assert set(found) == set(launch.FUNCTIONS[file])
    for kernel, needs in found.items():
        assert needs["spill_stores"] == needs["spill_loads"] == 0, kernel
        assert 2 * THREADS[file] * needs["registers"] <= REGISTERS, kernel  # two blocks or more side by side
        assert needs["shared"] <= launch.SHARED_MEMORY, kernel


@pytest.mark.parametrize("file", launch.FUNCTIONS)
@pytest.mark.parametrize("config", MODELS, ids=["the note's", "small"])
def test_the_compiler_has_nothing_to_say(nvrtc, file, config):
    code, words = kernel_resources.compile_file(file, "sm_90", config=config)
    assert code[:4] == b"\x7fELF"
    assert "warning" not in words


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_card_without_the_instructions_is_refused_by_our_own_words(nvrtc, precision):
    with pytest.raises(ValueError, match=r"TF32 and bfloat16 need a GPU of compute capability 8\.0 or above"):
        kernel_resources.compile_file("linear", "sm_75", precision)


def test_what_does_not_compile_is_said(nvrtc):
    with pytest.raises(ValueError, match="undefined_name"):
        kernel_resources.compiled("__global__ void f() { undefined_name(); }", "--gpu-architecture=sm_90")


@pytest.mark.parametrize("architecture", kernel_resources.ARCHITECTURES)
@pytest.mark.parametrize("file", launch.FUNCTIONS)
def test_every_file_compiles_alone_as_it_lies(tmp_path, file, architecture):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    command = ["nvcc", "-cubin", f"-arch={architecture}", launch.FOLDER / f"{file}.cu", "-o", tmp_path / "cubin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr


def test_the_record_has_every_kernel():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = {(row["kernel"], row["architecture"], row["precision"]) for row in record["kernels"]}
    assert rows == {(kernel, *rest) for file, *rest in variants() for kernel in launch.FUNCTIONS[file]}
    assert all(row["spill_stores"] == row["spill_loads"] == 0 for row in record["kernels"])
