"""One proof on a real model: what was asked, the working folder, and what steps share: parent, texts, predictions.

WORK/steps/NAME.json    the result of a finished step
WORK/texts/NAME.txt     the texts of the manifest; dialogue-T.npy: windows that the parent wrote
WORK/models/NAME        converted and trained models
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from real_progress import show
from real_texts import KINDS, MANIFEST, Text, check_manifest, collect, sha256

from gqa.errors import GqaError
from gqa.evaluate import ParentLogits, load_model, remember
from gqa.evaluate.own_text import own_text
from gqa.evaluate.prompts import own_prompts
from gqa.record import write_text_atomic
from gqa.source import open_checkpoint
from gqa.study.steps import Steps
from gqa.text import load_tokenizer, token_windows
from gqa.weights.reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUESTIONS = Path(__file__).with_name("questions.jsonl")
LONGEST_DIALOGUE = 2048  # tokens: a longer window takes the parent longer to write than all else to read
CALIBRATION_SEED, TEST_SEED = 0, 1  # of text that the parent writes: no test window is a calibration window
TOKENS_AT_ONCE = 2048  # of a batch that is evaluated


@dataclasses.dataclass(frozen=True)
class Asked:
    """Sizes in tokens. windows: window -> how many windows of each kind of text; recall: context -> items per task and
    depth; distill: tokens of each distillation; batch: windows of a training step; prompts: how many the parent
    writes; questions: the file with known answers."""

    model: str = "smollm2-135m"
    kv_heads: int = 1
    handbook: Path | None = None
    manifest: Path = MANIFEST
    questions: Path = QUESTIONS
    window: int = 256
    calibration: int = 32 << 10
    refine: int = 128 << 10
    refine_steps: int = 120
    distill: tuple[int, ...] = (32 << 10, 128 << 10)
    batch: int = 4
    windows: Mapping[int, int] = dataclasses.field(default_factory=lambda: {256: 32, 2048: 4, 8192: 2})
    recall: Mapping[int, int] = dataclasses.field(default_factory=lambda: {512: 8, 2048: 4, 8192: 1})
    prompts: int = 64
    answer_tokens: int = 64
    diagnosis_windows: int = 16

    def deciding(self) -> dict[str, Any]:
        """What every model depends on; the rest is part of steps' names, so that it may change between two runs."""
        names = ("model", "kv_heads", "window", "calibration", "refine", "refine_steps", "batch")
        return {name: getattr(self, name) for name in names}


class Bench:
    """Raises GqaError for a model that is not here, and a working folder of other models."""

    def __init__(self, asked: Asked, work: Path) -> None:
        self.asked, self.work = asked, work
        self.source = open_checkpoint(asked.model, show)
        assert self.source.folder is not None
        self.folder: Path = self.source.folder
        self.tokenizer: Any = load_tokenizer(self.folder)
        identity = {**asked.deciding(), "parent": Checkpoint(self.folder).fingerprint()}
        self.steps = Steps(work, identity, 0, show, what="proof on a real model", option="--work")
        self._logits: tuple[tuple[str, int], ParentLogits] | None = None

    @property
    def kinds(self) -> list[str]:
        """The kinds of text there are for this model: dialogue needs a chat template."""
        return [kind for kind in KINDS if kind != "dialogue" or self.tokenizer.chat_template]

    @property
    def cells(self) -> list[tuple[str, int, int]]:
        """(kind of text, tokens of a window, windows) of all measurements of loss."""
        return [
            (kind, length, count)
            for kind in self.kinds
            for length, count in self.asked.windows.items()
            if kind != "dialogue" or length <= LONGEST_DIALOGUE
        ]

    def collect_texts(self) -> dict[str, Any]:
        """Read the texts, compare them with the manifest and keep them; returns what the manifest says of each."""
        if self.asked.handbook is None:
            raise GqaError(
                "the English and French texts need the pages of Debian's handbook",
                allowed="--handbook FOLDER/usr/share/doc/debian-handbook/html",
                hint="apt-get download debian-handbook && dpkg -x debian-handbook_*.deb FOLDER",
            )
        texts: Mapping[str, Text] = collect(self.asked.handbook)
        check_manifest(texts, self.asked.manifest)
        for name, text in texts.items():
            write_text_atomic(self._text_path(name), text.content)
        return {name: {**text.about, "tokens": len(self.token_ids(text.content))} for name, text in texts.items()}

    def sample_dialogue(self, length: int, count: int) -> dict[str, Any]:
        """Let the parent write `count` windows of chats: every second window that it samples is one."""
        windows = own_text(self.folder, 2 * count, length, TEST_SEED, show)[1::2]
        path = self._dialogue_path(length, count)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, windows)
        return {"source": "sampled from the parent", "windows": count, "window": length, "sha256": _sha256(windows)}

    def sample_prompts(self) -> dict[str, Any]:
        chat = bool(self.tokenizer.chat_template)
        windows = None if chat else self.windows("prose", self.asked.window, self.asked.prompts)
        return {"prompts": own_prompts(self.parent, self.tokenizer, self.asked.prompts, windows=windows)}

    @functools.cached_property
    def parent(self) -> PreTrainedModel:
        return load_model(self.folder)

    def text(self, name: str) -> str:
        """A collected text. Raises GqaError if it is not what was collected."""
        content = self._text_path(name).read_text(encoding="utf-8")
        step = self.steps.find("texts")
        if step is None or step["result"][name]["sha256"] != sha256(content):
            raise GqaError("a text of the working folder was changed", got=name, hint="remove the folder, begin anew")
        return content

    def token_ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)

    def windows(self, kind: str, length: int, count: int) -> np.ndarray:
        """Test windows (N, T): `count`, or as many as the text has."""
        if kind == "dialogue":
            return np.load(self._dialogue_path(length, count))
        return token_windows(self.text(f"{kind}-test"), self.tokenizer, length, count)

    def parent_logits(self, kind: str, length: int, count: int) -> ParentLogits:
        """The parent's predictions on test windows: kept until those of other windows are wanted."""
        if self._logits is None or self._logits[0] != (kind, length):
            self._logits = None  # before the next ones come, not beside them
            known = remember(self.parent, self.windows(kind, length, count), batch_of(length))
            self._logits = (kind, length), known
        return self._logits[1]

    def model_folder(self, name: str) -> Path:
        return self.folder if name == "parent" else self.work / "models" / name

    def load(self, name: str) -> PreTrainedModel:
        return self.parent if name == "parent" else load_model(self.model_folder(name))

    def _text_path(self, name: str) -> Path:
        return self.work / "texts" / f"{name}.txt"

    def _dialogue_path(self, length: int, count: int) -> Path:
        return self.work / "texts" / f"dialogue-{length}x{count}.npy"


def batch_of(length: int) -> int:
    """Windows that are evaluated together."""
    return max(1, TOKENS_AT_ONCE // length)


def _sha256(windows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(windows, dtype=np.int64).tobytes()).hexdigest()
