"""Uptraining curves: what a little more training gives each way to begin, what a step of it costs, what is recalled.

    python benchmarks/uptraining.py                          everything: about an hour on 2 cores
    python benchmarks/uptraining.py --parts curve --methods mean svd+refine --alphas 0 0.05

curve: a parent that is trained for minutes (8 KV heads) converted to 2 and 1 in every way, then trained on alpha of the
parent's own training tokens, with the parent as teacher; the control is the parent itself, trained on the same tokens
with the same schedule. Each alpha is a run of its own, as the learning rate falls to zero at the end of each. A seed
decides which windows are trained on and in which order, which head `random` takes and the order of refinement's text;
the parent, the text and the test windows are the same for all seeds, and so are the conversions that do not depend on
chance.
cost: seconds of a training step over the dial, in turns, and its FLOPs as the planner predicts them.
recall: numbers that are found again, and loss over the context, of a parent trained to recall and its children.
The record is written a row at a time; rows that are in it already are kept. Models lie in --work meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from session import RESULTS, WORK, slug
from uptraining_cost import step_rows
from uptraining_recall import look_back

from gqa.bench.document import record
from gqa.config import kv_head_choices, parse_config
from gqa.convert.recipe import BASELINES, Recipe, make_recipe
from gqa.convert.run import convert
from gqa.evaluate import load_model
from gqa.evaluate.perplexity import mean_and_error, token_losses
from gqa.record import describe_machine, read_record, write_text_atomic
from gqa.source import open_checkpoint
from gqa.study.corpus import StudyText, from_corpus
from gqa.study.embedded import Parent, stdlib_corpus
from gqa.study.train_parent import ParentRecipe, train_parent
from gqa.text import read_text
from gqa.uptrain import Settings, training_windows, uptrain

COMMAND = "benchmark uptraining"
PARENT = ParentRecipe(vocabulary=2048, intermediate=512, batch=8, steps=300, warmup_steps=20)
WINDOWS = 128  # of calibration, and of test
CONTROL, TAUGHT = "control", "control with teacher"
METHODS = ("svd+refine", "mean", "svd", "procrustes", "first", "random")
BY_CHANCE = ("svd+refine", "random")  # whose conversion a seed changes
ALPHAS = (0.05, 0.0, 0.1, 0.02, 0.01)  # in the order of work: what the claims are made of comes first
BOUNDS = {2: 1.01, 1: 1.02}  # KV heads -> the most times the control's perplexity, at CLAIMED
CLAIMED = 0.05
BATCH = 8
PARTS = ("curve", "cost", "recall")
REPEATS = 12  # of a training step, whose time is their median
ABOUT = (
    "times_control: perplexity as a multiple of the control's, which is the parent trained on the tokens of the same"
    " seed and alpha without a teacher, at alpha 0 the parent itself; its standard error is paired over test windows.",
    "Children have the parent as teacher: 0.7 KL + 0.3 cross-entropy, AdamW at 2e-4, a tenth of the steps warm-up, then"
    " a cosine to zero; each alpha is a run of its own.",
    "A seed decides the training windows and their order, the head that `random` takes and the order of refinement's"
    " text. The parent and the test windows are the same, so the spread is not that over parents.",
)


@dataclasses.dataclass
class Run:
    """The record's rows so far, and where it lies."""

    path: Path
    inputs: dict[str, Any]
    results: dict[str, Any]

    def write(self) -> None:
        rows = self.results.get("uptraining", [])
        self.results |= {"spread": spreads(rows), "verdict": verdicts(rows)}
        record(COMMAND, self.inputs, self.results, ABOUT, ("accelerate",)).write(self.path)


def begin(path: Path, inputs: dict[str, Any]) -> Run:
    """The run whose record lies there, or a new one."""
    if not path.exists():
        return Run(path, inputs, {})
    earlier = read_record(path, COMMAND)
    strange = sorted(name for name, value in inputs.items() if earlier.inputs.get(name) != value)
    if strange:
        sys.exit(f"error: {path.name} is a record of others: {', '.join(strange)}\nhint: --out another.json")
    return Run(path, inputs, dict(earlier.results))


class Bench:
    """A parent, its text, and the models made of it, which lie in `work` as long as they are needed."""

    def __init__(self, parent: Parent, text: StudyText, windows: int, work: Path) -> None:
        self.parent, self.text, self.windows, self.work = parent, text, windows, work
        self.test = torch.from_numpy(text.test[:windows])
        self._digest = hashlib.sha256(text.test[:windows].tobytes()).hexdigest()[:8]

    @cached_property
    def parent_losses(self) -> torch.Tensor:
        return self.remembered("parent", lambda: self.parent.folder)

    def row(self, kv_heads: int, method: str, seed: int, alpha: float) -> dict[str, Any]:
        """The figures of one model: converted, trained, evaluated."""
        chance = seed if method in BY_CHANCE or self.tokens(alpha) else 0
        name = f"kv{kv_heads}-{slug(method)}-s{chance}-a{alpha:g}"
        told: dict[str, Any] = {}

        def made() -> Path:
            start = self.parent.folder if method in (CONTROL, TAUGHT) else self.converted(kv_heads, method, seed)
            return self.trained(start, name, seed, alpha, method != CONTROL, told)

        losses = self.remembered(name, made)
        against = self.control_losses(seed, alpha)
        mean, error = mean_and_error(losses)
        above, above_error = mean_and_error(losses - self.parent_losses)
        apart, apart_error = mean_and_error(losses - against)
        times = math.exp(apart)
        return {
            "kv_heads": kv_heads,
            "method": method,
            "seed": seed,
            "alpha": alpha,
            "train_tokens": self.tokens(alpha),
            "cross_entropy_nats_per_token": mean,
            "standard_error_nats": error,
            "perplexity": math.exp(mean),
            "loss_above_parent_nats": above,
            "loss_above_parent_standard_error_nats": above_error,
            "times_control": times,
            "times_control_standard_error": None if apart_error is None else times * apart_error,
            "uptrain_seconds": told.get("seconds"),
        }

    def control_losses(self, seed: int, alpha: float) -> torch.Tensor:
        if not self.tokens(alpha):
            return self.parent_losses
        name = f"kv{PARENT.heads}-{CONTROL}-s{seed}-a{alpha:g}"
        return self.remembered(name, lambda: self.trained(self.parent.folder, name, seed, alpha, False, {}))

    def tokens(self, alpha: float) -> int:
        per_step = BATCH * self.test.shape[1]
        return round(alpha * self.parent.train_tokens / per_step) * per_step

    def converted(self, kv_heads: int, method: str, seed: int) -> Path:
        seed = seed if method in BY_CHANCE else 0
        folder = self.work / f"kv{kv_heads}-{slug(method)}-s{seed}"
        calibration = self.text.calibration[: self.windows]
        recipe = recipe_of(method, kv_heads, calibration, seed)
        convert(open_checkpoint(str(self.parent.folder)), folder, recipe, calibration)
        return folder

    def trained(self, start: Path, name: str, seed: int, alpha: float, teacher: bool, told: dict[str, Any]) -> Path:
        if not self.tokens(alpha):
            return start
        told |= uptrain(
            start,
            self.work / name,
            windows=training_windows(self.text.train, self.tokens(alpha), BATCH, seed),
            parent_folder=self.parent.folder if teacher else None,
            settings=Settings(batch=BATCH, seed=seed),
        )
        return self.work / name

    def remembered(self, name: str, made: Callable[[], Path]) -> torch.Tensor:
        """Cross-entropy of each test window (N,), from a former run or now; a trained model is then deleted."""
        path = self.work / "losses" / f"{name}-{self._digest}.json"
        if not path.exists():
            folder = made()
            losses = window_losses(folder, self.test)
            write_text_atomic(path, json.dumps(losses.tolist()) + "\n")
            if folder == self.work / name:
                shutil.rmtree(folder)
        return torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64)


def recipe_of(method: str, kv_heads: int, calibration: np.ndarray, seed: int) -> Recipe:
    """As `gqa study` converts: the published baselines without text, the others fitted to it."""
    name, _, refined = method.partition("+")
    return make_recipe(
        kv_heads,
        name,  # type: ignore[arg-type]
        calibration_tokens=0 if name in BASELINES else calibration.size,
        refine_tokens=calibration.size if refined else 0,
        window=calibration.shape[1],
        seed=seed,
    )


@torch.inference_mode()
def window_losses(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    model = load_model(folder).eval()
    pieces = [token_losses(model(input_ids=ids, use_cache=False).logits, ids) for ids in windows.split(BATCH)]
    return torch.cat(pieces).mean(1)


def curve(run: Run, bench: Bench, kv_heads: Sequence[int], chosen: argparse.Namespace) -> None:
    """Every row that is not there yet, those behind the claims first."""
    rows: list[dict[str, Any]] = run.results.setdefault("uptraining", [])
    models = [(PARENT.heads, CONTROL), (PARENT.heads, TAUGHT)]
    models += [(n, method) for method in chosen.methods for n in kv_heads]
    jobs = [(n, method, seed, alpha) for alpha in chosen.alphas for seed in chosen.seeds for n, method in models]
    for done, (n, method, seed, alpha) in enumerate(jobs, start=1):
        key = {"kv_heads": n, "method": method, "seed": seed, "alpha": alpha}
        if (method == TAUGHT and alpha != CLAIMED) or any(key.items() <= row.items() for row in rows):
            continue
        rows.append(bench.row(n, method, seed, alpha))
        run.write()
        print(f"{done}/{len(jobs)} {line(rows[-1])}", file=sys.stderr, flush=True)


def cost(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a training step at every stop of the dial."""
    shape = parse_config(open_checkpoint(str(bench.parent.folder)).config, "parent")
    folders = {shape.kv_heads: bench.parent.folder}
    folders |= {n: bench.converted(n, "mean", 0) for n in kv_head_choices(shape.kv_heads)[::-1] if n < shape.kv_heads}
    count = min(repeats + 1, len(bench.text.train) // BATCH)
    return step_rows(folders, shape, np.split(bench.text.train[: count * BATCH], count), repeats)


def line(row: Mapping[str, Any]) -> str:
    error = row["times_control_standard_error"] or 0.0
    return (
        f"{row['kv_heads']} KV heads, {row['method']}, alpha {row['alpha']:g}, seed {row['seed']}: perplexity "
        f"{row['perplexity']:.2f}, {row['times_control']:.4f} ± {error:.4f} of the control's"
        + (f"; trained in {row['uptrain_seconds']:.0f} s" if row["uptrain_seconds"] else "")
    )


def spreads(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds, per model and alpha: mean, standard deviation, lowest and highest of perplexity and times_control."""
    groups: dict[tuple[int, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kv_heads"], row["method"], row["alpha"]), []).append(row)
    found = []
    for (kv_heads, method, alpha), of in sorted(groups.items(), key=lambda item: (-item[0][0], *item[0][1:])):
        summary: dict[str, Any] = {"kv_heads": kv_heads, "method": method, "alpha": alpha, "seeds": len(of)}
        for name in ("perplexity", "times_control"):
            values = [row[name] for row in of]
            summary |= {
                f"{name}_mean": statistics.fmean(values),
                f"{name}_deviation": statistics.stdev(values) if len(values) > 1 else None,
                f"{name}_low": min(values),
                f"{name}_high": max(values),
            }
        found.append(summary)
    return found


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether the refined children, uptrained, come as near to the control as they should, seed by seed; and how near
    they come to a control that had the parent as teacher, as they had."""
    claimed = [row for row in rows if row["alpha"] == CLAIMED]
    taught = {row["seed"]: row["perplexity"] for row in claimed if row["method"] == TAUGHT}
    found = []
    for kv_heads, bound in BOUNDS.items():
        of = [row for row in claimed if (row["kv_heads"], row["method"]) == (kv_heads, METHODS[0])]
        if not of:
            continue
        times = {str(row["seed"]): row["times_control"] for row in sorted(of, key=lambda row: row["seed"])}
        beside = [row["perplexity"] / taught[row["seed"]] for row in of if row["seed"] in taught]
        found.append(
            {
                "kv_heads": kv_heads,
                "method": METHODS[0],
                "alpha": CLAIMED,
                "bound": bound,
                "times_control_by_seed": times,
                "times_control_mean": statistics.fmean(times.values()),
                "times_taught_control_mean": statistics.fmean(beside) if beside else None,
                "within": statistics.fmean(times.values()) <= bound,
                "every_seed_within": max(times.values()) <= bound,
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options.add_argument("--kv-heads", nargs="+", type=int, default=[2, 1])
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS), help="of the parent's tokens")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--windows", type=int, default=WINDOWS, help="of calibration, and of test  [%(default)s]")
    options.add_argument("--repeats", type=int, default=REPEATS, help="training steps that are timed  [%(default)s]")
    options.add_argument(
        "--again", action="store_true", help="measure the cost anew, as on a machine that is quiet now"
    )
    options.add_argument("--work", type=Path, default=WORK / "uptraining", help="where models are kept  [%(default)s]")
    options.add_argument("--out", type=Path, help="the record's path")
    chosen = options.parse_args(arguments)
    machine = describe_machine()
    path = chosen.out or RESULTS / f"{machine['cores']}-core-{slug(str(machine['processor']))}-uptraining.json"
    corpus = stdlib_corpus()
    parent = train_parent(PARENT, [read_text([path]) for path in corpus.train], chosen.work / "trained-parent", tell)
    text = from_corpus(corpus, parent.folder, PARENT.window)
    inputs = {
        "parent": dataclasses.asdict(PARENT),
        "parent_train_tokens": parent.train_tokens,
        "window": PARENT.window,
        "test_tokens": text.test[: chosen.windows].size,
        "calibration_tokens": text.calibration[: chosen.windows].size,
        "batch_windows": BATCH,
    }
    run = begin(path, inputs)
    bench = Bench(parent, text, chosen.windows, chosen.work)
    if "curve" in chosen.parts:
        curve(run, bench, chosen.kv_heads, chosen)
    if "cost" in chosen.parts and (chosen.again or "cost" not in run.results):
        run.results["cost"] = cost(bench, chosen.repeats)
        run.write()
    if "recall" in chosen.parts:
        look_back(run, bench)
    print(f"wrote {path}", file=sys.stderr)


def tell(stage: str, done: int, total: int, note: str = "") -> None:
    if done % 50 == 0 or done == total:
        print(stage, f"{done}/{total}", note, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
