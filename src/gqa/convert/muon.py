"""Muon: momentum whose matrices are made orthogonal before they are applied.

Refinement has some 120 steps to learn in; with it they bring as far as several times as many of AdamW.
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. torch's own Muon iterates in bf16, which most CPUs
emulate; this one stays in the gradient's dtype and takes all matrices of one shape at once.
"""

# N matrices of one shape, R rows, C columns

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

# An odd quintic `a x + b x^3 + c x^5` that, iterated, drives every singular value in (0, 1] to about 1 (Jordan 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of each matrix (N, R, C) near 1 (0.7 to 1.2), by Newton-Schulz iteration."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _blocks(matrices: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(N, R, C) -> all blocks of (rows, columns)."""
    N, R, C = matrices.shape
    return matrices.view(N, R // rows, rows, C // columns, columns).transpose(2, 3).reshape(-1, rows, columns)


def _joined(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Inverse of `_blocks`."""
    N, R, C = shape
    _, rows, columns = blocks.shape
    return blocks.view(N, R // rows, C // columns, rows, columns).transpose(2, 3).reshape(shape)


class Muon(torch.optim.Optimizer):
    """`m = beta m + (1 - beta) g`, `u = orthogonalise(beta m + (1 - beta) g)`,
    `W = (1 - lr wd) W - lr sqrt(max(1, R / C)) u`.

    For the matrices of hidden layers only; embeddings and vectors go to another optimizer. block (R, C), of a group of
    parameters: matrices are taken as blocks of that size, each made orthogonal by itself, which takes far less time
    where a matrix is made of heads; None for whole matrices.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "block": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            of_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape[parameter.shape].append(parameter)
            for shape, parameters in of_shape.items():
                rows, columns = group["block"] or shape
                gradients = torch.stack([self._look_ahead(p, group["momentum"]) for p in parameters])
                updates = _joined(orthogonalise(_blocks(gradients, rows, columns)), gradients.shape)
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _look_ahead(self, parameter: torch.nn.Parameter, beta: float) -> torch.Tensor:
        """Nesterov's momentum: the mean with the newest gradient counted once more."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return gradient.lerp(state["momentum"].lerp_(gradient, 1 - beta), beta)
