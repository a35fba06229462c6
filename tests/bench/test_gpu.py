"""Timing on a GPU: what is counted, on a fake one whose time is known, and on a real one where there is one."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_cuda import FakeCuda, gpu_limits

from gqa.bench import gpu
from gqa.bench.check import answer
from gqa.bench.gpu import (
    calls_per_graph,
    captured,
    copy_probes,
    datasheet,
    event_clock,
    matrix_probes,
    measure_gpu,
    read_probes,
)
from gqa.bench.kernels import OURS, Ready, measure, ours, torch_enable_gqa
from gqa.bench.problem import Problem, random_inputs

DECODE = Problem(8, 2, 16, 63, dtype="fp32")
PREFILL = Problem(8, 2, 16, 63, 63, dtype="fp32")
BACKWARD = Problem(8, 2, 16, 63, 63, dtype="fp32", backward=True)

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_only_the_run_is_timed(cuda):
    seconds = event_clock(lambda: cuda.work(2.5, "run"), lambda: cuda.work(100, "filler"))
    assert seconds == 2.5
    assert cuda.log == ["filler", "event", "run", "event", "wait"]


def test_a_graph_goes_round_the_copies(cuda):
    def run(number):
        cuda.work(10.0**number, f"run {number}")
        return number

    turn = captured([lambda: run(0), lambda: run(1), lambda: run(2)], 6)
    assert cuda.log == ["run 0", "run 1", "run 2"]  # before the capture, each once
    cuda.log.clear()
    before = cuda.now
    turn.run(7)
    assert cuda.log == ["replay"]
    assert (cuda.now - before, turn.calls) == (222, 6)
    assert turn.found is not None
    assert turn.found() == 2  # the last call's result


@pytest.mark.parametrize(
    ("kv_bytes", "copies", "calls"),
    [
        (4 << 30, 1, 1),
        (256 << 20, 1, 4),
        (128 << 20, 1, 8),
        (32 << 20, 4, 16),
        (1 << 20, 5, 15),  # whole rounds
        (256 << 10, 481, 481),  # one round at least
    ],
)
def test_a_graph_reads_about_a_gibibyte(kv_bytes, copies, calls):
    assert calls_per_graph(kv_bytes, copies) == calls


def test_a_decode_row_tells_the_time_of_one_call(cuda):
    seconds = 2e-8
    contenders = {
        OURS: cuda.contender(ours("reference"), seconds),
        "slow": cuda.contender(torch_enable_gqa, 3 * seconds),
    }
    rows = {row["contender"]: row for row in measure(DECODE, contenders, gpu_limits(cuda), repeats=3)}
    row = rows[OURS]
    assert row["status"] == "timed"
    assert row["device"] == "cuda"
    assert row["seconds_p50"] == pytest.approx(seconds)
    assert row["kv_bytes_per_second"] == pytest.approx(DECODE.kv_bytes / seconds)
    assert row["fraction_of_copy"] == pytest.approx(DECODE.kv_bytes / seconds / 4e12)
    assert row["fraction_of_datasheet"] == pytest.approx(DECODE.kv_bytes / seconds / 4.8e12)
    assert row["fraction_of_limit"] == pytest.approx(row["fraction_of_copy"])  # more than a reduction's rate
    assert rows["slow"]["times_of_gqa"] == pytest.approx(3)
    assert row["cold_caches"] is True
    assert 0 < row["error_max"] <= row["error_max_allowed"]
    assert not {"fraction_of_matrix", "fraction_of_roofline"} & set(row)
    assert "replay" in cuda.log


def test_a_prompt_is_called_and_held_against_the_matrix_rate(cuda):
    seconds = 1e-6
    contenders = {OURS: cuda.contender(ours("reference"), seconds)}
    (row,) = measure(PREFILL, contenders, gpu_limits(cuda), repeats=3)
    assert row["seconds_p50"] == pytest.approx(seconds)
    assert row["flops_per_second"] == pytest.approx(PREFILL.flops / seconds)
    assert row["fraction_of_matrix"] == pytest.approx(PREFILL.flops / seconds / 5e14)
    assert not {"fraction_of_copy", "backward_peak_bytes"} & set(row)
    assert "replay" not in cuda.log


@pytest.mark.parametrize("problem", [BACKWARD, dataclasses.replace(DECODE, backward=True)], ids=["prompt", "token"])
def test_a_backward_pass_tells_its_memory(cuda, problem):
    (row,) = measure(problem, {OURS: cuda.contender(ours("reference"), 1)}, gpu_limits(cuda), repeats=1)
    gradients = 16 * 4 * (8 * problem.query_tokens + (2 + 2) * 63)
    assert "replay" not in cuda.log
    assert row["backward_peak_bytes"] == 500_000
    assert row["backward_extra_bytes"] == 500_000 - gradients
    assert "reset" in cuda.log


def test_what_a_graph_computes_is_checked_too(cuda):
    def forgets(inputs):  # right when called, wrong when captured
        ready = ours("reference")(inputs)
        return Ready(lambda: tuple(x * 0 for x in ready.run()) if cuda.graph else ready.run())

    def refuses(inputs):
        ready = ours("reference")(inputs)

        def run():
            if cuda.graph:
                cuda.graph = None
                raise RuntimeError("operation not permitted when stream is capturing")
            return ready.run()

        return Ready(run)

    wrong, failed = measure(DECODE, {"wrong": forgets, "failed": refuses}, gpu_limits(cuda), repeats=1)
    assert (wrong["status"], failed["status"]) == ("wrong", "failed")
    assert wrong["error_max"] > wrong["error_max_allowed"]
    assert failed["reason"] == "RuntimeError: operation not permitted when stream is capturing"
    assert not [name for row in (wrong, failed) for name in row if name.startswith(("seconds", "fraction"))]


def test_a_kernel_that_does_not_compile_is_no_end(cuda):
    errors = pytest.importorskip("triton.errors")

    def breaks(inputs):
        raise errors.TritonError("out of resource: shared memory")

    (row,) = measure(DECODE, {"breaks": breaks}, gpu_limits(cuda), repeats=1)
    assert (row["status"], row["reason"]) == ("failed", "TritonError: out of resource: shared memory")


@pytest.mark.parametrize("count", [8192, 10000])
def test_probes_count_what_they_move(count):
    numbers, elsewhere = torch.ones(count), torch.zeros(count)
    found = {probe.name: (probe.run(), probe.amount) for probe in read_probes(numbers)}
    assert found["sum of fp32"] == (count, count * 4)
    assert found["max of fp32"] == (1, count * 4)
    assert found["dot of fp32"] == (count // 2, count * 4)
    sums, amount = found["sums of 4096 fp32"]
    assert sums.tolist() == [4096, 4096]
    assert amount == 8192 * 4
    for probe in copy_probes(numbers, elsewhere):
        elsewhere.zero_()
        probe.run()
        assert elsewhere.abs().sum() == count
        assert probe.amount == count * 8


def test_matrix_probes_multiply():
    before = torch.get_float32_matmul_precision()
    probes = matrix_probes(torch.float32, (8,), "cpu")
    assert [probe.amount for probe in probes] == [1024] * 3
    assert "three times in tf32" in probes[2].name
    probes[2].run()
    assert torch.get_float32_matmul_precision() == before
    plain, transposed = (probe.run().clone() for probe in probes[:2])
    assert not torch.equal(plain, transposed)
    assert len(matrix_probes(torch.bfloat16, (8, 16), "cpu")) == 4


def test_the_machine_is_measured_and_described(cuda, monkeypatch):
    about = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 20, L2_cache_size=5000
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setattr(gpu, "MATRIX_SIZES", dict.fromkeys(gpu.MATRIX_SIZES, (8,)))
    times = iter(range(1, 10**6))
    monkeypatch.setattr(gpu, "event_clock", lambda run, filler: (run(), 1 / next(times))[1])  # the last is the fastest
    limits = measure_gpu(repeats=1, device="cpu")
    machine = limits.machine
    assert (machine.name, machine.capability, machine.multiprocessors) == ("NVIDIA H200", "9.0", 132)
    assert (machine.memory_bytes, machine.cache_bytes) == (1 << 20, 5000)
    assert limits.read.amount == (1 << 20) // 16  # a buffer is at most a sixteenth of the memory
    assert limits.copy.amount == (1 << 20) // 8
    assert (machine.read_method, machine.copy_method) == (limits.read.name, limits.copy.name)
    assert machine.fp32_method == limits.matrix[torch.float32].name
    assert machine.datasheet_bytes_per_second == 4.8e12
    assert machine.datasheet_source


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA Quadro 2", None)],
)
def test_the_datasheet_of_a_known_gpu(cuda, name, known):
    found = datasheet(name)
    assert (found and found.name) == known


def test_an_unknown_gpu_has_no_share_of_a_datasheet(cuda):
    limits = gpu_limits(cuda)
    rates = {"copy": 4.0, "read": 3.0, "matrix": 5.0}
    assert "datasheet_seconds" in limits.rates(DECODE, rates)
    machine = dataclasses.replace(limits.machine, datasheet_bytes_per_second=None)
    unknown = dataclasses.replace(limits, machine=machine)
    assert "datasheet_seconds" not in unknown.rates(DECODE, rates)


def test_the_oracle_takes_many_heads_at_once(monkeypatch):
    """As it does on a GPU, with a last part that is smaller."""
    inputs = random_inputs(Problem(12, 6, 16, 63, batch=2, dtype="int8"))
    alone = answer(inputs)
    monkeypatch.setattr("gqa.bench.check._heads_at_once", lambda _: 5)
    together = answer(inputs)
    torch.testing.assert_close(together.exact, alone.exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.allowed, alone.allowed, rtol=0.05, atol=0)


@on_a_gpu
def test_times_on_this_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "BUFFER_BYTES", 512 << 20)
    monkeypatch.setattr(gpu, "MATRIX_SIZES", dict.fromkeys(gpu.MATRIX_SIZES, (4096,)))  # smaller ones are no limit
    limits = measure_gpu(repeats=2)
    assert limits.machine.copy_bytes_per_second > 0
    contenders = {OURS: ours("auto"), "torch": torch_enable_gqa}
    for problem in (
        Problem(32, 8, 128, 1024, batch=2),
        Problem(32, 8, 128, 256, 256, backward=True),
    ):
        for row in measure(problem, contenders, limits, repeats=2):
            assert row["status"] == "timed", row["reason"]
            assert 0 < row["seconds_p50"] < 1
            assert row["fraction_of_limit"] < 2
            assert ("backward_extra_bytes" in row) == problem.backward
