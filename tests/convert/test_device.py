"""Calculations on another device than the CPU: everything that belongs there is there, and gives the same numbers."""

import pytest
import torch
from helpers.checkpoints import folder_hashes, random_windows, tiny_config, tiny_source
from helpers.other_device import NAME, OtherDevice
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gqa.convert import memory
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint

RECIPES = {
    "data-free": make_recipe(2),
    "procrustes": make_recipe(2, "procrustes", calibration_tokens=128, window=32),
    "random": make_recipe(2, "random", grouping="search"),
    "calibrated": make_recipe(2, calibration_tokens=128, measure_tokens=64, window=32),
    "refined": make_recipe(2, calibration_tokens=128, refine_tokens=128, refine_steps=3, window=32),
}


@pytest.mark.parametrize(
    ("model_type", "name", "streamed"),
    [
        *(("llama", name, False) for name in RECIPES),
        ("llama", "refined", True),
        ("qwen2", "data-free", False),
        ("qwen2", "refined", False),
        ("qwen3", "calibrated", False),
    ],
)
def test_the_same_model_as_on_the_cpu(tmp_path, monkeypatch, model_type, name, streamed):
    if streamed:
        monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    recipe = RECIPES[name]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**tiny_config(model_type=model_type, initializer_range=0.2))
    )
    model.save_pretrained(tmp_path / "parent")
    source, windows = open_checkpoint(str(tmp_path / "parent")), random_windows(recipe)
    convert(source, tmp_path / "here", recipe, windows)
    with OtherDevice() as device:
        convert(source, tmp_path / "there", recipe, windows, device=NAME)
    assert device.ops > 100
    # Bases of a subspace differ by rounding alone in which of two equals comes first: the models are compared.
    tokens = torch.arange(24).view(1, 24)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / place) for place in ("here", "there")]
    here, there = (model(tokens).logits.detach() for model in models)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-2 * float(here.std()))


def test_a_device_that_is_not_here(tmp_path):
    with pytest.raises(GqaError, match="no such device here"):
        convert(tiny_source(tmp_path / "parent"), tmp_path / "out", make_recipe(2), device="cuda:7")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_pooling_is_the_same_whatever_the_device(tmp_path):
    source = tiny_source(tmp_path / "parent")
    convert(source, tmp_path / "here", make_recipe(2, "mean"))
    convert(source, tmp_path / "there", make_recipe(2, "mean"), device=NAME)
    assert folder_hashes(tmp_path / "here").keys() == folder_hashes(tmp_path / "there").keys()
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("here", "there"))
    assert all(torch.equal(one[name], other[name]) for name in one)
