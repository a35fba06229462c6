"""Pooling alone (mean, first, random), and repeating heads: W_q and W_o stay byte for byte.

A layer is so soon computed that it is done while the file is written that it goes to.

Letters: H KV heads of the parent · r of them share one in the child · D head dim · E inputs (with bias column).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gqa.config import LayerShape
from gqa.convert.grouping import Groups, contiguous
from gqa.convert.heads import Heads
from gqa.convert.job import Job
from gqa.convert.merge import METHODS
from gqa.convert.recipe import Recipe
from gqa.convert.stored import as_stored
from gqa.weights.layout import AttentionWeights, Layout

# Layers that are computed before they are asked for: one, as each takes less time than the copying between two.
_AHEAD = 1


def pool(weights: AttentionWeights, shape: LayerShape, layout: Layout, recipe: Recipe, layer: int) -> AttentionWeights:
    """The layer with K and V of `recipe.kv_heads` heads, each made of r = H / kv_heads neighbours; or, where these are
    more than H, every head kv_heads / H times over, bit for bit, whatever the method.

    One group at a time, in float32 for tensors of 16 bits (whose sums of r it holds to 2^-24) and in float64 for
    wider ones. The same layer gives the same numbers whenever it is asked for. Heads with norm factors of their own
    share them as they do keys.
    """
    if recipe.kv_heads > shape.kv_heads:
        return _repeat(weights, shape, layout, recipe.kv_heads // shape.kv_heads)
    generator = torch.Generator().manual_seed(layer_seed(recipe, layer))
    keys = _rows(weights.k, weights.k_bias, shape.kv_heads)
    values = _rows(weights.v, weights.v_bias, shape.kv_heads)
    method = METHODS[recipe.method]
    merged = []
    for group in groups_of(shape, recipe):
        some = slice(group[0], group[-1] + 1)
        key, value = _wide(keys, some), _wide(values, some)
        # The methods carry queries and outputs along; here there are none to carry.
        none = key.new_empty(len(group), shape.query_heads // shape.kv_heads, 0, 0)
        merged.append(method(Heads(none, key, value, none), None, generator))
    hidden = weights.k.shape[1]

    def joined(field: str, part: slice | int, like: Tensor) -> Tensor:
        return torch.cat([getattr(one, field)[0, :, part] for one in merged]).to(like.dtype)

    return dataclasses.replace(
        weights,
        k=joined("k", slice(0, hidden), weights.k),
        v=joined("v", slice(0, hidden), weights.v),
        k_bias=None if weights.k_bias is None else joined("k", hidden, weights.k_bias),
        v_bias=None if weights.v_bias is None else joined("v", hidden, weights.v_bias),
        k_norm=_norm(weights.k_norm, shape, layout, recipe),
    )


def pooled_reports(job: Job) -> list[dict[str, Any]]:
    """What is reported of every layer; none needs to be computed for it."""
    return [
        {"layer": layer, "groups": groups_of(job.parent.layers[layer], job.recipe), "tensors_changed": len(entries)}
        for layer, entries in job.changes.items()
    ]


def groups_of(shape: LayerShape, recipe: Recipe) -> Groups:
    """The parent's KV heads behind each of the child's."""
    if recipe.kv_heads > shape.kv_heads:
        return [[head * shape.kv_heads // recipe.kv_heads] for head in range(recipe.kv_heads)]
    return contiguous(shape.kv_heads, recipe.kv_heads)


def layer_seed(recipe: Recipe, layer: int) -> int:
    """Seed of a layer's own generator: no layer's draws depend on another's."""
    return recipe.seed * 1_000_003 + layer


class PooledLayers:
    """The changed tensors of the layers in `order` (repeats in a row count once), each layer computed in a thread of
    its own while the one before is still being written. A context manager; memory holds two layers' attention."""

    def __init__(self, job: Job, order: Sequence[int]) -> None:
        self.job = job
        self._order = collections.deque(layer for layer, _ in itertools.groupby(order))
        self._coming: collections.deque[tuple[int, Future[dict[str, Tensor]]]] = collections.deque()
        self._layer, self._tensors = -1, {}
        # One thread has the time: more of them would wait for one another, and keep the cores from the copying.
        self._worker = ThreadPoolExecutor(1, "pool", initializer=torch.set_num_threads, initargs=(1,))
        self._threads = torch.get_num_threads()

    def __enter__(self) -> PooledLayers:
        self._look_ahead()
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def tensor(self, layer: int, name: str) -> Tensor:
        if layer != self._layer:
            self._layer, future = self._coming.popleft()
            assert self._layer == layer, "layers are asked for in the order that was given"
            self._look_ahead()
            self._tensors = future.result()
        return self._tensors[name]

    def _look_ahead(self) -> None:
        while self._order and len(self._coming) < _AHEAD:
            layer = self._order.popleft()
            self._coming.append((layer, self._worker.submit(self._compute, layer)))

    def _compute(self, layer: int) -> dict[str, Tensor]:
        job = self.job
        weights = job.layout.read_attention(job.checkpoint, layer)
        pooled = pool(weights, job.parent.layers[layer], job.layout, job.recipe, layer)
        named = job.layout.attention_tensors(layer, pooled)
        tensors = {entry.name: as_stored(job, entry.name, named[entry.name]) for entry in job.changes[layer]}
        assert all(tuple(tensors[entry.name].shape) == entry.shape for entry in job.changes[layer])
        return tensors


def _repeat(weights: AttentionWeights, shape: LayerShape, layout: Layout, times: int) -> AttentionWeights:
    """Every KV head `times` times in a row: query head n = h * G + g, which read head h, reads head n // (G / times),
    which is one of its copies."""

    def repeated(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        by_head = rows.view(shape.kv_heads, -1, *rows.shape[1:])
        return by_head.repeat_interleave(times, 0).flatten(0, 1)

    own_norm = layout.norm is not None and not layout.norm.shared
    fields = ("k", "v", "k_bias", "v_bias", *(("k_norm",) if own_norm else ()))
    return dataclasses.replace(weights, **{field: repeated(getattr(weights, field)) for field in fields})


def _norm(factors: Tensor | None, shape: LayerShape, layout: Layout, recipe: Recipe) -> Tensor | None:
    """The keys' norm factors, of which there are (H*D,) or (H, D), or (D,) for all heads."""
    if factors is None or layout.norm is None or layout.norm.shared:
        return factors
    groups = factors.view(recipe.kv_heads, shape.kv_heads // recipe.kv_heads, -1)
    shared = groups[:, 0] if recipe.method == "first" else groups.double().mean(1).to(factors.dtype)
    return shared.reshape(-1, *factors.shape[1:])


def _rows(weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """A projection head by head, and its bias as a column: (H, D, hidden) and (H, D, 1)."""
    return weight.view(heads, -1, weight.shape[1]), None if bias is None else bias.view(heads, -1, 1)


def _wide(rows: tuple[Tensor, Tensor | None], some: slice) -> Tensor:
    """Some heads with their biases as a last column, in the dtype that is calculated in: (r, D, E)."""
    weight, bias = rows
    dtype = torch.float32 if weight.element_size() <= 2 else torch.float64
    part = weight[some].to(dtype)
    return part if bias is None else torch.cat([part, bias[some].to(dtype)], dim=2)
