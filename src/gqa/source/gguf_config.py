"""The header of a GGUF file -> the config.json of the model in it.

An architecture is a row of ARCHITECTURES. A key or a tensor that the row does not name is an error: it would change
the model, and transformers ignores it without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqa.errors import GqaError
from gqa.source.gguf_header import GgufHeader
from gqa.source.gguf_rope import rope_parameters

# GGUF key after the architecture's name -> config.json key.
_NUMBERS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_NORM, _BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
# Keys that say what follows from others, and keys that are understood with one value only.
_IMPLIED = {"vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count"}
_ONLY: dict[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.type": "none",
}
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}

# Tensor -> its sizes: V vocabulary, d hidden, f intermediate, D head dim, r half of it, q and k all query and all KV
# heads' rows.
_OUTER = {"token_embd.weight": "Vd", "output_norm.weight": "d"}
# Absent where the embedding is used again, and where the rotary frequencies are not scaled.
_OPTIONAL = {"output.weight": "Vd", "rope_freqs.weight": "r"}
_LAYER = {
    "attn_norm.weight": "d",
    "attn_q.weight": "qd",
    "attn_k.weight": "kd",
    "attn_v.weight": "kd",
    "attn_output.weight": "dq",
    "ffn_norm.weight": "d",
    "ffn_gate.weight": "fd",
    "ffn_up.weight": "fd",
    "ffn_down.weight": "df",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """config: what config.json says beside the numbers; tensors: of each layer, beside those of a Llama."""

    config: Mapping[str, Any]
    tensors: Mapping[str, str]


ARCHITECTURES = {
    "llama": Architecture(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False},
        {},
    ),
    "qwen2": Architecture(
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
        {"attn_q.bias": "q", "attn_k.bias": "k", "attn_v.bias": "k"},
    ),
    "qwen3": Architecture(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "use_sliding_window": False,
        },
        {"attn_q_norm.weight": "D", "attn_k_norm.weight": "D"},
    ),
}


def config_of(header: GgufHeader) -> dict[str, Any]:
    """The config.json that transformers would write for the dequantised model, whose weights are bf16.

    Raises GqaError for an architecture that is not a row here, for keys and tensors that its row does not name, and
    for tensors whose shapes are not what the keys say.
    """
    return _Config(header).config()


class _Config:
    def __init__(self, header: GgufHeader) -> None:
        self.header, self.file = header, header.path.name
        name = header.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise GqaError(
                f"{self.file} has an architecture that gqa does not read from GGUF",
                got="none" if name is None else f"{name!a}"[:80],
                allowed=", ".join(ARCHITECTURES),
                hint="use the model's safetensors instead",
            )
        self.name = str(name)
        self.architecture = ARCHITECTURES[self.name]

    def config(self) -> dict[str, Any]:
        self.refuse_unknown()
        numbers = {key: self.number(own) for own, key in _NUMBERS.items()}
        heads, hidden = numbers["num_attention_heads"], numbers["hidden_size"]
        head_dim = self.number("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.number(key, head_dim) != head_dim:
                raise self.error(f"{self.name}.{key}", self.value(key), f"{head_dim}, as each head is wide")
        vocabulary = self.check_tensors(numbers, head_dim)
        return {
            **self.architecture.config,
            **numbers,
            "head_dim": head_dim,
            "vocab_size": vocabulary,
            "hidden_act": "silu",
            "rms_norm_eps": self.decimal(_NORM),
            "rope_parameters": self.rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self.header.shapes,
            **{own: self.token(key, vocabulary) for key, own in _TOKENS.items()},
            "dtype": "bfloat16",
        }

    def refuse_unknown(self) -> None:
        known = {*_NUMBERS, _NORM, _BASE, *_IMPLIED}
        for full in (*self.header.metadata, *self.header.lengths):
            key = full.removeprefix(f"{self.name}.")
            if key == full or key in known or (key in _ONLY and self.value(key) == _ONLY[key]):
                continue
            allowed = _ONLY.get(key, f"the keys of a plain {self.name} model")
            raise self.error(full, self.value(key), allowed)
        if self.header.metadata.get("split.count", 1) not in (0, 1):
            raise GqaError(
                f"{self.file} is one part of a model",
                got=f"{self.header.metadata['split.count']} parts",
                allowed="a model in one file",
                hint="llama-gguf-split --merge joins the parts",
            )

    def check_tensors(self, numbers: Mapping[str, int], head_dim: int) -> int:
        """Every tensor of the architecture, in its shape, and no other. Returns the vocabulary's size."""
        shapes = self.header.shapes
        layers = numbers["num_hidden_layers"]
        if layers > len(shapes):
            raise self.error(f"{self.name}.block_count", layers, f"at most its {len(shapes)} tensors")
        vocabulary = shapes.get("token_embd.weight", (0,))[0]
        if self.header.lengths.get("tokenizer.ggml.tokens", 0) > vocabulary:
            raise self.error("tokenizer.ggml.tokens", self.header.lengths["tokenizer.ggml.tokens"], vocabulary)
        sizes = {
            "V": vocabulary,
            "d": numbers["hidden_size"],
            "f": numbers["intermediate_size"],
            "D": head_dim,
            "r": head_dim // 2,
            "q": numbers["num_attention_heads"] * head_dim,
            "k": numbers["num_key_value_heads"] * head_dim,
        }
        of_layer = {**_LAYER, **self.architecture.tensors}
        wanted = _OUTER | {name: letters for name, letters in _OPTIONAL.items() if name in shapes}
        wanted |= {f"blk.{i}.{name}": letters for i in range(layers) for name, letters in of_layer.items()}
        for name, letters in wanted.items():
            shape = tuple(sizes[letter] for letter in letters)
            if shapes.get(name) != shape:
                raise self.error(f"tensor {name}", shapes.get(name, "none"), f"shape {shape}")
        if more := sorted(set(shapes) - set(wanted)):
            raise self.error(f"tensor {more[0]}", "not understood", f"the tensors of a plain {self.name} model")
        return vocabulary

    def rope(self, head_dim: int) -> dict[str, Any]:
        name, base = "rope_freqs.weight", self.decimal(_BASE, 10000.0)
        factors = None
        if name in self.header.shapes:
            if self.header.types[name] != "F32":
                raise self.error(f"tensor {name}", self.header.types[name], "F32")
            factors = self.header.floats(name)
        found = rope_parameters(base, head_dim, factors)
        if found is None:
            raise self.error(f"tensor {name}", factors, "the factors of Llama 3.1 to 3.3")
        return found

    def value(self, key: str) -> Any:
        full = f"{self.name}.{key}"
        length = self.header.lengths.get(full)
        return self.header.metadata.get(full) if length is None else f"a list of {length}"

    def number(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.error(f"{self.name}.{key}", value, "a whole number from 1")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not float or not 0 < value < 1e30:
            raise self.error(f"{self.name}.{key}", value, "a number above 0")
        return value

    def token(self, key: str, vocabulary: int) -> int | None:
        value = self.header.metadata.get(key)
        if value is not None and not (type(value) is int and 0 <= value < vocabulary):
            raise self.error(key, value, f"a token below {vocabulary}")
        return value

    def error(self, what: str, got: object, allowed: object) -> GqaError:
        return GqaError(f"{self.file}: {what} is not understood", got=f"{got!a}"[:200], allowed=allowed)
