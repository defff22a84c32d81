"""Training: it learns, it repeats itself bit for bit, it stops and goes on, and it says what is wrong."""

import math
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import strict_cupy
from strategies import decayed_adam_step

import tinyvit.training.loop
from tinyvit.backend import to_host, use_loops
from tinyvit.checkpoint import CheckpointError, load_arrays, save_arrays, save_model
from tinyvit.classifier import VisionTransformer
from tinyvit.data import load_mnist
from tinyvit.data.augment import Augmentation, warp
from tinyvit.gpu import get_backend
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_forward
from tinyvit.ops import cross_entropy_forward
from tinyvit.optim import Adam
from tinyvit.training import (
    CHECKPOINT,
    NOTE,
    RECIPES,
    TUNED,
    Training,
    TrainingConfig,
    TrainingDiverged,
    TrainingStopped,
    read_checkpoint,
)

CPU = get_backend("cpu")
SMALL = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, mlp_width=12, classes=4)
LONG_HEAD = replace(SMALL, patch_size=1, width=16, heads=1)  # its tables need too much shared memory
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (150, 8, 8)).astype(np.uint8)
LABELS = RNG.integers(0, 4, 150).astype(np.uint8)
RECIPE = TrainingConfig(
    epochs=4,
    batch_size=16,  # 138 training images: the last batch is smaller
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.1,
    clip=1.0,
    smoothing=0.1,
    average=0.9,
    validation=12,
    seed=5,
    augmentation=Augmentation(rotation=10, scale=0.1, shear=5, shift=1, flip=0.5),
)


def training(recipe=RECIPE, **arguments):
    return Training(SMALL, recipe, IMAGES, LABELS, CPU, **{"workers": 2, **arguments})


def resumed(folder, **arguments):
    return Training.resume(folder, IMAGES, LABELS, CPU, **arguments)


def model(run):
    return VisionTransformer(run.model_config, run.state.weights)


def assert_same_bits(a, b):
    for name, array in a.state.arrays().items():
        np.testing.assert_array_equal(to_host(array), to_host(b.state.arrays()[name]), err_msg=name)
    assert a.state.adam.steps == b.state.adam.steps
    strip = [{k: v for k, v in record.items() if k != "seconds"} for record in a.state.history]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in b.state.history]


@pytest.fixture(scope="module")
def whole():
    run = training()
    run.run()
    return run


def test_training_is_what_its_settings_say():
    """The whole run against its own transcription, without shards, classes or flat arrays' tricks."""
    recipe = replace(RECIPE, epochs=2, beta1=0.8, beta2=0.95, clip=0.4, average=0.7)
    run = training(recipe)
    run.run()

    weights = initialise(SMALL, seed=5)
    w = weights.flat.astype(np.float64)
    shapes = SMALL.shapes()
    decayed = np.concatenate([np.full(math.prod(s), len(s) == 2 and n.endswith("weight")) for n, s in shapes.items()])
    m, v, average, updates, step, total = np.zeros_like(w), np.zeros_like(w), None, 0, 0, 2 * 9
    for number in range(2):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([5, number])))
        order = rng.permutation(138)
        maps = recipe.augmentation.draw(rng, 138)
        loss_sum, correct, clipped = 0.0, 0, 0
        for batch in range(9):
            places = slice(16 * batch, min(16 * batch + 16, 138))
            images, labels = warp(IMAGES[order[places]], maps[places]), LABELS[order[places]]
            loss, right, gradient = loss_and_gradient(images, labels, weights.with_flat(w), SMALL, smoothing=0.1)
            g = gradient.flat
            norm = np.sqrt((g**2).sum())
            clipped += norm > 0.4
            g = g * min(1, 0.4 / norm)
            warm_up = 1  # three are asked for, but a tenth of 18 steps is one
            rate = 3e-3 * (
                (step + 1) / warm_up
                if step < warm_up
                else (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2
            )
            step += 1
            w, m, v = decayed_adam_step(
                weights=w,
                gradient=g,
                m=m,
                v=v,
                step=step,
                learning_rate=rate,
                decay=0.1,
                decayed=decayed,
                beta1=0.8,
                beta2=0.95,
            )
            if step % 4 == 0 or batch == 8:
                updates += 1
                decay = min(0.7, (updates - 1) / (updates + 8))
                average = w if average is None else decay * average + (1 - decay) * w
            loss_sum += loss * len(labels)
            correct += right
        assert clipped > 3
        record = run.state.history[number]
        assert record["train_loss"] == pytest.approx(loss_sum / 138, rel=1e-4)
        assert record["train_accuracy"] == pytest.approx(correct / 138)
        held_back, _ = vit_forward(IMAGES[138:], weights.with_flat(average), SMALL)
        loss, _ = cross_entropy_forward(held_back, LABELS[138:])
        assert record["validation_loss"] == pytest.approx(loss, rel=1e-3)
        assert record["validation_accuracy"] == pytest.approx((held_back.argmax(axis=1) == LABELS[138:]).mean())

    # a key's bias has no gradient, so that Adam makes steps of its rounding noise: its places are left out
    seen = m**2 > 1e-12 * (m**2).max()
    assert seen.mean() > 0.9
    np.testing.assert_allclose(run.state.parameters.flat[seen], w[seen], atol=2e-4)
    np.testing.assert_allclose(run.state.average.average[seen], average[seen], atol=2e-4)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(whole):
    again = training()
    again.run()
    assert_same_bits(again, whole)
    other = training(replace(RECIPE, seed=6))
    other.run()
    assert not np.array_equal(other.state.parameters.flat, whole.state.parameters.flat)


def test_so_many_epochs_and_then_the_rest_are_all_of_them(whole, tmp_path):
    first = training()
    first.run(tmp_path, stop_after=3)
    assert not first.finished
    second = resumed(tmp_path)
    assert (second.state.epoch, second.images_done) == (3, 0)
    second.run(tmp_path)
    assert second.finished
    assert_same_bits(second, whole)


@pytest.mark.parametrize("steps", [1, 8, 9, 10, 22])  # nine steps are an epoch
def test_a_stop_in_the_middle_of_an_epoch_loses_nothing(whole, tmp_path, steps):
    run = training()

    def stop(run):
        run.stop_requested = run.state.adam.steps == steps

    with pytest.raises(TrainingStopped):
        run.run(tmp_path, on_step=stop)
    second = resumed(tmp_path)
    assert second.state.adam.steps >= steps
    second.run(tmp_path)
    assert_same_bits(second, whole)


def test_a_constant_schedule_can_be_lengthened(tmp_path):
    recipe = replace(RECIPE, schedule="constant", warmup_steps=0)
    whole = training(replace(recipe, epochs=5))
    whole.run()
    training(replace(recipe, epochs=3)).run(tmp_path)
    second = resumed(tmp_path, epochs=5)
    second.run(tmp_path)
    assert_same_bits(second, whole)


def test_checkpoints_come_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyvit.training.loop, "CHECKPOINT_SECONDS", 0)
    places = []
    training(replace(RECIPE, epochs=1)).run(tmp_path, on_step=lambda run: places.append(read_place(tmp_path)))
    assert places == [0, 16, 32, 48, 64, 80, 96, 112, 128]


def read_place(folder):
    return read_checkpoint(folder)[1]["place"]


def test_no_two_checkpoints_are_further_apart_than_half_a_minute():
    assert tinyvit.training.loop.CHECKPOINT_SECONDS <= 25


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    run = training()

    def damage(run):
        if run.state.adam.steps == 12:
            run.state.parameters["head.bias"][0] = np.nan

    with pytest.raises(TrainingDiverged, match="loss became nan in epoch 2, after 12 of 36 steps: try a learning"):
        run.run(tmp_path, on_step=damage)
    arrays, info = load_arrays(tmp_path / CHECKPOINT)
    assert info["epoch"] == 1
    assert np.isfinite(arrays["parameters"]).all()
    resumed(tmp_path).run(tmp_path)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = training()
    run.save(tmp_path)
    run.state.parameters["norm.weight"][0] = np.inf
    with pytest.raises(TrainingDiverged, match="sum of all weights became inf"):
        run.save(tmp_path)
    assert np.isfinite(load_arrays(tmp_path / CHECKPOINT)[0]["parameters"]).all()


def test_history_has_a_record_an_epoch(whole):
    assert [record["epoch"] for record in whole.state.history] == [1, 2, 3, 4]
    assert all(0 <= record["train_accuracy"] <= 1 for record in whole.state.history)
    assert all(0 <= record["validation_accuracy"] <= 1 for record in whole.state.history)
    for number, record in enumerate(whole.state.history):
        rates = RECIPE.learning_rates(number, 9)
        assert (record["first_learning_rate"], record["last_learning_rate"]) == (rates[0], rates[-1])


def test_the_learning_rates_of_the_history_are_those_that_the_epochs_used(monkeypatch):
    used = []
    adam_step = Adam.step

    def recording(adam, flat, gradient, learning_rate):
        used.append(learning_rate)
        adam_step(adam, flat, gradient, learning_rate)

    monkeypatch.setattr(Adam, "step", recording)
    run = training()
    run.run()
    for record, rates in zip(run.state.history, np.reshape(used, (4, 9)), strict=True):
        assert (record["first_learning_rate"], record["last_learning_rate"]) == (rates[0], rates[-1])
    assert max(used) == used[2] == pytest.approx(3e-3)


def test_validation_images_are_the_last_and_never_trained_on():
    run = training(replace(RECIPE, epochs=1))
    np.testing.assert_array_equal(run.step.images, IMAGES[:138])
    assert run.train_images == 138
    np.testing.assert_array_equal(run.validation[0], IMAGES[138:])
    changed = IMAGES.copy()
    changed[138:] = 0
    other = Training(SMALL, replace(RECIPE, epochs=1), changed, LABELS, CPU, workers=2)
    run.run()
    other.run()
    np.testing.assert_array_equal(run.state.parameters.flat, other.state.parameters.flat)


def test_a_run_without_validation_has_none(tmp_path):
    run = training(replace(RECIPE, validation=0, epochs=1))
    run.run(tmp_path)
    assert run.state.history[0]["validation_loss"] is None
    assert run.train_images == 150


def test_the_model_is_the_average_if_there_is_one(whole):
    assert whole.state.weights.flat is whole.state.average.average
    plain = training(replace(RECIPE, average=0.0))
    assert plain.state.weights.flat is plain.state.parameters.flat


def test_other_data_is_refused(tmp_path):
    training().save(tmp_path)
    other = IMAGES.copy()
    other[77, 3, 3] ^= 1
    with pytest.raises(CheckpointError, match="the run used other training data: give the same images and labels"):
        Training.resume(tmp_path, other, LABELS, CPU)


def test_fewer_epochs_than_are_done_are_refused(tmp_path):
    run = training()
    run.run(tmp_path, stop_after=2)
    with pytest.raises(CheckpointError, match="epochs must be at least 2, the number of epochs begun, not 1"):
        resumed(tmp_path, epochs=1)


def test_an_epoch_that_is_begun_counts(tmp_path):
    run = training()
    with pytest.raises(TrainingStopped):
        run.run(tmp_path, on_step=lambda run: setattr(run, "stop_requested", run.state.adam.steps == 20))
    with pytest.raises(CheckpointError, match="epochs must be at least 3, the number of epochs begun, not 2"):
        resumed(tmp_path, epochs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, info: arrays.update(parameters=arrays["parameters"][:1]), "parameters does not fit"),
        (lambda arrays, info: arrays.update(average=arrays["average"].astype(float)), "average does not fit"),
        (lambda arrays, info: arrays.pop("adam.first_moment"), "wrong or missing entries: adam.first_moment"),
        (lambda arrays, info: info.update(place=10**9), "place 1000000000 is outside an epoch of 138 images"),
        (lambda arrays, info: info.pop("place"), "wrong or missing entries: place"),
        (lambda arrays, info: info.update(history={}), "wrong or missing entries: history"),
        (lambda arrays, info: info["training"].update(epochs=0), "not those of a run .epochs must be"),
        (lambda arrays, info: info["model"].update(colour=1), "not those of a run"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, change, message):
    training().save(tmp_path)
    arrays, info = load_arrays(tmp_path / CHECKPOINT)
    change(arrays, info)
    save_arrays(tmp_path / CHECKPOINT, arrays, info)
    with pytest.raises(CheckpointError, match=message):
        resumed(tmp_path)


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    run = training()
    with pytest.raises(OSError, match="file"):
        run.run(tmp_path / "file" / "run")
    assert run.state.adam.steps == 0


def test_a_stop_during_validation_keeps_the_epoch(whole, tmp_path, monkeypatch):
    run = training()

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tinyvit.training.loop, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run(tmp_path)
    second = resumed(tmp_path)
    assert (second.state.epoch, second.images_done) == (0, 138)
    second.run(tmp_path)
    assert_same_bits(second, whole)


def test_a_run_that_was_stopped_can_go_on_itself(whole):
    run = training()
    with pytest.raises(TrainingStopped):
        run.run(on_step=lambda run: setattr(run, "stop_requested", run.state.adam.steps == 13))
    run.run()
    assert_same_bits(run, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_loops_are_a_setting_of_a_run(tmp_path, workers, monkeypatch):
    """Compiled loops give the same loss with other bits, and a run that resumes keeps its choice."""
    pytest.importorskip("numba", reason='needs the extra: pip install -e ".[fast]"')
    with_loops, without = training(workers=workers, loops="on"), training(workers=workers, loops="off")
    with_loops.run()
    without.run()
    assert (with_loops.step.loops, without.step.loops) == ("on", "off")
    losses = [[record["validation_loss"] for record in run.state.history] for run in (with_loops, without)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert with_loops.state.parameters.flat.tobytes() != without.state.parameters.flat.tobytes()

    stop_after_steps(training(workers=workers, loops="on"), tmp_path, 13)
    second = resumed(tmp_path)
    assert second.step.loops == "on"
    second.run()
    assert_same_bits(second, with_loops)
    assert resumed(tmp_path, loops="off").step.loops == "off"
    monkeypatch.setattr("tinyvit.training.loop.compiled_loops", lambda: None)
    with pytest.raises(CheckpointError, match=r"pip install 'tinyvit\[fast\]', or continue with --loops off"):
        resumed(tmp_path)


def test_two_steps_at_once_keep_their_own_choice():
    pytest.importorskip("numba", reason='needs the extra: pip install -e ".[fast]"')

    def weights_of(run):
        return run.state.parameters.flat.tobytes()

    alone = {choice: training(workers=1, loops=choice) for choice in ("on", "off")}
    for run in alone.values():
        with run.step:
            run.step.begin_epoch(0)
            run.step()
    together = {choice: training(workers=1, loops=choice) for choice in ("on", "off")}
    with together["on"].step, together["off"].step:
        for choice in ("on", "off"):
            together[choice].step.begin_epoch(0)
            together[choice].step()
    for choice in ("on", "off"):
        assert weights_of(together[choice]) == weights_of(alone[choice])
    assert weights_of(alone["on"]) != weights_of(alone["off"])

    gradients = {}
    for choice, run in alone.items():
        with run.step, use_loops("off"):  # the choice of the step counts, not that of the caller
            gradients[choice] = run.step._gradient(run.state.parameters, IMAGES[:16], LABELS[:16])[2].flat
        with use_loops(choice):
            _, _, expected = loss_and_gradient(
                IMAGES[:16], LABELS[:16], run.state.parameters, SMALL, smoothing=RECIPE.smoothing
            )
        assert gradients[choice].tobytes() == expected.flat.tobytes()


def test_an_unknown_choice_of_loops_is_refused(strict_gpu):
    for backend in (CPU, strict_gpu):
        with pytest.raises(ValueError, match="loops 'bogus' is unknown"):
            Training(SMALL, RECIPE, IMAGES, LABELS, backend, workers=1, loops="bogus")


def test_a_checkpoint_without_a_choice_of_loops_resumes_without_them(tmp_path):
    stop_after_steps(training(workers=1, loops="off"), tmp_path, 2)
    path = tmp_path / CHECKPOINT
    arrays, info = load_arrays(path)
    del info["loops"]
    save_arrays(path, arrays, info)
    assert resumed(tmp_path).step.loops == "off"
    save_arrays(path, arrays, info | {"loops": "maybe"})
    with pytest.raises(CheckpointError, match="wrong or missing entries: loops"):
        resumed(tmp_path)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_overflows_is_found(tmp_path, clip):
    run = training(replace(RECIPE, clip=clip))
    gradient_of = run.step._gradient

    class Overflowing:
        def __enter__(self):
            gradient_of.__enter__()

        def __exit__(self, *exception):
            gradient_of.__exit__(*exception)

        def __call__(self, *arguments):
            loss, correct, gradient = gradient_of(*arguments)
            gradient.flat[3:20] = 3e21  # finite, but not a thousandth of its square
            return loss, correct, gradient

    run.step._gradient = Overflowing()
    with pytest.raises(TrainingDiverged, match="norm of the gradient" if clip else "second moments"):
        run.run(tmp_path)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_moments_that_are_not_finite_are_found(value):
    for name, text in (("first_moment", "first moments"), ("second_moment", "second moments")):
        state = training(workers=1).state
        state.require_finite()
        getattr(state.adam, name)[3] = value
        with pytest.raises(ArithmeticError, match=f"the sum of Adam's {text} became {value}"):
            state.require_finite()


def test_a_step_of_ones_own_can_take_the_place(tmp_path):
    """`Training` asks nothing of a step but its interface."""

    class Counting:
        workers, record = 1, {"workers": 4}

        def __init__(self, state, images, labels, model_config, config, backend, rate):
            self.state, self.rate, self.begun = state, rate, []
            self.count = len(images)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def begin_epoch(self, epoch, done=0, totals=(0.0, 0)):
            self.begun.append((epoch, done))
            self.loss_sum, self.correct = totals

        def __call__(self):
            self.state.parameters.flat[...] -= self.rate
            self.loss_sum += 2.0
            self.correct += 1
            return 16

        def totals(self):
            return self.loss_sum, self.correct

    recipe = replace(RECIPE, epochs=2, average=0.0)
    run = Training(SMALL, recipe, IMAGES, LABELS, CPU, make_step=Counting, rate=0.5)
    before = run.state.parameters.flat.copy()
    stop_after_steps(run, tmp_path, 12, count=lambda run: run.state.epoch * 9 + run.state.done)
    resumed = Training.resume(tmp_path, IMAGES, LABELS, CPU, make_step=Counting, rate=0.5)
    resumed.run(tmp_path)
    assert resumed.step.begun == [(1, 3)]
    np.testing.assert_allclose(resumed.state.parameters.flat, before - 9, rtol=1e-5)
    assert [record["train_loss"] for record in resumed.state.history] == [18 / 138] * 2
    assert [record["train_accuracy"] for record in resumed.state.history] == [9 / 138] * 2


def test_more_validation_than_images_is_refused():
    with pytest.raises(ValueError, match="validation must be below the number of images, 150, not 150"):
        training(replace(RECIPE, validation=150))


def test_a_model_file_is_no_checkpoint(tmp_path):
    save_model(tmp_path / CHECKPOINT, training().state.parameters, SMALL)
    with pytest.raises(CheckpointError, match="not a checkpoint of a run in format 1"):
        resumed(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("schedule", "linear"),
        ("smoothing", 1.0),
        ("average", 1.0),
        ("beta2", 1.0),
        ("validation", -1),
        ("seed", -1),
        ("clip", -1.0),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}( \(usually below 0\.1\))? must be"):
        TrainingConfig(**{name: value})


def test_settings_survive_as_a_dict():
    assert TrainingConfig.from_dict(TUNED.as_dict()) == TUNED


def test_data_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"images must be uint8 \(0 to 255\), not float32"):
        Training(SMALL, RECIPE, IMAGES.astype(np.float32), LABELS, CPU)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(150,\)"):
        Training(SMALL, RECIPE, IMAGES, LABELS[:-1], CPU)
    with pytest.raises(ValueError, match="labels must be in 0 to 3, the classes of the model, but one is 4"):
        Training(SMALL, RECIPE, IMAGES, LABELS + 1, CPU)


def test_the_note_is_the_note():
    assert NOTE is RECIPES["note"]
    assert (NOTE.learning_rate, NOTE.schedule, NOTE.batch_size, NOTE.epochs) == (3e-4, "constant", 64, 10)
    assert (NOTE.weight_decay, NOTE.clip, NOTE.smoothing, NOTE.average) == (0, 0, 0, 0)
    assert NOTE.augmentation.rotation > 0
    assert NOTE.augmentation.flip > 0
    assert (TUNED.batch_size, TUNED.epochs) == (64, 10)


def test_training_runs_on_the_stand_in_for_a_gpu_and_its_checkpoint_on_the_cpu(strict_gpu, tmp_path):
    recipe = replace(RECIPE, epochs=2)
    on_cpu = training(recipe, workers=1)
    on_cpu.run()
    on_device = Training(SMALL, recipe, IMAGES, LABELS, strict_gpu, workers=1, kernels="off")
    on_device.run(tmp_path, stop_after=1)
    back = resumed(tmp_path)
    back.run(tmp_path)
    # not the weights: Adam blows the rounding noise of a key's bias, whose true gradient is zero, up to whole steps
    np.testing.assert_allclose(model(back).logits(IMAGES), model(on_cpu).logits(IMAGES), rtol=1e-3, atol=1e-3)


def begun(recipe, backend, workers):
    return Training(SMALL, recipe, IMAGES, LABELS, backend, workers=workers, kernels="off", loops="off")


def moved(folder, backend, kernels="off", **arguments):
    return Training.resume(folder, IMAGES, LABELS, backend, kernels=kernels, **arguments)


def stop_after_steps(run, folder, steps, count=lambda run: run.state.adam.steps):
    """Train, and stop in the middle of an epoch, with a checkpoint in `folder`."""
    last = count(run) + steps

    def on_step(run):
        run.stop_requested = count(run) == last

    with pytest.raises(TrainingStopped):
        run.run(folder, on_step)


@pytest.mark.parametrize("workers", [1, 2, None])
def test_a_checkpoint_is_the_same_file_on_every_device(accelerator, tmp_path, workers):
    begin = {device: begun(RECIPE, device, workers) for device in (CPU, accelerator)}
    for name, run in zip("ab", begin.values(), strict=True):
        (tmp_path / name).mkdir()
        run.save(tmp_path / name)
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()
    for first, second in ((CPU, accelerator), (accelerator, CPU)):
        folder = tmp_path / first.device
        stop_after_steps(begun(RECIPE, first, workers), folder, 13)  # in the second epoch
        written = (folder / CHECKPOINT).read_bytes()
        for device in (second, first):
            run = moved(folder, device)
            assert (run.state.epoch, run.images_done) == (1, 64)
            assert isinstance(run.state.parameters.flat, device.xp.ndarray)
            run.save(folder)
            assert (folder / CHECKPOINT).read_bytes() == written


@pytest.mark.parametrize("there_and_back", [False, True])
@pytest.mark.parametrize("from_cpu", [True, False])
def test_a_run_that_moves_goes_on_with_the_same_numbers(accelerator, tmp_path, from_cpu, there_and_back):
    recipe = replace(RECIPE, epochs=3)
    stayed = training(recipe, workers=1)
    stayed.run()
    devices = [CPU, accelerator] if from_cpu else [accelerator, CPU]
    run = begun(recipe, devices[0], workers=1)
    for stop in range(2 if there_and_back else 1):  # after steps 5 and 12 of 9 an epoch
        stop_after_steps(run, tmp_path, 5 + 2 * stop)
        run = moved(tmp_path, devices[(stop + 1) % 2])
    run.run(tmp_path)
    assert len(run.state.history) == 3
    for mine, theirs in zip(run.state.history, stayed.state.history, strict=True):
        for name in set(theirs) - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
    # not the weights: see `test_training_runs_on_the_stand_in_for_a_gpu_and_its_checkpoint_on_the_cpu`
    np.testing.assert_allclose(model(run).logits(IMAGES), model(stayed).logits(IMAGES), rtol=1e-3, atol=1e-3)


def test_a_run_that_was_on_a_gpu_has_its_workers_again(accelerator, tmp_path):
    stop_after_steps(training(workers=3), tmp_path, 2)
    run = moved(tmp_path, accelerator)
    assert run.step.workers == 1
    stop_after_steps(run, tmp_path, 2)
    assert resumed(tmp_path).step.workers == 3


@pytest.mark.extended
def test_a_short_run_on_mnist_learns():
    data = load_mnist()
    recipe = replace(TUNED, epochs=1, batch_size=32, validation=1000, average=0.0, augmentation=Augmentation())
    run = Training(ViTConfig(), recipe, data.train_images[:12_000], data.train_labels[:12_000], CPU)
    run.run()
    assert run.state.history[-1]["validation_accuracy"] > 0.93


# in kernels

SHORT = replace(RECIPE, epochs=2, batch_size=48, clip=0.5)  # three steps an epoch, the last of 42 images


def in_kernels(backend, kernels="graph", recipe=SHORT, **arguments):
    return Training(SMALL, recipe, IMAGES, LABELS, backend, workers=1, kernels=kernels, **arguments)


@pytest.mark.extended
def test_training_in_kernels_is_training_on_the_cpu(accelerator):
    on_cpu = training(SHORT, workers=1)
    on_cpu.run()
    run = in_kernels(accelerator)
    run.run()
    assert run.state.adam.steps == on_cpu.state.adam.steps == 6
    assert run.state.average.steps == on_cpu.state.average.steps == 3  # after step 4, and at both ends
    for mine, theirs in zip(run.state.history, on_cpu.state.history, strict=True):
        for name in set(theirs) - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
    np.testing.assert_allclose(model(run).logits(IMAGES), model(on_cpu).logits(IMAGES), rtol=1e-3, atol=1e-3)


@pytest.mark.extended
def test_an_epoch_in_kernels_never_waits_for_the_device(accelerator):
    step = in_kernels(accelerator).step
    step.begin_epoch(0)
    with strict_cupy.no_synchronisation():
        assert [step() for _ in range(3)] == [48, 48, 42]
    with pytest.raises(IndexError, match="the epoch has no step left"):  # a kernel would read on
        step()


def test_a_place_between_two_batches_is_refused(tmp_path):
    stop_after_steps(training(SHORT), tmp_path, 2)
    arrays, info = load_arrays(tmp_path / CHECKPOINT)
    save_arrays(tmp_path / CHECKPOINT, arrays, info | {"place": 50})
    with pytest.raises(CheckpointError, match="place 50 is not between two batches of 48"):
        resumed(tmp_path)


@pytest.mark.extended
@pytest.mark.parametrize("kernels", ["graph", "launches"])
def test_a_run_in_kernels_goes_on_bit_for_bit(accelerator, tmp_path, kernels):
    whole = in_kernels(accelerator)
    whole.run()
    stop_after_steps(in_kernels(accelerator, kernels), tmp_path, 2)  # in the middle of the first epoch
    run = moved(tmp_path, accelerator, kernels=kernels)
    assert run.images_done == 96
    run.run(tmp_path)
    assert_same_bits(run, whole)


@pytest.mark.extended
def test_a_run_moves_from_kernels_to_the_cpu_and_back(accelerator, tmp_path):
    stayed = training(SHORT, workers=1)
    stayed.run()
    stop_after_steps(in_kernels(accelerator), tmp_path, 2)
    run = moved(tmp_path, CPU)
    stop_after_steps(run, tmp_path, 2)
    run = moved(tmp_path, accelerator, kernels="graph")
    run.run(tmp_path)
    np.testing.assert_allclose(model(run).logits(IMAGES), model(stayed).logits(IMAGES), rtol=1e-3, atol=1e-3)


@pytest.mark.extended
def test_kernels_that_diverge_are_found_out(accelerator, tmp_path):
    recipe = replace(SHORT, learning_rate=9.0, clip=0, weight_decay=9.0, warmup_steps=0)
    with pytest.raises(TrainingDiverged, match="try a learning rate below 9"):
        in_kernels(accelerator, recipe=replace(recipe, epochs=40)).run(tmp_path)


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cpu", {"precision": "tf32"}, "precision 'tf32' needs a GPU: give --device gpu"),
        ("cpu", {"kernels": "graph"}, "kernels 'graph' needs a GPU"),
        ("cpu", {"precision": "half"}, "precision 'half' is unknown: give 'float32', 'tf32', 'bfloat16'"),
        ("cpu", {"kernels": "fast"}, "kernels 'fast' is unknown: give 'graph', 'launches', 'off'"),
        ("gpu", {"precision": "bfloat16", "kernels": "off"}, "precision 'bfloat16' needs kernels"),
        ("gpu", {"kernels": "graph", "model": LONG_HEAD}, "the attention kernel needs"),
        ("gpu", {"precision": "tf32", "model": LONG_HEAD}, "the attention kernel needs"),
    ],
)
def test_a_precision_or_kernels_that_cannot_be_had(strict_gpu, device, arguments, expected):
    model = arguments.pop("model", SMALL)
    with pytest.raises(ValueError, match=re.escape(expected)):
        Training(model, SHORT, IMAGES, LABELS, CPU if device == "cpu" else strict_gpu, **arguments)


def test_where_there_are_no_kernels_for_a_model_plain_operations_compute_and_the_log_says_so(strict_gpu, caplog):
    run = Training(LONG_HEAD, SHORT, IMAGES, LABELS, strict_gpu)
    assert run.step.mode == "plain"
    assert "note: this run uses plain operations because the attention kernel needs" in caplog.text


def test_a_card_that_is_too_old_for_a_precision(strict_gpu, monkeypatch):
    monkeypatch.setattr(strict_cupy.Device, "compute_capability", "75")
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.0 or above, and this one has 7\.5"):
        in_kernels(strict_gpu, precision="tf32")


# ---- signals, and runs that do not learn ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["first step", "validation of the last epoch", "end of the workers"])
def test_a_signal_is_never_lost(tmp_path, monkeypatch, moment, number):
    run = training(replace(RECIPE, epochs=2), workers=1)
    original = tinyvit.training.loop.evaluate

    def evaluate_and_signal(*arguments, **keywords):
        if run.state.epoch == 1:
            signal.raise_signal(number)
        return original(*arguments, **keywords)

    def leave_and_signal(*arguments):
        signal.raise_signal(number)
        return leave(*arguments)

    def on_step(run):
        if moment == "first step" and run.state.adam.steps == 1:
            signal.raise_signal(number)

    leave = type(run.step).__exit__
    if moment == "validation of the last epoch":
        monkeypatch.setattr(tinyvit.training.loop, "evaluate", evaluate_and_signal)
    elif moment == "end of the workers":
        monkeypatch.setattr(type(run.step), "__exit__", leave_and_signal)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingStopped) as caught:
        run.run(tmp_path, on_step=on_step)
    assert caught.value.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.undo()
    again = resumed(tmp_path)
    again.run()
    straight = training(replace(RECIPE, epochs=2), workers=1)
    straight.run()
    assert_same_bits(again, straight)


def test_a_signal_that_the_program_ignores_does_not_stop_a_run():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = training(replace(RECIPE, epochs=1), workers=1)
        run.run(on_step=lambda run: signal.raise_signal(signal.SIGINT))
        assert run.finished
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_device_name_in_place_of_a_backend_is_named():
    expected = r"backend must be a tinyvit.backend.Backend, not 'cpu': use tinyvit.gpu.get_backend\('cpu'\)"
    with pytest.raises(TypeError, match=expected):
        Training(SMALL, RECIPE, IMAGES, LABELS, "cpu")
    with pytest.raises(TypeError, match=expected):
        Training.resume("run", IMAGES, LABELS, "cpu")


def one_colour_per_class(count):
    """Images that any model learns within a few steps, and their labels."""
    labels = np.arange(count, dtype=np.uint8) % 4
    return np.broadcast_to(60 * labels[:, None, None], (count, 8, 8)).astype(np.uint8), labels


@pytest.mark.parametrize(
    ("rate", "labels", "expected"),
    [
        (3e-3, "right", None),
        (9.9, "right", r"the model has not learned in 1 epoch: its loss is [\d.e+]+, and guessing gives 1.3863: "
                       r"try a learning rate from 0.0001 to 0.005, not 9.9"),
        (1e-9, "right", r"not learned in 1 epoch: its (loss|accuracy) is .* try a learning rate from"),
        (3e-3, "random", r"not learned in 1 epoch: its (loss|accuracy) is .* train for more than 250 steps"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_learn_says_so(caplog, rate, labels, expected):
    images, right = one_colour_per_class(1100)
    chosen = right if labels == "right" else np.random.default_rng(0).integers(0, 4, 1100).astype(np.uint8)
    recipe = TrainingConfig(epochs=2, batch_size=8, learning_rate=rate, validation=100)
    if labels == "random":
        recipe = replace(recipe, batch_size=4)
    run = Training(SMALL, recipe, images, chosen, CPU, workers=1)
    run.run(stop_after=1)
    first = [record.getMessage() for record in caplog.records if "not learned" in record.getMessage()]
    if expected is None:
        assert (first, run.no_learning()) == ([], None)
        return
    assert len(first) == 1
    assert re.search(expected, first[0])
    run.run()
    notes = [record.getMessage() for record in caplog.records if "not learned" in record.getMessage()]
    assert len(notes) == 2
    assert "in 2 epochs" in notes[1]
    assert notes[1] == f"note: {run.no_learning()}"


def test_a_few_steps_are_not_called_a_failure(caplog):
    training(replace(RECIPE, epochs=2), workers=1).run()
    assert not [record for record in caplog.records if "not learned" in record.getMessage()]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"train_loss": 1.39, "validation_accuracy": 0.9}, "loss is 1.39"),
        ({"train_loss": 1.38, "validation_accuracy": 0.34}, None),
        ({"train_loss": 1.0, "validation_accuracy": 0.33}, "its accuracy is 33.3%, and the most frequent"),
        ({"train_loss": 1.38, "validation_accuracy": None}, None),
    ],
)
def test_learning_is_more_than_guessing(record, expected):
    run = training(workers=1)
    run.validation = (run.validation[0], np.array([0, 1, 2, 3, 3, 3, 2, 1, 0, 3, 1, 2]))
    if expected and "33" in expected:
        record = record | {"validation_accuracy": 4 / 12}
    run.state.adam.steps = 500
    run.state.history.append({"epoch": 1, **record})
    found = run.no_learning()
    assert (found is None) if expected is None else (expected in found)


def test_no_loop_may_assume_that_every_number_is_finite():
    """`fastmath=True` permits that, and would hide a run that diverges."""
    loops = pytest.importorskip("tinyvit.loops", reason='needs the extra: pip install -e ".[fast]"')
    compiled = [loop for loop in vars(loops).values() if hasattr(loop, "targetoptions")]
    assert len(compiled) >= 7
    for loop in compiled:
        assert set(loop.targetoptions["fastmath"]) <= {"contract", "nsz", "arcp", "reassoc"}, loop
