import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers.small import small_parent

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.record import read_record
from gqa.report.page import render
from gqa.source import open_checkpoint
from gqa.study.corpus import from_corpus, from_files
from gqa.study.pipeline import run
from gqa.study.settings import ANALYSES, METHODS, Settings

SETTINGS = Settings(
    calibration_windows=16,
    test_windows=8,
    uptrain_tokens=8 * 32,
    contexts=(16, 64),
    distill_tokens=1024,
    decode_repeats=3,
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder, corpus = small_parent(tmp_path_factory.mktemp("parent"))
    return open_checkpoint(str(folder)), from_corpus(corpus, folder, window=32), folder, corpus


@pytest.fixture(scope="module")
def study(parent, tmp_path_factory):
    source, text, _, _ = parent
    out = tmp_path_factory.mktemp("study") / "out"
    return run(source, text, out, SETTINGS, training={"train_tokens": 1536}), out


def test_every_setting_has_every_row(study):
    record, _ = study
    results = record.results
    assert [row["kv_heads"] for row in results["settings"]] == [4, 2, 1]
    rows = {(row["kv_heads"], row["method"], row["stage"]) for row in results["quality"]}
    wanted = {(heads, method, stage) for heads in (2, 1) for method in METHODS for stage in ("converted", "uptrained")}
    assert rows == wanted | {(4, "parent", "converted")}
    assert results["control"]["train_tokens"] == 256
    assert {row["kv_heads"] for row in results["layers"]} == {2, 1}
    assert all(
        row["share_of_mean_loss"] == 1
        for row in results["quality"]
        if row["method"] == "mean" and row["stage"] == "converted"
    )


def test_the_cache_measured_is_the_cache_predicted(study):
    record, _ = study
    assert len(record.results["decode"]) == 3 * 2
    for row in record.results["decode"]:
        assert row["cache_bytes_measured"] == row["cache_bytes_predicted"]
    for row in record.results["settings"]:
        assert row["kv_bytes_per_token_measured"] == row["kv_bytes_per_token"]
        # 2 layers, K and V, head dim 8, fp32
        assert row["kv_bytes_per_token"] == 2 * 2 * row["kv_heads"] * 8 * 4


def test_the_record_is_on_disk_and_makes_the_page(study):
    record, out = study
    assert read_record(out / "study.json", "study").results == json.loads(record.to_json())["results"]
    assert "<html" in render(record)


def test_only_the_best_models_are_kept(study):
    _, out = study
    kept = sorted(path.name for path in (out / "models").iterdir())
    assert kept == [
        "control",
        "kv1-svd-distill",
        "kv1-svd-distill-uptrained",
        "kv2-svd-distill",
        "kv2-svd-distill-uptrained",
    ]
    config = json.loads((out / "models" / "kv1-svd-distill-uptrained" / "config.json").read_text())
    assert parse_config(config, "child").kv_heads == 1


def test_a_finished_study_answers_from_its_steps(study, parent):
    record, out = study
    source, text, _, _ = parent
    again = run(source, text, out, SETTINGS, training={"train_tokens": 1536})
    assert again.results == record.results


def test_what_heads_look_at_is_in_the_record(study):
    results = study[0].results
    models = {("parent", 4), ("random", 4), ("child", 2), ("child", 1)}
    assert {(row["weights"], row["kv_heads"]) for row in results["attention_heads"]} == models
    assert {(row["weights"], row["kv_heads"]) for row in results["attention_maps"]} == models
    tokens = len(results["attention_text"]["tokens"])
    assert all(len(one) == tokens * (tokens + 1) / 2 for row in results["attention_maps"] for one in row["maps"])
    groups = {
        (row["kv_heads"], row["layer"]): row["groups"] for row in results["layers"] if row["method"] == "svd+distill"
    }
    for row in results["attention_heads"]:
        if row["weights"] == "child":
            assert row["parent_heads"] == [head for group in groups[row["kv_heads"], row["layer"]] for head in group]
    assert set(results["attention_alike"][0]) <= {*record_basis(study[0]), "weights", "kv_heads", "layer", "grouping"}


def record_basis(record):
    return {name for name, of in record.basis.items() if of == "measured"}


def test_analyses_are_chosen_and_may_be_added_later(study, parent):
    record, out = study
    source, text, _, _ = parent
    chosen = {
        names: run(source, text, out, dataclasses.replace(SETTINGS, analyses=names), training={"train_tokens": 1536})
        for names in ((), ("patterns",), ANALYSES)
    }
    assert not [name for name in chosen[()].results if name.startswith(("attention", "gradient"))]
    assert [name for name in chosen["patterns",].results if name.startswith("gradient")] == []
    assert "What heads look at" in " ".join(chosen["patterns",].assumptions)
    assert "Growth of gradients" not in " ".join(chosen["patterns",].assumptions)
    assert "<html" in render(chosen[()])
    assert chosen[ANALYSES].results == record.results


def test_another_study_in_the_folder_is_refused(study, parent):
    _, out = study
    source, text, _, _ = parent
    with pytest.raises(GqaError, match="another study"):
        run(source, text, out, dataclasses.replace(SETTINGS, test_windows=4))


def test_a_folder_of_something_else_is_refused(parent, tmp_path):
    source, text, _, _ = parent
    (tmp_path / "letter.txt").write_text("dear all")
    with pytest.raises(GqaError, match="something else"):
        run(source, text, tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("stops", [(3,), (4,), (8,)])
def test_stops_that_are_not_on_the_dial(parent, tmp_path, stops):
    source, text, _, _ = parent
    with pytest.raises(GqaError):
        run(source, text, tmp_path / "out", dataclasses.replace(SETTINGS, kv_heads=stops))
    assert not (tmp_path / "out").exists()


def test_a_study_killed_at_random_moments_ends_with_the_same_quality(study, parent, tmp_path):
    record, _ = study
    _, _, folder, corpus = parent
    out = tmp_path / "out"
    parts = [[str(path) for path in part] for part in dataclasses.astuple(corpus)]
    code = f"""
import torch; torch.set_num_threads(1)
from pathlib import Path
from gqa.source import open_checkpoint
from gqa.study.corpus import from_corpus
from gqa.study.embedded import Corpus
from gqa.study.pipeline import run
from gqa.study.settings import Settings
corpus = Corpus(*[tuple(Path(p) for p in part) for part in {parts}])
run(open_checkpoint({str(folder)!r}), from_corpus(corpus, Path({str(folder)!r}), window=32), Path({str(out)!r}),
    Settings(**{dataclasses.asdict(SETTINGS)!r}), training={{"train_tokens": 1536}})
"""
    draw = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
        time.sleep(6 + 5 * draw.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    resumed = read_record(out / "study.json", "study")
    for a, b in zip(resumed.results["quality"], record.results["quality"], strict=True):
        assert a["cross_entropy_nats_per_token"] == pytest.approx(b["cross_entropy_nats_per_token"], abs=1e-3)


def test_a_users_text_is_split_without_overlap(parent, tmp_path):
    _, _, folder, _ = parent
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i} says {i * i}" for i in range(2000)))
    text = from_files([path], folder, window=32)
    rows = [tuple(window) for part in (text.train, text.calibration, text.test) for window in part]
    assert len(text.test) == len(text.calibration) == len(rows) // 10
    assert len(set(rows)) == len(rows)


def test_a_users_text_that_is_too_short(parent, tmp_path):
    _, _, folder, _ = parent
    path = tmp_path / "text.txt"
    path.write_text("a few words " * 20)
    with pytest.raises(GqaError, match="too short for a study"):
        from_files([path], folder, window=32)
