"""What is measured of each model of the proof: loss on kinds of text, recall over the context, answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from real_bench import Bench, batch_of
from real_progress import show

from gqa.errors import GqaError
from gqa.evaluate import evaluate
from gqa.evaluate.answers import compare_answers
from gqa.evaluate.prompts import file_prompts
from gqa.evaluate.recall import recall
from gqa.text import read_prompts

TASKS = ("passkey", "hops")
RECALLED = 0.5  # accuracy of the parent from which on its children are asked, too


def quality(bench: Bench, name: str, kind: str, length: int, count: int) -> dict[str, Any]:
    """A model on the test windows of one kind of text, beside its parent."""
    windows = bench.windows(kind, length, count)
    known = bench.parent_logits(kind, length, count)
    found = evaluate(bench.load(name), windows, known, batch_of(length))
    if name == "parent" and abs(found["kl_to_parent_nats"]) > 1e-6:
        raise GqaError("the parent differs from itself", got=f"KL {found['kl_to_parent_nats']:.2g} nats")
    if not math.isfinite(found["cross_entropy_nats_per_token"]):
        raise GqaError("a model's loss is not finite", got=name)
    return {"name": name, "kind": kind, "window": length, **found}


def recalled(bench: Bench, name: str, length: int, samples: int) -> dict[str, Any]:
    """Rows of a model at one context, of the tasks that the parent can do there; the parent itself does all tasks.

    The items depend on the seed alone, so that they are the same for all models."""
    tasks = TASKS if name == "parent" else able(bench, length, samples)
    if not tasks:
        return {"rows": []}
    filler = bench.token_ids(bench.text("prose-test"))
    rows = recall(
        bench.load(name), bench.tokenizer, filler, tasks=tasks, lengths=[length], samples=samples, progress=show
    )
    return {"rows": [{"name": name, **row} for row in rows]}


def able(bench: Bench, length: int, samples: int) -> list[str]:
    """The tasks that the parent does at this context, over all depths."""
    step = bench.steps.find(recall_step("parent", length, samples))
    assert step is not None, "the parent comes first"
    accuracies = {
        task: float(np.mean([row["accuracy"] for row in step["result"]["rows"] if row["task"] == task]))
        for task in TASKS
    }
    return [task for task, accuracy in accuracies.items() if accuracy >= RECALLED]


def recall_step(name: str, length: int, samples: int) -> str:
    return f"recall-{length}x{samples}-{name}"


def answers(bench: Bench, name: str, prompts: str) -> dict[str, Any]:
    """A model's answers beside its parent's. prompts: `own`, which the parent wrote, or `questions`, of the file."""
    right: list[tuple[str, ...]] = []
    if prompts == "own":
        step = bench.steps.find("texts-prompts")
        assert step is not None, "prompts come first"
        asked = step["result"]["prompts"]
    else:
        questions = read_prompts(bench.asked.questions)
        asked = file_prompts(bench.tokenizer, questions)
        right = [one.answers for one in questions]
    report = compare_answers(
        bench.load(name),
        bench.parent,
        bench.tokenizer,
        asked,
        right=right,
        max_tokens=bench.asked.answer_tokens,
        progress=show,
    )
    return {"name": name, "prompts_from": prompts, **report.to_dict()}


def question_count(bench: Bench) -> int:
    """How many questions the file has; 0 without a file."""
    return len(read_prompts(bench.asked.questions)) if bench.asked.questions.exists() else 0
