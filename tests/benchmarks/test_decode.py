"""The decode benchmark stands behind its check: a wrong contender gives no figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def decode() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "decode.py"
    spec = importlib.util.spec_from_file_location("benchmark_decode", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_is_timed_at_every_stop(decode: ModuleType, dtype: str) -> None:
    rows = decode.measure(decode.CONTENDERS, query_heads=4, context=63, dtype=dtype, repeats=2)
    assert [(row["kv_heads"], row["implementation"]) for row in rows] == [
        (kv_heads, name) for kv_heads in (1, 2, 4) for name in decode.CONTENDERS
    ]
    assert all(0 < row["seconds_p20"] <= row["seconds_p50"] <= row["seconds_p80"] for row in rows)


def test_a_wrong_contender_ends_the_run(decode: ModuleType) -> None:
    # reads KV heads in the wrong order: n % H instead of n // G
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1))

    with pytest.raises(SystemExit, match="wrong is wrong at 2 KV heads"):
        decode.measure({"wrong": wrong}, query_heads=4, context=63, dtype="fp32", repeats=1)
