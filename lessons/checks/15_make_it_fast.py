"""What the exercises of lesson 15 are asked, and what is expected."""

import numpy as np
from kit import Between


def check_1(answer):
    yield "1 token of width 1, MLP of width 1", answer(1, 1, 1), 2 * (3 + 1 + 2 + 2)
    yield "3 tokens of width 2, MLP of width 5", answer(3, 2, 5), 2 * 3 * (4 * 4 + 2 * 10) + 2 * 2 * 9 * 2
    yield "the model of this lesson", answer(17, 128, 512), 2 * 17 * (4 * 128**2 + 2 * 128 * 512) + 4 * 17**2 * 128
    yield "1024 tokens", answer(1024, 128, 512), 2 * 1024 * (4 * 128**2 + 2 * 128 * 512) + 4 * 1024**2 * 128


class Counted(np.ndarray):
    """An array that counts what is made of it: new arrays, and the operations of products."""

    made = operations = 0

    def __array_function__(self, function, types, arguments, options):
        result = super().__array_function__(function, types, arguments, options)
        if function is np.dot:
            Counted.operations += 2 * np.size(result) * arguments[0].shape[-1]
        Counted.made += function in (np.empty_like, np.zeros_like, np.ones_like, np.full_like, np.copy)
        return result

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.operations += 2 * np.size(result) * plain[0].shape[-1]
        if out is not None:
            return out[0]
        Counted.made += 1
        return result.view(Counted) if isinstance(result, np.ndarray) else result


def counted(answer, *inputs):
    """Return what the answer returns, how many arrays it made for that, and the operations of its products."""
    Counted.made = Counted.operations = 0
    result = answer(*(x.view(Counted) if isinstance(x, np.ndarray) else x for x in inputs))
    return (result.view(np.ndarray) if isinstance(result, Counted) else result), Counted.made, Counted.operations


def check_2(answer):
    yield "m = [1, 6], v = [4, 9], epsilon = 0", answer(np.array([1.0, 6.0]), np.array([4.0, 9.0]), 0.0), [0.5, 2.0]
    rng = np.random.default_rng(2)
    m, v = rng.standard_normal((7, 3)), rng.uniform(0, 1, (7, 3))
    result, made, _ = counted(answer, m, v, 1e-3)
    yield "random m and v (7, 3), epsilon = 0.001", result, m / (np.sqrt(v) + 1e-3)
    yield "how many arrays were made for that, at most", made, Between(0, 1)


def check_3(answer):
    yield "2 times as fast on 3 cores", answer(2.0, 3), (0.25, 4.0)
    yield "1.5 times as fast on 2 cores", answer(1.5, 2), (1 / 3, 3.0)
    serial = 0.07
    yield "on 16 cores", answer(1 / (serial + (1 - serial) / 16), 16), (serial, 1 / serial)


def check_4(answer):
    x, w, q = np.array([[[1.0, 2.0], [3.0, 4.0]]]), np.array([[1.0], [10.0]]), np.array([[2.0]])
    yield "x = [[[1, 2], [3, 4]]], w = [[1], [10]], q = [[2]]", answer(x, w, q), np.array([[42.0, 86.0]])
    rng = np.random.default_rng(4)
    x, w, q = rng.standard_normal((5, 17, 24)), rng.standard_normal((24, 8)), rng.standard_normal((5, 8))
    result, _, operations = counted(answer, x, w, q)
    yield "random x (5, 17, 24), w (24, 8), q (5, 8)", result, np.einsum("btd,dk,bk->bt", x, w, q)
    yield "operations of the products, where all keys alone take 32640", operations, Between(1, 6000)
