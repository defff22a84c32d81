"""The benchmarks run, their counts are right, and their peers compute the same as tinyvit."""

import asyncio
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyvit.backend import compiled_loops
from tinyvit.data.augment import Augmentation
from tinyvit.kernels import Kernels, KernelStep
from tinyvit.kernels.launch import SIGNATURES
from tinyvit.kernels.step import PARTIALS
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_logits
from tinyvit.optim import Adam
from tinyvit.training import TrainingConfig
from tinyvit.training.state import new_state

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
peers, turns, scaling, inference, time_to_accuracy, floors, gpu, gpu_work, tables = (
    importlib.import_module(name)
    for name in ["peers", "turns", "scaling", "inference", "time_to_accuracy", "floors", "gpu", "gpu_work", "tables"]
)

TINY = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, heads=3, mlp_width=20, classes=4)
LEARNING_RATE = 1e-2
PNG = b"\x89PNG\r\n\x1a\n"


# ---- the commands ----


@pytest.fixture
def no_peers(tmp_path):
    """Return an environment in which no peer can be imported."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    for name in ("torch", "jax", "onnx", "onnxruntime"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is hidden', name='{name}')\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def run(script, *arguments, env=None, expect=0):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def one_record(path):
    """Return the only record in the JSON of a benchmark, and check its conditions."""
    found = json.loads(path.read_text())
    assert {"numpy", "blas", "cpu", "environment", "command"} <= set(found["conditions"])
    (record,) = found["records"]
    return record


def assert_rising(values):
    assert 0 < values[0] <= values[1] <= values[2]


def test_train_step(tmp_path, no_peers):
    path = tmp_path / "found.json"
    quick = ("8x20", "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--json", path)
    done = run("train_step", *quick, "--only", "numpy", "own-products", "products", "torch", "jax", env=no_peers)
    assert "PyTorch eager: skipped, not installed (ImportError: torch is hidden)" in done.stdout
    assert "JAX jit: skipped, not installed (ImportError: jax is hidden)" in done.stdout
    record = one_record(path)
    assert list(record["contestants"]) == ["tinyvit", "numpy", "own-products", "products"]
    assert record["contestants"]["tinyvit"]["times_tinyvit"] == [1, 1, 1]
    for figures in record["contestants"].values():
        assert_rising(figures["milliseconds"])


def test_inference(tmp_path, no_peers):
    path = tmp_path / "found.json"
    quick = ("--images", 100, "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--json", path)
    done = run("inference", *quick, "--batch", 20, 50, "--only", "numpy", "torch", "onnx", env=no_peers)
    assert "PyTorch eager: skipped, not installed (torch is hidden)" in done.stdout
    assert "ONNX Runtime: skipped, not installed (onnxruntime is hidden)" in done.stdout
    record = one_record(path)
    assert list(record["contestants"]) == ["tinyvit", "numpy"]
    figures = record["contestants"]["tinyvit"]
    assert_rising(figures["milliseconds"])
    assert figures["images_per_second"] == pytest.approx(1e3 * 100 / figures["milliseconds"][1])
    assert figures["milliseconds_by_batch"].keys() == {"20", "50"}
    assert str(figures["batch"]) == min(figures["milliseconds_by_batch"], key=figures["milliseconds_by_batch"].get)


def test_inference_refuses_a_batch_that_does_not_divide_the_images():
    done = run("inference", "--images", 100, "--batch", 64, expect=2)
    assert "--batch must divide the number of images, 100, but got 64" in done.stderr


def test_inference_refuses_a_contestant_with_other_logits():
    expected = inference.expected_logits(8, 20)
    with pytest.raises(ValueError, match=r"compiled loops: the logits differ from those of tinyvit by 0\.01"):
        inference.classify_step(
            "tinyvit",
            mlp=8,
            images=20,
            batch=10,
            threads=1,
            expected=expected + 0.01,
            folder=None,
        )
    with pytest.raises(ValueError, match="by nan"):
        inference.check("jax", expected * math.nan, expected)


def test_scaling(tmp_path):
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    quick = ("--rounds", 2, "--seconds", 0.01, "--json", path, "--picture", picture)
    run("scaling", *quick, "--only", "depth", "--depth", 1, "--workers", 1)
    first, default = json.loads(path.read_text())["records"]
    assert (first["depth"], default["depth"]) == (1, 4)
    assert default["times_default"] == [1, 1, 1]
    assert first["gflop_done"] < first["gflop"] < default["gflop_done"] < default["gflop"]
    for record in (first, default):
        assert_rising(record["milliseconds"])
        speed = record["gflop"] / record["milliseconds"][1] * 1e3
        assert record["gflop_per_second"] == pytest.approx(speed)
    assert picture.read_bytes().startswith(PNG)
    drawn_again = tmp_path / "again.png"
    done = run("scaling", "--recorded", path, "--picture", drawn_again)
    assert "depth, blocks" in done.stdout
    assert drawn_again.read_bytes() == picture.read_bytes()


def test_time_to_accuracy(tmp_path):
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    quick = ("--limit", 600, "--every", 4, "--workers", 1, "--json", path, "--picture", picture)
    done = run("time_to_accuracy", *quick, "--epochs", 1, 2, "--seeds", 0, "--targets", 1, 99.99)
    assert "2 epochs of 550 images, seed 0: epoch 1 done" in done.stdout
    found = json.loads(path.read_text())
    assert found["recipe"] == "tuned"
    short, long = found["runs"]
    assert (short["steps"], long["steps"]) == (9, 18)  # 550 images in batches of 64
    assert [epochs for _, epochs, _ in short["curve"]] == pytest.approx([4 * 64 / 550, 8 * 64 / 550, 1], abs=1e-4)
    assert [round(epochs, 2) for _, epochs, _ in long["curve"]][-2:] == [1.81, 2]
    seconds = [seconds for seconds, _, _ in long["curve"]]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(long["seconds"], abs=1e-3)
    easy, impossible = found["summary"]
    assert impossible["best_epochs"] is None
    assert easy["lengths"][0]["seconds"] == [short["curve"][0][0]]
    assert picture.read_bytes().startswith(PNG)


def test_each_target_has_a_short_recipe_and_its_number_of_images(monkeypatch, tmp_path):
    assert set(time_to_accuracy.SHORT) == {97.77, 99, 99.3}
    monkeypatch.setitem(time_to_accuracy.SHORT, 97.77, (time_to_accuracy.SHORT[97.77][0], 200))
    path = tmp_path / "found.json"
    quick = ["--limit", "600", "--workers", "1", "--seeds", "3", "--targets", "97.77", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *quick])
    time_to_accuracy.main()
    (only,) = json.loads(path.read_text())["runs"]
    assert (only["seed"], only["steps"], only["epochs"]) == (3, 4, round(200 / 550, 2))  # 200 images in batches of 64
    assert only["curve"][-1][1] == pytest.approx(200 / 550, abs=1e-4)
    assert only["settings"]["learning_rate"] == 1.5e-3


def test_time_to_accuracy_takes_the_median_of_the_seeds_and_the_best_of_the_lengths():
    def runs(epochs, *curves):
        return [{"epochs": epochs, "seed": i, "curve": curve} for i, curve in enumerate(curves)]

    curve = [(1.0, 0.1, 90.0), (2.0, 0.2, 97.77), (3.0, 0.3, 97.0), (4.0, 0.4, 99.0)]
    assert time_to_accuracy.seconds_to(curve, 97.77) == 2
    assert time_to_accuracy.seconds_to(curve, 99.1) is None
    later = [(2 * seconds, epochs, accuracy) for seconds, epochs, accuracy in curve]
    bad = curve[:1]
    found = time_to_accuracy.summary([*runs(3, later, later, bad), *runs(1, curve, bad, bad)], [97.77, 99.5])
    short, long = found[0]["lengths"]
    assert short == {"epochs": 1, "seconds": [2, None, None], "median": None, "range": [2, 2]}
    assert long == {"epochs": 3, "seconds": [4, 4, None], "median": 4, "range": [4, 4]}
    assert found[0]["best_epochs"] == 3
    assert found[1]["best_epochs"] is None


# ---- statistics and counts ----


def test_quartiles():
    assert turns.quartiles([7.0]) == [7, 7, 7]
    assert turns.quartiles([5, 1, 4, 2, 3]) == [2, 3, 4]


def test_a_ratio_is_taken_round_by_round():
    slower, faster = SimpleNamespace(seconds=[2, 40, 6]), SimpleNamespace(seconds=[1, 10, 2])
    assert turns.ratio(slower, faster) == [2.5, 3, 3.5]
    with pytest.raises(ValueError, match="shorter"):
        turns.ratio(slower, SimpleNamespace(seconds=[1]))


def test_the_memory_of_a_process_and_of_its_children():
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    program = "memory = bytearray(50_000_000); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        found = turns.processes()
    finally:
        child.communicate(b"\n")
    assert {"self", str(child.pid)} <= set(found)
    assert 50 < found[str(child.pid)][0] < 100  # megabytes
    assert all(0 < now <= most for now, most in found.values())


def test_matrix_products_by_hand():
    # 5 tokens (4 patches of 16 pixels), width 12, 2 blocks, 3 heads of width 4, MLP 20, 4 classes; 2 images: 10 rows
    assert peers.matrix_products(TINY, batch=2) == {
        (1, 8, 12, 16): 1,  # the patches,
        (1, 16, 12, 8): 1,  # and their weight's gradient
        (1, 10, 36, 12): 2,  # queries, keys and values
        (1, 10, 12, 36): 2,
        (1, 12, 36, 10): 2,
        (1, 10, 12, 12): 2 + 2,  # the projection, there and back
        (1, 12, 12, 10): 2,
        (1, 10, 20, 12): 2 + 2,  # fc1, and back through fc2
        (1, 10, 12, 20): 2 + 2,  # back through fc1, and fc2
        (1, 12, 20, 10): 2,
        (1, 20, 12, 10): 2,
        (1, 2, 4, 12): 1,  # the head
        (1, 2, 12, 4): 1,
        (1, 12, 4, 2): 1,
        (6, 5, 5, 4): 2 * 2,  # 2 images' 3 heads: scores, and back to the weights
        (6, 5, 4, 5): 4 * 2,  # values, and back to queries, keys and values
    }
    assert peers.operations({(6, 5, 4, 3): 2, (1, 1, 1, 1): 1}) == 2 * (2 * 6 * 5 * 4 * 3) + 2


def test_a_step_of_the_default_model_is_5_gflop():
    images, tokens, width, mlp, blocks = 64, 17, 128, 512, 4
    weights = 4 * width * width + 2 * width * mlp  # of a block: queries, keys, values, projection; MLP
    rows = images * tokens
    expected = blocks * (3 * 2 * rows * weights + 6 * 2 * images * tokens * tokens * width)
    expected += 2 * 2 * images * 16 * 49 * width + 3 * 2 * images * width * 10  # patches and head
    found = peers.operations(peers.matrix_products(ViTConfig(), images))
    assert found == expected
    assert found == pytest.approx(5.27e9, rel=1e-3)


def test_operations_done_are_the_plain_ones_except_in_the_last_block():
    def count(depth):
        config = scaling.model(width=128, depth=depth, patch=7)
        return peers.operations(peers.matrix_products(config, 4)), scaling.operations_done(config, 4)

    (plain_1, done_1), (plain_2, done_2) = count(1), count(2)
    assert done_1 < plain_1 / 2
    assert 1 < (done_2 - done_1) / (plain_2 - plain_1) < 1.03  # a little more, because sums are matrix products too


# ---- the peers compute the same as tinyvit ----


@pytest.fixture
def weights():
    """Return random parameters of the tiny model. Ones and zeros would hide a mistake."""
    parameters = initialise(TINY, seed=1)
    parameters.flat[...] += 0.1 * np.random.default_rng(2).standard_normal(parameters.flat.shape)
    return parameters


@pytest.fixture
def batches():
    """Return two batches of images from 0 to 1 and labels."""
    rng = np.random.default_rng(3)
    return [(rng.random((6, 8, 8), np.float32), rng.integers(0, 4, 6)) for _ in range(2)]


def normalised(pixels):
    return (pixels - TINY.pixel_mean) / TINY.pixel_deviation


def losses_of_this_library(weights, batches, steps):
    parameters = weights.with_flat(weights.flat.copy())
    adam, losses = Adam(parameters.flat), []
    for i in range(steps):
        images, labels = batches[i % len(batches)]
        loss, _, gradients = loss_and_gradient(images, labels, parameters, TINY)
        adam.step(parameters.flat, gradients.flat, LEARNING_RATE)
        losses.append(float(loss))
    return losses


def assert_same_training(step, weights, batches):
    ours = losses_of_this_library(weights, batches, 3)
    assert abs(ours[2] - ours[0]) > 0.01  # the loss changes by more than the tolerance
    np.testing.assert_allclose([step() for _ in range(3)], ours, atol=1e-4)


@pytest.mark.parametrize("shortcut", [False, True])
def test_torch_gives_the_same_logits(weights, batches, shortcut):
    torch = pytest.importorskip("torch")
    images, _ = batches[0]
    ours = vit_logits(images, weights, TINY)
    with torch.inference_mode():
        theirs = peers.torch_model(TINY, weights, shortcut)(torch.from_numpy(normalised(images))).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    np.testing.assert_allclose(peers.torch_logits(TINY, weights, 1)(normalised(images)), ours, atol=1e-4)


@pytest.mark.parametrize("shortcut", [False, True])
def test_torch_trains_in_the_same_way(weights, batches, shortcut):
    pytest.importorskip("torch")
    theirs = [(normalised(images), labels) for images, labels in batches]
    step = peers.torch_train_step(TINY, weights, theirs, LEARNING_RATE, threads=1, shortcut=shortcut)
    assert_same_training(step, weights, batches)


def test_jax_gives_the_same_logits(weights, batches):
    pytest.importorskip("jax")
    images, _ = batches[0]
    ours = vit_logits(images, weights, TINY)
    np.testing.assert_allclose(peers.jax_logits(TINY, weights)(normalised(images)), ours, atol=1e-4)


def test_jax_trains_in_the_same_way(weights, batches):
    pytest.importorskip("jax")
    theirs = [(normalised(images), labels) for images, labels in batches]
    assert_same_training(peers.jax_train_step(TINY, weights, theirs, LEARNING_RATE), weights, batches)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of the exporter that needs no more packages
def test_onnx_runtime_gives_the_same_logits_for_any_batch(weights, batches, tmp_path):
    for name in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    images, _ = batches[0]
    for count in (1, 2, 6):  # the second and third use the file of the first
        logits = peers.onnx_logits(TINY, weights, 1, tmp_path)(normalised(images[:count]))
        np.testing.assert_allclose(logits, vit_logits(images[:count], weights, TINY), atol=1e-4)


def test_inference_beside_a_peer(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "found.json"
    quick = ("--images", 100, "--batch", 50, "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--json", path)
    run("inference", *quick, "--only", "torch")
    record = one_record(path)
    assert list(record["contestants"]) == ["tinyvit", "torch"]
    assert_rising(record["contestants"]["torch"]["times_tinyvit"])


# ---- the GPU: what a step launches, and what that costs at least ----


def recorded_step(backend, config, batch, augmented=True, clip=0.0, decay=0.0, average=False):
    """Return the launches of a step of `KernelStep` with their arguments; none of them runs."""
    images = np.zeros((2 * batch, config.image_size, config.image_size), np.uint8)
    training_config = TrainingConfig(
        batch_size=batch,
        clip=clip,
        weight_decay=decay,
        average=0.9 if average else 0.0,
        augmentation=Augmentation(rotation=10 if augmented else 0),
    )
    state = new_state(config, training_config, backend)
    kernels, found = Kernels(backend, config), []

    def recorder(name):
        count = len(SIGNATURES[name].arrays)

        def record(grid, block, arguments):
            arrays = (None if isinstance(array, np.uint64) else array for array in arguments[:count])
            found.append((name, grid, *block, (*arrays, *arguments[count:])))

        return record

    kernels._functions = {name: recorder(name) for name in SIGNATURES}
    step = KernelStep(
        kernels,
        state,
        images,
        labels=np.zeros(2 * batch, int),
        config=training_config,
        graph=False,
    )
    step.begin_epoch(0)
    found.clear()
    step()
    return found


def bytes_of(name, arguments, clip, batch):
    """Return the bytes that a launch reads and writes. They differ from the size of its arrays for some kernels."""
    arrays = [argument for argument in arguments if hasattr(argument, "nbytes") and argument.shape]
    size = sum(array.nbytes for array in arrays)
    if name == "gather_patches":
        images, labels, order, maps, scales, counter, *written = arguments
        parts = [array for array in (images, labels, order, maps) if array is not None]
        share = batch / len(images)
        whole = sum(array.nbytes for array in (scales, counter, *written[:2]))
        return share * sum(array.nbytes for array in parts) + whole
    if name == "linear_forward" and arguments[3] is not None:  # only the added rows of the residual
        return size - arguments[3].nbytes + arguments[4].nbytes
    if name == "linear_backward":  # weights only with dx; dw and db once per partial gradient
        _, _, w, _, dx, dw, db, *_ = arguments
        partials = sum((PARTIALS - 1) * array.nbytes for array in (dw, db) if array is not None)
        return size + partials - (w.nbytes if dx is None else 0)
    if name == "layer_norm_backward":
        return size + (PARTIALS - 1) * sum(array.nbytes for array in arguments[6:8])
    if name in ("attention_forward", "attention_backward"):  # queries of the tokens that ask
        qkv, out = (arguments[0], arguments[1]) if name == "attention_forward" else (arguments[1], arguments[0])
        return size - (qkv.nbytes // 3 - out.nbytes)
    if name == "cross_entropy":
        return size + arguments[3].nbytes  # read and written
    if name == "sum_partials":
        _, gradient, squares, counter, *_ = arguments
        return PARTIALS * gradient.nbytes + gradient.nbytes + squares.nbytes + 2 * counter.nbytes
    if name == "adam_step":  # weights, moments and their average are read and written
        weights, gradient, first, second, decayed, average, squares, _, counter, *_ = arguments
        twice = sum(2 * array.nbytes for array in (weights, first, second, average) if array is not None)
        once = gradient.nbytes + (0 if decayed is None else decayed.nbytes) + (squares.nbytes if clip else 0)
        return twice + once + 4 * 4 + counter.nbytes
    return size


def operations_of(name, arguments):
    if name in ("linear_forward", "linear_gelu_forward"):
        return 2 * arguments[0].size * arguments[1].shape[1]
    if name == "linear_backward":
        dout, x, _, _, dx, *_ = arguments
        return 2 * dout.size * x.shape[1] * (1 if dx is None else 2)
    return 0


@pytest.mark.parametrize(
    ("config", "batch", "settings"),
    [
        (ViTConfig(), 64, {}),
        (ViTConfig(), 33, {"augmented": False, "clip": 1.0, "decay": 0.1, "average": True}),
        (TINY, 5, {"clip": 1.0}),
        (ViTConfig(width=40, heads=2, mlp_width=72, depth=1), 1, {"decay": 0.1, "average": True}),
    ],
    ids=["the note's", "with everything of Adam", "tiny", "one image"],
)
def test_the_floors_are_those_of_what_a_step_launches(strict_gpu, config, batch, settings):
    recorded = recorded_step(strict_gpu, config, batch, **settings)
    clip = settings.get("clip", 0.0) > 0
    model = floors.launches(
        config,
        batch,
        augmented=settings.get("augmented", True),
        clip=clip,
        decayed=settings.get("decay", 0) > 0,
        average=settings.get("average", False),
    )
    assert [launch[:3] for launch in recorded] == [(launch.name, launch.grid, launch.block) for launch in model]
    for (name, _, _, arguments), launch in zip(recorded, model, strict=True):
        assert launch.bytes == bytes_of(name, arguments, clip, batch), launch
        assert launch.operations == operations_of(name, arguments), launch


def test_attention_has_two_products_forward_and_four_backward():
    found = {launch.name: launch.float32_operations for launch in floors.launches(TINY, 2)[:-1]}
    one = 2 * 2 * TINY.tokens**2 * TINY.width  # 2 images, all heads
    assert (found["attention_forward"], found["attention_backward"]) == (2 * one / 5, 4 * one)
    # The dict keeps the last launch of each name. Forward it is that of the last block, with one query for 5 tokens.


def test_a_step_takes_the_floors_of_its_kernels_and_the_gaps():
    def launch(size, operations=0, float32_operations=0):
        return floors.Launch("a", "b", (1,), 32, size, operations, float32_operations)

    step = [launch(10, 6), launch(2, 300, 10), launch(50)]
    found = floors.predict(step, bandwidth=10, rate=100, float32_rate=5, gap=0.5)
    assert found == {"work": 1 + (3 + 2) + 5, "gaps": 1.5, "total": 12.5}


@pytest.mark.parametrize("precision", floors.PRECISIONS)
def test_a_persistent_kernel_takes_less_with_more_images_per_cluster(precision):
    card = floors.CARDS["H100 SXM"]
    one, two = (
        floors.persistent(ViTConfig(), 64, card, precision, images=n, cluster=2 * n)["total"] for n in (1, 2)
    )
    step = floors.launches(ViTConfig(), 64)
    launched = floors.predict(
        step,
        bandwidth=card.bandwidth,
        rate=card.rates[precision],
        float32_rate=card.rates["float32"],
        gap=floors.GAP,
    )
    assert 0 < two < one < launched["total"]


def test_floors_says_that_it_computes():
    done = run("floors", "--batch", 64)
    assert done.stdout.startswith("computed, not measured")
    launches = sum(launch.name != "" for launch in floors.launches(ViTConfig(), 64))
    assert f"step                   {launches:8}" in done.stdout
    assert "--batch must be at least 1" in run("floors", "--batch", 0, expect=2).stderr


# ---- gpu.py ----


def folder_with(tmp_path, name, text):
    folder = tmp_path / name
    (folder / "cupy").mkdir(parents=True)
    (folder / "cupy" / "__init__.py").write_text(text)
    return str(folder)


def test_gpu_without_one_says_what_to_do_in_one_line(tmp_path):
    hidden = folder_with(tmp_path, "hidden", "raise ModuleNotFoundError('no cupy', name='cupy')\n")
    done = run("gpu", "--quick", env=os.environ | {"PYTHONPATH": os.pathsep.join([hidden, str(ROOT)])}, expect=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu.py needs a GPU: device 'gpu' ")
    assert "pip install" in line


def test_gpu_refuses_a_batch_above_half_the_images():
    done = run("gpu", "--batches", 64, "--limit", 100, expect=2)
    assert "--batches must be from 1 to half the number of images, not [64]" in done.stderr


# The kernels of this stand-in for CuPy check their arguments and compute nothing.
STAND_IN = """
import sys
import emulate, strict_cupy
emulate.Emulated.launch = lambda *arguments: None
sys.modules.update(strict_cupy.modules)
"""


@pytest.fixture
def stand_in(tmp_path, no_peers):
    folders = [folder_with(tmp_path, "stand_in", STAND_IN), str(ROOT / "tests" / "support"), no_peers["PYTHONPATH"]]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


def test_gpu_measures_everything(tmp_path, stand_in):
    path = tmp_path / "found.json"
    small = ("--batches", 2, 4, "--precisions", "float32", "bfloat16", "--depth", 1, "--limit", 100, "--epochs", 2)
    short = ("--trainings", 2, "--rounds", 2, "--seconds", 0.01, "--side", 64, "--copy", 1, "--json", path)
    done = run("gpu", *small, *short, env=stand_in)
    found = json.loads(path.read_text())
    assert {"numpy", "cpu", "command", "card", "cupy", "cuda_runtime", "nvidia_smi"} <= set(found["conditions"])
    assert set(found["conditions"]["nvidia_smi"]) == {"before", "after"}

    assert [record["precision"] for record in found["training"]] == ["float32", "bfloat16"]
    for record in found["training"]:
        assert (record["epochs"], record["images"], record["steps"]) == (2, 100, 4), record
        assert len(record["seconds"]) == 2
        assert all(seconds > 0 for seconds in record["seconds"])
    cases = [(2, "float32"), (2, "bfloat16"), (4, "float32"), (4, "bfloat16")]
    assert [(record["batch"], record["precision"]) for record in found["steps"]] == cases
    for record in found["steps"]:
        contestants = record["contestants"]
        plain = ["plain"] if record["precision"] == "float32" else []
        assert list(contestants) == ["graph", "launches", *plain, "torch", "torch-graph", "torch-compiled"]
        for name in ("graph", "launches", *plain):
            assert_rising(contestants[name]["milliseconds"])
            assert_rising(contestants[name]["times_tinyvit"])
        for name in ("torch", "torch-graph", "torch-compiled"):
            assert contestants[name] == {"absent": "ImportError: torch is hidden"}
        if plain:
            assert 1 < contestants["plain"]["loss"] < 4

    ceilings = found["ceilings"]
    assert all(ceilings[name] > 0 for name in ("copy", "copy_within_the_cache", "gap"))
    assert "cublas" in ceilings["float32"]  # the stand-in has no cuBLAS, and the other measurements continue
    assert [(record["batch"], record["precision"]) for record in found["kernels"]] == cases
    for record in found["kernels"]:
        model = floors.launches(ViTConfig(depth=1), record["batch"])
        assert sum(row["launches"] for row in record["rows"]) == len(model)
        assert sum(row["launches"] * row["bytes"] for row in record["rows"]) == sum(x.bytes for x in model)
        assert all(row["seconds"] > 0 for row in record["rows"])

    printed = run("gpu", "--recorded", path).stdout
    for line in done.stdout.splitlines()[:-1]:  # the last line is the duration
        assert line in printed


def test_gpu_leaves_out_parts_without_time(tmp_path, stand_in):
    path = tmp_path / "found.json"
    small = ("--batches", 2, "--precisions", "float32", "--depth", 1, "--limit", 100, "--epochs", 1, "--rounds", 1)
    few = ("--only", "graph", "torch-compiled", "--side", 64, "--copy", 1, "--minutes", 0.01, "--json", path)
    run("gpu", *small, *few, env=stand_in)
    found = json.loads(path.read_text())
    (record,), (kernels,) = found["steps"], found["kernels"]
    assert record["contestants"]["torch-compiled"] == {"left_out": "no time left in 0.01 minutes"}
    assert_rising(record["contestants"]["graph"]["milliseconds"])
    assert kernels["left_out"] == "no time left in 0.01 minutes"


def test_gpu_refuses_an_impossible_file_at_once(tmp_path):
    lost = tmp_path / "lost" / "found.json"
    assert "--json: there is no folder" in run("gpu", "--json", lost, expect=2).stderr
    assert "--recorded: there is no file" in run("gpu", "--recorded", lost, expect=2).stderr


def made_up():
    """Return the record of a run of gpu.py on a made-up card."""

    def figures(milliseconds, times):
        spread = [0.9 * milliseconds, milliseconds, 1.1 * milliseconds]
        times = None if times is None else [0.9 * times, times, 1.1 * times]
        return {
            "milliseconds": spread,
            "times_tinyvit": times,
            "megabytes": 100,
            "building_seconds": 3.0,
            "loss": 0.5,
        }

    training = {"epochs": 10, "images": 60_000, "batch": 64, "train_accuracy": 0.98, "first_seconds": 20.0}
    row = {"what": ["head"], "launches": 2, "blocks": 8, "float32_operations": 0}
    rows = [
        {"kernel": "linear_forward", "bytes": 4_000_000, "operations": 1_000_000_000, "seconds": 2e-5, **row},
        {"kernel": "layer_norm_forward", "bytes": 8_000_000, "operations": 0, "seconds": 1e-5, **row},
    ]
    return {
        "conditions": {
            "card": "NVIDIA Made-Up",
            "cupy": "14.2.0",
            "torch": "2.13.0+cu130",
            "cuda_runtime": 13020,
            "nvidia_smi": {"before": [{"driver_version": "580.1"}], "after": "nvidia-smi is not there"},
        },
        "settings": {"batches": [64, 256]},
        "training": [
            {"precision": "float32", **training, "seconds": [2.0, 2.5, 3.5]},
            {"precision": "tf32", "epochs": 10, "failed": "ValueError: no such thing"},
        ],
        "steps": [
            {
                "batch": 64,
                "precision": "float32",
                "contestants": {
                    "graph": figures(0.2, 1),
                    "launches": figures(0.5, 2.5),
                    "torch": figures(2.2, 11),
                    "torch-graph": {"failed": "RuntimeError: out of luck"},
                    "torch-compiled": figures(0.3, 1.5),
                },
            },
            {
                "batch": 256,
                "precision": "bfloat16",
                "contestants": {
                    "graph": {"failed": "ended, as it took longer than 60 s at turn"},
                    "torch": figures(3, None),
                    "torch-graph": {"absent": "ImportError: No module named 'torch'"},
                    "torch-compiled": {"left_out": "no time for it in 7.5 minutes"},
                },
            },
        ],
        "ceilings": {"copy": 2e12, "gap": 1e-6, "float32": 5e13, "tf32": "CUBLASError: no luck"},
        "kernels": [
            {"batch": 64, "precision": "float32", "rows": rows},
            {"batch": 64, "precision": "tf32", "rows": rows},
            {"batch": 256, "precision": "bfloat16", "failed": "ValueError: bad"},
        ],
        "minutes": 7.0,
    }


def test_gpu_prints_a_recorded_run(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(json.dumps(made_up()))
    printed = run("gpu", "--recorded", path).stdout
    assert "10 epochs, float32: 2.50 (2.25-3.00) s in 3 runs, 60,000 images in batches of 64, training" in printed
    assert "training accuracy 98.00 % in the last epoch" in printed
    assert "10 epochs, tf32: failed: ValueError: no such thing" in printed
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert "PyTorch eager 2.200 (1.980-2.420) 11.00 (9.90-12.10) 100 3.0 s" in lines
    assert "PyTorch eager 3.000 (2.700-3.300) 100 3.0 s" in lines
    assert "PyTorch eager, the whole step in one CUDA graph failed: RuntimeError: out of luck" in lines
    assert (
        'PyTorch, torch.compile(mode="max-autotune") left out: no time for it in 7.5 minutes' in lines
    )
    # 4 MB at 2 TB/s take 2 us, 8 MB take 4 us, and 1 GFLOP at 50 TFLOP/s takes 20 us.
    assert "linear_forward head 2 8 20.00 20.00 1.0 40.0 operations" in lines
    assert "layer_norm_forward head 2 8 10.00 4.00 2.5 20.0 bytes" in lines
    assert "4 launches, together 60 us, their floors 48 us" in lines
    assert "4 launches, together 60 us" in lines  # tf32 without a measured speed
    assert (
        "a step of the graph takes 200 us: 56 in kernels and 144 between them; 4 launches of an empty kernel take 4"
        in lines
    )
    assert "float32 10 epochs 2.50 s; torch 11.00 (9.90-12.10)x, aim; torch-compiled 1.50 (1.35-1.65)x, goal" in lines
    assert "the kernels of a step, batch 256, bfloat16: failed: ValueError: bad" in lines


def test_a_floor_needs_both_ceilings():
    row = {"bytes": 10, "operations": 100, "float32_operations": 0}
    assert gpu.floor(row, "tf32", {"copy": 5, "tf32": 100}) == (2, "bytes")
    assert gpu.floor(row, "tf32", {"copy": 100, "tf32": 10}) == (10, "operations")
    assert gpu.floor(row, "tf32", {"copy": 5, "tf32": "CUBLASError"}) == (None, "")
    assert gpu.floor(row, "tf32", {"failed": "everything"}) == (None, "")
    attention = {"bytes": 10, "operations": 0, "float32_operations": 100}
    assert gpu.floor(attention, "tf32", {"copy": 5, "float32": 25, "tf32": "CUBLASError"}) == (4, "operations")


def test_the_results_say_what_a_card_did_or_that_none_was_asked():
    table = tables.gpu_table(made_up())
    assert "| batch 64, float32 | 2.5 s | **0.200 ms** | 11.00x (9.90-12.10) |" in table
    assert "| batch 256, bfloat16 | | failed | " in table
    assert "not there" in table
    assert "NVIDIA Made-Up" in table
    assert "driver 580.1" in table
    assert "not measured on a real card yet" in tables.gpu_table(None)


def test_the_pytorch_steps_of_gpu_train_as_on_a_cpu():
    pytest.importorskip("torch")
    ours = gpu_work.TorchSteps("eager", device="cpu")
    ours.build(4, "float32", 1, 100)
    batches = [(pixels.numpy(), labels.numpy()) for pixels, labels in ours.batches]
    config = ViTConfig(depth=1)
    theirs = peers.torch_train_step(config, initialise(config), batches, gpu_work.RATE, threads=1)
    losses = [theirs() for _ in range(9)]
    assert ours.steps(4) > 0  # after five steps of `build`
    assert float(ours.loss.detach()) == pytest.approx(losses[-1], rel=1e-4)
    assert ours.build(4, "bfloat16", 1, 100) > 0
    assert ours.turn(2)[1] == pytest.approx(losses[-1], rel=0.05)  # two uncounted steps and two


# ---- processes ----

REMOTE = """
import os, time

class Thing:
    def __init__(self, broken=False):
        print("building")
        if broken:
            import torch_is_not_here
    def double(self, number):
        return 2 * number
    def fail(self):
        print("nearly there")
        raise ValueError("no such luck\\nand more")
    def die(self):
        os._exit(3)
    def wait(self):
        time.sleep(60)
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    (tmp_path / "remote_thing.py").write_text(REMOTE)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(**arguments):
        made.append(turns.Remote("remote_thing", "Thing", seconds=60, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_remote_answers(remote):
    one = remote()
    assert [one.call("double", n, seconds=60) for n in (3, "ab")] == [6, "abab"]


@pytest.mark.parametrize(
    ("method", "seconds", "kind", "text"),
    [
        ("fail", 60, "ValueError", "ValueError: no such luck"),
        ("die", 60, "ended", "the process died in die, exit code 3"),
        ("wait", 0.2, "ended", "ended because it took longer than 0.2 s in wait"),
    ],
)
def test_a_failed_remote_reports_the_error_and_ends(remote, method, seconds, kind, text):
    one = remote()
    with pytest.raises(turns.RemoteError) as caught:
        one.call(method, seconds=seconds)
    assert (caught.value.kind, str(caught.value)) == (kind, text)
    assert caught.value.log.startswith("building") or method == "die"  # os._exit writes no buffered output
    assert not one._process.is_alive()
    with pytest.raises(turns.RemoteError, match="the process is gone"):
        one.call("double", 1, seconds=60)


def test_a_remote_that_cannot_be_built(remote):
    with pytest.raises(turns.RemoteError, match="No module named 'torch_is_not_here'") as caught:
        remote(broken=True)
    assert caught.value.kind == "ModuleNotFoundError"  # "absent" only for a peer


def test_a_remote_whose_peer_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "needs_torch.py").write_text("raise ImportError('torch is hidden', name='torch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(turns.RemoteError, match="torch is hidden") as caught:
        turns.Remote("needs_torch", "Thing", seconds=60)
    assert caught.value.kind == "absent"


# ---- the page's server ----


def test_serving_many_clients(tmp_path):
    pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install -e '.[app,app-test]'")
    pytest.importorskip("fastapi", reason="the page needs fastapi: pip install -e '.[app,app-test]'")
    path = tmp_path / "found.json"
    run("serve", "--clients", 1, 20, "--seconds", 2, "--batch", 8, "--json", path)
    one, many = json.loads(path.read_text())["records"]
    assert (one["clients"], many["clients"], many["batch"]) == (1, 20, 8)
    for record in (one, many):
        assert (record["errors"], record["first_errors"]) == (0, [])
        assert record["predictions"] > 10
        times = record["milliseconds"]
        assert 0 < times["median"] <= times["p90"] <= times["p99"] <= times["most"]
        assert record["drawings_read_rightly"] == "50 of 50"
        assert 0 < record["cores_had"]["server"] < 64
        took = record["predictions"] * record["milliseconds_of_a_core_each"]["server"] / 1e3
        assert took == pytest.approx(record["cores_had"]["server"] * record["seconds"], rel=0.2, abs=0.05)
    memory = many["server_megabytes"]
    assert memory["most"] < memory["before"] + 100


def test_serving_counts_wrong_answers_and_lost_connections():
    """The server gives the right digit, another digit, status 503, and then closes the connection."""
    serve = importlib.import_module("serve")

    async def bad_server(reader, writer):
        for answer in ((200, b'{"digit":1,'), (200, b'{"digit":2,'), (503, b"{}")):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            status, body = answer
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
        writer.close()

    async def ask():
        server = await asyncio.start_server(bad_server, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        latencies, errors = [], []
        request = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}"
        await serve.client(port, [(request, b'{"digit":1')], time.monotonic() + 5, latencies, errors)
        server.close()
        await server.wait_closed()
        return latencies, errors

    latencies, errors = asyncio.run(ask())
    assert len(latencies) == 3
    assert [error.split(":")[0] for error in errors] == ["200", "503", "IncompleteReadError"]


# ---- --help ----

SCRIPTS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "argparse" in path.read_text()]


@pytest.fixture
def not_installed(tmp_path):
    """Return an environment in which an installed tinyvit is broken."""
    (tmp_path / "tinyvit").mkdir()
    (tmp_path / "tinyvit" / "__init__.py").write_text("raise ImportError('not the tinyvit of the checkout')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_can_be_read_in_a_checkout_that_is_not_installed(script, not_installed):
    assert "usage: " in run(script, "--help", env=not_installed).stdout


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_memory(tmp_path):
    path, small = tmp_path / "found.json", ("--epochs", 1, "--train-limit", 200, "--test-limit", 50, "--workers", 2)
    run("memory", "--json", path, "--", *small)
    found = json.loads(path.read_text())
    assert 100 < max(found["processes"]) <= found["peak_megabytes"] < 350
    if compiled_loops() is not None:  # LLVM takes about 100 MB in each process
        assert found["peak_megabytes"] < found["compiled_loops"]["peak_megabytes"] < 650
