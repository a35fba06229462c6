"""The tile table: complete, and the right row for a device and a call."""

from __future__ import annotations

import itertools

import pytest
import torch

from gqa.ops.triton_tiles import CAPABILITIES, DECODE_ROWS, HEAD_DIMS, KERNELS, Place, nearest, table, tile

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


def test_the_table_has_every_place_once_and_no_other() -> None:
    kinds = {kernel: ("16", "32", "8") if kernel == "decode" else ("16", "32") for kernel in KERNELS}
    places = [
        Place(kernel, capability, head_dim, kind)
        for kernel, capability, head_dim in itertools.product(KERNELS, CAPABILITIES, HEAD_DIMS)
        for kind in kinds[kernel]
    ]
    assert set(table()) == set(places)
    for place, found in table().items():
        for size in (found.block_rows, found.block_keys):
            assert size in (16, 32, 64, 128), place
        assert found.warps in (4, 8), place
        assert 1 <= found.stages <= 5, place


@pytest.mark.parametrize(
    ("device", "row"),
    [(80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (100, 100), (103, 100), (110, 100), (120, 89), (121, 89)],
)
def test_a_device_takes_the_row_whose_limits_it_has(device: int, row: int) -> None:
    assert nearest(device) == row
    assert tile("forward", device, 128, 128, BF16, BF16, 999) == table()[Place("forward", row, 128, "16")]


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "row"), [(16, 16, 64), (60, 100, 128), (129, 64, 256), (8, 65, 128)]
)
def test_the_wider_head_decides(head_dim: int, v_head_dim: int, row: int) -> None:
    assert (
        tile("backward_keys", 90, head_dim, v_head_dim, FP16, FP16, 1) == table()[Place("backward_keys", 90, row, "16")]
    )


@pytest.mark.parametrize(("rows", "block"), [(1, 16), (7, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 64)])
def test_a_decode_tile_covers_the_packed_rows(rows: int, block: int) -> None:
    for kv_dtype in (BF16, INT8):
        found = tile("decode", 90, 128, 128, BF16, kv_dtype, rows)
        most = table()[Place("decode", 90, 128, "8" if kv_dtype == INT8 else "16")].block_rows
        assert most == DECODE_ROWS[-1]
        assert found.block_rows == block


def test_a_decode_tile_has_no_more_rows_than_the_table_says() -> None:
    assert table()[Place("decode", 90, 256, "32")].block_rows == 16
    assert tile("decode", 90, 256, 256, FP32, FP32, 64).block_rows == 16


def test_int8_has_rows_of_its_own_in_decode_only() -> None:
    assert tile("decode", 80, 64, 64, BF16, INT8, 64) == table()[Place("decode", 80, 64, "8")]
    assert tile("decode", 80, 64, 64, FP32, INT8, 64) == table()[Place("decode", 80, 64, "8")]
    assert tile("forward", 80, 64, 64, FP16, INT8, 64) == table()[Place("forward", 80, 64, "16")]
    assert tile("forward", 80, 64, 64, FP32, INT8, 64) == table()[Place("forward", 80, 64, "32")]


def test_a_mask_halves_what_is_streamed() -> None:
    streams = {"forward": "block_keys", "backward_rows": "block_keys", "backward_keys": "block_rows"}
    for kernel, streamed in streams.items():
        for head_dim, dtype in ((128, BF16), (256, FP32)):
            plain = tile(kernel, 90, head_dim, head_dim, dtype, dtype, 999)
            masked = tile(kernel, 90, head_dim, head_dim, dtype, dtype, 999, masked=True)
            assert getattr(masked, streamed) == max(16, getattr(plain, streamed) // 2)
            assert (masked.warps, masked.stages) == (plain.warps, plain.stages)
    assert tile("decode", 90, 128, 128, BF16, BF16, 9, masked=True) == tile("decode", 90, 128, 128, BF16, BF16, 9)
