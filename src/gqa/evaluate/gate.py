"""Conditions that an evaluation has to meet: `perplexity<=1.02*parent`, `answers_equal>=0.5`, `arc:acc>0.3`."""

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
# Figure -> that of the parent, where it has one. Measured on text:
OF_TEXT = {
    "perplexity": "parent_perplexity",
    "cross_entropy_nats_per_token": "parent_cross_entropy_nats_per_token",
    "loss_above_parent_nats": None,
    "kl_to_parent_nats": None,
    "top1_agreement": None,
}
# ... and in answers to prompts, always beside the parent.
OF_ANSWERS = {
    "answers_equal": None,
    "common_prefix_share": None,
    "answers_kl_nats": None,
    "answers_top1_agreement": None,
    "degenerate_answers": "parent_degenerate_answers",
    "right_answers": "parent_right_answers",
    "right_answers_kept": None,
}
FIGURES = OF_TEXT | OF_ANSWERS
_GATE = re.compile(
    r"\s*(?:([\w.-]+):)?(\w+)\s*(<=|>=|<|>)\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*(%?)\s*(?:\*\s*(parent))?\s*"
)


@dataclasses.dataclass(frozen=True)
class Gate:
    """`figure compare number`, or `number * parent` the same figure of the parent's. task: of which task of
    lm-evaluation-harness the figure is a metric, else None."""

    text: str
    task: str | None
    figure: str
    compare: str
    number: float
    of_parent: bool

    @property
    def needs_parent(self) -> bool:
        return self.of_parent or self.of_answers or (self.task is None and FIGURES[self.figure] is None)

    @property
    def of_text(self) -> bool:
        """Whether its figure is measured on text."""
        return self.task is None and self.figure in OF_TEXT

    @property
    def of_answers(self) -> bool:
        """Whether its figure is measured in answers to prompts."""
        return self.task is None and self.figure in OF_ANSWERS

    def check(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The gate's text, the figure, what it was held against, and whether it passed.

        Raises GqaError for a task, a metric or a figure that the results do not have."""
        value, parents = self._of_task(results) if self.task else self._of_figure(results)
        against = self.number * (parents if self.of_parent else 1.0)
        return {"gate": self.text, "value": value, "against": against, "passed": _COMPARE[self.compare](value, against)}

    def _of_figure(self, results: Mapping[str, Any]) -> tuple[float, float]:
        parent = FIGURES[self.figure]
        if results.get(self.figure) is None:
            raise GqaError(
                "a gate asks for a figure that was not measured",
                got=self.text,
                allowed=", ".join(name for name in FIGURES if results.get(name) is not None),
                hint="right answers need prompts with an answer, and right_answers_kept one that the parent gives",
            )
        return results[self.figure], results[parent] if self.of_parent and parent else 1.0

    def _of_task(self, results: Mapping[str, Any]) -> tuple[float, float]:
        # A task may filter answers in several ways: its first is the one that counts.
        rows = {(row["task"], row["metric"]): row for row in reversed(results["tasks"])}
        if (self.task, self.figure) not in rows:
            raise GqaError(
                "a gate asks for what no task gave",
                got=self.text,
                allowed=", ".join(f"{task}:{metric}" for task, metric in reversed(rows)),
            )
        row = rows[str(self.task), self.figure]
        return row["value"], row.get("parent_value", 1.0)


def parse_gate(text: str) -> Gate:
    """Raises GqaError for what is no condition on a figure of an evaluation."""
    match = _GATE.fullmatch(text)
    of_parent = match is not None and match[6] is not None
    known = match is not None and (match[1] is not None or match[2] in FIGURES)
    if not match or not known or (of_parent and match[1] is None and FIGURES[match[2]] is None):
        raise GqaError(
            "a gate is not understood",
            got=repr(text),
            allowed=f"one of {', '.join(FIGURES)}, or TASK:METRIC; <=, <, >= or >; a number, of "
            f"{', '.join(name for name, parent in FIGURES.items() if parent)} and of metrics also a number * parent",
            hint='--gate "perplexity<=1.02*parent"',
        )
    number = float(match[4]) / (100 if match[5] else 1)
    return Gate(text.strip(), match[1], match[2], match[3], number, of_parent)
