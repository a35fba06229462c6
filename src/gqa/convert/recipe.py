"""What a conversion is to do, as data: checked, with defaults filled in, comparable and printable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal, get_args

from gqa.errors import GqaError

Method = Literal["svd", "procrustes", "mean", "first", "random"]
Grouping = Literal["search", "contiguous"]
Precision = Literal["fp32", "bf16"]

METHODS: tuple[Method, ...] = get_args(Method)
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Pooling as published (Ainslie et al. 2023, arXiv 2305.13245): neighbours share a head, nothing is fitted.
BASELINES = ("mean", "first", "random")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """kv_heads: H of the result. method: how the heads of a group become one. grouping: which heads share,
    `search`ed or `contiguous`. refit: fit W_q and W_k to the parent's scores and W_o to its attention output, by least
    squares. refine_tokens: tokens on which each attention is trained against the parent's (0: not at all), in
    `refine_steps` steps that begin at `refine_learning_rate`.
    distill_tokens: tokens of the distillation, in which all attentions are trained together against the parent's
    predictions (0: none), in windows of `distill_window`, `distill_batch` windows a step, at a peak rate of
    `distill_learning_rate`, with products in `distill_precision`.
    calibration_tokens: tokens whose activations weigh the errors (0: none, no text is needed). window: tokens per
    window of that text. measure_tokens: further tokens, which no fit sees, on which parent and child are compared at
    the end (0: none). answers: prompts that both answer at the end, and whose answers are compared (0: none).

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
    answers: int = 0
    distill_tokens: int = 0
    distill_window: int = 256
    distill_batch: int = 2
    distill_learning_rate: float = 5e-4
    distill_precision: Precision = "fp32"

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("grouping", GROUPINGS),
            ("distill_precision", PRECISIONS),
        ):
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
            "answers": 0,
            "distill_tokens": 0,
            "distill_window": 2,
            "distill_batch": 1,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise GqaError(f"{name.replace('_', ' ')} out of range", got=repr(value), allowed=f"{low} or more")
        for name in ("refine_learning_rate", "distill_learning_rate"):
            if not 0 < getattr(self, name) < 1:
                raise GqaError(f"{name.replace('_', ' ')} out of range", got=getattr(self, name), allowed="0 to 1")
        if 0 < self.distill_tokens < self.distill_batch * self.distill_window:
            raise GqaError(
                "the distillation has fewer tokens than one step",
                got=self.distill_tokens,
                allowed=f"{self.distill_batch * self.distill_window} or more",
            )
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
    def distill_windows(self) -> int:
        """How many windows the distillation reads: whole steps."""
        steps = round(self.distill_tokens / (self.distill_window * self.distill_batch))
        return (max(1, steps) if self.distill_tokens else 0) * self.distill_batch

    @property
    def without_distillation(self) -> Recipe:
        """The conversion that a distillation starts from."""
        return dataclasses.replace(self, distill_tokens=0, answers=0)

    @property
    def windows(self) -> int:
        """How many windows of text the fits look at, in calibration or refinement."""
        return max(self.calibration_tokens, self.refine_tokens) // self.window

    @property
    def all_windows(self) -> int:
        """With those behind them that serve the comparison alone."""
        return self.windows + self.measure_tokens // self.window

    def to_dict(self) -> dict[str, Any]:
        """As JSON; without the settings of a distillation and of answers where there are none, so that a recipe from
        before they existed reads the same."""
        fields = dataclasses.asdict(self)
        unused = {name for name in fields if name.startswith("distill_") and not self.distill_tokens}
        unused |= set() if self.answers else {"answers"}
        return {name: value for name, value in fields.items() if name not in unused}

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
    **others: Any,
) -> Recipe:
    """A Recipe with what was not said filled in.

    svd and procrustes search the grouping and, where there is calibration text, refit W_q, W_k and W_o; mean, first
    and random are the published baselines: contiguous groups, nothing fitted. others: `answers` and the `distill_`
    fields.
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
        **others,
    )
