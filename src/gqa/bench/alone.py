"""Whether a text from a batch is the text that the model gives alone.

Batched and alone, a model's sums are added up in another order, so that the likeliest token can be another where two
are all but equally likely. That is no fault of the batch, and is told apart from one by the size of rounding errors.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from gqa.bench.generation import WIDER, default_implementation, sharing_copy
from gqa.model.hf import GqaCache
from gqa.model.serve import Sequence, forward


@dataclasses.dataclass(frozen=True)
class Difference:
    """Behind the tokens `before`, the batch took `batched` where the model alone takes `alone`."""

    before: list[int]
    batched: int
    alone: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """gap: how much more likely, in exact logits, the token is that the model alone takes; allowed: see `judge`."""

    gap: float
    allowed: float

    @property
    def is_near_tie(self) -> bool:
        return self.gap <= self.allowed  # false for NaN


def differences(model: Any, sequence: Sequence, *, int8: bool = False) -> list[Difference]:
    """Run a finished sequence alone: batch 1, in a fresh cache that has no blocks, token by token.

    Greedy, like the batch. Where another token is likelier here, this is noted and the batch's is followed, so that
    what comes after is compared, too.
    """
    cache = GqaCache(sequence.stored, model.config, kind="int8" if int8 else "contiguous")
    found, fed = [], sequence.prompt
    for place, batched in enumerate(sequence.tokens):
        alone = int(forward(model, cache, [fed])[0].argmax())
        if alone != batched:
            found.append(Difference(sequence.prompt + sequence.tokens[:place], batched, alone))
        fed = [batched]
    return found


class Judge:
    """Tells a near tie from a wrong token, with a copy of the model in the next wider dtype and transformers' own
    attention."""

    def __init__(self, model: Any, *, int8: bool = False) -> None:
        self.model, self.int8 = model, int8
        wider = copy.deepcopy(sharing_copy(model, default_implementation(model)))
        self.exact = wider.to(WIDER[model.dtype]).eval()

    def judge(self, difference: Difference) -> Verdict:
        """A near tie is one where the exact logits of the two tokens are at most 4 e apart.

        e is the largest error of the logits of the model alone, behind the same tokens. The batch's may be off by at
        most twice that, as everywhere in this project, so what is likelier there is at most 2 * 2 e less likely.
        """
        *known, last = difference.before
        cache = GqaCache(len(known) + 1, self.model.config, kind="int8" if self.int8 else "contiguous")
        if known:
            forward(self.model, cache, [known])
        alone = forward(self.model, cache, [[last]])[0].double()
        exact = self.exact(input_ids=torch.tensor([difference.before], device=self.model.device), use_cache=False)
        exact = exact.logits[0, -1].double()
        error = float((alone - exact).abs().max())
        return Verdict(float(exact[difference.alone] - exact[difference.batched]), 4 * error)
