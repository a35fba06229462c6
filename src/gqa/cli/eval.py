"""`gqa eval`: what a model predicts on a text, and how far it is from its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gqa.cli import output
from gqa.record import Record
from gqa.units import parse_tokens

_WINDOW = 256

_ASSUMPTIONS = (
    "Each window is read alone: its first token is context only, and early tokens have little context.",
    "Standard errors are over windows, as the tokens of one window depend on each other.",
)

_EXAMPLES = """
gqa eval ./my-gqa-model --text book.txt
gqa eval ./my-gqa-model --text book.txt --parent ./my-mha-model
gqa eval ./my-gqa-model --text a.txt --text b.txt --window 1k --tokens 256k --json
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
    help="Text that the model has not seen; may be given several times.",
)
@click.option("--parent", metavar="MODEL", help="Compare with this model, window by window.")
@click.option("--window", metavar="TOKENS", help=f"Tokens per window.  [default: {_WINDOW}, or the model's context]")
@click.option("--tokens", metavar="N", help="Measure on about N tokens, chosen at random.  [default: all]")
@click.option("--batch", type=int, default=8, show_default=True, help="Windows at a time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows.")
@output.json_option
def command(
    model: str,
    texts: tuple[Path, ...],
    parent: str | None,
    window: str | None,
    tokens: str | None,
    batch: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure the cross-entropy and the perplexity of MODEL on text, and with --parent what it lost.

    The loss above the parent is a paired difference: both models read the same windows, so its standard error is far
    smaller than those of the two perplexities.
    """
    from gqa.config import parse_config
    from gqa.source import open_checkpoint
    from gqa.text import load_tokenizer, read_text, token_windows

    source = open_checkpoint(model)
    parent_source = open_checkpoint(parent) if parent else None
    context = parse_config(source.config, source.name).context or _WINDOW
    length = parse_tokens(window) if window else min(_WINDOW, context)
    text = read_text(texts)
    assert source.folder is not None
    count = max(1, parse_tokens(tokens) // length) if tokens else None
    windows = token_windows(text, load_tokenizer(source.folder), length, count, seed)

    from gqa.evaluate import evaluate, load_model

    loaded = load_model(source.folder)
    loaded_parent = load_model(parent_source.folder) if parent_source and parent_source.folder else None
    with output.progress() as progress:
        results = evaluate(loaded, windows, loaded_parent, batch, progress)
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
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        output.record(Record("eval", inputs, results, dict.fromkeys(results, "measured"), _ASSUMPTIONS))
    else:
        _print(results, source.name)


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
    output.data("standard errors are over windows; text that the model was trained on flatters it")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
