"""The report page: a study's record in, one HTML text out, with everything inside it and nothing to fetch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from gqa.record import Record
from gqa.report import alternatives, dial, figures, forms, patterns, tables, words
from gqa.report.reading import Study, number
from gqa.units import format_bytes, format_seconds

KV_CACHE = (
    "To write the next token, a language model reads back a key and a value that it stored for every token before it,"
    " in every layer and for every KV head. This store is the <em>KV cache</em>. In multi-head attention (MHA) each"
    " query head has a KV head of its own; in grouped-query attention (GQA) several query heads share one; in"
    " multi-query attention (MQA) all of them share a single one. Fewer KV heads mean a smaller cache and less to read"
    " per token."
)


def render(record: Record) -> str:
    """The page of a record of `gqa study`.

    The same record always gives the same page. Errors: GqaError when the record is not a study's."""
    study = Study.from_record(record)
    saves, costs = figures.saving_figures(study), figures.cost_figures(study)
    sections = section("saves", "What fewer KV heads save", "", figures_html(saves))
    sections += section("costs", "What they cost", _methods(study), figures_html(costs))
    sections += section("learning", "What it does to learning", "", figures_html(figures.gradient_figures(study)))
    sections += section("heads", "What the heads look at", patterns.html(study), figures_html(patterns.figures(study)))
    return document(
        record,
        title=f"GQA study: {study.name}",
        name=study.name,
        finding=words.finding(study),
        lede=f"{KV_CACHE} What that saves, and what it costs in quality, was measured here at every setting.",
        style=stop_colors(len(study.stops)),
        opening=opening(dial.html(study), tables.html(_settings(study), "Every setting")),
        figures=sections + (alternatives.html(study.view) if study.view else ""),
        how="How this was measured",
        method=_method(study),
        dial_data=dial.data(study),
    )


def document(
    record: Record,
    *,
    title: str,
    name: str,
    finding: str,
    lede: str,
    figures: str,
    how: str,
    method: str,
    style: str = "",
    opening: str = "",
    dial_data: Mapping[str, Any] | None = None,
) -> str:
    """A whole page. title, name and finding are plain text, the others HTML; dial_data: what the dial shows, of a page
    that has one in its opening."""
    data = "" if dial_data is None else f'<script type="application/json" id="dial-data">{embedded(dial_data)}</script>'
    scripts = ["record.js"] if dial_data is None else ["record.js", "patterns.js", "dial.js", "alternatives.js"]
    return Template(asset("page.html")).substitute(
        title=escape(title),
        name=escape(name),
        command=escape(record.command),
        created=escape(str(record.created)[:10]),
        style=asset("page.css") + style,
        finding=escape(finding),
        lede=lede,
        opening=opening,
        figures=figures,
        how=how,
        method=method,
        record=embedded(json.loads(record.to_json())),
        more_data=data,
        script="".join(map(asset, scripts)),
    )


def opening(dial_html: str, settings: str) -> str:
    """The dial, and below it the table of all its stops."""
    return Template(asset("dial.html")).substitute(dial=dial_html, settings=settings)


def asset(name: str) -> str:
    """A file that goes into the page."""
    return resources.files("gqa.report").joinpath("assets", name).read_text(encoding="utf-8")


def embedded(document: Any) -> str:
    """JSON inside a script element: no character that could end the element or begin a comment."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def stop_colors(stops: int) -> str:
    """One colour per stop of the dial, evenly from the colour of many heads to that of few."""
    last = max(stops - 1, 1)
    colors = [
        f"--kv{i}: color-mix(in oklch, var(--kv-few) {100 * i / last:.0f}%, var(--kv-many));" for i in range(stops)
    ]
    return ":root { " + " ".join(colors) + " }"


def section(key: str, title: str, opening: str, body: str) -> str:
    """A section of the page, or nothing where nothing was drawn."""
    return f'<section id="{key}">\n<h2>{title}</h2>\n{opening}{body}</section>\n' if body else ""


def _methods(study: Study) -> str:
    """What the methods and the training in this record do, in a sentence each."""
    meanings = {words.method_name(m): words.METHOD_MEANINGS[m] for m in study.methods if m in words.METHOD_MEANINGS}
    if any(row.get("stage") == "uptrained" for row in study.quality):
        trained, parent = number(study.control, "train_tokens"), number(study.parent, "train_tokens")
        extent = (
            f", here {forms.whole(trained)} tokens, {forms.percent(trained / parent)}" if trained and parent else ""
        )
        meanings["uptraining"] = (
            "Afterwards the whole converted model goes on with the training of its parent for a small share of the"
            f" parent's tokens{extent}."
        )
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>\n" for name, meaning in meanings.items())
    return f'<dl class="methods">\n{pairs}</dl>\n' if meanings else ""


def figures_html(drawn: Sequence[figures.Figure]) -> str:
    """Figures of one panel stand in pairs, wider ones in a row of their own."""
    single = [figure for figure in drawn if len(figure.panels) == 1]
    wide = [figure for figure in drawn if len(figure.panels) != 1]
    pair = f'<div class="pair">\n{"".join(map(_figure, single))}</div>\n' if single else ""
    return pair + "".join(map(_figure, wide))


def _figure(figure: figures.Figure) -> str:
    panels = "".join(
        f'<div class="panel">{f"<h4>{escape(heading)}</h4>" if heading else ""}{svg}</div>'
        for heading, svg in figure.panels
    )
    small = " small-ones" if len(figure.panels) > 2 else ""
    data = "".join(
        f"{f'<h4>{escape(label)}</h4>' if len(figure.tables) > 1 else ''}{tables.html(table, label)}"
        for label, table in figure.tables.items()
    )
    return (
        f'<figure id="{figure.key}">\n'
        f"<figcaption><h3>{escape(figure.title)}</h3>\n<p>{escape(figure.caption)}</p></figcaption>\n"
        f'<div class="panels{small}" role="img" aria-label="{escape(figure.title)}. The table holds the data.">'
        f"{panels}</div>\n"
        f"<details><summary>The data as a table</summary>{data}</details>\n</figure>\n"
    )


def _settings(study: Study) -> tables.Table:
    """One row per stop: what it saves, what it costs."""
    columns: dict[str, list[str]] = {
        "KV heads": [str(n) for n in study.stops],
        "query heads per KV head": [str(study.query_heads // n) for n in study.stops],
        "cache per token": [forms.shown(words.cache_bytes(study, n), format_bytes) for n in study.stops],
        "cache smaller by": [
            forms.shown(number(study.setting(n), "kv_cache_saving_ratio"), forms.times) for n in study.stops
        ],
    }
    for title, name in (("attention parameters", "attention_parameters"), ("all parameters", "parameters")):
        columns[title] = [forms.shown(number(study.setting(n), name), forms.about) for n in study.stops]
    if study.decode:
        title = f"time per token at {forms.tokens(study.longest_context or 0)} tokens"
        columns[title] = [forms.shown(study.decode_seconds(n), format_seconds) for n in study.stops]
    for stage, name in words.STAGE_NAMES.items():
        if any(row.get("stage") == stage for row in study.quality):
            columns[f"best perplexity {name}"] = [_best(study, n, stage) for n in study.stops]
    return tables.Table(list(columns), list(zip(*columns.values(), strict=True)))


def _best(study: Study, kv_heads: int, stage: str) -> str:
    best = study.best(kv_heads, [stage])
    if best is None and kv_heads == study.full:
        reference = number(study.parent if stage == "converted" else study.control, "perplexity")
        return forms.shown(reference, forms.significant)
    return forms.shown(best and best[0], forms.significant)


def _method(study: Study) -> str:
    record, parent = study.record, study.parent
    facts = {
        "name": study.name,
        "parameters": forms.shown(number(parent, "parameters"), forms.whole),
        "layers": forms.shown(number(parent, "layers"), forms.whole),
        "query heads": str(study.query_heads),
        "KV heads": str(study.full),
        "head dim": forms.shown(number(parent, "head_dim"), forms.whole),
        "trained on": forms.shown(number(parent, "train_tokens"), lambda n: f"{n:,} tokens"),
        "training took": forms.shown(number(parent, "train_seconds"), format_seconds),
    }
    machine = {str(name): value for name, value in record.machine.items() if name != "memory_bytes"}
    machine["memory"] = forms.shown(number(record.machine, "memory_bytes"), format_bytes)
    blocks = [
        ("The parent model", facts),
        ("This machine", machine),
        ("Versions", record.versions),
        ("What was asked", record.inputs),
        ("Measured or predicted", {basis: _named(record.basis, basis) for basis in ("measured", "predicted")}),
    ]
    return facts_html(blocks, record.assumptions) + again("study.json")


def facts_html(blocks: Sequence[tuple[str, Mapping[str, Any]]], assumptions: Sequence[str]) -> str:
    """Tables of facts side by side, and below them what is assumed."""
    said = "".join(f"<li>{escape(str(text))}</li>" for text in assumptions)
    return (
        '<div class="facts">\n'
        + "".join(f"<div><h3>{title}</h3>{pairs_table(pairs, title)}</div>\n" for title, pairs in blocks if pairs)
        + "</div>\n"
        + (f"<h3>Assumptions</h3>\n<ul>{said}</ul>\n" if said else "")
    )


def again(file: str) -> str:
    """How to draw the page once more."""
    return (
        "<h3>Make this page again</h3>\n<p>It is drawn from its record alone, which lies inside it: "
        f'<button type="button" id="save-record" data-file="{file}">save {file}</button>,'
        f" then <code>gqa report {file}</code>.</p>"
    )


def _named(basis: Any, kind: str) -> list[str]:
    """The figures that are measured, or predicted, as their names in the record read."""
    return [str(name).replace("_", " ") for name, of in basis.items() if of == kind]


def pairs_table(pairs: Any, label: str) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(str(name).replace("_", " "))}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in pairs.items()
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="words">{body}</table></div>'
    )


def _plain(value: Any) -> str:
    """An input as a person would say it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
