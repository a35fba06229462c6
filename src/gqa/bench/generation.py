"""Tokens per second of a whole model, our way against transformers' default, both behind a check of their logits."""

# B batch · T query tokens · H KV heads · D head dim

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from gqa.bench.decode import decode_step, evaluating, filled_cache
from gqa.bench.kernels import OURS
from gqa.bench.timing import Seconds, take_turns
from gqa.errors import GqaError
from gqa.model import hf
from gqa.progress import Progress, silent

DEFAULT = "transformers default"
CHECKED_TOKENS = (0, 1, 2, 3)  # any will do: each gives a vocabulary of logits to compare
WARM_UP_STEPS = 3
REPEATS = 16

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """A model and a cache at the context to be timed; `rewind` takes the last token out of the cache again."""

    model: Any
    cache: Any
    rewind: Callable[[], object]

    def step(self, token: int = 0) -> torch.Tensor:
        return decode_step(self.model, self.cache, token)

    def logits(self) -> torch.Tensor:
        """(checked tokens, vocabulary): each as the next token after the context."""
        found = []
        for token in CHECKED_TOKENS:
            found.append(self.step(token))
            self.rewind()
        return torch.stack(found)


def measure_generation(
    model: Any, contexts: Sequence[int], *, repeats: int = REPEATS, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Decode one token after each context, batch 1, in turns: attn_implementation="gqa" with our cache, and the
    attention and the DynamicCache that transformers uses by itself. A flat row for each context and way.

    model: a transformers causal language model of at least 4 words; it is left as it was. Both ways share its
    weights, and hold the same random keys and values: time does not depend on them. The default's cache is copied
    whole at every step, as it is in `generate`; what is not timed is the return to the state before the step.

    Checked first: the root mean square of our logits' error, against the model in the next wider dtype, may be at
    most twice that of the default's. So a copy of the model in that dtype must fit beside it.

    A row has contender, context_tokens, dtype, layers, cache_bytes_measured, logits_error_rms and _allowed, status
    (`timed` or `wrong`), and where timed seconds_per_token_p20, _p50, _p80, tokens_per_second, repeats, times_of_gqa.
    Raises GqaError for counts below 1 and other dtypes than fp32, bf16 and fp16.
    """
    return list(generation_rows(model, contexts, repeats=repeats, progress=progress))


def generation_rows(
    model: Any, contexts: Sequence[int], *, repeats: int = REPEATS, progress: Progress = silent
) -> Iterator[dict[str, Any]]:
    """The rows of `measure_generation`, each context's as soon as it is measured."""
    if model.dtype not in WIDER:
        raise GqaError("a model of this dtype is not timed", got=model.dtype, allowed="fp32, bf16, fp16")
    hf.register()
    ours = sharing_copy(model, "gqa")
    default = sharing_copy(model, default_implementation(model))
    exact = copy.deepcopy(default).to(WIDER[model.dtype])
    for context in contexts:
        with evaluating(ours), evaluating(default), evaluating(exact):
            rows = _measure_at(context, ours, default, exact, repeats, progress)
        yield from rows


def _measure_at(
    context: int, ours: Any, default: Any, exact: Any, repeats: int, progress: Progress
) -> list[dict[str, Any]]:
    cache = filled_cache(ours, context)
    held = [tuple(view.clone() for view in layer.views()) for layer in cache.blocks]
    ways = {OURS: Way(ours, cache, lambda: cache.crop(-1)), DEFAULT: default_way(default, held, context)}
    right = default_way(exact, [tuple(x.to(exact.dtype) for x in pair) for pair in held], context).logits()
    errors = {name: _root_mean_square(way.logits().double() - right.double()) for name, way in ways.items()}
    del right
    allowed = 2 * errors[DEFAULT]
    timed = take_turns(
        {name: lambda _, way=way: way.step() for name, way in ways.items() if errors[name] <= allowed},
        repeats=repeats,
        warm_up=WARM_UP_STEPS,
        after={name: way.rewind for name, way in ways.items()},
        on_round=lambda done: progress("generation", done, repeats, f"{context} tokens"),
    )
    common = {
        "context_tokens": context,
        "dtype": str(ours.dtype).removeprefix("torch."),
        "layers": len(held),
        "cache_bytes_measured": sum(x.nbytes for pair in held for x in pair),
    }
    return [
        {"contender": name, **common, "logits_error_rms": errors[name], "logits_error_rms_allowed": allowed}
        | ({"status": "timed"} | _figures(timed[name], timed.get(OURS)) if name in timed else {"status": "wrong"})
        for name in ways
    ]


def _figures(seconds: Seconds, ours: Seconds | None) -> dict[str, Any]:
    return {
        "seconds_per_token_p20": seconds.p20,
        "seconds_per_token_p50": seconds.p50,
        "seconds_per_token_p80": seconds.p80,
        "tokens_per_second": 1 / seconds.p50,
        "repeats": seconds.repeats,
        "times_of_gqa": None if ours is None else seconds.p50 / ours.p50,
    }


def _root_mean_square(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt().nan_to_num(torch.inf))


def default_way(model: Any, held: list, context_tokens: int) -> Way:
    """The model with a DynamicCache that has seen `context_tokens`, of which `held` has each layer's (k, v).

    A step replaces a layer's tensors and never writes into them, so the state before it is kept as copies of the
    layer objects.
    """
    cache = DynamicCache(config=model.config)
    for index, (k, v) in enumerate(held):
        cache.update(k, v, index)
        layer: Any = cache.layers[index]
        if hasattr(layer, "cumulative_length"):  # a window's layer counts the tokens that it has dropped
            layer.cumulative_length = context_tokens
    before = [copy.copy(layer) for layer in cache.layers]

    def rewind() -> None:
        cache.layers[:] = [copy.copy(layer) for layer in before]

    return Way(model, cache, rewind)


def default_implementation(model: Any) -> str:
    """What transformers chooses where nobody asks: torch's attention, or its own where a model cannot use that."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def sharing_copy(model: Any, implementation: str) -> Any:
    """The same model with a config of its own and this attention; the weights are shared, not copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation(implementation)
    return twin


def random_model(config: Mapping[str, Any], dtype: torch.dtype, seed: int = 0) -> Any:
    """A causal language model of this raw config with random weights, for timing. Raises GqaError where transformers
    does not know the architecture or refuses the config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    model_type = fields.pop("model_type", "")
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype).eval()
    except (ValueError, TypeError, KeyError) as error:
        raise GqaError("transformers cannot build this model", got=f"{model_type}: {error}") from error
