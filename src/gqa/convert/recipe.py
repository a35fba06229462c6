"""What a conversion is to do, as data: checked, with defaults filled in, comparable and printable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal, get_args

from gqa.errors import GqaError

Method = Literal["svd", "procrustes", "mean", "first", "random"]
Grouping = Literal["search", "contiguous"]

METHODS: tuple[Method, ...] = get_args(Method)
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)

# Pooling as published (Ainslie et al. 2023, arXiv 2305.13245): neighbours share a head, nothing is fitted.
BASELINES = ("mean", "first", "random")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """kv_heads: H of the result. method: how the heads of a group become one. grouping: which heads share,
    `search`ed or `contiguous`. refit: fit W_q and W_k to the parent's scores and W_o to its attention output, by least
    squares. refine_tokens: tokens on which each attention is trained against the parent's (0: not at all), in
    `refine_steps` steps that begin at `refine_learning_rate`.
    calibration_tokens: tokens whose activations weigh the errors (0: none, no text is needed). window: tokens per
    window of that text. measure_tokens: further tokens, which no fit sees, on which parent and child are compared at
    the end (0: none).

    Raises GqaError for a value out of range, and where text is needed and there is none.
    """

    kv_heads: int
    method: Method = "svd"
    grouping: Grouping = "search"
    refit: bool = False
    refine_tokens: int = 0
    calibration_tokens: int = 0
    refine_steps: int = 120
    refine_learning_rate: float = 0.03
    window: int = 256
    measure_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("grouping", GROUPINGS)):
            if getattr(self, name) not in choices:
                raise GqaError(f"an unknown {name}", got=repr(getattr(self, name)), allowed=", ".join(choices))
        lowest = {
            "kv_heads": 1,
            "refine_tokens": 0,
            "refine_steps": 1,
            "calibration_tokens": 0,
            "window": 2,
            "measure_tokens": 0,
            "seed": 0,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise GqaError(f"{name.replace('_', ' ')} out of range", got=repr(value), allowed=f"{low} or more")
        if not 0 < self.refine_learning_rate < 1:
            raise GqaError("refine learning rate out of range", got=self.refine_learning_rate, allowed="0 to 1")
        if not self.calibration_tokens:
            for name, wanted in (("refit", self.refit), ("refine", self.refine_tokens)):
                if wanted:
                    raise GqaError(
                        f"{name} compares with the parent on text, and there is none",
                        hint="--calibrate FILE (any text like what the model will read)",
                    )
        for name in ("refine_tokens", "calibration_tokens", "measure_tokens"):
            if 0 < getattr(self, name) < self.window:
                raise GqaError(
                    f"{name.replace('_', ' ')} are fewer than one window",
                    got=getattr(self, name),
                    allowed=f"{self.window} or more",
                )

    @property
    def baseline(self) -> bool:
        """Pooling alone: W_q and W_o stay as they are, byte for byte."""
        fitted = self.refit or self.refine_tokens
        return self.method in BASELINES and self.grouping == "contiguous" and not fitted

    @property
    def windows(self) -> int:
        """How many windows of text the fits look at, in calibration or refinement."""
        return max(self.calibration_tokens, self.refine_tokens) // self.window

    @property
    def all_windows(self) -> int:
        """With those behind them that serve the comparison alone."""
        return self.windows + self.measure_tokens // self.window

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def hash(self) -> str:
        """The same for the same recipe, on every machine and in every version of Python."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def make_recipe(
    kv_heads: int,
    method: Method = "svd",
    *,
    grouping: Grouping | None = None,
    refit: bool | None = None,
    refine_tokens: int = 0,
    refine_steps: int = 120,
    calibration_tokens: int = 0,
    window: int = 256,
    measure_tokens: int = 0,
    seed: int = 0,
) -> Recipe:
    """A Recipe with what was not said filled in.

    svd and procrustes search the grouping and, where there is calibration text, refit W_q, W_k and W_o; mean, first
    and random are the published baselines: contiguous groups, nothing fitted.
    """
    baseline = method in BASELINES
    return Recipe(
        kv_heads=kv_heads,
        method=method,
        grouping=grouping or ("contiguous" if baseline else "search"),
        refit=(not baseline and calibration_tokens > 0) if refit is None else refit,
        refine_tokens=refine_tokens,
        refine_steps=refine_steps,
        calibration_tokens=calibration_tokens,
        window=window,
        measure_tokens=measure_tokens,
        seed=seed,
    )
