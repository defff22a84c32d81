"""A training step in kernels is the step of the plain operations; K steps of the graph are K launched ones."""

import emulate
import numpy as np
import pytest
import strict_cupy
from conftest import to_device
from strict_cupy import no_synchronisation

from tinyvit.backend import to_host
from tinyvit.data.augment import Augmentation, warp
from tinyvit.kernels import Kernels, KernelStep
from tinyvit.model import ViTConfig, initialise, loss_and_gradient
from tinyvit.optim import Adam, ExponentialMovingAverage, clip_by_global_norm, matrices_only

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER)

SMALL = ViTConfig(image_size=8, patch_size=4, width=40, depth=3, heads=2, mlp_width=72, classes=5)
EVERYTHING = Augmentation(rotation=20, scale=0.2, shear=10, shift=1.5, flip=0.3)
STEPS, BATCH, LAST = 3, 6, 4


class Run:
    """Weights, moments, data and an epoch's schedule, the same for whoever takes the steps."""

    def __init__(self, backend, config, augmentation=EVERYTHING, seed=0, smoothing=0.1, clip=0.5):
        rng = np.random.default_rng(seed)
        count = BATCH * (STEPS - 1) + LAST
        self.config, self.smoothing, self.clip, self.backend = config, smoothing, clip, backend
        side = config.image_size
        self.host_images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        self.host_labels = rng.integers(0, config.classes, count, dtype=np.uint8)
        self.images, self.labels = to_device(backend, self.host_images, self.host_labels)
        first = initialise(config, seed)
        first.flat[...] += rng.normal(0, 0.05, first.flat.shape)
        self.parameters = first.with_flat(backend.asarray(first.flat))
        self.adam = Adam(self.parameters.flat, weight_decay=0.1, decayed=matrices_only(self.parameters))
        self.average = ExponentialMovingAverage(self.parameters.flat, 0.9)
        self.order = rng.permutation(count)
        self.philox = np.random.Philox(np.random.SeedSequence([seed, 3]))
        self.augmentation = augmentation
        self.rates = [1e-3, 7e-4, 5e-4]
        self.done = 0  # steps in earlier epochs

    def draw(self):
        state = self.philox.state
        first = 4 * int(state["state"]["counter"][0]) + state["buffer_pos"]
        return self.augmentation, tuple(int(k) for k in state["state"]["key"]), first

    def schedule(self):
        rows = []
        for i, rate in enumerate(self.rates, self.done + 1):
            decay = min(0.9, (i - 1) / (i + 8))
            rows.append([rate, rate / (1 - 0.9**i), 1 / np.sqrt(1 - 0.999**i), 1 - decay])
        return np.array(rows, np.float32)

    def plain(self):
        """Take the steps of the epoch with the plain operations; return the totals."""
        totals = np.zeros(2)
        maps = None
        if self.augmentation:
            maps = self.augmentation.draw(np.random.Generator(self.philox), len(self.order))
        for i, rate in enumerate(self.rates):
            places = slice(i * BATCH, min((i + 1) * BATCH, len(self.order)))
            chosen = self.order[places]
            images, labels = self.host_images[chosen], self.host_labels[chosen]
            if maps is not None:
                images = warp(images, maps[places])
            loss, correct, gradients = loss_and_gradient(
                images, labels, self.parameters, self.config, smoothing=self.smoothing
            )
            if self.clip:
                clip_by_global_norm(gradients.flat, self.clip)
            self.adam.step(self.parameters.flat, gradients.flat, rate)
            self.average.step(self.parameters.flat)
            totals += [float(loss) * len(labels), correct]
        return totals

    def kernel_step(self, precision="float32", graph=False):
        return KernelStep(
            Kernels(self.backend, self.config, precision),
            *(self.parameters, self.adam, self.average.average, self.images, self.labels, BATCH),
            *(self.smoothing, self.clip, graph),
        )

    def begin(self, step, done=0, totals=(0.0, 0)):
        step.begin_epoch(self.order, self.draw() if self.augmentation else None, self.schedule(), done, totals)

    def kernels(self, precision="float32", graph=False, epochs=1):
        """Take the steps of some epochs in kernels, all with the same order; return the totals of the last."""
        step = self.step = self.kernel_step(precision, graph)
        for _ in range(epochs):
            self.begin(step)
            with no_synchronisation():
                for _ in range(STEPS - 1):
                    step(BATCH)
                step(LAST)
        return to_host(step.totals)

    def state(self):
        arrays = self.parameters.flat, self.adam.first_moment, self.adam.second_moment, self.average.average
        return [to_host(array).copy() for array in arrays]


def relative(a, b):
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("augmentation", [EVERYTHING, None], ids=["augmented", "as they are"])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_a_step_in_kernels_is_the_plain_step(accelerator, cpu, augmentation, gelu):
    config = ViTConfig(**{**SMALL.as_dict(), "gelu": gelu})
    plain, kernels = Run(cpu, config, augmentation), Run(accelerator, config, augmentation)
    before = plain.state()
    expected, got = plain.plain(), kernels.kernels()
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_changes(kernels, plain, before, 2e-4)


def assert_same_changes(kernels, plain, before, tolerance):
    """Weights, moments and average have changed from `before` in the one run as in the other."""
    # no query sees the bias of the keys (a softmax does not see what is added to all scores): its gradient is zero,
    # and what Adam makes of it is rounding
    blind = kernels.parameters.with_flat(np.zeros(before[0].shape, bool))
    for i in range(kernels.config.depth):
        blind[f"blocks.{i}.attention.qkv.bias"][kernels.config.width : 2 * kernels.config.width] = True
    for mine, theirs, start in zip(kernels.state(), plain.state(), before, strict=True):
        assert relative((mine - start)[~blind.flat], (theirs - start)[~blind.flat]) < tolerance


def gradient_in_float64(run):
    """Return the gradient of the first step of an epoch that changes nothing in its images."""
    chosen = run.order[:BATCH]
    parameters = run.parameters.with_flat(to_host(run.parameters.flat).astype(np.float64))
    images, labels = run.host_images[chosen], run.host_labels[chosen]
    _, _, gradients = loss_and_gradient(images, labels, parameters, run.config, smoothing=run.smoothing)
    return gradients.flat


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("float32", 0, 3e-6), ("tf32", 1e-5, 3e-3), ("bfloat16", 1e-4, 3e-2)]
)
def test_a_precision_is_as_good_as_it_says_and_no_better(accelerator, precision, least, most):
    run = Run(accelerator, SMALL, augmentation=None)
    expected = gradient_in_float64(run)
    step = run.kernel_step(precision)
    run.begin(step)
    step(BATCH)
    error = relative(to_host(step.gradient), expected)
    assert least <= error < most, error


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_of_the_graph_are_launched_steps_bit_for_bit(accelerator, precision):
    runs = [Run(accelerator, SMALL) for _ in range(2)]
    totals = [run.kernels(precision, graph, epochs=3) for run, graph in zip(runs, (True, False), strict=True)]
    np.testing.assert_array_equal(*totals)
    for recorded, launched in zip(runs[0].state(), runs[1].state(), strict=True):
        np.testing.assert_array_equal(recorded, launched)
    assert set(runs[0].step._graphs) == {BATCH, LAST}  # both sizes were recorded, and replayed in the third epoch
    assert runs[1].step._graphs == {}


def test_an_epoch_that_is_begun_in_the_middle_goes_on_bit_for_bit(accelerator):
    whole, halves = Run(accelerator, SMALL), Run(accelerator, SMALL)
    expected = whole.kernels()
    first = halves.kernel_step()
    halves.begin(first)
    first(BATCH)
    second = halves.kernel_step()
    halves.begin(second, 1, [float(total) for total in to_host(first.totals)])
    second(BATCH)
    second(LAST)
    np.testing.assert_array_equal(to_host(second.totals), expected)
    for mine, theirs in zip(halves.state(), whole.state(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_epoch_that_does_not_fit_is_refused(accelerator):
    run = Run(accelerator, SMALL)
    step = run.kernel_step()
    count = len(run.order)
    twice = run.order.copy()
    twice[0] = twice[1]
    for order in (twice, run.order[:-1], run.order + 1, run.order - 1):
        with pytest.raises(ValueError, match=f"the order must have each of the {count} images once"):
            step.begin_epoch(order, None, run.schedule())
    for schedule, done in ((run.schedule()[:2], 0), (run.schedule(), 4), (run.schedule(), -1)):
        with pytest.raises(ValueError, match=r"3 steps need a schedule of \(3, 4\)"):
            step.begin_epoch(run.order, None, schedule, done)
    run.begin(step)
    with pytest.raises(ValueError, match="images are changed in all epochs or in none"):
        step.begin_epoch(run.order, None, run.schedule())


def test_one_step_of_the_notes_model(strict_gpu):
    run = Run(strict_gpu, ViTConfig(), augmentation=None)
    expected = gradient_in_float64(run)
    step = run.kernel_step()
    run.begin(step)
    step(BATCH)
    assert relative(to_host(step.gradient), expected) < 3e-6


def test_epochs_of_other_orders_and_maps_go_through_one_graph(accelerator, cpu):
    """What changes from epoch to epoch is read from memory: a graph that kept an epoch's own would repeat it."""
    plain, kernels = Run(cpu, SMALL), Run(accelerator, SMALL)
    before = plain.state()
    step = kernels.kernel_step(graph=True)
    rng = np.random.default_rng(5)
    for epoch in range(3):
        plain.order = kernels.order = rng.permutation(len(plain.order))
        kernels.rates = plain.rates = [rate / 2 for rate in plain.rates]
        kernels.done = epoch * STEPS
        kernels.begin(step)  # whose maps begin where the generator is
        expected = plain.plain()
        kernels.philox.state = plain.philox.state
        with no_synchronisation():
            for count in (BATCH, BATCH, LAST):
                step(count)
        np.testing.assert_allclose(to_host(step.totals), expected, rtol=1e-5)
    assert_same_changes(kernels, plain, before, 1e-3)


def test_of_the_steps_of_three_epochs_all_but_the_first_of_each_size_are_the_graphs(strict_gpu, monkeypatch):
    launched = []
    launch = strict_cupy.Graph.launch
    monkeypatch.setattr(strict_cupy.Graph, "launch", lambda *arguments: launched.append(launch(*arguments)))
    Run(strict_gpu, SMALL).kernels(graph=True, epochs=3)
    assert len(launched) == 3 * STEPS - 2
    Run(strict_gpu, SMALL).kernels(graph=False, epochs=3)
    assert len(launched) == 3 * STEPS - 2


def test_a_step_beyond_the_epoch_is_refused(accelerator):
    step = Run(accelerator, SMALL).kernel_step()
    with pytest.raises(IndexError, match="0 images of the epoch are left: its next step takes 0, not 6"):
        step(BATCH)  # no epoch has begun
    run = Run(accelerator, SMALL)
    step = run.kernel_step()
    run.begin(step)
    for left, right, wrong in ((16, BATCH, LAST), (10, BATCH, 7), (4, LAST, BATCH), (0, None, LAST)):
        with pytest.raises(IndexError, match=f"^{left} images of the epoch are left"):
            step(wrong)
        if right:
            step(right)
    assert to_host(step._counter).tolist() == [STEPS]


def test_a_step_that_fails_while_it_is_recorded_leaves_nothing_behind(strict_gpu, monkeypatch):
    run = Run(strict_gpu, SMALL)
    step = run.kernel_step(graph=True)
    run.begin(step)
    step(BATCH)
    with monkeypatch.context() as patched:
        patched.setattr(step.kernels, "adam_step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(BATCH)
    assert step._graphs == {}
    assert strict_cupy._captured is None
    run.begin(step)
    step(BATCH)
    assert set(step._graphs) == {BATCH}


def test_a_graph_whose_arrays_are_gone_is_found_out(strict_gpu):
    """A graph keeps no array alive: who takes the steps must own them all."""
    run = Run(strict_gpu, SMALL)
    step = run.kernel_step(graph=True)
    run.begin(step)
    step(BATCH)
    step(BATCH)
    run.begin(step)
    step(BATCH)  # a replay
    del step._buffers[BATCH]
    with pytest.raises(RuntimeError, match="memory that has been given back"):
        step(BATCH)


def test_nothing_but_its_own_arrays_is_needed_by_a_step(strict_gpu):
    """Whoever made the step may forget what went into it."""
    run = Run(strict_gpu, SMALL)
    step = run.kernel_step(graph=True)
    order, draw, schedule = run.order, run.draw(), run.schedule()
    del run
    for _ in range(3):
        step.begin_epoch(order, draw, schedule)
        for count in (BATCH, BATCH, LAST):
            step(count)
    assert np.isfinite(to_host(step.totals)).all()


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_weight_that_is_not_a_number_is_found_in_the_totals(accelerator, clip):
    run = Run(accelerator, SMALL, clip=clip)
    run.parameters["head.weight"][0, 0] = np.nan
    totals = run.kernels()
    assert np.isnan(totals[0])
