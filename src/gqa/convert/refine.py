"""Bring a converted attention's output back to the parent's, on calibration text, without any labels.

Letters: N windows · T tokens per window · d hidden size · m = H*G*Dv, the width of what W_o is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gqa.convert.calibrate import BATCH, Block
from gqa.convert.muon import Muon
from gqa.convert.states import States
from gqa.progress import Progress, silent

# Ridge of the refit, in tokens: the closed-form W_o counts as much as that part of a token in every direction. It ties
# directions that the text does not show, and keeps a fit on little text from following it (docs/LOG.md).
_RIDGE = 0.25


@torch.no_grad()
def output_error(block: Block, inputs: States, targets: States, weights: Tensor) -> float:
    """Relative mean squared error of the attention's output: sum w |o - y|^2 / sum w |y|^2 over (N, T, d), w (N, T) as
    `token_weights` gives them."""
    wrong = whole = 0.0
    for x, y, w in zip(inputs.split(BATCH), targets.split(BATCH), weights.split(BATCH), strict=True):
        wrong += float((w * (block.attend(x) - y).double().square().sum(-1)).sum())
        whole += float((w * y.double().square().sum(-1)).sum())
    return wrong / max(whole, 1e-300)


@torch.no_grad()
def refit(block: Block, inputs: States, targets: States, weights: Tensor) -> None:
    """Replace W_o by the ridge regression of the parent's attention output on what the child's W_o is given:

    minimise sum w |W_o z + b - y|^2 + r |W_o - W_o,old|^2 with z (m,), y (d,), r = E[w |z|^2] / 4; w (N, T) as
    `token_weights` gives them.
    """
    weight, bias = block.output.weight, block.output.bias
    m = weight.shape[1]
    old = weight.double()
    gram = old.new_zeros(m, m)
    cross = old.new_zeros(m, weight.shape[0])
    given: list[Tensor] = []
    tokens = inputs.shape[0] * inputs.shape[1]
    handle = block.output.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    try:
        for x, y, w in zip(inputs.split(BATCH), targets.split(BATCH), weights.split(BATCH), strict=True):
            block.attend(x)
            z = given.pop().reshape(-1, m).double()
            rest = y.reshape(len(z), -1).double() - z @ old.T
            weighted = z.T * w.reshape(-1)
            gram += weighted @ z
            cross += weighted @ (rest if bias is None else rest - bias.double())
    finally:
        handle.remove()
    gram.diagonal().add_(_RIDGE * gram.trace() / tokens)
    weight.copy_(old + torch.linalg.solve(gram, cross).T)


def refine(
    block: Block,
    inputs: States,
    targets: States,
    weights: Tensor,
    *,
    head_dim: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Progress = silent,
    stage: str = "refine",
) -> None:
    """A short training of W_q, W_k, W_v, W_o (and their biases) of this attention alone.

    Loss: sum w |o - y|^2 / sum w |y|^2 of the batch, o the child's attention output on its own input, y the target at
    the same layer, w (N, T) as `token_weights` gives them. Muon for the matrices, head by head, Adam for biases and
    norms; a step moves a matrix by `learning_rate` of its heads' root mean square singular value at the start, falling
    to zero along a cosine, so that one rate fits models of any scale. Nothing else of the model is in memory.
    """
    parameters = [p.requires_grad_(True) for p in block.attention.parameters()]
    matrices = [module.weight for module in block.attention.modules() if isinstance(module, nn.Linear)]
    known = {id(matrix) for matrix in matrices}
    vectors = [p for p in parameters if id(p) not in known]
    optimisers: list[torch.optim.Optimizer] = [
        Muon([_by_heads(p, head_dim, learning_rate, output=p is block.output.weight) for p in matrices])
    ]
    if vectors:
        optimisers.append(
            torch.optim.Adam([{"params": [p], "lr": learning_rate * _size(p)} for p in vectors], betas=(0.9, 0.95))
        )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        for optimiser in optimisers
    ]
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH:  # a new pass over the windows, in a new order
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        chosen, order = order[:BATCH], order[BATCH:]
        y, w = targets[chosen], weights[chosen.to(weights.device), :, None]
        loss = (w * (block.attend(inputs[chosen]) - y).square()).sum() / (w * y.square()).sum()
        block.attention.zero_grad()
        loss.backward()
        for worker in (*optimisers, *schedules):
            worker.step()
        if step % 20 == 19 or step == steps - 1:
            progress(stage, step + 1, steps, f"error {loss.item():.4f}")
    for parameter in parameters:
        parameter.requires_grad_(False)


def _by_heads(matrix: Tensor, head_dim: int, learning_rate: float, *, output: bool) -> dict[str, Any]:
    """A group of parameters for Muon: the rows of a projection are heads, the columns of W_o."""
    rows, columns = matrix.shape
    block = (rows, head_dim) if output else (head_dim, columns)
    heads = matrix.numel() // (block[0] * block[1])
    size = float(matrix.detach().norm()) / (heads * min(block)) ** 0.5
    return {"params": [matrix], "lr": learning_rate * size / max(1.0, block[0] / block[1]) ** 0.5, "block": block}


def _size(vector: Tensor) -> float:
    """Root mean square of a bias, or a small number where it is zero."""
    return max(float(vector.detach().square().mean().sqrt()), 1e-3)
