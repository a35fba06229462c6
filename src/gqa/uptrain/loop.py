"""The training itself: steps, checkpoints, and the figures of the way."""

# B windows of a batch, T tokens of a window

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from gqa.errors import GqaError, TrainingError
from gqa.progress import Progress
from gqa.uptrain.board import Board
from gqa.uptrain.checkpoints import last_checkpoint, load, save
from gqa.uptrain.data import TrainingText
from gqa.uptrain.distill import distillation_loss
from gqa.uptrain.gap import stalled
from gqa.uptrain.parts import average_gradients
from gqa.uptrain.processes import Processes
from gqa.uptrain.schedule import factor
from gqa.uptrain.settings import Settings
from gqa.uptrain.teacher import Teacher, arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECENT = 10  # steps behind a reported final loss
_WEIGHT_DECAY = 0.1  # of matrices, not of norms and biases
_MAX_GRADIENT_NORM = 1.0


def micro_batch(settings: Settings, world: Processes) -> int:
    """The windows that go through the model at once in each process. GqaError if a batch cannot be shared out so."""
    share, rest = divmod(settings.batch, world.count)
    if rest:
        raise GqaError(
            f"a batch cannot be shared out over {world.count} processes",
            got=f"{settings.batch} windows",
            allowed=f"a multiple of {world.count}",
        )
    micro = settings.micro_batch or share
    if share % micro:
        raise GqaError(
            "a batch is not a whole number of micro-batches",
            got=f"{micro} windows",
            allowed=f"a divisor of {share}, the windows of each process",
        )
    return micro


def use_half(settings: Settings, device: torch.device) -> bool:
    """Whether products are in bf16."""
    if settings.precision is None:
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.precision == "bf16"


class Objective(Protocol):
    """What a training minimises: one batch's gradients at a time."""

    @property
    def model(self) -> PreTrainedModel:
        """Its parameters that require gradients are trained."""
        ...

    @property
    def taught(self) -> bool:
        """Whether there is a parent, and so a KL."""
        ...

    def backward(self, places: np.ndarray, ids: torch.Tensor, scale: float) -> torch.Tensor:
        """Add the gradients of `scale` times the loss of windows ids (B, T), which lie at `places` in the text;
        returns cross-entropy and KL (2,), in nats per token, 0 for a KL that there is not."""
        ...


@dataclasses.dataclass
class WholeModel:
    """`weight * KL(teacher || model) + (1 - weight) * cross-entropy` of a model beside a teacher of its own."""

    model: PreTrainedModel
    teacher: Teacher | None
    weight: float
    half: bool

    @property
    def taught(self) -> bool:
        return self.teacher is not None

    def backward(self, places: np.ndarray, ids: torch.Tensor, scale: float) -> torch.Tensor:
        target = None if self.teacher is None else self.teacher(places, ids)
        with arithmetic(ids.device, half=self.half):
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss, entropy, kl = distillation_loss(logits, ids, target, self.weight)
        (loss * scale).backward()
        return torch.stack([entropy, entropy.new_zeros(()) if kl is None else kl])


class Loop:
    """One run over a text, from the last checkpoint in `folder` if there is one.

    gap: measures the distance to the parent on held-out text, for settings.early_stop. weight_decay: of matrices.
    """

    def __init__(
        self,
        objective: Objective,
        text: TrainingText,
        settings: Settings,
        folder: Path,
        world: Processes,
        progress: Progress,
        *,
        gap: Callable[[], float] | None = None,
        weight_decay: float = _WEIGHT_DECAY,
        stage: str = "uptraining",
    ) -> None:
        self.objective, self.model, self.text, self.settings = objective, objective.model, text, settings
        self.folder, self.world, self.progress, self.gap, self.stage = folder, world, progress, gap, stage
        model, self.micro = self.model, micro_batch(settings, world)
        self.steps = len(text.order) // settings.batch
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)
        self.trained = trained
        self.trace: dict[str, Any] = {"step": 0, "seconds": 0.0, "recent": [], "gaps": []}

    def run(self) -> dict[str, Any]:
        """Train to the end, or until the gap stalls; returns the trace: the number of `step`s, `seconds`, the `recent`
        cross-entropies and KLs, and the `gaps` on held-out text by step."""
        last = self.world.agree(lambda: last_checkpoint(self.folder))
        if last is not None:
            self.trace = load(last, self.model, self.optimizer, self.world)
        board = Board(self.settings.tensorboard if self.world.first else None, self.trace["step"])
        began = time.perf_counter() - self.trace["seconds"]
        interval = self.settings.interval(self.steps)
        while self.trace["step"] < self.steps and not stalled([gap for _, gap in self.trace["gaps"]]):
            rate = self.settings.learning_rate * factor(self.settings.schedule, self.trace["step"], self.steps)
            entropy, kl = self._step(self.trace["step"], rate)
            if not math.isfinite(entropy + (kl or 0.0)):
                raise self._diverged(last)
            step = self.trace["step"] + 1
            self.trace |= {"step": step, "recent": [*self.trace["recent"][1 - _RECENT :], (entropy, kl)]}
            board.write(step, cross_entropy=entropy, kl_to_parent=kl, learning_rate=rate)
            if step % interval == 0 or step == self.steps:
                if self.settings.early_stop:
                    self._measure(step, board)
                self.trace["seconds"] = time.perf_counter() - began
                save(self.folder, step, self.model, self.optimizer, self.trace, self.world)
                last = self.folder / f"checkpoint-{step}"
            figures = f"cross-entropy {entropy:.3f}" + ("" if kl is None else f", KL {kl:.4f}")
            self.progress(self.stage, step, self.steps, figures)
        board.close()
        return self.trace

    def _step(self, step: int, rate: float) -> tuple[float, float | None]:
        """One batch; returns its cross-entropy and KL, in nats per token, before the step."""
        B = self.settings.batch
        # A function of the step, so that dropout, where a model has any, goes on as if nothing had happened.
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * self.world.count + self.world.rank)
        mine = self.world.share(self.text.order[step * B : (step + 1) * B])
        parts = np.split(mine, len(mine) // self.micro)
        figures = torch.zeros(2, device=self.model.device)
        for places in parts:
            ids = self.text.ids(places).to(self.model.device)
            figures += self.objective.backward(places, ids, 1 / len(parts)) / len(parts)
        average_gradients(self.model, self.world)
        torch.nn.utils.clip_grad_norm_(self.trained, _MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        entropy, kl = self.world.mean(figures).tolist()
        return entropy, kl if self.objective.taught else None

    def _diverged(self, last: Path | None) -> TrainingError:
        kept = "no checkpoint was written yet" if last is None else f"the last good state is kept in {last}"
        return TrainingError(
            f"the loss of step {self.trace['step'] + 1} is not finite",
            got=f"{kept}; learning rate {self.settings.learning_rate:g}",
            hint="start again with a lower learning rate and another output, or in float32",
        )

    def _measure(self, step: int, board: Board) -> None:
        assert self.gap is not None
        gap = self.gap()
        self.trace["gaps"] = [*self.trace["gaps"], (step, gap)]
        board.write(step, held_out_gap=gap)


def recompute_activations(model: PreTrainedModel) -> None:
    """Have activations computed again in the backward pass. transformers renames this in version 6."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise GqaError("this architecture has no gradient checkpointing", got=str(error).splitlines()[0]) from None
