"""What a user may choose about an uptraining, in one value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

from gqa.errors import GqaError

LEARNING_RATE = 2e-4
Train = Literal["all", "attention", "lora"]
Schedule = Literal["cosine", "constant", "linear"]
Precision = Literal["fp32", "bf16"]
TRAIN, SCHEDULES, PRECISIONS = get_args(Train), get_args(Schedule), get_args(Precision)

# What every job has always been told apart by; the rest is part of a job's identity where it is not the default.
_ALWAYS = ("distill_weight", "batch", "learning_rate", "seed")
_OTHERS = ("train", "schedule", "precision", "early_stop")


@dataclasses.dataclass(frozen=True)
class Settings:
    """distill_weight: w of `w * KL(parent || model) + (1 - w) * cross-entropy`. batch: windows per step, of all
    processes together. learning_rate: the peak. schedule: what follows a tenth of the steps of linear warm-up.

    train: which weights move: all, those of the attentions, or low-rank updates of the attentions' projections
    (lora_rank; merged into the weights at the end). precision: of the arithmetic, weights and moments are fp32 anyway;
    None is bf16 on a GPU that has it, else fp32. early_stop: see `gqa.uptrain.gap`. teacher_logits: a folder with the
    parent's top_k predictions, written if it is not there, read instead of running the parent if it is.

    These change memory and time, and the result only within rounding, so that an interrupted run may go on with
    others: micro_batch, the windows that go through the model at once in each process (None: all of its share of the
    batch); gradient_checkpointing; save_every, in steps (None: a fifth of all steps, at most 200; how often the gap is
    measured too, so that with early_stop it does count). tensorboard: a folder for its event files.
    """

    distill_weight: float = 0.7
    batch: int = 8
    learning_rate: float = LEARNING_RATE
    seed: int = 0
    schedule: Schedule = "cosine"
    train: Train = "all"
    lora_rank: int = 16
    precision: Precision | None = None
    early_stop: bool = False
    teacher_logits: Path | None = None
    top_k: int = 64
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    save_every: int | None = None
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.distill_weight <= 1:
            raise GqaError("the weight of the teacher is out of range", got=self.distill_weight, allowed="0 to 1")
        if not 0 < self.learning_rate < 1:
            raise GqaError("the learning rate is out of range", got=self.learning_rate, allowed="above 0 and below 1")
        for name, allowed in (("train", TRAIN), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise GqaError(f"an unknown choice of {name}", got=value, allowed=", ".join(allowed))
        for name, what in _POSITIVE.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GqaError(f"{what} is not positive", got=value, allowed="1 or more")

    def asked(self, *, teacher: bool) -> dict[str, Any]:
        """What of this decides the result, for a job's identity and its report."""
        default = Settings()
        told = {name: getattr(self, name) for name in _ALWAYS}
        told |= {name: getattr(self, name) for name in _OTHERS if getattr(self, name) != getattr(default, name)}
        if not teacher:
            told["distill_weight"] = 0.0
        elif self.teacher_logits is not None:
            told["top_k"] = self.top_k
        if self.train == "lora":
            told["lora_rank"] = self.lora_rank
        if self.early_stop and self.save_every is not None:
            told["save_every"] = self.save_every
        return told

    def interval(self, steps: int) -> int:
        """Steps between two checkpoints, of a run of this many."""
        return self.save_every or max(1, min(200, steps // 5))


_POSITIVE = {
    "batch": "a batch",
    "lora_rank": "the rank of the low-rank updates",
    "top_k": "a number of predictions",
    "micro_batch": "a micro-batch",
    "save_every": "a number of steps",
}
