"""The checks of lesson 11's exercises: the library's own counts, and central differences."""

import itertools

import numpy as np

from tinyvit.gradcheck import numerical_gradients
from tinyvit.model import ViTConfig


def check_1(answer):
    # by hand: patches 1 * 2 + 2, class token 2, positions 5 * 2, the last norm 4, the head 2 * 3 + 3
    yield "2x2 pixels, patches of 1, width 2, no block, 3 classes", answer(2, 1, 2, 0, 4, 3), 29
    for sizes in ((28, 7, 128, 4, 512, 10), (28, 14, 12, 2, 20, 10), (32, 4, 64, 3, 100, 7)):
        names = ("image_size", "patch_size", "width", "depth", "mlp_width", "classes")
        config = ViTConfig(**dict(zip(names, sizes, strict=True)))
        expected = sum(int(np.prod(shape)) for shape in config.shapes().values())
        asked = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
        yield f"weights for {asked}", answer(*sizes), expected


def check_2(answer):
    yield "dz for dy = [[6]] and 4 tokens", answer(np.array([[6.0]]), 4), np.array([[[0.0], [2.0], [2.0], [2.0]]])
    rng = np.random.default_rng(2)
    for batch, tokens, width in ((2, 3, 4), (3, 17, 2), (1, 2, 5)):
        z, dy = rng.standard_normal((batch, tokens, width)), rng.standard_normal((batch, width))
        expected = numerical_gradients(lambda z: (z[:, 1:].mean(axis=1), None), [z], dy)[0]
        yield f"dz for z {z.shape}", answer(dy, tokens), expected


def check_3(answer):
    counts, losses = np.array([3, 1]), np.array([1.0, 5.0])
    gradients = np.array([[2.0, 0.0], [0.0, 4.0]])
    expected = (2.0, np.array([1.5, 1.0]))
    yield "shards of 3 images and 1, with losses 1 and 5", answer(counts, losses, gradients), expected

    # logistic regression of a whole batch, and of its shards
    rng = np.random.default_rng(3)
    x, w, edges = rng.standard_normal((20, 6)), rng.standard_normal(6), [0, 8, 16, 20]

    def loss_and_gradient(rows):
        return np.logaddexp(0, -rows @ w).mean(), -(rows / (1 + np.exp(rows @ w))[:, None]).mean(axis=0)

    shards = [loss_and_gradient(x[start:stop]) for start, stop in itertools.pairwise(edges)]
    yours = answer(np.diff(edges), np.array([s[0] for s in shards]), np.array([s[1] for s in shards]))
    loss, gradient = loss_and_gradient(x)
    yield "20 images in shards of 8, 8 and 4", yours, (float(loss), gradient)


def check_4(answer):
    rng = np.random.default_rng(4)
    shapes = {"embedding": (3, 4), "hidden": (4, 5), "unused": (2,), "bias": (5,), "head": (5,)}
    parameters = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x = rng.standard_normal((6, 3))

    def forward(*arrays):
        p = dict(zip(shapes, arrays, strict=True))
        return np.tanh(x @ p["embedding"] @ p["hidden"] + p["bias"]) @ p["head"], None

    def f(p):
        return float(forward(*(p[name] for name in shapes))[0].sum())

    right = dict(zip(shapes, numerical_gradients(forward, list(parameters.values()), np.ones(6)), strict=True))
    yield "all gradients are right", answer(f, dict(parameters), dict(right)), ""
    scaled = right | {"hidden": 1.02 * right["hidden"]}
    yield "hidden is 2 % too long", answer(f, dict(parameters), scaled), "hidden"
    turned = right["embedding"].copy()
    turned[:, 2] = 0
    two = right | {"bias": -right["bias"], "embedding": turned}
    yield "bias has the wrong sign, embedding lacks a column", answer(f, dict(parameters), two), "bias, embedding"
    stray = right | {"unused": np.array([0.3, 0.1])}
    yield "unused has a gradient, and is used nowhere", answer(f, dict(parameters), stray), "unused"
    after = all(np.array_equal(parameters[name], value) for name, value in _copies(shapes).items())
    yield "the parameters are as they were", after, True


def _copies(shapes):
    rng = np.random.default_rng(4)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}
