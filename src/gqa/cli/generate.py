"""`gqa generate`: text from a model, as it comes, and what it took."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from gqa.cli import output
from gqa.errors import GqaError
from gqa.record import Record
from gqa.units import format_bytes, format_seconds, parse_tokens

if TYPE_CHECKING:
    from gqa.model.generate import Generation

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_EXAMPLES = """
gqa generate ./my-gqa-model "def fibonacci(n):"
gqa generate meta-llama/Llama-3.2-1B-Instruct "Why is the sky blue?" --chat --temperature 0.7 --dtype bf16
cat report.txt | gqa generate ./my-gqa-model - --max-tokens 1k --cache int8 --json
"""


@click.command(cls=output.Command, examples=_EXAMPLES)
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", default="256", show_default=True, metavar="N", help="New tokens at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from this share of probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--dtype", type=click.Choice(["auto", *_DTYPES]), default="auto", show_default=True, help="auto: as it is stored."
)
@click.option(
    "--attention",
    type=click.Choice(["gqa", "sdpa", "eager"]),
    default="gqa",
    show_default=True,
    help="Ours, or one of transformers'.",
)
@click.option(
    "--cache",
    type=click.Choice(["contiguous", "paged", "int8"]),
    help="How keys and values are kept; with --attention gqa.  [default: contiguous, where it serves the model]",
)
@click.option("--device", help="For example cpu or cuda.  [default: cuda where there is one]")
@output.json_option
def command(
    model: str,
    prompt: str,
    max_tokens: str,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    dtype: str,
    attention: str,
    cache: Any,
    device: str | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with MODEL. The text goes to stdout as it comes, what it took to stderr.

    MODEL is a model folder, a GGUF file, the preset smollm2-135m or a hub id.
    The prompt "-" reads standard input, less one line end at its end. Ctrl-C ends the text where it is.
    """
    if cache and attention != "gqa":
        raise GqaError(f"--cache {cache} goes with --attention gqa", got=f"--attention {attention}")
    most = parse_tokens(max_tokens)
    if prompt == "-":
        prompt = _read_stdin()

    from gqa.config import parse_config
    from gqa.text import load_tokenizer

    source = output.open_checkpoint(model)
    assert source.folder is not None
    shape = parse_config(source.config, source.name)
    tokenizer = load_tokenizer(source.folder)

    import torch

    from gqa.evaluate.load import load_model
    from gqa.model.generate import Sampling, encode_prompt, generate, use_attention
    from gqa.quiet import quiet_transformers

    sampling = Sampling(temperature, top_p, seed)
    prompt_ids = encode_prompt(tokenizer, prompt, chat=chat)
    stored = _DTYPES.get(shape.weight_dtype or "") if dtype == "auto" else _DTYPES[dtype]
    loaded = load_model(source.folder, dtype=getattr(torch, stored) if stored else None, device=device)
    if shape.context and prompt_ids.shape[1] + most > shape.context:
        output.note(f"note: prompt and new tokens may exceed the model's context of {shape.context} tokens")
    with quiet_transformers():
        use_attention(loaded, attention)
        result = generate(
            loaded, tokenizer, prompt_ids, max_tokens=most, sampling=sampling, cache=cache,
            on_text=_say_nothing if as_json else output.piece,
        )  # fmt: skip
    if as_json:
        inputs = {
            "model": model,
            "prompt": prompt,
            "chat": chat,
            "max_tokens": most,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "attention": attention,
            "cache": cache,
        }
        results = dataclasses.asdict(result)
        figures = [name for name in results if name not in ("text", "interrupted")]
        output.record(Record("generate", inputs, results, dict.fromkeys(figures, "measured")))
    else:
        output.piece("\n")
        output.note(_summary(result))
    if result.interrupted:
        click.get_current_context().exit(130)


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GqaError("the prompt is not text", got=str(error), allowed="UTF-8") from None


def _say_nothing(piece: str) -> None:
    pass


def _summary(result: Generation) -> str:
    if result.seconds_to_first_token is None:
        return f"{result.prompt_tokens} prompt tokens, no new token"
    parts = [f"{result.prompt_tokens} prompt tokens in {format_seconds(result.seconds_to_first_token)}"]
    rate = "" if result.tokens_per_second is None else f" at {result.tokens_per_second:.1f} tokens/s"
    parts.append(f"{result.new_tokens} token{'' if result.new_tokens == 1 else 's'}{rate}")
    if result.kv_cache_bytes is not None:
        parts.append(f"KV cache {format_bytes(result.kv_cache_bytes)}")
    if result.peak_memory_bytes is not None:
        parts.append(f"peak GPU memory {format_bytes(result.peak_memory_bytes)}")
    return ", ".join(parts)
