"""What is read off compiled kernels, and what follows for the chip, on examples that can be checked by hand."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the tools come in its wheel")

LISTING = """
	//## File "/a/parts.py", line 7
        /*0010*/              @!P3 LDG.E.128 R8, desc[UR18][R4.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR18][R122.64], !P5 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   LDG.E.U8 R8, desc[UR18][R4.64] ;
	//## File "/b/forward.py", line 60
        /*0050*/              @UP0 LDG.E R8, desc[UR18][R4.64] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0080*/                   STL [R1+0x8], R180 ;
"""
TTGIR = """
#loc1 = loc("/a/parts.py":7:12)
#loc2 = loc("keys"(#loc3))
#loc3 = loc("/b/forward.py":40:8)
#loc4 = loc(callsite(#loc1 at #loc2))
#loc5 = loc("/b/forward.py":50:8)
#loc6 = loc(callsite(#loc1 at #loc5))
#loc7 = loc("/b/forward.py":60:8)
  %keys = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16, #shared, #smem, mutable> loc(#loc4)
  %again = ttg.local_alloc : () -> !ttg.memdesc<1x64x128xbf16, #shared, #smem, mutable> loc(#loc4)
  %values = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable> loc(#loc6)
  %scales = ttg.local_alloc : () -> !ttg.memdesc<2x64xf32, #shared, #smem, mutable> loc(#loc7)
  %1 = ttg.async_copy_global_to_local %p, %k : tensor<64x128x!tt.ptr<bf16>, #blocked> -> <64x128xbf16> loc(#loc4)
  %2 = tt.load %q, %m, %other : tensor<16x128x!tt.ptr<bf16>, #blocked> loc(#loc7)
  %3 = tt.load %v : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc6)
"""


@pytest.fixture
def binary(script: Any) -> ModuleType:
    return script("triton_binary")


def test_instructions_know_the_line_they_come_from(binary: ModuleType) -> None:
    found = list(binary._instructions(LISTING))
    names = ["LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGDEPBAR", "LDG.E.U8"]
    assert found[:4] == [(name, ("parts.py", 7)) for name in names]
    assert found[4] == ("LDG.E", ("forward.py", 60))
    assert len(found) == 8


@pytest.mark.parametrize(
    ("name", "bits"),
    [("LDG.E.128", 128), ("LDGSTS.E.BYPASS.128", 128), ("LDGSTS.E.64", 64), ("LDG.E", 32), ("LDG.E.U16", 16)],
)
def test_the_width_of_a_load(binary: ModuleType, name: str, bits: int) -> None:
    assert binary._width(name) == bits


def test_keys_and_values_are_told_from_queries_and_scales(binary: ModuleType) -> None:
    assert binary._lines_of_loads(TTGIR, ["bf16"], 64) == {("parts.py", 7)}
    assert binary._lines_of_loads(TTGIR, ["bf16"], 16) == {("forward.py", 60)}
    assert binary._lines_of_loads(TTGIR, ["f32"], 64) == set()
    assert binary._buffered_bytes(TTGIR, ["bf16"], 64) == 2 * 2 * 64 * (128 + 64)
    assert binary._buffered_bytes(TTGIR.replace("64x64xbf16", "64x64xi16"), ["bf16", "i16"], 64) == 2 * 2 * 64 * 192


def test_a_kernel_is_examined(binary: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = " Function attend:\n  REG:143 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0\n"
    monkeypatch.setattr(binary, "_tool", lambda name, *_: {"cuobjdump": usage, "nvdisasm": LISTING}[name])
    compiled = SimpleNamespace(asm={"cubin": b"", "ttgir": TTGIR}, metadata=SimpleNamespace(shared=70000))
    assert binary.examine(compiled, ["bf16"], 64) == binary.Binary(
        registers=143,
        stack_bytes=8,
        spills=1,
        shared_bytes=70000,
        matrix=("HGMMA",),
        load_bits={8: 1, 128: 2},
        buffered_bytes=2 * 2 * 64 * 192,
    )


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "blocks"),
    [
        (90, 4, 32, 0, 16),  # 64 warps
        (90, 1, 16, 0, 32),  # 32 blocks
        (90, 4, 128, 0, 4),  # 65536 registers
        (90, 4, 129, 0, 3),  # given out by 8 per thread
        (90, 8, 168, 0, 1),  # 12 warps of 168 registers, a quarter of them in each part
        (90, 4, 32, 227 << 10, 1),
        (90, 4, 32, 113 << 10, 2),  # with the system's KiB, exactly half
        (90, 4, 32, (113 << 10) + 1, 1),
        (90, 4, 32, (227 << 10) + 1, 0),
        (80, 4, 32, 163 << 10, 1),
        (89, 8, 32, 0, 6),  # 48 warps
        (89, 4, 32, 100 << 10, 0),
    ],
)
def test_blocks_at_once(script: Any, capability: int, warps: int, registers: int, shared: int, blocks: int) -> None:
    chips = script("triton_chips")
    assert chips.blocks_at_once(chips.CHIPS[capability], warps, registers, shared) == blocks


FINE = {
    "call": "decode", "kernel": "attend", "capability": 90, "head_dim": 128, "dtype": "bf16", "block_keys": 64,
    "registers": 140, "spills": 0, "stack_bytes": 0, "shared_bytes": 70000, "blocks_per_multiprocessor": 2,
    "matrix": "HMMA", "load_bits": "128",
}  # fmt: skip
FORWARD = FINE | {"call": "forward", "matrix": "HGMMA"}
KEYS = FORWARD | {"call": "backward", "kernel": "differentiate_keys"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (FINE, ""),
        (FINE | {"spills": 3}, "spills: 3 instructions"),
        (FINE | {"stack_bytes": 16}, "16 bytes per thread"),
        (FINE | {"blocks_per_multiprocessor": 0}, "a block does not fit"),
        (FINE | {"load_bits": "64 128"}, "loads of K and V of 64 128 bits"),
        (FINE | {"load_bits": ""}, "loads of K and V of unknown bits"),
        (FINE | {"kernel": "join", "block_keys": None, "load_bits": ""}, ""),
        (FORWARD, ""),
        (FORWARD | {"load_bits": "32 128"}, ""),
        (FORWARD | {"matrix": "HMMA"}, "no wgmma"),
        (FORWARD | {"matrix": ""}, "no wgmma"),
        (FORWARD | {"matrix": "HMMA", "capability": 80}, ""),
        (FORWARD | {"matrix": "HMMA", "dtype": "fp32"}, ""),
        (KEYS | {"matrix": "HMMA"}, "no wgmma"),
        (KEYS | {"matrix": "HMMA", "head_dim": 256}, ""),
    ],
)
def test_faults_are_found(script: Any, row: dict[str, Any], said: str) -> None:
    found = script("triton_compile").faults(row)
    assert len(found) == bool(said)
    assert all(said in fault for fault in found)
