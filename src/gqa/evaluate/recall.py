"""Can a model find again what stands far back in its context? Generated and seeded, between lines of any text.

passkey: a line gives a name a number of five digits; at the end the name comes again, and the number has to.
hops: the number is given to one name, that name to a second and the second to a third, in this order, and the third is
asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.errors import GqaError
from gqa.evaluate.perplexity import log_softmax, paired_p_value
from gqa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Item:
    """ids: filler with the lines hidden in it, question and answer, which begins at `start`; other: the same with
    another number hidden, so that the answer cannot be known."""

    ids: list[int]
    other: list[int]
    start: int


def items(
    encode: Encode, filler: np.ndarray, task: str, length: int, depth: float, samples: int, seed: int = 0
) -> list[Item]:
    """`samples` items of `length` tokens in all; the lines lie at `depth` of the filler, 0 its start and 1 its end (the
    lines of `hops` from there on, evenly to the end). encode: text -> token ids; filler: ids of some text.

    Raises GqaError if the length has no room for them, or the filler is shorter than it."""
    if not 0 <= depth <= 1:
        raise GqaError("a depth is a share of the context", got=depth, allowed="0 to 1")
    made = []
    for sample in range(samples):
        rng = np.random.default_rng([seed, length, round(1000 * depth), sample])
        number, other = map(str, rng.choice(np.arange(10_000, 100_000), 2, replace=False))
        names = ["v" + "".join(rng.choice(list(string.ascii_lowercase), 4)) for _ in range(_NAMES[task])]
        lines = [f"\n{names[0]} = {number}\n", *(f"\n{b} = {a}\n" for a, b in itertools.pairwise(names))]
        question, answer = encode(f"\n{names[-1]} ="), encode(f" {number}")
        hidden = [encode(line) for line in lines]
        room = length - sum(map(len, hidden)) - len(question) - len(answer)
        if room < len(hidden) or len(filler) < length:
            raise GqaError(
                f"{length} tokens have no room for {task}" if room < len(hidden) else "the text is shorter than asked",
                got=f"{length} tokens",
                allowed=f"more than {length - room + len(hidden)}, at most the {len(filler)} of the text",
            )
        first = int(rng.integers(0, len(filler) - room + 1))
        around = filler[first : first + room].tolist()
        places = [round(room * (depth + (1 - depth) * k / len(hidden))) for k in range(len(hidden))]
        ids = [_hide(around, places, [line, *hidden[1:]]) for line in (hidden[0], encode(f"\n{names[0]} = {other}\n"))]
        start = len(ids[0]) + len(question)
        made.append(Item(ids[0] + question + answer, ids[1] + question + answer, start))
    return made


@torch.inference_mode()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: np.ndarray,
    *,
    tasks: Sequence[str] = ("passkey", "hops"),
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    samples: int = 32,
    seed: int = 0,
    parent: PreTrainedModel | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """A row per task, length and depth: accuracy, the share of items whose whole answer the model would write (each of
    its tokens the most likely one after those before it), its standard error, nats_per_answer_token, and
    nats_without, the same where another number is hidden. With a parent also its figures, and p_value, a sign-flip test
    of the difference in nats, item by item.

    Raises GqaError for unknown tasks, and like `items`."""
    strange = set(tasks) - set(_NAMES)
    if strange or not lengths or not tasks or samples < 1:
        raise GqaError("a recall task is not known", got=", ".join(sorted(strange)), allowed=", ".join(_NAMES))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    rows, jobs = [], [(task, length, depth) for task in tasks for length in lengths for depth in depths]
    for done, (task, length, depth) in enumerate(jobs):
        made = items(encode, filler, task, length, depth, samples, seed)
        own = _read(model, made)
        row = {"task": task, "context_tokens": length, "depth": depth, "samples": samples, **_figures(own)}
        if parent is not None:
            theirs = _read(parent, made)
            row |= {f"parent_{name}": value for name, value in _figures(theirs).items()}
            row["p_value"] = paired_p_value(own["nats"] - theirs["nats"])
        rows.append(row)
        progress("recall", done + 1, len(jobs), f"{task}, {length} tokens")
    return rows


_NAMES = {"passkey": 1, "hops": 3}  # how many names a number is passed on through


def _hide(around: list[int], places: list[int], lines: list[list[int]]) -> list[int]:
    ids, before = [], 0
    for place, line in zip(places, lines, strict=True):
        ids += around[before:place] + line
        before = place
    return ids + around[before:]


def _read(model: Any, made: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Per item: whether the answer would be written, and its nats per token with and without the number."""
    found: dict[str, list[torch.Tensor]] = {"exact": [], "nats": [], "without": []}
    training = model.training
    model.eval()
    try:
        for item in made:
            for ids, name in ((item.ids, "nats"), (item.other, "without")):
                begin = item.start if name == "nats" else len(ids) - (len(item.ids) - item.start)
                given = torch.tensor(ids, device=model.device)[None]
                logits = model(input_ids=given, use_cache=False).logits[0, begin - 1 : -1]
                answer = given[0, begin:]
                found[name].append(-log_softmax(logits).gather(1, answer[:, None]).double().mean().cpu())
                if name == "nats":
                    found["exact"].append((logits.argmax(-1) == answer).all().double().cpu())
    finally:
        model.train(training)
    return {name: torch.stack(values) for name, values in found.items()}


def _figures(read: Mapping[str, torch.Tensor]) -> dict[str, float]:
    accuracy, count = read["exact"].mean().item(), len(read["exact"])
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
        "nats_per_answer_token": read["nats"].mean().item(),
        "nats_without": read["without"].mean().item(),
    }
