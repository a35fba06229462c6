"""`gqa convert`: a multi-head checkpoint in, a grouped-query one out."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gqa.cli import output
from gqa.convert.recipe import BASELINES, GROUPINGS, METHODS, PRECISIONS, Recipe, make_recipe
from gqa.errors import GqaError
from gqa.record import Record
from gqa.units import format_bytes, format_seconds, parse_bytes, parse_share, parse_tokens

if TYPE_CHECKING:
    from gqa.convert.job import Job
    from gqa.convert.texts import ConversionText
    from gqa.progress import Progress
    from gqa.source import Source

# Windows as in the trials behind the defaults; a shorter context bounds it.
_WINDOW = 256

_WORTH_TELLING_SECONDS = 10

# Prompts whose answers are compared after a conversion: enough to see a model that answers no more.
_ANSWERS = 24

# What `--calibrate` calls text that the parent writes itself.
_SELF = "self"

# What `--kv-heads auto` may lose where nothing else is said.
_BUDGET = 0.02

_BASIS = {
    "bytes": "measured",
    "bytes_parent": "measured",
    "seconds": "measured",
    "output_error": "measured",
    "closed_form_error": "measured",
    "hidden_error": "measured",
    "hidden_error_median": "measured",
    "hidden_error_p90": "measured",
    "perplexity": "measured",
    "perplexity_parent": "measured",
    "loss_above_parent_nats": "measured",
    "loss_above_parent_standard_error_nats": "measured",
    "kv_bytes_per_token": "predicted",
    "kv_bytes_per_token_parent": "predicted",
}
_PLAN_BASIS: dict[str, str] = dict.fromkeys(
    (
        "bytes",
        "free_space_needed_bytes",
        "seconds_estimate",
        "peak_memory_bytes_estimate",
        "peak_memory_bytes_streamed_estimate",
    ),
    "predicted",
)

_EXAMPLES = """
gqa convert ./my-mha-model ./my-gqa-model --kv-heads 8 --calibrate corpus.txt
gqa convert ./my-mha-model ./my-mqa-model --kv-heads 1 --calibrate corpus.txt --calibrate self --distill 1M
gqa convert ./my-mha-model ./my-gqa-model --kv-heads auto --budget 2% --calibrate corpus.txt
gqa convert huggyllama/llama-7b ./llama-7b-4 --kv-heads 4 --method mean --dry-run
gqa convert --verify ./my-mha-model ./my-gqa-model
"""


class _Command(output.Command):
    """With --verify it is another command, which converts nothing and takes other arguments."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        if "--verify" not in args:
            return super().make_context(info_name, args, *more, **extra)
        from gqa.cli.verify import command as verify

        return verify.make_context(info_name, [word for word in args if word != "--verify"], *more, **extra)


@click.command(cls=_Command, examples=_EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--kv-heads",
    required=True,
    metavar="N",
    help="KV heads of the result: a divisor of the parent's, or a multiple; `auto` for the fewest within --budget.",
)
@click.option(
    "--budget",
    metavar="SHARE",
    help="Write OUT only if its perplexity is at most that much above the parent's (0.02 or 2%).  [auto: 2%]",
)
@click.option("--method", type=click.Choice(METHODS), default="svd", show_default=True, help="How heads are merged.")
@click.option(
    "--calibrate",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="Text like what the model will read: .txt, .jsonl or .parquet files, folders of them, or `self` for text that"
    " MODEL writes (questions and answers where it has a chat template); repeatable, in equal parts.",
)
@output.text_field_option
@click.option("--calibration-tokens", default="32k", show_default=True, metavar="N", help="Tokens of it to look at.")
@click.option(
    "--measure",
    default="8k",
    show_default=True,
    metavar="N",
    help="Tokens of it that no fit sees: on them the result is compared with the parent.",
)
@click.option("--window", type=int, help=f"Tokens per window of text.  [default: {_WINDOW}, or the model's context]")
@click.option("--refine", metavar="TOKENS", help="Train each attention against the parent's on that many tokens.")
@click.option("--refine-steps", type=int, default=120, show_default=True, help="Steps of that training per layer.")
@click.option(
    "--distill",
    metavar="TOKENS",
    help="Train all attentions together against the parent's predictions on that many tokens of the calibration text.",
)
@click.option(
    "--distill-window", type=int, default=256, show_default=True, help="Tokens per window of the distillation."
)
@click.option("--distill-batch", type=int, default=2, show_default=True, help="Windows per step of the distillation.")
@click.option(
    "--distill-rate", type=float, default=5e-4, show_default=True, help="Peak learning rate of the distillation."
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the distillation's products.  [default: bf16 where the device multiplies it faster, else fp32]",
)
@click.option(
    "--answers",
    type=int,
    metavar="N",
    help="Prompts, written by MODEL, to which the answers of MODEL and OUT are compared; 0 for none.  [default: "
    f"{_ANSWERS} where there is text to measure on]",
)
@click.option("--grouping", type=click.Choice(GROUPINGS), help="Which heads share.  [default: by method]")
@click.option("--refit/--no-refit", default=None, help="Fit W_q, W_k, W_o to the parent.  [default: by method]")
@click.option("--memory", metavar="SIZE", help="What the conversion may take, such as 8GiB.  [default: what is free]")
@click.option("--device", help="Where it calculates, such as cpu or cuda.  [default: cuda where there is one]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@click.option(
    "--verify", is_flag=True, expose_value=False, help="Instead: gqa convert --verify [MODEL] OUT reads OUT again."
)
@output.json_option
def command(
    model: str,
    out: Path,
    kv_heads: str,
    budget: str | None,
    method: Any,
    texts: tuple[Path, ...],
    text_field: str,
    calibration_tokens: str,
    measure: str,
    window: int | None,
    refine: str | None,
    refine_steps: int,
    distill: str | None,
    distill_window: int,
    distill_batch: int,
    distill_rate: float,
    precision: Any,
    answers: int | None,
    grouping: Any,
    refit: bool | None,
    memory: str | None,
    device: str | None,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint MODEL with fewer KV heads to the new folder OUT.

    MODEL is a model folder, a GGUF file, the preset smollm2-135m or a hub id.
    GGUF weights are dequantised to bf16 first, once, and kept in the cache folder ($GQA_CACHE, or ~/.cache/gqa).

    svd, the default, keeps the best shared subspace of each group of heads. With --calibrate every error is weighted
    by what the text makes of it, and --distill trains all attentions together towards the parent's predictions. mean,
    first and random are the published baselines. A run that was stopped resumes when the same command is given again.
    """
    from gqa.config import parse_config
    from gqa.convert.auto import candidates
    from gqa.convert.effort import seconds_estimate
    from gqa.convert.job import plan_conversion
    from gqa.device import check_device, default_device, multiplies_bf16
    from gqa.text import read_text

    device = device or default_device()
    check_device(device)
    source = output.open_checkpoint(model)
    memory_bytes = parse_bytes(memory) if memory else None
    context = parse_config(source.config, source.name).context or _WINDOW
    refine_tokens = parse_tokens(refine) if refine else 0
    search = kv_heads == "auto"
    share = parse_share(budget) if budget else _BUDGET if search else None
    fitted = method not in BASELINES or refit or refine_tokens
    recipe = make_recipe(
        1 if search else _count(kv_heads),
        method,
        grouping=grouping,
        refit=refit,
        refine_tokens=refine_tokens,
        refine_steps=refine_steps,
        calibration_tokens=max(parse_tokens(calibration_tokens), refine_tokens) if texts and fitted else 0,
        window=min(_WINDOW, context) if window is None else window,
        measure_tokens=parse_tokens(measure) if texts and measure != "0" else 0,
        seed=seed,
        answers=(_ANSWERS if texts and measure != "0" else 0) if answers is None else answers,
        distill_tokens=parse_tokens(distill) if distill else 0,
        distill_window=min(distill_window, context),
        distill_batch=distill_batch,
        distill_learning_rate=distill_rate,
        distill_precision=precision or ("bf16" if multiplies_bf16(device) else "fp32"),
    )
    if recipe.distill_tokens and not texts:
        raise GqaError("a distillation reads text, and none is given", hint="--calibrate FILE, or --calibrate self")
    if share is not None and not recipe.measure_tokens:
        raise GqaError("a budget of loss is measured on text, and there is none", hint="--calibrate FILE")
    choices = candidates(source, recipe) if search else [recipe.kv_heads]
    recipe = dataclasses.replace(recipe, kv_heads=choices[-1])  # the plan with most to write stands for all
    job = plan_conversion(source, recipe)
    files = [path for path in texts if str(path) != _SELF]
    text = read_text(files, text_field) if files else ""
    _advise(recipe, job)
    for note in () if job.exact else job.layout.notes:
        output.note(f"note: {note}")
    inputs = {"model": model, "out": str(out), "texts": [str(path) for path in texts], "recipe": recipe.to_dict()}
    seconds = seconds_estimate(job, device)
    if dry_run:
        plan = job.describe() | {"seconds_estimate": seconds}
        if as_json:
            output.record(Record("convert", {**inputs, "dry_run": True}, plan, _PLAN_BASIS))
        else:
            _print_plan(plan, out)
        return

    from gqa.convert.auto import convert_within
    from gqa.convert.run import convert

    if seconds and seconds > _WORTH_TELLING_SECONDS:
        output.note(f"note: this takes about {format_seconds(seconds)}{' each' if search else ''} (estimate)")
    windows = None
    how: Any = {"texts": inputs["texts"], "memory_bytes": memory_bytes, "device": device}
    if recipe.answers:
        from gqa.evaluate.conversion import compare_answers

        how["compare_answers"] = compare_answers
    with output.progress() as progress:
        if (recipe.all_windows or recipe.distill_tokens) and not job.exact:
            cut = _cut(recipe, source, text, len(files) < len(texts), progress)
            recipe, windows = cut.recipe, cut.windows
            if cut.distill_windows is not None:
                from gqa.uptrain import distill_attentions

                how |= {"distill": distill_attentions, "distill_windows": cut.distill_windows}
        if share is None or windows is None:
            report = convert(source, out, recipe, windows, progress, **how)
        else:
            report = convert_within(source, out, recipe, windows, share, choices, progress, **how)
    if as_json:
        inputs["recipe"] = report.get("recipe", recipe.to_dict())
        output.record(Record("convert", inputs, report, _BASIS, tuple(report.get("approximations", ()))))
    elif report.get("within_budget", True):
        _print_report(report)
    else:
        output.table([_measured_row(one) for one in report["tried"]], title="Measured on text that no fit has seen")
    if not report.get("within_budget", True):
        output.note(f"no: nothing stays within {share:.2%} of the parent's perplexity, and nothing was written")
        click.get_current_context().exit(1)
    text_name = texts[0] if texts else "FILE"
    output.note(f"next: gqa eval {out} --text {text_name} --parent {model}   (best on text that was not used here)")


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise GqaError("a number of KV heads is not understood", got=repr(text), allowed="a number, or auto") from None


def _advise(recipe: Recipe, job: Job) -> None:
    if job.exact and recipe.distill_tokens:
        output.note("note: the result computes what its parent computes; --distill has nothing to train")
    if job.identity:
        output.note("note: the parent has that many KV heads already; every tensor is copied")
    elif job.repeats:
        output.note("note: every KV head of the parent is repeated, which is exact; the method has no part in it")
    elif recipe.baseline and recipe.measure_tokens:
        output.note(f"note: {recipe.method} alone fits nothing to the text; --refit or --refine would")
    elif recipe.method not in BASELINES and not recipe.calibration_tokens:
        output.note("note: without calibration text more is lost than need be; --calibrate FILE takes any plain text")


def _cut(recipe: Recipe, source: Source, text: str, own: bool, progress: Progress) -> ConversionText:
    """Text, and what the parent writes if `own`, as the windows that the recipe asks for."""
    from gqa.convert.texts import conversion_text
    from gqa.evaluate.own_text import own_text
    from gqa.text import load_tokenizer, token_windows

    assert source.folder is not None
    folder, tokenizer, sources = source.folder, load_tokenizer(source.folder), []
    if text:
        sources.append(lambda count, tokens: token_windows(text, tokenizer, tokens, count, recipe.seed))
    if own:
        sources.append(lambda count, tokens: own_text(folder, count, tokens, recipe.seed, progress))
    cut = conversion_text(sources, recipe)
    if cut.recipe != recipe:
        asked = recipe.all_windows * recipe.window
        output.note(f"note: the text has {cut.tokens} tokens in whole windows, fewer than the {asked} asked for")
    if cut.distill_rounds > 1:
        output.note(f"note: the distillation reads its text {cut.distill_rounds:.1f} times")
    return cut


def _print_report(report: dict[str, Any]) -> None:
    done = "was converted already" if report["already_done"] else f"took {format_seconds(report['seconds'])}"
    changed = f"{report['tensors_changed']} of {report['tensors']} tensors changed"
    output.data(f"{report['out']}: {report['recipe']['method']}, {changed}, {done}")
    pairs = (
        ("KV heads", "kv_heads", str),
        (f"KV cache per token, {report['kv_dtype']} (predicted)", "kv_bytes_per_token", format_bytes),
        ("weight files (measured)", "bytes", format_bytes),
    )
    output.table(
        [
            {"": what, "parent": form(report[f"{name}_parent"]), "converted": form(report[name])}
            for what, name, form in pairs
        ]
    )
    for one in report.get("tried", ()):
        output.data(f"not within the budget: {one['kv_heads']} KV heads, perplexity {_change(one):+.2%} (measured)")
    if report["measured"]:
        one = report["measured"]
        before = report.get("measured_before_distillation")
        steps = f"{before['perplexity']:.3f} -> distilled " if before else ""
        output.data(
            f"perplexity on {one['tokens']} tokens of the text that no fit has seen (measured): "
            f"{one['perplexity_parent']:.3f} -> {steps}{one['perplexity']:.3f} ({_change(one):+.2%})"
        )
    if answers := report.get("answers"):
        _print_answers(answers)
    errors = [(layer["hidden_error"], layer["layer"]) for layer in report["layers"] if "hidden_error" in layer]
    if errors:
        (worst, where), (last, _) = max(errors), errors[-1]
        seen = "text that no fit has seen" if report.get("distillation") else "the calibration text"
        output.data(
            f"hidden states on {seen} are off (relative squared distance, measured): "
            f"{last:.3%} behind the last layer, at most {worst:.3%} behind layer {where}"
        )


def _print_answers(answers: dict[str, Any]) -> None:
    if "not_compared" in answers:
        output.note(f"note: answers were not compared: {answers['not_compared'].splitlines()[0]}")
        return
    output.data(
        f"answers to {answers['prompts']} prompts that the parent wrote (greedy, measured): "
        f"{answers['answers_equal']:.0%} equal to the parent's, {answers['degenerate_answers']:.0%} repeat themselves "
        f"(parent {answers['parent_degenerate_answers']:.0%}), KL {answers['answers_kl_nats']:.3f} nats per token"
    )


def _change(measured: dict[str, Any]) -> float:
    return measured["perplexity"] / measured["perplexity_parent"] - 1


def _measured_row(measured: dict[str, Any]) -> dict[str, str]:
    return {
        "KV heads": str(measured["kv_heads"]),
        "perplexity": f"{measured['perplexity']:.3f}",
        "parent's": f"{measured['perplexity_parent']:.3f}",
        "change": f"{_change(measured):+.2%}",
    }


def _print_plan(plan: dict[str, Any], out: Path) -> None:
    def what(layer: dict[str, Any]) -> tuple[Any, ...]:
        heads = f"{layer['kv_heads_parent']} -> {layer['kv_heads']}"
        return heads, ", ".join(layer["steps"]), layer["bytes_read"], layer["bytes_written"]

    rows = []
    for (heads, steps, read, written), layers in itertools.groupby(plan["layers"], what):
        numbers = [layer["layer"] for layer in layers]
        rows.append(
            {
                "layers": f"{numbers[0]}-{numbers[-1]}",
                "KV heads": heads,
                "reads, each": format_bytes(read),
                "writes, each": format_bytes(written),
                "steps": steps,
            }
        )
    output.table(rows, title=f"{plan['model']} -> {out} (a plan; nothing is written)")
    files = len(plan["shards"])
    output.data(f"copied byte for byte: {plan['tensors_copied']} of {plan['tensors']} tensors")
    output.data(
        f"weight files: {files}, {format_bytes(plan['bytes_parent'])} -> {format_bytes(plan['bytes'])}; "
        f"free space needed {format_bytes(plan['free_space_needed_bytes'])}"
    )
    peak, streamed = plan["peak_memory_bytes_estimate"], plan["peak_memory_bytes_streamed_estimate"]
    or_files = f", or {format_bytes(streamed)} with the text's activations in files" if streamed < peak else ""
    output.data(f"memory: about {format_bytes(peak)}{or_files} (estimate)")
    if plan["seconds_estimate"]:
        output.data(f"time: about {format_seconds(plan['seconds_estimate'])} beside the copying (estimate)")
