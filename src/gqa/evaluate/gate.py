"""Conditions that an evaluation has to meet: `perplexity<=1.02*parent`, `kl_to_parent_nats<0.01`."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from gqa.errors import GqaError

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
# Figure -> that of the parent, where it has one.
FIGURES = {
    "perplexity": "parent_perplexity",
    "cross_entropy_nats_per_token": "parent_cross_entropy_nats_per_token",
    "loss_above_parent_nats": None,
    "kl_to_parent_nats": None,
    "top1_agreement": None,
}
_GATE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*(%?)\s*(?:\*\s*(parent))?\s*")


@dataclasses.dataclass(frozen=True)
class Gate:
    """`figure compare number`, or `number * parent` the same figure of the parent's."""

    text: str
    figure: str
    compare: str
    number: float
    of_parent: bool

    @property
    def needs_parent(self) -> bool:
        return self.of_parent or FIGURES[self.figure] is None

    def check(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The gate's text, the figure, what it was held against, and whether it passed."""
        parent = FIGURES[self.figure]
        against = self.number * (results[parent] if self.of_parent and parent else 1.0)
        value = results[self.figure]
        return {"gate": self.text, "value": value, "against": against, "passed": _COMPARE[self.compare](value, against)}


def parse_gate(text: str) -> Gate:
    """Raises GqaError for what is no condition on a figure of an evaluation."""
    match = _GATE.fullmatch(text)
    of_parent = match is not None and match[5] is not None
    if not match or match[1] not in FIGURES or (of_parent and FIGURES[match[1]] is None):
        raise GqaError(
            "a gate is not understood",
            got=repr(text),
            allowed=f"one of {', '.join(FIGURES)}; <=, <, >= or >; a number, of the first two also a number * parent",
            hint='--gate "perplexity<=1.02*parent"',
        )
    number = float(match[3]) / (100 if match[4] else 1)
    return Gate(text.strip(), match[1], match[2], number, of_parent)
