"""Attention kernels against each other and against the machine, each behind a check against float64.

The limits say where: inputs are made on their device, and their clock times it.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa.bench.check import Answer, answer
from gqa.bench.gpu import GpuLimits
from gqa.bench.machine import Limits
from gqa.bench.problem import Inputs, Problem, copies_for_cold_caches, random_inputs
from gqa.bench.timing import Seconds, Turn, take_turns
from gqa.errors import GqaError
from gqa.ops.api import attention, attention_impl
from gqa.progress import Progress, silent

OURS = "gqa"
REPEATS = 20
BUDGET_SECONDS = 1.0

_PROBE = "limit: "
_BOUND = "_seconds"  # what the limits call a bound on a contender's time


def broken() -> tuple[type[Exception], ...]:
    """What contenders raise that do not work: errors of torch, JAX, Triton and their compilers, and the ways in which
    other libraries stumble."""
    common = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)
    triton = sys.modules.get("triton.errors")  # its errors are of no common kind; it need not be installed
    return common if triton is None else (*common, triton.TritonError)


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """A contender with its inputs in place.

    run:  computes, and returns when the result is there. This is what is timed.
    read: what `run` returned -> (out,) or (out, dq, dk, dv) in our layout, for the check.
    note: what the reader should know, such as the implementation chosen.
    halves: the forward pass, and the backward pass of what it returned, where they can be run one after the other.
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple[torch.Tensor, ...]] = lambda found: found
    note: str = ""
    halves: tuple[Callable[[], Any], Callable[[Any], tuple[torch.Tensor, ...]]] | None = None


# Puts inputs where the contender wants them. Raises GqaError for a problem that it does not serve.
Contender = Callable[[Inputs], Ready]


def measure(
    problem: Problem,
    contenders: Mapping[str, Contender],
    limits: Limits | GpuLimits,
    *,
    repeats: int = REPEATS,
    budget_seconds: float | None = BUDGET_SECONDS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Check every contender, then time those that were right, in turns with the machine's own limits: a flat row each.

    Each call takes the next of several copies of K and V, so that no cache still holds what the one before read. On a
    CPU a contender's timed decode call follows an untimed one of its own, as calls do in a model.
    The bounds of these rows come from the probes' times in the same turns. On a CPU: roofline_seconds with torch.mm's
    rate, limit_seconds with the fastest fp32 product there is on this machine. On a GPU: limit_seconds, and of it
    copy_seconds and datasheet_seconds (the memory's, at decode) or matrix_seconds (at prefill).

    A row has the problem's fields and its kv_bytes and flops; device, contender, status (`timed`, `wrong`, `unserved`
    or `failed`) and reason; error_max and error_max_allowed; and where timed seconds_p20, _p50, _p80, repeats, the
    bounds and the rates they come from, fraction_of_X for each bound X, kv_bytes_per_second, flops_per_second,
    times_of_gqa (its median over ours) and cold_caches. A backward pass on a GPU has backward_peak_bytes and
    backward_extra_bytes.
    """
    inputs = random_inputs(problem, seed, limits.device)
    right = answer(inputs)
    count, cold = copies_for_cold_caches(problem, limits.machine.cache_bytes)
    copies = [inputs, *(inputs.clone() for _ in range(count - 1))]
    rows = {name: _admit(contender, inputs, right) for name, contender in contenders.items()}
    ready: dict[str, list[Ready]] = {}  # kept until the end: a graph does not hold what it reads
    turns: dict[str, Turn] = {}
    for name, row in rows.items():
        if row["status"] == "timed":
            turn = _line_up(contenders[name], copies, right, limits, row, ready.setdefault(name, []))
            turns |= {} if turn is None else {name: turn}
    del right
    probes = limits.probes(problem)
    warm_up, run_up = limits.rounds(problem)
    timed = take_turns(
        {name: turn.run for name, turn in turns.items()}
        | {f"{_PROBE}{name}": lambda _, probe=probe: probe.run() for name, probe in probes.items()},
        repeats=repeats,
        budget_seconds=budget_seconds,
        warm_up=warm_up,
        run_up=run_up,
        clock=limits.clock,
    )
    reached = {name: probe.amount / timed[f"{_PROBE}{name}"].p50 for name, probe in probes.items()}
    rates = limits.rates(problem, reached)
    times = {name: timed[name].each_of(turn.calls) for name, turn in turns.items()}
    mine = times.get(OURS)
    return [
        describe(problem)
        | {"device": limits.device, "contender": name}
        | row
        | (rates | figures(problem, times[name], rates, mine) | {"cold_caches": cold} if name in turns else {})
        for name, row in rows.items()
    ]


def describe(problem: Problem) -> dict[str, Any]:
    """The problem as columns of a row."""
    return dataclasses.asdict(problem) | {"kv_bytes": problem.kv_bytes, "flops": problem.flops}


def figures(problem: Problem, seconds: Seconds, rates: Mapping[str, float], mine: Seconds | None) -> dict[str, Any]:
    """What is told of one timed contender, beside `mine`, our own times."""
    bounds = {name.removesuffix(_BOUND): value for name, value in rates.items() if name.endswith(_BOUND)}
    return {
        "seconds_p20": seconds.p20,
        "seconds_p50": seconds.p50,
        "seconds_p80": seconds.p80,
        "repeats": seconds.repeats,
        **{f"fraction_of_{name}": bound / seconds.p50 for name, bound in bounds.items()},
        "kv_bytes_per_second": problem.kv_bytes / seconds.p50,
        "flops_per_second": problem.flops / seconds.p50,
        "times_of_gqa": None if mine is None else seconds.p50 / mine.p50,
    }


def measure_dial(
    problems: Iterable[Problem],
    contenders: Mapping[str, Contender],
    limits: Limits | GpuLimits,
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
    except broken() as error:
        return _failed(error)
    return _judged(right, found) | {"note": ready.note}


def _line_up(
    contender: Contender,
    copies: Sequence[Inputs],
    right: Answer,
    limits: Limits | GpuLimits,
    row: dict[str, Any],
    ready: list[Ready],
) -> Turn | None:
    """The turn of a contender that was right; None, and its row changed, where it cannot be made or its result, as the
    turn gives it, is wrong. `ready` is filled with what the turn reads from."""
    try:
        ready += [contender(copy) for copy in copies]
        turn = limits.turn(copies[0].problem, [each.run for each in ready])
        if turn.found is not None:
            turn.run(0)
            row |= _judged(right, ready[0].read(turn.found()))
        if (halves := ready[0].halves) is not None:
            row |= limits.backward_bytes(*halves)
    except broken() as error:
        row |= _failed(error)
    return turn if row["status"] == "timed" else None


def _judged(right: Answer, found: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    error, allowed = right.worst(found)
    verdict = {"error_max": error, "error_max_allowed": allowed}
    if not error <= allowed:
        return {"status": "wrong", "reason": f"off by {error:.2e}, allowed {allowed:.2e}"} | verdict
    return {"status": "timed", "reason": ""} | verdict


def _failed(error: BaseException) -> dict[str, Any]:
    reason = next(iter(str(error).strip().splitlines()), "")
    return {"status": "failed", "reason": f"{type(error).__name__}: {reason}"[:200]}


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

    def forward_with_graph() -> torch.Tensor:
        return function(*leaves)

    def backward(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.grad)

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        out = forward_with_graph()
        return out.detach(), *backward(out)

    return Ready(forward_and_backward, halves=(forward_with_graph, backward))


def _floats_only(inputs: Inputs) -> None:
    if inputs.k_scale is not None:
        raise GqaError("no int8 keys and values")


TORCH: Mapping[str, Contender] = {"torch enable_gqa": torch_enable_gqa, "torch folded": torch_folded}
