"""Llama 3's scaled rotary embedding, of which a GGUF file keeps the factors and not the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# The same in every release of Llama 3.1 to 3.3; only the factor differs (8 or 32).
# Source: rope_scaling in the config.json of these models.
_LOW, _HIGH, _OLD_CONTEXT = 1.0, 4.0, 8192


def rope_parameters(base: float, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any] | None:
    """The rope_parameters of config.json for rotary frequencies base^(-2i/D) that are divided by factors[i].

    factors: one for each rotary pair i, or None for none. Returns None for factors that are not those of Llama 3:
    1 for wavelengths below 8192/4 tokens, the largest above 8192, and between them 1/((1 - s)/largest + s) with
    s = (8192/wavelength - 1)/(4 - 1).
    """
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if factors is None:
        return plain
    largest = float(f"{max(factors):.5g}")  # 8 again, of a quotient in 32 bits
    if not 1 <= largest < 1e6 or len(factors) != head_dim // 2:
        return None
    for i, found in enumerate(factors):
        wavelength = 2 * math.pi * base ** (2 * i / head_dim)
        s = min(1.0, max(0.0, (_OLD_CONTEXT / wavelength - _LOW) / (_HIGH - _LOW)))
        if not math.isclose(found, 1 / ((1 - s) / largest + s), rel_tol=1e-4):
            return None
    if largest == 1:
        return plain
    return plain | {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _OLD_CONTEXT,
    }
