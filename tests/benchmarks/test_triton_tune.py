"""The tuning of the tile table without a GPU: what is tried, what is chosen, what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gqa.bench.problem import Problem, random_inputs
from gqa.ops import triton_tiles
from gqa.ops.triton_tiles import Place, Tile, table, tile

pytest.importorskip("triton", reason="tuned are Triton's kernels")

PLACE = Place("decode", 90, 128, "16")


@pytest.fixture
def tune(script: Any) -> ModuleType:
    return script("triton_tune")


def test_candidates_are_few_and_the_present_tile_is_among_them(tune: ModuleType) -> None:
    for place, present in table().items():
        found = tune.candidates(place, present)
        assert present in found, place
        assert 2 <= len(found) <= 60, place
        assert len(set(found)) == len(found), place


def test_what_cannot_fit_is_not_tried(tune: ModuleType) -> None:
    forward = Place("forward", 90, 256, "16")
    assert tune.may_fit(forward, Tile(128, 64, 8, 2))
    assert not tune.may_fit(forward, Tile(128, 64, 4, 2))  # 256 registers of sums
    assert not tune.may_fit(forward, Tile(128, 128, 8, 3))  # 64 KiB of q, and 64 KiB of K and V each in two buffers
    assert not tune.may_fit(dataclasses.replace(forward, capability=89), Tile(64, 64, 8, 3))
    assert not tune.may_fit(dataclasses.replace(forward, head_dim=64, kind="32"), Tile(16, 16, 8, 2))  # a score each
    keys = Place("backward_keys", 90, 128, "16")
    assert tune.may_fit(keys, Tile(32, 128, 8, 2))
    assert not tune.may_fit(keys, Tile(32, 128, 4, 2))  # sums of dK and of dV


def row(name: str, seconds: float | None) -> dict[str, Any]:
    found = {"contender": name, "status": "wrong" if seconds is None else "timed", "reason": ""}
    return found if seconds is None else found | {"seconds_p50": seconds}


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"a": 1.0, "b": 0.9, "c": 0.95}, "b"),
        ({"a": 1.0, "b": 0.985}, "a"),  # chance
        ({"a": 1.0, "b": None}, "a"),
        ({"a": None, "b": 2.0, "c": 1.0}, "c"),
        ({"a": None, "b": None}, "a"),
    ],
)
def test_the_present_tile_stays_unless_another_is_faster(
    tune: ModuleType, seconds: dict[str, float | None], best: str
) -> None:
    assert tune.fastest([row(*item) for item in seconds.items()], "a") == best


def test_a_tile_is_tried_and_taken_back(tune: ModuleType) -> None:
    def now() -> Tile:
        return tile("decode", 90, 128, 128, torch.bfloat16, torch.bfloat16, 64)

    present = now()
    other = dataclasses.replace(present, block_keys=16, stages=5)
    with tune.tried(PLACE, other):
        assert now() == other
    assert now() == present


@pytest.mark.parametrize("kernel", triton_tiles.KERNELS)
def test_a_contender_s_launches_have_its_tile(tune: ModuleType, kernel: str) -> None:
    place = Place(kernel, 90, 64, "32")
    problem = Problem(4, 2, 16, 64, 1 if kernel == "decode" else 64, dtype="fp32", backward="backward" in kernel)
    rare = Tile(16, 128, 8, 5)
    with tune.tried(place, rare):
        launches, found = tune.plan(random_inputs(problem))
    names = {"backward_rows": "differentiate_rows", "backward_keys": "differentiate_keys"}
    (launch,) = (one for one in launches if one.kernel.fn.__name__ == names.get(kernel, "attend"))
    sizes = launch.arguments["BLOCK_ROWS"], launch.arguments["BLOCK_KEYS"], launch.warps, launch.stages
    assert sizes == dataclasses.astuple(rare)
    assert len(found) == (4 if problem.backward else 1)


def test_only_what_was_found_is_written(tune: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    before = tune.PATH.read_text("utf-8")
    path.write_text(before, "utf-8")
    tune.write(path, {})
    assert path.read_text("utf-8") == before
    tune.write(path, {PLACE: Tile(16, 32, 8, 5)})
    after = path.read_text("utf-8")
    changed = [(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 1
    found = json.loads(changed[0][1].rstrip(","))
    assert found == dataclasses.asdict(PLACE) | dataclasses.asdict(Tile(16, 32, 8, 5))


def test_a_dry_run_lists_what_would_be_tried(tune: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--only", "decode 128 bf16", "--capability", "80"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("decode 128 bf16: (")
    present = table()[Place("decode", 80, 128, "16")]
    assert str(dataclasses.astuple(present)) in line
