"""The tables of `gqa eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa.cli import output


def show(results: Mapping[str, Any], name: str) -> None:
    """Print what was measured: on text, on tasks, and what the gates say."""
    if "windows" in results:
        _text(results, name)
    if "answers_equal" in results:
        _answers(results, name)
    if "tasks" in results:
        output.table([_task(row) for row in results["tasks"]], title=f"{name}: measured with lm-evaluation-harness")
        paired = "; p: a sign-flip test, document by document" if "p_value" in results["tasks"][0] else ""
        output.data(f"standard errors are over documents{paired}")
    for check in results.get("gates", ()):
        word = "passed" if check["passed"] else "NOT PASSED"
        output.data(f"{word}: {check['gate']} ({check['value']:.4g} against {check['against']:.4g})")


def _text(results: Mapping[str, Any], name: str) -> None:
    title = f"{name}: measured on {results['windows']} windows, {results['tokens']} predicted tokens"
    rows = [
        {
            "figure": "cross-entropy, nats per token",
            "value": f"{results['cross_entropy_nats_per_token']:.4f}",
            "standard error": _error(results["standard_error_nats"]),
        },
        {"figure": "perplexity", "value": f"{results['perplexity']:.3f}", "standard error": ""},
    ]
    if "kl_to_parent_nats" in results:
        rows += [
            {
                "figure": "perplexity of the parent",
                "value": f"{results['parent_perplexity']:.3f}",
                "standard error": "",
            },
            {
                "figure": "cross-entropy above the parent's, nats per token",
                "value": f"{results['loss_above_parent_nats']:+.4f}",
                "standard error": _error(results["loss_above_parent_standard_error_nats"]),
            },
            {
                "figure": "KL from the parent, nats per token",
                "value": f"{results['kl_to_parent_nats']:.4f}",
                "standard error": _error(results["kl_standard_error_nats"]),
            },
            {
                "figure": "same first choice as the parent",
                "value": f"{results['top1_agreement']:.1%}",
                "standard error": "",
            },
        ]
    output.table(rows, title=title)
    p = results.get("loss_above_parent_p_value")
    if p is not None:
        told = "is told from chance" if p <= 0.05 else "is not told from chance"
        output.data(f"the difference from the parent {told}: p = {p:.2g}, a sign-flip test over windows")
    if "by_position" in results:
        output.table([_position(row) for row in results["by_position"]], title="\nby the tokens of context before one")
    if "recall" in results:
        output.table([_recall(row) for row in results["recall"]], title="\nrecall of what is hidden in the text")
    output.data("standard errors are over windows; text that the model was trained on flatters it")


def _answers(results: Mapping[str, Any], name: str) -> None:
    limit = results["answer_tokens_limit"]
    rows = [
        _figure("answers equal to the parent's", results, "answers_equal"),
        _figure("tokens before the answers part", results, "common_prefix_tokens", ".1f"),
        _figure("... as a share of the parent's answer", results, "common_prefix_share"),
        _figure("KL from the parent on its answers, nats per token", results, "answers_kl_nats", ".4f"),
        _figure("same first choice as the parent there", results, "answers_top1_agreement"),
        _figure("answers that repeat themselves", results, "degenerate_answers"),
        _figure("... of the parent's", results, "parent_degenerate_answers"),
    ]
    if results["questions"]:
        rows += [
            _figure(f"right answers to {results['questions']} questions", results, "right_answers"),
            _figure("... of the parent", results, "parent_right_answers"),
        ]
    if results["parent_right_questions"]:
        kept = f"kept of the parent's {results['parent_right_questions']} right answers"
        rows.append(_figure(kept, results, "right_answers_kept"))
    output.table(rows, title=f"{name}: greedy answers to {results['prompts']} prompts, at most {limit} tokens each")
    output.data("standard errors are over prompts")
    for example in results["answer_examples"]:
        output.data(f"\nprompt: {_one_line(example['prompt'], end=True)}")
        output.data(f"parent: {_one_line(example['parent_answer'])}")
        output.data(f"model:  {_one_line(example['answer'])}")


def _figure(title: str, results: Mapping[str, Any], name: str, form: str = ".1%") -> dict[str, str]:
    error = results["answers_kl_standard_error_nats" if name == "answers_kl_nats" else f"{name}_standard_error"]
    shown = "" if error is None else format(error, form)
    return {"figure": title, "value": format(results[name], form), "standard error": shown}


def _one_line(text: str, *, end: bool = False, most: int = 200) -> str:
    """A text without line ends, cut to its beginning or its end."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return f"... {line[-most:]}" if end else f"{line[:most]} ..."


def _position(row: Mapping[str, Any]) -> dict[str, str]:
    first, last = row["context_from"], row["context_to"]
    shown = {
        "context": f"{first:,}" if first == last else f"{first:,}-{last:,}",
        "perplexity": f"{row['perplexity']:.3f}",
        "standard error of the loss": _error(row["standard_error_nats"]),
    }
    if "loss_above_parent_nats" in row:
        shown["perplexity of the parent"] = f"{row['parent_perplexity']:.3f}"
        shown["loss above the parent's"] = f"{row['loss_above_parent_nats']:+.4f}"
        shown["standard error"] = _error(row["loss_above_parent_standard_error_nats"])
    return shown


def _recall(row: Mapping[str, Any]) -> dict[str, str]:
    shown = {
        "task": row["task"],
        "context": f"{row['context_tokens']:,}",
        "depth": f"{row['depth']:.0%}",
        "right": f"{row['accuracy']:.0%} ± {row['accuracy_standard_error']:.0%}",
        "nats per token of the answer": f"{row['nats_per_answer_token']:.3f}",
        "without the fact": f"{row['nats_without']:.3f}",
    }
    if "parent_accuracy" in row:
        shown["the parent: right"] = f"{row['parent_accuracy']:.0%}"
        shown["nats"] = f"{row['parent_nats_per_answer_token']:.3f}"
        shown["p of the difference"] = _error(row["p_value"])
    return shown


def _task(row: Mapping[str, Any]) -> dict[str, str]:
    shown = {
        "task": row["task"],
        "metric": row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}",
        "documents": f"{row['documents']:,}",
        "value": f"{row['value']:.4f}",
        "standard error": _error(row["standard_error"]),
    }
    if "parent_value" in row:
        shown["the parent"] = f"{row['parent_value']:.4f}"
        shown["above it"] = f"{row['above_parent']:+.4f}"
        shown["error"] = _error(row["above_parent_standard_error"])
        shown["p of the difference"] = _error(row["p_value"])
    return shown


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
