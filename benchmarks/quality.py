"""What a conversion loses right after it, without any training, on parents of several kinds.

    python benchmarks/quality.py                              every parent, every stop of its dial, every method
    python benchmarks/quality.py --parents "the study's" --methods svd --kv-heads 1

Parents: the study's own, which the package ships; and two of about 4.5 million parameters that are trained for minutes
on the standard library's source text: a Llama, and a Qwen3 that is grouped already (8 query heads on 4 KV heads), with
biases and a norm of every query and key head. Calibration text has 32768 tokens, and for `svd, refined
longer`, which takes 240 steps a layer instead of 120, 196608; test text shares no file with it. The record is written a
row at a time; rows that are in it already are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from session import RESULTS, WORK, slug

from gqa.bench.document import record
from gqa.config import kv_head_choices, parse_config
from gqa.convert.recipe import Recipe, make_recipe
from gqa.convert.run import convert
from gqa.evaluate import evaluate, load_model, remember
from gqa.record import describe_machine, read_record
from gqa.source import open_checkpoint
from gqa.study.corpus import from_corpus
from gqa.study.embedded import Parent, embedded_parent, stdlib_corpus
from gqa.study.train_parent import ParentRecipe, train_parent
from gqa.text import read_text

SHORT = ParentRecipe(vocabulary=2048, intermediate=512, batch=8, steps=300, warmup_steps=20)
# None: the one that the package ships
PARENTS = {
    "the study's": None,
    "llama, 300 steps": SHORT,
    "qwen3, 300 steps": dataclasses.replace(SHORT, model_type="qwen3", kv_heads=4),
}
WINDOWS, WINDOW = 128, 256  # of calibration, and of test
TOKENS = WINDOWS * WINDOW
LONGER = 6  # times the text, in twice the steps
METHODS = ("mean", "procrustes", "svd without text", "svd", "svd, refined", "svd, refined longer")
ABOUT = (
    "loss_above_parent_nats is cross-entropy above the parent's on test text, its error paired over windows;"
    " share_of_mean_loss what that is of the loss of mean at the same setting.",
    "One seed each; no language-model training after the conversion.",
)


def parent_of(name: str, work: Path) -> Parent:
    recipe = PARENTS[name]
    if recipe is None:
        return embedded_parent()
    texts = [read_text([path]) for path in stdlib_corpus().train]
    return train_parent(recipe, texts, work / recipe.model_type, tell)


def recipe_of(method: str, kv_heads: int) -> Recipe:
    if method == "mean":
        return make_recipe(kv_heads, "mean")
    if method == "svd without text":
        return make_recipe(kv_heads)
    if method == "svd, refined longer":
        tokens = LONGER * TOKENS
        return make_recipe(kv_heads, calibration_tokens=tokens, refine_tokens=tokens, refine_steps=240)
    refined = TOKENS if method == "svd, refined" else 0
    name = "procrustes" if method == "procrustes" else "svd"
    return make_recipe(kv_heads, name, calibration_tokens=TOKENS, refine_tokens=refined)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--parents", nargs="+", default=list(PARENTS), choices=PARENTS, help="which parents")
    options.add_argument("--methods", nargs="+", default=list(METHODS[1:]), choices=METHODS[1:], help="beside mean")
    options.add_argument("--kv-heads", nargs="+", type=int, help="which stops of the dial  [every one]")
    options.add_argument("--work", type=Path, default=WORK / "quality", help="where parents are kept  [%(default)s]")
    options.add_argument("--out", type=Path, help="the record's path")
    chosen = options.parse_args(arguments)
    machine = describe_machine()
    path = chosen.out or RESULTS / f"{machine['cores']}-core-{slug(str(machine['processor']))}-quality.json"
    rows: list[dict[str, Any]] = list(read_record(path).results["quality"]) if path.exists() else []
    for name in chosen.parents:
        parent = parent_of(name, chosen.work)
        source = open_checkpoint(str(parent.folder))
        text = from_corpus(stdlib_corpus(), parent.folder, WINDOW)
        known = remember(load_model(parent.folder), text.test[:WINDOWS])
        have = parse_config(source.config, name).kv_heads
        for kv_heads in chosen.kv_heads or [n for n in reversed(kv_head_choices(have)) if n < have]:
            for method in ("mean", *chosen.methods):
                key = {"parent": name, "kv_heads_parent": have, "kv_heads": kv_heads, "method": method}
                if any(key.items() <= row.items() for row in rows):
                    continue
                with tempfile.TemporaryDirectory(prefix="gqa-quality-") as folder:
                    began = time.perf_counter()
                    child = Path(folder) / "child"
                    windows = text.calibration[: LONGER * WINDOWS if method.endswith("longer") else WINDOWS]
                    report = convert(source, child, recipe_of(method, kv_heads), windows)
                    seconds = time.perf_counter() - began
                    figures = evaluate(load_model(child), text.test[:WINDOWS], parent=known)
                hidden = [layer["hidden_error"] for layer in report["layers"] if "hidden_error" in layer]
                rows.append(key | figures | {"seconds": seconds, "hidden_errors": hidden})
                share(rows)
                print(line(rows[-1]), file=sys.stderr, flush=True)
                inputs = {"calibration_tokens": TOKENS, "test_tokens": TOKENS, "window": WINDOW}
                record("benchmark quality", inputs, {"quality": rows}, ABOUT).write(path)
    print(f"wrote {path}", file=sys.stderr)


def share(rows: list[dict[str, Any]]) -> None:
    """Each loss as a share of what mean loses at that setting."""
    mean = {(row["parent"], row["kv_heads"]): row for row in rows if row["method"] == "mean"}
    for row in rows:
        of = mean[row["parent"], row["kv_heads"]]["loss_above_parent_nats"]
        row["share_of_mean_loss"] = row["loss_above_parent_nats"] / of


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['parent']}, {row['kv_heads_parent']} to {row['kv_heads']} KV heads, {row['method']}: "
        f"{row['loss_above_parent_nats']:.5f} ± {row['loss_above_parent_standard_error_nats']:.5f} nats, "
        f"1/{1 / row['share_of_mean_loss']:.1f}; perplexity {row['perplexity']:.2f} of {row['parent_perplexity']:.2f}; "
        f"{row['seconds']:.0f} s"
    )


def tell(stage: str, done: int, total: int, note: str = "") -> None:
    if done % 50 == 0 or done == total:
        print(stage, f"{done}/{total}", note, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
