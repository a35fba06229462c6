"""The largest number of KV heads that a need leaves room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gqa.plan.setting import Job, Setting
from gqa.units import format_bytes


def recommend(settings: Sequence[Setting], job: Job, requests: int) -> dict[str, Any]:
    """kv_heads: of the stops that hold `requests` requests of the context at once, the one with the most, as quality
    falls with fewer; None if none does. known: whether there was a budget to tell by. reason: one sentence."""
    stops = [setting for setting in settings if setting.kv_heads is not None]
    known = [setting for setting in stops if setting.max_concurrent_requests is not None]
    where = f"{requests} request{'s' if requests != 1 else ''} of {job.context:,} tokens"
    if not known:
        why = "the model has no KV heads to turn" if not stops else "a device, and the size of the weights, are needed"
        return {"kv_heads": None, "known": False, "reason": f"Nothing to recommend: {why}."}
    fitting = [setting for setting in known if (setting.max_concurrent_requests or 0) >= requests]
    if not fitting:
        fewest = min(known, key=lambda setting: setting.kv_heads or 0)
        if fewest.cache_budget_bytes is not None and fewest.cache_budget_bytes <= 0:
            lack = "as the weights alone leave nothing for a cache"
        else:
            lack = (
                f"as even {_heads(fewest)} would need {format_bytes(fewest.kv_bytes)} of the"
                f" {format_bytes(fewest.cache_budget_bytes or 0)} that are left"
            )
        return {"kv_heads": None, "known": True, "reason": f"No setting holds {where}, {lack}."}
    best = max(fitting, key=lambda setting: setting.kv_heads or 0)
    room = format_bytes(best.cache_budget_bytes or 0)
    reason = f"{_heads(best)}: {where} take {format_bytes(best.kv_bytes)} of the {room} left for the cache"
    above = [setting for setting in known if (setting.kv_heads or 0) > (best.kv_heads or 0)]
    if above:
        next_up = min(above, key=lambda setting: setting.kv_heads or 0)
        left = format_bytes(max(0, next_up.cache_budget_bytes or 0))
        reason += f"; {_heads(next_up)} would need {format_bytes(next_up.kv_bytes)} of {left}"
    return {"kv_heads": best.kv_heads, "known": True, "reason": f"{reason}."}


def _heads(setting: Setting) -> str:
    return "1 KV head" if setting.kv_heads == 1 else f"{setting.kv_heads} KV heads"
