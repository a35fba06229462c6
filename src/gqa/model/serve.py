"""Continuous batching: sequences come and go, and all that are there take their next token in one forward.

A prompt is computed by itself; then its sequence joins the others, whatever its length. Their keys and values lie in
the blocks of one pool, and are given back with a sequence's last token.
"""

# B sequences of a step · T tokens of a prompt

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from gqa.cache.pool import BlockPool
from gqa.errors import GqaError
from gqa.model.hf import GqaCache


@dataclasses.dataclass
class Sequence:
    """prompt: its token ids; most: new tokens after which it ends; tokens: those it has been given, the likeliest each
    time."""

    prompt: list[int]
    most: int
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def stored(self) -> int:
        """The most tokens whose keys and values it will hold: nothing follows the last one."""
        return len(self.prompt) + self.most - 1


class Batch:
    """The sequences that are being continued, over a pool that they have for themselves.

    model: a causal language model of transformers with attn_implementation="gqa", in eval mode.
    ends: token ids that end a sequence before it has all its tokens.

    A sequence is admitted when the pool has the blocks for all of its tokens, those that the others may still need set
    aside, so none ever has to wait or to be thrown out once it runs. Layers behind a sliding window that is shorter
    than a sequence are refused by the model's attention, see `GqaCache.join`.
    """

    def __init__(self, model: Any, pool: BlockPool, ends: Collection[int] = ()) -> None:
        self.model, self.pool, self.ends = model, pool, frozenset(ends)
        self.running: list[Sequence] = []
        self._cache = GqaCache(kind="paged", pool=pool)

    @property
    def blocks_promised(self) -> int:
        """Blocks that the running sequences hold or may still need, as if they shared none."""
        return sum(self.pool.blocks_for(one.stored) for one in self.running)

    def has_room(self, sequence: Sequence) -> bool:
        return self.blocks_promised + self.pool.blocks_for(sequence.stored) <= self.pool.num_blocks

    def admit(self, sequence: Sequence, like: int | None = None) -> bool:
        """Compute the prompt and its first new token; False if that was also the last, and the sequence has ended.

        like: the number, in `running`, of a sequence whose tokens so far begin this prompt, with at least one more
        behind them. Their blocks are shared and not computed again.
        Raises GqaError for an empty prompt, no new tokens, or no room; then nothing has changed.
        """
        if not sequence.prompt or sequence.most < 1 or sequence.tokens:
            raise GqaError("a sequence begins with a prompt and has tokens to come", got=sequence)
        if not self.has_room(sequence):
            raise GqaError(
                "the pool has no room for this sequence",
                got=f"{self.pool.blocks_for(sequence.stored)} blocks of {self.pool.block} tokens",
                allowed=f"{self.pool.num_blocks - self.blocks_promised} that are neither taken nor promised",
            )
        cache, known = self._beginning(sequence, like)
        try:
            logits = forward(self.model, cache, [sequence.prompt[known:]])
        except BaseException:
            cache.reset()
            raise
        if self._ends_with(sequence, int(logits[0].argmax())):
            cache.reset()
            return False
        self._cache.join(cache)
        self.running.append(sequence)
        return True

    def step(self) -> list[Sequence]:
        """Give every running sequence its next token; return those that have ended, whose blocks are free again."""
        if not self.running:
            return []
        logits = forward(self.model, self._cache, [one.tokens[-1:] for one in self.running], self._cache.lengths)
        likeliest = logits.argmax(dim=-1).tolist()
        ended = [self._ends_with(one, token) for one, token in zip(self.running, likeliest, strict=True)]
        gone = [one for one, end in zip(self.running, ended, strict=True) if end]
        if gone:
            self._cache.batch_select_indices(torch.tensor([row for row, end in enumerate(ended) if not end]).long())
            self.running = [one for one, end in zip(self.running, ended, strict=True) if not end]
        return gone

    def _beginning(self, sequence: Sequence, like: int | None) -> tuple[GqaCache, int]:
        """A cache for the sequence, and how many tokens of its prompt it holds."""
        if like is None:
            return GqaCache(kind="paged", pool=self.pool), 0
        other = self.running[like]
        held = (other.prompt + other.tokens)[: self._cache.lengths[like]]
        if sequence.prompt[: len(held)] != held or len(sequence.prompt) == len(held):
            raise GqaError("the prompt does not begin with that sequence", got=f"{len(held)} tokens held")
        cache = self._cache.fork()
        cache.batch_select_indices(torch.tensor([like]))
        return cache, len(held)

    def _ends_with(self, sequence: Sequence, token: int) -> bool:
        sequence.tokens.append(token)
        return len(sequence.tokens) == sequence.most or token in self.ends


def forward(model: Any, cache: Any, ids: list[list[int]], positions: list[int] | None = None) -> torch.Tensor:
    """Logits (B, vocabulary) behind the last of T more tokens of each of B sequences.

    positions: of the first of them in each sequence; by default behind what the cache holds, alike in all.
    """
    options: dict[str, Any] = {}
    if positions is not None:
        options["position_ids"] = torch.tensor(positions, device=model.device)[:, None]
    batch = torch.tensor(ids, device=model.device)
    return model(input_ids=batch, past_key_values=cache, logits_to_keep=1, **options).logits[:, -1]
