"""A training step in kernels is the step of the plain operations; K steps of the graph are K launched ones."""

import emulate
import numpy as np
import pytest
import strict_cupy
from strategies import image_shape
from strict_cupy import no_synchronisation

from tinyvit.backend import to_host
from tinyvit.data.augment import Augmentation
from tinyvit.data.batches import draw_order
from tinyvit.kernels import Kernels, KernelStep
from tinyvit.model import ViTConfig, loss_and_gradient
from tinyvit.training import TrainingConfig
from tinyvit.training.state import new_state
from tinyvit.training.step import PlainStep

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER),
]

COLOURS = {"image_size": (8, 12), "patch_size": (4, 3), "channels": 3, "pixel_mean": (0.4, 0.5, 0.3)}
SMALL = ViTConfig(image_size=8, patch_size=4, width=40, depth=3, heads=2, mlp_width=72, classes=5)
EVERYTHING = Augmentation(rotation=20, scale=0.2, shear=10, shift=1.5, flip=0.3)
STEPS, BATCH, LAST = 3, 6, 4
COUNT = BATCH * (STEPS - 1) + LAST


class Run:
    """A state, a training set and settings, the same for every kind of step."""

    def __init__(self, backend, model_config, augmentation=EVERYTHING, seed=0, clip=0.5):
        rng = np.random.default_rng(seed)
        self.backend, self.model_config = backend, model_config
        self.images = rng.integers(0, 256, image_shape(model_config, COUNT), dtype=np.uint8)
        self.labels = rng.integers(0, model_config.classes, COUNT, dtype=np.uint8)
        self.config = TrainingConfig(
            epochs=3,
            batch_size=BATCH,
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=0.1,
            clip=clip,
            smoothing=0.1,
            average=0.9,
            validation=0,
            seed=seed,
            augmentation=augmentation or Augmentation(),
        )
        self.state = new_state(model_config, self.config, backend)
        self.state.parameters.flat += backend.asarray(
            rng.normal(0, 0.05, self.state.parameters.flat.shape), np.float32
        )

    def plain_step(self):
        return PlainStep(self.state, self.images, self.labels, self.model_config, self.config, self.backend)

    def kernel_step(self, precision="float32", graph=False):
        kernels = Kernels(self.backend, self.model_config, precision)
        return KernelStep(kernels, self.state, self.images, self.labels, self.config, graph=graph)

    def arrays(self):
        return [to_host(array).copy() for array in self.state.arrays().values()]


def take(step, epochs=1):
    """Take the steps of some epochs; return the totals of the last."""
    with step:
        for epoch in range(epochs):
            step.begin_epoch(epoch)
            with no_synchronisation():
                assert [step() for _ in range(STEPS)] == [BATCH] * (STEPS - 1) + [LAST]
        return step.totals()


def relative(a, b):
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("augmentation", [EVERYTHING, None], ids=["augmented", "as they are"])
@pytest.mark.parametrize("changes", [{}, {"gelu": "tanh"}, COLOURS], ids=["small", "tanh", "colours"])
def test_a_step_in_kernels_is_the_plain_step(accelerator, cpu, augmentation, changes):
    config = ViTConfig(**{**SMALL.as_dict(), **changes})
    plain, kernels = Run(cpu, config, augmentation), Run(accelerator, config, augmentation)
    before = plain.arrays()
    expected, got = take(plain.plain_step()), take(kernels.kernel_step())
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_changes(kernels, plain, before, 2e-4)
    assert kernels.state.adam.steps == plain.state.adam.steps == STEPS
    assert kernels.state.average.steps == plain.state.average.steps == 1


def assert_same_changes(kernels, plain, before, tolerance):
    """Weights, moments and average have changed from `before` in the one run as in the other."""
    # no query sees the bias of the keys (a softmax does not see what is added to all scores): its gradient is zero,
    # and what Adam makes of it is rounding
    config = kernels.model_config
    blind = kernels.state.parameters.with_flat(np.zeros(before[0].shape, bool))
    for i in range(config.depth):
        blind[f"blocks.{i}.attention.qkv.bias"][config.width : 2 * config.width] = True
    for mine, theirs, start in zip(kernels.arrays(), plain.arrays(), before, strict=True):
        assert relative((mine - start)[~blind.flat], (theirs - start)[~blind.flat]) < tolerance


def gradient_in_float64(run):
    """Return the gradient of the first step of an epoch that changes nothing in its images."""
    order, _ = draw_order(COUNT, run.config.seed, 0)
    chosen = order[:BATCH]
    parameters = run.state.parameters.with_flat(to_host(run.state.parameters.flat).astype(np.float64))
    _, _, gradients = loss_and_gradient(
        run.images[chosen], run.labels[chosen], parameters, run.model_config, run.config.smoothing
    )
    return gradients.flat


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("float32", 0, 3e-6), ("tf32", 1e-5, 3e-3), ("bfloat16", 1e-4, 3e-2)]
)
def test_a_precision_is_as_good_as_it_says_and_no_better(accelerator, precision, least, most):
    run = Run(accelerator, SMALL, augmentation=None)
    expected = gradient_in_float64(run)
    step = run.kernel_step(precision)
    step.begin_epoch(0)
    step()
    error = relative(to_host(step.gradient), expected)
    assert least <= error < most, error


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_of_the_graph_are_launched_steps_bit_for_bit(accelerator, precision):
    runs = [Run(accelerator, SMALL) for _ in range(2)]
    steps = [run.kernel_step(precision, graph) for run, graph in zip(runs, (True, False), strict=True)]
    assert take(steps[0], epochs=3) == take(steps[1], epochs=3)
    for recorded, launched in zip(runs[0].arrays(), runs[1].arrays(), strict=True):
        np.testing.assert_array_equal(recorded, launched)
    assert set(steps[0]._graphs) == {BATCH, LAST}  # both sizes were recorded, and replayed in the third epoch
    assert steps[1]._graphs == {}


def test_an_epoch_that_is_begun_in_the_middle_resumes_bit_for_bit(accelerator):
    whole, halves = Run(accelerator, SMALL), Run(accelerator, SMALL)
    expected = take(whole.kernel_step())
    first = halves.kernel_step()
    first.begin_epoch(0)
    first()
    second = halves.kernel_step()
    second.begin_epoch(0, done=1, totals=first.totals())
    second()
    second()
    assert second.totals() == expected
    for mine, theirs in zip(halves.arrays(), whole.arrays(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["plain_step", "kernel_step"])
@pytest.mark.parametrize("done", [-1, STEPS + 1])
def test_a_place_outside_the_epoch_is_refused(accelerator, kind, done):
    with pytest.raises(ValueError, match=f"done must be in 0 to 3, the steps of an epoch, not {done}"):
        getattr(Run(accelerator, SMALL), kind)().begin_epoch(0, done)


def test_one_step_of_the_notes_model(strict_gpu):
    run = Run(strict_gpu, ViTConfig(), augmentation=None)
    expected = gradient_in_float64(run)
    step = run.kernel_step()
    step.begin_epoch(0)
    step()
    assert relative(to_host(step.gradient), expected) < 3e-6


def test_epochs_of_other_orders_and_maps_go_through_one_graph(accelerator, cpu):
    """What changes from epoch to epoch is read from memory: a graph that kept an epoch's own would repeat it."""
    plain, kernels = Run(cpu, SMALL), Run(accelerator, SMALL)
    before = plain.arrays()
    plain_step, kernel_step = plain.plain_step(), kernels.kernel_step(graph=True)
    with plain_step:
        for epoch in range(3):
            totals = []
            for step in (plain_step, kernel_step):
                step.begin_epoch(epoch)
                with no_synchronisation():
                    for _ in range(STEPS):
                        step()
                totals.append(step.totals())
            np.testing.assert_allclose(totals[1], totals[0], rtol=1e-5)
    assert_same_changes(kernels, plain, before, 1e-3)


def test_of_the_steps_of_three_epochs_all_but_the_first_of_each_size_are_the_graphs(strict_gpu, monkeypatch):
    launched = []
    launch = strict_cupy.Graph.launch
    monkeypatch.setattr(strict_cupy.Graph, "launch", lambda *arguments: launched.append(launch(*arguments)))
    take(Run(strict_gpu, SMALL).kernel_step(graph=True), epochs=3)
    assert len(launched) == 3 * STEPS - 2
    take(Run(strict_gpu, SMALL).kernel_step(graph=False), epochs=3)
    assert len(launched) == 3 * STEPS - 2


@pytest.mark.parametrize("kind", ["plain_step", "kernel_step"])
def test_a_step_beyond_the_epoch_is_refused(accelerator, kind):
    step = getattr(Run(accelerator, SMALL), kind)()
    with step:
        with pytest.raises(IndexError, match="the epoch has no step left: call begin_epoch first"):
            step()  # no epoch has begun
        step.begin_epoch(0)
        for _ in range(STEPS):
            step()
        with pytest.raises(IndexError, match="no step left"):
            step()
    if kind == "kernel_step":
        assert to_host(step._counter).tolist() == [STEPS]


def test_a_step_that_fails_while_it_is_recorded_leaves_nothing_behind(strict_gpu, monkeypatch):
    step = Run(strict_gpu, SMALL).kernel_step(graph=True)
    step.begin_epoch(0)
    step()
    with monkeypatch.context() as patched:
        patched.setattr(step.kernels, "adam_step", lambda **arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step()
    assert step._graphs == {}
    assert strict_cupy._captured is None
    step.begin_epoch(0)
    step()
    assert set(step._graphs) == {BATCH}


def test_a_graph_whose_arrays_are_gone_is_found_out(strict_gpu):
    """A graph keeps no array alive: the step must own them all."""
    step = Run(strict_gpu, SMALL).kernel_step(graph=True)
    step.begin_epoch(0)
    step()
    step()
    step.begin_epoch(1)
    step()  # a replay
    del step._buffers[BATCH]
    with pytest.raises(RuntimeError, match="memory that has been given back"):
        step()


def test_nothing_but_its_own_arrays_is_needed_by_a_step(strict_gpu):
    step = Run(strict_gpu, SMALL).kernel_step(graph=True)  # the run itself is gone
    assert np.isfinite(take(step, epochs=3)).all()


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_weight_that_is_not_a_number_is_found_in_the_totals(accelerator, clip):
    run = Run(accelerator, SMALL, clip=clip)
    run.state.parameters["head.weight"][0, 0] = np.nan
    assert np.isnan(take(run.kernel_step())[0])
