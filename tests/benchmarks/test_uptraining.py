"""The benchmark of uptraining: rows on a minuscule parent, what follows from them, and going on after a stop."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from helpers.small import RECIPE, small_corpus, small_parent

from gqa.config import parse_config
from gqa.plan.training import training_flops_per_token
from gqa.record import read_record
from gqa.source import open_checkpoint
from gqa.text import load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def uptraining(script, monkeypatch, corpus):
    module = script("uptraining")
    monkeypatch.setattr(module, "PARENT", RECIPE)
    monkeypatch.setattr(module, "stdlib_corpus", lambda: corpus)
    monkeypatch.setattr("gqa.bench.document.commit", lambda: "0123456789ab")
    return module


def arguments(folder, *more: str) -> list[str]:
    chosen = "--parts curve --kv-heads 2 --methods svd+refine mean --alphas 0.5 0 --seeds 0 1 --windows 4"
    return [*chosen.split(), "--work", str(folder / "work"), "--out", str(folder / "record.json"), *more]


def test_rows_and_what_follows_from_them(uptraining, tmp_path, monkeypatch):
    monkeypatch.setattr(uptraining, "CLAIMED", 0.5)
    uptraining.main(arguments(tmp_path))
    results = read_record(tmp_path / "record.json", uptraining.COMMAND).results
    rows = {(r["kv_heads"], r["method"], r["seed"], r["alpha"]): r for r in results["uptraining"]}
    models = [(4, "control"), (2, "svd+refine"), (2, "mean")]
    expected = {(*model, seed, alpha) for model in models for seed in (0, 1) for alpha in (0.5, 0.0)}
    assert rows.keys() == expected | {(4, "control with teacher", seed, 0.5) for seed in (0, 1)}
    for (_, method, seed, alpha), row in rows.items():
        control = rows[4, "control", seed, alpha]
        apart = row["cross_entropy_nats_per_token"] - control["cross_entropy_nats_per_token"]
        assert row["times_control"] == pytest.approx(math.exp(apart), rel=1e-9)
        assert row["train_tokens"] == (0 if alpha == 0 else RECIPE.steps * RECIPE.batch * RECIPE.window // 2)
        assert (row["times_control"] == 1) == (method == "control")
    assert rows[4, "control", 0, 0.0]["perplexity"] == rows[4, "control", 1, 0.0]["perplexity"]
    assert rows[2, "mean", 0, 0.0]["perplexity"] == rows[2, "mean", 1, 0.0]["perplexity"]
    assert rows[2, "mean", 0, 0.5]["perplexity"] != rows[2, "mean", 1, 0.5]["perplexity"]
    (verdict,) = results["verdict"]
    times = [rows[2, "svd+refine", seed, 0.5]["times_control"] for seed in (0, 1)]
    assert verdict["times_control_by_seed"] == {"0": times[0], "1": times[1]}
    assert verdict["within"] == (sum(times) / 2 <= 1.01)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {
        "losses",
        "trained-parent",
        "kv2-mean-s0",
        "kv2-svd-refine-s0",
        "kv2-svd-refine-s1",
    }


def test_a_stopped_run_goes_on_to_the_same_rows(uptraining, tmp_path, monkeypatch):
    (tmp_path / "once").mkdir()
    uptraining.main(arguments(tmp_path / "once", "--methods", "mean"))
    real, calls = uptraining.uptrain, []

    def stopping(*given, **more):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(uptraining, "uptrain", stopping)
    with pytest.raises(KeyboardInterrupt):
        uptraining.main(arguments(tmp_path, "--methods", "mean"))
    uptraining.main(arguments(tmp_path, "--methods", "mean"))
    done = len(calls)
    uptraining.main(arguments(tmp_path, "--methods", "mean"))
    assert len(calls) == done

    def told(folder):
        rows = read_record(folder / "record.json").results["uptraining"]
        return [{name: value for name, value in row.items() if name != "uptrain_seconds"} for row in rows]

    assert told(tmp_path) == told(tmp_path / "once")


def test_a_record_of_another_parent_is_refused(uptraining, tmp_path, monkeypatch):
    uptraining.main(arguments(tmp_path, "--methods", "mean", "--alphas", "0"))
    monkeypatch.setattr(uptraining, "PARENT", dataclasses.replace(RECIPE, seed=1))
    with pytest.raises(SystemExit, match="parent"):
        uptraining.main(arguments(tmp_path, "--work", str(tmp_path / "other")))


def test_spread_is_over_seeds(uptraining):
    key = {"kv_heads": 2, "method": "mean", "alpha": 0.05}
    rows = [{**key, "seed": seed, "perplexity": p, "times_control": p / 4} for seed, p in enumerate((4.0, 5.0, 9.0))]
    (row,) = uptraining.spreads(rows)
    assert (row["perplexity_mean"], row["perplexity_low"], row["perplexity_high"]) == (6, 4, 9)
    assert row["perplexity_deviation"] == pytest.approx(math.sqrt(7))
    assert (row["seeds"], row["times_control_mean"]) == (3, 1.5)


def test_verdict_is_no_where_one_seed_or_the_mean_is_outside(uptraining):
    rows = [
        {"kv_heads": n, "method": "svd+refine", "alpha": 0.05, "seed": seed, "times_control": times}
        for n, of in ((2, (1.0, 1.02, 1.005)), (1, (1.03, 1.03, 1.03)))
        for seed, times in enumerate(of)
    ]
    taught = {"kv_heads": 8, "method": "control with teacher", "alpha": 0.05, "seed": 0, "perplexity": 80.0}
    two, one = uptraining.verdicts([{**row, "perplexity": 84.0} for row in rows] + [taught])
    assert two["times_taught_control_mean"] == pytest.approx(1.05)
    assert (two["within"], two["every_seed_within"], two["bound"]) == (True, False, 1.01)
    assert (one["within"], one["every_seed_within"], one["bound"]) == (False, False, 1.02)


def test_cost_has_every_stop_with_the_planners_flops(uptraining, tmp_path):
    uptraining.main(arguments(tmp_path, "--parts", "cost", "--repeats", "2"))
    rows = read_record(tmp_path / "record.json").results["cost"]
    assert [(row["kv_heads"], row["teacher"]) for row in rows] == [(n, t) for n in (4, 2, 1) for t in (False, True)]
    parent = tmp_path / "work" / "trained-parent"
    shape = parse_config(open_checkpoint(str(parent)).config, "parent")
    full = (training_flops_per_token(shape, 32) or 0) * 8 * 32
    for row in rows:
        own = (training_flops_per_token(shape.with_kv_heads(row["kv_heads"]), 32) or 0) * 8 * 32
        assert row["flops_per_step"] == pytest.approx(own + full / 3 * row["teacher"])
        assert 0 < row["seconds_per_step_p20"] <= row["seconds_per_step_p50"] <= row["seconds_per_step_p80"]
    assert rows[0]["core_seconds_per_step_predicted"] == pytest.approx(rows[0]["core_seconds_per_step_p50"])


TINY_STAGES = ((3, 48, 2, 2, 0.0), (3, 64, 2, 2, 0.5))


@pytest.fixture
def recalling(script, monkeypatch):
    module = script("uptraining_recall")
    tiny = module.RecallRecipe(
        hidden=32,
        layers=2,
        heads=4,
        head_dim=8,
        stages=tuple(module.Stage(*stage) for stage in TINY_STAGES),
        calibration_windows=4,
        calibration_window=32,
        lengths=(48, 64),
        depths=(0.0, 1.0),
        samples=2,
        position_windows=4,
    )
    monkeypatch.setattr(module, "RECALL", tiny)
    return module


def test_recall_of_parent_and_children(uptraining, recalling, tmp_path):
    uptraining.main(arguments(tmp_path, "--parts", "recall"))
    results = read_record(tmp_path / "record.json").results
    models = [(4, "parent"), *((n, method) for n in (2, 1) for method in recalling.METHODS)]
    cells = {(row["kv_heads"], row["method"], row["context_tokens"], row["depth"]) for row in results["recall"]}
    assert cells == {(*model, length, depth) for model in models for length in (48, 64) for depth in (0.0, 1.0)}
    assert len(results["recall"]) == len(cells)
    ranges = [row["context_to"] for row in results["positions"] if row["method"] == "parent"]
    assert ranges == [1, 3, 7, 15, 31, 63]
    assert all(row["loss_above_parent_nats"] == 0 for row in results["positions"] if row["method"] == "parent")
    assert results["recall_parent"]["train_tokens"] == 3 * 48 * 2 + 3 * 64 * 2
    before = (tmp_path / "record.json").read_text()
    uptraining.main(arguments(tmp_path, "--parts", "recall"))
    assert read_record(tmp_path / "record.json").results["recall"] == results["recall"]
    assert len(before) > 0


def test_every_loud_number_was_said_before(recalling, tmp_path):
    tokenizer = load_tokenizer(small_parent(tmp_path)[0])
    lessons = recalling.Lessons(tokenizer, np.arange(1, 300), 0)
    loud = 0
    for key in range(20):
        ids, weights = lessons.batch(key, 2, 160, 3, 0.3)
        again, _ = lessons.batch(key, 2, 160, 3, 0.3)
        assert ids.shape == weights.shape == (2, 160)
        assert (ids == again).all()
        for row, weight in zip(ids, weights, strict=True):
            places = np.flatnonzero(weight == recalling.LOUD)
            for start in (p for p in places if weight[p - 1] != recalling.LOUD):
                end = start
                while end < len(row) and weight[end] == recalling.LOUD:
                    end += 1
                said = str(tokenizer.decode(row[:start]))
                name = said.rpartition("\n")[2]
                assert f"\n{name}{tokenizer.decode(row[start:end])}" in said
                loud += 1
    assert loud > 40


def test_a_stopped_training_of_the_recalling_parent_ends_with_the_same_weights(recalling, tmp_path):
    tokenizer = load_tokenizer(small_parent(tmp_path)[0])
    lessons = recalling.Lessons(tokenizer, np.arange(1, 300), 0)
    recipe = recalling.RECALL

    def train(folder):
        return recalling.train(recipe, lessons, len(tokenizer), folder)[0].state_dict()

    whole = train(tmp_path / "whole")
    recalling.SAVE_EVERY = 4
    try:
        train(tmp_path / "half")
        resumed = train(tmp_path / "half")  # from its checkpoint at step 4
    finally:
        recalling.SAVE_EVERY = 50
    assert (tmp_path / "half" / "state.pt").exists()
    assert all((whole[name] == resumed[name]).all() for name in whole)
