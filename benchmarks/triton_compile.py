"""Compile every GPU kernel of the tile table without a GPU, and predict from the machine code how it will run.

    python benchmarks/triton_compile.py                     all of them, minutes on 2 cores
    python benchmarks/triton_compile.py --only "decode 90"  those whose name contains this, and no record

Compiled is what a user's call would compile, for compute capabilities 8.0, 8.9, 9.0 and 10.0. What must hold is
checked: nothing is spilled to memory, a block fits, matrix products on 9.0 run as wgmma, and decode loads K and V 16
bytes at a time. The record goes to benchmarks/results/triton-compiled.json. Exit status 1: something does not hold.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triton_absent import compile_for
from triton_binary import BITS, examine
from triton_cases import Case, cases, plan
from triton_chips import CHIPS, blocks_at_once

from gqa.ops.launch import Launch
from gqa.record import Record, describe_versions

COMMAND = "benchmark triton-compile"
PATH = Path(__file__).with_name("results") / "triton-compiled.json"
# How K and V are read, in the words of Triton's intermediate code; two int8 values of V may come as one int16.
READ_AS = {"bf16": ("bf16",), "fp16": ("f16",), "fp32": ("f32",), "int8": ("i8", "i16")}
LOAD_BITS = 128  # the widest load of a thread on all these chips
PREDICTED = (
    "registers",
    "stack_bytes",
    "spills",
    "shared_bytes",
    "buffered_bytes",
    "blocks_per_multiprocessor",
    "occupancy",
    "kv_bytes_in_flight_per_multiprocessor",
    "kv_bytes_per_key",
)
ASSUMPTIONS = (
    "Nothing was run: figures are read off the machine code, or follow from it and the limits of the chip.",
    "Blocks per multiprocessor are what its registers, shared memory and warps allow; a grid may fill fewer.",
    "Bytes in flight are the shared memory that loads of K and V (of q and the output's gradient in differentiate_keys)"
    " are on their way to, in all blocks at once.",
    "Bytes per key are those of one KV head's K and V, and its scales; each is read once for all G queries.",
)


def compile_case(case: Case) -> list[dict[str, Any]]:
    """A row of figures for each kernel of the case."""
    return [row_of(case, launch) for launch in plan(case)]


def row_of(case: Case, launch: Launch) -> dict[str, Any]:
    """Compile one launch; what it is, what stands in the machine code, and what follows from that."""
    begun = time.perf_counter()
    compiled = compile_for(case.capability, launch)
    kernel = launch.kernel.fn.__name__
    block_keys = launch.arguments.get("BLOCK_KEYS")
    streamed = launch.arguments.get("BLOCK_ROWS" if kernel == "differentiate_keys" else "BLOCK_KEYS", 0)
    binary = examine(compiled, READ_AS[case.kv_dtype], streamed)
    chip = CHIPS[case.capability]
    blocks = blocks_at_once(chip, launch.warps, binary.registers, binary.shared_bytes)
    scales = 8 if case.kv_dtype == "int8" else 0
    figures = dataclasses.asdict(binary)
    figures["matrix"] = " ".join(binary.matrix)
    figures["load_bits"] = " ".join(f"{bits}" for bits in binary.load_bits)
    row = dataclasses.asdict(case) | {
        "kernel": kernel,
        "block_rows": launch.arguments.get("BLOCK_ROWS"),
        "block_keys": block_keys,
        "warps": launch.warps,
        "stages": launch.stages,
        **figures,
        "blocks_per_multiprocessor": blocks,
        "occupancy": blocks * launch.warps / chip.warps,
        "kv_bytes_in_flight_per_multiprocessor": blocks * binary.buffered_bytes,
        "kv_bytes_per_key": (case.head_dim + case.v_head_dim) * BITS[READ_AS[case.kv_dtype][0]] // 8 + scales,
        "seconds": time.perf_counter() - begun,
    }
    return row | {"faults": faults(row)}


def worth_its_spills(row: Mapping[str, Any]) -> bool:
    """dK and dV of bf16 at D 256 on 9.0: 1964 us on an H100, where the fastest tile without spills took 2885."""
    return (row["kernel"], row["capability"], row["head_dim"]) == ("differentiate_keys", 90, 256) and (
        row["dtype"] != "fp32"
    )


def faults(row: Mapping[str, Any]) -> list[str]:
    """What does not hold of a compiled kernel, as phrases."""
    found = []
    if (row["spills"] or row["stack_bytes"]) and not worth_its_spills(row):
        found.append(f"spills: {row['spills']} instructions, {row['stack_bytes']} bytes per thread")
    if row["blocks_per_multiprocessor"] == 0:
        found.append(f"a block does not fit: {row['shared_bytes']} bytes of shared memory")
    if row["block_keys"] is None:  # joins or sums up what others made: no matrix products, no K and V
        return found
    if row["call"] == "decode":
        if row["load_bits"] != str(LOAD_BITS):
            found.append(f"loads of K and V of {row['load_bits'] or 'unknown'} bits")
    elif row["capability"] == 90 and not without_wgmma(row) and "HGMMA" not in row["matrix"].split():
        found.append(f"no wgmma, but {row['matrix'] or 'no matrix instructions'}")
    return found


def without_wgmma(row: Mapping[str, Any]) -> bool:
    """Where wgmma is not expected on 9.0: fp32 may take small tiles; and dK and dV of wgmma's least tile, 64 keys, are
    64 x 512 sums at D 256, which with the scores are more than the registers of 8 warps."""
    return row["dtype"] == "fp32" or (row["kernel"] == "differentiate_keys" and row["head_dim"] > 128)


def run(chosen: Sequence[Case], processes: int) -> list[dict[str, Any]]:
    """The rows of all cases, in order, with a line of progress each on stderr."""
    rows = []
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case, found in zip(chosen, pool.map(compile_case, chosen), strict=True):
            for row in found:
                print(line(case, row), file=sys.stderr, flush=True)
            rows += found
    return rows


def line(case: Case, row: Mapping[str, Any]) -> str:
    tile = f"{row['block_rows']} x {row['block_keys']}, " if row["block_keys"] else ""
    figures = (
        f"{case.name}: {row['kernel']} {tile}{row['warps']} warps, {row['stages']} stages:"
        f" {row['registers']} registers,"
        f" {row['shared_bytes']} bytes shared, {row['blocks_per_multiprocessor']} blocks {row['matrix']}"
        f" {row['buffered_bytes'] >> 10} KiB {row['seconds']:.1f} s"
    )
    return "; ".join([figures, *(f"FAULT: {fault}" for fault in row["faults"])])


def record(rows: Sequence[Mapping[str, Any]]) -> Record:
    """All rows but how long each took, which says nothing of the kernel."""
    return Record(
        COMMAND,
        {"capabilities": sorted({row["capability"] for row in rows})},
        {"kernels": [{name: value for name, value in row.items() if name != "seconds"} for row in rows]},
        dict.fromkeys(PREDICTED, "predicted"),
        ASSUMPTIONS,
        versions={**describe_versions(), "triton": importlib.metadata.version("triton")},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this; without a record")
    parser.add_argument("--out", type=Path, help="the record's path")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if options.only in case.name]
    rows = run(chosen, options.processes)
    if not options.only or options.out:
        record(rows).write(options.out or PATH)
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels compiled, {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
