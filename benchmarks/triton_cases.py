"""The calls whose GPU kernels are compiled without a GPU: every tile of the table, and every option once.

A case is plain data; its launches are planned from meta tensors, by the functions that plan a user's call.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from gqa.ops.gpu import plan_forward
from gqa.ops.gpu_grad import plan_backward
from gqa.ops.launch import Launch
from gqa.ops.triton_tiles import CAPABILITIES, DECODE_ROWS, HEAD_DIMS, tile

B, H, S = 16, 8, 8192
MULTIPROCESSORS = 132  # of an H200; decides only how many programs share a tile's keys
PAGE = 16
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
QUERIES = {  # packed rows -> (T, G)
    16: (1, 8),
    32: (4, 8),
    64: (8, 8),
    2048: (512, 4),
}
CALLS = {"decode": DECODE_ROWS, "forward": (2048,), "backward": (2048,)}
# Several that go together are joined by " + ", as models have them.
OPTIONS = {
    "decode": (
        *("window + sinks + starts", "softcap + window + q_starts", "bool mask", "float mask", "paged + lengths"),
        *("unsplit", "fp16", "D 96", "Dv 64", "no lse", "int8 paged + lengths", "int8 fp32", "int8 fp16", "strided"),
    ),
    "forward": (
        *("full", "window + sinks + starts", "softcap + window + q_starts", "bool mask", "float mask"),
        *("paged + lengths", "split", "fp16", "D 96", "Dv 64", "no lse", "int8", "int8 fp32", "ragged", "strided"),
    ),
    "backward": (
        *("full", "window + sinks + starts", "softcap + window + q_starts", "bool mask", "float mask"),
        *("fp16", "D 96", "Dv 64", "lse", "ragged", "strided"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """call: a key of CALLS; rows: packed rows, a key of QUERIES; dtype, kv_dtype: keys of KINDS; option: of OPTIONS."""

    call: str
    capability: int
    head_dim: int
    v_head_dim: int
    dtype: str
    kv_dtype: str
    rows: int
    option: str = ""

    @property
    def name(self) -> str:
        dims = str(self.head_dim) if self.v_head_dim == self.head_dim else f"{self.head_dim}/{self.v_head_dim}"
        dtype = self.dtype if self.kv_dtype == self.dtype else f"{self.dtype} on {self.kv_dtype}"
        plain = f"{self.call} {self.capability} D {dims} {dtype} rows {self.rows}"
        return f"{plain}, {self.option}" if self.option else plain


def cases() -> Iterator[Case]:
    """Every row of the table as it is used, then every option on compute capability 9.0."""
    for capability in CAPABILITIES:
        for call, all_rows in CALLS.items():
            for dtype, kv_dtype in (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "int8")):
                if kv_dtype == "int8" and call != "decode":
                    continue
                for head_dim in HEAD_DIMS:
                    for rows in all_rows:
                        case = Case(call, capability, head_dim, head_dim, dtype, kv_dtype, rows)
                        if call != "decode" or rows <= most_rows(case):
                            yield case
    for call, options in OPTIONS.items():
        for option in options:
            words = option.split()
            dtype = next((word for word in words if word in ("fp16", "fp32")), "bf16")
            kv_dtype = "int8" if "int8" in words else dtype
            D = 96 if option == "D 96" else 128
            Dv = 64 if option == "Dv 64" else D
            yield Case(call, 90, D, Dv, dtype, kv_dtype, CALLS[call][0], option)


def most_rows(case: Case) -> int:
    """Packed rows that the largest tile of decode holds; more of them only make more tiles."""
    kinds = KINDS[case.dtype], KINDS[case.kv_dtype]
    return tile("decode", case.capability, case.head_dim, case.v_head_dim, *kinds, case.rows).block_rows


def plan(case: Case) -> list[Launch]:
    """What a call of this case would launch; of the kernels that do not depend on a tile only what is new."""
    launches = plan_call(case)
    is_new = case.rows == DECODE_ROWS[0] and case.dtype == case.kv_dtype and case.option in ("", "no lse")
    return launches if is_new else [launch for launch in launches if "BLOCK_KEYS" in launch.arguments]


def plan_call(case: Case) -> list[Launch]:
    """What a call of this case would launch."""
    T, G = QUERIES[case.rows]
    q = _meta(case.dtype, B, H * G, T, case.head_dim)
    k, v = (_meta(case.kv_dtype, B, H, S, dim) for dim in (case.head_dim, case.v_head_dim))
    if case.option == "strided":  # as a model's projections leave them
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if case.option == "ragged":
        q, k, v = (x[:1] for x in (q, k, v))
    names = ("q_start", "q_starts", "window", "softcap", "mask", "sinks", "kv_lengths", "kv_starts")
    options: dict[str, Any] = {
        **dict.fromkeys((*names, "q_offsets", "k_offsets")),
        "causal": T > 1,
        "scale": 0.125,
        **_option(case.option, T, G),
    }
    if case.call == "backward":
        out = q.new_empty(*q.shape[:3], case.v_head_dim)
        lse = _meta("fp32", *q.shape[:3])
        d_lse = lse if case.option == "lse" else None
        return plan_backward(q, k, v, out, lse, out, d_lse, **options, capability=case.capability)[0]

    options = {"block_table": None, "k_scale": None, "v_scale": None, "want_lse": case.option != "no lse"} | options
    if "paged" in case.option:
        k, v = (_meta(case.kv_dtype, B * S // PAGE, H, PAGE, x.shape[3]) for x in (k, v))
    if case.kv_dtype == "int8":
        options["k_scale"] = options["v_scale"] = _meta("fp32", *k.shape[:3])
    split = case.option == "split" or (case.call == "decode" and case.option != "unsplit")
    multiprocessors = 10 * B * H if split else 1 if case.option == "unsplit" else MULTIPROCESSORS
    return plan_forward(q, k, v, **options, capability=case.capability, multiprocessors=multiprocessors)[0]


def _meta(dtype: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=KINDS[dtype])


def _option(option: str, T: int, G: int) -> dict[str, Any]:
    """What an option changes among the arguments of `plan_forward`."""
    number = torch.empty(B, device="meta", dtype=torch.int32)
    offsets = torch.empty(B + 1, device="meta", dtype=torch.int32)
    changes: dict[str, dict[str, Any]] = {
        "full": {"causal": False},
        "window": {"causal": True, "window": 1024},
        "softcap": {"softcap": 30.0},
        "bool mask": {"mask": torch.empty(B, 1, T, S, device="meta", dtype=torch.bool)},
        "float mask": {"mask": _meta("bf16", B, 1, T, S)},
        "sinks": {"sinks": _meta("bf16", H * G)},
        "lengths": {"kv_lengths": number},
        "starts": {"kv_starts": number},
        "q_starts": {"causal": True, "q_starts": number},
        "paged": {"block_table": torch.empty(B, S // PAGE, device="meta", dtype=torch.int32)},
        "ragged": {"q_offsets": offsets, "k_offsets": offsets},
    }
    parts = option.removeprefix("int8 ").split(" + ")
    return {name: value for part in parts for name, value in changes.get(part, {}).items()}
