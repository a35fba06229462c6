"""The answers that a model gives to many prompts at once, the likeliest token each time."""

# B prompts of a batch · P tokens of the longest of them · S tokens in the cache

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gqa.errors import GqaError
from gqa.model.cache import GqaCache
from gqa.model.generate import our_attention
from gqa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ends: Collection[int] = (),
    batch: int = 64,
    stage: str = "answering",
    progress: Progress = silent,
) -> list[list[int]]:
    """Token ids of each prompt's answer: at most max_tokens of them, up to and with the first of `ends`.

    Prompts of about the same length are computed together, left-padded, with attn_implementation="gqa" and our cache.
    An answer is what the prompt gets alone, but for the rounding of sums in another order.

    Raises GqaError for an empty prompt, sizes below 1, and a model that our attention or cache does not serve.
    """
    if max_tokens < 1 or batch < 1:
        raise GqaError("max_tokens and batch must be positive", got=f"{max_tokens} and {batch}", allowed="1 or more")
    if not all(prompts):
        raise GqaError("a prompt has no tokens", got=f"prompt {[bool(one) for one in prompts].index(False)}")
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with our_attention(model):
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            _answer(model, [prompts[n] for n in numbers], [answers[n] for n in numbers], max_tokens, frozenset(ends))
            progress(stage, min(start + batch, len(order)), len(order))
    return answers


def _answer(
    model: Any, prompts: list[Sequence[int]], answers: list[list[int]], most: int, ends: frozenset[int]
) -> None:
    """Fill the answers (B) to these prompts."""
    P = max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(one)) + list(one) for one in prompts], device=model.device)
    lengths = torch.tensor([len(one) for one in prompts], device=model.device)
    mask = torch.arange(P, device=model.device) >= P - lengths[:, None]  # (B, S): True for what is no padding
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    cache = GqaCache(P + most, model.config.get_text_config(decoder=True))
    going = list(range(len(prompts)))  # whose answers the rows of the cache belong to
    while True:
        logits = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = logits.argmax(-1)
        for row, token in zip(going, tokens.tolist(), strict=True):
            if not answers[row] or answers[row][-1] not in ends:
                answers[row].append(token)
        open_rows = [place for place, row in enumerate(going) if not _over(answers[row], most, ends)]
        if not open_rows:
            return
        if 2 * len(open_rows) <= len(going):  # the others would be computed for nothing; dropping them copies the cache
            kept = torch.tensor(open_rows, device=model.device)
            cache.batch_select_indices(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
            going = [going[place] for place in open_rows]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)


def _over(answer: list[int], most: int, ends: frozenset[int]) -> bool:
    return len(answer) == most or answer[-1] in ends
