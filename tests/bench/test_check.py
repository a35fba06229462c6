"""The gate: right kernels pass, and every kind of wrong one does not."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import gqa
from gqa.bench import check
from gqa.bench.check import answer
from gqa.bench.problem import Problem, random_inputs

DECODE = [Problem(6, 2, 20, 63, batch=2, dtype=dtype) for dtype in ("fp32", "bf16", "fp16", "int8")]
PREFILL = [Problem(6, 2, 20, 63, 63, dtype=dtype) for dtype in ("fp32", "bf16", "fp16")]
BACKWARD = [dataclasses.replace(problem, backward=True) for problem in PREFILL]


def name(problem):
    return f"{'backward' if problem.backward else 'prefill' if problem.causal else 'decode'}-{problem.dtype}"


def run(inputs, impl="reference"):
    options = {"causal": inputs.problem.causal, "impl": impl}
    if inputs.k_scale is not None:
        options |= {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
    leaves = [x.detach() for x in (inputs.q, inputs.k, inputs.v)]
    if inputs.grad is None:
        return (gqa.attention(*leaves, **options),)
    leaves = [x.requires_grad_() for x in leaves]
    out = gqa.attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)


@pytest.mark.parametrize("problem", DECODE + PREFILL + BACKWARD, ids=name)
def test_the_oracle_agrees_with_the_ops_own(problem):
    inputs = random_inputs(problem)
    right = answer(inputs)
    wide = {
        field.name: x.double()
        for field in dataclasses.fields(inputs)
        if isinstance(x := getattr(inputs, field.name), torch.Tensor) and x.is_floating_point()
    }
    for found, exact in zip(run(dataclasses.replace(inputs, **wide)), right.exact, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("problem", DECODE + PREFILL + BACKWARD, ids=name)
def test_right_results_pass(problem):
    inputs = random_inputs(problem)
    error, allowed = answer(inputs).worst(run(inputs))
    assert 0 < error <= allowed


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_limit_does_not_swallow_the_result(dtype):
    inputs = random_inputs(Problem(32, 8, 64, 512, 512, dtype=dtype))
    right = answer(inputs)
    last_rows = right.exact[0][:, :, -8:].abs().max()
    assert right.allowed[0][-1] < last_rows / 10  # the last rows are the smallest


@pytest.mark.parametrize("problem", DECODE + PREFILL, ids=name)
def test_heads_in_another_order_do_not_pass(problem):
    # reads KV head n % H instead of n // G
    inputs = random_inputs(problem)
    G = problem.query_heads // problem.kv_heads
    shuffled = dataclasses.replace(inputs, q=inputs.q.unflatten(1, (G, -1)).transpose(1, 2).flatten(1, 2))
    found = run(shuffled)[0].unflatten(1, (-1, G)).transpose(1, 2).flatten(1, 2)
    error, allowed = answer(inputs).worst((found,))
    assert error > allowed


@pytest.mark.parametrize("problem", DECODE, ids=name)
def test_a_lost_key_does_not_pass(problem):
    inputs = random_inputs(problem)
    parts = {field: getattr(inputs, field) for field in ("k", "v", "k_scale", "v_scale")}
    shorter = {field: None if x is None else x[:, :, 1:] for field, x in parts.items()}
    error, allowed = answer(inputs).worst(run(dataclasses.replace(inputs, **shorter)))
    assert error > allowed


@pytest.mark.parametrize("problem", PREFILL, ids=name)
def test_sight_of_the_future_does_not_pass(problem):
    inputs = random_inputs(problem)
    found = scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=True)
    error, allowed = answer(inputs).worst((found,))
    assert error > allowed


@pytest.mark.parametrize("spoil", ["nan", "shape"])
def test_broken_results_do_not_pass(spoil):
    inputs = random_inputs(DECODE[0])
    found = run(inputs)[0]
    if spoil == "nan":
        found[1, 3, 0, 5] = torch.nan
    else:
        found = found.transpose(1, 2)
    error, allowed = answer(inputs).worst((found,))
    assert error == float("inf") > allowed


def test_each_gradient_is_looked_at():
    inputs = random_inputs(BACKWARD[0])
    right = answer(inputs)
    for index in range(4):
        found = list(run(inputs))
        found[index] = found[index] * 1.01
        error, allowed = right.worst(tuple(found))
        assert error > allowed


def test_the_oracle_is_not_computed_in_tf32(monkeypatch):
    seen = []
    heads = check._heads

    def notes(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return heads(*arguments)

    monkeypatch.setattr(check, "_heads", notes)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        answer(random_inputs(DECODE[0]))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
