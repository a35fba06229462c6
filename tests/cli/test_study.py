import json

import pytest
from helpers.small import small_parent
from helpers.study_record import study_record

from gqa.cli.main import main
from gqa.cli.study import parse_analyses, parse_stops, print_tables
from gqa.errors import GqaError
from gqa.record import read_record


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return small_parent(tmp_path_factory.mktemp("parent"))


def test_a_model_of_ones_own(parent, tmp_path, capsys):
    folder, corpus = parent
    out = tmp_path / "study"
    arguments = ("study", folder, "--text", corpus.train[0], "--out", out, "--kv-heads", "1", "--uptrain-tokens", "256")
    arguments += ("--distill-tokens", "1k")
    arguments += ("--window", "32")
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert read_record(out / "study.json").results["parent"]["train_tokens"] == 1536  # as its folder tells
    assert "What each setting saves" in printed.out
    assert "svd+distill" in printed.out
    assert str(out / "report.html") in printed.err
    assert (out / "report.html").stat().st_size < 1_000_000

    assert run(*arguments, "--json") == 0  # answered from the steps
    record = json.loads(capsys.readouterr().out)
    assert record["command"] == "study"
    assert record["results"] == json.loads(json.dumps(read_record(out / "study.json").results))

    assert run(*arguments[:-2], "--window", "16") == 2
    assert "another study" in capsys.readouterr().err


def test_a_dial_turned_as_far_as_a_budget_allows(parent, tmp_path, capsys):
    folder, corpus = parent
    out = tmp_path / "study"
    arguments = ("study", folder, "--text", corpus.train[0], "--out", out, "--window", "32", "--uptrain-tokens", "0")
    arguments += ("--distill-tokens", "1k")
    arguments += ("--kv-heads", "auto", "--budget", "400%", "--analyses", "none")
    assert run(*arguments, "--dry-run") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("estimate: at most ")
    assert "of memory" in printed.out
    assert not out.exists()
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert "The fewest KV heads within 400.0% of the parent's perplexity: 1." in printed.out
    assert "estimate: at most " in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--text", "corpus.txt", "--budget", "2%"), "--budget is for --kv-heads auto"),
        (("model", "--text", "corpus.txt", "--kv-heads", "auto", "--budget", "much"), "a share is not understood"),
        (("--text", "corpus.txt"), "--text needs a MODEL"),
        (("model",), "needs text"),
        (("model", "--text", "corpus.txt", "--kv-heads", "two"), "not a list of numbers"),
        (("model", "--text", "corpus.txt", "--uptrain-tokens", "few"), "token count"),
        (("model", "--text", "corpus.txt", "--analyses", "patterns,colours"), "no such analysis"),
    ],
)
def test_what_is_missing_is_said(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("study", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide(parent, tmp_path, capsys):
    folder, corpus = parent
    arguments = ("study", folder, "--text", corpus.train[0], "--out", tmp_path / "out", "--window", "32")
    assert run(*arguments, "--kv-heads", "3") == 2
    assert "3 KV heads do not divide 4 query heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear all")
    assert run("study", "--out", tmp_path) == 2
    assert "something else" in capsys.readouterr().err
    assert run("study", "--out", tmp_path / "letter.txt") == 2
    assert "not a folder" in capsys.readouterr().err


def test_a_cache_that_is_not_as_predicted_is_said(capsys):
    record = study_record()
    print_tables(record)
    assert "predicted = measured to the byte" in capsys.readouterr().out
    record.results["decode"][0]["cache_bytes_measured"] += 1
    print_tables(record)
    assert "NOT what was measured" in capsys.readouterr().out


def test_stops():
    assert parse_stops(None) == ()
    assert parse_stops("8, 4,1") == (8, 4, 1)
    with pytest.raises(GqaError):
        parse_stops("8;4")


def test_analyses():
    known = ("gradients", "patterns")
    assert parse_analyses("all", known) == known
    assert parse_analyses("none", known) == ()
    assert parse_analyses("patterns, gradients", known) == known
    assert parse_analyses("patterns", known) == ("patterns",)
    with pytest.raises(GqaError, match="no such analysis"):
        parse_analyses("patterns,none", known)
