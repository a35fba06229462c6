"""Text that a model writes by itself: windows to train its child on, and prompts to compare the two with.

    window 0   BOS text ........ EOS BOS the next text ...............
    window 1   template | question | header | answer ... EOS template | the next question ...

All windows of a batch are T tokens long and take their next token in one forward, each from a context of everything
that its window holds so far. So the windows are dense, need no padding and no mask, and every token is drawn from
exactly what a model predicts that reads the window: p(token | all tokens of the window before it).
"""

# N windows · T tokens of a window · B windows of a batch · V entries of the vocabulary

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.errors import GqaError
from gqa.model.cache import GqaCache
from gqa.model.generate import Sampling, chat_text, our_attention
from gqa.model.serve import forward
from gqa.progress import Progress, silent
from gqa.record import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 128  # SmolLM2-135M in bf16, one core of an EPYC: 191 tokens/s at 32, 255 at 64, 307 at 128, 356 at 256
_ABOUT = "gqa-sampled-text.json"
_ROWS = 8  # distributions at a time: their sums over a large vocabulary then stay in the processor's cache
_LIKELIEST = 1024
_WINDOWS, _PROMPTS = 0, 1  # their random numbers differ, so that no prompt is a text of the windows


@dataclass(frozen=True)
class Turns:
    """A chat template around a user's words. start: token ids before them; reply: those between them and the answer,
    the first of which ends the user's turn."""

    start: tuple[int, ...]
    reply: tuple[int, ...]


def wants_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """What was chosen; by default whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def chat_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The model's chat template, cut where the user's words stand.

    Raises GqaError for a model without a template, with a broken one, and with one that changes the words.
    """
    marker = "gqamarker"
    before, found, after = chat_text(tokenizer, marker).partition(marker)
    start, reply = (tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after))
    if not found or marker in after or not start or not reply:
        raise GqaError("the chat template does not have the user's words once, between two parts", hint="chat=False")
    return Turns(start, reply)


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    window_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    chat: bool | None = None,
    seed: int = 0,
    batch: int = BATCH,
    folder: Path | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """Windows (N, T) of token ids, int64, that the model has written.

    Even windows begin with the beginning of a text (the BOS token; the EOS token where there is none). With chat, odd
    ones begin with the template up to the user's words: the model writes a question, the template's header of the
    answer follows, then the model writes the answer. When a text or an answer ends, the next one begins in the same
    window. The template's tokens are part of the windows.

    Token t of window i is drawn with a random number that depends on (seed, i, t) alone, so windows depend neither on
    `batch` nor on how many there are, but for the rounding of sums in another order. A batch takes B * T tokens of KV
    cache.

    Args:
        model: a causal language model of transformers; it runs with attn_implementation="gqa" meanwhile.
        temperature, top_p: as in `Sampling`; the temperature above 0.
        chat: whether odd windows are chats; by default if the tokenizer has a chat template.
        batch: windows that are written together.
        folder: keeps finished batches, so that a stopped run continues after the last one, and a later call with the
            same settings reads its windows from there, as many as it wants; what is missing is added.

    Raises:
        GqaError: for sizes below 1, a window too short for the template, chat without a template, a model that our
            cache does not serve, a folder of another model or of other settings, or one that holds something else.
    """
    sampling = _checked(temperature, top_p, seed, windows=windows, window_tokens=window_tokens, batch=batch)
    turns = _turns(tokenizer, chat)
    begin, ends = _begin(tokenizer), text_ends(model, tokenizer)
    if turns is not None and len(turns.start) >= window_tokens:
        raise GqaError(
            "the window has no room behind the chat template",
            got=f"{window_tokens} tokens",
            allowed=f"more than {len(turns.start)}",
        )
    parts = []
    if folder is not None:
        about = {
            "model": fingerprint(model),
            "window_tokens": window_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "chat": turns is not None,
        }
        parts = _stored(folder, about, windows)
    done = sum(map(len, parts))
    while done < windows:
        numbers = range(done, min(done + batch, windows))
        texts = [_Text(begin, ends, turns if number % 2 else None) for number in numbers]
        uniforms = _uniforms(sampling.seed, numbers, window_tokens, _WINDOWS)
        before, clock = done, time.perf_counter()

        def step(tokens: int, before: int = before, size: int = len(numbers), clock: float = clock) -> bool:
            rate = size * tokens / (time.perf_counter() - clock)
            progress("sampling text", before + size * tokens // window_tokens, windows, f"{rate:.0f} tokens/s")
            return False

        part = _write(model, texts, uniforms, sampling, step)
        if folder is not None:
            _store(folder, done, part)
        parts.append(part)
        done += len(part)
    return np.concatenate(parts)[:windows].astype(np.int64)


def sample_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: int,
    max_tokens: int = 96,
    temperature: float = 0.7,
    top_p: float = 1.0,
    chat: bool | None = None,
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress = silent,
) -> list[list[int]]:
    """Token ids of prompts that the model has written, to be continued with an answer.

    With chat, a prompt is the template with a user's words, up to where the answer begins; words of more than
    max_tokens tokens are cut there. Without, it is the beginning token and max_tokens tokens of a text. These texts
    are others than those of `sample_windows` with the same seed. The temperature is lower by default, as a small
    model writes much that is no question at 1. Arguments and errors as there.
    """
    sampling = _checked(temperature, top_p, seed, prompts=prompts, max_tokens=max_tokens, batch=batch)
    turns = _turns(tokenizer, chat)
    begin, ends = _begin(tokenizer), text_ends(model, tokenizer)
    made: list[list[int]] = []
    length = max_tokens + (len(turns.start) if turns is not None else len(begin))
    while len(made) < prompts:
        numbers = range(len(made), min(len(made) + batch, prompts))
        texts = [_Text(begin, ends, turns) for _ in numbers]

        def asked(tokens: int, texts: list[_Text] = texts) -> bool:
            return turns is not None and all(text.asked is not None for text in texts)

        ids = _write(model, texts, _uniforms(sampling.seed, numbers, length, _PROMPTS), sampling, asked)
        for row, text in zip(ids.tolist(), texts, strict=True):
            made.append(row if turns is None else [*row[: text.asked], *turns.reply])
        progress("sampling prompts", len(made), prompts)
    return made


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the weights: names, shapes and up to 2048 values, evenly spaced, of every parameter. It does not
    depend on the dtype that a model was loaded with, as long as that keeps its stored numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """Tokens (B,) from p = softmax(logits / temperature), logits (B, V), restricted to the fewest likeliest tokens that
    together have the probability top_p, and to those as likely as the last of them.

    A row's token is the first whose cumulated probability, in the order of the ids and as a share of those kept, is
    above the row's uniform number (B,), in [0, 1). Raises GqaError for logits that are not numbers.
    """
    drawn = []
    for piece, uniform in zip(logits.split(_ROWS), uniforms.to(logits.device).split(_ROWS), strict=True):
        p = torch.softmax(piece.float() / temperature, dim=-1).double()
        if not p[:, 0].isfinite().all():  # one such logit makes a whole row NaN
            raise GqaError("the model's predictions are not numbers", got="NaN or infinite logits")
        if top_p < 1:
            p = p.where(p >= _least_kept(p, top_p), 0.0)
        cumulated = p.cumsum(-1)
        place = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
        drawn.append(place[:, 0].clamp_(max=p.shape[1] - 1))
    return torch.cat(drawn)


def _least_kept(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability (B, 1) among the likeliest of p (B, V) that together have top_p."""
    likeliest = p.topk(min(_LIKELIEST, p.shape[1])).values
    if (likeliest.sum(-1) < top_p).any():  # seldom, and sorting all of a large vocabulary takes longer than the model
        likeliest = p.sort(descending=True).values
    kept = (likeliest.cumsum(-1) - likeliest < top_p).sum(-1, keepdim=True)
    return likeliest.gather(1, kept - 1)


class _Text:
    """What stands next in one window: a token that has to stand there, or the one that was drawn."""

    def __init__(self, begin: tuple[int, ...], ends: frozenset[int], turns: Turns | None) -> None:
        self._ends, self._turns = ends, turns
        self._start = begin if turns is None else turns.start
        self._due = list(self._start)
        self._asking = turns is not None
        self._tokens = 0
        self.asked: int | None = None  # tokens before the end of the first question

    def next(self, drawn: int) -> int:
        self._tokens += 1
        if self._due:
            return self._due.pop(0)
        if self._turns is not None and self._asking:
            if drawn in self._ends or drawn == self._turns.reply[0]:
                self._asking = False
                self.asked = self._tokens - 1 if self.asked is None else self.asked
                drawn, *self._due = self._turns.reply
        elif drawn in self._ends:
            self._due = list(self._start)
            self._asking = self._turns is not None
        return drawn


@torch.inference_mode()
def _write(
    model: Any, texts: Sequence[_Text], uniforms: np.ndarray, sampling: Sampling, step: Callable[[int], bool]
) -> np.ndarray:
    """Windows (B, T), int32, of these texts; fewer tokens if `step`, called with the tokens so far, returns True."""
    B, T = uniforms.shape
    ids = np.empty((B, T), np.int32)
    drawn = [0] * B  # nothing is drawn before the first token: a window begins with one that has to stand there
    numbers = torch.from_numpy(uniforms)
    with our_attention(model):
        cache = GqaCache(T, model.config.get_text_config(decoder=True))
        for t in range(T):
            ids[:, t] = [text.next(token) for text, token in zip(texts, drawn, strict=True)]
            if step(t + 1) or t + 1 == T:
                return ids[:, : t + 1]
            logits = forward(model, cache, ids[:, t : t + 1].tolist())
            drawn = draw(logits, numbers[:, t + 1], sampling.temperature, sampling.top_p).tolist()
    raise AssertionError("a window has tokens")


def _uniforms(seed: int, numbers: Sequence[int], tokens: int, stream: int) -> np.ndarray:
    """Random numbers in [0, 1), (B, T): those of a window depend on the seed and on its own number alone."""
    return np.stack([np.random.default_rng([seed, number, stream]).random(tokens) for number in numbers])


def _turns(tokenizer: Any, chat: bool | None) -> Turns | None:
    return chat_turns(tokenizer) if wants_chat(tokenizer, chat) else None


def _begin(tokenizer: Any) -> tuple[int, ...]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (token,)
    raise GqaError("the tokenizer has no token for the beginning or the end of a text", allowed="a BOS or an EOS token")


def text_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens after which a text is over: those that end generate(), and the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    of_model = getattr(settings, "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _checked(temperature: float, top_p: float, seed: int, **sizes: int) -> Sampling:
    for name, size in sizes.items():
        if size < 1:
            raise GqaError(f"{name} must be positive", got=size, allowed="1 or more")
    if temperature <= 0 or seed < 0:
        raise GqaError(
            "sampling needs a temperature above 0 and a seed of 0 or more",
            got=f"temperature {temperature}, seed {seed}",
        )
    return Sampling(temperature, top_p, seed)


def _stored(folder: Path, about: dict[str, Any], windows: int) -> list[np.ndarray]:
    """The first windows that the folder holds, about as many as are wanted; a new folder begins with what it is for."""
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / _ABOUT, json.dumps(about, indent=2) + "\n")
    try:
        found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != about:
        strange = sorted(k for k in about if found.get(k) != about[k]) if isinstance(found, dict) else [_ABOUT]
        raise GqaError(
            "the folder holds something else than text sampled from this model with these settings",
            got=f"{folder}: different {', '.join(strange)}",
            allowed="a new folder, or one that the same model and settings have written",
        )
    parts, done = [], 0
    while done < windows and (path := _file(folder, done)).exists():
        try:
            part = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, str(error)) from None
        if part.ndim != 2 or part.shape[1] != about["window_tokens"] or part.dtype != np.int32 or not len(part):
            raise _damaged(path, f"{part.dtype} {part.shape}")
        parts.append(part)
        done += len(part)
    return parts


def _store(folder: Path, first: int, part: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, part, allow_pickle=False)
    write_bytes_atomic(_file(folder, first), content.getvalue())


def _file(folder: Path, first: int) -> Path:
    return folder / f"windows-{first:08d}.npy"


def _damaged(path: Path, got: str) -> GqaError:
    return GqaError("a file of sampled text is damaged", got=f"{path}: {got}", hint=f"delete {path}")
