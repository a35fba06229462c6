"""What a conversion measures at its end, on text that no fit has seen, against transformers' own loss."""

import math

import numpy as np
import pytest
import torch
from helpers.architectures import ROWS, TOKENS, VOCAB, logits, tiny_model
from helpers.checkpoints import folder_hashes, random_windows, tiny_source
from transformers import AutoModelForCausalLM

from gqa.convert import memory
from gqa.convert.auto import candidates, convert_within
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint

FITTED, MEASURED = 4, 3
WINDOWS = np.random.default_rng(0).integers(3, VOCAB, (FITTED + MEASURED, TOKENS))
RECIPE = make_recipe(2, calibration_tokens=128, measure_tokens=96, window=32)
LOOSE, IMPOSSIBLE = 1e6, -0.9  # a random parent may be worse than its child


def loss_of(model):
    """Mean over windows, with transformers' logits."""
    out = logits(model, WINDOWS[FITTED:])[:, :-1].double()
    ids = torch.from_numpy(WINDOWS[FITTED:])[:, 1:]
    return float(torch.nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten()))


@pytest.mark.parametrize("method", ["mean", "svd"])
@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_that_of_the_whole_models(tmp_path, name, method):
    row = ROWS[name]
    parent = tiny_model(row, **row.multi_head)
    parent.save_pretrained(tmp_path / "parent")
    recipe = make_recipe(
        row.kv_heads,
        method,
        calibration_tokens=FITTED * TOKENS,
        measure_tokens=MEASURED * TOKENS,
        window=TOKENS,
    )
    measured = convert(open_checkpoint(str(tmp_path / "parent")), tmp_path / "child", recipe, WINDOWS)["measured"]
    child = AutoModelForCausalLM.from_pretrained(
        tmp_path / "child", dtype=row.dtype, attn_implementation=row.attention
    ).eval()
    assert measured["tokens"] == MEASURED * (TOKENS - 1)
    for model, name in ((parent, "perplexity_parent"), (child, "perplexity")):
        assert math.log(measured[name]) == pytest.approx(loss_of(model), abs=2e-5)
    assert measured["perplexity"] != measured["perplexity_parent"]
    difference = math.log(measured["perplexity"] / measured["perplexity_parent"])
    assert measured["loss_above_parent_nats"] == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "files"])
def test_measured_windows_have_no_part_in_the_fit(tmp_path, monkeypatch, streamed):
    if streamed:
        monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    source = tiny_source(tmp_path / "parent")
    windows = random_windows(RECIPE)
    assert windows is not None
    report = convert(source, tmp_path / "out", RECIPE, windows)
    without = make_recipe(2, calibration_tokens=128, window=32)
    convert(source, tmp_path / "without", without, windows)
    ours, theirs = (folder_hashes(tmp_path / name) for name in ("out", "without"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    windows[4:] = windows[:3]  # other windows to measure on: another loss, the same weights
    other = convert(source, tmp_path / "other", RECIPE, windows)
    assert folder_hashes(tmp_path / "other")["model.safetensors"] == ours["model.safetensors"]
    assert other["measured"] != report["measured"]


def test_pooling_is_the_same_with_and_without_a_comparison(tmp_path):
    source = tiny_source(tmp_path / "parent", dtype=torch.bfloat16)
    recipe = make_recipe(2, "mean", measure_tokens=96, window=32)
    report = convert(source, tmp_path / "out", recipe, random_windows(recipe))
    plain = convert(source, tmp_path / "plain", make_recipe(2, "mean"))
    assert report["measured"]["perplexity"] > 0
    assert plain["measured"] is None
    ours, theirs = (folder_hashes(tmp_path / name) for name in ("out", "plain"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert report["tensors_changed"] == plain["tensors_changed"]


def test_a_budget_that_is_missed_leaves_nothing(tmp_path):
    source = tiny_source(tmp_path / "parent")
    report = convert(source, tmp_path / "out", RECIPE, random_windows(RECIPE), budget=IMPOSSIBLE)
    assert not report["within_budget"]
    assert report["measured"]["perplexity"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
    assert convert(source, tmp_path / "out", RECIPE, random_windows(RECIPE), budget=LOOSE)["within_budget"]
    assert not convert(source, tmp_path / "out", RECIPE, random_windows(RECIPE), budget=IMPOSSIBLE)["within_budget"]


def test_a_budget_needs_something_to_measure_on(tmp_path):
    with pytest.raises(GqaError, match="a budget of loss is measured on text"):
        convert(tiny_source(tmp_path / "parent"), tmp_path / "out", make_recipe(2), budget=0.02)


def search(source, out, budget):
    windows = random_windows(RECIPE)
    assert windows is not None
    return convert_within(source, out, RECIPE, windows, budget, candidates(source, RECIPE))


def test_the_fewest_heads_within_the_budget(tmp_path):
    source = tiny_source(tmp_path / "parent")
    assert candidates(source, RECIPE) == [1, 2, 4]
    everything = search(source, tmp_path / "none", IMPOSSIBLE)
    assert not everything["within_budget"]
    assert [one["kv_heads"] for one in everything["tried"]] == [1, 2, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
    ratios = {one["kv_heads"]: one["perplexity"] / one["perplexity_parent"] - 1 for one in everything["tried"]}
    for stop in (1, 2, 4):
        fits = min(heads for heads, ratio in ratios.items() if ratio <= ratios[stop])
        report = search(source, tmp_path / f"out{stop}", ratios[stop] + 1e-12)
        assert report["kv_heads"] == fits
        assert report["within_budget"]
        assert [one["kv_heads"] for one in report["tried"]] == [heads for heads in (1, 2, 4) if heads < fits]
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "out1", "out2", "out4"}


def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    from gqa.convert import auto

    source, done = tiny_source(tmp_path / "parent"), []

    def stopped_at_the_third(source, out, recipe, *args, **kwargs):
        done.append(recipe.kv_heads)
        if len(done) == 3:
            raise KeyboardInterrupt
        return convert(source, out, recipe, *args, **kwargs)

    monkeypatch.setattr(auto, "convert", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        search(source, tmp_path / "out", IMPOSSIBLE)
    assert (tmp_path / "out.tried.json").exists()
    report = search(source, tmp_path / "out", IMPOSSIBLE)
    assert done == [1, 2, 4, 4]
    assert [one["kv_heads"] for one in report["tried"]] == [1, 2, 4]
    assert not (tmp_path / "out.tried.json").exists()


def test_a_class_that_knows_only_one_head_or_all(tmp_path):
    row = ROWS["gpt_bigcode"]
    tiny_model(row, **row.multi_head).save_pretrained(tmp_path / "parent")
    assert candidates(open_checkpoint(str(tmp_path / "parent")), RECIPE) == [1]


def test_a_model_with_a_single_head(tmp_path):
    from helpers.checkpoints import tiny_config

    source = tiny_source(tmp_path / "parent", tiny_config(num_key_value_heads=1))
    with pytest.raises(GqaError, match="a single KV head already"):
        candidates(source, RECIPE)
