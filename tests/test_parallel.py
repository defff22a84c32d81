"""Sharding changes nothing: the gradient of the whole batch, the same bits every time, BLAS threads given back."""

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from tinyvit.model import ViTConfig, initialise, vit_backward, vit_forward
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward
from tinyvit.parallel import SHARD_SIZE, ShardedGradient, cut

CONFIG = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, mlp_width=12, classes=5)
RNG = np.random.default_rng(0)
IMAGES = RNG.random((100, 8, 8))
LABELS = RNG.integers(0, 5, 100)


def load(start, stop):
    return IMAGES[start:stop], LABELS[start:stop]


def parameters(dtype=np.float64):
    result = initialise(CONFIG, dtype=dtype)
    result.flat += 0.1 * np.random.default_rng(1).standard_normal(result.flat.shape).astype(dtype)
    return result


def whole(start, stop, smoothing=0.1):
    weights = parameters()
    images, labels = load(start, stop)
    logits, cache = vit_forward(images, weights, CONFIG)
    loss, loss_cache = cross_entropy_forward(logits, labels, smoothing)
    correct = (logits.argmax(axis=1) == labels).sum()
    return loss, correct, vit_backward(cross_entropy_backward(1.0, loss_cache), cache)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize(("start", "stop"), [(0, 100), (3, 68), (10, 12), (99, 100)])
def test_shards_give_the_loss_and_gradient_of_the_whole(workers, start, stop):
    with ShardedGradient(CONFIG, workers, smoothing=0.1) as sharded:
        for _ in range(2):  # the second time in the buffers of the first
            loss, correct, gradient = sharded(parameters(), load, start, stop)
            expected_loss, expected_correct, expected = whole(start, stop)
            np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
            assert correct == expected_correct
            np.testing.assert_allclose(gradient.flat, expected.flat, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("workers", [2, 5])
def test_the_same_bits_whatever_the_timing(workers):
    weights = parameters(np.float32)
    with ShardedGradient(CONFIG, workers) as sharded:
        first = sharded(weights, load, 0, 100)[2].flat.copy()
        for _ in range(20):
            np.testing.assert_array_equal(sharded(weights, load, 0, 100)[2].flat, first)


def test_one_worker_and_two_give_the_same_bits_for_a_batch_of_two_shards():
    weights = parameters(np.float32)
    gradients = []
    for workers in (1, 2):
        with ShardedGradient(CONFIG, workers) as sharded:
            gradients.append(sharded(weights, load, 0, 2 * SHARD_SIZE)[2].flat.copy())
    np.testing.assert_array_equal(*gradients)


def test_weights_are_only_read():
    weights = parameters()
    before = weights.flat.copy()
    with ShardedGradient(CONFIG, 2) as sharded:
        sharded(weights, load, 0, 64)
    np.testing.assert_array_equal(weights.flat, before)


def test_blas_has_one_thread_inside_and_its_own_after():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        with ShardedGradient(CONFIG, 2):
            assert set(threads()) == {1}
        assert threads() == before


def test_an_error_in_a_shard_reaches_the_caller():
    def broken(start, stop):
        if start > 0:
            raise RuntimeError("this shard cannot be read")
        return load(start, stop)

    with ShardedGradient(CONFIG, 2) as sharded, pytest.raises(RuntimeError, match="this shard cannot be read"):
        sharded(parameters(), broken, 0, 64)


def test_cut_covers_every_place_once_in_even_shards():
    for count in range(1, 200):
        for workers in (1, 2, 3, 8):
            shards = cut(5, 5 + count, workers)
            assert [p for start, stop in shards for p in range(start, stop)] == list(range(5, 5 + count))
            sizes = [stop - start for start, stop in shards]
            assert max(sizes) <= SHARD_SIZE
            assert max(sizes) - min(sizes) <= 1
            assert len(shards) >= min(workers, count)


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        ShardedGradient(CONFIG, 0)


def test_it_works_as_a_context_only_and_one_at_a_time():
    sharded = ShardedGradient(CONFIG, 2)
    with pytest.raises(RuntimeError, match="as a context"):
        sharded(parameters(), load, 0, 10)
    with sharded, pytest.raises(RuntimeError, match="in use already"), sharded:
        pass
    with pytest.raises(RuntimeError, match="as a context"):
        sharded(parameters(), load, 0, 10)
