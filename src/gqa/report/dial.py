"""The dial: its controls as HTML, and for every stop the ready-made texts that dial.js puts into them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from gqa.report import alternatives, forms, words
from gqa.report.controls import big_number, select
from gqa.report.reading import STAGES, Study, number
from gqa.units import format_bytes, format_seconds


def html(study: Study) -> str:
    """The controls, hidden until the script has filled them."""
    first = study.stops.index(words.headline_stop(study))
    view = study.view
    requests = (
        big_number("requests at once", "requests", "requests_note", "predicted")
        if view
        else big_number(
            "requests on" if study.devices else "requests that fit",
            "requests",
            "requests_note",
            study.basis("max_concurrent_requests"),
            control=select("device", "device", {d: d for d in study.devices}, choice=True),
        )
    )
    numbers = [
        big_number("cache per token", "cache", "cache_note", _cache_basis(study), share="cache_share"),
        big_number("best perplexity", "perplexity", "perplexity_note", study.basis("perplexity")),
        big_number(
            "time per token", "decode", "decode_note", study.basis("seconds_per_token_p50"), share="decode_share"
        ),
        requests,
    ]
    return (
        controls(
            study.stops,
            first,
            study.query_heads,
            numbers,
            aside=_layer_select(study),
            below=_perplexities(study),
            above=alternatives.choices(view) if view else "",
        )
        + """<p class="note"><span class="basis measured"></span> measured on this machine, <span class="basis"></span>
predicted by arithmetic. The dial turns with the arrow keys, too; the address of the page keeps its setting.</p>"""
    )


def controls(
    stops: Sequence[int],
    first: int,
    query_heads: int,
    numbers: Sequence[str],
    aside: str = "",
    below: str = "",
    above: str = "",
) -> str:
    """The slider over the stops, the picture of the heads, and the big numbers; hidden until the script shows it."""
    last = max(len(stops) - 1, 1)
    labels = "".join(f'<span style="--at:{i / last:.4f}">{n}</span>' for i, n in enumerate(stops))
    choices = f'<div class="choices">{above}</div>\n' if above else ""
    return f"""<div class="dial" hidden>
{choices}<p class="setting"><label for="kv-heads">KV heads: <span data-field="kv_heads"></span></label>
<output data-field="kind" for="kv-heads"></output></p>
<div class="turn">
<input type="range" id="kv-heads" min="0" max="{len(stops) - 1}" step="1" value="{first}">
<div class="stops" aria-hidden="true">{labels}</div>
</div>
<div class="ends" aria-hidden="true"><span>more KV heads</span><span>smaller cache</span></div>
<div class="picture">
<div class="row"><span>{query_heads} query heads</span>{aside}</div>
<svg role="img"></svg>
<div class="row"><span data-field="stored"></span><span id="grouping"></span></div>
</div>
<dl class="numbers">
{"".join(numbers)}
</dl>
{below}
</div>
"""


def data(study: Study) -> dict[str, Any]:
    """What the script shows, stop by stop."""
    more = study.view.data() if study.view else {}
    return {"gap": forms.NOT_MEASURED, "stops": [_stop(study, n) for n in study.stops], **more}


def _stop(study: Study, kv_heads: int) -> dict[str, Any]:
    best = study.best(kv_heads) if kv_heads != study.full else None
    parent = number(study.parent, "perplexity")
    if best:
        perplexity, note = forms.significant(best[0]), f"{words.method_name(best[1])}, {words.STAGE_NAMES[best[2]]}"
        note += f"; the parent has {forms.significant(parent)}" if parent else ""
    else:
        perplexity = forms.significant(parent) if parent and kv_heads == study.full else None
        note = "the parent itself, unchanged" if perplexity else ""
    return {
        **heads_texts(study.query_heads, kv_heads),
        "reads": study.contiguous(kv_heads),
        "layers": study.groupings(kv_heads),
        "perplexity": perplexity,
        "perplexity_note": note,
        **_cache(study, kv_heads),
        **_decode(study, kv_heads),
        **_fits(study, kv_heads, ""),  # the words for a gap, where the record has no device
        "by": _choices(study, kv_heads),
        **{
            f"{method}/{stage}": _perplexity(study, kv_heads, method, stage)
            for method in study.methods
            for stage in STAGES
        },
    }


def heads_texts(query_heads: int, kv_heads: int) -> dict[str, Any]:
    """What a stop is called, and how its query heads share."""
    shared = query_heads // kv_heads
    share = "each query head has its own" if shared == 1 else f"each read by {shared} query heads"
    if kv_heads == 1:
        share = f"read by all {query_heads} query heads"
    kind = {query_heads: "multi-head attention", 1: "multi-query attention"}.get(kv_heads, "grouped-query attention")
    return {
        "kv_heads": kv_heads,
        "kind": f"{kind}, {share}",
        "text": f"{forms.heads(kv_heads)}, {share}",
        "stored": f"{forms.heads(kv_heads)}, kept in the cache",
        "plain": "neighbours share" if 1 < shared < query_heads else "",
        "found": "heads that are alike share" if 1 < shared < query_heads else "",
    }


def _perplexity(study: Study, kv_heads: int, method: str, stage: str) -> str | None:
    found = study.figure(kv_heads, method, stage, "perplexity")
    return "as the parent" if found is None and kv_heads == study.full else _text(found, forms.significant)


def _cache(study: Study, kv_heads: int) -> dict[str, Any]:
    ratio = number(study.setting(kv_heads), "kv_cache_saving_ratio")
    value = words.cache_bytes(study, kv_heads)
    note = "" if not ratio else f"{forms.times(ratio)} smaller" if ratio > 1 else "the parent's cache"
    return {"cache": _text(value, format_bytes), "cache_note": note, "cache_share": 1 / ratio if ratio else None}


def _decode(study: Study, kv_heads: int) -> dict[str, Any]:
    seconds, slowest = study.decode_seconds(kv_heads), study.decode_seconds(study.full)
    note = f"with {forms.tokens(study.longest_context or 0)} tokens of context" if seconds else ""
    share = seconds / slowest if seconds and slowest else None
    if share and kv_heads != study.full:
        note += f", {forms.times(1 / share)} faster" if share < 0.95 else ", no faster"
    return {"decode": _text(seconds, format_seconds), "decode_note": note, "decode_share": share and min(share, 1)}


def _fits(study: Study, kv_heads: int, device: str) -> dict[str, Any]:
    row = study.capacity_row(kv_heads, device)
    requests, context = number(row, "max_concurrent_requests"), number(row, "context_tokens")
    longest = number(row, "max_context_tokens")
    note = f"of {forms.tokens(context)} tokens fit" if requests is not None and context else ""
    if note and longest:
        note += f", or one of {forms.about(longest)}"
    return {"requests": _text(requests, forms.whole), "requests_note": note}


def _choices(study: Study, kv_heads: int) -> dict[str, dict[str, Any]]:
    """What the choices change. Cache and decode time were measured here, and no choice of a device changes them."""
    if study.view is None:
        return {device: _fits(study, kv_heads, device) for device in study.devices}
    changed = study.view.by(study.stops.index(kv_heads))
    return {
        choice: {k: v for k, v in fields.items() if not k.startswith("cache")} for choice, fields in changed.items()
    }


def _cache_basis(study: Study) -> str | None:
    row = study.settings[0]
    return study.basis(
        "kv_bytes_per_token_measured" if row.get("kv_bytes_per_token_measured") else "kv_bytes_per_token"
    )


def _perplexities(study: Study) -> str:
    """Perplexity per method and stage at the dial's stop; the parent and the control stay as they are."""
    if not study.quality:
        return ""
    stages = [stage for stage in STAGES if any(row.get("stage") == stage for row in study.quality)]
    head = "".join(f'<th scope="col">{words.STAGE_NAMES[stage]}</th>' for stage in stages)
    rows = "".join(
        f'<tr><th scope="row">{escape(words.method_name(method))}</th>'
        + "".join(f'<td data-field="{escape(method)}/{stage}"></td>' for stage in stages)
        + "</tr>"
        for method in study.methods
    )
    fixed = {"converted": number(study.parent, "perplexity"), "uptrained": number(study.control, "perplexity")}
    cells = "".join(f"<td>{forms.shown(fixed[stage], forms.significant)}</td>" for stage in stages)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Perplexity at this setting"><table class="here">'
        f'<thead><tr><th scope="col">perplexity</th>{head}</tr></thead><tbody>{rows}'
        f'<tr><th scope="row">the parent, unconverted</th>{cells}</tr></tbody></table></div>'
    )


def _layer_select(study: Study) -> str:
    layers = sorted({layer for n in study.stops for layer in study.groupings(n)})
    if not layers:
        return ""
    options = {"": "contiguous groups"} | {str(layer): f"as converted, layer {layer}" for layer in layers}
    return select("layer", "grouping", options)


def _text(value: float | None, form: Any) -> str | None:
    return None if value is None else form(value)
