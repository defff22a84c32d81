"""The checks of lesson 13's exercises."""

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import softmax_forward


def check_1(answer):
    small = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3]])
    yield "four images, of which three are nearly right", answer(small, np.array([0, 1, 1, 2])), 0.75
    rng = np.random.default_rng(1)
    probabilities, labels = rng.dirichlet(np.ones(10), 500), rng.integers(0, 10, 500)
    better = (probabilities > probabilities[np.arange(500), labels][:, None]).sum(axis=1)
    yield "500 images, 10 classes", answer(probabilities, labels), float(np.mean(better < 2))


def check_2(answer):
    expected = np.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [0.6, 0.8, 1.0]])
    yield "cosines of [2, 0], [0, 1] and [3, 4]", answer(np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]])), expected
    positions = np.random.default_rng(2).standard_normal((16, 5))
    expected = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in positions] for a in positions])
    yield "16 random positions of width 5", answer(positions), expected


def check_3(answer):
    logits, labels = np.log(np.array([[1.0, 3.0]])), np.array([0])  # probabilities 1/4 and 3/4
    yield "probabilities 1/4 and 3/4, label 0", answer(logits, labels), (1.125, np.array([[-0.5625, 0.5625]]))
    rng = np.random.default_rng(3)
    for images, classes in ((5, 3), (2, 10)):
        logits, labels = 2 * rng.standard_normal((images, classes)), rng.integers(0, classes, images)

        def brier(z, labels=labels):
            gap = softmax_forward(z)[0] - (labels[:, None] == np.arange(z.shape[1]))
            return (gap**2).sum(axis=1).mean(), None

        expected = float(brier(logits)[0]), numerical_gradients(brier, [logits], np.ones(()))[0]
        yield f"{images} images, {classes} classes", answer(logits, labels), expected


def check_4(answer):
    weight = np.arange(24.0).reshape(4, 6) / 1000

    def probability(images):
        """A model that is more certain, the more ink there is, most of all below and to the right."""
        return 1 - np.exp(-(np.asarray(images) / 255 * weight).sum(axis=(1, 2)))

    for image in (np.full((4, 6), 255, np.uint8), np.random.default_rng(4).integers(0, 256, (4, 6)).astype(np.uint8)):
        expected = np.zeros((2, 3))
        for row, column in np.ndindex(2, 3):
            blank = image.copy()
            blank[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
            expected[row, column] = (probability(image[None]) - probability(blank[None]))[0]
        yield "patches of 2 in 4 rows and 6 columns", answer(probability, image, 2), expected
