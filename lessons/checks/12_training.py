"""The checks of lesson 12's exercises."""

import numpy as np

from tinyvit.data import load_mnist
from tinyvit.data.augment import warp
from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import cross_entropy_forward


def check_1(answer):
    yield "images for p = 0.5 and s = 0.1", answer(0.5, 0.1), 25
    yield "images for p = 0.9 and s = 0.02", answer(0.9, 0.02), 225
    for p, s in ((0.99, 0.0005), (0.97, 0.0007), (0.123, 0.011)):
        n = answer(p, s)
        yield f"p = {p} and s = {s}: is your number enough?", bool(p * (1 - p) / n <= s * s * (1 + 1e-9)), True
        yield f"p = {p} and s = {s}: is one less too few?", bool(p * (1 - p) / (n - 1) > s * s * (1 - 1e-9)), True


def check_2(answer):
    image = load_mnist().train_images[0] // 2
    yield "the map that moves nothing", answer(0, 0), np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    for down, across in ((3, 0), (0, 2), (-2, 1)):
        m = np.asarray(answer(down, across))
        expected = np.roll(image, (down, across), (0, 1)) / np.float32(255)  # the margin is wide: nothing wraps
        yield f"the digit moved down by {down}, right by {across}", warp(image[None], m[None])[0], expected, 1e-4


def check_3(answer):
    for step, expected in ((0, 0.5), (1, 1.0), (2, 1.5), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 1.5), (9, 0.5)):
        yield f"the rate of step {step} of 10, peak 2, warm-up 4, tail 4", answer(step, 10, 2.0, 4, 4), expected
    yours = np.array([answer(step, 100, 1e-3, 10, 30) for step in range(100)], float)
    expected = 1e-3 * np.minimum(1, np.minimum(np.arange(1, 101) / 10, np.arange(100, 0, -1) / 30))
    yield "100 steps, peak 0.001, warm-up 10, tail 30", yours, expected


def check_4(answer):
    logits = np.log(np.array([[1.0, 3.0]]))  # probabilities 1/4 and 3/4
    first, second = np.array([0]), np.array([1])
    expected = 0.5 * np.log(4) + 0.5 * np.log(4 / 3), np.array([[-0.25, 0.25]])
    yield "probabilities 1/4 and 3/4, labels 0 and 1 in equal shares", answer(logits, first, second, 0.5), expected

    rng = np.random.default_rng(4)
    for batch, classes, share in ((5, 10, 0.7), (3, 4, 0.1)):
        logits = 3 * rng.standard_normal((batch, classes))
        first, second = rng.integers(0, classes, (2, batch))
        second[0] = first[0]

        def loss(z, first=first, second=second, share=share):
            of_first, of_second = (cross_entropy_forward(z, labels)[0] for labels in (first, second))
            return share * of_first + (1 - share) * of_second, None

        expected = float(loss(logits)[0]), numerical_gradients(loss, [logits], np.ones(()))[0]
        yield f"{batch} images, {classes} classes, lambda {share}", answer(logits, first, second, share), expected
