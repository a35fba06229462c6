"""Muon with matrices as wholes and as blocks."""

import pytest
import torch
from torch import nn

from gqa.convert.muon import Muon, _blocks, _joined, orthogonalise


def draw(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_blocks_and_back():
    matrices = draw(2, 6, 8)
    blocks = _blocks(matrices, 3, 4)
    assert blocks.shape == (8, 3, 4)
    assert torch.equal(blocks[1], matrices[0, :3, 4:])
    assert torch.equal(_joined(blocks, matrices.shape), matrices)


@pytest.mark.parametrize("block", [None, (3, 8), (6, 4), (3, 4)], ids=str)
def test_a_step_moves_every_block_by_an_orthogonal_one(block):
    matrix = nn.Parameter(draw(6, 8))
    before, gradient = matrix.detach().clone(), draw(6, 8, seed=1)
    matrix.grad = gradient.clone()
    Muon([{"params": [matrix], "block": block}], lr=0.1).step()
    rows, columns = block or (6, 8)
    moved = _blocks(((before - matrix.detach()) / 0.1 / max(1, rows / columns) ** 0.5)[None], rows, columns)
    for got, whole in zip(moved, _blocks(gradient[None], rows, columns), strict=True):
        assert (torch.linalg.svdvals(got) - 0.95).abs().max() < 0.3
        left, _, right = torch.linalg.svd(whole, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(got.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_orthogonalise_brings_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(draw(3, 10, 7)))
    assert ((values > 0.6) & (values < 1.3)).all()
