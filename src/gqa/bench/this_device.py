"""The machine at hand as a device for the planner."""

from __future__ import annotations

from gqa.bench.gpu import Gpu
from gqa.bench.machine import Machine, measure_machine
from gqa.hardware import Device
from gqa.record import describe_machine
from gqa.units import format_bytes


def measure_this_device() -> Device:
    """This machine's memory, and its bandwidth and fp32 rate as measured now, which takes a second or two."""
    return cpu_device(measure_machine())


def measured_device(machine: Machine | Gpu, dtype: str) -> Device:
    """What was measured, as a device that multiplies matrices of this dtype (of fp32 on a CPU)."""
    return cpu_device(machine) if isinstance(machine, Machine) else gpu_device(machine, dtype)


def cpu_device(machine: Machine) -> Device:
    memory = describe_machine()["memory_bytes"] or 0
    return Device(
        name=f"this machine ({machine.processor}, {machine.threads} threads)",
        memory_bytes=memory,
        memory_basis=f"{format_bytes(memory)}, as the system reports",
        bandwidth_bytes_per_second=machine.read_bytes_per_second,
        flops_per_second=max(machine.fp32_flops_per_second, machine.sgemm_flops_per_second),
        flops_dtype="fp32, measured",
        sources={"memory": "the system", "bandwidth": machine.read_method, "flops": machine.matrix_method},
    )


def gpu_device(gpu: Gpu, dtype: str) -> Device:
    method = gpu.read_method if gpu.read_bytes_per_second > gpu.copy_bytes_per_second else gpu.copy_method
    return Device(
        name=f"this {gpu.name}",
        memory_bytes=gpu.memory_bytes,
        memory_basis=f"{format_bytes(gpu.memory_bytes)}, as the driver reports",
        bandwidth_bytes_per_second=max(gpu.read_bytes_per_second, gpu.copy_bytes_per_second),
        flops_per_second=getattr(gpu, f"{dtype}_flops_per_second"),
        flops_dtype=f"{dtype}, measured",
        sources={"memory": "the driver", "bandwidth": method, "flops": getattr(gpu, f"{dtype}_method")},
    )
