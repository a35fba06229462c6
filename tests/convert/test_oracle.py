"""The oracle: a GQA model repeated to MHA and scrambled without changing its function must convert back exactly."""

import numpy as np
import pytest
import torch
from helpers.models import as_scrambled_mha, attention_layers, tiny_llama

from gqa.convert.engine import Engine
from gqa.convert.recipe import make_recipe
from gqa.weights.layout import load_layout
from gqa.weights.reader import Checkpoint

TOKENS = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def convert_back(model, folder, recipe, windows):
    """Save, convert every layer, and load the result into the grouped-query class."""
    model.save_pretrained(folder)
    layout = load_layout(model.config.model_type)
    config = model.config.to_dict()
    engine = Engine(Checkpoint(folder), layout, config, recipe, windows)
    child = tiny_llama(recipe.kv_heads, model.config.num_attention_heads, bias=model.config.attention_bias)
    state = dict(model.state_dict())
    for layer in range(config["num_hidden_layers"]):
        weights, _ = engine.convert(layer)
        state.update(layout.attention_tensors(layer, weights))
    child.load_state_dict(state)
    return child


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("method", ["svd", "procrustes"])
def test_scrambled_mha_converts_back_exactly(tmp_path, method, kv_heads, calibrated, bias):
    grouped = tiny_llama(kv_heads, bias=bias)
    scrambled = as_scrambled_mha(grouped)
    torch.testing.assert_close(logits(scrambled), logits(grouped), rtol=0, atol=1e-10)  # the scrambling is free
    windows = np.random.default_rng(0).integers(0, 97, (12, 24)) if calibrated else None
    recipe = make_recipe(kv_heads, method, calibration_tokens=12 * 24 if calibrated else 0, window=24)
    child = convert_back(scrambled, tmp_path, recipe, windows)
    assert (logits(child) - logits(grouped)).abs().max() < 1e-9


def test_mean_does_not_convert_back(tmp_path):
    grouped = tiny_llama(2)
    child = convert_back(as_scrambled_mha(grouped, shuffle=False), tmp_path, make_recipe(2, "mean"), None)
    assert (logits(child) - logits(grouped)).abs().max() > 0.1


def test_already_grouped_models_shrink_further(tmp_path):
    """From H = 4 to 2: pairs of KV heads that are copies, each read by two query heads."""
    grouped = tiny_llama(2)
    half = as_scrambled_mha(grouped, shuffle=False)
    halved = tiny_llama(4)
    state = dict(grouped.state_dict())
    for layer, layout, weights in attention_layers(grouped):
        k, v = (tensor.view(2, 12, -1).repeat_interleave(2, 0).reshape(48, -1) for tensor in (weights.k, weights.v))
        state |= {layout.tensor_name(layer, "k"): k, layout.tensor_name(layer, "v"): v}
    halved.load_state_dict(state)
    torch.testing.assert_close(logits(halved), logits(half), rtol=0, atol=1e-10)
    child = convert_back(halved, tmp_path, make_recipe(2, "svd"), None)
    assert (logits(child) - logits(grouped)).abs().max() < 1e-9


def test_refinement_lowers_the_output_error(tmp_path):
    model = tiny_llama(8)
    model.save_pretrained(tmp_path)
    windows = np.random.default_rng(0).integers(0, 97, (16, 24))
    recipe = make_recipe(2, "svd", calibration_tokens=16 * 24, refine_tokens=16 * 24, window=24)
    engine = Engine(Checkpoint(tmp_path), load_layout("llama"), model.config.to_dict(), recipe, windows)
    for layer in range(2):
        _, report = engine.convert(layer)
        assert report["output_error"] < 0.8 * report["closed_form_error"]


def test_replay_leaves_the_same_activations(tmp_path):
    model = tiny_llama(8)
    model.save_pretrained(tmp_path)
    windows = np.random.default_rng(0).integers(0, 97, (8, 24))
    recipe = make_recipe(2, "svd", calibration_tokens=8 * 24, window=24)

    def engine():
        return Engine(Checkpoint(tmp_path), load_layout("llama"), model.config.to_dict(), recipe, windows)

    whole, resumed = engine(), engine()
    first, _ = whole.convert(0)
    resumed.replay(0, first)
    a, _ = whole.convert(1)
    b, _ = resumed.convert(1)
    for field in ("q", "k", "v", "o"):
        assert torch.equal(getattr(a, field), getattr(b, field))
