"""The machine at hand as a device for the planner."""

from __future__ import annotations

from gqa.bench.machine import measure_machine
from gqa.hardware import Device
from gqa.record import describe_machine
from gqa.units import format_bytes


def measure_this_device() -> Device:
    """This machine's memory, and its bandwidth and fp32 rate as measured now, which takes a second or two."""
    machine, memory = measure_machine(), describe_machine()["memory_bytes"] or 0
    return Device(
        name=f"this machine ({machine.processor}, {machine.threads} threads)",
        memory_bytes=memory,
        memory_basis=f"{format_bytes(memory)}, as the system reports",
        bandwidth_bytes_per_second=machine.read_bytes_per_second,
        flops_per_second=max(machine.fp32_flops_per_second, machine.sgemm_flops_per_second),
        flops_dtype="fp32, measured",
        sources={"memory": "the system", "bandwidth": machine.read_method, "flops": machine.matrix_method},
    )
