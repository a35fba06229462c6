"""A trained model with its tokenizer, and text, in about a second: a minuscule parent."""

from __future__ import annotations

from pathlib import Path

from gqa.study.embedded import Corpus
from gqa.study.train_parent import ParentRecipe, train_parent

RECIPE = ParentRecipe(
    vocabulary=300,
    hidden=32,
    intermediate=48,
    layers=2,
    heads=4,
    window=32,
    batch=4,
    steps=12,
    warmup_steps=2,
    checkpoint_steps=4,
)


def small_corpus(folder: Path) -> Corpus:
    """Three parts of one file each, of lines that a model can learn something about."""
    parts = {}
    for number, name in enumerate(("train", "calibration", "test")):
        path = folder / f"{name}.py"
        lines = [f"def f{i}(x):\n    return x + {(i * 7 + number) % 13}\n" for i in range(300)]
        path.write_text("\n".join(lines), encoding="utf-8")
        parts[name] = (path,)
    return Corpus(**parts)


def small_texts(corpus: Corpus) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in corpus.train]


def small_parent(folder: Path) -> tuple[Path, Corpus]:
    """A trained model's folder, and the text it was trained on; both lie in `folder`."""
    corpus = small_corpus(folder)
    return train_parent(RECIPE, small_texts(corpus), folder / "parent").folder, corpus
