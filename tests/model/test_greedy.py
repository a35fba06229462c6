"""Answers of a batch are those of each prompt alone, whatever their lengths and wherever they end."""

from typing import Any

import pytest
import torch
from helpers.served import MODELS, served_model
from helpers.talker import ENDS, talker
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.errors import GqaError
from gqa.model.generate import use_attention
from gqa.model.greedy import greedy_answers


def prompts(lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 80, (length,), generator=random).tolist() for length in lengths]


@torch.inference_mode()
def alone(model, prompt, most, ends):
    """By transformers' eager attention, without a cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(most):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 17, 30]), min_size=1, max_size=6),
    batch=st.integers(1, 6),
    most=st.sampled_from([1, 2, 9]),
    seed=st.integers(0, 9),
)
def test_a_batch_answers_like_each_alone(lengths, batch, most, seed):
    model, asked = talker(seed=3), prompts(lengths, seed)
    got = greedy_answers(model, asked, max_tokens=most, ends=ENDS, batch=batch)
    use_attention(model, "eager")
    assert got == [alone(model, prompt, most, ENDS) for prompt in asked]


def test_answers_end_at_different_times():
    asked = prompts([5, 9, 2, 14, 7, 3, 11, 4], seed=1)
    got = greedy_answers(talker(seed=3), asked, max_tokens=20, ends=ENDS)
    assert len({len(answer) for answer in got}) > 3  # the test above is not in vain
    assert all(token not in ENDS for answer in got for token in answer[:-1])
    assert any(len(answer) < 20 for answer in got)
    assert all(len(answer) == 20 or answer[-1] in ENDS for answer in got)
    unending = greedy_answers(talker(seed=3), asked, max_tokens=20)
    assert [len(answer) for answer in unending] == [20] * 8
    assert all(long[: len(answer)] == answer for long, answer in zip(unending, got, strict=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("window")])
def test_windows_shorter_than_a_prompt(name):
    model, asked = served_model(name, "gqa"), prompts([21, 3, 12])
    assert greedy_answers(model, asked, max_tokens=8) == [
        greedy_answers(model, [prompt], max_tokens=8)[0] for prompt in asked
    ]
    assert greedy_answers(model, asked, max_tokens=8) == [
        alone(served_model(name, "eager"), prompt, 8, ()) for prompt in asked
    ]


def test_padding_takes_no_positions():
    """Rotary embeddings see distances alone, so the answers above would not show it."""
    model, seen = talker(), []

    def note(module, args, given):
        seen.append(given["position_ids"].tolist())

    model.register_forward_pre_hook(note, with_kwargs=True)
    greedy_answers(model, [[5, 6, 7, 8], [5, 6]], max_tokens=3)
    assert seen == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[3], [5]]]


def test_mistakes():
    for asked, options, word in (
        ([[5], []], {}, "prompt has no tokens"),
        ([[5]], {"max_tokens": 0}, "positive"),
        ([[5]], {"batch": 0}, "positive"),
    ):
        more: Any = {"max_tokens": 4, **options}
        with pytest.raises(GqaError, match=word):
            greedy_answers(talker(), asked, **more)
