"""The machine's limits: what is counted, and that the fastest method is taken."""

import pytest
import torch

from gqa.bench import machine
from gqa.bench.machine import Probe, fastest, last_level_cache_bytes, measure_limits, onednn_probes, read_probes
from gqa.bench.timing import Seconds


def test_limits_of_this_machine_hang_together():
    limits = measure_limits(read_bytes=1 << 20, matrix_shapes=((64, 64, 64),), repeats=1)
    found = limits.machine
    assert found.threads == torch.get_num_threads()
    assert found.simd == torch.backends.cpu.get_cpu_capability()
    assert found.cache_bytes > 0
    assert found.read_bytes_per_second > 0
    assert found.fp32_flops_per_second >= found.sgemm_flops_per_second > 0
    assert (found.read_method, found.sgemm_method) == (limits.read.name, limits.sgemm.name)


def test_the_fastest_probe_is_taken(monkeypatch):
    probes = [Probe("few", 10, lambda: None), Probe("many", 900, lambda: None), Probe("slow", 1000, lambda: None)]
    times = {"few": 1.0, "many": 3.0, "slow": 5.0}
    monkeypatch.setattr(
        machine, "take_turns", lambda turns, repeats, clock: {name: Seconds(0, times[name], 9, 1) for name in turns}
    )
    best, rate = fastest(probes, repeats=1)
    assert (best.name, rate) == ("many", 300)


@pytest.mark.parametrize("count", [64, 1000, 1004])
def test_every_read_probe_reads_what_it_says(count):
    sums = {probe.name: probe.run().item() for probe in read_probes(count)}
    amounts = {probe.name: probe.amount for probe in read_probes(count)}
    numbers = count // 4
    assert sums["sum of fp32"] == numbers
    assert sums["max of fp32"] == 1
    assert sums["dot of fp32"] == numbers // 2  # of ones, half against half
    pairs = numbers // 2 * ((0x3F800000 << 32) + 0x3F800000)  # two fp32 ones are this integer
    assert sums["sum of int64"] % 2**64 == pairs % 2**64
    assert amounts["sum of fp32"] == amounts["max of fp32"] == count
    assert amounts["dot of fp32"] == amounts["sum of int64"] == numbers // 2 * 8


def test_matrix_probes_compute_the_product():
    (probe,) = machine.sgemm_probes([(2, 3, 5)])
    assert probe.amount == 60
    assert torch.equal(probe.run(), torch.full((2, 5), 3.0))
    for probe in onednn_probes([(2, 3, 5)]):
        assert probe.amount == 60
        assert torch.equal(probe.run().to_dense(), torch.full((2, 5), 3.0))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(["32K", "1024K", "32768K"], 32 << 20), (["96M"], 96 << 20), ([], 64 << 20), (["?"], 64 << 20)],
)
def test_the_largest_cache_counts(tmp_path, sizes, expected):
    for index, size in enumerate(sizes):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == expected
