"""A tiny model whose first token has massive activations and is an attention sink, as in many trained models.

Real ones: from layer 12 on, the first token of a window has hidden states of rms 950 in SmolLM2-135M, where the median
token has 6 (Sun et al. 2024, arXiv 2402.17762).

Letters: d hidden size · T tokens of a window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.checkpoints import VOCAB, tiny_config, tiny_source, tiny_tensors

from gqa.source import Source

# Token ids that only begin a window.
FIRSTS = range(3, 63)
# Hidden dimensions that mean something: where the massive activation lies, a constant, and a mark of the first token.
_MASSIVE, _CONSTANT, _FIRST = 0, 1, 2
# The layer whose MLP writes it.
_WRITER = 1


def massive_source(folder: Path, height: float, *, model_type: str = "llama") -> Source:
    """A checkpoint with 8 KV heads, in which the first token's hidden states grow behind layer 1 to about `height`
    times the other tokens' rms; 0: the same model without that.

    One neuron of that layer's MLP fires for the first token alone, by an amount that depends a little on what the
    attentions before it give. From then on keys find the first token and its value is small. MLPs and head do not see
    the massive dimension. Heads of a group of four are alike, so that a conversion to 2 KV heads loses little.
    """
    biased = model_type == "qwen2"
    config = tiny_config(model_type=model_type, num_hidden_layers=5)
    if biased:
        config |= {"architectures": ["Qwen2ForCausalLM"]}
        del config["attention_bias"]
    tensors = tiny_tensors(config)
    generator = torch.Generator().manual_seed(5)
    _embed(tensors["model.embed_tokens.weight"], generator)
    for layer in range(config["num_hidden_layers"]):
        part = {
            name.removeprefix(p): t for name, t in tensors.items() if name.startswith(p := f"model.layers.{layer}.")
        }
        for name in ("k_proj", "v_proj"):
            for kind in ("weight", "bias") if biased else ("weight",):
                heads = part[f"self_attn.{name}.{kind}"].unflatten(0, (2, 4, 8))
                heads.copy_(heads[:, :1] + 0.1 * (heads - heads[:, :1]))
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):  # nothing else writes to these
            part[name][: _FIRST + 1] = 0
        _look_for_the_first(part)
        if layer == _WRITER:
            part["mlp.gate_proj.weight"][0] = 0
            part["mlp.gate_proj.weight"][0, _FIRST] = 1.0
            part["mlp.up_proj.weight"][0, _FIRST] = 1.0
            part["mlp.down_proj.weight"][:, 0] = 0
            part["mlp.down_proj.weight"][_MASSIVE, 0] = height
    tensors["model.norm.weight"][_MASSIVE] = 0
    return tiny_source(folder, config, tensors=tensors)


def first_token_windows(count: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids (count, length); every window begins with the same token."""
    random = np.random.default_rng(seed)
    windows = random.integers(FIRSTS.stop, VOCAB, (count, length))
    windows[:, 0] = random.integers(FIRSTS.start, FIRSTS.stop, count)
    return windows


def _embed(embedding: torch.Tensor, generator: torch.Generator) -> None:
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    embedding[:, : _FIRST + 1] = 0
    embedding[:, _CONSTANT] = 2
    embedding[FIRSTS.start : FIRSTS.stop, _FIRST] = 4


def _look_for_the_first(part: dict[str, Any]) -> None:
    """Queries ask for the massive dimension in a pair of rows that the rotary embedding hardly turns."""
    for name, column in (("q_proj", _CONSTANT), ("k_proj", _MASSIVE)):
        heads = part[f"self_attn.{name}.weight"].unflatten(0, (8, 8))
        heads[:, :, column] = 0
        heads[:, 3, column] = 1.5
    part["self_attn.v_proj.weight"][:, _MASSIVE] *= 0.3
