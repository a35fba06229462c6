"""Attention kernels against each other and against the machine, each behind a check against float64."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa.bench.check import Answer, answer
from gqa.bench.machine import Limits
from gqa.bench.problem import Inputs, Problem, copies_for_cold_caches, random_inputs
from gqa.bench.timing import Seconds, take_turns
from gqa.errors import GqaError
from gqa.ops.api import attention, attention_impl
from gqa.progress import Progress, silent

OURS = "gqa"
REPEATS = 20
BUDGET_SECONDS = 1.0

_READ, _SGEMM, _MULTIPLY = "limit: read", "limit: sgemm", "limit: fp32"


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """A contender with its inputs in place.

    run:  computes, and returns when the result is there. This is what is timed.
    read: what `run` returned -> (out,) or (out, dq, dk, dv) in our layout, for the check.
    note: what the reader should know, such as the implementation chosen.
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple[torch.Tensor, ...]] = lambda found: found
    note: str = ""


# Puts inputs where the contender wants them. Raises GqaError for a problem that it does not serve.
Contender = Callable[[Inputs], Ready]


def measure(
    problem: Problem,
    contenders: Mapping[str, Contender],
    limits: Limits,
    *,
    repeats: int = REPEATS,
    budget_seconds: float | None = BUDGET_SECONDS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Check every contender, then time those that were right, in turns with the machine's own limits: a flat row each.

    Each call takes the next of several copies of K and V, so that no cache still holds what the one before read. At
    decode a contender's timed call follows an untimed one of its own, as calls do in a model.
    The rooflines of these rows come from the probes' times in the same turns: roofline_seconds with torch.mm's rate,
    limit_seconds with the fastest fp32 product there is on this machine.

    A row has the problem's fields and its kv_bytes and flops; contender, status (`timed`, `wrong`, `unserved` or
    `failed`) and reason; error_max and error_max_allowed; and where timed seconds_p20, _p50, _p80, repeats, both
    rooflines and the rates they come from, fraction_of_roofline, fraction_of_limit, times_of_gqa (its median over
    ours) and cold_caches.
    """
    inputs = random_inputs(problem, seed)
    right = answer(inputs)
    count, cold = copies_for_cold_caches(problem, limits.machine.cache_bytes)
    copies = [inputs, *(inputs.clone() for _ in range(count - 1))]
    rows = {name: _admit(contender, inputs, right) for name, contender in contenders.items()}
    del right
    ready = {
        name: [contenders[name](copy) for copy in copies] for name, row in rows.items() if row["status"] == "timed"
    }
    turns: dict[str, Callable[[int], object]] = {
        name: lambda turn, calls=calls: calls[turn % count].run() for name, calls in ready.items()
    }
    probes = {_READ: limits.read, _SGEMM: limits.sgemm, _MULTIPLY: limits.multiply}
    turns |= {name: lambda _, probe=probe: probe.run() for name, probe in probes.items()}
    # The check has been a first run for all; a prefill is too long for more of them.
    warm_up, run_up = (0, 0) if problem.causal else (2, 1)
    timed = take_turns(turns, repeats=repeats, budget_seconds=budget_seconds, warm_up=warm_up, run_up=run_up)
    read, sgemm, multiply = (probe.amount / timed[name].p50 for name, probe in probes.items())
    rates = {
        "read_bytes_per_second": read,
        "sgemm_flops_per_second": sgemm,
        "fp32_flops_per_second": multiply,
        "roofline_seconds": problem.roofline_seconds(read, sgemm),
        "limit_seconds": problem.roofline_seconds(read, max(sgemm, multiply)),
    }
    mine = timed.get(OURS)
    return [
        describe(problem)
        | {"contender": name}
        | row
        | (rates | figures(timed[name], rates, mine) | {"cold_caches": cold} if name in ready else {})
        for name, row in rows.items()
    ]


def describe(problem: Problem) -> dict[str, Any]:
    """The problem as columns of a row."""
    return dataclasses.asdict(problem) | {"kv_bytes": problem.kv_bytes, "flops": problem.flops}


def figures(seconds: Seconds, rates: Mapping[str, float], mine: Seconds | None) -> dict[str, Any]:
    """What is told of one timed contender, beside `mine`, our own times."""
    return {
        "seconds_p20": seconds.p20,
        "seconds_p50": seconds.p50,
        "seconds_p80": seconds.p80,
        "repeats": seconds.repeats,
        "fraction_of_roofline": rates["roofline_seconds"] / seconds.p50,
        "fraction_of_limit": rates["limit_seconds"] / seconds.p50,
        "times_of_gqa": None if mine is None else seconds.p50 / mine.p50,
    }


def measure_dial(
    problems: Iterable[Problem],
    contenders: Mapping[str, Contender],
    limits: Limits,
    *,
    repeats: int = REPEATS,
    budget_seconds: float | None = BUDGET_SECONDS,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """`measure` one problem after the other, as the stops of a dial."""
    problems = list(problems)
    rows: list[dict[str, Any]] = []
    for done, problem in enumerate(problems, start=1):
        rows += measure(problem, contenders, limits, repeats=repeats, budget_seconds=budget_seconds)
        progress("attention", done, len(problems), f"{problem.kv_heads} KV heads")
    return rows


def _admit(contender: Contender, inputs: Inputs, right: Answer) -> dict[str, Any]:
    """Run once and compare. Status `timed` means that it may be timed."""
    try:
        ready = contender(inputs)
        found = ready.read(ready.run())
    except GqaError as error:
        return {"status": "unserved", "reason": error.what}
    except (RuntimeError, ValueError, TypeError) as error:  # what torch, JAX and their compilers raise
        reason = next(iter(str(error).strip().splitlines()), "")
        return {"status": "failed", "reason": f"{type(error).__name__}: {reason}"[:200]}
    error, allowed = right.worst(found)
    verdict = {"error_max": error, "error_max_allowed": allowed, "note": ready.note}
    if not error <= allowed:
        return {"status": "wrong", "reason": f"off by {error:.2e}, allowed {allowed:.2e}"} | verdict
    return {"status": "timed", "reason": ""} | verdict


def ours(impl: str = "auto") -> Contender:
    """`gqa.attention` with this impl."""

    def contender(inputs: Inputs) -> Ready:
        options: dict[str, Any] = {"causal": inputs.problem.causal, "impl": impl}
        if inputs.k_scale is not None:
            options |= {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
        ready = of_torch(inputs, functools.partial(attention, **options))
        return dataclasses.replace(ready, note=attention_impl(inputs.q, inputs.k, inputs.v, **options))

    return contender


def torch_enable_gqa(inputs: Inputs) -> Ready:
    """What torch's documentation says to write."""
    _floats_only(inputs)
    return of_torch(
        inputs, functools.partial(scaled_dot_product_attention, is_causal=inputs.problem.causal, enable_gqa=True)
    )


def torch_folded(inputs: Inputs) -> Ready:
    """What an expert would write for decode: the G queries of a KV head as rows of one matrix, (B, H, G, D)."""
    _floats_only(inputs)
    if inputs.problem.causal:
        raise GqaError("folded queries have no causal mask of their own", allowed="decode")
    H = inputs.problem.kv_heads

    def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q.view(q.shape[0], H, -1, q.shape[3]), k, v).view_as(q)

    return of_torch(inputs, folded)


def of_torch(inputs: Inputs, function: Callable[..., torch.Tensor]) -> Ready:
    """A function of q, k and v as a contender: forward, or forward and backward where the problem says so."""
    if inputs.grad is None:

        def forward() -> tuple[torch.Tensor, ...]:
            with torch.inference_mode():
                return (function(inputs.q, inputs.k, inputs.v),)

        return Ready(forward)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)

    return Ready(forward_and_backward)


def _floats_only(inputs: Inputs) -> None:
    if inputs.k_scale is not None:
        raise GqaError("no int8 keys and values")


TORCH: Mapping[str, Contender] = {"torch enable_gqa": torch_enable_gqa, "torch folded": torch_folded}
