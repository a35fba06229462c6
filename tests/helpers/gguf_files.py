"""Tiny GGUF files: models written as llama.cpp's converter writes them, and raw ones for attacks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BYTES = list(bytes_to_unicode().values())
TOKENS = [*BYTES, "he", "Ġt", "<|start|>", "<|end|>"]
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": len(TOKENS),
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}


def tiny_model(model_type: str = "llama", **changes: Any) -> Any:
    """A random model in fp32, with norms and biases that matter. Heads of 8 dimensions, of 16 for qwen3."""
    torch.manual_seed(0)
    head_dim = 16 if model_type == "qwen3" else 8
    config = AutoConfig.for_model(model_type, **{**SHAPE, "head_dim": head_dim, **changes}, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of W_q or W_k as llama.cpp keeps a Llama's: the two of a rotary pair next to each other."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: Any, kind: str = "F32", **keys: Any) -> Path:
    """The model as a GGUF file: matrices in this type, all else in F32. keys: more metadata, dots as two underscores;
    an integer is written as u32, None leaves out the tensor of that name."""
    config = model.config
    name = config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(["h e", "Ġ t"])
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template(TEMPLATE)
    for key, value in keys.items():
        _add(writer, key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[name], config.num_hidden_layers)
    wanted = gguf.GGMLQuantizationType[kind]
    if config.rope_parameters["rope_type"] == "llama3":
        rotary = LlamaRotaryEmbedding(config)
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq).numpy())
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if name == "llama" and ("q_proj" in own or "k_proj" in own):
            heads = config.num_attention_heads if "q_proj" in own else config.num_key_value_heads
            values = pairs_together(values, heads)
        of_file = names.get_name(own, try_suffixes=(".weight", ".bias"))
        assert of_file is not None
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(of_file, values)
        else:
            writer.add_tensor(of_file, gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        writer.add_tensor(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


# Raw files, byte by byte.


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A text, or one that claims another length."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """A row of the table; shape: innermost dimension first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def raw_file(
    keys: list[bytes],
    tensors: list[bytes],
    data_bytes: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A file with these keys and tensors, or one that claims other numbers of them."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data_bytes)
