"""What limits how many blocks of a kernel a multiprocessor holds, per compute capability.

Source of all limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; of the units in
which registers and shared memory are given out: the CUDA Occupancy Calculator of the same toolkits.
"""

from __future__ import annotations

import dataclasses

KIB = 1 << 10
REGISTERS = 65536  # of 32 bits, per multiprocessor
REGISTER_UNIT = 256  # a warp's registers are rounded up to
WARP_UNIT = 4  # a multiprocessor has 4 parts with a quarter of the registers each
SHARED_UNIT = 128  # bytes
RESERVED_SHARED = KIB  # that the system keeps of each block's shared memory


@dataclasses.dataclass(frozen=True)
class Chip:
    """shared_bytes: of a multiprocessor, for all its blocks; warps, blocks: that it holds at most."""

    shared_bytes_per_block: int
    shared_bytes: int
    warps: int
    blocks: int


CHIPS = {
    80: Chip(163 * KIB, 164 * KIB, 64, 32),
    89: Chip(99 * KIB, 100 * KIB, 48, 24),
    90: Chip(227 * KIB, 228 * KIB, 64, 32),
    100: Chip(227 * KIB, 228 * KIB, 64, 32),
}


def blocks_at_once(chip: Chip, warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks that one multiprocessor holds at once; 0 where a single one is too large.

    warps: of a block; registers: per thread; shared_bytes: that a block asks for, without what the system keeps.
    """
    if shared_bytes > chip.shared_bytes_per_block:
        return 0
    of_a_warp = _up(registers * 32, REGISTER_UNIT)
    by_registers = REGISTERS // of_a_warp // WARP_UNIT * WARP_UNIT // warps
    by_shared = chip.shared_bytes // _up(shared_bytes + RESERVED_SHARED, SHARED_UNIT)
    return min(by_registers, by_shared, chip.warps // warps, chip.blocks)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
