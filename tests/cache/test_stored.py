"""Stored keys are no tensor, and say so to whoever takes them for one."""

import copy
import pickle

import pytest
import torch

from gqa.cache.stored import Stored
from gqa.errors import GqaError


@pytest.fixture
def stored():
    return Stored(torch.zeros(1, 2, 3, 4, dtype=torch.int8), scale=torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    "use",
    [
        lambda keys: keys.shape,
        lambda keys: keys.transpose(2, 3),
        lambda keys: torch.matmul(torch.ones(1, 2, 1, 4), keys),
        lambda keys: torch.nn.functional.scaled_dot_product_attention(torch.ones(1, 2, 1, 4), keys, keys),
    ],
    ids=["shape", "method", "matmul", "sdpa"],
)
def test_another_attention_is_told_what_to_do(stored, use):
    with pytest.raises(GqaError, match="no tensors") as caught:
        use(stored)
    assert 'attn_implementation="gqa"' in str(caught.value)


def test_python_itself_is_not_disturbed(stored):
    assert not hasattr(stored, "shape")
    assert "torch.int8" in repr(stored)
    for other in (copy.copy(stored), copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert torch.equal(other.data, stored.data)
        assert torch.equal(other.scale, stored.scale)
