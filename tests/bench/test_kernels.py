"""Rows of kernels: only right ones are timed, and a row's figures follow from its times."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa.bench import kernels
from gqa.bench.kernels import OURS, TORCH, Ready, figures, measure, measure_dial, of_torch, ours
from gqa.bench.machine import measure_limits
from gqa.bench.problem import Problem, random_inputs
from gqa.bench.timing import Seconds
from gqa.errors import GqaError


@pytest.fixture(scope="module")
def limits():
    found = measure_limits(read_bytes=1 << 16, matrix_shapes=((16, 16, 16),), repeats=1)
    return dataclasses.replace(found, machine=dataclasses.replace(found.machine, cache_bytes=1 << 16))


def wrong_heads(inputs):
    H, G = inputs.k.shape[1], inputs.q.shape[1] // inputs.k.shape[1]
    assert H > 1

    def repeated(q, k, v):
        return scaled_dot_product_attention(q, k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1))

    return of_torch(inputs, repeated)


def refuses(inputs):
    raise GqaError("not on Sundays", hint="wait")


def breaks(inputs):
    def run():
        raise RuntimeError("out of luck\nand more of it")

    return Ready(run)


def test_only_right_contenders_are_timed(limits):
    contenders = {OURS: ours("reference"), **TORCH, "wrong": wrong_heads, "refuses": refuses, "breaks": breaks}
    rows = {row["contender"]: row for row in measure(Problem(8, 2, 16, 63), contenders, limits, repeats=3)}
    assert list(rows) == list(contenders)
    for name in (OURS, *TORCH):
        assert rows[name]["status"] == "timed"
        assert 0 < rows[name]["seconds_p20"] <= rows[name]["seconds_p50"] <= rows[name]["seconds_p80"]
        assert 0 < rows[name]["error_max"] <= rows[name]["error_max_allowed"]
        assert rows[name]["times_of_gqa"] == rows[name]["seconds_p50"] / rows[OURS]["seconds_p50"]
        assert rows[name]["repeats"] == 3
        assert rows[name]["cold_caches"] is True
        assert rows[name]["limit_seconds"] <= rows[name]["roofline_seconds"]
    assert rows[OURS]["note"] == "reference"
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["error_max"] > rows["wrong"]["error_max_allowed"]
    assert (rows["refuses"]["status"], rows["refuses"]["reason"]) == ("unserved", "not on Sundays")
    assert (rows["breaks"]["status"], rows["breaks"]["reason"]) == ("failed", "RuntimeError: out of luck")
    for name in ("wrong", "refuses", "breaks"):
        assert not [field for field in rows[name] if field.startswith(("seconds", "fraction"))]


def test_every_row_tells_its_problem(limits):
    problem = Problem(8, 2, 16, 63, batch=2, dtype="int8")
    for row in measure(problem, {OURS: ours("reference"), **TORCH}, limits, repeats=1):
        assert {name: row[name] for name in dataclasses.asdict(problem)} == dataclasses.asdict(problem)
        assert (row["kv_bytes"], row["flops"]) == (problem.kv_bytes, problem.flops)
        assert row["status"] == ("timed" if row["contender"] == OURS else "unserved")


@pytest.mark.parametrize("backward", [False, True], ids=["prefill", "backward"])
def test_prefill_and_backward(limits, backward):
    problem = Problem(8, 2, 16, 63, 63, dtype="fp32", backward=backward)
    rows = {
        row["contender"]: row["status"]
        for row in measure(problem, {OURS: ours("reference"), **TORCH}, limits, repeats=1)
    }
    assert rows == {OURS: "timed", "torch enable_gqa": "timed", "torch folded": "unserved"}


def test_an_unknown_implementation_is_unserved(limits):
    (row,) = measure(Problem(8, 2, 16, 63), {OURS: ours("abacus")}, limits, repeats=1)
    assert (row["status"], row["reason"]) == ("unserved", "an unknown implementation")


def test_turns_go_round_the_copies(limits):
    seen = []

    def notes(inputs):
        ready = of_torch(inputs, lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True))

        def run():
            seen.append(inputs.k.data_ptr())
            return ready.run()

        return Ready(run)

    problem = Problem(8, 2, 16, 256, dtype="fp32")  # 64 KiB, the size of the cache: three copies exceed it twice
    measure(problem, {"notes": notes}, limits, repeats=4, budget_seconds=None)
    first, *calls = seen
    assert len(set(calls)) == 3
    assert calls[0] == first
    assert calls[3:] == calls[:-3]


def test_figures_follow_from_the_times():
    problem = Problem(8, 2, 16, 63)
    rates = {"read_bytes_per_second": 5.0, "roofline_seconds": 3.0, "limit_seconds": 2.0}
    row = figures(problem, Seconds(3.0, 4.0, 5.0, 7), rates, Seconds(1.0, 2.0, 3.0, 7))
    assert row == {
        "seconds_p20": 3.0,
        "seconds_p50": 4.0,
        "seconds_p80": 5.0,
        "repeats": 7,
        "fraction_of_roofline": 0.75,
        "fraction_of_limit": 0.5,
        "kv_bytes_per_second": problem.kv_bytes / 4,
        "flops_per_second": problem.flops / 4,
        "times_of_gqa": 2.0,
    }
    assert figures(problem, Seconds(3.0, 4.0, 5.0, 7), rates, None)["times_of_gqa"] is None


def test_the_dial_measures_every_stop(limits, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "measure", lambda problem, *_, **__: [{"kv_heads": problem.kv_heads}])
    rows = measure_dial(
        (Problem(8, kv_heads, 16, 63) for kv_heads in (8, 2, 1)),
        {},
        limits,
        progress=lambda stage, done, total, note="": seen.append((done, total, note)),
    )
    assert [row["kv_heads"] for row in rows] == [8, 2, 1]
    assert seen == [(1, 3, "8 KV heads"), (2, 3, "2 KV heads"), (3, 3, "1 KV heads")]


def test_ours_is_run_without_autograd():
    problem = Problem(8, 2, 16, 63, dtype="fp32")
    inputs = random_inputs(problem)
    (out,) = ours("reference")(inputs).run()
    assert out.is_inference()
    assert torch.isfinite(out).all()
