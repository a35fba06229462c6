"""From the finished steps to the record: tables, the trend of loss over tokens of distillation, published rows."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_bench import Bench
from real_models import Model
from trend import fit_powers

from gqa.bench.document import record
from gqa.config import parse_config
from gqa.record import Record

COMMAND = "benchmark quality on a real model"
PUBLISHED = Path(__file__).with_name("published.csv")
FIGURES = ("loss_above_parent_nats", "kl_to_parent_nats")
CONTROL, PROSE, HALF = "control", "prose", "half prose, half the parent's own text"
ABOUT = (
    "loss_above_parent_nats is cross-entropy above the parent's on the same windows; its standard error is paired over"
    " windows. Windows of one text are not independent texts.",
    "The control is the parent itself: its attentions trained without a teacher on the windows of the distillation on"
    " prose, in their order, at the same batch and peak rate. It has a weight decay of 0.1, the distillation none.",
    "Trends: loss = a * tokens^-b, least squares over logarithms; 95 % intervals are Student's, over distillations that"
    " scatter independently. Do not extrapolate them beyond the largest distillation.",
    "One seed each. No test page, test file or sampled test window is in the calibration text; the parent may have seen"
    " all public texts in its own training.",
    "Published rows are of other models, texts and tasks; `differs` says which.",
)


def made_of(bench: Bench, models: Sequence[Model], names: Sequence[str]) -> Record:
    """The record of what is finished. names: all steps that were asked for; those not finished are in `missing`."""
    done = {name: step for name in names if (step := bench.steps.find(name)) is not None}

    def results(prefix: str) -> list[Any]:
        return [step["result"] for name, step in done.items() if name.startswith(prefix)]

    quality = results("quality-")
    curve = distillation_curve(models, quality)
    texts = done["texts"]["result"] if "texts" in done else {}
    sampled = {name: step["result"] for name, step in done.items() if name.startswith("texts-dialogue-")}
    shape = parse_config(bench.source.config, bench.source.name)
    asked = bench.asked
    inputs = {
        "model": bench.source.name,
        "layers": len(shape.layers),
        "query_heads": shape.query_heads,
        "kv_heads_parent": shape.kv_heads,
        "kv_heads": asked.kv_heads,
        "calibration_window": asked.window,
        "calibration_tokens": asked.calibration,
        "refine_tokens": asked.refine,
        "distill_tokens": list(asked.distill),
        "distill_batch": asked.batch,
        "windows": {str(length): count for length, count in asked.windows.items()},
        "recall_items_per_depth": {str(length): count for length, count in asked.recall.items()},
        "prompts": asked.prompts,
        "answer_tokens_limit": asked.answer_tokens,
    }
    found = {
        "texts": [{"name": name, **about} for name, about in (texts | sampled).items()],
        "models": [_flat(row) for row in results("model-")],
        "quality": quality,
        "recall": [row for result in results("recall-") for row in result["rows"]],
        "answers": results("answers-"),
        "curve": curve,
        "trends": trends(curve),
        "published": published(),
        "diagnosis": next(iter(results("diagnosis")), {"rows": []}),
        "missing": [name for name in names if name not in done] + _absent(bench),
        "step_seconds": {name: step["seconds"] for name, step in done.items()},
    }
    document = record(COMMAND, inputs, found, ABOUT, ("gguf",))
    basis = dict.fromkeys(("seconds_estimate", "peak_memory_bytes_estimate", "kv_bytes_per_token"), "predicted")
    measured = {name: "measured" for row in quality for name, value in row.items() if isinstance(value, float)}
    return Record(
        COMMAND, document.inputs, found, {**measured, **basis}, document.assumptions, versions=document.versions
    )


def distillation_curve(models: Sequence[Model], quality: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per trained model and cell of quality: which text, how many tokens, and what is left of the loss."""
    trained = {model.name: model for model in models if model.distill_tokens}
    return [
        {
            "series": CONTROL if model.control else HALF if model.own_text else PROSE,
            "tokens": model.distill_tokens,
            **{name: row[name] for name in ("kind", "window", *FIGURES, "loss_above_parent_standard_error_nats")},
        }
        for row in quality
        if (model := trained.get(row["name"]))
    ]


def trends(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`a` and `b` of loss = a * tokens^-b, with the 95 % interval of b, per text of the distillation, kind of test text
    and window. Losses of zero or less have no logarithm and are left out; three rows are the fewest."""
    found = []
    cells = dict.fromkeys((row["series"], row["kind"], row["window"]) for row in curve if row["series"] != CONTROL)
    for (series, kind, window), figure in itertools.product(cells, FIGURES):
        rows = [row for row in curve if (row["series"], row["kind"], row["window"]) == (series, kind, window)]
        rows = [row for row in rows if row[figure] > 0]
        trend = fit_powers({"tokens": [row["tokens"] for row in rows]}, [row[figure] for row in rows])
        if trend is None:
            continue
        of = trend["exponents"]["tokens"]
        a = trend["loss_in_the_middle_nats"] * trend["middle"]["tokens"] ** -of["exponent"]
        found.append(
            {
                "series": series,
                "kind": kind,
                "window": window,
                "figure": figure,
                "rows": trend["rows"],
                "a": a,
                "b": -of["exponent"],
                "b_low": -of["high"],
                "b_high": -of["low"],
                "scatter": trend["scatter"],
            }
        )
    return found


def published(path: Path = PUBLISHED) -> list[dict[str, Any]]:
    """Others' results, with the child's perplexity as a multiple of its parent's where that follows from the row."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            parent, child = float(row["parent"]), float(row["child"])
            ratios = {"perplexity": child / parent, "cross-entropy (nats)": math.exp(child - parent)}
            rows.append(
                {
                    **row,
                    "plain_gqa": row["plain_gqa"] == "yes",
                    "cache_saved": float(row["cache_saved"]) if row["cache_saved"] else None,
                    "training_tokens": int(row["training_tokens"]) if row["training_tokens"] else None,
                    "parent": parent,
                    "child": child,
                    "times_parent_perplexity": ratios.get(row["metric"]),
                }
            )
    return rows


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A model's row with what of the library's report belongs in a table."""
    report = row.get("report") or {}
    errors = [layer["hidden_error"] for layer in report.get("layers", ()) if "hidden_error" in layer]
    closed = [layer["closed_form_error"] for layer in report.get("layers", ()) if "closed_form_error" in layer]
    training = report.get("distillation") or (report if row.get("control") else {})
    return {name: value for name, value in row.items() if name != "report"} | {
        "recipe": report.get("recipe"),
        "hidden_errors": errors,
        "closed_form_errors": closed,
        "training_steps": training.get("steps"),
        "final_kl_to_parent_nats": training.get("final_kl_to_parent_nats"),
    }


def _absent(bench: Bench) -> list[str]:
    """What cannot even be a step."""
    missing = [] if bench.asked.questions.exists() else [f"answers on {bench.asked.questions.name}: no such file"]
    return missing + ([] if bench.tokenizer.chat_template else ["dialogue: the model has no chat template"])
