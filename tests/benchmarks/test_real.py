"""The proof on a real model, on a minuscule one: every step, a stop in the middle, the texts, the record."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.small import small_parent

from gqa.errors import GqaError
from gqa.record import read_record

TEMPLATE = "{% for turn in messages %}<|endoftext|>Q {{ turn['content'] }}\nA{% endfor %}"
PAGE = """<html><head><title>no</title><meta name="package" content="Book-1-{language}"/></head><body>
<div id="banner">no</div><p id="title">no</p><ul class="docnav top"><li>no</li></ul>
<div><h2>{number}. A <code>page</code></h2><div class="para">
    def f{number}(x):   return x
    + {number} &amp; more<br/>of it</div>
<pre>a   b
c</pre></div><ul class="docnav"><li><a href="x">no</a></li></ul></body></html>"""
LINE = "def f{i}(x):\n    return x + {j}\n"


@pytest.fixture
def real(script):
    sys.path.insert(0, str(script("session").RESULTS.parent / "quality"))
    yield script("real")
    sys.path.pop(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A parent with a chat template, pages of a book in two languages, questions."""
    folder = tmp_path_factory.mktemp("real")
    trained, corpus = small_parent(folder)
    parent = shutil.copytree(trained, folder / "chatty")
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    (parent / "chat_template.jinja").write_text(TEMPLATE)
    for language in ("en-US", "fr-FR"):
        (folder / "html" / language).mkdir(parents=True)
        for number in range(10):
            lines = "".join(LINE.format(i=i, j=(i * 7 + number) % 13) for i in range(40))
            page = PAGE.replace("{number}", str(number)).replace("{language}", language)
            (folder / "html" / language / f"page{number}.html").write_text(page.replace("a   b", lines))
        (folder / "html" / language / "index.html").write_text(PAGE)
    (folder / "questions.jsonl").write_text(
        '{"prompt": "def f1(x):", "answer": "return"}\n{"prompt": "1 +", "answer": "2"}\n'
    )
    return folder, corpus


@pytest.fixture
def run(real, place, monkeypatch, tmp_path):
    """run(*more): the whole script with sizes that take seconds, in this test's folder."""
    folder, corpus = place
    monkeypatch.setenv("GQA_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys.modules["real_texts"], "stdlib_corpus", lambda: corpus)
    monkeypatch.setattr(sys.modules["real_measures"], "RECALLED", 0.0)
    monkeypatch.setattr("gqa.bench.document.commit", lambda: "0123456789ab")
    asked = (
        "--kv-heads 2 --window 32 --batch 2 --calibrate 128 --refine 128 --refine-steps 2 --distill 128,256,512"
        " --windows 32:3 --recall 64:1 --prompts 2 --answer-tokens 4 --diagnosis-windows 2"
    )
    monkeypatch.setattr(sys.modules["real_models"], "run", in_this_process(sys.modules["real_models"].run))
    given = ["--model", str(folder / "chatty"), "--handbook", str(folder / "html"), *asked.split()]
    given += ["--questions", str(folder / "questions.jsonl"), "--manifest", str(tmp_path / "texts.json")]
    given += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "record.json")]
    return lambda *more: real.main([*given, *more])


def in_this_process(real_run):
    """The making of models without a new Python for each, which takes seconds; one of them still is a process."""
    import time

    import real_make  # type: ignore[import-not-found]  # beside real.py

    def run(command):
        job = Path(command[-1])
        if job.name.startswith("procrustes"):
            return real_run(command)
        began = time.perf_counter()
        real_make.make(job)
        return time.perf_counter() - began, 1 << 30

    return run


def test_text_of_a_page_is_its_blocks_without_navigation(real):
    text = sys.modules["real_texts"].page_text(PAGE.replace("{number}", "7"))
    assert text == "7. A page\n\ndef f7(x): return x + 7 & more\nof it\n\na   b\nc"


def test_the_split_never_shares_a_page(real):
    split = sys.modules["real_texts"].split_pages
    names = [f"page{number:03}.html" for number in range(127)]
    calibration, test = split(names)
    assert not set(calibration) & set(test)
    assert sorted(calibration + test) == names
    assert len(test) == 38


def test_french_pages_are_translations_of_test_pages_only(real, place, run, tmp_path):
    run("--steps", "texts")
    about = json.loads((tmp_path / "texts.json").read_text())
    assert not set(about["prose-calibration"]["pages"]) & set(about["prose-test"]["pages"])
    assert about["french-test"]["pages"] == about["prose-test"]["pages"]
    assert "index.html" not in about["prose-calibration"]["pages"]
    assert about["prose-test"]["edition"] == "Book-1-en-US"


def test_texts_that_are_not_those_of_the_manifest_are_refused(run, tmp_path):
    run("--steps", "texts")
    path = tmp_path / "texts.json"
    about = json.loads(path.read_text())
    about["code-test"]["sha256"] = "0" * 64
    path.write_text(json.dumps(about))
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(SystemExit, match="not those of the manifest"):
        run("--steps", "texts")


def test_every_step_is_run_once_and_the_record_has_all(real, run, tmp_path, monkeypatch, capsys):
    stopped, quality = [], real.quality

    def stopping(*given):
        stopped.append(given)
        if len(stopped) == 3:
            raise KeyboardInterrupt
        return quality(*given)

    monkeypatch.setattr(real, "quality", stopping)
    with pytest.raises(KeyboardInterrupt):
        run()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work" / "steps").iterdir()}
    run("--record")
    assert any(name.startswith("quality-") for name in read_record(tmp_path / "record.json").results["missing"])
    run()
    assert all((tmp_path / "work" / "steps" / name).stat().st_mtime_ns == at for name, at in done.items())
    check(read_record(tmp_path / "record.json", "benchmark quality on a real model"), str(tmp_path))
    monkeypatch.setattr(real, "quality", lambda *given: pytest.fail("a finished step ran again"))
    run()
    run("--list")
    assert "not finished" not in capsys.readouterr().out


def check(record, folder: str) -> None:
    results = record.results
    names = [row["name"] for row in results["models"]]
    sizes = ("128", "256", "512")
    trained = [f"{what}-{size}" for size in sizes for what in ("control", "distilled", "distilled-half-own")]
    assert names == ["parent", "mean", "procrustes", "svd", "svd-refined-128", *trained]
    assert results["missing"] == []
    cells = {(row["name"], row["kind"], row["window"]) for row in results["quality"]}
    assert cells == {(n, k, w) for n in names for k in ("prose", "code", "french", "dialogue") for w in (32,)}
    for row in results["quality"]:
        if row["name"] == "parent":
            assert (row["loss_above_parent_nats"], row["top1_agreement"]) == (0, 1)
        else:
            assert row["kl_to_parent_nats"] > 0
    for row in results["models"][1:]:
        assert row["seconds"] > 0
        assert row["peak_rss_bytes"] > 100 << 20
        assert row["control"] or row["peak_memory_bytes_estimate"] > 0
    assert {row["prompts_from"] for row in results["answers"]} == {"own", "questions"}
    assert len(results["answers"]) == 2 * (len(names) - 1)
    assert {row["name"] for row in results["recall"]} == set(names)
    assert {row["series"] for row in results["curve"]} == {"control", "prose", "half prose, half the parent's own text"}
    kl = [row for row in results["trends"] if row["figure"] == "kl_to_parent_nats"]
    assert len(kl) == 2 * 4
    assert all(row["b_low"] <= row["b"] <= row["b_high"] and row["rows"] == 3 for row in kl)
    layers = results["diagnosis"]["rows"]
    assert [row["layer"] for row in layers] == [0, 1]
    assert all(row["keys_error_p50"] > 0 and row["values_error_of_squares"] > 0 for row in layers)
    assert any(row["metric"] == "perplexity" for row in results["published"])
    assert folder not in json.dumps(results)


def test_a_step_without_what_it_needs_is_refused(run):
    with pytest.raises(SystemExit, match="needs steps that are not finished"):
        run("--steps", "quality-prose-*")
    with pytest.raises(SystemExit, match="no step has such a name"):
        run("--steps", "quantity")


def test_a_working_folder_of_another_parent_is_refused(run):
    run("--steps", "texts")
    with pytest.raises(SystemExit, match="another proof on a real model"):
        run("--steps", "texts", "--kv-heads", "1")


@pytest.mark.parametrize("text", ["256", "256:x", "256:0", "a:1"])
def test_counts_that_are_not_understood(real, text):
    with pytest.raises(GqaError):
        real.counts(text)
    assert real.counts("256:32,8k:2") == {256: 32, 8192: 2}


def test_shared_heads_with_every_group_of_one_are_the_parents(real, place):
    """One KV head per group: svd only changes the basis, and the attention computes the same."""
    import torch

    from gqa.config import parse_config
    from gqa.convert import heads
    from gqa.source import open_checkpoint
    from gqa.weights.layout import load_layout
    from gqa.weights.reader import Checkpoint

    folder = place[0] / "chatty"
    config = open_checkpoint(str(folder)).config
    shape, layout = parse_config(config, "parent"), load_layout("llama", config)
    own = heads.split(layout.read_attention(Checkpoint(folder), 0), shape.layers[0], layout)
    moment = torch.eye(own.k.shape[-1], dtype=torch.float64)
    for name, one in sys.modules["real_diagnosis"].shared_heads(own, moment, len(own.k)).items():
        scores, wanted = (torch.einsum("hgde,hdf->hgef", x.q, x.k) for x in (one, own))
        paths, straight = (torch.einsum("hgcd,hde->hgce", x.o, x.v) for x in (one, own))
        assert torch.allclose(paths, straight), name
        if name != "keys":  # a phase per rotary pair is no identity of q^T k, only of the turned scores at one place
            continue
        assert torch.allclose(scores, wanted), name
