"""A synthetic record of scaling with size; no figure in it was measured."""

from __future__ import annotations

import itertools
from typing import Any

from gqa.record import Record

SHARES = {"mean": 1.0, "svd": 0.08, "svd, refined": 0.03}


def row(size: str, parameters: int, train_tokens: int, kv_heads: int, method: str, calibration: int) -> dict[str, Any]:
    """A loss that falls with the power -0.3 of the parameters and -0.1 of the calibration text."""
    loss = 3 / kv_heads * SHARES[method] * (parameters / 1e6) ** -0.3 * (train_tokens / 2e7) ** 0.2
    loss *= (calibration / 32768) ** -0.1 if calibration else 1
    return {
        "size": size,
        "parameters": parameters,
        "train_tokens": train_tokens,
        "train_seconds": 60.0,
        "kv_heads": kv_heads,
        "method": method,
        "calibration_tokens": calibration,
        "perplexity": 12.0,
        "parent_perplexity": 10.0,
        "loss_above_parent_nats": loss,
        "loss_above_parent_standard_error_nats": 0.02 * loss,
        "seconds": 1.0,
        "device": "SYNTHETIC",
    }


def scaling_rows() -> list[dict[str, Any]]:
    sizes = {"1M": 1_200_000, "5M": 5_500_000, "15M": 15_700_000}
    rows = []
    for (size, parameters), tokens, kv_heads in itertools.product(sizes.items(), (20_000_000, 5_000_000), (4, 2, 1)):
        rows.append(row(size, parameters, tokens, kv_heads, "mean", 0))
        for method, calibration in itertools.product(("svd", "svd, refined"), (32768, 131072)):
            rows.append(row(size, parameters, tokens, kv_heads, method, calibration))
    return rows


def scaling_record() -> Record:
    rows = scaling_rows()
    for one in rows:
        one["share_of_mean_loss"] = SHARES[one["method"]]
    exponent = {"exponent": -0.3, "low": -0.45, "high": -0.15}
    trend = {"kv_heads": 2, "method": "svd", "rows": 12, "exponents": {"parameters": exponent}}
    inputs = {"window": 256, "text": "SYNTHETIC"}
    return Record("benchmark scaling", inputs, {"scaling": rows, "trends": [trend]}, {}, ("Synthetic.",))
