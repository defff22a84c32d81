"""The checks of lesson 07's exercises. Most of what is expected is found by moving numbers, without a formula."""

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import patch_embedding_forward, patches_forward


def check_1(answer):
    for rows, columns, P in ((4, 4, 2), (28, 28, 7), (6, 12, 3)):
        for row, column in ((0, 0), (1, columns - 1), (rows - 1, 2)):
            pixel = np.zeros((1, rows, columns), bool)
            pixel[0, row, column] = True
            t, k = np.argwhere(patches_forward(pixel, P)[0])[0].tolist()
            what = f"patch and place of the pixel in row {row}, column {column} of {rows} x {columns}, P = {P}"
            yield what, answer(row, column, columns, P), (t, k)


def check_2(answer):
    patches, w, b = np.array([[[1.0, 2.0]]]), np.array([[1.0], [10.0]]), np.array([0.5])
    tokens = answer(patches, w, b, np.array([7.0]), np.array([[100.0], [200.0]]))
    what = "one patch [1, 2], w = [[1], [10]], b = 0.5, class token 7, positions 100, 200"
    yield what, tokens, np.array([[[107.0], [221.5]]])
    rng = np.random.default_rng(2)
    images = rng.standard_normal((3, 4, 6))
    w, b, class_token = (rng.standard_normal(shape) for shape in ((4, 5), (5,), (5,)))
    positions = rng.standard_normal((7, 5))
    expected, _ = patch_embedding_forward(images, w, b, class_token, positions, 2)
    tokens = answer(patches_forward(images, 2), w, b, class_token, positions)
    yield "tokens of three images of 2 x 3 patches, D = 5", tokens, expected


def check_3(answer):
    small = np.array([[[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]]])
    expected = np.array([[7.0], [56.0]]), np.array([[9.0], [18.0], [36.0]])
    yield "dtokens 1, 2, 4 | 8, 16, 32 in two rows", answer(small, 2, 3), expected
    rng = np.random.default_rng(3)
    for batch, down, across in ((3, 4, 2), (2, 3, 3)):
        rows, columns = rng.standard_normal((down, 5)), rng.standard_normal((across, 5))
        dtokens = rng.standard_normal((batch, down * across, 5))

        def tokens(rows, columns, batch=batch):
            positions = (rows[:, None] + columns[None]).reshape(-1, 5)
            return np.tile(positions, (batch, 1, 1)), None

        expected = numerical_gradients(tokens, [rows, columns], dtokens)
        yield f"dtokens {dtokens.shape}, a grid of {down} x {across}", answer(dtokens, down, across), tuple(expected)


def check_4(answer):
    yield (
        "two patches of one pixel in a row",
        answer(np.array([[[3.0], [4.0]]]), 1, 2, 1, 1),
        np.array([[[3.0, 4.0]]]),
    )
    ones = np.ones((1, 4, 4))
    expected = np.array([[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]])
    yield (
        "how often each of 3 x 3 pixels is seen, P = 2, stride 1 (dpatches of ones)",
        answer(ones, 3, 3, 2, 1),
        expected,
    )
    rng = np.random.default_rng(4)
    for rows, columns, P, stride in ((4, 6, 2, 2), (7, 5, 3, 2), (5, 8, 4, 1)):
        images = rng.standard_normal((2, rows, columns))
        dpatches = rng.standard_normal(overlapping(images, P, stride).shape)
        expected = numerical_gradients(
            lambda x, P=P, stride=stride: (overlapping(x, P, stride), None), [images], dpatches
        )
        what = f"dimages of 2 images of {rows} x {columns}, P = {P}, stride {stride}"
        yield what, answer(dpatches, rows, columns, P, stride), expected[0]


def overlapping(images, P, stride):
    windows = np.lib.stride_tricks.sliding_window_view(images, (P, P), axis=(1, 2))[:, ::stride, ::stride]
    return windows.reshape(len(images), -1, P * P)
