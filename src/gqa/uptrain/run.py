"""Uptraining from a model folder to a new one, in one process or in all that torchrun started."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.errors import GqaError
from gqa.evaluate.load import load_model
from gqa.evaluate.perplexity import check_windows
from gqa.progress import Progress, silent
from gqa.quiet import quiet_transformers
from gqa.source import read_json
from gqa.uptrain import teacher as teachers
from gqa.uptrain.data import TrainingText
from gqa.uptrain.folder import Job, begin, find_job, finish, read_report
from gqa.uptrain.gap import measure_gap
from gqa.uptrain.loop import Loop, WholeModel, micro_batch, recompute_activations, use_half
from gqa.uptrain.parts import choose, write_back
from gqa.uptrain.processes import Processes, processes
from gqa.uptrain.settings import Settings
from gqa.uptrain.stream import StreamedText
from gqa.weights.reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def uptrain(
    model_folder: Path | str,
    out: Path | str,
    *,
    windows: np.ndarray | TrainingText | StreamedText,
    parent_folder: Path | str | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a model once over `windows` (N, T), in their order, and write it to the new folder `out`.

    With a parent the loss is `w * KL(parent || model) + (1 - w) * cross-entropy`, w = distill_weight; without one it
    is plain continuation of the training. AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices, gradients clipped
    to a norm of 1), a tenth of the steps as linear warm-up, then the schedule. The weights are trained in fp32 and
    written in the dtype that was stored; see `Settings` for the rest.

    Under torchrun every process calls this, and model, parent and moments are sharded over all of them (FSDP2). The
    batches, and so the losses, do not depend on the number of processes. `out` must be on a disk that all share.

    Work in progress lies beside `out`, in `out`.partial, and `out` appears whole by a rename. Called again after a
    kill with the same arguments, by any number of processes, it goes on from the last complete checkpoint; called once
    more after the end it only returns the report again.

    Returns steps, tokens, seconds, final_cross_entropy_nats, final_kl_to_parent_nats (None without a parent; both are
    means over the last 10 steps, on training text), stopped_early, held_out_gaps and what was asked.
    Raises GqaError for folders that do not load, windows that do not fit, and an `out` that is something else.
    """
    text = TrainingText.of(windows) if isinstance(windows, np.ndarray) else windows
    parent_folder = None if parent_folder is None else Path(parent_folder)
    world = processes()
    run = _Run(
        Path(model_folder),
        Path(out),
        text,
        parent_folder,
        settings or Settings(),
        world,
        progress if world.first else silent,
    )
    return run.work()


@dataclasses.dataclass
class _Run:
    folder: Path
    out: Path
    text: Any  # TrainingText, after a StreamedText has been read
    parent_folder: Path | None
    settings: Settings
    world: Processes
    progress: Progress
    owned: list[int] = dataclasses.field(default_factory=list)  # the handle of the working folder, in the first process

    def work(self) -> dict[str, Any]:
        try:
            return self._work()
        finally:
            for handle in self.owned:
                os.close(handle)

    def _work(self) -> dict[str, Any]:
        text, settings = self.text, self.settings
        micro_batch(settings, self.world)
        if isinstance(text, TrainingText) and len(text.order) < settings.batch:
            raise GqaError(
                "less text than one batch", got=f"{len(text.order)} windows", allowed=f"{settings.batch} or more"
            )
        held_out = text.held_out if isinstance(text, StreamedText) else len(text.held_out)
        if settings.early_stop and (self.parent_folder is None or not held_out):
            raise GqaError("an early stop needs a parent as teacher, and windows that are held out")
        source = Checkpoint(self.folder)
        parent = None if self.parent_folder is None else Checkpoint(self.parent_folder)
        asked = settings.asked(teacher=parent is not None)
        job = self.world.agree(lambda: find_job(source, parent, text, asked, self.out))
        if job.done:
            return read_report(self.out)

        model = self._load(self.folder, torch.float32)  # in half precision small updates would vanish
        vocabulary = model.config.get_text_config().vocab_size
        if isinstance(text, StreamedText):
            self.world.agree(lambda: self._pack(text, job, source))
            self.text = text.open(job.working)
        for piece in self.text.pieces():
            check_windows(piece, vocabulary, "the model")
        choose(model, read_json(self.folder / "config.json"), settings)
        teacher = None if parent is None else self._teacher(parent, vocabulary)
        self.world.agree(lambda: self._begin(job, source))
        weight = asked["distill_weight"]
        checkpoints = job.working / "checkpoints"
        with quiet_transformers():
            model.train()
            if settings.gradient_checkpointing:
                recompute_activations(model)
            half = use_half(settings, model.device)
            gap = None
            if teacher is not None:
                micro = micro_batch(settings, self.world)
                gap = lambda: measure_gap(model, teacher, self.text, micro, self.world, half=half)  # noqa: E731
            objective = WholeModel(model, teacher, weight, half)
            loop = Loop(objective, self.text, settings, checkpoints, self.world, self.progress, gap=gap)
            trace = loop.run()
        report = self._report(asked, trace, loop.steps)
        result = self._result(model)
        self.world.agree(lambda: finish(result, source, job, report))
        return report

    def _load(self, folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return load_model(folder, dtype=dtype, processes=self.world.count)

    def _begin(self, job: Job, source: Checkpoint) -> None:
        if not self.owned:
            self.owned.append(begin(job, source))

    def _pack(self, text: StreamedText, job: Job, source: Checkpoint) -> None:
        self._begin(job, source)
        try:
            text.pack(job.working, self.progress)
        except GqaError:
            shutil.rmtree(job.working)  # without windows there is nothing yet that could be gone on with
            raise

    def _teacher(self, source: Checkpoint, vocabulary: int) -> teachers.Teacher:
        """The parent, or what it wrote to the folder of settings.teacher_logits."""
        logits, k, world = self.settings.teacher_logits, self.settings.top_k, self.world
        if logits is not None and world.agree(lambda: teachers.is_stored(logits, source, self.text, k)):
            return teachers.stored_teacher(logits, self.text)
        parent = self._load(source.folder)
        entries = parent.config.get_text_config().vocab_size
        if entries != vocabulary:
            raise GqaError(
                "the parent has another vocabulary than the model",
                got=f"{entries} entries",
                allowed=f"{vocabulary} entries",
            )
        half = use_half(self.settings, parent.device)
        if logits is None:
            return teachers.live_teacher(parent, half=half)
        micro = micro_batch(self.settings, world)
        teachers.store(logits, parent, source, self.text, k, world, micro, self.progress, half=half)
        return teachers.stored_teacher(logits, self.text)

    def _result(self, model: PreTrainedModel) -> PreTrainedModel:
        """The trained model in one piece, in the first process."""
        if self.world.count == 1 and self.settings.train != "lora":
            return model
        fresh = load_model(self.folder, dtype=torch.float32, device="cpu") if self.world.first else None
        write_back(model, fresh)
        return model if fresh is None else fresh

    def _report(self, asked: dict[str, Any], trace: dict[str, Any], steps: int) -> dict[str, Any]:
        recent, tokens = trace["recent"], self.settings.batch * self.text.length
        kls = [kl for _, kl in recent if kl is not None]
        return {
            "model": self.folder.name,
            "parent": None if self.parent_folder is None else self.parent_folder.name,
            **asked,
            "window": self.text.length,
            "steps": trace["step"],
            "tokens": trace["step"] * tokens,
            "seconds": trace["seconds"],
            "final_cross_entropy_nats": sum(entropy for entropy, _ in recent) / len(recent),
            "final_kl_to_parent_nats": sum(kls) / len(kls) if kls else None,
            **(
                {}
                if not self.settings.early_stop
                else {
                    "held_out_gaps": [{"step": step, "kl_to_parent_nats": gap} for step, gap in trace["gaps"]],
                    "stopped_early": trace["step"] < steps,
                }
            ),
        }
