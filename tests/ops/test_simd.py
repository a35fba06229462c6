"""The vectors' own functions against float64, to the error their docstrings state."""

import numpy as np
import pytest
from numba import njit

from gqa.ops.simd import WIDTH, exp2, load, store, tanh


@njit
def each(source, powers, tangents, count):
    for i in range(0, count, WIDTH):
        store(powers + 4 * i, exp2(load(source + 4 * i)))
        store(tangents + 4 * i, tanh(load(source + 4 * i)))


def both(x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    powers, tangents = np.full_like(x, np.nan), np.full_like(x, np.nan)
    each(x.ctypes.data, powers.ctypes.data, tangents.ctypes.data, len(x))
    return x.astype(np.float64), powers, tangents


@pytest.mark.parametrize("most", [3, 126])
def test_errors_are_as_stated(most):
    x, powers, tangents = both(np.linspace(-most, most, 1 << 18))
    assert np.abs(powers / np.exp2(x) - 1).max() < 2e-7
    assert np.abs(tangents - np.tanh(x)).max() < 2e-7


def test_edges():
    _, powers, tangents = both([-np.inf, -1e4, -126.5, 0, np.nan, 1, -1, 2] * 2)
    assert powers[:4].tolist() == [0, 0, 0, 1]
    assert np.isnan(powers[4])
    assert tangents[3] == 0
