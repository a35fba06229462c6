"""What was measured, as a device of the planner."""

import dataclasses

import pytest
from helpers.fake_cuda import FakeCuda, gpu_limits

from gqa.bench.machine import Machine
from gqa.bench.this_device import measured_device

CPU = Machine(
    processor="a processor",
    cores=2,
    threads=2,
    simd="AVX2",
    cache_bytes=1,
    read_bytes_per_second=3e9,
    read_method="sum",
    fp32_flops_per_second=5e9,
    matrix_method="oneDNN",
    sgemm_flops_per_second=4e9,
    sgemm_method="sgemm",
)


def test_a_cpu_multiplies_in_fp32_whatever_the_dtype():
    device = measured_device(CPU, "bf16")
    assert (device.bandwidth_bytes_per_second, device.flops_per_second) == (3e9, 5e9)
    assert device.sources["bandwidth"] == "sum"


def test_a_gpu_has_a_rate_per_dtype_and_its_fastest_way_to_memory(monkeypatch):
    gpu = gpu_limits(FakeCuda(monkeypatch)).machine
    for dtype, flops in (("bf16", gpu.bf16_flops_per_second), ("fp32", gpu.fp32_flops_per_second)):
        assert measured_device(gpu, dtype).flops_per_second == flops
    assert gpu.copy_bytes_per_second > gpu.read_bytes_per_second
    assert measured_device(gpu, "bf16").bandwidth_bytes_per_second == gpu.copy_bytes_per_second
    reading = dataclasses.replace(gpu, read_bytes_per_second=2 * gpu.copy_bytes_per_second)
    device = measured_device(reading, "bf16")
    assert device.bandwidth_bytes_per_second == pytest.approx(2 * gpu.copy_bytes_per_second)
    assert device.sources["bandwidth"] == gpu.read_method
