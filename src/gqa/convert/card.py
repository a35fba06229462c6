"""The model card (README.md) of a converted checkpoint: what was done, saved and lost, and how to repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gqa.convert.recipe import Recipe, make_recipe
from gqa.units import format_bytes

_METHODS = {
    "svd": "the best shared subspace of each group's heads in closed form, each head's own change of basis absorbed "
    "into W_q and W_o",
    "procrustes": "each head rotated onto its group before pooling (Jin et al. 2024, arXiv 2412.20677)",
    "mean": "the mean of each group's key and value projections (Ainslie et al. 2023, arXiv 2305.13245)",
    "first": "the first head of each group (Ainslie et al. 2023, arXiv 2305.13245)",
    "random": "new random key and value heads (Ainslie et al. 2023, arXiv 2305.13245)",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def convert_command(model: str, out: str, recipe: Recipe, texts: Sequence[str]) -> str:
    """The `gqa convert` line that gives this recipe; what the defaults say already is left out."""
    words = ["gqa", "convert", model, out, "--kv-heads", str(recipe.kv_heads)]
    if recipe.method != "svd":
        words += ["--method", recipe.method]
    if recipe.all_windows or recipe.distill_tokens:
        for text in texts:
            words += ["--calibrate", text]
        if recipe.calibration_tokens:
            words += ["--calibration-tokens", str(recipe.calibration_tokens)]
        words += ["--window", str(recipe.window), "--measure", str(recipe.measure_tokens)]
    if recipe.measure_tokens:
        words += ["--answers", str(recipe.answers)]
    if recipe.refine_tokens:
        words += ["--refine", str(recipe.refine_tokens), "--refine-steps", str(recipe.refine_steps)]
    if recipe.distill_tokens:
        words += ["--distill", str(recipe.distill_tokens), "--distill-window", str(recipe.distill_window)]
        words += ["--distill-batch", str(recipe.distill_batch), "--distill-rate", f"{recipe.distill_learning_rate:g}"]
        words += ["--precision", recipe.distill_precision]
    usual = make_recipe(
        recipe.kv_heads, recipe.method, calibration_tokens=recipe.calibration_tokens, window=recipe.window
    )
    if recipe.grouping != usual.grouping:
        words += ["--grouping", recipe.grouping]
    if recipe.refit != usual.refit:
        words += ["--refit" if recipe.refit else "--no-refit"]
    if recipe.seed:
        words += ["--seed", str(recipe.seed)]
    return shlex.join(words)


def approximations(recipe: Recipe, kv_heads_parent: int) -> list[str]:
    """Sentences on what the result does not share with its parent."""
    if recipe.kv_heads == kv_heads_parent:
        return ["Nothing: the parent has that many KV heads already, and every tensor is copied."]
    if recipe.kv_heads > kv_heads_parent:
        return ["Nothing: every KV head is repeated, and the model computes what its parent computes."]
    said = ["Heads that shared nothing before now share keys and values, so the logits differ from the parent's."]
    if recipe.method in ("svd", "procrustes"):
        said.append(
            "Rotary pairs of keys can only be turned and scaled, not mixed: keys lose more than values where heads "
            "attend to different frequencies."
        )
    if recipe.calibration_tokens:
        said.append("The errors are weighed by the calibration text; on text of another kind the loss may be larger.")
    elif recipe.method in ("svd", "procrustes"):
        said.append("No calibration text was used: every direction of the hidden states weighs the same.")
    return said


def model_card(report: Mapping[str, Any], out_name: str) -> str:
    """README.md, from the conversion's report alone."""
    recipe = Recipe(**report["recipe"])
    texts = report["calibration"]["texts"] if report["calibration"] else []
    command = convert_command(report["model"], out_name, recipe, texts)
    heads, before = report["kv_heads"], report["kv_heads_parent"]
    front = ["---", "library_name: transformers", "tags:", "- grouped-query-attention", "- gqa"]
    if _HUB_ID.fullmatch(report["model"]):
        front.insert(2, f"base_model: {report['model'].partition('@')[0]}")
    lines = [
        *front,
        "---",
        "",
        f"# {out_name}",
        "",
        f"{report['model']} with {heads} KV head{'s' * (heads > 1)} instead of {before} "
        f"({report['query_heads']} query heads), converted by [gqa](https://pypi.org/project/gqa/).",
        "It loads wherever its parent loads; nothing beside `config.json` and the attention weights has changed.",
        "",
        "| | parent | this model |",
        "|---|---:|---:|",
        f"| KV heads | {before} | {heads} |",
        f"| KV cache per token ({report['kv_dtype']}) | {format_bytes(report['kv_bytes_per_token_parent'])} "
        f"| {format_bytes(report['kv_bytes_per_token'])} |",
        f"| weight files | {format_bytes(report['bytes_parent'])} | {format_bytes(report['bytes'])} |",
        *_measured(report.get("measured")),
        *_measured(report.get("measured_before_distillation"), ", before the distillation"),
        *_answers(report.get("answers")),
        "",
        "## How it was made",
        "",
        f"Every KV head is repeated {heads // before} times, so that more devices can share them in tensor parallelism."
        if heads > before
        else f"Method `{recipe.method}`: {_METHODS[recipe.method]}.",
        "",
        *_distillation(report.get("distillation")),
        "```",
        command,
        "```",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in report["recipe"].items()),
        "",
        "## What is approximate",
        "",
        *(f"- {sentence}" for sentence in report["approximations"]),
    ]
    seen = "text that no fit has seen" if report.get("distillation") else "the calibration text"
    if any("hidden_error" in layer for layer in report["layers"]):
        lines += [
            "",
            f"How far the hidden states behind each layer are from the parent's on {seen} (squared",
            "distance over squared length, mean over tokens; what a layer loses is passed on to those after it):",
            "",
            "| layer | error | parent's KV heads that share |",
            "|---:|---:|---|",
            *(
                f"| {layer['layer']} | {_percent(layer.get('hidden_error'))} | {_groups(layer.get('groups', []))} |"
                for layer in report["layers"]
            ),
        ]
    lines += [
        "",
        "`gqa eval` measures what this costs in perplexity, and `gqa uptrain` wins some of it back.",
        f"The same figures for programs are in `{report['file']}`. The parent's licence applies to this model too.",
    ]
    return "\n".join(lines) + "\n"


def _measured(measured: Mapping[str, Any] | None, when: str = "") -> list[str]:
    if not measured:
        return []
    what = f"perplexity on {measured['tokens']} tokens of the calibration text that no fit has seen{when}"
    return [f"| {what} | {measured['perplexity_parent']:.3f} | {measured['perplexity']:.3f} |"]


def _distillation(distillation: Mapping[str, Any] | None) -> list[str]:
    if not distillation:
        return []
    return [
        "Then all attentions were trained together against the parent's predictions (Hinton et al. 2015, arXiv "
        f"1503.02531): {distillation['tokens']} tokens in {distillation['steps']} steps. KL to the parent in the last "
        f"steps: {distillation['final_kl_to_parent_nats']:.3f} nats per token.",
        "",
    ]


def _answers(answers: Mapping[str, Any] | None) -> list[str]:
    if not answers or "not_compared" in answers:
        return []
    what = f"greedy answers to {answers['prompts']} prompts of the parent's own"
    return [
        f"| {what}, equal to the parent's | | {_share(answers, 'answers_equal')} |",
        f"| ... that repeat themselves | {_share(answers, 'parent_degenerate_answers')} "
        f"| {_share(answers, 'degenerate_answers')} |",
        f"| KL on the parent's answers, nats per token | | {answers['answers_kl_nats']:.3f} |",
    ]


def _share(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.0%} ± {figures[name + '_standard_error']:.0%}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.3%}"


def _groups(groups: Sequence[Sequence[int]]) -> str:
    return " · ".join(" ".join(map(str, group)) for group in groups)
