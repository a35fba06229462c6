"""Weights that are no numbers to calculate with."""

import pytest
import torch
from helpers.attacks import CALIBRATED, MEAN, refused
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint

from gqa.convert.recipe import make_recipe

ATTENTION = "model.layers.{}.self_attn.{}_proj.{}"
BIASED = tiny_config(attention_bias=True)


def with_value(name, value, dtype=torch.float32):
    tensors = tiny_tensors(BIASED, dtype)
    tensors[name].view(-1)[-1] = value
    return tensors


@pytest.mark.parametrize(("role", "value"), [("q", "nan"), ("k", "inf"), ("v", "-inf"), ("o", "nan")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_in_an_attention(tmp_path, value, role, kind):
    """In the last layer, where others have been converted: the work that was begun goes too."""
    name = ATTENTION.format(2, role, kind)
    folder = write_checkpoint(tmp_path / "m", BIASED, tensors=with_value(name, float(value)))
    refused(folder, tmp_path / "out", f"{name} holds NaN or infinite values", make_recipe(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_in_every_dtype(tmp_path, dtype):
    name = ATTENTION.format(0, "k", "weight")
    folder = write_checkpoint(tmp_path / "m", BIASED, tensors=with_value(name, float("inf"), dtype))
    refused(folder, tmp_path / "out", f"{name} holds NaN or infinite values")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"]
)
def test_where_calibration_passes_through(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m", BIASED, tensors=with_value(name, float("nan")))
    refused(folder, tmp_path / "out", f"{name} holds NaN or infinite values", CALIBRATED)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool, torch.complex64], ids=str)
def test_attentions_that_are_not_floating_point(tmp_path, dtype):
    tensors = tiny_tensors(BIASED)
    name = ATTENTION.format(1, "v", "weight")
    tensors[name] = tensors[name].abs().to(dtype)
    folder = write_checkpoint(tmp_path / "m", BIASED, tensors=tensors)
    refused(folder, tmp_path / "out", f"{name} is not floating point")


@pytest.mark.parametrize("recipe", [MEAN, make_recipe(2)], ids=["mean", "svd"])
@pytest.mark.parametrize("size", [(60, 64), (64, 60), (64 * 64,), (1, 64, 64), (0, 64), ()], ids=str)
def test_shapes_that_the_config_does_not_give(tmp_path, size, recipe):
    tensors = tiny_tensors(BIASED)
    name = ATTENTION.format(1, "q", "weight")
    tensors[name] = torch.zeros(size)
    folder = write_checkpoint(tmp_path / "m", BIASED, tensors=tensors)
    error = refused(folder, tmp_path / "out", f"{name} has the wrong shape", recipe)
    assert (error.got, error.allowed) == (str(list(size)), "[64, 64], as config.json says")


@pytest.mark.parametrize("recipe", [make_recipe(2), CALIBRATED], ids=["svd", "calibrated"])
def test_finite_weights_whose_products_are_not(tmp_path, recipe):
    tensors = {name: tensor.double() * 1e200 for name, tensor in tiny_tensors(BIASED).items()}
    folder = write_checkpoint(tmp_path / "m", {**BIASED, "dtype": "float64"}, tensors=tensors)
    refused(folder, tmp_path / "out", "equations", recipe)
