"""Quantised checkpoints, told by their configuration or, where it says nothing, by their tensors."""

import json

import pytest
import torch
from helpers.attacks import refused
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint

LAYER = "model.layers.1.mlp.up_proj"
ATTENTION = "model.layers.1.self_attn.q_proj"

# What each kind stores beside, or instead of, `<module>.weight`.
KINDS = {
    "GPTQ": {".weight": None, ".qweight": torch.int32, ".qzeros": torch.int32, ".g_idx": torch.int32},
    "AWQ": {".weight": None, ".qweight": torch.int32, ".qzeros": torch.int32, ".scales": torch.float16},
    "bitsandbytes int8": {".weight": torch.int8, ".SCB": torch.float32},
    "bitsandbytes nf4": {".weight": torch.uint8, ".weight.absmax": torch.uint8, ".weight.quant_map": torch.float32},
    "fp8 per tensor": {".weight": torch.float8_e4m3fn, ".weight_scale": torch.float32},
    "fp8 in blocks": {".weight": torch.float8_e4m3fn, ".weight_scale_inv": torch.float32},
    "fp8 without scales": {".weight": torch.float8_e5m2},
    "compressed-tensors": {".weight": None, ".weight_packed": torch.int32, ".weight_scale": torch.bfloat16},
}


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", None, ["x"]])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_told_by_the_configuration(tmp_path, key, method):
    config = tiny_config(**{key: {"quant_method": method}})
    error = refused(write_checkpoint(tmp_path / "m", config), tmp_path / "out", "a quantised checkpoint")
    assert str(method) in str(error.got)


@pytest.mark.parametrize("value", ["fp8", ["fp8"], 8, True])
def test_a_configuration_of_the_wrong_type(tmp_path, value):
    config = tiny_config(quantization_config=value)
    refused(write_checkpoint(tmp_path / "m", config), tmp_path / "out", "a quantised checkpoint")


def test_told_by_the_file_of_old_gptq(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    refused(folder, tmp_path / "out", "quantisation GPTQ")


@pytest.mark.parametrize("module", [LAYER, ATTENTION])
@pytest.mark.parametrize("kind", KINDS)
def test_told_by_the_tensors(tmp_path, kind, module):
    tensors = tiny_tensors(tiny_config())
    for suffix, dtype in KINDS[kind].items():
        if dtype is None:
            del tensors[module + suffix]
        else:
            tensors[module + suffix] = torch.ones(64, 64).to(dtype)
    folder = write_checkpoint(tmp_path / "m", tensors=tensors, shards=2)
    error = refused(folder, tmp_path / "out", "a quantised checkpoint")
    assert module in str(error.got)
