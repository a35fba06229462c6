"""`gqa uptrain`: win back with a little training what a conversion lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import Record
from gqa.units import format_seconds, parse_tokens

if TYPE_CHECKING:
    from gqa.uptrain import Settings, StreamedText, TrainingText

_WINDOW = 256
_IN_MEMORY = 256 << 20  # bytes of plain text that are read whole, all windows being shuffled
_HELD_OUT = 64  # windows that an early stop looks at, at most a tenth of the text

_EXAMPLES = """
gqa uptrain ./my-gqa-model ./my-gqa-model-uptrained --parent ./my-mha-model --text corpus.txt --tokens 1M
gqa uptrain ./my-gqa-model ./out --parent ./my-mha-model --text corpus/ --fraction 0.05 --parent-tokens 20M
torchrun --nproc-per-node 8 -m gqa uptrain ./my-gqa-model ./out --parent ./my-mha-model --text c.parquet --tokens 1B
"""

_TRAIN = ("all", "attention", "lora")


def _group(*options: Any) -> Any:
    """Several options as one decorator."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# What becomes a field of gqa.uptrain.Settings, under that name.
_settings = _group(
    click.option(
        "--distill-weight", type=float, default=0.7, show_default=True, help="Share of the teacher in the loss."
    ),
    click.option(
        "--train",
        type=click.Choice(_TRAIN),
        default="all",
        show_default=True,
        help="Weights that move; lora: low-rank updates of the attention's projections, merged at the end.",
    ),
    click.option("--lora-rank", type=int, default=16, show_default=True, help="Rank of those updates."),
    click.option("--batch", type=int, default=8, show_default=True, help="Windows per step, over all processes."),
    click.option(
        "--micro-batch",
        type=int,
        metavar="N",
        help="Windows at once in each process, to save memory.  [default: its share of the batch]",
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory, about a third more time."),
    click.option(
        "--precision",
        type=click.Choice(("fp32", "bf16")),
        help="Of the arithmetic; weights stay fp32.  [default: bf16 on a GPU that has it]",
    ),
    click.option(
        "--early-stop", is_flag=True, help="Stop when the gap to the parent on held-out windows stops closing."
    ),
    click.option(
        "--teacher-logits",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="The parent's predictions: written there by the first run, read by others instead of running the parent.",
    ),
    click.option("--top-k", type=int, default=64, show_default=True, help="Predictions kept per token in that folder."),
    click.option(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="Steps between checkpoints.  [default: a fifth of all, at most 200]",
    ),
    click.option(
        "--tensorboard", type=click.Path(path_type=Path), metavar="FOLDER", help="Log the figures of every step there."
    ),
    click.option("--seed", type=int, default=0, show_default=True),
)


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
    help="Text like what the parent was trained on: .txt, .jsonl or .parquet files, a folder of them, or a data set of "
    "the hub; may be given several times.",
)
@output.text_field_option
@click.option("--tokens", metavar="N", help="Tokens to train on.")
@click.option("--fraction", type=float, help="The same as a share of the parent's training tokens, such as 0.05.")
@click.option("--parent-tokens", metavar="N", help="The parent's training tokens, where its folder does not say.")
@click.option("--no-distill", is_flag=True, help="Train on the text alone; the parent then only gives its token count.")
@click.option("--learning-rate", type=float, help="Peak learning rate.  [default: 2e-4]")
@click.option(
    "--schedule",
    type=click.Choice(("parent", "cosine", "constant", "linear")),
    default="parent",
    show_default=True,
    help="After a tenth of the steps of warm-up; parent: the rate that its training ended with, held, where its folder "
    "tells one, else cosine.",
)
@click.option("--window", metavar="TOKENS", help=f"Tokens per window.  [default: {_WINDOW}, or the model's context]")
@_settings
@output.json_option
def command(
    model: str,
    out: Path,
    parent: str | None,
    texts: tuple[Path, ...],
    text_field: str,
    tokens: str | None,
    fraction: float | None,
    parent_tokens: str | None,
    no_distill: bool,
    learning_rate: float | None,
    schedule: str,
    window: str | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Train the checkpoint MODEL a little more and write it to the new folder OUT.

    MODEL is a model folder, a GGUF file, the preset smollm2-135m or a hub id.
    With --parent, the parent's predictions are most of the target; without, this is plain continued training, the
    control of an experiment. A run that was stopped goes on when the same command is given again.

    Under torchrun, on one machine or many that share a disk, model, parent and optimizer are sharded over all
    processes (FSDP2).
    """
    if (tokens is None) == (fraction is None):
        raise GqaError("how long to train is not said", allowed="one of --tokens and --fraction")
    if fraction is not None and not 0 < fraction <= 1:
        raise GqaError(
            "the fraction is out of range", got=fraction, allowed="above 0, at most 1", hint="--fraction 0.05"
        )

    from gqa.config import parse_config

    source = output.open_checkpoint(model)
    parent_source = output.open_checkpoint(parent) if parent else None
    if tokens is not None:
        train_tokens = parse_tokens(tokens)
    else:
        assert fraction is not None
        known = parse_tokens(parent_tokens) if parent_tokens else _tokens_of(parent_source and parent_source.folder)
        train_tokens = max(1, round(fraction * known))
    context = parse_config(source.config, source.name).context or _WINDOW
    length = parse_tokens(window) if window else min(_WINDOW, context)
    assert source.folder is not None

    from gqa.uptrain import Settings, uptrain
    from gqa.uptrain.schedule import final_rate
    from gqa.uptrain.settings import LEARNING_RATE

    followed = final_rate(parent_source and parent_source.folder) if schedule == "parent" else None
    if schedule == "parent":
        schedule = "cosine" if followed is None else "constant"
    if learning_rate is None:
        learning_rate = LEARNING_RATE if followed is None else followed
    settings = Settings(schedule=schedule, learning_rate=learning_rate, **chosen)  # type: ignore[arg-type]
    text = _text(texts, text_field, source.folder, length, train_tokens, settings)
    teacher = parent_source.folder if parent_source and not no_distill else None
    with output.progress() as progress:
        report = uptrain(source.folder, out, windows=text, parent_folder=teacher, settings=settings, progress=progress)
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


def _text(
    texts: tuple[Path, ...], field: str, tokenizer: Path, length: int, tokens: int, settings: Settings
) -> TrainingText | StreamedText:
    """A little plain text whole, so that what is trained on is a sample of all of it; anything else as it comes."""
    from gqa.text import load_tokenizer, read_text, token_windows
    from gqa.text.documents import plain_bytes
    from gqa.uptrain import StreamedText, training_text

    size = plain_bytes(texts)
    if size is None or size > _IN_MEMORY:
        held_out = _HELD_OUT if settings.early_stop else 0
        paths = tuple(map(str, texts))
        return StreamedText(paths, field, tokenizer, length, tokens, settings.batch, settings.seed, held_out)
    available = token_windows(read_text(texts), load_tokenizer(tokenizer), length)
    held_out = max(1, min(_HELD_OUT, len(available) // 10)) if settings.early_stop else 0
    text = training_text(available, tokens, settings.batch, settings.seed, held_out)
    if len(text.order) > len(available):
        times = len(text.order) / len(available)
        output.note(f"note: the text has {available.size} tokens; all of it is read {times:.1f} times")
    return text


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
    if report.get("stopped_early"):
        output.data("stopped early: the gap to the parent on held-out windows no longer closed")
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
