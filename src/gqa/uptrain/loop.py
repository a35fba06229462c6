"""Uptraining: transformers' Trainer, from a model folder to a new one, resumable after a kill."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from gqa.errors import GqaError
from gqa.evaluate.load import load_model, quiet_transformers
from gqa.evaluate.perplexity import check_windows
from gqa.progress import Progress, silent
from gqa.record import write_text_atomic
from gqa.uptrain.data import WindowDataset
from gqa.uptrain.distill import distillation_loss
from gqa.uptrain.folder import Job, begin, find_job, finish, read_report
from gqa.weights.reader import Checkpoint

LEARNING_RATE = 2e-4
_TRACE = "gqa_trace.json"  # written last into a checkpoint: one that has it is complete
_RECENT = 10  # steps behind a reported final loss


def uptrain(
    model_folder: Path | str,
    out: Path | str,
    *,
    windows: np.ndarray,
    parent_folder: Path | str | None = None,
    distill_weight: float = 0.7,
    batch: int = 8,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a model once over `windows` (N, T), in their order, and write it to the new folder `out`.

    With a parent the loss is `w * KL(parent || model) + (1 - w) * cross-entropy`, w = distill_weight; without one it
    is plain continuation of the training. AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices), a tenth of the
    steps as linear warm-up, then a cosine to zero. The weights are trained in fp32, on a GPU with bf16 arithmetic, and
    written in the dtype that was stored.

    Work in progress lies beside `out`, in `out`.partial, and `out` appears whole by a rename. Called again after a
    kill with the same arguments it goes on from the last complete checkpoint; called once more after the end it only
    returns the report again.

    Returns steps, tokens, seconds, final_cross_entropy_nats, final_kl_to_parent_nats (None without a parent; both are
    means over the last 10 steps, on training text), and what was asked.
    Raises GqaError for folders that do not load, windows that do not fit, and an `out` that is something else.
    """
    model_folder, out = Path(model_folder), Path(out)
    parent_folder = None if parent_folder is None else Path(parent_folder)
    _check(distill_weight, batch, learning_rate)
    if len(windows) < batch:
        raise GqaError("less text than one batch", got=f"{len(windows)} windows", allowed=f"{batch} or more")
    source = Checkpoint(model_folder)
    asked = {
        "distill_weight": distill_weight if parent_folder else 0.0,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    job = find_job(source, None if parent_folder is None else Checkpoint(parent_folder), windows, asked, out)
    if job.done:
        return read_report(out)

    model = load_model(model_folder, dtype=torch.float32)  # in half precision small updates would vanish
    parent = None if parent_folder is None else load_model(parent_folder)
    vocabulary = model.config.get_text_config().vocab_size
    check_windows(windows, vocabulary, "the model")
    if parent is not None and parent.config.get_text_config().vocab_size != vocabulary:
        raise GqaError(
            "the parent has another vocabulary than the model",
            got=f"{parent.config.get_text_config().vocab_size} entries",
            allowed=f"{vocabulary} entries",
        )
    begin(job, source)
    trace = _train(model, parent, windows, job, asked, progress)
    recent = trace["recent"]
    kls = [kl for _, kl in recent if kl is not None]
    report = {
        "model": model_folder.name,
        "parent": None if parent_folder is None else parent_folder.name,
        **asked,
        "window": int(windows.shape[1]),
        "steps": len(windows) // batch,
        "tokens": len(windows) // batch * batch * int(windows.shape[1]),
        "seconds": trace["seconds"],
        "final_cross_entropy_nats": sum(entropy for entropy, _ in recent) / len(recent),
        "final_kl_to_parent_nats": sum(kls) / len(kls) if kls else None,
    }
    finish(model, source, job, report)
    return report


class _Trainer(Trainer):
    """A Trainer with our loss, which keeps the last few losses and the time spent."""

    def __init__(self, *args: Any, parent: PreTrainedModel | None, distill_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parent = None if parent is None else parent.requires_grad_(False).eval()
        self.distill_weight = distill_weight
        self.trace: dict[str, Any] = {"seconds": 0.0, "recent": []}
        self.model_accepts_loss_kwargs = False  # the loss is a mean per token, made here and not by the model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        teacher_logits = None
        if self.parent is not None:
            with torch.no_grad():
                teacher_logits = self.parent(input_ids=ids, use_cache=False).logits
        logits = model(input_ids=ids, use_cache=False).logits
        loss, entropy, kl = distillation_loss(logits, ids, teacher_logits, self.distill_weight)
        self.trace["recent"] = [
            *self.trace["recent"][1 - _RECENT :],
            (entropy.item(), None if kl is None else kl.item()),
        ]
        return loss


class _Watch(TrainerCallback):
    """Tells the progress, and marks a checkpoint as complete once all of it is on the disk."""

    def __init__(self, trace: dict[str, Any], progress: Progress) -> None:
        self._trace, self._progress = trace, progress
        self._began = time.perf_counter() - trace["seconds"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trace["seconds"] = time.perf_counter() - self._began
        entropy, _ = self._trace["recent"][-1]
        self._progress("uptraining", state.global_step, state.max_steps, f"cross-entropy {entropy:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_text_atomic(checkpoint / _TRACE, json.dumps(self._trace))


def _train(
    model: PreTrainedModel,
    parent: PreTrainedModel | None,
    windows: np.ndarray,
    job: Job,
    asked: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Run or resume the Trainer; returns its trace."""
    steps = len(windows) // asked["batch"]
    checkpoints = job.working / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=asked["batch"],
        max_steps=steps,
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=asked["seed"],
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=max(1, min(200, steps // 5)),
        save_total_limit=2,
        use_cpu=model.device.type == "cpu",
        bf16=model.device.type == "cuda" and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=model.device.type != "cpu",
    )
    with quiet_transformers():
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=WindowDataset(windows),
            parent=parent,
            distill_weight=asked["distill_weight"],
        )
        trainer.remove_callback(PrinterCallback)
        last = _last_checkpoint(checkpoints)
        if last is not None:
            trainer.trace.update(json.loads((last / _TRACE).read_text(encoding="utf-8")))
        trainer.add_callback(_Watch(trainer.trace, progress))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer.trace


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that a kill left incomplete are deleted."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _TRACE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _check(distill_weight: float, batch: int, learning_rate: float) -> None:
    if not 0 <= distill_weight <= 1:
        raise GqaError("the weight of the teacher is out of range", got=distill_weight, allowed="0 to 1")
    if batch < 1:
        raise GqaError("a batch is not positive", got=batch, allowed="1 or more")
    if not 0 < learning_rate < 1:
        raise GqaError("the learning rate is out of range", got=learning_rate, allowed="above 0 and below 1")
