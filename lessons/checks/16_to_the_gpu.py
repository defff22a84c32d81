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


def philox(counter, key):
    """Return the four words of a counter from 1 on, as numbers."""
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=int(counter) - 1)
    return [int(word) for word in generator.random_raw(4)]


def check_4(answer):
    key = (3, 4)
    stream = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64))).random(10)
    for index in (0, 1, 4, 9):
        yield f"number {index}, for the key (3, 4)", answer(index, key, philox), float(stream[index]), 1e-15
    index, key = 10**15 + 2, (2026, 16)
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=index // 4)
    expected = np.random.Generator(generator).random(index % 4 + 1)[-1]
    yield f"number {index:,}, for the key (2026, 16)", answer(index, key, philox), float(expected), 1e-15
