"""The costly operations as index loops, compiled by Numba: one pass over memory in place of NumPy's many.

Each loop is the function of the same name in `reference.py`, spelled out in indices, and writes into arrays of its
caller. `ops` and `optim` call them for float32 arrays inside `backend.use_loops`. This module imports
Numba, which is optional, so it is imported only there.

A loop reads and writes each array under one name, since the compiler cannot vectorise over arrays that may overlap.
Exponentials are polynomials, since calls of `exp` are not vectorised.
"""

import time

import numpy as np
from numba import config, njit

# The compiler may fuse a product with a sum, ignore the sign of 0 and multiply by a reciprocal. Where a loop has sums
# it may also reorder them. It may never assume that there is no NaN or infinity.
FLAGS = {"contract", "nsz", "arcp"}
OPTIONS = {"error_model": "numpy", "nogil": True}
inner = njit(inline="always", fastmath=FLAGS, **OPTIONS)


def loop(function, flags=FLAGS):
    """Compile a function at its first call, and keep the result in a file for other processes."""
    try:
        return njit(cache=True, fastmath=flags, **OPTIONS)(function)
    except RuntimeError:  # no folder for the file is writable
        return njit(fastmath=flags, **OPTIONS)(function)


def loop_with_sums(function):
    """Compile a function whose sums may be reordered, which vectorises them."""
    return loop(function, FLAGS | {"reassoc"})


ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
NAN, LARGEST = np.float32(np.nan), np.finfo(np.float32).max


# ---- GELU ----

# erf(x / sqrt(2)) = x * P(x**2) / Q(x**2) within 2e-9 for |x| < 6, beyond which float32 rounds it to 1
LIMIT = np.float32(6)
P0, P1, P2, P3, P4, P5, P6 = np.float32(
    [7.97884573e-01, 6.52926756e-02, 9.61345968e-03, 3.39859827e-04,
     1.70154275e-05, 1.07030699e-07, -1.54594712e-10]
)  # fmt: skip
Q1, Q2, Q3, Q4, Q5 = np.float32(
    [2.48499016e-01, 2.84649222e-02, 1.93409961e-03, 8.21138597e-05, 2.01894352e-06]
)
# exp(-u) = 1 + u * E(u) within 3e-9 for u from 0 to LIMIT**2 / 32
E1, E2, E3, E4, E5, E6, E7 = np.float32(
    [-9.99999866e-01, 4.99997218e-01, -1.66646582e-01, 4.15965156e-02,
     -8.19948932e-03, 1.24438386e-03, -1.12739048e-04]
)  # fmt: skip
THIRTY_SECOND = np.float32(1 / 32)
DENSITY_AT_0 = np.float32(1 / np.sqrt(2 * np.pi))


@inner
def normal_cdf(x):
    """Return the probability that a standard normal variable lies below x."""
    near = min(max(x, -LIMIT), LIMIT)
    s = near * near
    p = P0 + s * (P1 + s * (P2 + s * (P3 + s * (P4 + s * (P5 + s * P6)))))
    q = ONE + s * (Q1 + s * (Q2 + s * (Q3 + s * (Q4 + s * Q5))))
    return ZERO if x < -LIMIT else HALF + HALF * near * p / q


@inner
def normal_density(x):
    """Return the density of a standard normal variable at x."""
    u = x * x * THIRTY_SECOND  # exp(-x**2 / 2) = exp(-u)**16
    e = ONE + u * (E1 + u * (E2 + u * (E3 + u * (E4 + u * (E5 + u * (E6 + u * E7))))))
    e *= e
    e *= e
    e *= e
    e *= e
    return ZERO if abs(x) > LIMIT else e * DENSITY_AT_0


@inner
def above(x):
    """Return x, with the least finite number for minus infinity, because minus infinity times 0 is NaN."""
    return -LARGEST if x < -LARGEST else x


@inner
def finite(x):
    """Return x, with finite numbers for both infinities."""
    return LARGEST if x > LARGEST else above(x)


@loop
def gelu_forward(x, out, derivative):
    """Write x * cdf(x) and its derivative for x (N,)."""
    for i in range(x.shape[0]):
        cdf = normal_cdf(x[i])
        out[i] = above(x[i]) * cdf
        derivative[i] = cdf + finite(x[i]) * normal_density(x[i])


@loop
def gelu_values(x, out):
    """Write x * cdf(x) for x (N,)."""
    for i in range(x.shape[0]):
        out[i] = above(x[i]) * normal_cdf(x[i])


# ---- layer norm ----


@inner
def not_infinite(variance):
    """Return a variance, with NaN for infinity, which would give an output of 0."""
    return NAN if variance > LARGEST else variance


@loop_with_sums
def layer_norm_forward(x, w, b, epsilon, out, normalised, inverse_deviation):
    """Write the layer norm of x (N, D), and what the backward pass needs: (N, D) and (N, 1)."""
    width = np.float32(x.shape[1])
    for n in range(x.shape[0]):
        mean = ZERO
        for i in range(x.shape[1]):
            mean += x[n, i]
        mean /= width
        variance = ZERO
        for i in range(x.shape[1]):
            variance += (x[n, i] - mean) ** 2
        variance /= width
        inverse = ONE / np.sqrt(not_infinite(variance) + epsilon)
        inverse_deviation[n, 0] = inverse
        for i in range(x.shape[1]):
            normal = (x[n, i] - mean) * inverse
            normalised[n, i] = normal
            out[n, i] = normal * w[i] + b[i]


@loop_with_sums
def layer_norm_backward(dout, normalised, inverse_deviation, w, dx, dw, db):
    """Write dx (N, D), dw (D,) and db (D,) for dout (N, D)."""
    width = np.float32(dout.shape[1])
    for i in range(dout.shape[1]):
        dw[i] = ZERO
        db[i] = ZERO
    for n in range(dout.shape[0]):
        through_mean = ZERO
        through_deviation = ZERO
        for i in range(dout.shape[1]):
            # out = normalised * w + b
            dw[i] += dout[n, i] * normalised[n, i]
            db[i] += dout[n, i]
            dnormalised = dout[n, i] * w[i]
            through_mean += dnormalised
            through_deviation += dnormalised * normalised[n, i]
        through_mean /= width
        through_deviation /= width
        for i in range(dout.shape[1]):
            # normalised = (x - mean) / deviation
            dnormalised = dout[n, i] * w[i]
            direct = dnormalised - through_mean - normalised[n, i] * through_deviation
            dx[n, i] = direct * inverse_deviation[n, 0]


# ---- Adam ----


@loop
def adam_step(flat, gradient, m, v, beta1, rest1, beta2, rest2, rate, scale, epsilon):
    """Update flat (P,) and both moments in place: flat -= rate * m / (scale * sqrt(v) + epsilon).

    rest1 and rest2 are 1 - beta1 and 1 - beta2, which lose their digits if they are computed in float32. Return
    whether the square of a finite element of the gradient overflows.
    """
    overflow = False
    for i in range(flat.shape[0]):
        g = gradient[i]
        too_large = (g * g > LARGEST) & (abs(g) <= LARGEST)
        overflow |= too_large
        g = ZERO if too_large else g  # an infinite v would stay infinite
        m[i] = beta1 * m[i] + rest1 * g
        v[i] = beta2 * v[i] + rest2 * (g * g)
        flat[i] -= rate * m[i] / (np.sqrt(v[i]) * scale + epsilon)
    return overflow


def prepare():
    """Compile all loops or load them from their files, and return the seconds that compilation took."""
    if config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    x, row = np.ones((1, 1), np.float32), np.ones(1, np.float32)
    began = time.perf_counter()
    gelu_forward(row, row.copy(), row.copy())
    gelu_values(row, row.copy())
    layer_norm_forward(x, row, row, ONE, x.copy(), x.copy(), x.copy())
    layer_norm_backward(x, x, x, row, x.copy(), row.copy(), row.copy())
    adam_step(row.copy(), row, row.copy(), row.copy(), *[HALF] * 7)
    loops = (gelu_forward, gelu_values, layer_norm_forward, layer_norm_backward, adam_step)
    compiled = any(loop.stats.cache_misses or not loop.stats.cache_path for loop in loops)
    return time.perf_counter() - began if compiled else 0.0
