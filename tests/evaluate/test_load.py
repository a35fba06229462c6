import json

import pytest
import torch
from helpers.models import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from gqa.errors import GqaError
from gqa.evaluate import load_model


@pytest.fixture
def folder(tmp_path):
    tiny_llama(2, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_loads_in_eval_mode_and_in_fp32_on_a_cpu(folder, capsys):
    model = load_model(folder, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(folder, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert capsys.readouterr() == ("", "")


def test_weights_that_do_not_fill_the_model_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    missing = dict(tensors)
    del missing["model.layers.1.self_attn.k_proj.weight"]
    save_file(missing, path, metadata={"format": "pt"})
    with pytest.raises(GqaError, match="do not fit") as caught:
        load_model(folder)
    assert "layers.1.self_attn.k_proj" in str(caught.value)

    save_file({**tensors, "model.norm.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(GqaError, match="do not fit"):
        load_model(folder)


def test_what_is_no_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(GqaError):
        load_model(tmp_path / "none")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(GqaError):
        load_model(folder)


def test_an_unknown_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nothing", "architectures": ["Nothing"]}))
    with pytest.raises(GqaError, match="cannot load"):
        load_model(folder)


def test_a_device_that_is_not_here_is_named(folder):
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(GqaError, match="no such device") as caught:
            load_model(folder, device=device)
        assert device in str(caught.value)
        assert "cpu" in str(caught.value)


def test_a_device_that_is_too_small_is_told(folder, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(GqaError, match="does not fit on the device"):
        load_model(folder)
