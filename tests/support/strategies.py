"""Random arrays and parameters, settings for Hypothesis, and assertions about pairs of functions."""

import contextlib
import functools
import math
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tinyvit import ops, reference
from tinyvit.memory import Workspace
from tinyvit.parameters import Parameters

SHAPES = settings(max_examples=15, deadline=None, derandomize=True)
VALUES = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = 1e-7  # of central differences: a right gradient has an error of 1e-11 to 1e-9, a wrong one of 1e-4 to 1
EQUAL = 1e-12  # of results that differ only in the order of their sums: their errors are 1e-16 to 1e-14

small = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)


def normal(seed, *shapes, dtype=np.float64):
    """Draw standard normal arrays of these shapes. Return a list, or the array if there is one shape."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]


def image_shape(config, batch):
    """Return the shape of a batch of images."""
    return batch, *config.image_shape, *[config.channels] * (config.channels > 1)


def random_parameters(config, seed=0, dtype=np.float64):
    """Draw every parameter. The zeros and ones of an initialisation would hide wrong terms."""
    shapes = config.shapes()
    flat = normal(seed, (sum(math.prod(shape) for shape in shapes.values()),))
    return Parameters(shapes, (0.5 * flat).astype(dtype))


@contextlib.contextmanager
def reference_with(config):
    """Let `tinyvit.reference` use the epsilon and the GELU of a configuration, and yield its other settings."""
    settings = {"layer_norm_forward": functools.partial(reference.layer_norm_forward, epsilon=config.epsilon)}
    if config.gelu == "tanh":
        settings |= {"gelu_forward": ops.gelu_tanh_forward, "gelu_backward": ops.gelu_backward}
    with mock.patch.multiple(reference, **settings):
        yield {
            "heads": config.heads,
            "patch_size": config.patch_size,
            "mean": config.pixel_mean,
            "deviation": config.pixel_deviation,
        }


def decayed_adam_step(weights, gradient, m, v, step, learning_rate, decay=0.0, decayed=1.0, **settings):
    """Return weights, m and v after `reference.adam_step` and the decoupled decay of the old weights.

    The source is algorithm 2 of Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    parameters, first, second = {"w": weights.copy()}, {"w": m}, {"w": v}
    reference.adam_step(parameters, {"w": gradient}, first, second, step, learning_rate, **settings)
    return parameters["w"] - learning_rate * decay * decayed * weights, first["w"], second["w"]


def plain_adam(weights, gradients, learning_rate, **settings):
    """Return the weights after one `decayed_adam_step` per gradient. The moments start at 0."""
    m = v = np.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        weights, m, v = decayed_adam_step(weights, gradient, m, v, step, learning_rate, **settings)
    return weights


def assert_float32_agrees(function, inputs, tolerance=2e-5):
    """Assert that `function` gives float32 for float32, close to its results in float64."""
    single = function(*(x.astype(np.float32) for x in inputs))
    for got, expected in zip(single, function(*inputs), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=tolerance * max(1, np.abs(expected).max()))


class PoisonedWorkspace(Workspace):
    """All memory is new and full of NaN, which shows if it is read before it is written."""

    def empty(self, shape, dtype, xp):
        return xp.full(shape, np.nan, dtype=dtype)


def assert_workspace_changes_nothing(compute, is_used=True):
    """Assert that `compute` returns the same bits in plain, in reused and in poisoned memory.

    A second call in a workspace may need no new memory. The first call must need some, if `is_used` is true.
    """
    expected = [array.tobytes() for array in compute()]
    workspace = Workspace()
    free = []
    for _ in range(3):
        with workspace:
            results = compute()
        assert [array.tobytes() for array in results] == expected
        del results
        free.append({size: len(blocks) for size, blocks in workspace._free.items()})
        assert (sum(free[-1].values()) > 0) == is_used
    assert free[0] == free[1] == free[2]
    with PoisonedWorkspace():
        assert [array.tobytes() for array in compute()] == expected
