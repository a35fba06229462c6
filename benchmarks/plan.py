"""The planner against this machine: bytes of caches that `gqa generate` allocates, and decode steps beside their bound.

    python benchmarks/plan.py                    every model; some minutes
    python benchmarks/plan.py --models llama-32  one of them

Models have random weights and a few layers of a real shape, so that their weights lie in no cache of the processor:
`llama-N` 4 layers of Llama-3.2-1B's with N KV heads (bf16 and fp32), `mistral` with a sliding window, `qwen3` with
norms of heads, 8-bit and paged caches. Each is written as a checkpoint with a tokenizer and run by the command, as a
user would. A cache that is not the bytes that were planned, or a step that beats its bound, ends the run with exit 1.
Rows of other models that are in the record already are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from session import RESULTS, slug

from gqa.bench.document import record
from gqa.bench.this_device import measure_this_device
from gqa.config import parse_config
from gqa.plan.decode import decode_bound
from gqa.plan.engines import Contiguous, Engine, find_engine
from gqa.plan.kv_dtype import kv_dtype
from gqa.record import describe_machine, read_record
from gqa.source import open_source

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    **{f"llama-{n}": LLAMA | {"num_key_value_heads": n} for n in (32, 8, 1)},
    "mistral": LLAMA | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 1024},
    "qwen3": LLAMA | {"model_type": "qwen3", "num_key_value_heads": 8},
}
# model, dtype, cache, tokens of prompt
RUNS = (
    *((f"llama-{n}", dtype, None, 8000) for n in (32, 8, 1) for dtype in ("fp32", "bf16")),
    ("mistral", "bf16", None, 3000),
    ("qwen3", "bf16", None, 3000),
    ("qwen3", "bf16", "int8", 3001),
    ("qwen3", "bf16", "paged", 3001),
)
NEW_TOKENS, REPEATS = 33, 3
BLOCK = 16  # of gqa's paged cache
ABOUT = (
    "Tokens are those held at the end: the prompt and all new ones but the last.",
    "The bound is max((weights + cache) / read bandwidth, FLOPs / fp32 rate), bandwidth and rate measured in this run;"
    " weights and cache lie in memory, not in a cache of the processor.",
    "A step's time is the median over runs of the mean of 32 steps, transformers' own work included.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="which models")
    options.add_argument("--out", type=Path, help="the record's path")
    chosen = options.parse_args(arguments)
    machine = describe_machine()
    path = chosen.out or RESULTS / f"{machine['cores']}-core-{slug(str(machine['processor']))}-plan.json"
    device = measure_this_device()
    rows: list[dict[str, Any]] = list(read_record(path).results["plan"]) if path.exists() else []
    rows = [row for row in rows if row["model"] not in chosen.models]  # measured again
    with tempfile.TemporaryDirectory(prefix="gqa-plan-") as place:
        for name, dtype, cache, tokens in RUNS:
            if name not in chosen.models:
                continue
            folder = Path(place) / f"{name}-{dtype}"
            if not folder.exists():
                write_model(folder, MODELS[name], dtype)
            found = [generate(folder, tokens, cache) for _ in range(REPEATS)]
            shape = parse_config(open_source(str(folder)).config, name)
            held = found[0]["prompt_tokens"] + found[0]["new_tokens"] - 1
            planned = engine_of(cache).bytes_for(shape, held, 1, kv_dtype("int8" if cache == "int8" else dtype))
            seconds = statistics.median(1 / run["tokens_per_second"] for run in found)
            bound = decode_bound(shape, held, 1, kv_dtype(dtype), 4 if dtype == "fp32" else 2, device)
            assert bound is not None
            rows.append(
                {
                    "model": name,
                    "kv_heads": shape.kv_heads,
                    "dtype": dtype,
                    "cache": cache or "default",
                    "context_tokens": held,
                    "cache_bytes_predicted": planned,
                    "cache_bytes_measured": found[0]["kv_cache_bytes"],
                    "decode_seconds_bound": bound.seconds,
                    "decode_limit": bound.limit,
                    "seconds_per_token_p50": seconds,
                    "fraction_of_bound": bound.seconds / seconds,
                }
            )
            print(line(rows[-1]), file=sys.stderr, flush=True)
    device_told = {"name": device.name, "bandwidth_bytes_per_second": device.bandwidth_bytes_per_second}
    device_told |= {"flops_per_second": device.flops_per_second}
    record("benchmark plan", {"new_tokens": NEW_TOKENS}, {"device": device_told, "plan": rows}, ABOUT).write(path)
    print(f"wrote {path}", file=sys.stderr)
    if any(wrong(row) for row in rows):
        sys.exit(1)


def wrong(row: dict[str, Any]) -> bool:
    """Whether the planner was: other bytes than planned, or a step faster than can be."""
    return row["cache_bytes_predicted"] != row["cache_bytes_measured"] or row["fraction_of_bound"] > 1


def engine_of(cache: str | None) -> Engine:
    """gqa's paged cache takes whole blocks, as vLLM's does for layers that are all alike."""
    return find_engine("vllm", block=BLOCK) if cache == "paged" else Contiguous()


def write_model(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """A checkpoint with random weights, and a tokenizer that has a token per byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {character: index for index, character in enumerate(sorted(bytes_level.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_level, decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    told = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(
        config["model_type"], vocab_size=len(alphabet), eos_token_id=None, bos_token_id=None, pad_token_id=None, **told
    )
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    AutoModelForCausalLM.from_config(made, dtype=kind).save_pretrained(folder)


def generate(folder: Path, tokens: int, cache: str | None) -> dict[str, Any]:
    """The results of `gqa generate` on a prompt of so many bytes."""
    command = [sys.executable, "-m", "gqa", "generate", str(folder), "-", "--max-tokens", str(NEW_TOKENS), "--json"]
    command += ["--cache", cache] if cache else []
    done = subprocess.run(command, input="x" * tokens, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)["results"]


def line(row: dict[str, Any]) -> str:
    same = "equal" if row["cache_bytes_predicted"] == row["cache_bytes_measured"] else "NOT EQUAL"
    return (
        f"{row['model']}, {row['dtype']}, {row['cache']} cache, {row['context_tokens']} tokens:"
        f" {row['cache_bytes_measured']:,} bytes, planned {row['cache_bytes_predicted']:,}, {same};"
        f" {row['seconds_per_token_p50'] * 1e3:.1f} ms a token, {row['fraction_of_bound']:.2f} of the bound"
    )


if __name__ == "__main__":
    main()
