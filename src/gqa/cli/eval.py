"""`gqa eval`: what a model predicts on a text, and how far it is from its parent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import Record
from gqa.units import parse_share, parse_tokens

_WINDOW = 256

_ASSUMPTIONS = (
    "Each window is read alone: its first token is context only, and early tokens have little context.",
    "Standard errors are over windows, as the tokens of one window depend on each other.",
)

_EXAMPLES = """
gqa eval ./my-gqa-model --text book.txt
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model --gate "perplexity<=1.02*parent"
gqa eval ./my-gqa-model --text a.txt --text b.txt --window 4k --tokens 256k --positions
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model --recall passkey,hops --lengths 1k,4k
"""


@click.command(cls=output.Command, examples=_EXAMPLES)
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text that the model has not seen: .txt, .jsonl or .parquet files, or folders of them; repeatable.",
)
@output.text_field_option
@click.option("--parent", metavar="MODEL", help="Compare with this model, window by window.")
@click.option("--window", metavar="TOKENS", help=f"Tokens per window.  [default: {_WINDOW}, or the model's context]")
@click.option("--tokens", metavar="N", help="Measure on about N tokens, chosen at random.  [default: all]")
@click.option("--batch", type=int, default=8, show_default=True, help="Windows at a time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows.")
@click.option("--positions", is_flag=True, help="Also show the loss over how much context a token has.")
@click.option("--recall", metavar="TASKS", help="Also hide facts in the text and ask for them: passkey, hops.")
@click.option("--lengths", metavar="TOKENS,...", help="Contexts for --recall.  [default: the window]")
@click.option("--depths", metavar="SHARE,...", default="0,0.5,1", show_default=True, help="Where in them.")
@click.option("--samples", type=int, default=32, show_default=True, help="Items of each task, length and depth.")
@click.option("--gate", "gates", multiple=True, metavar="CONDITION", help="Exit with 1 if it is not met; repeatable.")
@output.json_option
def command(
    model: str,
    texts: tuple[Path, ...],
    text_field: str,
    parent: str | None,
    window: str | None,
    tokens: str | None,
    batch: int,
    seed: int,
    positions: bool,
    recall: str | None,
    lengths: str | None,
    depths: str,
    samples: int,
    gates: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the cross-entropy and the perplexity of MODEL on text, and with --parent what it lost.

    The loss above the parent is a paired difference: both models read the same windows, so its standard error is far
    smaller than those of the two perplexities. A gate is a condition such as "perplexity<=1.02*parent" or
    "top1_agreement>=95%".
    """
    from gqa.config import parse_config
    from gqa.evaluate.gate import parse_gate
    from gqa.source import open_checkpoint
    from gqa.text import load_tokenizer, read_text, token_windows

    conditions = [parse_gate(text) for text in gates]
    if parent is None and (unmet := [gate.text for gate in conditions if gate.needs_parent]):
        raise GqaError("a gate compares with the parent", got=unmet[0], hint="--parent MODEL")
    source = open_checkpoint(model)
    parent_source = open_checkpoint(parent) if parent else None
    context = parse_config(source.config, source.name).context or _WINDOW
    length = parse_tokens(window) if window else min(_WINDOW, context)
    text = read_text(texts, text_field)
    assert source.folder is not None
    count = max(1, parse_tokens(tokens) // length) if tokens else None
    tokenizer = load_tokenizer(source.folder)
    windows = token_windows(text, tokenizer, length, count, seed)
    contexts = [parse_tokens(part) for part in lengths.split(",")] if lengths else [length]
    places = [parse_share(part) for part in depths.split(",")]

    from gqa.evaluate import evaluate, load_model
    from gqa.evaluate.recall import recall as measure_recall

    loaded = load_model(source.folder)
    loaded_parent = load_model(parent_source.folder) if parent_source and parent_source.folder else None
    with output.progress() as progress:
        results = evaluate(loaded, windows, loaded_parent, batch, progress, positions=positions)
        if recall is not None:
            results["recall"] = measure_recall(
                loaded,
                tokenizer,
                windows.reshape(-1),
                tasks=[task.strip() for task in recall.split(",")],
                lengths=contexts,
                depths=places,
                samples=samples,
                seed=seed,
                parent=loaded_parent,
                progress=progress,
            )
    checks = [gate.check(results) for gate in conditions]
    if checks:
        results["gates"] = checks
    if length > context:
        output.note(f"note: the windows are longer than the model's context of {context} tokens")
    if as_json:
        inputs = {
            "model": model,
            "parent": parent,
            "texts": [str(path) for path in texts],
            "window": length,
            "tokens": count and count * length,
            "batch": batch,
            "seed": seed,
            "recall": recall,
            "lengths": contexts if recall else None,
            "depths": places if recall else None,
            "samples": samples if recall else None,
            "gates": list(gates),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        output.record(Record("eval", inputs, results, dict.fromkeys(results, "measured"), _ASSUMPTIONS))
    else:
        _print(results, source.name)
    if not all(check["passed"] for check in checks):
        click.get_current_context().exit(1)


def _print(results: dict[str, Any], name: str) -> None:
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
    for check in results.get("gates", ()):
        word = "passed" if check["passed"] else "NOT PASSED"
        output.data(f"{word}: {check['gate']} ({check['value']:.4g} against {check['against']:.4g})")
    output.data("standard errors are over windows; text that the model was trained on flatters it")


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


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
