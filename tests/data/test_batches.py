"""An epoch is a pure function of (seed, number): every image once, changed as drawn, however it is cut."""

import numpy as np
import pytest
from devices import to_device
from strict_cupy import no_synchronisation

from tinyvit.data.augment import Augmentation
from tinyvit.data.batches import Epoch, draw_order, stream_of
from tinyvit.gpu import get_backend

CPU = get_backend("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 8, 8)).astype(np.uint8)
LABELS = np.arange(50)
STRONG = Augmentation(rotation=20, scale=0.2, shear=10, shift=2, flip=0.5)


def epoch(augmentation=STRONG, seed=0, number=0):
    return Epoch(IMAGES, LABELS, augmentation, seed, number, CPU)


def test_every_image_comes_once_with_its_own_label():
    images, labels = epoch(Augmentation()).load(0, 50)
    assert sorted(labels) == list(range(50))
    np.testing.assert_array_equal(images, IMAGES[labels])
    assert images.dtype == np.uint8


def test_the_cut_does_not_change_what_is_drawn():
    whole = epoch()
    images, labels = whole.load(0, 50)
    pieces = [epoch().load(start, min(start + 7, 50)) for start in range(0, 50, 7)]
    np.testing.assert_array_equal(images, np.concatenate([p[0] for p in pieces]))
    np.testing.assert_array_equal(labels, np.concatenate([p[1] for p in pieces]))


def test_seed_and_number_both_change_order_and_maps():
    first = epoch().load(0, 50)
    for other in (epoch(seed=1), epoch(number=1)):
        images, labels = other.load(0, 50)
        assert not np.array_equal(labels, first[1])
        by_label, first_by_label = np.argsort(labels), np.argsort(first[1])
        assert not np.array_equal(images[by_label], first[0][first_by_label])


def test_what_is_augmented_is_float_in_0_to_1():
    images, _ = epoch().load(0, 50)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert 0.5 < images.max() <= 1 + 1e-6


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (-5, -1), (0, 51), (50, 51), (60, 70), (9, 8)])
def test_places_outside_the_epoch_raise_on_every_device(backend, start, stop):
    made = Epoch(*to_device(backend, IMAGES, LABELS), STRONG, 0, 0, backend)
    said = f"start <= stop <= 50, but are {start} and {stop}"
    with no_synchronisation(), pytest.raises(IndexError, match=said):
        made.load(start, stop)


def test_the_last_place_is_within_and_no_places_are_no_images(backend):
    made = Epoch(*to_device(backend, IMAGES, LABELS), STRONG, 0, 0, backend)
    assert len(made.load(49, 50)[0]) == 1
    assert len(made.load(50, 50)[1]) == 0


@pytest.mark.parametrize("labels", [LABELS[:-1], np.arange(51), LABELS[:, None], LABELS[:0]])
def test_one_label_an_image_on_every_device(backend, labels):
    images, labels = to_device(backend, IMAGES, labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(50,\), one per image, not"):
        Epoch(images, labels, STRONG, 0, 0, backend)


def test_lists_become_arrays():
    made = Epoch(IMAGES.tolist(), LABELS.tolist(), None, 0, 0, CPU)
    assert sorted(made.load(0, 50)[1]) == list(range(50))


@pytest.mark.parametrize("augmentation", [True, 0.5, {"flip": 1}, "flip"])
def test_an_augmentation_is_an_augmentation(augmentation):
    with pytest.raises(TypeError, match="augmentation must be an Augmentation or None"):
        Epoch(IMAGES, LABELS, augmentation, 0, 0, CPU)


@pytest.mark.parametrize("name", ["count", "seed", "number"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True])
def test_an_order_needs_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer from 0"):
        draw_order(**{"count": 3, "seed": 0, "number": 0, name: value})


@pytest.mark.parametrize("rng", [0, None, np.random.default_rng(0), np.random.Philox(0)])
def test_the_stream_of_another_generator_is_refused(rng):
    with pytest.raises(TypeError, match="bit generator Philox"):
        stream_of(rng)
