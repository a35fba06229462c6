"""Every GPU kernel in every tile of the table, compiled without a GPU: nothing spills, all of it fits.

The other tests run the kernels in Triton's interpreter; a process that compiles must not be told to, so there is one
for all of them.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqa.ops.triton_tiles import DECODE_ROWS, table
from gqa.record import Record, read_record

pytest.importorskip("triton", reason="compiled are Triton's kernels")

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
COMMAND = "benchmark triton-compile"
SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
KERNELS = {
    "forward": ("forward", "attend"),
    "decode": ("decode", "attend"),
    "backward_keys": ("backward", "differentiate_keys"),
    "backward_rows": ("backward", "differentiate_rows"),
}
KINDS = {"bf16": "16", "fp32": "32", "int8": "8"}
TILE = ("block_rows", "block_keys", "warps", "stages")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=SCRIPTS, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Record:
    path = tmp_path_factory.mktemp("compiled") / "record.json"
    run = python("triton_compile.py", "--out", str(path))
    assert run.returncode == 0, run.stderr[-8000:]
    return read_record(path, COMMAND)


def of_table(record: Record) -> dict[Any, list[dict[str, Any]]]:
    """Place of the table as a tuple -> the kernels compiled in its tile, without options."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for place in table():
        call, kernel = KERNELS[place.kernel]
        found[place] = [
            row
            for row in record.results["kernels"]
            if (row["call"], row["kernel"], row["option"]) == (call, kernel, "")
            and (row["capability"], row["head_dim"]) == (place.capability, place.head_dim)
            and KINDS[row["kv_dtype"]] == place.kind
        ]
    return found


def test_every_tile_of_the_table_is_compiled(compiled: Record) -> None:
    for place, rows in of_table(compiled).items():
        expected = [place.kernel == "decode" and least for least in DECODE_ROWS if least <= table()[place].block_rows]
        assert len(rows) == (len(expected) if place.kernel == "decode" else 1), place
        for row, least in zip(rows, expected, strict=False):
            tile = dataclasses.asdict(table()[place])
            if place.kernel == "decode":
                tile["block_rows"] = least
                if place.kind == "8" and least > DECODE_ROWS[0]:
                    tile["block_keys"] = min(64, tile["block_keys"])
            assert {name: row[name] for name in TILE} == tile, place


def test_nothing_spills_and_every_block_fits(compiled: Record) -> None:
    for row in compiled.results["kernels"]:
        exception = (row["kernel"], row["capability"], row["head_dim"]) == ("differentiate_keys", 90, 256)
        assert row["spills"] == row["stack_bytes"] == 0 or (exception and row["dtype"] != "fp32"), row
        assert row["registers"] <= 255, row
        assert row["registers"] * 32 * row["warps"] <= 65536, row
        assert row["shared_bytes"] <= SHARED_LIMITS[row["capability"]], row
        assert row["blocks_per_multiprocessor"] >= 1, row


def test_matrix_products_on_hopper_are_wgmma(compiled: Record) -> None:
    rows = [
        row
        for row in compiled.results["kernels"]
        if row["capability"] == 90 and row["dtype"] != "fp32" and row["call"] != "decode"
    ]
    kernels = {(row["kernel"], row["head_dim"]) for row in rows if "HGMMA" in row["matrix"]}
    dims = {row["head_dim"] for row in rows}
    assert {name for name, _ in kernels} == {"attend", "differentiate_keys", "differentiate_rows"}
    assert {(row["kernel"], row["head_dim"]) for row in rows} - kernels == {("differentiate_keys", 256)}
    assert {64, 96, 128, 256} <= dims


def test_decode_loads_keys_and_values_16_bytes_at_a_time(compiled: Record) -> None:
    rows = [row for row in compiled.results["kernels"] if row["call"] == "decode" and row["kernel"] == "attend"]
    assert len(rows) > 50
    for row in rows:
        assert row["load_bits"] == "128", row
        assert row["kv_bytes_in_flight_per_multiprocessor"] > 0, row


def test_every_option_is_compiled_for_hopper(compiled: Record, script: Any) -> None:
    options = script("triton_cases").OPTIONS
    found = {(row["call"], row["option"]) for row in compiled.results["kernels"] if row["capability"] == 90}
    assert found >= {(call, option) for call, some in options.items() for option in some}


def test_the_committed_record_is_of_this_table(compiled: Record) -> None:
    committed = read_record(SCRIPTS / "results/triton-compiled.json", COMMAND)
    names = ("call", "capability", "head_dim", "v_head_dim", "dtype", "kv_dtype", "rows", "option", "kernel", *TILE)
    ours, theirs = (
        [tuple(row[name] for name in names) for row in record.results["kernels"]] for record in (compiled, committed)
    )
    assert ours == theirs


def test_a_tile_that_is_too_large_is_told() -> None:
    # 128 x 128 sums in 4 warps are 128 registers of a thread, beside 64 scores; and 5 stages of 128 keys do not fit.
    script = (
        "import dataclasses\n"
        "from triton_cases import Case, plan\n"
        "from triton_compile import row_of\n"
        "case = Case('forward', 90, 128, 128, 'bf16', 'bf16', 2048, 'full')\n"
        "launch = plan(case)[0]\n"
        "for keys, warps, stages in ((64, 4, 2), (128, 8, 5)):\n"
        "    arguments = launch.arguments | {'BLOCK_ROWS': 128, 'BLOCK_KEYS': keys}\n"
        "    row = row_of(case, dataclasses.replace(launch, arguments=arguments, warps=warps, stages=stages))\n"
        "    print(row['faults'])\n"
    )
    run = python("-c", script)
    assert run.returncode == 0, run.stderr[-4000:]
    spilled, large = run.stdout.splitlines()
    assert "spills" in spilled
    assert "does not fit" in large
