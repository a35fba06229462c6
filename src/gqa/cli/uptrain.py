"""`gqa uptrain`: win back with a little training what a conversion lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import Record
from gqa.units import format_seconds, parse_tokens

_WINDOW = 256

_EXAMPLES = """
gqa uptrain ./my-gqa-model ./my-gqa-model-uptrained --parent ./my-mha-model --text corpus.txt --tokens 1M
gqa uptrain ./my-gqa-model ./out --parent ./my-mha-model --text corpus.txt --fraction 0.05 --parent-tokens 20M
gqa uptrain ./my-mha-model ./control --text corpus.txt --tokens 1M
"""


@click.command(cls=output.Command, examples=_EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--parent", metavar="MODEL", help="The model that MODEL was converted from: the teacher.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text like what the parent was trained on; may be given several times.",
)
@click.option("--tokens", metavar="N", help="Tokens to train on.")
@click.option("--fraction", type=float, help="The same as a share of the parent's training tokens, such as 0.05.")
@click.option("--parent-tokens", metavar="N", help="The parent's training tokens, where its folder does not say.")
@click.option("--no-distill", is_flag=True, help="Train on the text alone; the parent then only gives its token count.")
@click.option("--distill-weight", type=float, default=0.7, show_default=True, help="Share of the teacher in the loss.")
@click.option("--learning-rate", type=float, help="Peak learning rate.  [default: 2e-4]")
@click.option("--batch", type=int, default=8, show_default=True, help="Windows per step.")
@click.option("--window", metavar="TOKENS", help=f"Tokens per window.  [default: {_WINDOW}, or the model's context]")
@click.option("--seed", type=int, default=0, show_default=True)
@output.json_option
def command(
    model: str,
    out: Path,
    parent: str | None,
    texts: tuple[Path, ...],
    tokens: str | None,
    fraction: float | None,
    parent_tokens: str | None,
    no_distill: bool,
    distill_weight: float,
    learning_rate: float | None,
    batch: int,
    window: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train the checkpoint MODEL a little more and write it to the new folder OUT.

    With --parent, the parent's predictions are most of the target; without, this is plain continued training, the
    control of an experiment. A run that was stopped goes on when the same command is given again.
    """
    if (tokens is None) == (fraction is None):
        raise GqaError("how long to train is not said", allowed="one of --tokens and --fraction")
    if fraction is not None and not 0 < fraction <= 1:
        raise GqaError(
            "the fraction is out of range", got=fraction, allowed="above 0, at most 1", hint="--fraction 0.05"
        )

    from gqa.config import parse_config
    from gqa.source import open_checkpoint
    from gqa.text import load_tokenizer, read_text, token_windows

    source = open_checkpoint(model)
    parent_source = open_checkpoint(parent) if parent else None
    if tokens is not None:
        train_tokens = parse_tokens(tokens)
    else:
        assert fraction is not None
        known = parse_tokens(parent_tokens) if parent_tokens else _tokens_of(parent_source and parent_source.folder)
        train_tokens = max(1, round(fraction * known))
    context = parse_config(source.config, source.name).context or _WINDOW
    length = parse_tokens(window) if window else min(_WINDOW, context)
    text = read_text(texts)
    assert source.folder is not None

    from gqa.uptrain import Settings, training_windows, uptrain
    from gqa.uptrain.settings import LEARNING_RATE

    settings = Settings(
        distill_weight=distill_weight,
        batch=batch,
        learning_rate=LEARNING_RATE if learning_rate is None else learning_rate,
        seed=seed,
    )

    available = token_windows(text, load_tokenizer(source.folder), length)
    windows = training_windows(available, train_tokens, batch, seed)
    if len(windows) > len(available):
        output.note(
            f"note: the text has {available.size} tokens; all of it is read {windows.size / available.size:.1f} times"
        )
    teacher = parent_source.folder if parent_source and not no_distill else None
    with output.progress() as progress:
        report = uptrain(
            source.folder,
            out,
            windows=windows,
            parent_folder=teacher,
            settings=settings,
            progress=progress,
        )
    if as_json:
        inputs = {
            "model": model,
            "out": str(out),
            "parent": parent,
            "texts": [str(path) for path in texts],
            "tokens": train_tokens,
            "fraction": fraction,
            "distill": teacher is not None,
        }
        measured = ("steps", "tokens", "seconds", "final_cross_entropy_nats", "final_kl_to_parent_nats")
        output.record(Record("uptrain", inputs, report, dict.fromkeys(measured, "measured")))
    else:
        _print(report, out)
    output.note(
        f"next: gqa eval {out} --text FILE{f' --parent {parent}' if parent else ''}   (text that was not used here)"
    )


def _tokens_of(folder: Path | None) -> int:
    """The training tokens that a parent's folder tells; those that gqa trained do."""
    path = Path() if folder is None else folder / "gqa_training.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["train_tokens"])
    except (OSError, ValueError, KeyError):
        raise GqaError(
            "it is not known on how many tokens the parent was trained",
            allowed="--fraction with --parent-tokens, or --tokens",
            hint="--tokens 20M",
        ) from None


def _print(report: dict[str, Any], out: Path) -> None:
    teacher = "without a teacher" if report["parent"] is None else f"teacher {report['parent']}"
    output.data(
        f"{out}: {report['steps']} steps, {report['tokens']} tokens, {teacher}, {format_seconds(report['seconds'])}"
    )
    figures = {
        "cross-entropy": report["final_cross_entropy_nats"],
        "KL from the parent": report["final_kl_to_parent_nats"],
    }
    output.table(
        [
            {"training text, last steps": name, "nats per token (measured)": f"{value:.4f}"}
            for name, value in figures.items()
            if value is not None
        ]
    )
