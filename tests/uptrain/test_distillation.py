"""`gqa convert --distill`: what the training does to a child, and what a kill or a bad number leaves."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.checkpoints import VOCAB, folder_hashes, tiny_config, tiny_source

from gqa.convert.job import plan_conversion
from gqa.convert.memory import distill_bytes, recomputes_activations
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError, TrainingError
from gqa.evaluate import evaluate, load_model
from gqa.uptrain import distill_attentions
from gqa.uptrain.loop import Loop

WINDOWS, WINDOW = 64, 24


RECIPE = make_recipe(
    2,
    calibration_tokens=16 * WINDOW,
    window=WINDOW,
    measure_tokens=8 * WINDOW,
    distill_tokens=WINDOWS * WINDOW,
    distill_window=WINDOW,
    distill_learning_rate=3e-3,
)


@pytest.fixture
def source(tmp_path):
    return tiny_source(tmp_path / "parent")


def run(source, out, recipe=RECIPE, seed=0, **how):
    random = np.random.default_rng(seed)
    windows = random.integers(3, VOCAB, (recipe.all_windows, WINDOW)) if recipe.all_windows else None
    distill = random.integers(3, VOCAB, (recipe.distill_windows, WINDOW))
    return convert(source, out, recipe, windows, distill=distill_attentions, distill_windows=distill, **how)


@pytest.mark.parametrize("method", ["svd", "mean"])
def test_the_child_comes_nearer_to_its_parent(source, tmp_path, method):
    distillation = {"distill_tokens": 4 * RECIPE.distill_tokens, "distill_learning_rate": 1e-2}
    recipe = dataclasses.replace(RECIPE, **distillation)
    if method == "mean":
        recipe = make_recipe(2, "mean", window=WINDOW, distill_window=WINDOW, **distillation)
    report = run(source, tmp_path / "out", recipe)
    converted = run(source, tmp_path / "converted", recipe.without_distillation)
    test = np.random.default_rng(9).integers(3, VOCAB, (32, WINDOW))
    parent = load_model(tmp_path / "parent")
    kl = {
        name: evaluate(load_model(tmp_path / name), test, parent=parent)["kl_to_parent_nats"]
        for name in ("out", "converted")
    }
    print(kl)
    assert kl["out"] < 0.8 * kl["converted"]
    assert report["distillation"]["steps"] == 4 * WINDOWS // RECIPE.distill_batch
    if recipe.measure_tokens:
        assert report["measured_before_distillation"] == converted["measured"]
        assert report["measured"]["perplexity"] != converted["measured"]["perplexity"]
        for layer, plain in zip(report["layers"], converted["layers"], strict=True):
            assert layer["hidden_error_before_distillation"] == plain["hidden_error"]
            assert 0 < layer["hidden_error"] != plain["hidden_error"]


def test_nothing_but_the_attentions_changes(source, tmp_path):
    from gqa.weights.reader import Checkpoint

    run(source, tmp_path / "out")
    parent, child = Checkpoint(tmp_path / "parent"), Checkpoint(tmp_path / "out")
    assert parent.names == child.names
    for name in parent.names:
        same = parent.shape(name) == child.shape(name) and torch.equal(parent.read(name), child.read(name))
        assert same != ("self_attn" in name), name


def test_the_same_call_again_returns_the_report_of_the_first(source, tmp_path):
    first = run(source, tmp_path / "out")
    again = run(source, tmp_path / "out")
    assert again["already_done"]
    assert again["distillation"] == first["distillation"]
    with pytest.raises(GqaError, match="not this conversion"):
        run(source, tmp_path / "out", seed=1)


def test_stopped_in_training_it_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole" / "out")
    step = Loop._step

    def stop(self, number, rate):
        if number == 9:
            raise KeyboardInterrupt
        return step(self, number, rate)

    monkeypatch.setattr(Loop, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Loop, "_step", step)
    done = []
    run(source, tmp_path / "out", progress=lambda stage, at, of, said="": done.append((stage, at)))
    assert min(at for stage, at in done if stage == "distill") > 1
    assert not any(stage == "convert layers" for stage, _ in done)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole" / "out")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(source, tmp_path, monkeypatch):
    step = Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self, n, rate: (float("nan"), 0.1) if n == 9 else step(self, n, rate))
    with pytest.raises(TrainingError, match="step 10 is not finite") as caught:
        run(source, tmp_path / "out")
    assert "training/checkpoint-6" in str(caught.value)
    kept = list((tmp_path / "out.partial" / "training").glob("checkpoint-*"))
    assert kept
    assert not (tmp_path / "out").exists()


def test_bf16_products_and_a_bf16_parent(tmp_path):
    config = tiny_config(dtype="bfloat16")
    source = tiny_source(tmp_path / "parent", config, dtype=torch.bfloat16)
    report = run(source, tmp_path / "out", dataclasses.replace(RECIPE, distill_precision="bf16"))
    assert (
        report["measured"]["loss_above_parent_nats"] < report["measured_before_distillation"]["loss_above_parent_nats"]
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2


def test_windows_of_another_size_are_refused(source, tmp_path):
    with pytest.raises(GqaError, match="do not match the recipe"):
        convert(
            source,
            tmp_path / "out",
            dataclasses.replace(RECIPE, calibration_tokens=0, measure_tokens=0, refit=False),
            distill=distill_attentions,
            distill_windows=np.zeros((4, WINDOW), np.int64),
        )


def test_fewer_tokens_than_a_step_are_refused():
    with pytest.raises(GqaError, match="fewer tokens than one step"):
        make_recipe(2, distill_tokens=100)


def test_activations_are_made_again_where_memory_is_short(source, tmp_path, monkeypatch):
    job = plan_conversion(source, RECIPE)
    most, least = distill_bytes(job), distill_bytes(job, recompute=True)
    assert least < most
    assert not recomputes_activations(job, 2**40)
    assert recomputes_activations(job, most)  # without room for the libraries
    plain = run(source, tmp_path / "plain")
    monkeypatch.setattr("gqa.convert.run.recomputes_activations", lambda *_: True)
    again = run(source, tmp_path / "again")
    assert again["distillation"]["final_kl_to_parent_nats"] == pytest.approx(
        plain["distillation"]["final_kl_to_parent_nats"], rel=1e-3
    )
