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


def exercise_4(mu1, sigma1, o1, mu2, sigma2, o2):
    mu = max(mu1, mu2)
    part1, part2 = sigma1 * np.exp(mu1 - mu), sigma2 * np.exp(mu2 - mu)  # both sums, with the common maximum
    sigma = part1 + part2
    return mu, sigma, (part1 * o1 + part2 * o2) / sigma


def wrong_4(mu1, sigma1, o1, mu2, sigma2, o2):
    """The sums are added as they are, though each was taken with a maximum of its own."""
    sigma = sigma1 + sigma2
    return max(mu1, mu2), sigma, (sigma1 * o1 + sigma2 * o2) / sigma


if __name__ == "__main__":
    Lesson("16_to_the_gpu").check_all(globals())
