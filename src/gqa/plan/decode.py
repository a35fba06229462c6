"""How fast a decode step can be at best on a device."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gqa.config import ModelShape
from gqa.hardware import Device
from gqa.plan.cache import kv_bytes
from gqa.plan.flops import decode_flops
from gqa.plan.parameters import read_parameters


@dataclasses.dataclass(frozen=True)
class DecodeBound:
    """No decode step is faster than `seconds`; `limit` says what holds it back."""

    seconds: float
    limit: Literal["bandwidth", "compute"]
    bytes_moved: float
    flops: int


def decode_bound(
    shape: ModelShape, context: int, batch: int, kv_element_bytes: int, weight_element_bytes: int, device: Device
) -> DecodeBound | None:
    """max((weights read + B * KV(S)) / bandwidth, FLOPs / peak) for one token of each of B requests.

    The whole cache and every weight that the step needs are read once from device memory; activations, launches and
    the input embedding count nothing (the roofline of Williams et al. 2009). None if the parameters are unknown.
    """
    read = read_parameters(shape, batch)
    flops = decode_flops(shape, context, batch)
    if read is None or flops is None:
        return None
    bytes_moved = read * weight_element_bytes + kv_bytes(shape, context, batch, kv_element_bytes)
    moving = bytes_moved / device.bandwidth_bytes_per_second
    computing = flops / device.flops_per_second
    limit = "bandwidth" if moving >= computing else "compute"
    return DecodeBound(max(moving, computing), limit, bytes_moved, flops)
