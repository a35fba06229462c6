"""Bring a converted attention's output back to the parent's, on calibration text, without any labels.

Letters: N windows · T tokens per window · d hidden size · m = H*G*Dv, the width of what W_o is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gqa.convert.calibrate import BATCH, Block
from gqa.progress import Progress, silent

# Ridge of the refit, as a share of the mean energy of what W_o is given: ties directions that the text does not
# show to the closed-form W_o.
_RIDGE = 1e-4


@torch.no_grad()
def output_error(block: Block, inputs: Tensor, targets: Tensor) -> float:
    """Relative mean squared error of the attention's output: sum |o - y|^2 / sum |y|^2 over (N, T, d)."""
    wrong = sum(
        float((block.attend(x) - y).double().square().sum())
        for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    )
    return wrong / max(float(targets.double().square().sum()), 1e-300)


@torch.no_grad()
def refit(block: Block, inputs: Tensor, targets: Tensor) -> None:
    """Replace W_o by the ridge regression of the parent's attention output on what the child's W_o is given:

    minimise sum |W_o z + b - y|^2 + r |W_o - W_o,old|^2 with z (m,), y (d,), r = 1e-4 * E|z|^2 / m * tokens.
    """
    weight, bias = block.output.weight, block.output.bias
    m = weight.shape[1]
    old = weight.double()
    gram = torch.zeros(m, m, dtype=torch.float64)
    cross = torch.zeros(m, weight.shape[0], dtype=torch.float64)
    given: list[Tensor] = []
    handle = block.output.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    try:
        for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
            block.attend(x)
            z = given.pop().reshape(-1, m).double()
            rest = y.reshape(len(z), -1).double() - z @ old.T
            gram += z.T @ z
            cross += z.T @ (rest if bias is None else rest - bias.double())
    finally:
        handle.remove()
    gram.diagonal().add_(_RIDGE * gram.trace() / m)
    weight.copy_(old + torch.linalg.solve(gram, cross).T)


def refine(
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Progress = silent,
    stage: str = "refine",
) -> None:
    """A short Adam on W_q, W_k, W_v, W_o (and their biases) of this attention alone.

    Loss: sum |o - y|^2 / sum |y|^2 of the batch, o the child's attention output on its own input, y the parent's at
    the same layer. The learning rate falls to zero along a cosine. Nothing else of the model is in memory.
    """
    parameters = [p.requires_grad_(True) for p in block.attention.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH:  # a new pass over the windows, in a new order
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        chosen, order = order[:BATCH], order[BATCH:]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        y = targets[chosen]
        loss = (block.attend(inputs[chosen]) - y).square().sum() / y.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 19 or step == steps - 1:
            progress(stage, step + 1, steps, f"error {loss.item():.4f}")
    for parameter in parameters:
        parameter.requires_grad_(False)
