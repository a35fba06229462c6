"""How a KV head's gradient grows with the query heads that share it.

Every query head of a group sends a gradient into the group's K and V. If these were independent and alike, the norm of
their sum would grow as sqrt(G); if they agreed, as G. Measured at random weights and on trained models, as the norm of
a head's gradient times the norm of its weights: K may be scaled up and Q down, V up and W_o down, without any effect on
what a model does, and conversions do; the product does not change with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

PROJECTIONS = ("k", "v")
# Of the random setting: query heads, their dims, tokens.
_HEADS, _HEAD_DIM, _TOKENS = 8, 4, 6
_SEEDS = 500
_WIDE = 1.96  # standard errors to either side for 95 %


def random_growth(seeds: int = _SEEDS) -> dict[str, dict[int, Tensor]]:
    """Projection -> G -> log of the gradient's norm times the weights' per KV head (seeds,), float64: one attention
    layer with weights of one standard deviation, random inputs and a random gradient at its output."""
    found: dict[str, dict[int, Tensor]] = {name: {} for name in PROJECTIONS}
    width = _HEADS * _HEAD_DIM
    for shared in (1, 2, 4, 8):
        logs: dict[str, list[float]] = {name: [] for name in PROJECTIONS}
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)

            def draw(*shape: int, scale: float = 1.0, of: torch.Generator = generator) -> Tensor:
                return torch.randn(*shape, generator=of, dtype=torch.float64) * scale

            kv_heads = _HEADS // shared
            x, upstream = draw(_TOKENS, width), draw(_HEADS, _TOKENS, _HEAD_DIM)
            q = (x @ draw(width, width, scale=width**-0.5)).view(_TOKENS, _HEADS, _HEAD_DIM)
            weights = {
                name: draw(width, kv_heads * _HEAD_DIM, scale=width**-0.5).requires_grad_() for name in PROJECTIONS
            }
            k, v = ((x @ weights[name]).view(_TOKENS, kv_heads, _HEAD_DIM) for name in PROJECTIONS)
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            (out[0] * upstream).sum().backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                logs[name].append(_log_norm(weight.grad.T, kv_heads) + _log_norm(weight.detach().T, kv_heads))
        for name in PROJECTIONS:
            found[name][shared] = torch.tensor(logs[name], dtype=torch.float64)
    return found


def trained_growth(folders: Mapping[int, Path], windows: np.ndarray) -> dict[str, dict[int, Tensor]]:
    """The same (windows,) for models of the same parent: G -> folder. The gradient is that of a window's language-model
    loss; logs are averaged over KV heads and layers. Empty for models without projections of their own."""
    from gqa.evaluate import load_model

    found: dict[str, dict[int, Tensor]] = {name: {} for name in PROJECTIONS}
    for shared, folder in folders.items():
        model = load_model(folder)
        kv_heads = model.config.get_text_config().num_key_value_heads
        layers = {
            name: [
                m for path, m in model.named_modules() if path.endswith(f".{name}_proj") and isinstance(m, nn.Linear)
            ]
            for name in PROJECTIONS
        }
        if not all(layers.values()):
            return {}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in (m for modules in layers.values() for m in modules):
            module.weight.requires_grad_(True)
        logs: dict[str, list[float]] = {name: [] for name in PROJECTIONS}
        for window in windows:
            model.zero_grad()
            ids = torch.as_tensor(window)[None]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for name, modules in layers.items():
                found_here = [
                    _log_norm(m.weight.grad, kv_heads) + _log_norm(m.weight.detach(), kv_heads)
                    for m in modules
                    if m.weight.grad is not None
                ]
                logs[name].append(sum(found_here) / len(modules))
        for name in PROJECTIONS:
            found[name][shared] = torch.tensor(logs[name], dtype=torch.float64)
    return found


def rows_of(
    found: Mapping[str, Mapping[int, Tensor]], weights: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of growth, rows of its exponent), each with a 95 % interval over seeds or windows, paired.

    ratio: norm at G over the norm at the fewest that share; exponent: e of norm ~ G^e, least squares through that
    point. sqrt(G) is an exponent of 1/2."""
    growth, exponents = [], []
    for projection, logs in found.items():
        start = min(logs)
        ratios = {shared: log - logs[start] for shared, log in logs.items()}
        for shared, ratio in ratios.items():
            mean, low, high = (math.exp(value) for value in _interval(ratio))
            growth.append(
                {
                    "weights": weights,
                    "projection": projection,
                    "queries_per_kv_head": shared,
                    "norm_ratio": mean,
                    "norm_ratio_low": low,
                    "norm_ratio_high": high,
                }
            )
        steps = {shared: math.log(shared / start) for shared in logs if shared != start}
        if not steps:
            continue
        weighted = torch.stack([step * ratios[shared] for shared, step in steps.items()]).sum(0)
        slope = weighted / sum(step * step for step in steps.values())
        mean, low, high = _interval(slope)
        exponents.append(
            {
                "weights": weights,
                "projection": projection,
                "exponent": mean,
                "exponent_low": low,
                "exponent_high": high,
                "samples": len(slope),
            }
        )
    return growth, exponents


def measure(folders: Mapping[int, Path], windows: np.ndarray) -> dict[str, Any]:
    """gradients: rows of growth; gradient_exponents: rows of its exponent. At random weights and on the models."""
    random_rows, random_exponents = rows_of(random_growth(), "random")
    trained_rows, trained_exponents = rows_of(trained_growth(folders, windows), "trained")
    return {
        "gradients": random_rows + trained_rows,
        "gradient_exponents": random_exponents + trained_exponents,
    }


def _log_norm(matrix: Tensor, kv_heads: int) -> float:
    """Mean over KV heads of the log of the norm of their rows; matrix (H * D, width)."""
    return float(matrix.double().reshape(kv_heads, -1).norm(dim=1).log().mean())


def _interval(values: Tensor) -> Sequence[float]:
    mean = float(values.mean())
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - _WIDE * error, mean + _WIDE * error
