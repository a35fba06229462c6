"""A minuscule parent, a child of it with something to win back, and their text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from helpers.small import RECIPE, small_parent
from safetensors.torch import load_file

from gqa.evaluate import load_model
from gqa.text import load_tokenizer, read_text, token_windows


def parent_and_windows(folder: Path) -> tuple[Path, np.ndarray]:
    trained, corpus = small_parent(folder)
    return trained, token_windows(read_text(corpus.train), load_tokenizer(trained), RECIPE.window)


def noisy_child(parent: Path, target: Path) -> Path:
    """The parent with half its KV heads, mean-pooled, and with noise: a parent as green as this one would lose nothing
    that could be won back."""
    shutil.copytree(parent, target)
    model = load_model(parent)
    torch.manual_seed(0)
    config = json.loads((parent / "config.json").read_text())
    config["num_key_value_heads"] = RECIPE.heads // 2
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            D = RECIPE.hidden // RECIPE.heads
            pooled = projection.weight.detach().reshape(RECIPE.heads // 2, 2, D, -1).mean(1).flatten(0, 1)
            projection.weight = torch.nn.Parameter(pooled)
        with torch.no_grad():
            layer.self_attn.o_proj.weight.add_(torch.randn(RECIPE.hidden, RECIPE.hidden), alpha=0.5)
    model.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config))
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
