"""A tiny config of every architecture that converts: one row each. Weights are drawn so that everything matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, WINDOW, TOKENS = 97, 7, 24

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_ROUNDED = 1e-4


@dataclass(frozen=True)
class Row:
    """settings: of the config class, beside the small ones. free: whether copies of a head, each turned by the maps
    of its own that its architecture allows, convert back exactly (else: copies as they are). kv_heads: of the child.
    multi_head: settings of the model with a KV head per query head.
    error: allowed in logits of size 1; `_ROUNDED` where something calculates in float32 whatever it is given: norms of
    queries and keys, Cohere's rotary embedding, the softmax of eager attention, experts."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    free: bool = True
    kv_heads: int = 2
    error: float = 1e-9
    multi_head: dict[str, Any] = field(default_factory=lambda: {"num_key_value_heads": 4})
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float64


# A head dim of its own, unequal to hidden / heads.
_WIDE = {"head_dim": 20}
_MIXTURE = {"num_local_experts": 3, "num_experts_per_tok": 2}
_UNNAMED = {"num_key_value_heads": None, "intermediate_size": None}  # keys that the class has not
_FALCON = _UNNAMED | {"ffn_hidden_size": 56}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

ROWS = {
    "llama": Row("llama", _WIDE | {"attention_bias": True}),
    "mistral": Row("mistral", _WIDE | {"sliding_window": WINDOW}),
    "qwen2": Row("qwen2"),
    "mixtral": Row("mixtral", _WIDE | _MIXTURE, error=_ROUNDED, dtype=torch.float32),
    "gemma": Row("gemma", _WIDE),
    "gemma2": Row(
        "gemma2", _WIDE | {"sliding_window": WINDOW, "attn_logit_softcapping": 3.0}, error=_ROUNDED, attention="eager"
    ),
    "gemma3": Row("gemma3_text", _WIDE | {"sliding_window": WINDOW, "sliding_window_pattern": 2}, error=_ROUNDED),
    "qwen3": Row("qwen3", _WIDE, error=_ROUNDED),
    "qwen2_moe": Row(
        "qwen2_moe",
        _EXPERTS | {"shared_expert_intermediate_size": 24},
        error=_ROUNDED,
        dtype=torch.float32,
    ),
    "qwen3_moe": Row("qwen3_moe", _WIDE | _EXPERTS, error=_ROUNDED, dtype=torch.float32),
    "starcoder2": Row("starcoder2", {"use_bias": True, "sliding_window": WINDOW}),
    "granite": Row("granite", {"attention_multiplier": 0.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.7}),
    "cohere": Row("cohere", error=_ROUNDED),
    "cohere, norms": Row("cohere", {"use_qk_norm": True}, free=False, error=_ROUNDED),
    "olmo": Row("olmo"),
    "olmo2": Row("olmo2", error=_ROUNDED),
    "stablelm": Row("stablelm", {"use_qkv_bias": True}),
    "phi": Row("phi"),
    "phi3": Row("phi3", {"partial_rotary_factor": 0.75}),
    "falcon, new decoder": Row(
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        multi_head={"num_kv_heads": 4},
    ),
    "falcon, one KV head": Row("falcon", _FALCON, kv_heads=1, multi_head={"multi_query": False}),
    "falcon, ALiBi": Row(
        "falcon",
        _FALCON | {"alibi": True, "parallel_attn": False},
        kv_heads=1,
        multi_head={"multi_query": False},
    ),
    "gpt_bigcode": Row("gpt_bigcode", _UNNAMED | {"n_inner": 56}, kv_heads=1, multi_head={"multi_query": False}),
    "gpt_oss": Row(
        "gpt_oss",
        _WIDE | _MIXTURE | {"sliding_window": WINDOW, "rope_parameters": _ROPE},
        error=_ROUNDED,
        attention="eager",
        dtype=torch.float32,
    ),
}


def tiny_model(row: Row, **changes: Any) -> Any:
    """A random model of this row."""
    torch.manual_seed(0)
    settings = {key: value for key, value in (_SMALL | row.settings | changes).items() if value is not None}
    config = AutoConfig.for_model(row.model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=row.attention, dtype=row.dtype).eval()
    with torch.no_grad():  # transformers starts these at zero or one, which would test nothing
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.3)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.add_(_pairwise(parameter.shape, model_type=row.model_type))
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(torch.rand_like(parameter) * 0.3)
    return model


def _pairwise(shape: torch.Size, model_type: str) -> torch.Tensor:
    """Numbers to add to norm weights, alike for the two rows of a rotary pair."""
    if model_type == "olmo2":
        half = torch.rand(shape[0] // 16, 1, 8, dtype=torch.float64)
        half[:] = half[0]  # and for all heads, which are to be copies of one another
        return half.expand(-1, 2, -1).flatten() - 0.4
    half = torch.rand(shape[-1] // 2, dtype=torch.float64) - 0.4
    return torch.cat([half, half]).expand(shape)


@torch.no_grad()
def logits(model: Any, windows: np.ndarray | None = None) -> torch.Tensor:
    """Of these windows (N, T), or of some others."""
    if windows is None:
        windows = np.random.default_rng(1).integers(3, VOCAB, (3, TOKENS))
    return model(torch.from_numpy(windows)).logits
