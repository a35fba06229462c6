"""Tiny checkpoints, written tensor by tensor without transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gqa.convert.recipe import Recipe
from gqa.source import Source, open_checkpoint

HIDDEN, HEADS, LAYERS, VOCAB, INTERMEDIATE = 64, 8, 3, 160, 96


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A Llama of 3 layers with 8 heads of 8 dimensions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
        **changes,
    }


def tiny_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names of Llama, Mistral and Qwen2."""
    generator = torch.Generator().manual_seed(seed)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    d, queries = config["hidden_size"], config["num_attention_heads"] * head_dim
    keys, wide = config["num_key_value_heads"] * head_dim, config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, size in (("q", (queries, d)), ("k", (keys, d)), ("v", (keys, d)), ("o", (d, queries))):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = size
            if config.get("attention_bias") or (config["model_type"] == "qwen2" and name != "o"):
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = size[:1]
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (wide, d)
        shapes[f"{prefix}mlp.down_proj.weight"] = (d, wide)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    tensors = {}
    for name, size in shapes.items():
        values = torch.randn(size, generator=generator) * 0.2
        tensors[name] = (values + 1 if "norm" in name else values).to(dtype)
    return tensors


def write_checkpoint(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A checkpoint folder; tensors go round the shards, so that a layer lies in several of them."""
    config = config or tiny_config(dtype=str(dtype).removeprefix("torch."))
    tensors = tensors or tiny_tensors(config, dtype, seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == index}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def folder_hashes(folder: Path) -> dict[str, str]:
    """Every file under a folder -> a hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tiny_source(folder: Path, *args: Any, **kwargs: Any) -> Source:
    """write_checkpoint, opened."""
    return open_checkpoint(str(write_checkpoint(folder, *args, **kwargs)))


def random_windows(recipe: Recipe, seed: int = 0) -> np.ndarray | None:
    """Token ids in place of calibration text, as many windows as the recipe wants."""
    shape = (recipe.all_windows, recipe.window)
    return np.random.default_rng(seed).integers(0, VOCAB, shape) if recipe.all_windows else None
