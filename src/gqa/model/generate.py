"""Text from a model, piece by piece as it comes, with the time and the memory it took."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

from gqa.errors import GqaError
from gqa.model import hf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CacheKind = Literal["contiguous", "paged", "int8"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token every time; above, tokens are drawn from softmax(logits / temperature),
    restricted to the fewest that together have the probability top_p. What the model's own generation settings ask for
    besides, such as a repetition penalty, holds; their temperature, top-p, top-k and beams do not."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise GqaError("a temperature is negative or not finite", got=self.temperature, allowed="0 or more")
        if not 0 < self.top_p <= 1:
            raise GqaError("top-p is not a probability", got=self.top_p, allowed="above 0, at most 1")
        if self.top_p < 1 and not self.temperature:
            raise GqaError("top-p restricts sampling, and temperature 0 does not sample", hint="--temperature 0.7")


@dataclasses.dataclass(frozen=True)
class Generation:
    """text: without the prompt and special tokens. seconds_to_first_token: the prompt's computation and one token.
    tokens_per_second: of the tokens after the first, None where there are none. kv_cache_bytes: of the keys and values
    held at the end, None without a cache or where it is transformers' choice and was interrupted. peak_memory_bytes:
    the most that torch held on the model's GPU, weights included; None elsewhere. interrupted: by Ctrl-C; the rest
    tells of what had been generated."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: float | None
    tokens_per_second: float | None
    kv_cache_bytes: int | None
    peak_memory_bytes: int | None
    interrupted: bool


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let a loaded model run this attention implementation, "gqa" for ours. Raises GqaError where it cannot."""
    hf.register()
    refusal = ""
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        refusal = f": {str(error).splitlines()[0]}"
    taken = model.config.get_text_config(decoder=True)._attn_implementation
    if refusal or taken != name:  # for some models transformers only warns, and goes on with their own attention
        raise GqaError(
            "this model cannot run the attention asked for",
            got=f"{type(model).__name__} with {name}{refusal}",
            hint=f"--attention {taken}",
        )


@contextlib.contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode and with attn_implementation="gqa" meanwhile, then as it was before. Raises GqaError where
    it cannot run our attention."""
    before: Any = model.config.get_text_config(decoder=True)._attn_implementation
    training = model.training
    use_attention(model, hf.NAME)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(before)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> torch.Tensor:
    """Token ids (1, T) of a prompt; with `chat`, as a user's turn in the model's own chat template.

    Raises GqaError for a prompt that is not text or has no tokens, and with `chat` for a model without a template or
    with a broken one.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python lets bytes that are not UTF-8 through from the command line
        raise GqaError("the prompt is not text", got=str(error), allowed="UTF-8") from None
    if chat:
        ids = tokenizer.encode(chat_text(tokenizer, prompt), add_special_tokens=False, verbose=False)
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise GqaError("the prompt has no tokens", got=repr(prompt))
    return torch.tensor([ids])


def chat_text(tokenizer: PreTrainedTokenizerBase, words: str) -> str:
    """The model's chat template with these words as a user's turn, up to where the answer begins.

    Raises GqaError for a model without a template or with a broken one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GqaError("this model has no chat template", hint="leave out --chat")
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": words}]
    try:
        text: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise GqaError("the model's chat template fails", got=str(error), hint="leave out --chat") from None
    return text


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: torch.Tensor,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    cache: CacheKind | None = None,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generation:
    """Continue prompt_ids (1, T) until the model ends its text, or for max_tokens tokens.

    on_text gets each piece of text as soon as its characters are whole; together they are the result's text.
    cache: the kind of our cache to keep keys and values in, for a model with attn_implementation="gqa"; None leaves
    the choice to transformers' generate(), which takes our contiguous one for such a model, else its own.
    Ctrl-C ends the text there. Raises GqaError for max_tokens below 1, an explicit cache that the model or its
    attention does not go with, and for a model that does not generate text.
    """
    if max_tokens < 1:
        raise GqaError("a number of tokens is not positive", got=max_tokens, allowed="1 or more")
    if not model.can_generate():
        raise GqaError("this model does not generate text", got=type(model).__name__)
    sampling = sampling or Sampling()
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0, "num_beams": 1}
    if sampling.temperature:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    prompt_tokens = prompt_ids.shape[1]
    if cache is not None:
        options["past_key_values"] = _cache(model, cache, prompt_tokens + max_tokens)
    stream = _Stream(tokenizer, on_text)
    held: Any = options.get("past_key_values")
    interrupted = False
    prompt_ids = prompt_ids.to(model.device)
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        for gpu in gpus:
            torch.cuda.synchronize(gpu)  # the stream's times are of tokens on the host, so only the first needs this
            torch.cuda.reset_peak_memory_stats(gpu)
        stream.start = time.perf_counter()
        try:
            result: Any = model.generate(  # type: ignore[operator]
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=max_tokens,
                streamer=stream,
                return_dict_in_generate=True,
                **options,
            )
            held = result.past_key_values
        except KeyboardInterrupt:
            interrupted = True
            stream.end()
    times = stream.times
    return Generation(
        text="".join(stream.pieces),
        prompt_tokens=prompt_tokens,
        new_tokens=len(times),
        seconds_to_first_token=times[0] - stream.start if times else None,
        tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        kv_cache_bytes=_nbytes(held),
        peak_memory_bytes=torch.cuda.max_memory_allocated(gpus[0]) if gpus else None,
        interrupted=interrupted,
    )


class _Stream(BaseStreamer):
    """Hands text on as its tokens come, and notes when each came; transformers puts the prompt first.

    A token may be less than a character, and some tokenizers write it differently at the beginning of a text. So a
    piece is what the new tokens add to the text of those before them, held back while it ends amid a character.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.pieces: list[str] = []
        self.times: list[float] = []
        self.start = 0.0
        self._tokens: list[int] = []
        self._known = self._told = 0  # _tokens[_known:_told] is the last piece, whose text the next one follows
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.times.append(time.perf_counter())
        self._tokens += value.flatten().tolist()
        self._tell(even_incomplete=False)

    def end(self) -> None:
        self._tell(even_incomplete=True)

    def _tell(self, *, even_incomplete: bool) -> None:
        before, now = (
            self.tokenizer.decode(self._tokens[self._known : end], skip_special_tokens=True)
            for end in (self._told, len(self._tokens))
        )
        piece = now[len(before) :]
        if not piece or (piece.endswith("\N{REPLACEMENT CHARACTER}") and not even_incomplete):
            return
        self._known, self._told = self._told, len(self._tokens)
        self.pieces.append(piece)
        self.on_text(piece)


def _cache(model: PreTrainedModel, kind: CacheKind, capacity: int) -> hf.GqaCache:
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != hf.NAME:
        raise GqaError(f"a {kind} cache goes with attention {hf.NAME}", got=config._attn_implementation)
    return hf.GqaCache(capacity, config, kind=kind)


def _nbytes(cache: Any) -> int | None:
    if cache is None:
        return None
    if isinstance(cache, hf.GqaCache):
        return cache.nbytes_used
    tensors = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)) if tensors else None
