"""Affine augmentation: against an independent interpolation, and what each flag does."""

import re

import numpy as np
import pytest
from devices import to_device
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import affine_transform
from strict_cupy import no_synchronisation

from tinyvit.backend import to_host
from tinyvit.data.augment import Augmentation, warp

IDENTITY = np.array([[1, 0, 0], [0, 1, 0]], np.float32)


def draw(count=2000, seed=0, **settings):
    return Augmentation(**settings).draw(np.random.default_rng(seed), count)


def random_images(count, rows=9, columns=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, rows, columns)).astype(np.uint8)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_warp_is_bilinear_interpolation_on_a_black_ground(seed, rows, columns):
    images = random_images(3, rows, columns, seed)
    maps = draw(3, seed, rotation=180, scale=0.5, shear=30, shift=3, flip=0.5)
    centre = np.array([(rows - 1) / 2, (columns - 1) / 2])
    for image, m, moved in zip(images, maps.astype(float), warp(images, maps), strict=True):
        offset = centre + m[:, 2] - m[:, :2] @ centre
        expected = affine_transform(image / 255, m[:, :2], offset, order=1, mode="grid-constant")
        np.testing.assert_allclose(moved, expected, atol=2e-4)


def test_nothing_asked_for_changes_nothing():
    images = random_images(5)
    maps = draw(5)
    np.testing.assert_array_equal(maps, np.broadcast_to(IDENTITY, (5, 2, 3)))
    np.testing.assert_allclose(warp(images, maps), images / 255, atol=1e-6)
    assert not Augmentation()
    assert Augmentation(flip=0.5)


def test_a_flip_exchanges_left_and_right():
    images = random_images(4)
    moved = warp(images, draw(4, flip=1))
    np.testing.assert_allclose(moved, images[:, :, ::-1] / 255, atol=1e-6)


def test_flips_are_as_frequent_as_asked():
    assert abs((draw(flip=0.3)[:, 1, 1] < 0).mean() - 0.3) < 0.03


def test_a_shift_is_in_pixels_down_and_across():
    images = random_images(1)
    maps = IDENTITY[None].copy()
    maps[0, :, 2] = 1, 2  # each place gets its brightness from one row down and two columns to the right
    expected = np.zeros((9, 7))
    expected[:-1, :-2] = images[0, 1:, 2:] / 255
    np.testing.assert_allclose(warp(images, maps)[0], expected, atol=1e-6)
    assert np.abs(draw(shift=2)[:, :, 2]).max() <= 2
    assert np.abs(draw(shift=2)[:, :, 2]).max(axis=0).min() > 1.9


def test_rotations_keep_lengths_and_reach_their_limit():
    maps = draw(rotation=15)[:, :, :2].astype(float)
    np.testing.assert_allclose(maps @ maps.swapaxes(1, 2), np.broadcast_to(np.eye(2), maps.shape), atol=1e-6)
    angles = np.rad2deg(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert 14.5 < angles.max() <= 15.001
    assert -15.001 <= angles.min() < -14.5


def test_a_quarter_turn_is_what_numpy_says():
    images = random_images(1, 8, 8)
    maps = np.array([[[0, -1, 0], [1, 0, 0]]], np.float32)
    np.testing.assert_allclose(warp(images, maps)[0], np.rot90(images[0], -1) / 255, atol=1e-6)


def test_scales_are_as_often_larger_as_smaller():
    factors = 1 / draw(scale=0.2)[:, 0, 0]
    assert 1.19 < factors.max() <= 1.2001
    assert 0.83 < factors.min() < 0.84
    assert abs((factors > 1).mean() - 0.5) < 0.04


def test_shear_leaves_rows_level():
    maps = draw(shear=20)
    np.testing.assert_array_equal(maps[:, 1, 0], 0)
    assert 19.5 < np.rad2deg(np.arctan(maps[:, 0, 1])).max() < 20.001


def test_all_flags_together_are_mirror_then_shear_then_turn_and_scale():
    settings = dict(rotation=40, scale=0.3, shear=20, shift=2, flip=0.5)
    uniform = np.random.default_rng(0).uniform(-1, 1, (6, 50))
    for m, (angle, zoom, shear, down, across, mirror) in zip(draw(50, **settings), uniform.T, strict=True):
        a = np.deg2rad(40 * angle)
        turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) / 1.3**zoom
        lean = np.array([[1, np.tan(np.deg2rad(20 * shear))], [0, 1]])
        flip = np.diag([1, -1 if mirror < 0 else 1])
        np.testing.assert_allclose(m[:, :2], turn @ lean @ flip, atol=1e-6)
        np.testing.assert_allclose(m[:, 2], [2 * down, 2 * across], atol=1e-6)


def test_one_flag_does_not_change_what_another_draws():
    alone, together = draw(rotation=10), draw(rotation=10, shift=2)
    np.testing.assert_array_equal(alone[:, :, :2], together[:, :, :2])


@pytest.mark.parametrize("name", ["rotation", "scale", "shear", "shift", "flip"])
@pytest.mark.parametrize("value", [-1, float("nan"), "much", True, 1e9])
def test_a_range_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"augmentation {name} must be a number from 0 to"):
        Augmentation(**{name: value})


def test_maps_must_be_one_an_image():
    with pytest.raises(ValueError, match=r"3 images need maps of shape \(3, 2, 3\), not \(2, 2, 3\)"):
        warp(random_images(3), draw(2))


def test_a_map_that_leads_nowhere_raises():
    for value in (np.nan, np.inf):
        maps = draw(3)
        maps[1, 0, 1] = value
        with pytest.raises(ValueError, match="every entry of maps must be a finite number"):
            warp(random_images(3), maps)


def test_a_map_that_leads_nowhere_spoils_its_image_alone_on_a_device(accelerator):
    images, maps = random_images(3), draw(3)
    maps[1, 0, 1] = np.nan
    with no_synchronisation():
        moved = warp(*to_device(accelerator, images, maps))
    moved = to_host(moved)
    assert np.isnan(moved[1]).all()
    np.testing.assert_allclose(moved[[0, 2]], images[[0, 2]] / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "maps", "error", "text"),
    [
        (random_images(3) / 255, draw(3), ValueError, "(B, R, C, channels), not float64"),
        (random_images(3).astype(int), draw(3), ValueError, "(B, R, C, channels), not int64"),
        (random_images(3)[0], draw(3), ValueError, "not uint8 (9, 7)"),
        ("images", draw(3), TypeError, "images must be an array of numbers, not str"),
        (random_images(3), draw(3).astype(int), TypeError, "maps must be float32 or float64, not int64"),
        (random_images(3), draw(3).astype(np.float16), TypeError, "maps must be float32 or float64, not float16"),
        (random_images(3), draw(3).tolist(), TypeError, "maps must be a NumPy or CuPy array, not list"),
        (random_images(3), None, TypeError, "maps must be a NumPy or CuPy array, not NoneType"),
        (random_images(3), draw(3)[..., :2], ValueError, "maps must have the shape (B, 2, 3)"),
        (random_images(3), draw(3).swapaxes(1, 2), ValueError, "maps must have the shape (B, 2, 3)"),
    ],
)
def test_images_and_maps_that_do_not_fit_are_refused(images, maps, error, text):
    with pytest.raises(error, match=re.escape(text)):
        warp(images, maps)


def test_images_and_maps_are_on_one_device(accelerator):
    with pytest.raises(TypeError, match="maps must be on the device of the images"):
        warp(random_images(3), accelerator.asarray(draw(3)))


def test_maps_of_any_layout_and_both_float_dtypes_give_the_same():
    images, maps = random_images(3), draw(3, rotation=20, shift=1)
    expected = warp(images, maps)
    strided = np.repeat(images, 2, axis=2)[..., ::2], np.repeat(maps, 2, axis=0)[::2]
    np.testing.assert_array_equal(warp(*strided), expected)
    np.testing.assert_allclose(warp(images, maps.astype(np.float64)), expected, atol=1e-4)


@pytest.mark.parametrize("rng", [0, None, np.random, np.random.RandomState(0)])
def test_maps_are_drawn_from_a_generator(rng):
    with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator"):
        Augmentation().draw(rng, 3)
