"""Solutions of lesson 04: `python lessons/solutions/04_adam.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(gradients, beta):
    m = np.zeros(gradients.shape[1])
    for g in gradients:
        m = beta * m + (1 - beta) * g
    return m / (1 - beta ** len(gradients))


def wrong_1(gradients, beta):
    """The correction of the first step, at every step."""
    m = np.zeros(gradients.shape[1])
    for g in gradients:
        m = beta * m + (1 - beta) * g
    return m / (1 - beta)


def exercise_2(A):
    # along an eigenvector w is multiplied by 1 - rate * eigenvalue, which must not fall below -1
    return 2 / np.linalg.eigvalsh(A)[-1]


def wrong_2(A):
    """The steepest axis for the steepest direction: right only if the valley lies along the axes."""
    return 2 / A.diagonal().max()


def exercise_3(w, g, m, v, t, rate, decay):
    m = 0.9 * m + (1 - 0.9) * g
    v = 0.999 * v + (1 - 0.999) * g**2
    mean, square = m / (1 - 0.9**t), v / (1 - 0.999**t)
    w = w - rate * (mean / (np.sqrt(square) + 1e-8) + decay * w)
    return w, m, v


def wrong_3(w, g, m, v, t, rate, decay):
    """The decay in the gradient: then it is divided by its own size, as any gradient."""
    return exercise_3(w, g + decay * w, m, v, t, rate, 0.0)


def wrong_3b(w, g, m, v, t, rate, decay):
    """A correction that believes every step to be the first."""
    return exercise_3(w, g, m, v, 1, rate, decay)


def exercise_4(a, b):
    # Both |r| are sqrt(mu) at best, and they are if the roots are complex or equal: (1 + mu - rate c)^2 <= 4 mu, so
    # (1 - sqrt(mu))^2 <= rate c <= (1 + sqrt(mu))^2. The smallest mu has rate a at the left end, rate b at the right:
    # sqrt(b / a) = (1 + sqrt(mu)) / (1 - sqrt(mu)), so
    root = (np.sqrt(b) - np.sqrt(a)) / (np.sqrt(b) + np.sqrt(a))
    return (1 + root) ** 2 / b, root**2


def wrong_4(a, b):
    """The best rate without momentum, and the momentum that everybody takes."""
    return 2 / (a + b), 0.9


def wrong_4b(a, b):
    """The factor of gradient descent, squared: the roots of the curvatures are forgotten."""
    root = (b - a) / (b + a)
    return (1 + root) ** 2 / b, root**2


if __name__ == "__main__":
    Lesson("04_adam").check_all(globals())
