"""FLOPs of decoding and of prefilling; a multiply and an add are two.

Letters: B requests, S tokens of context, H*G query heads, D head dim of k, Dv head dim of v.
"""

from __future__ import annotations

import dataclasses

from gqa.config import LayerShape, ModelShape
from gqa.plan.cache import kept_tokens
from gqa.plan.parameters import active_parameters, attention_parameters, output_parameters


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs by what does them: the q, k, v and o projections; the core of the attention (scores and weighted sums);
    everything else (MLPs, norms, the output matrix)."""

    projections: int
    core: int
    rest: int

    @property
    def total(self) -> int:
        return self.projections + self.core + self.rest


def decode_work(shape: ModelShape, context: int, batch: int) -> Work | None:
    """One new token for each of B requests whose caches hold S tokens. None if the parameters are unknown."""
    return _work(shape, batch, batch, attention_core_flops(shape, context, batch))


def prefill_work(shape: ModelShape, tokens: int, batch: int) -> Work | None:
    """The first pass over B prompts of S tokens, causal; only the last token of each goes through the output matrix."""
    return _work(shape, batch * tokens, batch, batch * prefill_core_flops(shape, tokens))


def attention_core_flops(shape: ModelShape, context: int, batch: int) -> int:
    """Scores and weighted sums of one new token per request: B * sum of 2 * H*G * (D + Dv) * min(S, window).

    The KV heads do not enter: every query head works through its own scores. Latent attention is counted in its
    absorbed form, in which each query head works on the latent itself, and only on the tokens that an indexer selects;
    the indexer's own work is not counted. A recurrent state takes 4 FLOPs per number: updated, and read by the query.
    """
    return batch * sum(count * _core(layer, _seen(layer, context)) for layer, count in shape.counted_layers)


def prefill_core_flops(shape: ModelShape, tokens: int) -> int:
    """The same over a causal prompt of S tokens: the sum over t = 1 to S of what token t does on the t tokens it sees.

    Full: H*G * (D + Dv) * S * (S + 1). Latent attention runs a prompt on its expanded heads, which is less work.
    """
    expanded = shape.latent
    total = 0
    for layer, count in shape.counted_layers:
        dims = layer.head_dim + layer.v_head_dim
        if layer.kind == "mla" and expanded is not None:
            dims = expanded.nope_dim + expanded.rope_dim + expanded.v_dim
        total += count * (2 * layer.query_heads * dims * _pairs(layer, tokens) + _recurrence(layer) * tokens)
    return total


def _work(shape: ModelShape, tokens: int, last_tokens: int, core: int) -> Work | None:
    active, projections, output = active_parameters(shape), attention_parameters(shape), output_parameters(shape)
    if active is None or projections is None or output is None:
        return None
    rest = 2 * (tokens * (active - projections - output) + last_tokens * output)
    return Work(2 * tokens * projections, core, rest)


def _core(layer: LayerShape, seen: int) -> int:
    return 2 * layer.query_heads * (layer.head_dim + layer.v_head_dim) * seen + _recurrence(layer)


def _recurrence(layer: LayerShape) -> int:
    return 4 * layer.state.recurrent if layer.state else 0


def _seen(layer: LayerShape, context: int) -> int:
    kept = kept_tokens(layer, context)
    return min(kept, layer.index_topk) if layer.index_topk else kept


def _pairs(layer: LayerShape, tokens: int) -> int:
    """Query-key pairs of a causal prompt: sum over t = 1 to S of min(t, W), or of t's place in its chunk."""
    if layer.kind == "chunked" and layer.window is not None:
        whole, rest = divmod(tokens, layer.window)
        return whole * _triangle(layer.window) + _triangle(rest)
    width = min(tokens, layer.window or tokens, layer.index_topk or tokens)
    return _triangle(width) + (tokens - width) * width


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
