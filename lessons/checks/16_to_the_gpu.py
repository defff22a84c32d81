"""What the exercises of lesson 16 are asked, and what is expected."""

import numpy as np


def check_1(answer):
    what = "2 launches of 3 s, 10 bytes at 5 a second, 8 operations at 2"
    yield what, answer(2, 3.0, 10, 5.0, 8, 2.0), (6.0, "launches")
    what = "1 launch of 1 s, 10 bytes at 5 a second, 8 operations at 2"
    yield what, answer(1, 1.0, 10, 5.0, 8, 2.0), (4.0, "arithmetic")
    what = "500 launches of 10 microseconds, 1 GB at 100 GB/s, 1e9 operations at 1e12"
    yield what, answer(500, 1e-5, 1e9, 1e11, 1e9, 1e12), (0.01, "memory")


def check_2(answer):
    yield "a product (2, 1) (1, 2) in tiles of 1", answer(2, 1, 2, 1), 8
    yield "(64, 128) (128, 384) in tiles of 32", answer(64, 128, 384, 32), 2 * 64 * 128 * 384 // 32
    yield "(33, 5) (5, 10) in tiles of 32", answer(33, 5, 10, 32), 33 * 5 * 1 + 5 * 10 * 2
    yield "(100, 7) (7, 50) in tiles of 16", answer(100, 7, 50, 16), 100 * 7 * 4 + 7 * 50 * 7


def check_3(answer):
    spacing = 2.0**-7  # of the bfloat16 numbers from 1 to 2
    x = np.array([1.0, 1 + 0.4 * spacing, 1 + 0.6 * spacing], np.float32)
    yield "1, and 0.4 and 0.6 of the way to the next", answer(x), np.array([1, 1, 1 + spacing], np.float32), 0
    x = np.array([1 + 0.5 * spacing, 1 + 1.5 * spacing, -1 - 0.5 * spacing], np.float32)
    yield "ties", answer(x), np.array([1, 1 + 2 * spacing, -1], np.float32), 0
    x = np.random.default_rng(3).standard_normal(1000).astype(np.float32) * np.float32(1e3)
    scale = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)
    yield "1000 random numbers", answer(x), (np.rint(x / scale) * scale).astype(np.float32), 0


def piece(scores, values):
    """Return the largest score, the sum and the mean of the values, as numbers and an array (K,)."""
    mu = scores.max()
    weights = np.exp(scores - mu)
    return float(mu), float(weights.sum()), weights @ values / weights.sum()


def check_4(answer):
    one, other = (0.0, 1.0, np.array([2.0])), (0.0, 3.0, np.array([6.0]))
    yield "(0, 1, [2]) and (0, 3, [6])", answer(*one, *other), (0.0, 4.0, np.array([5.0]))
    rng = np.random.default_rng(4)
    for name, size in (("scores of the size of 1", 1.0), ("scores of the size of 1000", 1000.0)):
        scores, values = size * rng.standard_normal(17), rng.standard_normal((17, 4))
        for cut in (3, 12):
            given = (*piece(scores[:cut], values[:cut]), *piece(scores[cut:], values[cut:]))
            yield f"{name}, {cut} keys and {17 - cut}", answer(*given), piece(scores, values)
