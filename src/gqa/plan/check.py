"""The planner against what engines log."""

from __future__ import annotations

import bisect
import importlib.resources
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gqa.config import ModelShape, parse_config
from gqa.errors import GqaError
from gqa.hardware import find_device
from gqa.plan.capacity import max_context
from gqa.plan.decode import decode_bound
from gqa.plan.engines import LlamaCpp, SGLang, find_engine
from gqa.plan.kv_dtype import kv_dtype
from gqa.plan.pool import Pool
from gqa.plan.shard import shard
from gqa.record import Record
from gqa.source import open_source
from gqa.units import GIB, MIB

_KNOWN = {
    *("engine", "model", "config", "kv_dtype", "tensor_parallel", "context", "requests", "batched_tokens", "block"),
    *("budget_gib", "memory_gib", "utilisation", "taken_gib", "tokens", "device", "logged", "source", "inferred"),
}


def check(path: Path | None = None) -> Record:
    """Every logged case of data/logged.toml, or of a file in its format: what the planner gives beside what is logged.

    Rows: engine, model, figure, logged, predicted, agrees, source; efficiency, the share of the bound that a measured
    speed reached. Raises GqaError for a file that is not understood.
    """
    cases = _read(path)
    rows = [row for case in cases for row in _rows(case)]
    wrong = sum(not row["agrees"] for row in rows)
    return Record(
        "plan check",
        inputs={"cases": len(cases), "file": str(path) if path else None},
        results={"figures": rows, "wrong": wrong},
        basis={"predicted": "predicted"},
        assumptions=(
            "A logged size has the digits that are printed. Where a budget is logged, any budget that is printed so may"
            " have been meant: a count must come from one of them, what is logged beside it from those that give it.",
            "A measured speed agrees if it is below the bound.",
        ),
    )


def _read(path: Path | None) -> list[dict[str, Any]]:
    name = path or "data/logged.toml"
    try:
        source = path or importlib.resources.files("gqa").joinpath("data", "logged.toml")
        cases = tomllib.loads(source.read_text("utf-8"))["case"]
        for case in cases:
            missing, strange = {"engine", "logged", "source"} - set(case), set(case) - _KNOWN
            if missing or strange or ("model" in case) == ("config" in case):
                raise ValueError(f"a case with the keys {', '.join(case)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GqaError(
            "not a file of logged cases", got=f"{name}: {error}", allowed="cases as in gqa's data/logged.toml"
        ) from None
    return cases


def _rows(case: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    source = open_source(case["model"]) if "model" in case else None
    name = source.name if source else str(case["config"].get("model_type"))
    try:
        shape = parse_config(source.config if source else case["config"], name)
        predicted = _decode(case, shape) if case["engine"] == "decode" else _figures(case, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise GqaError("a logged case is not understood", got=f"{name}, {case['source']}: {error!r}") from None
    for figure, logged in case["logged"].items():
        if figure not in predicted:
            raise GqaError(
                "a logged figure is not one that gqa gives here", got=figure, allowed=", ".join(sorted(predicted))
            )
        yield {
            "engine": case["engine"],
            "model": name,
            "figure": figure,
            "logged": str(logged),
            **_judge(figure, logged, *predicted[figure]),
            "source": case["source"],
            "inferred": case.get("inferred"),
        }


def _judge(figure: str, logged: str | int, low: float, high: float) -> dict[str, Any]:
    """`low` and `high`: what the smallest and the largest possible budget give; equal without one."""
    if figure == "tokens_per_second":
        return {"predicted": f"at most {low:.1f}", "agrees": float(logged) < low, "efficiency": float(logged) / low}
    if isinstance(logged, int):
        shown = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
        return {"predicted": shown, "agrees": low <= logged <= high, "efficiency": None}
    places = len(logged.partition(".")[2])
    half = 0.5 * 10**-places * (1 + 1e-9)
    shown = f"{low:.{places}f}" if f"{low:.{places}f}" == f"{high:.{places}f}" else f"{low:.4f} to {high:.4f}"
    return {"predicted": shown, "agrees": low - half <= float(logged) <= high + half, "efficiency": None}


def _figures(case: Mapping[str, Any], shape: ModelShape) -> dict[str, tuple[float, float]]:
    engine = find_engine(case["engine"], block=case.get("block"), batched_tokens=case.get("batched_tokens"))
    kv = kv_dtype(case.get("kv_dtype", "bf16"))
    rank = shard(shape, case.get("tensor_parallel", 1))
    context, requests = case.get("context", 1), case.get("requests", 1)
    if "memory_gib" in case:
        asked, taken = float(case["memory_gib"]) * case["utilisation"], sum(map(float, case["taken_gib"]))
        return {"budget_gib": (asked - taken, asked - taken)}
    if "budget_gib" in case:
        found: dict[str, list[float]] = {}
        budgets = _interval(case["budget_gib"])
        for budget in _narrow(budgets, case["logged"], lambda b: engine.pool(rank, context, b, kv)):
            pool = engine.pool(rank, context, budget, kv)
            found.setdefault("tokens", []).append(pool.tokens)
            found.setdefault("concurrency", []).append(pool.concurrency)
            found.setdefault("blocks", []).append(pool.blocks or 0)
            found.setdefault("block_tokens", []).append(pool.block_tokens or 0)
            found.setdefault("longest_context", []).append(max_context(engine, rank, 1, kv, budget) or 0)
        need = engine.bytes_for(rank, context, 1, kv) / GIB
        return {name: (low, high) for name, (low, high) in found.items()} | {"needed_gib": (need, need)}
    if isinstance(engine, SGLang):
        parts = engine.parts(rank, case["tokens"], requests, kv)
    elif isinstance(engine, LlamaCpp):
        parts = engine.parts(rank, context, requests, kv)
    else:
        parts = {"total": engine.bytes_for(rank, context, requests, kv)}
    parts = {"total": sum(parts.values())} | parts
    units = {f"{name}_gib": size / GIB for name, size in parts.items()}
    units |= {f"{name}_mib": size / MIB for name, size in parts.items()}
    return {name: (size, size) for name, size in units.items()}


def _narrow(budgets: tuple[int, int], logged: Mapping[str, Any], pool: Callable[[int], Pool]) -> tuple[int, int]:
    """The budgets of the interval that give the logged count of blocks or tokens, so that what is logged beside it has
    to follow from it; the whole interval if none does, or none is logged."""
    name = next((name for name in ("blocks", "tokens") if name in logged), None)
    if name is None:
        return budgets

    def first(count: int) -> int:
        """The smallest budget that gives at least `count`, at most one beyond the interval."""
        return bisect.bisect_left(range(budgets[1] + 1), count, lo=budgets[0], key=lambda b: getattr(pool(b), name))

    low, high = first(logged[name]), first(logged[name] + 1) - 1
    return (low, high) if low <= high else budgets


def _decode(case: Mapping[str, Any], shape: ModelShape) -> dict[str, tuple[float, float]]:
    requests = case.get("requests", 1)
    device = find_device(case["device"])
    bound = decode_bound(shape, case["context"], requests, kv_dtype(case.get("kv_dtype", "bf16")), 2, device)
    if bound is None:
        raise ValueError("its parameters are not known")
    return {"tokens_per_second": (requests / bound.seconds, requests / bound.seconds)}


def _interval(text: str) -> tuple[int, int]:
    """The least and the most bytes that print as so many GiB."""
    places = len(text.partition(".")[2])
    half = 0.5 * 10**-places
    return math.ceil((float(text) - half) * GIB), math.floor((float(text) + half) * GIB)
