"""The benchmarks run, count rightly, and measure peers that compute what this library does."""

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

from tinyvit.model import VisionTransformer, ViTConfig, initialise
from tinyvit.optim import Adam
from tinyvit.parallel import ShardedGradient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
peers, turns, scaling, inference, time_to_accuracy = (
    importlib.import_module(name) for name in ("peers", "turns", "scaling", "inference", "time_to_accuracy")
)

TINY = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, heads=3, mlp_width=20, classes=4)
LEARNING_RATE = 1e-2
PNG = b"\x89PNG\r\n\x1a\n"


# ---- the commands ----


@pytest.fixture
def no_peers(tmp_path):
    """An environment in which no peer is installed, whether or not one is."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    for name in ("torch", "jax", "onnx", "onnxruntime"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is hidden', name='{name}')\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def run(script, *arguments, env=None, expect=0):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def one_record(path):
    """Return the only record of a benchmark's JSON, which says under what conditions it was made."""
    found = json.loads(path.read_text())
    assert {"numpy", "blas", "cpu", "environment", "command"} <= set(found["conditions"])
    (record,) = found["records"]
    return record


def assert_rising(values):
    assert 0 < values[0] <= values[1] <= values[2]


def test_train_step(tmp_path, no_peers):
    path = tmp_path / "found.json"
    quick = ("8x20", "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--json", path)
    done = run("train_step", *quick, "--only", "products", "torch", "jax", env=no_peers)
    assert "PyTorch eager: skipped, not installed (torch is hidden)" in done.stdout
    assert "JAX jit: skipped, not installed (jax is hidden)" in done.stdout
    record = one_record(path)
    assert list(record["contestants"]) == ["tinyvit", "products"]
    assert record["contestants"]["tinyvit"]["times_tinyvit"] == [1, 1, 1]
    for figures in record["contestants"].values():
        assert_rising(figures["milliseconds"])


def test_inference(tmp_path, no_peers):
    path = tmp_path / "found.json"
    quick = ("--images", 100, "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--json", path)
    done = run("inference", *quick, "--batch", 20, 50, "--only", "torch", "onnx", env=no_peers)
    assert "PyTorch eager: skipped, not installed (torch is hidden)" in done.stdout
    assert "ONNX Runtime: skipped, not installed (onnxruntime is hidden)" in done.stdout
    record = one_record(path)
    (figures,) = record["contestants"].values()
    assert_rising(figures["milliseconds"])
    assert figures["images_per_second"] == pytest.approx(1e3 * 100 / figures["milliseconds"][1])
    assert figures["milliseconds_by_batch"].keys() == {"20", "50"}
    assert str(figures["batch"]) == min(figures["milliseconds_by_batch"], key=figures["milliseconds_by_batch"].get)


def test_inference_refuses_a_batch_that_would_leave_a_smaller_one():
    done = run("inference", "--images", 100, "--batch", 64, expect=2)
    assert "--batch must divide 100 images, as 64 does not" in done.stderr


def test_inference_refuses_a_contestant_that_computes_something_else():
    expected = inference.expected_logits(8, 20)
    with pytest.raises(ValueError, match=r"tinyvit gives other logits than tinyvit: 0\.01 apart"):
        inference.classify_step("tinyvit", 8, 20, 10, 1, expected + 0.01, None)
    with pytest.raises(ValueError, match="nan apart"):
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
    assert "2 epochs, seed 0: epoch 1 done" in done.stdout
    found = json.loads(path.read_text())
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


# ---- what they reckon with ----


def test_quartiles():
    assert turns.quartiles([7.0]) == [7, 7, 7]
    assert turns.quartiles([5, 1, 4, 2, 3]) == [2, 3, 4]


def test_a_ratio_is_taken_round_by_round():
    slower, faster = SimpleNamespace(seconds=[2, 40, 6]), SimpleNamespace(seconds=[1, 10, 2])
    assert turns.ratio(slower, faster) == [2.5, 3, 3.5]
    with pytest.raises(ValueError, match="shorter"):
        turns.ratio(slower, SimpleNamespace(seconds=[1]))


def test_the_memory_of_a_process_and_of_those_it_started():
    if not Path("/proc/self/task").is_dir():
        pytest.skip("only Linux says")
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


def test_operations_done_are_the_plain_ones_but_for_the_last_block():
    def count(depth):
        config = scaling.model(width=128, depth=depth, patch=7)
        return peers.operations(peers.matrix_products(config, 4)), scaling.operations_done(config, 4)

    (plain_1, done_1), (plain_2, done_2) = count(1), count(2)
    assert done_1 < plain_1 / 2
    assert 1 < (done_2 - done_1) / (plain_2 - plain_1) < 1.03  # sums are matrix products as well: a little more


# ---- the peers compute what this library does ----


@pytest.fixture
def weights():
    """Parameters of the tiny model, all of them random: ones and zeros would hide a mistake."""
    parameters = initialise(TINY, seed=1)
    parameters.flat[...] += 0.1 * np.random.default_rng(2).standard_normal(parameters.flat.shape)
    return parameters


@pytest.fixture
def batches():
    """Two batches of images in 0 to 1, and labels."""
    rng = np.random.default_rng(3)
    return [(rng.random((6, 8, 8), np.float32), rng.integers(0, 4, 6)) for _ in range(2)]


def normalised(pixels):
    return (pixels - TINY.pixel_mean) / TINY.pixel_deviation


def losses_of_this_library(weights, batches, steps):
    parameters = weights.with_flat(weights.flat.copy())
    adam, losses = Adam(parameters.flat), []
    with ShardedGradient(TINY, 1) as sharded_gradient:
        for i in range(steps):
            images, labels = batches[i % len(batches)]
            load = lambda start, stop, x=images, y=labels: (x[start:stop], y[start:stop])  # noqa: E731
            loss, _, gradient = sharded_gradient(parameters, load, 0, len(images))
            adam.step(parameters.flat, gradient.flat, LEARNING_RATE)
            losses.append(float(loss))
    return losses


def assert_same_training(step, weights, batches):
    ours = losses_of_this_library(weights, batches, 3)
    assert abs(ours[2] - ours[0]) > 0.01  # the steps make a difference, which is not lost in the tolerance
    np.testing.assert_allclose([step() for _ in range(3)], ours, atol=1e-4)


@pytest.mark.parametrize("shortcut", [False, True])
def test_torch_gives_the_same_logits(weights, batches, shortcut):
    torch = pytest.importorskip("torch")
    images, _ = batches[0]
    ours = VisionTransformer(TINY, weights).logits(images)
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
    ours = VisionTransformer(TINY, weights).logits(images)
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
    for count in (1, 2, 6):  # the second and third from the file that the first has written
        logits = peers.onnx_logits(TINY, weights, 1, tmp_path)(normalised(images[:count]))
        np.testing.assert_allclose(logits, VisionTransformer(TINY, weights).logits(images[:count]), atol=1e-4)


def test_inference_beside_a_peer(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "found.json"
    quick = ("--images", 100, "--batch", 50, "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--json", path)
    run("inference", *quick, "--only", "torch")
    record = one_record(path)
    assert list(record["contestants"]) == ["tinyvit", "torch"]
    assert_rising(record["contestants"]["torch"]["times_tinyvit"])


# ---- the page's server ----


def test_serving_a_crowd(tmp_path):
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
    """A server that answers each third request with another digit, and then with a 503, and then not at all."""
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


# ---- what a stranger reads first ----

SCRIPTS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "argparse" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_can_be_read(script):
    assert "usage: " in run(script, "--help").stdout


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_memory(tmp_path):
    path, small = tmp_path / "found.json", ("--epochs", 1, "--train-limit", 200, "--test-limit", 50, "--workers", 2)
    run("memory", "--json", path, "--", *small)
    found = json.loads(path.read_text())
    assert 100 < max(found["processes"]) <= found["peak_megabytes"] < 350
