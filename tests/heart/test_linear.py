"""The linear layer: its values and its errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SHAPES, normal, seeds, small

from tinyvit.ops import linear_forward

leading = st.lists(small, min_size=0, max_size=3).map(tuple)


@SHAPES
@given(leading, small, small, seeds)
def test_values_are_sums_over_the_input_axis(leading, inputs, outputs, seed):
    x, w, b = normal(seed, (*leading, inputs), (inputs, outputs), (outputs,))
    out, _ = linear_forward(x, w, b)
    assert out.shape == (*leading, outputs)
    for place in np.ndindex(out.shape):
        expected = b[place[-1]] + sum(x[place[:-1]][i] * w[i, place[-1]] for i in range(inputs))
        assert out[place] == pytest.approx(expected, abs=1e-12)


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"w must have the shape \(I, O\) for I = 3, O = 5, not \(4, 5\)"):
        linear_forward(*normal(0, (2, 3), (4, 5), (5,)))
