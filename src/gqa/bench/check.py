"""The gate before the clock: how far a result is from float64, and how far it may be.

The oracle here is a textbook softmax over whole score matrices, a few heads at a time so that float64 copies stay
small, computed where the inputs are. It shares no code with what is timed.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch

from gqa.bench.problem import Inputs
from gqa.units import MIB

FP32_ROUNDING = 2.0**-24
STRETCHES = 64
LEAST_STRETCH = 16  # the first row of dq is zero, and a limit of zero would be none
GPU_PART_BYTES = 512 * MIB  # of keys in float64: many heads at once, as each operation costs its launch


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The result of a problem in float64, (out,) or (out, dq, dk, dv), and how far another may be from it.

    Tokens are judged in stretches, as under a causal mask the first rows are large and the last ones small: `allowed`
    has for each result a limit per stretch.
    """

    exact: tuple[torch.Tensor, ...]
    allowed: tuple[torch.Tensor, ...]

    def worst(self, found: tuple[torch.Tensor, ...]) -> tuple[float, float]:
        """(largest difference, allowed) where a result comes closest to its limit, or is furthest beyond it.
        The difference is infinite where shapes differ or something is not a number."""
        assert len(found) == len(self.exact)
        pairs = []
        for ours, exact, allowed in zip(found, self.exact, self.allowed, strict=True):
            if ours.shape != exact.shape:
                return float("inf"), float(allowed.max())
            error = _largest(ours.double() - exact).nan_to_num(torch.inf)
            place = int((error / allowed).argmax())
            pairs.append((float(error[place]), float(allowed[place])))
        return max(pairs, key=lambda pair: pair[0] / pair[1])


def answer(inputs: Inputs) -> Answer:
    """The exact result, and the error allowed for each part and stretch of it:

        2 * (largest error of the textbook computation in the queries' dtype) + r * (largest element)

    r is what n additions one after another, each rounded to u of the sum, lose in all likelihood, sqrt(n) * u (Higham
    and Mary 2019, SIAM J. Sci. Comput. 41(5)): the textbook sums in blocks, which a kernel need not. These are the S
    keys in fp32, u = 2^-24; for dk and dv also the G query heads in the dtype of the gradients, where they are usually
    added up. Results of a wrong head, or without some of the keys, are off by far more.
    """
    problem = inputs.problem
    G, S = problem.query_heads // problem.kv_heads, problem.context_tokens
    results = [inputs.q, inputs.q, inputs.k, inputs.v] if problem.backward else [inputs.q]
    exact = tuple(torch.empty(x.shape, dtype=torch.float64, device=x.device) for x in results)
    rounding = [torch.zeros(1, device=inputs.q.device) for _ in results]
    everything, at_once = problem.batch * problem.kv_heads, _heads_at_once(inputs)
    for start in range(0, everything, at_once):
        part = slice(start, start + at_once)
        with fp32_products("highest"):
            pairs = zip(_heads(inputs, part, torch.float64), _heads(inputs, part, problem.query_dtype), strict=True)
        for index, (right, plain) in enumerate(pairs):
            # Query head n reads KV head n // G, so the heads of all sequences in a row are groups in a row.
            exact[index].view(everything, -1, *right.shape[2:])[part] = right
            rounding[index] = torch.maximum(rounding[index], _largest(plain.double() - right))
    keys = S**0.5 * FP32_ROUNDING
    heads = keys + G**0.5 * torch.finfo(problem.query_dtype).eps / 2
    allowed = tuple(
        2 * error + sums * _largest(part)
        for error, sums, part in zip(rounding, (keys, keys, heads, heads), exact, strict=False)
    )
    return Answer(exact, allowed)


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """torch's products of fp32 matrices in this precision meanwhile: "highest" is fp32, "high" may be tf32. A GPU
    machine's environment may ask for the latter."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each stretch of tokens of x (B, heads, tokens, D); NaN where there is one."""
    per_token = x.abs().amax(dim=(0, 1, 3))
    stretch = max(LEAST_STRETCH, math.ceil(len(per_token) / STRETCHES))
    return torch.stack([part.amax() for part in per_token.split(stretch)])


def _heads_at_once(inputs: Inputs) -> int:
    """How many KV heads the oracle takes together. Score matrices of a prefill fill a device on their own."""
    problem = inputs.problem
    if inputs.q.device.type == "cpu" or problem.causal:
        return 1
    return max(1, GPU_PART_BYTES // (problem.context_tokens * problem.head_dim * torch.float64.itemsize))


def _heads(inputs: Inputs, part: slice, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """All about n of the B*H KV heads in a dtype: out (n, G, T, D), or out, dq, dk (n, 1, S, D) and dv (n, 1, S, D)."""
    problem = inputs.problem
    G = problem.query_heads // problem.kv_heads

    def of_part(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)[part]

    def queries(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, G, *x.shape[2:])[part].to(dtype)

    q, k, v = queries(inputs.q), of_part(inputs.k).to(dtype), of_part(inputs.v).to(dtype)
    if inputs.k_scale is not None and inputs.v_scale is not None:
        # The numbers that int8 stands for are exact in fp32 only, so they are rounded once.
        wide = torch.promote_types(dtype, torch.float32)
        k = (k.to(wide) * of_part(inputs.k_scale)[..., None].to(wide)).to(dtype)
        v = (v.to(wide) * of_part(inputs.v_scale)[..., None].to(wide)).to(dtype)
    if inputs.grad is None and not problem.causal:
        return (_textbook(q[:, :, 0], k, v, causal=False)[:, :, None],)  # all G query heads see the same keys
    if inputs.grad is None:
        return (torch.stack([_textbook(query, k, v, causal=problem.causal) for query in q.unbind(1)], dim=1),)
    outs, dqs = [], []
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for query, grad in zip(q.unbind(1), queries(inputs.grad).unbind(1), strict=True):
        leaves = [x.detach().requires_grad_() for x in (query, k, v)]
        out = _textbook(*leaves, causal=problem.causal)
        gradients = torch.autograd.grad(out, leaves, grad)
        outs.append(out.detach())
        dqs.append(gradients[0])
        dk, dv = dk + gradients[1], dv + gradients[2]
    return torch.stack(outs, dim=1), torch.stack(dqs, dim=1), dk[:, None], dv[:, None]


def _textbook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """softmax(q kT / sqrt(D)) v of one query head per KV head: q (n, T, D), k and v (n, S, D)."""
    scores = _product(q, k.mT) * q.shape[-1] ** -0.5
    if causal:
        T = q.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return _product(torch.softmax(scores, dim=-1), v)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A matrix product in the operands' dtype: summed in fp32, then rounded. torch's own in fp16 can take minutes."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)
