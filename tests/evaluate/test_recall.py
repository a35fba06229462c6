"""Recall against models that are made to remember, or not to."""

import types
from typing import Any, cast

import numpy as np
import pytest
import torch

from gqa.errors import GqaError
from gqa.evaluate.recall import items, recall

FILLER = np.random.default_rng(0).integers(1000, 1200, 5000)


class Letters:
    """A tokenizer with a token per character."""

    def encode(self, text, add_special_tokens=True):
        return [ord(character) for character in text]


class Copies(torch.nn.Module):
    """Writes what followed the last time that its last `order` tokens were there: recalls passkeys, and no hop."""

    def __init__(self, order=4):
        super().__init__()
        self.order, self.device = order, "cpu"

    def forward(self, input_ids, use_cache):
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, len(ids), 1300)
        seen = {}
        for t in range(len(ids)):
            key = tuple(ids[max(0, t - self.order + 1) : t + 1])
            if key in seen:
                logits[0, t, seen[key]] = 20.0
            if t + 1 < len(ids):
                seen[key] = ids[t + 1]
        return types.SimpleNamespace(logits=logits)


class Knows(Copies):
    """Follows the names back to the number, too."""

    def forward(self, input_ids, use_cache):
        text = "".join(chr(i) if i < 1000 else "\0" for i in input_ids[0].tolist())
        values, logits = {}, torch.zeros(1, len(text), 1300)
        for line in text.split("\n"):
            name, _, value = line.partition(" = ")
            if value:
                values[name] = values.get(value, value)
        end = text.rfind(" =") + 2
        asked = text[text.rfind("\n", 0, end) + 1 : end - 2]
        answer = " " + values.get(asked, "")
        for k, character in enumerate(answer):
            if end + k <= len(text):
                logits[0, end - 1 + k, ord(character)] = 20.0
        return types.SimpleNamespace(logits=logits)


def run(model, **more):
    asked = {"tasks": ("passkey", "hops"), "lengths": (128, 300), "depths": (0.0, 0.5, 1.0), "samples": 4} | more
    return recall(cast(Any, model), cast(Any, Letters()), FILLER, **cast(Any, asked))


def test_a_model_that_copies_recalls_passkeys_and_no_hops():
    for row in run(Copies()):
        assert row["accuracy"] == (1.0 if row["task"] == "passkey" else 0.0), row
        if row["task"] == "passkey":
            assert row["nats_per_answer_token"] < 1e-4
            assert row["nats_without"] > 5  # surely another number, as that one is hidden


def test_a_model_that_follows_names_recalls_both():
    rows = run(Knows(), parent=Copies())
    assert all(row["accuracy"] == 1 for row in rows)
    hops = [row for row in rows if row["task"] == "hops"]
    assert all(row["parent_accuracy"] == 0 for row in hops)
    assert all(row["p_value"] == pytest.approx(1 / 8, abs=0.02) for row in hops)  # 4 of one sign: 2 of 16 choices


def test_a_model_that_knows_nothing():
    class Uniform(Copies):
        def forward(self, input_ids, use_cache):
            return types.SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 1300))

    for row in run(Uniform()):
        assert row["accuracy"] == 0
        assert row["nats_per_answer_token"] == pytest.approx(np.log(1300))
        assert row["nats_without"] == pytest.approx(np.log(1300))


@pytest.mark.parametrize("task", ["passkey", "hops"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_items_have_the_length_the_place_and_the_answer(task, depth):
    for item in items(Letters().encode, FILLER, task, 200, depth, 5):
        text = "".join(chr(i) if i < 1000 else "\0" for i in item.ids)
        assert len(item.ids) == 200
        number = text[item.start :].strip()
        assert number.isdigit()
        assert len(number) == 5
        place = text.index(f" = {number}\n")
        filler_before = text[:place].count("\0")
        assert filler_before == pytest.approx(depth * text.count("\0"), abs=1)
        assert number not in "".join(chr(i) if i < 1000 else "\0" for i in item.other[: -len(text[item.start :])])
    first, again = (items(Letters().encode, FILLER, task, 200, depth, 2, seed=3) for _ in range(2))
    assert first == again


def test_wrong_questions():
    with pytest.raises(GqaError, match="no room for hops"):
        run(Copies(), lengths=(40,))
    with pytest.raises(GqaError, match="shorter than asked"):
        run(Copies(), lengths=(6000,))
    with pytest.raises(GqaError, match="not known"):
        run(Copies(), tasks=("needle",))
    with pytest.raises(GqaError, match="share of the context"):
        run(Copies(), depths=(1.5,))
