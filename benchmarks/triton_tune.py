"""Measure tile shapes of the GPU kernels on the GPU at hand, and write the fastest into the table.

    python benchmarks/triton_tune.py                          every row of this GPU's capability
    python benchmarks/triton_tune.py --only "decode 128"      rows whose name contains this
    python benchmarks/triton_tune.py --only ... --dry-run     what would be tried, without a GPU: --capability 90

Candidates take turns on cold K and V, each behind a check against float64, like the contenders of benchmarks/gpu.py.
Only rows of this capability change in src/gqa/ops/triton_tiles.json. Afterwards benchmarks/triton_compile.py says
whether any kernel spills in a tile that was chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from triton_chips import CHIPS

from gqa.bench.device import choose_device
from gqa.bench.gpu import measure_gpu
from gqa.bench.kernels import Contender, Ready, measure
from gqa.bench.problem import Inputs, Problem
from gqa.ops import gpu, gpu_grad, triton_tiles
from gqa.ops.launch import Launch
from gqa.ops.triton_tiles import CAPABILITIES, DECODE_ROWS, Place, Tile
from gqa.record import write_text_atomic

PATH = Path(triton_tiles.__file__).with_suffix(".json")
GAIN = 0.02  # by which a candidate must beat the present tile: less than that is chance
ELEMENT_BYTES = {"8": 1, "16": 2, "32": 4}
SUMS = 128  # registers of a thread, which has 255
DTYPES = {"8": "int8", "16": "bf16", "32": "fp32"}
SIZES = {"8": (16, 32, 64, 128), "16": (32, 64, 128), "32": (16, 32, 64)}  # of blocks, where rows do not say more
STAGES = {"forward": (2, 3), "decode": (2, 3, 4, 5), "backward_keys": (1, 2, 3), "backward_rows": (1, 2, 3)}
WARPS = (4, 8)


def candidates(place: Place, present: Tile) -> list[Tile]:
    """The tiles to try: those that may fit, among them the present one. The rows of decode are the call's own."""
    rows = (present.block_rows,) if place.kernel == "decode" else SIZES[place.kind]
    keys = (16, *SIZES["16"]) if place.kernel == "decode" else SIZES[place.kind]
    tiles = {Tile(*sizes) for sizes in itertools.product(rows, keys, WARPS, STAGES[place.kernel])}
    return sorted({tile for tile in tiles if may_fit(place, tile)} | {present}, key=dataclasses.astuple)


def may_fit(place: Place, tile: Tile) -> bool:
    """Whether sums take at most SUMS registers, scores 2 to 64 of a thread's (fewer would leave threads idle),
    and what is kept and what is on its way fits into shared memory."""
    kept, streamed = tile.block_rows, tile.block_keys
    sums, kept_tensors = 1, 1 if place.kernel in ("forward", "decode") else 2
    if place.kernel == "backward_keys":
        kept, streamed, sums = streamed, kept, 2
    if place.kernel == "decode":
        kept = DECODE_ROWS[0]
    threads = 32 * tile.warps
    element_bytes = ELEMENT_BYTES[place.kind]
    buffers = max(1, tile.stages - 1)
    shared = (kept_tensors * kept * max(2, element_bytes) + 2 * buffers * streamed * element_bytes) * place.head_dim
    return (
        sums * kept * place.head_dim <= threads * SUMS
        and 2 * threads <= kept * streamed <= 64 * threads
        and shared <= CHIPS[place.capability].shared_bytes_per_block
    )


def problem_for(place: Place) -> Problem:
    """A call on which the tiles of this place are timed: 32/8 heads, K and V beyond any cache, some milliseconds."""
    dtype, D = DTYPES[place.kind], place.head_dim
    if place.kernel == "decode":
        return Problem(32, 8, D, 8192, batch=32, dtype=dtype)
    return Problem(32, 8, D, 4096, 4096, dtype=dtype, backward=place.kernel.startswith("backward"))


@contextlib.contextmanager
def tried(place: Place, tile: Tile) -> Iterator[None]:
    """While this lasts, the table has the tile at this place."""
    table = triton_tiles.table()
    before = table[place]
    table[place] = tile
    triton_tiles.tile.cache_clear()
    try:
        yield
    finally:
        table[place] = before
        triton_tiles.tile.cache_clear()


def contender(place: Place, tile: Tile) -> Contender:
    """The call of `problem_for`, with this tile; of a backward pass only the kernel of the place."""

    def ready(inputs: Inputs) -> Ready:
        with tried(place, tile):
            launches, found = plan(inputs)
        for launch in launches:
            launch.run()
        names = {"backward_rows": "differentiate_rows", "backward_keys": "differentiate_keys"}
        timed = [launch for launch in launches if launch.kernel.fn.__name__ == names.get(place.kernel, "")] or launches

        def run() -> tuple[torch.Tensor, ...]:
            for launch in timed:
                launch.run()
            return found

        return Ready(run)

    return ready


def plan(inputs: Inputs) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """The launches of a problem's call, and where they write (out,) or (out, dq, dk, dv)."""
    problem, q, k, v = inputs.problem, inputs.q, inputs.k, inputs.v
    capability, multiprocessors = gpu.capability(q.device), gpu.multiprocessors(q.device)
    names = ("q_start", "q_starts", "window", "softcap", "mask", "sinks", "kv_lengths", "kv_starts")
    options: dict[str, Any] = dict.fromkeys((*names, "q_offsets", "k_offsets"))
    options |= {"causal": problem.causal, "scale": problem.head_dim**-0.5}
    of_forward = {"block_table": None, "k_scale": inputs.k_scale, "v_scale": inputs.v_scale, "want_lse": True}
    launches, out, lse = gpu.plan_forward(
        q, k, v, **options, **of_forward, capability=capability, multiprocessors=multiprocessors
    )
    if inputs.grad is None:
        return launches, (out,)
    backward, gradients = gpu_grad.plan_backward(q, k, v, out, lse, inputs.grad, None, **options, capability=capability)
    return [*launches, *backward], (out, *gradients[:3])


def fastest(rows: Sequence[Mapping[str, Any]], present: str) -> str:
    """The name of the contender with the least median; the present one unless another is faster by GAIN."""
    seconds = {row["contender"]: row["seconds_p50"] for row in rows if row["status"] == "timed"}
    best = min(seconds, key=seconds.__getitem__, default=present)
    if present in seconds and seconds[best] > (1 - GAIN) * seconds[present]:
        return present
    return best


def name_of(place: Place) -> str:
    return f"{place.kernel} {place.head_dim} {DTYPES[place.kind]}"


def write(path: Path, found: Mapping[Place, Tile]) -> None:
    """Put tiles into the table's file; its other rows stay as they are, in their order."""
    rows = json.loads(path.read_text("utf-8"))["rows"]
    names = [field.name for field in dataclasses.fields(Place)]
    for row in rows:
        tile = found.get(Place(*(row[name] for name in names)))
        row |= {} if tile is None else dataclasses.asdict(tile)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    write_text_atomic(path, f'{{"rows": [\n{lines}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name, such as 'decode 128 bf16', contains this")
    parser.add_argument("--dry-run", action="store_true", help="print what would be tried")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, default=90, help="for --dry-run")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    capability = options.capability
    if not options.dry_run:
        choose_device("cuda")
        capability = triton_tiles.nearest(gpu.capability(torch.device("cuda")))
        limits = measure_gpu()
    for place, present in triton_tiles.table().items():
        if place.capability != capability or options.only not in name_of(place):
            continue
        tiles = {str(dataclasses.astuple(tile)): tile for tile in candidates(place, present)}
        if options.dry_run:
            print(f"{name_of(place)}: {', '.join(tiles)}")
            continue
        contenders = {name: contender(place, tile) for name, tile in tiles.items()}
        rows = measure(problem_for(place), contenders, limits, repeats=options.repeats)
        for row in sorted(rows, key=lambda row: row.get("seconds_p50", float("inf"))):
            took = f"{row['seconds_p50'] * 1e6:.1f} us" if row["status"] == "timed" else row["reason"]
            print(f"{name_of(place)} {row['contender']}: {took}", file=sys.stderr, flush=True)
        best = fastest(rows, str(dataclasses.astuple(present)))
        write(PATH, {place: tiles[best]})
        print(f"{name_of(place)}: {best}, was {dataclasses.astuple(present)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
