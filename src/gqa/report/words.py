"""The sentences that a study's page draws from its figures."""

from __future__ import annotations

from gqa.report.forms import NOT_MEASURED, about, heads, percent, significant, times, tokens
from gqa.report.reading import Study, number, positive

METHOD_NAMES = {"mean": "mean pooling", "svd": "svd", "svd+refine": "refined svd", "svd+distill": "distilled svd"}
SHORT_NAMES = {"svd+refine": "refined", "svd+distill": "distilled"}  # beside lines and bars, where room is short
METHOD_MEANINGS = {
    "mean": "The published recipe: the key and value projections of the heads that come to share are averaged.",
    "svd": "Finds, in closed form and without training, the shared keys and values that keep most of what the heads"
    " gave, and changes every query head's own weights to suit them.",
    "svd+refine": "Then fits the attention of each layer in turn to the parent's own output on a little text. It needs"
    " no labels and never trains the whole model.",
    "svd+distill": "Then trains all attentions together against the parent's predictions. Embeddings, norms and MLPs"
    " stay as they are.",
}
STAGE_NAMES = {"converted": "right after conversion", "uptrained": "after uptraining"}
CLOSE = 0.02  # perplexities within 2 % count as level in the page's opening sentence


def method_name(method: str) -> str:
    return METHOD_NAMES.get(method, method)


def headline_stop(study: Study) -> int:
    """The furthest stop of the dial whose best perplexity is level with the parent's; else the gentlest cut."""
    cuts = [(n, best) for n in study.stops if n < study.full and (best := study.best(n))]
    if not cuts:
        return study.stops[-1]
    level = [n for n, best in cuts if (against := _reference(study, best[2])[0]) and best[0] <= against * (1 + CLOSE)]
    return level[-1] if level else cuts[0][0]


def short_name(method: str) -> str:
    return SHORT_NAMES.get(method, method)


def finding(study: Study) -> str:
    """The study in one sentence: what the headline stop saves, and what it costs."""
    kv_heads = headline_stop(study)
    best = study.best(kv_heads)
    against, named = _reference(study, best[2] if best else "converted")
    if best is None or against is None:
        return f"With {_of(study, kv_heads)} the cache is {_saving(study, kv_heads)}; quality was {NOT_MEASURED}."
    perplexity, method, stage = best
    return (
        f"With {_of(study, kv_heads)} the cache is {_saving(study, kv_heads)} and perplexity is "
        f"{significant(perplexity)} ({method_name(method)}, {STAGE_NAMES[stage]}) "
        f"against {significant(against)} for {named}."
    )


def memory_title(study: Study) -> str:
    first, last = study.stops[0], study.stops[-1]
    device = next(iter(study.devices), None)
    row = {n: study.capacity_row(n, device) for n in (first, last)} if device else {}
    most, least = (number(row[n], "max_context_tokens") if row else None for n in (first, last))
    if most and least:
        return f"One {device} holds a context of {about(most)} tokens with {heads(first)}, {about(least)} with {last}"
    return f"From {first} to {heads(last)} the cache of every context is {_saving(study, last)}"


def decode_title(study: Study) -> str:
    timed = [n for n in study.stops if study.decode_seconds(n)]
    if len(timed) < 2:
        return "Time to write one token, against the context before it"
    slow, fast = study.decode_seconds(timed[0]) or 0.0, study.decode_seconds(timed[-1]) or 1.0
    decodes = f"At {tokens(study.longest_context or 0)} tokens of context {heads(timed[-1])} "
    decodes += "decodes" if timed[-1] == 1 else "decode"
    if fast >= slow * 0.95:
        return f"{decodes} no faster than {timed[0]} on this machine"
    return f"{decodes} {times(slow / fast)} faster than {timed[0]}"


def quality_title(study: Study) -> str:
    fewest = study.stops[-1]
    best, mean = study.best(fewest, ["converted"]), study.figure(fewest, "mean", "converted", "perplexity")
    if best is None or fewest == study.full:
        return "Perplexity against KV heads"
    ending = f", mean pooling at {significant(mean)}" if mean is not None and best[1] != "mean" else ""
    return (
        f"At {heads(fewest)}, right after conversion, {method_name(best[1])} is at a perplexity of "
        f"{significant(best[0])}{ending}"
    )


def share_title(study: Study) -> str:
    worst = {}
    for method in study.methods:
        shares = [
            s for n in study.stops if (s := study.figure(n, method, "converted", "share_of_mean_loss")) is not None
        ]
        if shares and method != "mean":
            worst[method] = max(shares)
    if not worst:
        return "How much of mean pooling's loss remains"
    clauses = [f"{percent(share)} with {method_name(method)}" for method, share in worst.items()]
    return f"Of what mean pooling loses, at most {' and '.join(clauses)} remains"


def layers_title(study: Study) -> str:
    """The largest error of the strongest method whose errors are known."""
    for method in reversed(study.methods):
        rows = [row for row in study.layers if row.get("method") == method and number(row, "hidden_error") is not None]
        if rows:
            worst = max(rows, key=lambda row: row["hidden_error"])
            place = f"With {heads(worst['kv_heads'])} and {method_name(method)}"
            extent = f"{percent(worst['hidden_error'])} off, behind layer {worst.get('layer')}"
            return f"{place} hidden states are at most {extent}"
    return "Where the loss sits"


def cache_bytes(study: Study, kv_heads: int) -> float | None:
    """Bytes of cache per token: the measured ones where there are any, else the predicted."""
    row = study.setting(kv_heads)
    measured = number(row, "kv_bytes_per_token_measured")
    return number(row, "kv_bytes_per_token") if measured is None else measured


def _reference(study: Study, stage: str) -> tuple[float | None, str]:
    """What a perplexity is fairly held against: after training, the parent that had the same training."""
    control = positive(study.control, "perplexity")
    if stage == "uptrained" and control is not None:
        return control, "the parent given the same extra training"
    return positive(study.parent, "perplexity"), "the parent"


def _of(study: Study, kv_heads: int) -> str:
    return f"{kv_heads} of {study.full} KV heads"


def _saving(study: Study, kv_heads: int) -> str:
    ratio = study.setting(kv_heads).get("kv_cache_saving_ratio")
    return f"{times(ratio)} smaller" if isinstance(ratio, int | float) and ratio > 1 else "as large as the parent's"
