"""Sizes, token counts, durations and dtype names: parse what people type, print what people read.

Binary (`GiB`) and decimal (`GB`) units are different things and are never mixed up; output is binary.
"""

from __future__ import annotations

import re

from gqa.errors import GqaError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
}
_COUNT_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}

# Bytes per stored element of a cache or weight dtype.
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def parse_bytes(text: str) -> int:
    """`24GiB`, `80GB`, `512 MiB` -> bytes. A bare number is bytes."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", text)
    unit = match and (match[2].upper() or "B")
    if not match or unit not in _BYTE_UNITS:
        raise GqaError(
            "a size is not understood",
            got=repr(text),
            allowed="a number with B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)",
            hint="for example 24GiB",
        )
    return round(float(match[1]) * _BYTE_UNITS[unit])


def parse_rate(text: str, unit: str) -> float:
    """`936GB/s` (unit B/s) or `71 TFLOP/s` (unit FLOP/s) -> a number per second; powers of 1000."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kKMGTP]?)([A-Za-z]+)/s\s*", text)
    if not match or match[3].upper() != unit.removesuffix("/s").upper() or float(match[1]) <= 0:
        raise GqaError(
            "a rate is not understood",
            got=repr(text),
            allowed=f"a number and {unit}, with K, M, G, T or P for powers of 1000",
            hint="such as 936GB/s" if unit == "B/s" else f"such as 71T{unit}",
        )
    return float(match[1]) * 1000 ** " KMGTP".index(match[2].upper() or " ")


def parse_tokens(text: str) -> int:
    """`131072`, `128k`, `1M` -> tokens. `k` is 1024 and `M` is 1024**2, as model cards count contexts."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kKmM]?)\s*", text.replace("_", ""))
    tokens = round(float(match[1]) * _COUNT_UNITS[match[2].upper()]) if match else 0
    if tokens < 1:
        raise GqaError(
            "a token count is not understood",
            got=repr(text),
            allowed="a positive number, with k for 1024 or M for 1048576",
            hint="for example 131072 or 128k",
        )
    return tokens


def parse_share(text: str) -> float:
    """`0.02` or `2%` -> 0.02."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})\s*(%?)\s*", text)
    if not match:
        raise GqaError("a share is not understood", got=repr(text), allowed="a number such as 0.02, or 2%")
    return float(match[1]) / (100 if match[2] else 1)


def parse_seconds(text: str) -> float:
    """`90`, `90s`, `60m`, `1.5h` -> seconds."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([smhSMH]?)\s*", text)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2].lower()] if match else 0.0
    if seconds <= 0:
        raise GqaError(
            "a duration is not understood",
            got=repr(text),
            allowed="a positive number of seconds, or one with s, m or h",
            hint="for example 60m",
        )
    return seconds


def format_bytes(count: float) -> str:
    """Bytes -> a short text in binary units: `40.0 GiB`, `320 KiB`."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.2f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A count of parameters: `8.03 billion`, `40.4 million`, `912 thousand`."""
    for word, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Seconds -> `12.3 ms`, `45 s`, `3 min 20 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def dtype_bytes(name: str) -> int:
    """Bytes per element of a dtype name (`fp32`, `fp16`, `bf16`, `int8`)."""
    if name not in DTYPE_BYTES:
        raise GqaError("an unknown dtype", got=repr(name), allowed=", ".join(DTYPE_BYTES))
    return DTYPE_BYTES[name]
