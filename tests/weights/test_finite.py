"""Finite or not, wherever the value lies and whatever the dtype."""

import pytest
import torch

from gqa.weights.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_one_value_is_enough(dtype, value, size):
    for place in (0, size // 2, size - 1):
        tensor = torch.linspace(-3, 3, size, dtype=dtype)
        assert all_finite(tensor)
        tensor[place] = value
        assert not all_finite(tensor)


def test_nothing_is_finite():
    assert all_finite(torch.zeros(0, 3))
