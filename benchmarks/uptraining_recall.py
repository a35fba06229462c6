"""Recall and loss over the context, of a parent that can recall and of its children: a part of uptraining.py.

The curve's parent has read too little to find anything again, so this one is trained on the task itself: lines that
give a name a number, said again later, between lines of the standard library's text. Its names and numbers are other
draws than those of the evaluation. Contexts grow while it learns. Its children are converted and not trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import string
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from gqa.config import kv_head_choices
from gqa.convert.muon import Muon
from gqa.convert.recipe import BASELINES, make_recipe
from gqa.convert.run import convert
from gqa.evaluate import evaluate, load_model, remember
from gqa.evaluate.recall import recall
from gqa.quiet import quiet_transformers
from gqa.record import write_text_atomic
from gqa.source import open_checkpoint
from gqa.text import load_tokenizer

if TYPE_CHECKING:
    from uptraining import Bench, Run

FACTS = "recall-parent.json"
METHODS = ("mean", "svd", "svd+refine")
LOUD, QUIET = 5.0, 0.3  # weights in the loss: of a number that can be known, and of what cannot, beside text's 1
SAVE_EVERY = 50  # steps of training


@dataclasses.dataclass(frozen=True)
class Stage:
    """`steps` of `batch` windows of `window` tokens, with at most `pairs` names in each; text: the share of a window
    that is other text, on average."""

    steps: int
    window: int
    batch: int
    pairs: int
    text: float


@dataclasses.dataclass(frozen=True)
class RecallRecipe:
    """All numbers that decide the parent, and what is measured on it. lengths, depths, samples: as in `gqa eval
    --recall`; the longest is that of the windows whose loss is told by position."""

    hidden: int = 128
    layers: int = 3
    heads: int = 8
    head_dim: int = 16
    stages: tuple[Stage, ...] = (
        Stage(200, 66, 16, 2, 0.0),
        Stage(70, 128, 8, 4, 0.2),
        Stage(100, 256, 4, 6, 0.4),
        Stage(110, 512, 2, 6, 0.6),
    )
    rate: float = 0.02
    seed: int = 0
    calibration_windows: int = 128
    calibration_window: int = 256
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    samples: int = 32
    position_windows: int = 64


RECALL = RecallRecipe()


class Lessons:
    """Windows of lines and text to learn recall from."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, filler: np.ndarray, seed: int) -> None:
        self._tokenizer, self._filler = tokenizer, filler
        self._seed, self._random = seed, np.random.default_rng(seed)
        self._end = self._encode("\n")

    def batch(self, key: int, count: int, window: int, pairs: int, text: float) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and their weights in the loss, each (count, window); the same for the same key."""
        self._random = np.random.default_rng([self._seed, key])
        made = [self._window(window, pairs, text) for _ in range(count)]
        return np.stack([ids for ids, _ in made]), np.stack([weights for _, weights in made])

    def _window(self, window: int, pairs: int, text: float) -> tuple[np.ndarray, np.ndarray]:
        random = self._random
        coded = [self._pair() for _ in range(random.integers(max(1, pairs // 2), pairs + 1))]
        room = window * max(0.15, 1 - min(0.95, 2 * text * random.random()))
        lines: list[tuple[list[int], list[float]]] = []
        taken, said = 0, []
        while True:
            new = not said or (len(said) < len(coded) and random.random() < 0.5)
            which = len(said) if new else int(random.choice(said))
            name, number = coded[which]
            line = name + number + self._end
            if taken + len(line) > room and len(lines) > 1:
                break
            loud = [QUIET if new else LOUD] * len(number)
            lines.append((line, [QUIET] * len(name) + loud + [QUIET]))
            said += [which] if new else []
            taken += len(line)
        return self._spread(lines, window, max(0, window - taken) if text else 0)

    def _spread(
        self, lines: list[tuple[list[int], list[float]]], window: int, room: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The lines at random places of a stretch of text, or one after another at its start where there is no room."""
        cuts = np.sort(self._random.integers(0, room + 1, len(lines)))
        first = int(self._random.integers(0, len(self._filler) - window))
        text, before = self._filler[first : first + window].tolist(), 0
        ids: list[int] = []
        weights: list[float] = []
        for (line, loud), cut in zip(lines, cuts, strict=True):
            ids += text[before:cut] + line
            weights += [1.0] * (cut - before) + loud
            before = cut
        ids, weights = ids + text[before:], weights + [1.0] * (window - before)
        return np.array(ids[:window]), np.array(weights[:window], dtype=np.float32)

    def _pair(self) -> tuple[list[int], list[int]]:
        name = "v" + "".join(self._random.choice(list(string.ascii_lowercase), 4))
        return self._encode(f"\n{name} ="), self._encode(f" {self._random.integers(10_000, 100_000)}")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def look_back(run: Run, bench: Bench) -> None:
    """Fill in recall and positions of the parent and each child that are not there yet."""
    recipe = RECALL
    tokenizer = load_tokenizer(bench.parent.folder)
    filler = {part: getattr(bench.text, part).reshape(-1) for part in ("train", "calibration", "test")}
    parent = recall_parent(recipe, bench.parent.folder, tokenizer, filler["train"], bench.work)
    run.results["recall_parent"] = json.loads((parent / FACTS).read_text(encoding="utf-8"))
    rows, positions = (run.results.setdefault(name, []) for name in ("recall", "positions"))
    longest = recipe.lengths[-1]
    lessons = Lessons(tokenizer, filler["test"], recipe.seed + 2)
    windows, _ = lessons.batch(0, recipe.position_windows, longest, recipe.stages[-1].pairs, recipe.stages[-1].text)
    models = [(recipe.heads, "parent")]
    models += [(n, method) for n in kv_head_choices(recipe.heads)[::-1] if n < recipe.heads for method in METHODS]
    known = remember(load_model(parent), windows)
    for kv_heads, method in models:
        key = {"kv_heads": kv_heads, "method": method}
        if any(key.items() <= row.items() for row in positions):
            continue
        child = parent if method == "parent" else converted(recipe, parent, kv_heads, method, bench.work)
        model = load_model(child)
        asked: dict[str, Any] = {"lengths": recipe.lengths, "depths": recipe.depths, "samples": recipe.samples}
        found = recall(model, tokenizer, filler["test"], tasks=("passkey",), seed=recipe.seed, **asked)
        rows += [key | row for row in found]
        measured = evaluate(model, windows, parent=known, positions=True)
        positions += [key | row for row in measured["by_position"]]
        run.write()
        share = sum(row["accuracy"] for row in found) / len(found)
        print(f"recall, {kv_heads} KV heads, {method}: {share:.0%} of all", file=sys.stderr, flush=True)


def converted(recipe: RecallRecipe, parent: Path, kv_heads: int, method: str, work: Path) -> Path:
    """A child, calibrated on windows like those that the parent was trained on, of calibration text."""
    name, _, refined = method.partition("+")
    windows = np.load(parent / "calibration.npy")
    tokens = 0 if name in BASELINES else windows.size
    made = make_recipe(
        kv_heads,
        name,  # type: ignore[arg-type]
        calibration_tokens=tokens,
        refine_tokens=tokens if refined else 0,
        window=windows.shape[1],
    )
    out = work / f"{parent.name}-kv{kv_heads}-{method.replace('+', '-')}"
    convert(open_checkpoint(str(parent)), out, made, windows)
    return out


def recall_parent(
    recipe: RecallRecipe, tokenizer_of: Path, tokenizer: PreTrainedTokenizerBase, filler: np.ndarray, work: Path
) -> Path:
    """The trained parent's folder, from `work` or trained now; a killed training goes on at its last checkpoint."""
    key = hashlib.sha256(json.dumps([dataclasses.asdict(recipe), tokenizer_of.name]).encode()).hexdigest()[:8]
    folder = work / f"recall-{key}"
    if not (folder / FACTS).exists():
        working = folder.with_name(folder.name + ".partial")
        model, facts = train(recipe, Lessons(tokenizer, filler, recipe.seed), len(tokenizer), working)
        result = working / "model"
        with quiet_transformers():
            model.save_pretrained(result)
        tokenizer.save_pretrained(result)
        lessons = Lessons(tokenizer, filler, recipe.seed + 1)
        last = recipe.stages[-1]
        windows, _ = lessons.batch(0, recipe.calibration_windows, recipe.calibration_window, last.pairs, last.text)
        np.save(result / "calibration.npy", windows)
        write_text_atomic(result / FACTS, json.dumps(facts, indent=2) + "\n")
        result.rename(folder)
        shutil.rmtree(working)
    return folder


def train(
    recipe: RecallRecipe, lessons: Lessons, vocabulary: int, working: Path
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train from scratch, or from the last checkpoint in `working`. Returns the model and what it took."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=2 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=2 * max(recipe.lengths),
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=recipe.rate, weight_decay=0.1),
        torch.optim.AdamW(others, 5e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first, before = _resume(working, model, optimizers)
    began, loss = time.perf_counter(), math.nan
    stages = [stage for stage in recipe.stages for _ in range(stage.steps)]
    for step, stage in list(enumerate(stages))[first:]:
        ids, weights = map(torch.from_numpy, lessons.batch(step, stage.batch, stage.window, stage.pairs, stage.text))
        logits = model(input_ids=ids, use_cache=False).logits
        losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weighted = weights[:, 1:].flatten()
        ((losses * weighted).sum() / weighted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min((step + 1) / 20, 1.0, (len(stages) - step) / (0.4 * len(stages)))  # down over the last 40 %
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        known = losses[weighted == LOUD]
        loss = known.mean().item() if len(known) else loss
        if (step + 1) % SAVE_EVERY == 0:
            told = f"{step + 1}/{len(stages)} known numbers {loss:.2f} nats a token"
            print("training the parent that recalls", told, file=sys.stderr, flush=True)
            _save(working, model, optimizers, step + 1, before + time.perf_counter() - began)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": recipe.layers,
        "query_heads": recipe.heads,
        "head_dim": recipe.head_dim,
        "steps": len(stages),
        "train_tokens": sum(stage.steps * stage.batch * stage.window for stage in recipe.stages),
        "train_seconds": before + time.perf_counter() - began,
        "final_nats_of_known_numbers": loss,
    }
    return model.eval(), facts


def _save(working: Path, model: Any, optimizers: list[Any], step: int, seconds: float) -> None:
    working.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state | {"step": step, "seconds": seconds}, working / "state.tmp")
    (working / "state.tmp").replace(working / "state.pt")


def _resume(working: Path, model: Any, optimizers: list[Any]) -> tuple[int, float]:
    """Load the last checkpoint, if there is one: steps done and the seconds they took."""
    if not (working / "state.pt").exists():
        return 0, 0.0
    state = torch.load(working / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]
