"""The same dial under other devices, cache dtypes and contexts: the rows that a page lets its reader choose from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gqa.config import ModelShape
from gqa.hardware import Device, find_device
from gqa.plan.kv_dtype import KV_DTYPES
from gqa.plan.setting import Job

DEVICES = (
    *("L4", "RTX 4090", "RTX 5090", "L40S", "A100 80GB SXM", "H100 SXM", "H200", "B200", "MI300X"),
    "M4 Max 128GB",
)
CONTEXTS = (1024, 4096, 8192, 32768, 131072)
DTYPES = ("bf16", "fp8")


def what_if(variants: Sequence[ModelShape], job: Job) -> dict[str, Any]:
    """devices, kv_dtypes, contexts: what was asked and some usual ones. settings: a row for each of them and each
    variant; work: FLOPs of a variant at a context; caches: its bytes, which no device changes."""
    context = variants[0].context or job.context
    contexts = sorted({job.context, *(length for length in CONTEXTS if length <= max(context, job.context))})
    named = {device.name: device for device in ([job.device] if job.device else [])}
    devices = list((named | {name: find_device(name) for name in DEVICES if name not in named}).values())
    dtypes = [job.kv, *(KV_DTYPES[name] for name in DTYPES if name != job.kv.name)]
    settings, work, caches = [], [], []
    for length in contexts:
        for kv in dtypes:
            for device in devices:
                settings += _rows(variants, dataclasses.replace(job, context=length, kv=kv, device=device))
        at_length = dataclasses.replace(job, context=length, device=None)
        for index, variant in enumerate(variants):
            row = at_length.work(variant)
            if row is not None:
                work.append({"stop": index, "context_tokens": length, **row})
            caches += [
                {
                    "stop": index,
                    "context_tokens": length,
                    "kv_dtype": kv.name,
                    **dataclasses.replace(at_length, kv=kv).cache(variant),
                }
                for kv in dtypes
            ]
    return {
        "devices": [_device(device) for device in devices],
        "kv_dtypes": [kv.name for kv in dtypes],
        "contexts": contexts,
        "settings": settings,
        "work": work,
        "caches": caches,
    }


def _rows(variants: Sequence[ModelShape], job: Job) -> list[dict[str, Any]]:
    assert job.device is not None
    return [
        {
            "stop": index,
            "context_tokens": job.context,
            "kv_dtype": job.kv.name,
            "device": job.device.name,
            **job.on_device(variant),
        }
        for index, variant in enumerate(variants)
    ]


def _device(device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "memory_bytes": device.memory_bytes,
        "bandwidth_bytes_per_second": device.bandwidth_bytes_per_second,
        "flops_per_second": device.flops_per_second,
    }
