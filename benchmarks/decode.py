"""Time one decode step of attention over the dial: gqa's implementations against torch's own grouped SDPA.

    python benchmarks/decode.py [--context 8192] [--query-heads 32] [--dtype bf16] [--repeats 20]

Every contender must first be right: its error against float64 may be at most twice that of the plain computation in
the same dtype. A wrong one ends the run without a figure. Writes a record to benchmarks/results/.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gqa
from gqa.config import kv_head_choices
from gqa.record import Record
from gqa.units import format_bytes, format_seconds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIM = 128
WARM_UP = 3

Contender = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CONTENDERS: dict[str, Contender] = {
    "gqa sdpa": lambda q, k, v: gqa.attention(q, k, v, impl="sdpa"),
    "torch enable_gqa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
}


def check(contender: Contender, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """(error, allowed): the largest difference from float64, and twice that of the plain computation."""
    exact = gqa.attention(q.double(), k.double(), v.double(), impl="reference")
    plain = gqa.attention(q, k, v, impl="reference")
    found = contender(q, k, v)
    return float((found.double() - exact).abs().max()), 2 * float((plain.double() - exact).abs().max())


def measure(contenders: dict[str, Contender], query_heads: int, context: int, dtype: str, repeats: int) -> list[dict]:
    """A row per stop of the dial and contender. Contenders take turns, so that noise falls on all of them alike."""
    rows = []
    random = torch.Generator().manual_seed(0)
    for kv_heads in kv_head_choices(query_heads):
        shapes = [(1, query_heads, 1, HEAD_DIM), *[(1, kv_heads, context, HEAD_DIM)] * 2]
        q, k, v = (torch.randn(shape, generator=random).to(DTYPES[dtype]) for shape in shapes)
        errors = {name: check(contender, q, k, v) for name, contender in contenders.items()}
        for name, (error, allowed) in errors.items():
            if not error <= allowed:
                sys.exit(f"error: {name} is wrong at {kv_heads} KV heads: off by {error:.2e}, allowed {allowed:.2e}")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for step in range(-WARM_UP, repeats):
            for name, contender in contenders.items():
                start = time.perf_counter()
                contender(q, k, v)
                if step >= 0:
                    seconds[name].append(time.perf_counter() - start)
        for name, taken in seconds.items():
            p20, p50, p80 = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            cache_bytes = k.nbytes + v.nbytes
            rows.append(
                {
                    "implementation": name,
                    "kv_heads": kv_heads,
                    "queries_per_kv_head": query_heads // kv_heads,
                    "cache_bytes": cache_bytes,
                    "seconds_p20": p20,
                    "seconds_p50": p50,
                    "seconds_p80": p80,
                    "cache_bytes_per_second": cache_bytes / p50,
                    "max_error": errors[name][0],
                    "max_error_allowed": errors[name][1],
                }
            )
            print(f"{kv_heads:>3} KV heads  {format_bytes(cache_bytes):>9}  {format_seconds(p50):>8}  {name}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    inputs: dict[str, Any] = vars(parser.parse_args())
    rows = measure(CONTENDERS, inputs["query_heads"], inputs["context"], inputs["dtype"], inputs["repeats"])
    basis = dict.fromkeys((name for name in rows[0] if name.startswith(("seconds", "cache_bytes_per"))), "measured")
    inputs |= {"head_dim": HEAD_DIM, "threads": torch.get_num_threads(), "commit": commit()}
    record = Record("benchmark decode", inputs, {"rows": rows}, basis)
    machine = re.sub(r"[^a-z0-9]+", "-", str(record.machine["processor"]).lower()).strip("-")
    path = Path(__file__).with_name("results") / f"{machine}-decode.json"
    record.write(path)
    print(f"wrote {path.relative_to(Path(__file__).parents[1])}")


def commit() -> str | None:
    """The commit that was timed, with a mark if files had changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


if __name__ == "__main__":
    main()
