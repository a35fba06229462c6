"""What a conversion loses, against the size of the parent, its training and the calibration text.

    python benchmarks/scaling.py                         parents of 1M, 5M and 15M parameters on the CPU: a night
    python benchmarks/scaling.py --sizes 60M             one size, on a GPU where there is one: minutes
    python benchmarks/scaling.py --join a.json b.json    the records of several runs as one, with its trends

Parents are multi-head Llamas with 8 heads, trained on the spot on all the Python source that this Python has installed:
its library and every package beside it, each text once, split by file. Each size is trained twice, once four times as
long. Children have 4, 2 and 1 KV heads. The record is written a row at a time; rows that are in it are kept.
"""

# B windows of a step · D head dim

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from session import RESULTS, WORK, slug
from trend import fit_powers

from gqa.bench.document import record
from gqa.convert.recipe import Recipe, make_recipe
from gqa.convert.run import convert
from gqa.device import default_device
from gqa.evaluate import evaluate, load_model, remember
from gqa.record import Record, describe_machine, read_record
from gqa.source import open_checkpoint
from gqa.study.corpus import StudyText, from_corpus
from gqa.study.embedded import Corpus
from gqa.study.train_parent import ParentRecipe, train_parent
from gqa.text import read_text

SIZES = {
    "1M": ParentRecipe(vocabulary=4096, hidden=128, intermediate=320, layers=4),
    "5M": ParentRecipe(vocabulary=4096, hidden=256, intermediate=640, layers=6),
    "15M": ParentRecipe(vocabulary=4096, hidden=384, intermediate=1024, layers=8),
    "60M": ParentRecipe(vocabulary=4096, hidden=768, intermediate=2048, layers=8),
}
STEPS = (1200, 300)  # of BATCH windows
BATCH, WINDOW = 64, 256
KV_HEADS = (2, 1, 4)  # the most telling first
METHODS = ("mean", "svd", "svd, refined")
CALIBRATION = (128, 512)  # windows; the larger number at one stop of the dial
TEST = 256  # windows
TRAIN_BYTES, OTHER_BYTES = 48 << 20, 6 << 20  # of text at most, for training, and for calibration and test each
ABOUT = (
    "loss_above_parent_nats is cross-entropy above the parent's on test text right after the conversion, without any"
    " language-model training; its error is paired over windows.",
    "One seed each. A trend is the least-squares plane of log(loss) over the logarithms of what it names; its"
    " intervals are for rows that scatter around it independently, which rows of one parent do not quite.",
)


def installed_corpus() -> Corpus:
    """Python files of the library and of every installed package: each content once, a part by a hash of it."""
    paths = sysconfig.get_paths()
    found: dict[bytes, Path] = {}
    for folder in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"])):
        for path in sorted(Path(folder).rglob("*.py")):
            content = path.read_bytes()
            if len(content) > 200 and b"\0" not in content and _is_utf8(content):
                found.setdefault(hashlib.sha256(content).digest(), path)
    parts: dict[str, list[Path]] = {"train": [], "calibration": [], "test": []}
    room = {"train": TRAIN_BYTES, "calibration": OTHER_BYTES, "test": OTHER_BYTES}
    for digest, path in sorted(found.items()):
        draw = digest[-1] % 16
        part = "test" if draw == 0 else "calibration" if draw == 1 else "train"
        if room[part] > 0:
            room[part] -= path.stat().st_size
            parts[part].append(path)
    return Corpus(**{name: tuple(files) for name, files in parts.items()})


def _is_utf8(content: bytes) -> bool:
    try:
        return bool(content.decode("utf-8").strip())
    except UnicodeDecodeError:
        return False


def parents(sizes: Sequence[str], steps: Sequence[int]) -> Iterator[tuple[str, ParentRecipe]]:
    for size, count in itertools.product(sizes, steps):
        yield size, dataclasses.replace(SIZES[size], steps=count, batch=BATCH, window=WINDOW, checkpoint_steps=200)


def recipes(kv_heads: int) -> Iterator[tuple[str, int, Recipe]]:
    """(method, windows of calibration, recipe)"""
    yield "mean", 0, make_recipe(kv_heads, "mean")
    for windows in CALIBRATION if kv_heads == KV_HEADS[0] else CALIBRATION[:1]:
        tokens = windows * WINDOW
        yield "svd", windows, make_recipe(kv_heads, calibration_tokens=tokens, window=WINDOW)
        refined = make_recipe(kv_heads, calibration_tokens=tokens, refine_tokens=tokens, window=WINDOW)
        yield "svd, refined", windows, refined


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--sizes", nargs="+", default=["1M", "5M", "15M"], choices=SIZES)
    options.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="of the parents' training")
    options.add_argument("--join", nargs="+", type=Path, help="only put these records together")
    options.add_argument("--work", type=Path, default=WORK / "scaling", help="where parents are kept  [%(default)s]")
    options.add_argument("--out", type=Path, help="the record's path")
    chosen = options.parse_args(arguments)
    device = default_device()
    path: Path = chosen.out or RESULTS / f"{slug(_device(device))}-scaling.json"
    if chosen.join:
        parts = [read_record(part) for part in chosen.join]
        rows = [row for part in parts for row in part.results["scaling"]]
        first = parts[0]
        joined = dataclasses.replace(
            made_of(rows), inputs=first.inputs, machine=first.machine, versions=first.versions, created=first.created
        )
        joined.write(path)
        return
    rows: list[dict[str, Any]] = list(read_record(path).results["scaling"]) if path.exists() else []
    corpus = installed_corpus()
    texts = [read_text([path]) for path in corpus.train]
    for size, recipe in parents(chosen.sizes, chosen.steps):
        parent = train_parent(recipe, texts, chosen.work / f"{size}-{recipe.steps}-steps", tell, device)
        facts = {
            "size": size,
            "parameters": parent.parameters,
            "train_tokens": parent.train_tokens,
            "train_seconds": parent.train_seconds,
        }
        text = from_corpus(corpus, parent.folder, WINDOW)
        measure(parent.folder, text, facts, rows, path, device)


def measure(
    folder: Path, text: StudyText, facts: dict[str, Any], rows: list[dict[str, Any]], path: Path, device: str
) -> None:
    """Convert a parent in every way that has no row yet, and write the rows."""
    source = open_checkpoint(str(folder))
    known = None
    for kv_heads in KV_HEADS:
        for method, windows, recipe in recipes(kv_heads):
            key = facts | {"kv_heads": kv_heads, "method": method, "calibration_tokens": windows * WINDOW}
            if any({**row, "train_seconds": key["train_seconds"]} == row | key for row in rows):
                continue
            known = known or remember(load_model(folder), text.test[:TEST])
            with tempfile.TemporaryDirectory(prefix="gqa-scaling-") as temporary:
                began = time.perf_counter()
                child = Path(temporary) / "child"
                convert(source, child, recipe, text.calibration[:windows] if windows else None, device=device)
                seconds = time.perf_counter() - began
                figures = evaluate(load_model(child), text.test[:TEST], parent=known)
            rows.append(key | figures | {"seconds": seconds, "device": _device(device)})
            made_of(rows).write(path)
            row = rows[-1]
            print(
                f"{row['size']} {row['train_tokens'] / 1e6:.1f}M tokens, {kv_heads} KV heads, {method} on {windows}: "
                f"perplexity {row['perplexity']:.3f} of {row['parent_perplexity']:.3f}, "
                f"{row['loss_above_parent_nats']:.5f} nats, {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )


def made_of(rows: list[dict[str, Any]]) -> Record:
    """The record of these rows, with their shares of mean's loss, and the trends."""
    mean = {_setting(row): row["loss_above_parent_nats"] for row in rows if row["method"] == "mean"}
    for row in rows:
        of = mean.get(_setting(row))
        row["share_of_mean_loss"] = None if of is None else row["loss_above_parent_nats"] / of
    inputs = {"window": WINDOW, "test_tokens": TEST * WINDOW, "batch": BATCH, "text": "installed Python sources"}
    return record("benchmark scaling", inputs, {"scaling": rows, "trends": trends(rows)}, ABOUT)


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["size"], row["train_tokens"], row["kv_heads"]


def trends(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per KV heads and method: the exponents of the loss in parameters, training and calibration tokens, with 95 %
    intervals, where there are rows enough."""
    found = []
    for kv_heads, method in itertools.product(KV_HEADS, METHODS):
        some = [row for row in rows if (row["kv_heads"], row["method"]) == (kv_heads, method)]
        some = [row for row in some if row["loss_above_parent_nats"] > 0]
        names = ["parameters", "train_tokens"] + ([] if method == "mean" else ["calibration_tokens"])
        losses = [row["loss_above_parent_nats"] for row in some]
        if trend := fit_powers({name: [row[name] for row in some] for name in names}, losses):
            found.append({"kv_heads": kv_heads, "method": method, **trend})
    return found


def _device(kind: str) -> str:
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    machine = describe_machine()
    return f"{machine['cores']}-core {machine['processor']}"


def tell(stage: str, done: int, total: int, note: str = "") -> None:
    if done % 100 == 0 or done == total:
        print(f"{time.strftime('%X')} {stage} {done}/{total} {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
