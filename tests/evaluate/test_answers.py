"""Answers of a child beside its parent's: the figures against counting by hand, and what makes an answer broken."""

import json
import math
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from helpers.talker import BOT, ENDS, EOS, USER, talker, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gqa.errors import GqaError
from gqa.evaluate.answers import compare_answers, forced_fidelity, is_degenerate, is_right, share_and_error
from gqa.evaluate.prompts import check_same_tokenizer, file_prompts, own_prompts
from gqa.model.greedy import greedy_answers
from gqa.text import Prompt

MOST = 12


@pytest.fixture(scope="module")
def parent():
    return talker(seed=3)


@pytest.fixture(scope="module")
def child():
    """The parent with a little noise: some answers stay, others part."""
    model = talker(seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.004)
    return model


@pytest.fixture(scope="module")
def prompts(parent):
    return own_prompts(parent, word_tokenizer(), 20)


def test_a_model_answers_like_itself(parent, prompts):
    report = compare_answers(parent, parent, word_tokenizer(), prompts, max_tokens=MOST)
    assert (report.prompts, report.answer_tokens_limit) == (20, MOST)
    assert (report.answers_equal, report.common_prefix_share, report.answers_top1_agreement) == (1, 1, 1)
    assert (report.answers_equal_standard_error, report.answers_kl_nats) == (0, 0)
    assert report.mean_answer_tokens == report.parent_mean_answer_tokens == report.common_prefix_tokens
    assert (report.questions, report.right_answers, report.right_answers_kept) == (0, None, None)
    assert json.loads(json.dumps(report.to_dict()))["answer_examples"][0]["prompt"].startswith("<bos> <user>")


def test_the_figures_are_counted(parent, child, prompts):
    report = compare_answers(child, parent, word_tokenizer(), prompts, max_tokens=MOST, batch=7)
    ours, theirs = (greedy_answers(one, prompts, max_tokens=MOST, ends=ENDS) for one in (child, parent))
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert 0 < sum(equal) < 20  # noise parts some
    assert report.answers_equal == sum(equal) / 20
    assert report.answers_equal_standard_error == pytest.approx(math.sqrt(sum(equal) / 20 * (1 - sum(equal) / 20) / 20))
    common = []
    for a, b in zip(ours, theirs, strict=True):
        count = 0
        while count < min(len(a), len(b)) and a[count] == b[count]:
            count += 1
        common.append(count)
    assert report.common_prefix_tokens == sum(common) / 20
    assert report.common_prefix_share == pytest.approx(
        sum(count / len(b) for count, b in zip(common, theirs, strict=True)) / 20
    )
    assert report.mean_answer_tokens == sum(map(len, ours)) / 20
    assert report.parent_mean_answer_tokens == sum(map(len, theirs)) / 20
    assert 0 < report.answers_kl_nats < 1
    assert report.answers_top1_agreement < 1


def test_kl_is_of_the_predictions_of_the_answers(parent, child, prompts):
    """Text by text, without a batch or padding."""
    answers = greedy_answers(parent, prompts, max_tokens=MOST, ends=ENDS)
    assert len({len(prompt) for prompt in prompts}) > 3
    kl, same = forced_fidelity(child, parent, prompts, answers)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer]])
            log_q, log_p = (one(ids, use_cache=False).logits[0].log_softmax(-1) for one in (child, parent))
        places = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        want = sum(float((log_p[t].exp() * (log_p[t] - log_q[t])).sum()) for t in places) / len(answer)
        assert kl[number].item() == pytest.approx(want, rel=1e-6, abs=1e-9)
        agree = sum(int(log_q[t].argmax()) == int(log_p[t].argmax()) for t in places) / len(answer)
        assert same[number].item() == pytest.approx(agree)
        assert [int(log_p[t].argmax()) for t in places] == answer  # the parent's own choice, so the places are right


def test_right_answers_and_those_kept(parent, child, prompts):
    tokenizer = word_tokenizer()
    options: Any = {"max_tokens": MOST, "ends": ENDS}
    ours, theirs = (
        [tokenizer.decode(ids, skip_special_tokens=True).split() for ids in greedy_answers(one, prompts, **options)]
        for one in (child, parent)
    )
    # The parent is right on all but every fourth; the child where it says the parent's last word, too.
    right: list[list[str]] = [
        [] if n == 5 else ["nonsense"] if n % 4 == 0 or not words else ["nonsense", words[-1]]
        for n, words in enumerate(theirs)
    ]
    gained = next(n for n in range(20) if n % 4 and n != 5 and ours[n] and ours[n][-1] not in theirs[n])
    right[gained] = [ours[gained][-1]]  # here the child alone is right
    report = compare_answers(child, parent, tokenizer, prompts, right=right, max_tokens=MOST)
    known = [n for n in range(20) if right[n]]
    parents = [n for n in known if len(right[n]) == 2]
    kept = [n for n in parents if right[n][1] in ours[n]]
    assert 0 < len(kept) < len(parents) < len(known) == 19
    assert report.questions == 19
    assert report.parent_right_questions == len(parents)
    assert report.parent_right_answers == len(parents) / 19
    assert report.right_answers == (len(kept) + 1) / 19
    assert report.right_answers_kept == len(kept) / len(parents)
    assert report.right_answers_kept_standard_error == share_and_error(len(kept), len(parents))[1] > 0
    nobody = compare_answers(child, parent, tokenizer, prompts[:2], right=[("nonsense",)] * 2, max_tokens=2)
    assert (nobody.parent_right_answers, nobody.right_answers_kept) == (0, None)


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("The capital is Paris.", ["paris"], True),
        ("The capital is Paris.", ["Rome", "Paris"], True),
        ("Parisians live there.", ["Paris"], False),
        ("2 + 2 = 4", ["4"], True),
        ("2 + 2 is 4.", ["4"], True),
        ("It is 4, of course", ["4"], True),
        ("14", ["4"], False),
        ("It is 4.5", ["4"], False),
        ("4,000", ["4"], False),
        ("3.4", ["4"], False),
        ("in New York City", ["new york"], True),
        ("C++ is one", ["C++"], True),
        ("", ["x"], False),
        ("a.b", ["axb"], False),
    ],
)
def test_right(text, answers, right):
    assert is_right(text, answers) is right


@pytest.mark.parametrize(
    ("answer", "degenerate"),
    [
        ([], False),
        ([7] * 7, False),
        ([7] * 8, True),
        ([1, 2, 3] + [7] * 8, True),
        ([7] * 8 + [1], False),
        ([4, 5] * 3, False),
        ([1, *[4, 5] * 4], True),
        ([1, 2, *[4, 5, 6, 7] * 3], True),
        ([*[4, 5, 6, 7] * 2, 4, 5], False),
        ([4, *[5, 6, 7, 4] * 3], True),  # from anywhere in the loop
        (list(range(64)), False),
        ([*range(10), *range(10), *range(10)][:-1], True),  # 26 4-grams, 10 of them different
        ([*range(10), *range(10)], False),
    ],
)
def test_degenerate(answer, degenerate):
    assert is_degenerate(answer) is degenerate
    assert is_degenerate([*answer, EOS], frozenset([EOS])) is is_degenerate([x for x in answer if x != EOS])


@given(st.lists(st.integers(5, 9), max_size=20), st.lists(st.integers(5, 9), min_size=1, max_size=9))
def test_every_loop_is_found(before, gram):
    assert is_degenerate(before + gram * max(3, -(-8 // len(gram))))


def test_prompts_of_a_parent_of_a_text_and_of_a_file(parent):
    tokenizer, plain = word_tokenizer(), word_tokenizer(template=None)
    assert all(ids[1] == USER and ids[-2:] == [EOS, BOT] for ids in own_prompts(parent, tokenizer, 3))
    text = torch.arange(4, 84).reshape(2, 40).repeat(3, 1).numpy() + torch.arange(6)[:, None].numpy()
    assert own_prompts(parent, plain, 2, windows=text) == [text[0, :32].tolist(), text[3, :32].tolist()]
    assert own_prompts(parent, tokenizer, 2, windows=text, chat=False) == own_prompts(parent, plain, 2, windows=text)
    assert [len(ids) for ids in own_prompts(parent, plain, 2)] == [33, 33]
    with pytest.raises(GqaError, match="fewer windows") as caught:
        own_prompts(parent, plain, 7, windows=text)
    assert caught.value.hint is not None
    assert "--answers 6" in caught.value.hint
    asked = [Prompt("w7 w8")]
    assert file_prompts(tokenizer, asked) == [[0, USER, 7, 8, EOS, BOT]]
    assert file_prompts(tokenizer, asked, chat=False) == file_prompts(plain, asked) == [[7, 8]]
    for chatless in (lambda: file_prompts(plain, asked, chat=True), lambda: own_prompts(parent, plain, 2, chat=True)):
        with pytest.raises(GqaError, match="no chat template"):
            chatless()


def test_mistakes(parent):
    for prompts, word in (([], "no prompts"), ([[5], []], "no tokens")):
        with pytest.raises(GqaError, match=word):
            compare_answers(parent, parent, word_tokenizer(), prompts)
    with pytest.raises(GqaError, match="not positive"):
        own_prompts(parent, word_tokenizer(), 0)
    other = tiny_llama(2, 4)
    other.resize_token_embeddings(100)
    with pytest.raises(GqaError, match="another vocabulary"):
        compare_answers(other, parent, word_tokenizer(), [[5, 6]], max_tokens=2)
    changed = word_tokenizer()
    changed.add_tokens(["more"])
    check_same_tokenizer(word_tokenizer(), word_tokenizer())
    with pytest.raises(GqaError, match=r"another tokenizer(.|\n)*'more'"):
        check_same_tokenizer(word_tokenizer(), changed)
