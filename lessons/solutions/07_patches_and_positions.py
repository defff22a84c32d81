"""Solutions of lesson 07: `python lessons/solutions/07_patches_and_positions.py` checks them all."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lessons/, where kit.py is
from kit import Lesson


def exercise_1(row, column, columns, P):
    across = columns // P  # patches in a row of the grid
    return across * (row // P) + column // P, P * (row % P) + column % P


def wrong_1(row, column, columns, P):
    """Skips as many patches a row as a patch has pixels: right only if the two numbers happen to agree."""
    return P * (row // P) + column // P, P * (row % P) + column % P


def exercise_2(patches, w, b, class_token, positions):
    batch, patch_count, _ = patches.shape
    tokens = np.empty((batch, patch_count + 1, w.shape[1]))
    tokens[:, 0] = class_token
    tokens[:, 1:] = patches @ w + b
    return tokens + positions


def wrong_2(patches, w, b, class_token, positions):
    """The class token has no position added: the model would still learn, as it can learn their sum."""
    embedded = patches @ w + b + positions[1:]
    first = np.broadcast_to(class_token, (len(patches), 1, len(class_token)))
    return np.concatenate([first, embedded], axis=1)


def wrong_2b(patches, w, b, class_token, positions):
    """The class token is last, and so has the wrong position, as have all others."""
    last = np.broadcast_to(class_token, (len(patches), 1, len(class_token)))
    return np.concatenate([patches @ w + b, last], axis=1) + positions


def exercise_3(dtokens, down, across):
    batch, _, width = dtokens.shape
    grid = dtokens.reshape(batch, down, across, width)
    # tokens[n, i, j] = ... + rows[i] + columns[j], so
    drows = grid.sum(axis=(0, 2))  # every image and every column used row i
    dcolumns = grid.sum(axis=(0, 1))
    return drows, dcolumns


def wrong_3(dtokens, down, across):
    """Rows and columns of the grid are exchanged: in a grid that is a square not even the shapes show it."""
    grid = dtokens.reshape(len(dtokens), across, down, -1)
    return grid.sum(axis=(0, 1)), grid.sum(axis=(0, 2))


def exercise_4(dpatches, rows, columns, P, stride):
    batch = len(dpatches)
    down, across = (rows - P) // stride + 1, (columns - P) // stride + 1
    grid = dpatches.reshape(batch, down, across, P, P)
    dimages = np.zeros((batch, rows, columns))
    for r, s in np.ndindex(P, P):
        # the pixel (r, s) of every patch: these places are all different, so += reaches each once
        dimages[:, r : r + down * stride : stride, s : s + across * stride : stride] += grid[:, :, :, r, s]
    return dimages


def wrong_4(dpatches, rows, columns, P, stride):
    """Assigned where it should be added: of several ways to the loss only the last one counts."""
    batch = len(dpatches)
    down, across = (rows - P) // stride + 1, (columns - P) // stride + 1
    grid = dpatches.reshape(batch, down, across, P, P)
    dimages = np.zeros((batch, rows, columns))
    for i, j in np.ndindex(down, across):
        dimages[:, i * stride : i * stride + P, j * stride : j * stride + P] = grid[:, i, j]
    return dimages


if __name__ == "__main__":
    Lesson("07_patches_and_positions").check_all(globals())
