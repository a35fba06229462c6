"""Prompts from a file: a line each, or JSON lines that may have right answers beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa.errors import GqaError


@dataclass(frozen=True)
class Prompt:
    """answers: each of them alone makes an answer right; empty where the file names none."""

    text: str
    answers: tuple[str, ...] = ()


def read_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a file: of .jsonl a line {"prompt": ..., "answer": ..., "answers": [...]}, of which only the
    first is needed; of any other file every line that is not blank.

    Raises GqaError for a file that is missing, not UTF-8 or without prompts, and for a .jsonl line that is wrong, with
    its number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise GqaError("no file of prompts at this path", got=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GqaError("the prompts cannot be read", got=f"{path}: {error}", allowed="UTF-8 text") from None
    read = _json_line if path.suffix == ".jsonl" else lambda line, place: Prompt(line.strip())
    prompts = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise GqaError("the file has no prompts", got=path, allowed="a prompt per line, or .jsonl lines with one")
    return prompts


def _json_line(line: str, place: str) -> Prompt:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{place}: {error}") from None
    if not isinstance(found, dict) or not _is_text(found.get("prompt")):
        raise _wrong(f"{place}: {line[:80]}")
    single, several = found.get("answer"), found.get("answers", [])
    answers = ([] if single is None else [single]) + (several if isinstance(several, list) else [several])
    if not all(map(_is_text, answers)):
        raise _wrong(f"{place}: {line[:80]}")
    return Prompt(found["prompt"], tuple(dict.fromkeys(answers)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _wrong(got: str) -> GqaError:
    return GqaError(
        "a line of the prompts is wrong",
        got=got,
        allowed='{"prompt": "...", "answer": "...", "answers": ["...", ...]}, the answers as you like',
    )
