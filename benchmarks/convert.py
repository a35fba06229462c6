"""Conversion of a synthetic checkpoint: time against `cp -r` of the same files, and peak memory.

    python benchmarks/convert.py                       7B shape, 13.5 GB of bf16: mean in turns with cp, then svd
    python benchmarks/convert.py --gigabytes 2         fewer layers of it
    python benchmarks/convert.py --only calibrated     1B shape, calibrated svd on 32 windows of 512 tokens
    python benchmarks/convert.py --only refined --gigabytes 0.9     3 layers of it, refined on the same in 120 steps

A result is checked before its time counts: copied tensors byte for byte, pooled ones against the plain mean in
float64. Every conversion is a process of its own, as a user starts it, imports included; its peak memory is what the
system says of that process. cp leaves its bytes in the page cache, the conversion has them on the disk at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from session import RESULTS, slug

from gqa.bench.document import record
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.record import describe_machine, read_record
from gqa.source import open_checkpoint
from gqa.units import format_bytes, format_seconds
from gqa.weights.header import TensorEntry
from gqa.weights.reader import INDEX, Checkpoint
from gqa.weights.writer import write_index, write_shard

COMMAND = "benchmark convert"
KV_HEADS = 8
SHARD_BYTES = 5_000_000_000  # what save_pretrained makes
WINDOWS, WINDOW = 32, 512  # of the calibrated conversion
MEASURED = 4  # further windows, on which it compares itself with its parent
BLOCK_BYTES = 128 << 20

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": _COMMON  # Llama 2 7B: https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    | {"tie_word_embeddings": False},
    "1b": _COMMON  # Llama 3.2 1B with a KV head per query head: meta-llama/Llama-3.2-1B
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
}
ABOUT = (
    "throughput is the parent's bytes by the seconds of the whole process; cp's is of cp -r of the same, in turns.",
    "cp -r ends with its bytes in the page cache, gqa convert with all of them on the disk; seconds_to_disk is what"
    " cp's take to get there.",
    "Weights are random bits of moderate size: time and memory are right, the model says nothing.",
)


def tensors(config: dict[str, Any]) -> list[TensorEntry]:
    """The bf16 tensors of a Llama, layer after layer."""
    d, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{role}_proj.weight": (d, d) for role in "qkvo"}
        shapes |= {f"{prefix}mlp.{role}_proj.weight": (wide, d) for role in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (d, wide)
        shapes |= {f"{prefix}{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    return [TensorEntry(name, "BF16", shape) for name, shape in shapes.items()]


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES, seed: int = 0) -> None:
    """A sharded checkpoint of random weights. They are drawn once, BLOCK_BYTES of them, and written from one place
    after another of the block: drawing all would take longer than what is timed."""
    shards: list[list[TensorEntry]] = [[]]
    for entry in tensors(config):
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    generator = np.random.default_rng(seed)
    sizes = {entry.name: entry.nbytes for shard in shards for entry in shard}
    bits = generator.integers(0, 1 << 16, BLOCK_BYTES // 2, np.uint16)
    # Sign, two low bits of the exponent and mantissa are random: +-2^-8 to +-2^-4.
    block = memoryview(((bits & 0x81FF) | 0x3B80).tobytes())
    one = b"\x80\x3f"

    def write(name: str, stream: BinaryIO) -> None:
        left = sizes[name]
        while left:
            count = min(left, BLOCK_BYTES // 2)
            start = 2 * int(generator.integers(0, BLOCK_BYTES // 4))
            stream.write(one * (count // 2) if "norm" in name else block[start : start + count])
            left -= count

    folder.mkdir(parents=True)
    for name, entries in zip(names, shards, strict=True):
        write_shard(folder / name, entries, write, {"format": "pt"})
    write_index(folder / INDEX, dict(zip(names, shards, strict=True)))
    (folder / "config.json").write_text(json.dumps(config))


def check(parent: Path, child: Path, method: str) -> None:
    """Some layers of the result: what is copied is the parent's bytes, and what is pooled is the plain mean."""
    old, new = Checkpoint(parent), Checkpoint(child)
    last = max(int(name.split(".")[2]) for name in old.names if name.startswith("model.layers."))
    for layer in sorted({0, last // 2, last}):
        prefix = f"model.layers.{layer}."
        for name in (name for name in old.names if name.startswith(prefix)):
            before, after = old.read(name), new.read(name)
            if "k_proj" in name or "v_proj" in name:
                assert after.shape[0] * 32 == before.shape[0] * KV_HEADS, f"{name}: {tuple(after.shape)}"
                if method == "mean":
                    groups = before.view(KV_HEADS, 32 // KV_HEADS, -1, before.shape[1])
                    before = torch.cat([group.double().mean(0) for group in groups]).bfloat16()
            elif method != "mean" and "self_attn" in name:
                before = after  # W_q and W_o are fitted
                assert torch.isfinite(after).all(), name
            if method == "mean" or "self_attn" not in name:
                assert torch.equal(before, after), f"{name} is not what it should be"


def timed(command: Sequence[str | Path]) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a process; RuntimeError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {process.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def gqa_convert(parent: Path, child: Path, method: str) -> list[str | Path]:
    run = "import sys; from gqa.cli.main import main; main(sys.argv[1:])"
    return [sys.executable, "-c", run, "convert", parent, child, "--kv-heads", str(KV_HEADS), "--method", method]


def removed(folder: Path) -> None:
    """Without a trace: nothing of it is still on its way to the disk when the next turn begins."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["sync", "-f", str(folder.parent)], check=True)


def time_mean(parent: Path, nbytes: int, turns: int) -> Iterator[dict[str, Any]]:
    copy, child = parent.with_name("copy"), parent.with_name("mean")
    for turn in range(turns):
        removed(copy)
        copied, _ = timed(["cp", "-r", parent, copy])
        to_disk, _ = timed(["sync", "-f", copy])
        removed(copy)
        seconds, peak = timed(gqa_convert(parent, child, "mean"))
        if not turn:
            check(parent, child, "mean")
        removed(child)
        row = {
            "what": "mean", "parent_bytes": nbytes,
            "seconds": seconds, "bytes_per_second": nbytes / seconds, "peak_rss_bytes": peak,
            "cp_seconds": copied, "cp_bytes_per_second": nbytes / copied, "cp_seconds_to_disk": copied + to_disk,
            "share_of_cp": copied / seconds, "share_of_cp_to_disk": (copied + to_disk) / seconds,
        }  # fmt: skip
        tell(row)
        yield row


def time_once(what: str, parent: Path, nbytes: int, command: Sequence[str | Path], child: Path) -> dict[str, Any]:
    seconds, peak = timed(command)
    check(parent, child, what)
    removed(child)
    row = {"what": what, "parent_bytes": nbytes, "seconds": seconds, "bytes_per_second": nbytes / seconds}
    row |= {"peak_rss_bytes": peak}
    tell(row)
    return row


def tell(row: dict[str, Any]) -> None:
    share = f", {row['share_of_cp']:.2f} of cp -r ({row['cp_seconds']:.1f} s)" if "share_of_cp" in row else ""
    took, peak = format_seconds(row["seconds"]), format_bytes(row["peak_rss_bytes"])
    print(f"{row['what']}: {took}{share}, peak memory {peak}", file=sys.stderr, flush=True)


def calibrated(parent: str, child: str, refine_tokens: int) -> None:
    """What the rows with text time, as a process of its own: random tokens, as random weights have no language."""
    source = open_checkpoint(parent)
    tokens, measured = WINDOWS * WINDOW, MEASURED * WINDOW
    recipe = make_recipe(
        KV_HEADS, calibration_tokens=tokens, refine_tokens=refine_tokens, window=WINDOW, measure_tokens=measured
    )
    windows = np.random.default_rng(0).integers(0, source.config["vocab_size"], (WINDOWS + MEASURED, WINDOW))
    convert(source, child, recipe, windows, lambda stage, done, total, note="": print(stage, done, total, note))


@contextlib.contextmanager
def checkpoint(shape: str, gigabytes: float, place: Path | None) -> Iterator[tuple[Path, int]]:
    """A synthetic checkpoint with about that many GB, and its bytes; removed at the end."""
    config = dict(SHAPES[shape])
    entries = tensors(config)
    layers = sum(entry.nbytes for entry in entries if entry.name.startswith("model.layers."))
    each = layers / config["num_hidden_layers"]
    others = sum(entry.nbytes for entry in entries) - layers
    config["num_hidden_layers"] = max(1, min(config["num_hidden_layers"], round((gigabytes * 1e9 - others) / each)))
    with tempfile.TemporaryDirectory(prefix="gqa-convert-", dir=place) as folder:
        parent = Path(folder) / "parent"
        write_checkpoint(parent, config)
        yield parent, sum(path.stat().st_size for path in parent.iterdir())


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--gigabytes", type=float, default=13.5, help="of the parent, at most 13.5  [%(default)s]")
    options.add_argument(
        "--only", default="mean,svd,calibrated", help="which of mean, svd, calibrated, refined  [%(default)s]"
    )
    options.add_argument("--turns", type=int, default=3, help="of cp and mean  [%(default)s]")
    options.add_argument("--place", type=Path, help="where to put 2.8 times as many gigabytes  [temporary files]")
    options.add_argument("--out", type=Path, help="the record's path")
    options.add_argument("--calibrated", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.calibrated:
        parent, child, refine_tokens = chosen.calibrated
        calibrated(parent, child, int(refine_tokens))
        return
    machine = describe_machine()
    path = chosen.out or RESULTS / f"{machine['cores']}-core-{slug(str(machine['processor']))}-convert.json"
    only = chosen.only.split(",")
    # A run of some rows replaces those of an earlier run.
    old = read_record(path).results["conversions"] if path.exists() else []
    rows: list[dict[str, Any]] = [row for row in old if row["what"].split()[0] not in only]

    def write() -> None:
        inputs = {"turns": chosen.turns, "kv_heads": KV_HEADS}
        inputs |= {"calibration_windows": WINDOWS, "window_tokens": WINDOW, "shapes": SHAPES}
        record(COMMAND, inputs, {"conversions": rows}, ABOUT).write(path)

    if {"mean", "svd"} & {*only}:
        with checkpoint("7b", chosen.gigabytes, chosen.place) as (parent, nbytes):
            if "mean" in only:
                for row in time_mean(parent, nbytes, chosen.turns):
                    rows.append(row)
                    write()
            if "svd" in only:
                child = parent.with_name("svd")
                rows.append(time_once("svd", parent, nbytes, gqa_convert(parent, child, "svd"), child))
                write()
    for what, refine_tokens in (("calibrated", 0), ("refined", WINDOWS * WINDOW)):
        if what in only:
            with checkpoint("1b", chosen.gigabytes, chosen.place) as (parent, nbytes):
                child = parent.with_name(what)
                command = [sys.executable, __file__, "--calibrated", parent, child, str(refine_tokens)]
                row = time_once(f"{what} svd", parent, nbytes, command, child)
                layers = json.loads((parent / "config.json").read_text())["num_hidden_layers"]
                each = row["seconds"] / layers
                per_token = {"seconds_per_layer_and_token": each / (WINDOWS * WINDOW)}
                rows.append(row | {"layers": layers, "seconds_per_layer": each} | per_token)
                write()
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
