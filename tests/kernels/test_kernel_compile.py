"""Every .cu file is compiled for real architectures, and what it takes of a GPU is kept and held within bounds.

Neither NVRTC, from its PyPI package, nor nvcc needs a driver or a GPU to compile.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import CONFIGS

from tinyvit.kernels import launch

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
kernel_resources = importlib.import_module("kernel_resources")

RECORDED = ROOT / "benchmarks" / "results" / "kernel_resources.json"
FILES = list(launch.FUNCTIONS)
COMPILATIONS = [
    (architecture, file, precision)
    for architecture, precisions in kernel_resources.TARGETS.items()
    for file in FILES
    for precision in (precisions if file == "linear" else ("float32",))
]


@pytest.fixture(scope="module")
def nvrtc():
    try:
        return kernel_resources.nvrtc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def nvcc():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return "nvcc"


def assert_within_bounds(file, found, architecture):
    """Nothing spills, and of each kernel two blocks at least are in a multiprocessor at once."""
    assert set(found) == set(launch.FUNCTIONS[file])
    threads = kernel_resources.threads_of(file)
    for name, numbers in found.items():
        assert numbers["spill_stores"] == numbers["spill_loads"] == 0, (name, numbers)
        assert numbers["shared_bytes"] <= launch.SHARED_MEMORY
        of_blocks = numbers["registers"], numbers["shared_bytes"]
        blocks = kernel_resources.blocks_a_multiprocessor(architecture, threads[name], *of_blocks)
        assert blocks >= 2, (name, numbers)


@pytest.mark.parametrize(("architecture", "file", "precision"), COMPILATIONS)
def test_nvrtc_compiles_for_real_architectures(nvrtc, architecture, file, precision):
    cubin, log = kernel_resources.compile_file(file, architecture, precision)
    assert cubin.startswith(b"\x7fELF")
    assert all(name.encode() in cubin for name in launch.FUNCTIONS[file])
    warnings = re.findall(r"warning .*", log)
    assert all('"LEAST" was declared but never referenced' in warning for warning in warnings), warnings
    assert_within_bounds(file, kernel_resources.resources(log), architecture)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("file", ["linear", "layer_norm", "attention"])  # those that depend on the model
def test_other_models_compile_as_well(nvrtc, file, config):
    _, log = kernel_resources.compile_file(file, "sm_90", config=CONFIGS[config])
    assert_within_bounds(file, kernel_resources.resources(log), "sm_90")


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_card_without_tensor_cores_is_refused_in_our_words(nvrtc, precision):
    with pytest.raises(kernel_resources.CompilationError, match=r"need a GPU of compute capability 8\.0 or above"):
        kernel_resources.compile_file("linear", "sm_75", precision)
    assert launch.unsupported_reason(kernel_resources.ViTConfig(), precision, 75) is not None


def test_what_does_not_compile_is_told(nvrtc):
    with pytest.raises(kernel_resources.CompilationError, match='identifier "missing" is undefined'):
        kernel_resources.compile_cubin("__global__ void f(int* x) { *x = missing; }", "f.cu", [])


def test_products_are_on_the_tensor_cores(nvrtc):
    """In PTX, the instructions that tensor_cores.cuh is written for; in strict float32, none of them."""
    names = {"tf32": "tf32.tf32", "bfloat16": "bf16.bf16"}
    for precision in launch.PRECISIONS:
        text = ptx("linear", precision)
        for other, name in names.items():
            assert (f"mma.sync.aligned.m16n8k{8 if other == 'tf32' else 16}.row.col.f32.{name}.f32" in text) == (
                precision == other
            )


def ptx(file, precision):
    macros = launch.macros(kernel_resources.ViTConfig(), precision)
    options = ["--gpu-architecture=compute_90", "--std=c++17", *macros]
    return kernel_resources.compile_ptx(launch.source(file), f"{file}.cu", options)


@pytest.mark.parametrize(
    ("file", "precision"), [*((file, 0) for file in FILES), ("linear", 1), ("linear", 2)], ids=str
)
def test_nvcc_compiles_a_file_as_it_lies(nvcc, file, precision, tmp_path):
    command = [nvcc, "-cubin", "-arch=sm_90", "-Xptxas", "-v", f"-DPRECISION={precision}"]
    command = command if precision else command[:-1]
    path = launch.FOLDER / f"{file}.cu"
    done = subprocess.run([*command, path, "-o", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_within_bounds(file, kernel_resources.resources(done.stderr), "sm_90")


def test_blocks_a_multiprocessor():
    blocks = kernel_resources.blocks_a_multiprocessor
    assert blocks("sm_90", 128, 168, 0) == 65536 // (4 * 168 * 32)
    assert blocks("sm_90", 128, 161, 0) == blocks("sm_90", 128, 168, 0)  # eight registers a thread at a time
    assert blocks("sm_90", 1024, 65, 0) == 0
    assert blocks("sm_90", 32, 16, 48 * 1024) == 4
    assert blocks("sm_80", 32, 16, 48 * 1024) == 3
    assert blocks("sm_75", 256, 16, 0) == 4
    assert blocks("sm_90", 256, 16, 0) == 8
    assert blocks("sm_90", 32, 16, 0) == 32


def test_what_ptxas_says_is_read():
    log = """ptxas info    : 272 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
ptxas         .     72 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 72 bytes cumulative stack size, 96 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    one = {"registers": 42, "shared_bytes": 96, "stack_bytes": 72, "spill_stores": 4, "spill_loads": 8}
    two = {"registers": 8, "shared_bytes": 0, "stack_bytes": 0, "spill_stores": 0, "spill_loads": 0}
    assert kernel_resources.resources(log) == {"one": one, "two": two}


def test_the_recorded_figures_are_of_these_kernels(nvrtc):
    """Every kernel, architecture and precision; a newer compiler may choose a few registers more or less."""
    recorded = json.loads(RECORDED.read_text())
    keys = [(record["architecture"], record["kernel"], record["precision"]) for record in recorded["records"]]
    expected = [
        (architecture, kernel, precision)
        for architecture, file, precision in COMPILATIONS
        for kernel in launch.FUNCTIONS[file]
    ]
    assert sorted(keys) == sorted(expected)
    assert recorded["conditions"]["command"].startswith("python benchmarks/kernel_resources.py")
    _, log = kernel_resources.compile_file("adam", "sm_90")
    now = kernel_resources.resources(log)
    for record in recorded["records"]:
        if record["kernel"] in now and record["architecture"] == "sm_90":
            assert abs(record["registers"] - now[record["kernel"]]["registers"]) <= 16
            assert record["shared_bytes"] == now[record["kernel"]]["shared_bytes"]


def test_every_kernel_says_of_how_many_threads_its_blocks_are():
    for file, names in launch.FUNCTIONS.items():
        assert set(kernel_resources.threads_of(file)) == set(names)
