"""A soak: for as long as one likes, sequences come and go over one pool, and each is run alone, too.

Afterwards every block must be free, the process no larger than it was, and every text what it is alone.
"""

from __future__ import annotations

import collections
import gc
import math
import os
import random
import time
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any

import torch

from gqa.bench.alone import Difference, Judge, differences
from gqa.bench.decode import evaluating
from gqa.bench.density import Memory
from gqa.cache.pool import BlockPool
from gqa.errors import GqaError
from gqa.model.hf import GqaCache
from gqa.model.serve import Batch, Sequence, forward
from gqa.progress import Progress, silent
from gqa.units import MIB

SHARING = 0.25  # of the sequences, so many begin with the text of a running one

# glibc hands the top of its heap back only beyond twice the largest block that it may keep there, 2 * 32 MiB.
ALLOCATOR_BYTES = 64 * MIB


def soak(
    model: Any,
    memory: Memory,
    context: int,
    seconds: float,
    *,
    seed: int = 0,
    text: Tokens[int] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Serve sequences of up to `context` tokens for so many seconds, then let those that run come to their end.

    model: a transformers causal language model with attn_implementation="gqa". Lengths of prompts and answers are drawn
    evenly over their logarithms, and a quarter begin with the text of a running one, whose blocks they share. Before
    the clock starts, a prompt as long as any can be and a short one are served. text: token ids from which prompts are
    cut; without, they are random tokens. Each sequence that ends is run alone at once, batch 1, in a fresh cache
    without blocks; this time counts, too.

    Returns a flat row; every figure of it is measured but resident_bytes_growth_allowed:
        sequences, sequences_shared, sequences_at_once (the most), prompt_tokens, new_tokens, steps,
        tokens_per_second (of the steps alone), steps_with_a_queue (the next one had to wait for blocks), seconds,
        seconds_alone
        texts_equal, texts_near_tie, texts_wrong: sequences that are token for token what they are alone; that differ
        only where two tokens were as likely as rounding can tell (`Judge`); and others. near_ties: of the second
        pool_blocks, pool_blocks_free
        resident_bytes_first_half, _second_half: the most that the process had in memory after a step; None where the
        system does not tell
    resident_bytes_growth_allowed: what the allocator may keep for itself, and one longest sequence's cache alone.
    passed: no text is wrong, no block is missing, and the process has grown by no more than that.

    Raises GqaError for seconds or a context out of range, a text that is too short, a pool that cannot hold one
    sequence of `context` tokens, and a model with windows shorter than its sequences.
    """
    if not 0 < seconds < math.inf:
        raise GqaError("a soak takes time", got=f"{seconds} s", allowed="more than 0 s")
    if context < 2:
        raise GqaError("a soak's context has a prompt and a token to come", got=context, allowed="2 or more")
    if text and len(text) < context:
        raise GqaError("the text is too short for prompts of this context", got=len(text), allowed=f"{context} tokens")
    with evaluating(model):
        pool = memory.pool(model)
        if pool.num_blocks < pool.blocks_for(context):
            raise GqaError(
                "not even one sequence fits",
                got=f"{pool.num_blocks} blocks of {pool.block} tokens",
                allowed=f"{pool.blocks_for(context)} or more for {context} tokens",
            )
        _poison(model, pool)
        return _Soak(model, pool, context, random.Random(seed), text).run(seconds, progress)


class _Soak:
    def __init__(self, model: Any, pool: BlockPool, context: int, drawn: random.Random, text: Tokens[int] = ()) -> None:
        self.model, self.pool, self.context, self.random, self.text = model, pool, context, drawn, text
        self.int8 = pool.dtype == torch.int8
        self.batch = Batch(model, pool)
        self.differences: list[list[Difference]] = []  # of each sequence that has any
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = {"steps": 0.0, "alone": 0.0}
        self.resident = [0, 0]  # the most in the first half of the time, and since

    def run(self, seconds: float, progress: Progress) -> dict[str, Any]:
        self._warm_up()
        began, passed = time.perf_counter(), 0.0
        following: Sequence | None = self._drawn()
        while following is not None or self.batch.running:
            while following is not None and self.batch.has_room(following):
                if not self.batch.admit(following):
                    self._ended([following])
                self._admit_one_that_shares()
                passed = time.perf_counter() - began
                following = self._drawn() if passed < seconds else None
            self.counts["steps_with_a_queue"] += following is not None
            self._ended(self._step())
            passed = time.perf_counter() - began
            if passed >= seconds:
                following = None
            late = int(passed >= seconds / 2)
            self.resident[late] = max(self.resident[late], resident_bytes() or 0)
            note = f"{self.counts['sequences']} ended, {len(self.differences)} differ, {len(self.batch.running)} run"
            progress("soak", min(int(passed), int(seconds)), int(seconds) + 1, note)
        gc.collect()
        progress("soak", int(seconds) + 1, int(seconds) + 1, note)
        return self._figures(time.perf_counter() - began)

    def _warm_up(self) -> None:
        """Everything once before the clock runs, the longest prompt included: kernels are compiled, and what they take
        in memory is taken."""
        for sequence in (Sequence(self._tokens(self.context - 1), 2), Sequence(self._tokens(1), 2)):
            if self.batch.has_room(sequence):
                self.batch.admit(sequence)
        while self.batch.running:
            self._ended(self._step())
        self.counts["steps"] = self.counts["tokens_of_steps"] = 0
        self.seconds = {"steps": 0.0, "alone": 0.0}
        self.resident[0] = resident_bytes() or 0

    def _drawn(self) -> Sequence:
        prompt = self._tokens(self._length(self.context - 1))
        return Sequence(prompt, self._length(self.context + 1 - len(prompt)))

    def _admit_one_that_shares(self) -> None:
        """Now and then, a sequence whose prompt is the text of a running one and more."""
        if not self.batch.running or self.random.random() >= SHARING:
            return
        like = self.random.randrange(len(self.batch.running))
        other = self.batch.running[like]
        held = other.prompt + other.tokens[:-1]
        if (room := self.context - len(held)) < 1:
            return
        more = self._tokens(self._length(room))
        sequence = Sequence(held + more, self._length(room + 1 - len(more)))
        if self.batch.has_room(sequence):
            self.counts["sequences_shared"] += 1
            if not self.batch.admit(sequence, like):
                self._ended([sequence])

    def _length(self, longest: int) -> int:
        return round(math.exp(self.random.uniform(0, math.log(longest))))

    def _tokens(self, count: int) -> list[int]:
        if self.text:
            start = self.random.randrange(len(self.text) - count + 1)
            return list(self.text[start : start + count])
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return [self.random.randrange(vocabulary) for _ in range(count)]

    def _step(self) -> list[Sequence]:
        began, running = time.perf_counter(), len(self.batch.running)
        ended = self.batch.step()
        self.seconds["steps"] += time.perf_counter() - began
        self.counts["steps"] += running > 0
        self.counts["tokens_of_steps"] += running
        self.counts["sequences_at_once"] = max(self.counts["sequences_at_once"], running)
        return ended

    def _ended(self, sequences: list[Sequence]) -> None:
        """Run alone what has ended."""
        began = time.perf_counter()
        for sequence in sequences:
            assert len(sequence.tokens) == sequence.most
            if found := differences(self.model, sequence, int8=self.int8):
                self.differences.append(found)
            self.counts["sequences"] += 1
            self.counts["prompt_tokens"] += len(sequence.prompt)
            self.counts["new_tokens"] += len(sequence.tokens)
        self.seconds["alone"] += time.perf_counter() - began

    def _figures(self, seconds: float) -> dict[str, Any]:
        counts, (first, second) = self.counts, self.resident
        judge = Judge(self.model, int8=self.int8) if self.differences else None
        verdicts = [[judge.judge(one) for one in of_one] for of_one in self.differences] if judge else []
        ties = [of_one for of_one in verdicts if all(verdict.is_near_tie for verdict in of_one)]
        one = self.pool.blocks_for(self.context) * self.pool.block_bytes
        known = first > 0 and second > 0
        figures: dict[str, Any] = {
            name: counts[name]
            for name in ("sequences", "sequences_shared", "sequences_at_once", "prompt_tokens", "new_tokens", "steps")
        } | {
            "steps_with_a_queue": counts["steps_with_a_queue"],
            "seconds": seconds,
            "seconds_of_steps": self.seconds["steps"],
            "seconds_alone": self.seconds["alone"],
            "tokens_per_second": counts["tokens_of_steps"] / self.seconds["steps"] if counts["steps"] else None,
            "texts_equal": counts["sequences"] - len(verdicts),
            "texts_near_tie": len(ties),
            "texts_wrong": len(verdicts) - len(ties),
            "near_ties": sum(map(len, ties)),
            "largest_share_of_allowed_gap": max((v.gap / v.allowed for of_one in ties for v in of_one), default=None),
            "pool_blocks": self.pool.num_blocks,
            "pool_blocks_free": self.pool.free_blocks,
            "resident_bytes_first_half": first if known else None,
            "resident_bytes_second_half": second if known else None,
            "resident_bytes_growth_allowed": ALLOCATOR_BYTES + one,
        }
        grown = known and second - first > figures["resident_bytes_growth_allowed"]
        leaked = self.pool.free_blocks < self.pool.num_blocks or bool(self.pool.sequences)
        return figures | {"passed": not (figures["texts_wrong"] or leaked or grown)}


def resident_bytes() -> int | None:
    """Bytes of this process that lie in memory; None where Linux does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _poison(model: Any, pool: BlockPool) -> None:
    """Write NaN to every block: the memory is then really taken, and whoever reads what nobody wrote is found out."""
    cache = GqaCache(config=model.config, kind="paged", pool=pool)
    forward(model, cache, [[0]])
    for layer in cache.blocks:
        for stored in layer.stored():
            stored.data.fill_(0 if stored.scale is not None else torch.nan)
            if stored.scale is not None:
                stored.scale.fill_(torch.nan)
    cache.reset()
