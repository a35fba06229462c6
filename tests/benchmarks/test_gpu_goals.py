"""The goals: met and missed by hand-made rows, and never met by what was not measured."""

import dataclasses

import pytest

from gqa.bench.kernels import OURS
from gqa.bench.problem import Problem

FULL = Problem(64, 8, 128, 8192, batch=32)
ALONE = Problem(32, 8, 128, 32768)
FORWARD = Problem(32, 8, 128, 4096, 4096, batch=4)
BACKWARD = Problem(32, 8, 128, 4096, 4096, batch=4, backward=True)
WIDE = Problem(64, 8, 128, 4096, 4096, batch=4, backward=True)


@pytest.fixture(scope="module")
def goals(script):
    return script("gpu_goals").goals


def row(problem, contender, times_of_gqa: float | None = 1.0, **more):
    common = dataclasses.asdict(problem) | {"contender": contender, "status": "timed", "seconds_p50": 1.0}
    return common | {"times_of_gqa": times_of_gqa} | more


def verdicts(goals, rows):
    return [goal.verdict for goal in goals(rows)]


def test_nothing_measured_is_nothing_met(goals):
    assert verdicts(goals, []) == ["not measured"] * 7


@pytest.mark.parametrize(
    ("index", "met", "missed"),
    [
        (0, [row(FULL, OURS, fraction_of_datasheet=0.88)], [row(FULL, OURS, fraction_of_datasheet=0.879)]),
        (1, [row(ALONE, "FlashInfer", 0.92)], [row(ALONE, "FlashInfer", 0.9), row(ALONE, "torch flash", 3.0)]),
        (2, [row(FULL, "torch cuDNN", 1.0)], [row(FULL, "torch cuDNN", 0.99), row(FULL, "torch flash", 2.0)]),
        (4, [row(FORWARD, "torch flash", 1.0)], [row(FORWARD, "torch flash", 0.98)]),
        (5, [row(BACKWARD, "torch flash", 1.2)], [row(BACKWARD, "torch flash", 0.8)]),
        (
            6,
            [row(WIDE, OURS, backward_extra_bytes=49), row(WIDE, "torch flash", backward_extra_bytes=100)],
            [row(WIDE, OURS, backward_extra_bytes=51), row(WIDE, "torch flash", backward_extra_bytes=100)],
        ),
    ],
)
def test_each_goal_can_be_met_and_missed(goals, index, met, missed):
    assert verdicts(goals, met)[index] == "yes"
    assert verdicts(goals, missed)[index] == "no"


@pytest.mark.parametrize(("seconds", "verdict"), [(0.28, "yes"), (0.29, "no"), (None, "not measured")])
def test_the_dial_pays(goals, seconds, verdict):
    stops = {32: 1.0, 8: seconds}
    rows = [
        row(Problem(32, kv_heads, 128, 32768, batch=16), OURS, seconds_p50=time)
        for kv_heads, time in stops.items()
        if time is not None
    ]
    assert verdicts(goals, rows)[3] == verdict


def test_ours_that_is_wrong_meets_nothing(goals):
    assert verdicts(goals, [row(FULL, OURS)])[0] == "not measured"  # a GPU without a datasheet
    ours = row(FULL, OURS) | {"status": "wrong"}
    peer = row(FULL, "torch flash", None)  # there is no time of ours to compare with
    found = verdicts(goals, [ours, peer])
    assert (found[0], found[2]) == ("no", "no")


def test_other_dtypes_and_our_own_variants_do_not_count(goals):
    rows = [
        row(dataclasses.replace(FULL, dtype="fp32"), OURS, fraction_of_datasheet=0.1),
        row(ALONE, "gqa, paged", 0.5),
        row(FULL, "torch folded", 0.5),
    ]
    assert verdicts(goals, rows) == ["not measured"] * 7
