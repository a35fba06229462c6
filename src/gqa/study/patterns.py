"""What the query heads look at: attention probabilities of a text, head by head, at the weights of the study's models.

A random model of the parent's shape is the contrast: what is seen there comes from the shape alone. Heads are compared
by the Jensen-Shannon divergence of their probabilities, `H((p + q) / 2) - (H(p) + H(q)) / 2` in nats, 0 for heads that
look at the same tokens and ln 2 for heads that share none: conversion lets heads share a KV head, and the comparison
tells whether those that came to share looked at the same tokens before, and whether they do so after.
"""

# H*G query heads · T query tokens · S key tokens, S = T

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A map is text: a character per query and key token, its place in this alphabet the share of attention as
# LEVELS * sqrt(share), row by row without the keys that a query cannot see.
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LEVELS = len(ALPHABET) - 1
MAP_TOKENS = 48
MAP_CHARACTERS = 200_000  # of all maps together, as the page has to stay below 1 MB
_FEWEST_TOKENS = 16
_ROWS = 32  # query tokens of a window at which heads are compared with each other
_DIGITS = 4  # of what is written down

# Layer -> for every KV head, which of the parent's KV heads were merged into it.
Groups = Mapping[int, Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Child:
    """A converted model, and what the conversion says of its heads."""

    folder: Path
    groups: Groups


@dataclasses.dataclass(frozen=True)
class Looks:
    """Of one layer, by query head: distance (tokens between query and key), entropy (nats), share on the first token
    and on the one before the query, each (H*G,), a mean over windows and the query tokens after the first; divergence
    (H*G, H*G) nats between heads."""

    distance: Tensor
    entropy: Tensor
    first: Tensor
    previous: Tensor
    divergence: Tensor


def measure(
    parent: Path, children: Mapping[int, Child], windows: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> dict[str, Any]:
    """Results for a study's record, of the parent, its children (KV heads -> child) and a random model.

    attention_text: the `tokens` of the maps, the start of the first window, and the map's `alphabet`; attention_maps: a
    row per model and drawn layer with a map per query head; attention_heads: the same with figures per query head;
    attention_alike: divergence of heads within and between groups, for every layer. Empty for models that give no
    attention.
    """
    from gqa.evaluate import load_model

    rows: dict[str, list[dict[str, Any]]] = {"maps": [], "heads": [], "alike": []}
    model = load_model(parent)
    shape = model.config.get_text_config()
    heads, full, layers = shape.num_attention_heads, shape.num_key_value_heads, shape.num_hidden_layers
    drawn, tokens = _extent(2 + len(children), layers, heads, windows.shape[1])
    excerpt = windows[:1, :tokens]

    def add(weights: str, kv_heads: int, model: PreTrainedModel, groups: Groups) -> list[Looks]:
        found = looks(model, windows)
        rows["heads"] += [
            _figures(weights, kv_heads, heads, layer, of, _order(groups.get(layer), heads // full))
            for layer, of in enumerate(found)
            if layer in drawn
        ]
        for layer, probabilities in enumerate(next(_attention(model, excerpt), ())):
            if layer in drawn:
                maps = [encode(head) for head in probabilities]
                rows["maps"].append({"weights": weights, "kv_heads": kv_heads, "layer": layer, "maps": maps})
        return found

    own = add("parent", full, model, {})
    if not own:
        return {}
    _alike(rows["alike"], "parent", full, "neighbours", own, full)
    fresh = random_like(model, seed)
    at_random = add("random", full, fresh, {})
    del model, fresh
    for kv_heads, child in children.items():
        _alike(rows["alike"], "parent", kv_heads, "neighbours", own, kv_heads)
        _alike(rows["alike"], "random", kv_heads, "neighbours", at_random, kv_heads)
        for layer, groups in child.groups.items():
            reads = [0] * heads
            for group, members in enumerate(groups):
                for head in _order([members], heads // full) or ():
                    reads[head] = group
            _alike(rows["alike"], "parent", kv_heads, "as converted", {layer: own[layer]}, reads)
        found = add("child", kv_heads, load_model(child.folder), child.groups)
        _alike(rows["alike"], "child", kv_heads, "as converted", found, kv_heads)
    text = {"tokens": [tokenizer.decode([int(i)]) for i in excerpt[0]], "alphabet": ALPHABET}
    return {"attention_text": text} | {f"attention_{name}": found for name, found in rows.items()}


def looks(model: PreTrainedModel, windows: np.ndarray) -> list[Looks]:
    """What the heads of every layer look at on windows (N, T); empty for a model that gives no attention."""
    sums: list[list[Tensor]] = []
    for layers in _attention(model, windows):
        sums = sums or [[] for _ in layers]
        for sofar, probabilities in zip(sums, layers, strict=True):
            figures = _of_window(probabilities)
            sofar[:] = [a + b for a, b in zip(sofar, figures, strict=True)] if sofar else figures
    return [Looks(*(total / len(windows) for total in sofar)) for sofar in sums]


def divergence(probabilities: Tensor) -> Tensor:
    """Jensen-Shannon divergence between heads (heads, heads) in nats, a mean over rows: (heads, rows, S) -> ."""
    entropy = torch.special.entr(probabilities).sum(-1)
    found = [
        torch.special.entr((one + probabilities) / 2).sum(-1) - (own + entropy) / 2
        for one, own in zip(probabilities, entropy, strict=True)
    ]
    return torch.stack(found).mean(-1)


def encode(probabilities: Tensor) -> str:
    """The map of a head, (T, T): what a query sees, row by row, a character each."""
    levels = (LEVELS * probabilities.clamp(0, 1).sqrt()).round().int().tolist()
    return "".join(ALPHABET[level] for t, row in enumerate(levels) for level in row[: t + 1])


def within_and_between(divergences: Tensor, reads: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean divergence of pairs of heads that read the same KV head, and of the others; None where there are none."""
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for a, b in itertools.combinations(range(len(reads)), 2):
        pairs[reads[a] == reads[b]].append(float(divergences[a, b]))
    return tuple(sum(pairs[same]) / len(pairs[same]) if pairs[same] else None for same in (True, False))  # type: ignore


def random_like(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same shape with the weights that its class starts training from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = type(model)(model.config)
    return made.to(device=model.device, dtype=model.dtype).eval()


@torch.inference_mode()
def _attention(model: Any, windows: np.ndarray) -> Iterator[list[Tensor]]:
    """Per window and layer the probabilities (H*G, T, S), float32; nothing where a layer has none."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one that writes the probabilities down
    try:
        for window in windows:
            ids = torch.as_tensor(window, device=model.device)[None]
            layers = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
            if not layers or any(layer is None for layer in layers):
                return
            yield [layer[0].float() for layer in layers]
    finally:
        model.set_attn_implementation(before)


def _of_window(probabilities: Tensor) -> list[Tensor]:
    """The figures of Looks for a window's (H*G, T, S)."""
    T = probabilities.shape[1]
    position = torch.arange(T, device=probabilities.device)
    back = (position[:, None] - position).clamp(min=0).float()
    rows = torch.linspace(1, T - 1, min(_ROWS, T - 1), device=probabilities.device).round().long()
    seen = probabilities[:, 1:]  # the first token sees itself alone
    figures = [
        (seen * back[1:]).sum(-1).mean(1),
        torch.special.entr(seen).sum(-1).mean(1),
        seen[:, :, 0].mean(1),
        probabilities.diagonal(-1, 1, 2).mean(1),
        divergence(probabilities[:, rows]),
    ]
    return [figure.double().cpu() for figure in figures]


def _extent(models: int, layers: int, heads: int, window: int) -> tuple[list[int], int]:
    """(layers to draw, tokens) so that all maps stay within MAP_CHARACTERS: fewer tokens first, then fewer layers."""
    for count in range(layers, 0, -1):
        for tokens in range(min(MAP_TOKENS, window), min(_FEWEST_TOKENS, window) - 1, -1):
            if models * count * heads * tokens * (tokens + 1) // 2 <= MAP_CHARACTERS:
                spread = [round(k * (layers - 1) / (count - 1)) for k in range(count)] if count > 1 else [layers // 2]
                return spread, tokens
    tokens = min(window, max(2, int((2 * MAP_CHARACTERS / (models * heads)) ** 0.5) - 1))
    return [layers // 2], tokens


def _order(groups: Sequence[Sequence[int]] | None, queries: int) -> list[int] | None:
    """Which of the parent's query heads each query head was: a group's members with their `queries` heads each."""
    if groups is None:
        return None
    return [member * queries + query for members in groups for member in members for query in range(queries)]


def _figures(weights: str, kv_heads: int, heads: int, layer: int, of: Looks, order: list[int] | None) -> dict[str, Any]:
    return {
        "weights": weights,
        "kv_heads": kv_heads,
        "layer": layer,
        "parent_heads": order or list(range(heads)),
        "distance_tokens": _rounded(of.distance),
        "entropy_nats": _rounded(of.entropy),
        "first_share": _rounded(of.first),
        "previous_share": _rounded(of.previous),
    }


def _alike(
    rows: list[dict[str, Any]],
    weights: str,
    kv_heads: int,
    grouping: str,
    of: Sequence[Looks] | Mapping[int, Looks],
    groups: int | Sequence[int],
) -> None:
    """Add a row per layer; groups: which KV head each query head reads, or how many neighbours share."""
    for layer, found in of.items() if isinstance(of, Mapping) else enumerate(of):
        heads = len(found.distance)
        reads = [head * groups // heads for head in range(heads)] if isinstance(groups, int) else groups
        within, between = within_and_between(found.divergence, reads)
        rows.append(
            {
                "weights": weights,
                "kv_heads": kv_heads,
                "layer": layer,
                "grouping": grouping,
                "within_nats": None if within is None else round(within, _DIGITS),
                "between_nats": None if between is None else round(between, _DIGITS),
            }
        )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
