"""Does a child still answer like its parent? Greedy answers of both to the same prompts, and the child's predictions on
the parent's answers."""

# B prompts of a batch · T tokens of the longest prompt and answer · A tokens of an answer · V entries of the vocabulary

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gqa.errors import GqaError
from gqa.evaluate.perplexity import log_softmax, mean_and_error
from gqa.model.generate import our_attention
from gqa.model.greedy import greedy_answers
from gqa.model.sample import text_ends
from gqa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORCED_BATCH = 8  # answers whose logits (B, T, V) are there at once, of both models
_EXAMPLES = 4
_LOOP_REPEATS, _LOOP_TOKENS = 3, 8
_GRAM, _FEWEST_GRAMS, _DISTINCT_GRAMS = 4, 8, 0.5


@dataclasses.dataclass(frozen=True)
class AnswerExample:
    """Texts; the prompt with its special tokens, the answers without."""

    prompt: str
    parent_answer: str
    answer: str


@dataclasses.dataclass(frozen=True)
class AnswerReport:
    """Greedy answers of a model and its parent to the same prompts. Shares are 0 to 1; standard errors are over
    prompts: of shares of answers sqrt(p (1 - p) / n), of means std / sqrt(n), None for a single prompt.

    answers_equal            share of answers that are equal, token for token to the end
    common_prefix_tokens     mean tokens until the answers part; _share: of the parent's answer
    answers_kl_nats          KL(parent || model) per token, both reading the parent's answer; mean over its tokens, then
                             over prompts
    answers_top1_agreement   share of the tokens there for which both rank the same token first
    degenerate_answers       share that `is_degenerate` finds; parent_: the same of the parent
    mean_answer_tokens       the end token counts
    questions                prompts whose right answer is known; the figures below are over them, None where there is
                             none
    right_answers            share that is right (`is_right`)
    right_answers_kept       share of what the parent answers right that the model answers right, too
    """

    prompts: int
    answer_tokens_limit: int
    answers_equal: float
    answers_equal_standard_error: float
    common_prefix_tokens: float
    common_prefix_tokens_standard_error: float | None
    common_prefix_share: float
    common_prefix_share_standard_error: float | None
    answers_kl_nats: float
    answers_kl_standard_error_nats: float | None
    answers_top1_agreement: float
    answers_top1_agreement_standard_error: float | None
    degenerate_answers: float
    degenerate_answers_standard_error: float
    parent_degenerate_answers: float
    parent_degenerate_answers_standard_error: float
    mean_answer_tokens: float
    parent_mean_answer_tokens: float
    questions: int
    parent_right_answers: float | None
    parent_right_answers_standard_error: float | None
    right_answers: float | None
    right_answers_standard_error: float | None
    parent_right_questions: int
    right_answers_kept: float | None
    right_answers_kept_standard_error: float | None
    answer_examples: tuple[AnswerExample, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as a record holds them."""
        return dataclasses.asdict(self) | {"answer_examples": [dataclasses.asdict(one) for one in self.answer_examples]}


def compare_answers(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[torch.Tensor | Sequence[int]],
    *,
    right: Sequence[Sequence[str]] = (),
    max_tokens: int = 64,
    batch: int = 64,
    progress: Progress = silent,
) -> AnswerReport:
    """Let both models answer each prompt greedily, with at most max_tokens tokens, and compare.

    Args:
        prompts: token ids, (T,) or (1, T) each.
        right: for each prompt the answers that are right, none where that is not known; empty: for no prompt.
        batch: prompts that are answered together.

    Raises:
        GqaError: for no prompts, an empty one, sizes below 1, models of different vocabularies, and models that our
            attention or cache does not serve.
    """
    asked = [_ids(one) for one in prompts]
    if not asked:
        raise GqaError("there are no prompts", allowed="1 or more")
    assert not right or len(right) == len(asked), "right answers are of other prompts"
    ends = text_ends(parent, tokenizer)
    options: Any = {"max_tokens": max_tokens, "ends": ends, "batch": batch, "progress": progress}
    theirs = greedy_answers(parent, asked, stage="the parent answers", **options)
    ours = greedy_answers(model, asked, stage="the model answers", **options)
    kl, same = forced_fidelity(model, parent, asked, theirs, progress)

    our_texts, their_texts = ([_text(tokenizer, one, plain=True) for one in answers] for answers in (ours, theirs))
    prefix = [_common_prefix(a, b) for a, b in zip(ours, theirs, strict=True)]
    shares = [count / len(answer) for count, answer in zip(prefix, theirs, strict=True)]
    known = [number for number, answers in enumerate(right) if answers]
    parent_right, our_right = ({n for n in known if is_right(of[n], right[n])} for of in (their_texts, our_texts))
    equal, equal_error = share_and_error(sum(a == b for a, b in zip(ours, theirs, strict=True)), len(asked))
    broken, broken_error = share_and_error(sum(is_degenerate(one, ends) for one in ours), len(asked))
    parent_broken, parent_broken_error = share_and_error(sum(is_degenerate(one, ends) for one in theirs), len(asked))
    prefix_tokens, prefix_error = mean_and_error(torch.tensor(prefix, dtype=torch.float64))
    prefix_share, share_error = mean_and_error(torch.tensor(shares, dtype=torch.float64))
    mean_kl, kl_error = mean_and_error(kl)
    mean_same, same_error = mean_and_error(same)
    parents, parents_error = _known_share(len(parent_right), len(known))
    own, own_error = _known_share(len(our_right), len(known))
    kept, kept_error = _known_share(len(parent_right & our_right), len(parent_right))
    return AnswerReport(
        prompts=len(asked),
        answer_tokens_limit=max_tokens,
        answers_equal=equal,
        answers_equal_standard_error=equal_error,
        common_prefix_tokens=prefix_tokens,
        common_prefix_tokens_standard_error=prefix_error,
        common_prefix_share=prefix_share,
        common_prefix_share_standard_error=share_error,
        answers_kl_nats=mean_kl,
        answers_kl_standard_error_nats=kl_error,
        answers_top1_agreement=mean_same,
        answers_top1_agreement_standard_error=same_error,
        degenerate_answers=broken,
        degenerate_answers_standard_error=broken_error,
        parent_degenerate_answers=parent_broken,
        parent_degenerate_answers_standard_error=parent_broken_error,
        mean_answer_tokens=sum(map(len, ours)) / len(ours),
        parent_mean_answer_tokens=sum(map(len, theirs)) / len(theirs),
        questions=len(known),
        parent_right_answers=parents,
        parent_right_answers_standard_error=parents_error,
        right_answers=own,
        right_answers_standard_error=own_error,
        parent_right_questions=len(parent_right),
        right_answers_kept=kept,
        right_answers_kept_standard_error=kept_error,
        answer_examples=tuple(
            AnswerExample(_text(tokenizer, ids), their_texts[number], our_texts[number])
            for number, ids in enumerate(asked[:_EXAMPLES])
        ),
    )


@torch.inference_mode()
def forced_fidelity(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    progress: Progress = silent,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per prompt, of the predictions of its answer's tokens, each from the prompt and the answer before it: the mean of
    KL(parent || model) in nats, and the share with the same likeliest token. Two tensors (N,), float64.

    Raises GqaError for models of different vocabularies."""
    kl = torch.zeros(len(prompts), dtype=torch.float64)
    same = torch.zeros_like(kl)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with our_attention(parent), our_attention(model):
        for start in range(0, len(order), _FORCED_BATCH):
            numbers = order[start : start + _FORCED_BATCH]
            rows = [[*prompts[n], *answers[n]] for n in numbers]
            T, first = max(map(len, rows)), min(len(prompts[n]) for n in numbers) - 1
            # Padding stands behind the texts, where causal attention does not see it from them: no mask is needed.
            ids = torch.tensor([row + [0] * (T - len(row)) for row in rows])
            logits, parent_logits = (
                one(input_ids=ids.to(one.device), use_cache=False, logits_to_keep=T - first).logits.to(model.device)
                for one in (model, parent)
            )
            if logits.shape != parent_logits.shape:
                raise GqaError(
                    "the parent has another vocabulary than the model",
                    got=f"{parent_logits.shape[-1]} entries",
                    allowed=f"{logits.shape[-1]} entries",
                )
            for row, n in enumerate(numbers):
                begin = len(prompts[n]) - 1 - first
                piece = slice(begin, begin + len(answers[n]))
                log_q, log_p = log_softmax(logits[row, piece]), log_softmax(parent_logits[row, piece])
                kl[n] = (log_p.exp() * (log_p - log_q)).sum(-1).double().mean().cpu()
                same[n] = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().cpu()
            progress("reading the parent's answers", min(start + _FORCED_BATCH, len(order)), len(order))
    return kl, same


def is_degenerate(answer: Sequence[int], ends: frozenset[int] = frozenset()) -> bool:
    """Whether an answer repeats itself: its end is an n-gram of tokens that stands there 3 times or more in a row, over
    8 tokens or more; or it has 8 or more 4-grams, of which fewer than half are different. The end token is left out."""
    tokens = [token for token in answer if token not in ends]
    for n in range(1, len(tokens) // _LOOP_REPEATS + 1):
        # a loop of a short n-gram has to be longer than three of them, or "no no no" were one
        length = max(_LOOP_REPEATS * n, math.ceil(_LOOP_TOKENS / n) * n)
        tail = tokens[-length:]
        if len(tail) == length and tail[n:] == tail[:-n]:
            return True
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return len(grams) >= _FEWEST_GRAMS and len(set(grams)) < _DISTINCT_GRAMS * len(grams)


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text as a whole word, in any case; `4` does not in `4.5` or `4,000`."""
    return any(
        re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(answer.strip())}(?!\w)(?![.,]\d)", text, re.IGNORECASE)
        for answer in answers
    )


def share_and_error(count: int, total: int) -> tuple[float, float]:
    """A share of `total`, and its standard error, sqrt(p (1 - p) / total)."""
    p = count / total
    return p, math.sqrt(p * (1 - p) / total)


def _known_share(count: int, total: int) -> tuple[float | None, float | None]:
    return share_and_error(count, total) if total else (None, None)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _text(tokenizer: Any, ids: Sequence[int], *, plain: bool = False) -> str:
    return tokenizer.decode(ids, skip_special_tokens=plain)


def _ids(prompt: torch.Tensor | Sequence[int]) -> list[int]:
    return prompt.reshape(-1).tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
