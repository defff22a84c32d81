"""Solutions of lesson 16: `python lessons/solutions/16_to_the_gpu.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(n, c, m, b, a, r):
    times = {"launches": n * c, "memory": m / b, "arithmetic": a / r}
    slowest = max(times, key=times.get)
    return times[slowest], slowest


def wrong_1(n, c, m, b, a, r):
    """The three are added up, as if the card did one after the other: it does all at once."""
    times = {"launches": n * c, "memory": m / b, "arithmetic": a / r}
    return sum(times.values()), max(times, key=times.get)


def exercise_2(m, k, n, s):
    # every number of x is read by each column of tiles, and every number of w by each row of tiles
    return m * k * -(-n // s) + k * n * -(-m // s)


def wrong_2(m, k, n, s):
    """2 m k n / s holds where s divides both sizes, and nowhere else."""
    return 2 * m * k * n // s


def exercise_3(x):
    bits = x.view(np.uint32)
    last = (bits >> 16) & 1  # the last bit that stays
    # just less than a half, plus that bit: a tie is carried if and only if it is 1
    return ((bits + 0x7FFF + last) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def wrong_3(x):
    """The lower half is cut off: rounding towards zero, with twice the error and always in one direction."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def wrong_3b(x):
    """Half of the last bit is added: ties go away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def exercise_4(index, key, philox):
    word = philox(index // 4 + 1, key)[index % 4]
    return (word >> 11) / 2**53


def wrong_4(index, key, philox):
    """The whole stream is off by one counter, as it is begun at 2."""
    return (philox(index // 4 + 2, key)[index % 4] >> 11) / 2**53


def wrong_4b(index, key, philox):
    """The order within a counter is turned around: right for none of the four."""
    return (philox(index // 4 + 1, key)[3 - index % 4] >> 11) / 2**53


if __name__ == "__main__":
    Lesson("16_to_the_gpu").check_all(globals())
