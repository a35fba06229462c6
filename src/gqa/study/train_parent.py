"""Train a small parent from nothing: a byte-level tokenizer, a model, Muon and AdamW, resumable from its checkpoints.

`benchmarks/quality/train_parent.py` made the parent that the package ships with it; tests and benchmarks train others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.record import write_text_atomic
from gqa.source import write_legacy_keys
from gqa.study.embedded import METADATA, Parent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_END_OF_TEXT = "<|endoftext|>"
_LOSSES = "losses.jsonl"
_PLAN = "plan.json"
_EVERY = 10  # steps whose mean loss is one line


@dataclasses.dataclass(frozen=True)
class ParentRecipe:
    """All numbers that decide a parent, beside its text. Defaults: the parent that the package ships.

    model_type and kv_heads (0: as many as query heads) make parents of other kinds, for comparison: qwen3 has a norm
    of every query and key head, and biases here. window, batch: tokens of a window, windows of a step.
    matrix_learning_rate is Muon's, for all matrices of the layers; learning_rate is AdamW's, for the embedding and the
    norms. decay_share: the last part of the steps, in which both fall linearly to zero. attention: the implementation
    that computes attention in training, by its name in transformers.
    """

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 640
    layers: int = 6
    heads: int = 8
    model_type: Literal["llama", "qwen3"] = "llama"
    kv_heads: int = 0
    window: int = 256
    batch: int = 16
    steps: int = 3000
    matrix_learning_rate: float = 0.02
    learning_rate: float = 5e-3
    warmup_steps: int = 60
    decay_share: float = 0.4
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_steps: int = 100
    attention: str = "sdpa"


def learning_rate_factor(step: int, recipe: ParentRecipe) -> float:
    """The schedule: linear warm-up, constant, then linearly to zero. 1 is the recipe's learning rate.

    Until the fall begins it does not depend on `steps`, which may therefore still be lowered or raised.
    """
    warmup = (step + 1) / max(1, recipe.warmup_steps)
    fall = (recipe.steps - step) / max(1.0, recipe.decay_share * recipe.steps)
    return min(1.0, warmup, fall)


def train_parent(
    recipe: ParentRecipe,
    texts: Sequence[str],
    folder: Path,
    progress: Progress = silent,
    device: str = "cpu",
) -> Parent:
    """Train a parent on texts, one per file, and write it to `folder`, a transformers folder with its tokenizer.

    Matrix products are in bf16, weights in fp32. `folder`.partial holds a checkpoint of every `checkpoint_steps` steps
    and the losses as JSON lines; `folder` appears whole by a rename. A training that was killed resumes from its last
    checkpoint and ends with the same weights. Where `folder` holds this parent, nothing is done.
    Raises GqaError if `folder` or `folder`.partial belongs to another recipe or text.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    plan = {"recipe": dataclasses.asdict(recipe), "text_sha256": digest.hexdigest()}
    working = folder.with_name(folder.name + ".partial")
    for path in (folder / METADATA, working / _PLAN):
        if path.exists() and not plan.items() <= json.loads(path.read_text(encoding="utf-8")).items():
            raise GqaError("the folder holds another parent", got=path.parent, hint="choose another folder")
    if not folder.exists():
        working.mkdir(parents=True, exist_ok=True)
        write_text_atomic(working / _PLAN, json.dumps(plan))
        _train(recipe, texts, working, progress, device, plan)
        os.rename(working / "model", folder)
        shutil.rmtree(working)
    return Parent.read(folder)


def _train(
    recipe: ParentRecipe, texts: Sequence[str], working: Path, progress: Progress, device: str, plan: dict[str, Any]
) -> None:
    """Train in `working` until the finished model lies in `working`/model."""
    import torch
    from torch.nn.functional import cross_entropy

    from gqa.evaluate.load import quiet_transformers
    from gqa.model import hf

    hf.register()
    began = time.perf_counter()
    progress("tokenizer", 0, 1)
    tokenizer = _train_tokenizer(texts, recipe, working / "tokenizer.json")
    windows = _windows(texts, tokenizer, recipe)
    progress("tokenizer", 1, 1, f"{windows.size} tokens of training text")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: Any = _new_model(recipe).to(device)  # pyright: ignore[reportArgumentType]
    model.set_attn_implementation(recipe.attention)
    model.train()
    optimizers = _optimizers(model, recipe)
    first, losses, seconds_before = _resume(working, model, optimizers)
    recent: list[torch.Tensor] = []
    for step, batch in enumerate(_batches(windows, recipe)):
        if step < first:
            continue
        ids = torch.from_numpy(batch).to(device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, recipe)
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        with torch.autocast(device, torch.bfloat16):  # for Muon's products
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad()
        recent.append(loss.detach())
        done = step + 1
        if done % _EVERY == 0 or done == recipe.steps:
            spent = seconds_before + time.perf_counter() - began
            losses.append({"step": done, "loss_nats": torch.stack(recent).mean().item(), "seconds": round(spent, 1)})
            recent.clear()
            (working / _LOSSES).write_text("".join(json.dumps(row) + "\n" for row in losses), encoding="utf-8")
            progress("training the parent", done, recipe.steps, f"loss {losses[-1]['loss_nats']:.2f}")
        if done % recipe.checkpoint_steps == 0 and done < recipe.steps:
            spent = seconds_before + time.perf_counter() - began
            _save_state(working, model, optimizers, done, losses, spent)

    model.eval()
    folder = working / "model"
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_legacy_keys(folder)
    last = losses[-max(1, len(losses) // 20) :]
    facts: dict[str, Any] = plan | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": recipe.steps * recipe.batch * recipe.window,
        "train_text_tokens": int(windows.size),
        "train_seconds": seconds_before + time.perf_counter() - began,
        "final_loss_nats": sum(row["loss_nats"] for row in last) / len(last),
        "windows_sha256": hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest(),
        "losses": losses,
    }
    write_text_atomic(folder / METADATA, json.dumps(facts, indent=2) + "\n")


def _train_tokenizer(texts: Sequence[str], recipe: ParentRecipe, path: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be encoded. It is kept in `path`, as its training may take minutes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=[_END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        write_text_atomic(path, bpe.to_str())
    bpe = Tokenizer.from_file(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        model_max_length=recipe.window,
        clean_up_tokenization_spaces=False,
    )


def _windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: ParentRecipe) -> np.ndarray:
    """All train files one after another as windows (N, window). Encoded file by file, on all cores."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.concatenate([np.asarray(file_ids, dtype=np.int64) for file_ids in encoded])
    count = len(ids) // recipe.window
    if count < recipe.batch:
        raise GqaError("the training text is too short", got=f"{count} windows", allowed=f"{recipe.batch} or more")
    return ids[: count * recipe.window].reshape(count, recipe.window)


def _batches(windows: np.ndarray, recipe: ParentRecipe) -> Iterator[np.ndarray]:
    """`steps` batches (batch, window): every window once in random order, then all again in another order."""
    random = np.random.default_rng(recipe.seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order = random.permutation(len(windows))
        yield windows[order[: recipe.batch]]
        order = order[recipe.batch :]


def _new_model(recipe: ParentRecipe) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        recipe.model_type,
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads or recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        attention_bias=recipe.model_type == "qwen3",
        max_position_embeddings=recipe.window,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def _optimizers(model: PreTrainedModel, recipe: ParentRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for the embedding and the norms."""
    import torch

    from gqa.convert.muon import Muon

    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or "embed" in name else matrices).append(parameter)
    optimizers = [
        Muon(matrices, recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _save_state(
    working: Path, model: Any, optimizers: list[Any], step: int, losses: list[dict[str, Any]], seconds: float
) -> None:
    import torch

    temporary = working / "state.pt.tmp"
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "losses": losses,
        "seconds": seconds,
    }
    torch.save(state, temporary)
    os.replace(temporary, working / "state.pt")


def _resume(working: Path, model: Any, optimizers: list[Any]) -> tuple[int, list[dict[str, Any]], float]:
    """Load the last checkpoint, if there is one: (steps done, their losses, seconds they took)."""
    import torch

    path = working / "state.pt"
    if not path.exists():
        return 0, [], 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["losses"], state["seconds"]
