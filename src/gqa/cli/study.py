"""`gqa study`: the whole path over the dial, in one run, as one record and one page."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import Record, write_text_atomic
from gqa.units import format_bytes, format_seconds, parse_share, parse_tokens

if TYPE_CHECKING:
    from gqa.progress import Progress
    from gqa.source import Source
    from gqa.study.corpus import StudyText
    from gqa.study.estimate import Estimate

_EXAMPLES = """
gqa study
gqa study ./my-mha-model --text corpus.txt --out my-study
gqa study ./my-mha-model --text corpus/ --kv-heads auto --budget 2%
gqa study ./my-mha-model --text corpus.txt --dry-run
gqa study ./my-mha-model --text corpus.txt --kv-heads 8,4 --uptrain-tokens 1M --json
"""

_WINDOW = 256
_BUDGET = "2%"
_FRACTION = 0.05  # of the parent's training tokens: Ainslie et al. 2023, arXiv 2305.13245


@click.command(cls=output.Command, examples=_EXAMPLES)
@click.argument("model", required=False)
@click.option(
    "--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Text to study MODEL on; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), default="study", show_default=True, help="Folder of results.")
@click.option(
    "--kv-heads",
    metavar="N,N,...",
    help="Stops of the dial, or auto: from the most down to the first that is beyond --budget.  [default: every"
    " divisor below the parent's]",
)
@click.option(
    "--budget",
    metavar="SHARE",
    help=f"Of --kv-heads auto: by how much perplexity may exceed the parent's.  [default: {_BUDGET}]",
)
@click.option("--dry-run", is_flag=True, help="Tell what the study would take, in time, memory and disk, and stop.")
@click.option(
    "--uptrain-tokens",
    metavar="N",
    help="Tokens that every child is uptrained on, 0 for none.  [default: without MODEL 0; else 5 % of the parent's"
    " training tokens, if MODEL's folder records them]",
)
@click.option(
    "--distill-tokens",
    default="128k",
    show_default=True,
    metavar="N",
    help="Tokens of training text that each child of svd is distilled on.",
)
@click.option("--window", type=int, help=f"Tokens per window of text.  [default: {_WINDOW}, or the model's context]")
@click.option(
    "--analyses",
    metavar="NAME,...",
    default="all",
    show_default=True,
    help="What else to look at in the models: gradients, patterns (of attention), all or none.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@output.json_option
def command(
    model: str | None,
    texts: tuple[Path, ...],
    out: Path,
    kv_heads: str | None,
    budget: str | None,
    dry_run: bool,
    uptrain_tokens: str | None,
    distill_tokens: str,
    window: int | None,
    analyses: str,
    seed: int,
    as_json: bool,
) -> None:
    """Turn the KV-head dial and see what each setting saves and costs.

    MODEL is a model folder, a GGUF file, the preset smollm2-135m or a hub id. Without it, the model is a small
    multi-head Llama that comes with gqa, and the text is the source of Python's standard library. For every setting
    of the dial the model is converted by each method and evaluated, with --uptrain-tokens uptrained and evaluated
    again, its cache measured and its decoding timed. The folder OUT gets study.json and report.html. A study that was
    stopped resumes when the same command is given again.
    """
    automatic = kv_heads == "auto"
    if budget is not None and not automatic:
        raise GqaError("--budget is for --kv-heads auto", hint=f"--kv-heads auto --budget {budget}")
    share = parse_share(budget or _BUDGET) if automatic else None
    stops = () if automatic else parse_stops(kv_heads)
    wanted = None if uptrain_tokens is None else 0 if uptrain_tokens.strip() == "0" else parse_tokens(uptrain_tokens)
    if model is None and texts:
        raise GqaError("--text needs a MODEL to study", hint="gqa study MODEL --text FILE")
    if model is not None and not texts:
        raise GqaError("a study needs text to measure on", hint=f"gqa study {model} --text FILE")

    from gqa.config import parse_config
    from gqa.report.page import render
    from gqa.study.estimate import estimate
    from gqa.study.pipeline import run
    from gqa.study.settings import ANALYSES, Settings
    from gqa.study.steps import check_folder

    chosen = parse_analyses(analyses, ANALYSES)
    check_folder(out)  # before any work, not after
    started = time.perf_counter()
    with output.progress() as progress:
        if model is None:
            source, text, training = _embedded(window, seed)
            wanted = wanted or 0  # 5 % of its training would take each child minutes
        else:
            source, text, training = _own(model, texts, window, seed, progress)
        tokens = round(_FRACTION * training.get("train_tokens", 0)) if wanted is None else wanted
        settings = Settings(
            kv_heads=stops,
            seed=seed,
            uptrain_tokens=tokens,
            distill_tokens=parse_tokens(distill_tokens),
            analyses=chosen,
            budget=share,
        )
        settings = settings.for_model(parse_config(source.config, source.name))
        if dry_run or not (out / "steps").exists():  # a study that goes on has told before
            progress("estimating", 0, 1)
            told = estimate(source, text, settings)
            progress("estimating", 1, 1)
            (output.data if dry_run else output.note)(tell(told, automatic))
        if dry_run:
            return
        record = run(source, text, out, settings, progress, training=training)
    page = out / "report.html"
    write_text_atomic(page, render(record))
    if as_json:
        output.record(record)
    else:
        print_tables(record)
        if share is not None:
            output.data(found(record, share))
    output.note(
        f"done in {format_seconds(time.perf_counter() - started)}; the page: {page}, the record: {out / 'study.json'}"
    )


def tell(told: Estimate, automatic: bool) -> str:
    """An estimate in words."""
    parts = [f"{name} {format_seconds(seconds)}" for name, seconds in told.seconds.items() if seconds]
    most = "at most " if automatic else "about "
    said = (
        f"estimate: {most}{format_seconds(told.total_seconds)} ({', '.join(parts)}), up to "
        f"{format_bytes(told.memory_bytes)} of memory, {format_bytes(told.disk_bytes)} of disk"
    )
    if told.available_bytes is not None and told.memory_bytes > told.available_bytes:
        said += f"\nwarning: only {format_bytes(told.available_bytes)} of memory are free"
    return said


def parse_stops(text: str | None) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4)"""
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise GqaError("--kv-heads is not a list of numbers", got=repr(text), hint="--kv-heads 1,2,4") from None


def found(record: Record, budget: float) -> str:
    """What `--kv-heads auto` found."""
    fewest = record.results["within_budget"]["kv_heads"]
    if fewest is None:
        return f"No setting that was studied keeps perplexity within {budget:.1%} of the parent's."
    return f"The fewest KV heads within {budget:.1%} of the parent's perplexity: {fewest}."


def parse_analyses(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """`all`, `none` or names -> those of the known ones, in their order"""
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = {name.strip() for name in text.split(",")}
    if strange := sorted(names - set(known)):
        raise GqaError("no such analysis", got=", ".join(strange), allowed=", ".join((*known, "all", "none")))
    return tuple(name for name in known if name in names)


def print_tables(record: Record) -> None:
    """What the dial saves, and what it costs."""
    from gqa.study.settings import METHODS

    results = record.results
    times = {(row["kv_heads"], row["context_tokens"]): row["seconds_per_token_p50"] for row in results["decode"]}
    longest = max((context for _, context in times), default=None)
    rows = []
    for setting in results["settings"]:
        heads = setting["kv_heads"]
        rows.append(
            {
                "KV heads": str(heads),
                "cache per token": format_bytes(setting["kv_bytes_per_token"]),
                "cache is": f"{saving:.3g}x smaller"
                if (saving := setting["kv_cache_saving_ratio"]) > 1
                else "as it was",
                f"decode at {longest} tokens": format_seconds(times[heads, longest]) if longest else "-",
            }
        )
    exact = all(row["cache_bytes_predicted"] == row["cache_bytes_measured"] for row in results["decode"])
    cache = "predicted = measured to the byte" if exact else "predicted, and NOT what was measured: see the record"
    output.table(rows, title=f"\nWhat each setting saves (cache {cache}; decoding measured)")
    scores = {(row["kv_heads"], row["method"], row["stage"]): row for row in results["quality"]}
    rows = []
    for heads in [setting["kv_heads"] for setting in results["settings"]][1:]:
        for method in METHODS:
            converted, uptrained = (scores.get((heads, method, stage)) for stage in ("converted", "uptrained"))
            if converted is None:
                continue
            share = converted["share_of_mean_loss"]
            rows.append(
                {
                    "KV heads, method": f"{heads:>2}  {method}",
                    "perplexity converted": f"{converted['perplexity']:.2f}",
                    "uptrained": f"{uptrained['perplexity']:.2f}" if uptrained else "-",
                    "share of mean's loss": "1"
                    if method == "mean"
                    else f"1/{1 / share:.0f}"
                    if share and share > 0
                    else "none",
                    "same top token": f"{converted['top1_agreement']:.1%}",
                }
            )
    parent, control = results["parent"], results["control"]
    title = f"\nWhat each setting costs (measured; parent {parent['perplexity']:.2f}"
    title += f", parent continued like the children {control['perplexity']:.2f})" if control else ")"
    output.table(rows, title=title)


def _embedded(window: int | None, seed: int) -> tuple[Source, StudyText, dict[str, Any]]:
    from gqa.source import open_checkpoint
    from gqa.study.corpus import from_corpus
    from gqa.study.embedded import embedded_parent, stdlib_corpus

    parent = embedded_parent()
    text = from_corpus(stdlib_corpus(), parent.folder, window or _WINDOW, seed)
    training = {"train_tokens": parent.train_tokens, "train_seconds": parent.train_seconds}
    source = dataclasses.replace(open_checkpoint(str(parent.folder)), name="python-llama")
    return source, text, training


def _own(
    model: str, texts: tuple[Path, ...], window: int | None, seed: int, progress: Progress
) -> tuple[Source, StudyText, dict[str, Any]]:
    from gqa.config import parse_config
    from gqa.source import open_checkpoint
    from gqa.study.corpus import from_files

    source = open_checkpoint(model, progress)
    assert source.folder is not None
    context = parse_config(source.config, source.name).context or _WINDOW
    text = from_files(texts, source.folder, window or min(_WINDOW, context), seed)
    return source, text, _training(source.folder)


def _training(folder: Path) -> dict[str, Any]:
    """What a folder tells of its model's training; those that gqa trained do."""
    from gqa.study.embedded import METADATA

    try:
        told = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        return {name: told[name] for name in ("train_tokens", "train_seconds")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
