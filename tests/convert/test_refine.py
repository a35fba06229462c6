"""The least squares of an attention's output. Letters: N windows, T tokens, m inputs of W_o, d hidden."""

import pytest
import torch
from torch import nn

from gqa.convert.refine import output_error, refit

N, T, m, d = 9, 5, 6, 4
ONES = torch.ones(N, T)


class Toy:
    """As much of a Block as is fitted."""

    def __init__(self, *, bias: bool) -> None:
        torch.manual_seed(0)
        self.output = nn.Linear(m, d, bias=bias).double().requires_grad_(False)

    def attend(self, x):
        return self.output(x.tanh())


@pytest.mark.parametrize("weights", [ONES, torch.linspace(0.1, 1.9, N * T).view(N, T)], ids=["equal", "weighted"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_the_minimum_of_its_objective(bias, weights):
    block, inputs, targets = Toy(bias=bias), torch.randn(N, T, m).double(), torch.randn(N, T, d).double()
    old = block.output.weight.clone()
    before = output_error(block, inputs, targets, weights)  # type: ignore[arg-type]
    refit(block, inputs, targets, weights)  # type: ignore[arg-type]
    assert output_error(block, inputs, targets, weights) < before  # type: ignore[arg-type]
    weight = block.output.weight.clone().requires_grad_()
    z = inputs.tanh()
    shift = block.output.bias if bias else 0
    w = weights[..., None].double()
    ridge = (w * z.square()).sum() / (N * T) / 4
    loss = (w * (z @ weight.T + shift - targets).square()).sum() + ridge * (weight - old).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_what_the_text_does_not_show_stays_as_it_was():
    block = Toy(bias=False)
    old = block.output.weight.clone()
    inputs = torch.randn(N, T, m).double()
    inputs[..., 3:] = 0
    refit(block, inputs, torch.randn(N, T, d).double(), ONES)  # type: ignore[arg-type]
    assert torch.equal(block.output.weight[:, 3:], old[:, 3:])
    assert not torch.equal(block.output.weight[:, :3], old[:, :3])


def test_an_output_that_is_right_stays():
    block, inputs = Toy(bias=True), torch.randn(N, T, m).double()
    old, targets = block.output.weight.clone(), block.attend(inputs)
    refit(block, inputs, targets, ONES)  # type: ignore[arg-type]
    torch.testing.assert_close(block.output.weight, old, rtol=0, atol=1e-12)
    assert output_error(block, inputs, targets, ONES) < 1e-20  # type: ignore[arg-type]
