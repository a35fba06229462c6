"""Distillations to one KV head of other parents than Llama: norms of heads, biases, sliding windows."""

import dataclasses

import pytest
from helpers.architectures import ROWS
from helpers.copying import WINDOW, copying_model, copying_windows

from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.evaluate import evaluate, load_model
from gqa.source import open_checkpoint
from gqa.uptrain import distill_attentions

STEPS, BATCH = 80, 8
RECIPE = make_recipe(
    1,
    calibration_tokens=64 * WINDOW,
    window=WINDOW,
    distill_tokens=STEPS * BATCH * WINDOW,
    distill_window=WINDOW,
    distill_batch=BATCH,
    distill_learning_rate=3e-3,
)
PARENTS = {
    "qwen3, norms of heads and biases": dataclasses.replace(
        ROWS["qwen3"], settings=ROWS["qwen3"].settings | {"attention_bias": True}
    ),
    "gemma3, windows of 7 tokens": ROWS["gemma3"],
}


@pytest.mark.parametrize("name", PARENTS)
def test_less_than_half_of_the_loss_of_svd_is_left(tmp_path, name):
    row = PARENTS[name]
    copying_model(row, steps=200).save_pretrained(tmp_path / "parent")
    source, parent = open_checkpoint(str(tmp_path / "parent")), load_model(tmp_path / "parent")
    test = copying_windows(64, seed=9)
    assert evaluate(parent, test)["perplexity"] < 12  # of 64 tokens: it has learned to copy
    kl = {}
    for what, recipe in (("svd", RECIPE.without_distillation), ("distilled", RECIPE)):
        windows, more = copying_windows(64, seed=2), copying_windows(STEPS * BATCH, seed=3)
        convert(source, tmp_path / what, recipe, windows, distill=distill_attentions, distill_windows=more)
        kl[what] = evaluate(load_model(tmp_path / what), test, parent=parent)["kl_to_parent_nats"]
    print(f"{name}: KL to the parent {kl['svd']:.3f} by svd, {kl['distilled']:.3f} distilled")
    assert kl["svd"] > 0.1
    assert kl["distilled"] < kl["svd"] / 2
