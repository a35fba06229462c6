"""Devices that `gqa plan` knows: memory, bandwidth and peak rate, each with its source."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import math
import re
import tomllib
from typing import Any

from gqa.errors import GqaError
from gqa.units import MIB, format_bytes


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    memory_bytes:               what can be allocated, in bytes
    memory_basis:               where that figure comes from, as a phrase for the reader
    bandwidth_bytes_per_second: of the device memory, by datasheet
    flops_per_second:           dense matrix multiply in `flops_dtype`, without sparsity
    sources:                    figure -> source, for memory, bandwidth and flops
    """

    name: str
    memory_bytes: int
    memory_basis: str
    bandwidth_bytes_per_second: float
    flops_per_second: float
    flops_dtype: str
    sources: dict[str, str]

    @staticmethod
    def described(base: Device | None, memory: int | None, bandwidth: float | None, flops: float | None) -> Device:
        """`base` with the figures that are given. Without a base memory is needed; where no bandwidth is told there
        are no bounds, and without a rate of matrix multiplication none is held to be one of compute."""
        if base is None and memory is None:
            raise GqaError(
                "a device that is not in the list needs its memory",
                hint="--memory 24GiB, for bounds also --bandwidth 936GB/s --flops 71TFLOP/s",
            )
        plain = base or Device("the device described", 0, "", math.inf, math.inf, "not told", {})
        given: dict[str, Any] = {}
        if memory is not None:
            given |= {"memory_bytes": memory, "memory_basis": f"{format_bytes(memory)}, as given"}
        if bandwidth is not None:
            given |= {"bandwidth_bytes_per_second": bandwidth}
        if flops is not None:
            given |= {"flops_per_second": flops, "flops_dtype": "as given"}
        own = [name for name in ("memory", "bandwidth", "flops") if any(key.startswith(name) for key in given)]
        return dataclasses.replace(plain, **given, sources=plain.sources | dict.fromkeys(own, "as given"))


def find_device(name: str) -> Device:
    """The device of that name or the driver's name for it, whatever its case, spaces and dashes. Raises GqaError with
    the closest names."""
    by_plain = {_plain(device.name): device for device in devices().values()}
    wanted = _plain(name)
    by_driver = {_plain(row["driver"]): row["name"] for row in _rows() if "driver" in row}
    if wanted in by_driver:
        return devices()[by_driver[wanted]]
    if wanted in by_plain:
        return by_plain[wanted]
    starting = [plain for plain in by_plain if wanted and plain.startswith(wanted)]
    close = starting or difflib.get_close_matches(wanted, by_plain, n=3, cutoff=0.5)
    raise GqaError(
        "an unknown device",
        got=repr(name),
        allowed=f"the {len(devices())} that gqa plan --devices lists, or --memory 24GiB --bandwidth 936GB/s",
        hint=" or ".join(f'--device "{by_plain[plain].name}"' for plain in close) or None,
    )


@functools.cache
def devices() -> dict[str, Device]:
    """Every device of data/hardware.toml by its name."""
    return {row["name"]: _device(row) for row in _rows()}


@functools.cache
def _rows() -> list[dict]:
    return tomllib.loads(importlib.resources.files("gqa").joinpath("data", "hardware.toml").read_text("utf-8"))[
        "device"
    ]


def _device(row: dict) -> Device:
    memory, bandwidth, dense = row["memory"], row["bandwidth"], row["dense"]
    if "reported_mib" in memory:
        memory_bytes = memory["reported_mib"] * MIB
        basis = f"{memory['reported_mib']} MiB, as the driver reports"
    else:
        memory_bytes = memory["vendor_gb"] * 10**9
        basis = f"{memory['vendor_gb']} GB, the vendor's decimal figure"
    return Device(
        name=row["name"],
        memory_bytes=memory_bytes,
        memory_basis=basis,
        bandwidth_bytes_per_second=bandwidth["gb_s"] * 1e9,
        flops_per_second=dense["tflops"] * 1e12,
        flops_dtype=dense["dtype"],
        sources={"memory": memory["source"], "bandwidth": bandwidth["source"], "flops": dense["source"]},
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower().removeprefix("nvidia").removeprefix("geforce")
