"""Which KV heads share: balanced partitions of the parent's KV heads."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa.convert.heads import Heads
from gqa.convert.keys import effective, key_gram, query_energy, row_paths
from gqa.convert.merge import value_gram, value_paths

Groups = list[list[int]]


def contiguous(kv_heads: int, groups: int) -> Groups:
    """Neighbours share, as in the published recipe (Ainslie et al. 2023, arXiv 2305.13245)."""
    r = kv_heads // groups
    return [list(range(start, start + r)) for start in range(0, kv_heads, r)]


def search(heads: Heads, moment: Tensor | None, groups: int, generator: torch.Generator, restarts: int = 20) -> Groups:
    """The balanced partition with the least energy lost by pairs that share, found by swaps from several starts.

    The loss of a pair is what the `svd` method loses when just these two heads merge, as a share of the layer's
    whole energy, keys and values weighing the same. The first start is the contiguous partition, so that the result
    is never worse than that.
    """
    H = len(heads.k)
    if groups in (1, H):
        return contiguous(H, groups)
    losses = pair_losses(heads, moment).cpu()
    best, best_loss = contiguous(H, groups), float("inf")
    for start in range(restarts):
        order = torch.arange(H) if start == 0 else torch.randperm(H, generator=generator)
        labels, loss = _descend(losses, order // (H // groups))
        if loss < best_loss - 1e-15:
            best_loss = loss
            best = [torch.nonzero(labels == label).flatten().tolist() for label in range(groups)]
    return sorted(best)


def pair_losses(heads: Heads, moment: Tensor | None) -> Tensor:
    """(H, H): the share of the layer's energy lost when heads i and j share one KV head; zero on the diagonal."""
    query, key = effective(heads, moment)
    R = heads.turned
    lost, total = key.new_zeros(len(key), len(key)), key.new_zeros(())
    if R:
        keys = key_gram(key[:, :R], query_energy(query[..., :R, :], moment), moment)  # (F, H, H)
        power = keys.diagonal(dim1=1, dim2=2).real  # (F, H)
        middle = (power[:, :, None] + power[:, None, :]) / 2
        spread = ((power[:, :, None] - power[:, None, :]) / 2).square() + keys.abs().square()
        lost += (middle - spread.sqrt()).clamp_min(0).sum(0)  # the smaller eigenvalue of each 2 x 2 block
        total += power.sum()
    if key.shape[1] > R:
        lost_rows, energy = _subspace_losses(value_gram(row_paths(query[..., R:, :], key[:, R:], moment)[0], moment))
        lost, total = lost + lost_rows, total + energy
    lost_values, energy = _subspace_losses(value_gram(value_paths(heads)[0], moment))
    return (lost / total + lost_values / energy).fill_diagonal_(0)


def _subspace_losses(gram: Tensor) -> tuple[Tensor, Tensor]:
    """What pairs lose that share n of their 2 n directions (H, H), and the energy of all heads; gram (H, n, H, n)."""
    H, n = gram.shape[:2]
    lost = gram.new_zeros(H, H)
    for i in range(H):
        for j in range(i + 1, H):
            pair = torch.tensor([i, j])
            block = gram[pair][:, :, pair].reshape(2 * n, 2 * n)
            lost[i, j] = lost[j, i] = torch.linalg.eigvalsh(block)[:n].clamp_min(0).sum()
    return lost, gram.reshape(H * n, H * n).trace()


def _descend(losses: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Take the best swap of two heads of different groups until none helps."""
    labels = labels.clone()
    while True:
        member = torch.nn.functional.one_hot(labels).to(losses.dtype)  # (H, groups)
        to_group = losses @ member  # loss of head i with every member of a group
        own = to_group.gather(1, labels[:, None])  # (H, 1)
        cross = to_group[:, labels]  # [i, j]: i with the group of j
        gain = own + own.T - cross - cross.T + 2 * losses
        gain[labels[:, None] == labels[None, :]] = 0
        flat = int(gain.argmax())
        i, j = divmod(flat, len(labels))
        if gain[i, j] <= 1e-12 * losses.max():
            return labels, float((own.sum() / 2).item())
        labels[i], labels[j] = labels[j].clone(), labels[i].clone()
