"""The checks of lesson 01's exercises: each yields what is asked, what the answer gives, and what is expected."""

import numpy as np

from tinyvit.data import load_mnist


def check_1(answer):
    for n, r, c in [(0, 0, 0), (0, 1, 2), (7, 27, 0), (59_999, 27, 27)]:
        place = 16 + np.ravel_multi_index((n, r, c), (60_000, 28, 28))
        yield f"image, row and column of byte {place:,}", answer(int(place)), (n, r, c)


def check_2(answer):
    image, other = np.array([[200, 0]], np.uint8), np.array([[250, 5]], np.uint8)
    yield "difference of the images [[200, 0]] and [[250, 5]]", answer(image, other), 27.5
    first, second = load_mnist().test_images[:2]
    expected = float(np.mean(np.abs(first.astype(int) - second.astype(int))))
    yield "difference of the first two test images", answer(first, second), expected


def check_3(answer):
    expected = np.array([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    yield "the labels 2, 0, 3 among 4 classes", answer(np.array([2, 0, 3], np.uint8), 4), expected
    labels = load_mnist().test_labels
    yield "all test labels, among 10 classes", answer(labels, 10), (labels[:, None] == np.arange(10)).astype(float)


def check_4(answer):
    mnist = load_mnist()
    black, white = np.zeros((1, 28, 28), np.uint8), np.full((1, 28, 28), 255, np.uint8)
    grey = np.full((2, 28, 28), [[[40]], [[250]]], np.uint8)
    images, labels = np.concatenate([black, white]), np.array([0, 1], np.uint8)
    yield "a dark and a bright image, beside a black 0 and a white 1", answer(images, labels, grey), np.array([0, 1])

    predictions = answer(mnist.train_images, mnist.train_labels, mnist.test_images)
    yield "how many predictions there are", len(predictions), 10_000
    correct = float(np.mean(predictions == mnist.test_labels))
    yield "the share of the test images that is classified correctly", correct, 0.8203
