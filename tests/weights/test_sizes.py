"""Bytes of a checkpoint from its headers, without reading a weight."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gqa.errors import GqaError
from gqa.weights.sizes import stored_bytes


def test_separate_projections(tmp_path):
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 4),
        "model.layers.0.self_attn.k_proj.weight": torch.zeros(2, 4),
        "model.layers.0.self_attn.v_proj.weight": torch.zeros(2, 4, dtype=torch.float16),
        "model.layers.0.self_attn.v_proj.bias": torch.zeros(2),
        "model.layers.0.self_attn.k_norm.weight": torch.zeros(2),
        "lm_head.weight": torch.zeros(9, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_bytes(tmp_path, 0.5) == ((32 + 8 + 2 + 2 + 36) * 4 + 8 * 2, 8 * 4 + 8 * 2 + 2 * 4)


def test_fused_projections_and_shards(tmp_path):
    save_file({"h.0.attn.c_attn.weight": torch.zeros(12, 4)}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(5, 4)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"h.0.attn.c_attn.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_bytes(tmp_path, 0.25) == (48 * 4 + 20 * 4, 48)


def test_nothing_and_nonsense(tmp_path):
    assert stored_bytes(tmp_path, 0.5) is None
    for strange in ({}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../b.safetensors"}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(strange))
        with pytest.raises(GqaError):
            stored_bytes(tmp_path, 0.5)
