"""The CPU benchmark's run: rows, resumption, tables. Peers are left out here, and shapes are tiny."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama

from gqa.bench import machine
from gqa.bench.kernels import OURS, TORCH
from gqa.bench.problem import Problem
from gqa.record import read_record

PROBLEMS = [Problem(8, 2, 16, 63), Problem(8, 8, 16, 63, dtype="int8"), Problem(8, 2, 16, 64, 64, dtype="fp32")]


@pytest.fixture
def cpu(script, monkeypatch) -> Any:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "MATRIX_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(machine, "REPEATS", 1)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 14)
    module = script("cpu")
    monkeypatch.setattr(module, "headline", lambda: PROBLEMS)
    monkeypatch.setattr(module, "peers", lambda: (dict(TORCH), {"jax": "jax not installed"}))
    monkeypatch.setattr(module, "time_generation", lambda *_: None)
    monkeypatch.setattr("gqa.bench.document.commit", lambda: "0123456789ab")
    return module


def arguments(path, *more):
    return ["--out", str(path), "--repeats", "2", "--impl", "reference", *more]


def test_a_run_writes_a_record_and_prints_its_tables(cpu, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    cpu.main(arguments(path))
    printed = capsys.readouterr()
    record = read_record(path, "benchmark cpu")
    assert record.inputs["commit"] == "0123456789ab"
    assert record.results["absent"] == {"jax": "jax not installed"}
    rows = record.results["attention"]
    assert [row["contender"] for row in rows] == [OURS, *TORCH, OURS, *TORCH, "gqa in bf16", OURS, *TORCH]
    status = {(row["dtype"], row["contender"]): row["status"] for row in rows}
    assert status["bf16", "torch folded"] == "timed"
    assert status["int8", "torch folded"] == "unserved"
    assert status["int8", "gqa in bf16"] == "timed"
    assert "1/3 decode 8/2 D 16 S 63 batch 1 bf16: " in printed.err
    assert "jax is absent" in printed.err
    assert "Absent: jax, jax not installed." in printed.out
    lines = [line for line in printed.out.splitlines() if line.startswith("| 8/")]
    assert len(lines) == 3
    assert len({line.count("|") for line in lines[:2]}) == 1  # one table for decode


def test_a_stopped_run_goes_on(cpu, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    measured = []
    measure = cpu.measure

    def stops(problem, *args, **kwargs):
        if problem == PROBLEMS[1] and len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(problem)
        return measure(problem, *args, **kwargs)

    monkeypatch.setattr(cpu, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        cpu.main(arguments(path))
    first = read_record(path).results["attention"]
    assert measured == PROBLEMS[:1]
    measured.append(PROBLEMS[0])  # lets the second one pass now
    cpu.main(arguments(path, "--append"))
    assert measured[2:] == PROBLEMS[1:]
    rows = read_record(path).results["attention"]
    assert rows[: len(first)] == first
    assert [
        problem for problem in PROBLEMS if cpu.Run(path, "", {}, {}, {}, attention=list(rows)).has(problem)
    ] == PROBLEMS
    capsys.readouterr()


def test_rows_of_another_commit_are_not_mixed(cpu, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    cpu.main(arguments(path, "--only", "D 16 S 64"))
    assert len(read_record(path).results["attention"]) == len(TORCH) + 1
    monkeypatch.setattr("gqa.bench.document.commit", lambda: "ba9876543210")
    with pytest.raises(SystemExit, match="is of commit 0123456789ab"):
        cpu.main(arguments(path, "--append"))
    capsys.readouterr()


def test_generation_rows_are_measured_once(script, tmp_path, monkeypatch, capsys):
    module = script("cpu")
    built = []

    def small_model(config, dtype):
        built.append((config["num_hidden_layers"], dtype))
        return tiny_llama(dtype=dtype)

    monkeypatch.setattr(module, "random_model", small_model)
    run = module.Run(tmp_path / "cpu.json", "benchmark cpu", {"model": "llama-3.2-1b"}, {}, {})
    for _ in range(2):
        module.time_generation(run, (5, 20), ("fp32", "bf16"), layers=4, repeats=1)
    assert built == [(4, torch.float32), (4, torch.bfloat16)]
    rows = read_record(run.path).results["generation"]
    assert [(row["dtype"], row["context_tokens"]) for row in rows if row["contender"] == OURS] == [
        ("float32", 5), ("float32", 20), ("bfloat16", 5), ("bfloat16", 20)
    ]  # fmt: skip
    assert all(row["status"] == "timed" for row in rows)
    assert "fp32 20 transformers default: " in capsys.readouterr().err
    table = script("tables").table(script("tables")._generation_lines(rows))
    assert table.count("per token") == 8
    assert table.splitlines()[0] == "| model | context | gqa | transformers default | faster |"


def test_tables_of_wrong_and_slow_rows(script):
    tables = script("tables")
    base = dataclasses.asdict(PROBLEMS[0])
    figures = {"seconds_p50": 2e-3, "fraction_of_roofline": 0.9, "fraction_of_limit": 0.8, "times_of_gqa": 1.0}
    rows = [
        base | {"contender": OURS, "status": "timed"} | figures,
        base | {"contender": "slow", "status": "timed"} | figures | {"times_of_gqa": 123.4},
        base | {"contender": "wrong", "status": "wrong"},
        base | {"contender": "elsewhere", "status": "unserved"},
    ]
    head, rule, line = tables.table(tables.attention_lines(rows, tables._shares)).splitlines()
    assert head == "| heads | D | S | batch | dtype | gqa | of roofline | of limit | slow | wrong | elsewhere |"
    assert rule.count("---") == 11
    assert line == "| 8/2 | 16 | 63 | 1 | bf16 | 2 ms | 0.90 | 0.80 | 123x | wrong | - |"


def test_rows_cover_what_the_claims_name(script):
    rows = script("rows")
    headline = set(rows.headline())
    for heads in (64, 32):
        for tokens in (8192, 32768):
            for dtype in ("fp32", "bf16", "fp16", "int8"):
                assert Problem(heads, 8, 128, tokens, dtype=dtype) in headline
    assert {Problem(32, n, 128, 32768, dtype="bf16") for n in (32, 16, 8, 4, 2, 1)} <= headline
    for backward in (False, True):
        assert {
            Problem(32, 8, 128, 2048, 2048, dtype=d, backward=backward) for d in ("fp32", "bf16", "fp16")
        } <= headline
    full = rows.full(memory_bytes=1 << 50)
    assert len(full) == len(set(full))
    decode = {problem for problem in full if not problem.causal}
    assert len([problem for problem in decode if problem.query_heads == 71]) == 3 * 3 * 2 * 4
    smaller = rows.full(memory_bytes=8 << 30)
    assert headline <= set(smaller) < set(full)


def test_the_path_names_the_machine(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "describe_machine", lambda: {"processor": "ACME (R) CPU @ 2 GHz", "cores": 3})
    assert cpu.result_path(tmp_path) == tmp_path / "3-core-acme-r-cpu-2-ghz-cpu.json"


def test_the_record_is_json_without_surprises(cpu, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    cpu.main(arguments(path, "--only", "bf16"))
    document = json.loads(path.read_text())
    assert document["command"] == "benchmark cpu"
    assert {"fp32_flops_per_second", "sgemm_flops_per_second"} <= set(document["results"]["machine"])
    capsys.readouterr()
