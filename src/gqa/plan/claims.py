"""Published figures about grouped-query attention, each beside what the planner gives.

The claims are those of five articles (000 to 004). Here stand what each quotes and how to compute it; no result does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gqa.config import ModelShape, parse_config
from gqa.hardware import find_device
from gqa.plan.cache import as_multi_head, kv_bytes, kv_bytes_per_token
from gqa.plan.capacity import cache_budget_bytes, max_concurrent_requests, max_context
from gqa.plan.crossover import overtaking_context
from gqa.plan.decode import decode_kv_traffic
from gqa.plan.engines import Contiguous
from gqa.plan.flops import prefill_core_flops, prefill_work
from gqa.plan.kv_dtype import kv_dtype
from gqa.plan.parameters import attention_parameters, kv_projection_parameters, read_parameters, total_parameters
from gqa.record import Record
from gqa.source import open_source
from gqa.units import GIB, format_bytes

FP16 = kv_dtype("fp16")
_WEIGHT_BYTES = 2  # of a parameter in fp16 or bf16
_ABOUT = 0.05  # how far a rounded figure may be off and still hold
_GB = 10**9


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the arithmetic gives: the text for the reader, and the verdict: `holds`, `holds in GiB`, `depends`, `wrong`,
    `wrong by a factor of N`, `measured`, or `to be measured`."""

    text: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """article, what it says, under which conditions, and how that is answered. Those that only a measurement answers
    are given a study's results, or None."""

    article: str
    claim: str
    conditions: str
    answer: Callable[[Mapping[str, Any] | None], Answer]


def claims(study: Record | None = None) -> Record:
    """Every claim with its answer; `study`: the record of `gqa study`, for what only measurement can tell."""
    results = None if study is None else study.results
    rows = []
    for claim in CLAIMS:
        answer = claim.answer(results)
        rows.append(
            {
                "article": claim.article,
                "claim": claim.claim,
                "conditions": claim.conditions,
                "computed": answer.text,
                "verdict": answer.verdict,
            }
        )
    return Record(
        "claims",
        inputs={"study": study is not None},
        results={"claims": rows},
        basis={"computed": "predicted"},
        assumptions=(
            f"A figure holds if it is what the arithmetic gives within {_ABOUT:.0%}; it holds in GiB if it does once"
            " its GB are read as GiB.",
            "Caches are in fp16 unless a claim says otherwise, without block rounding or padding.",
        ),
    )


def _model(name: str) -> ModelShape:
    source = open_source(name)
    return parse_config(source.config, source.name)


def _shape(layers: int, query_heads: int, kv_heads: int, head_dim: int = 128) -> ModelShape:
    """A model of which only the attention is told."""
    config = {"hidden_size": query_heads * head_dim, "num_hidden_layers": layers, "head_dim": head_dim}
    return parse_config(config | {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}, "as told")


def _judge(quoted: float, computed: float) -> str:
    """Compare two pure numbers."""
    if abs(quoted / computed - 1) <= _ABOUT:
        return "holds"
    factor = max(quoted / computed, computed / quoted)
    return f"wrong by a factor of {factor:.2g}"


def _judge_gb(*pairs: tuple[float, float]) -> str:
    """Compare quoted GB with computed bytes, all together."""
    if all(_judge(quoted, size / _GB) == "holds" for quoted, size in pairs):
        return "holds"
    if all(_judge(quoted, size / GIB) == "holds" for quoted, size in pairs):
        return "holds in GiB"
    return _judge(pairs[0][0], pairs[0][1] / _GB)


def _size(size: float) -> str:
    return f"{size / _GB:.4g} GB ({format_bytes(size)})"


def _cache(shape: ModelShape, context: int, batch: int = 1) -> int:
    return kv_bytes(shape, context, batch, FP16)


def _fixed(text: Callable[[], tuple[str, str]]) -> Callable[[Mapping[str, Any] | None], Answer]:
    """An answer that needs no measurement."""
    return lambda study: Answer(*text())


def _heads_of_llama_2() -> tuple[str, str]:
    shape = _model("Llama-2-70B")
    told = (shape.query_heads, shape.kv_heads)
    return f"{told[0]} query heads, {told[1]} KV heads", "holds" if told == (64, 8) else "wrong"


def _width_of_a_head() -> tuple[str, str]:
    shape = _model("Llama-2-70B")
    quoted, computed = shape.hidden / shape.kv_heads, shape.head_dim
    text = f"Llama 2 70B: {quoted:.0f} by that formula; K and V have the head dim of the queries, {computed}"
    return text, _judge(quoted, computed)


def _projections() -> tuple[str, str]:
    shape = _model("Llama-2-70B")
    computed = (kv_projection_parameters(shape) or 0) / len(shape.layers)
    quoted = 2 * shape.hidden**2
    text = f"Llama 2 70B: {computed / 1e6:.1f} million a layer; 2 * d_model^2 are {quoted / 1e6:.1f} million"
    return text, _judge(quoted, computed)


def _what_is_fetched() -> tuple[str, str]:
    shape = _model("Llama-2-70B")
    projections = (kv_projection_parameters(shape) or 0) * _WEIGHT_BYTES
    token = kv_bytes_per_token(shape, FP16)
    text = (
        f"Llama 2 70B: the projections are {_size(projections)}, read once a step whatever the length; the cache is"
        f" {format_bytes(token)} a token and request, and more than that from {projections // token + 1:,} tokens on"
    )
    return text, "depends"


def _llama_3_request() -> tuple[str, str]:
    size = _cache(_model("Llama-3-70B"), 128 * 1024)
    return _size(size), _judge_gb((42, size))


def _llama_3_as_mha() -> tuple[str, str]:
    size = _cache(as_multi_head(_model("Llama-3-70B")), 128 * 1024)
    return _size(size), "holds" if size > 300 * _GB else "wrong"


def _saved_share() -> tuple[str, str]:
    shape = _model("Llama-3-70B")
    saved = 1 - kv_bytes_per_token(shape, FP16) / kv_bytes_per_token(as_multi_head(shape), FP16)
    return f"{saved:.1%}", _judge(87.5, 100 * saved)


def _toy() -> ModelShape:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    return parse_config(config, "d_model 64 with 8 heads")


def _saved_parameters() -> tuple[str, str]:
    full, grouped = _toy(), _toy().with_kv_heads(2)
    kv = 1 - (kv_projection_parameters(grouped) or 0) / (kv_projection_parameters(full) or 1)
    everything = 1 - (attention_parameters(grouped) or 0) / (attention_parameters(full) or 1)
    text = f"{kv:.1%} of the K and V projections; {everything:.1%} of all four projections"
    return text, _judge(37.5, 100 * kv)


def _saved_cache() -> tuple[str, str]:
    ratio = _cache(_toy(), 1000) / _cache(_toy().with_kv_heads(2), 1000)
    return f"{ratio:g}x smaller", _judge(4, ratio)


def _most_saved() -> tuple[str, str]:
    saved = 1 - _cache(_toy().with_kv_heads(1), 1000) / _cache(_toy(), 1000)
    return f"{saved:.1%}", _judge(7 / 8, saved)


def _llama_2_cache() -> tuple[str, str]:
    shape = _model("Llama-2-70B")
    context = shape.context or 0
    size, mha = _cache(shape, context), _cache(as_multi_head(shape), context)
    text = f"{_size(size)} and {_size(mha)} at its context of {context:,} tokens"
    return text, _judge_gb((1.25, size), (10, mha))


def _mistral_cache() -> tuple[str, str]:
    shape = _model("Mistral-7B-v0.1")
    full, windowed = _cache(shape.without_windows(), 8192), _cache(shape, 8192)
    text = f"{_size(full)}; {_size(windowed)} where its window of {shape.layers[0].window:,} tokens is used"
    return text, _judge_gb((1.0, full))


def _same_core() -> tuple[str, str]:
    shape = _model("Llama-2-7B")
    cores = {prefill_core_flops(shape.with_kv_heads(n), 4096) for n in shape.dial}
    most, least = (prefill_work(shape.with_kv_heads(n), 4096, 1) for n in (shape.dial[-1], 1))
    assert most is not None
    assert least is not None
    text = (
        f"Llama 2 7B, 4096 tokens: {min(cores):.3g} at every setting; its projections go from {most.projections:.3g}"
        f" to {least.projections:.3g}"
    )
    return text, "holds" if len(cores) == 1 else "wrong"


def _tokens_in_80_gb() -> tuple[str, str]:
    budget = 80 * GIB
    grouped, full = (max_context(Contiguous(), _shape(32, 32, n), 1, FP16, budget) or 0 for n in (8, 32))
    text = f"{grouped:,} tokens with 8 KV heads and {full:,} with 32 in 80 GiB: a ratio of {grouped / full:g}, not 2"
    return text, _judge(320 * 1024, grouped)


def _eight_k() -> tuple[str, str]:
    full, grouped = _cache(_shape(80, 64, 64), 8192), _cache(_shape(80, 64, 8), 8192)
    return f"{_size(full)} and {_size(grouped)}", _judge_gb((21, full), (2.6, grouped))


def _users_per_gpu() -> tuple[str, str]:
    shape, context = _model("Llama-2-7B"), 4096
    told = []
    for device in map(find_device, ("L4", "A100 80GB SXM")):
        found = []
        for kv_heads in (32, 4):
            setting = shape.with_kv_heads(kv_heads)
            weights = (total_parameters(setting) or 0) * _WEIGHT_BYTES
            budget = cache_budget_bytes(device.memory_bytes, Contiguous().utilisation, weights)
            found.append(max_concurrent_requests(Contiguous(), setting, context, FP16, budget))
        told.append(f"{found[0]} and {found[1]} on an {device.name}")
    text = (
        f"on what the weights leave: Llama 2 7B holds, as it is and with 4 KV heads, {' and '.join(told)}, at"
        f" {context:,} tokens each"
    )
    return text, "depends"


def _batch_of_32() -> tuple[str, str]:
    shape = _model("Llama-3-70B")
    full, grouped = _cache(as_multi_head(shape), 2048, 32), _cache(shape, 2048, 32)
    batch = min(range(1, 33), key=lambda n: abs(20.9 * _GB - _cache(as_multi_head(shape), 2048, n)))
    text = f"{_size(full)} and {_size(grouped)}; the quoted figures fit a batch of {batch}"
    return text, _judge_gb((20.9, full), (2.6, grouped))


def _which_are_grouped() -> tuple[str, str]:
    multi = [name for name in ("Llama-2-7B", "Llama-2-13B") if (s := _model(name)).kv_heads == s.query_heads]
    grouped = [
        name
        for name in ("CodeLlama-34B", "Llama-2-70B", "Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B")
        if (s := _model(name)).kv_heads < s.query_heads
    ]
    text = f"MHA: {', '.join(multi)}. GQA: {', '.join(grouped)}"
    return text, "holds" if len(multi) == 2 and len(grouped) == 5 else "wrong"


def _mistral_heads() -> tuple[str, str]:
    shape = _model("Mistral-7B-v0.1")
    ratio = shape.query_heads / shape.kv_heads
    return f"{shape.query_heads} on {shape.kv_heads}: {ratio:g}x", _judge(4, ratio)


def _static_weights() -> tuple[str, str]:
    shape = _model("Llama-3-8B")
    weights = (read_parameters(shape, 1) or 0) * _WEIGHT_BYTES
    context = overtaking_context(shape, 1, FP16, _WEIGHT_BYTES)
    batch = overtaking_context(shape, 16, FP16, _WEIGHT_BYTES)
    text = (
        f"every decode step reads them again, shared by the batch: Llama 3 8B {_size(weights)}; its cache is more from"
        f" {context:,} tokens of one request on, from {batch:,} of 16"
    )
    return text, "depends"


def _binding_constraint() -> tuple[str, str]:
    device = find_device("RTX 4090")
    shape = _model("Llama-3-8B")
    weights = (total_parameters(shape) or 0) * _WEIGHT_BYTES
    token = decode_kv_traffic(shape, 1, 1, FP16)
    left = cache_budget_bytes(device.memory_bytes, Contiguous().utilisation, weights)
    text = (
        f"Llama 3 8B in fp16 on an {device.name}: {_size(weights)} of weights leave {format_bytes(left)}, which hold"
        f" {left // token:,} tokens; the cache would outweigh the weights from {weights // token + 1:,} tokens on, and"
        " does with fewer bits of weights"
    )
    return text, "depends"


def _by_study(rows: Callable[[Mapping[str, Any]], str | None], why: str) -> Callable[..., Answer]:
    def answer(study: Mapping[str, Any] | None) -> Answer:
        found = rows(study) if study else None
        return Answer(found, "measured") if found else Answer(why, "to be measured")

    return answer


def _kept(study: Mapping[str, Any]) -> str | None:
    parent = study["parent"].get("perplexity")
    stops = sorted({row["kv_heads"] for row in study["quality"]}, reverse=True)
    told = []
    for n in stops:
        found = [row["perplexity"] for row in study["quality"] if row["kv_heads"] == n and row["perplexity"]]
        if found and parent and n != study["parent"]["kv_heads"]:
            told.append(f"{parent / min(found):.1%} at {n} KV head{'s' if n != 1 else ''}")
    if not told:
        return None
    return f"the study's parent over the best child, in perplexity: {', '.join(told)}"


def _recovered(study: Mapping[str, Any]) -> str | None:
    control = (study.get("control") or {}).get("perplexity")
    told = []
    for n in sorted({row["kv_heads"] for row in study["quality"]}, reverse=True):
        found = [r["perplexity"] for r in study["quality"] if r["kv_heads"] == n and r["stage"] == "uptrained"]
        if found and control:
            told.append(f"{min(found) / control - 1:+.2%} at {n}")
    return f"perplexity against the parent trained on for as long, by KV heads: {', '.join(told)}" if told else None


_STUDY = "gqa study measures it: give its record (--study study.json)"

CLAIMS = (
    Claim("000", "LLaMA-2 70B has 64 query heads and 8 KV heads", "", _fixed(_heads_of_llama_2)),
    Claim("000", "d_kv = d_model / n_kv_heads", "", _fixed(_width_of_a_head)),
    Claim("000", "K and V projections stay at about 2 * d_model^2 weights under GQA", "", _fixed(_projections)),
    Claim("000", "The bottleneck is fetching K and V parameters", "", _fixed(_what_is_fetched)),
    Claim("001", "A Llama 3 70B request takes about 42 GB of KV cache", "fp16, 128K tokens", _fixed(_llama_3_request)),
    Claim("001", "Standard MHA would take over 300 GB", "fp16, 128K tokens", _fixed(_llama_3_as_mha)),
    Claim("001", "Sharing 1 KV head across 8 query heads saves 87.5 %", "", _fixed(_saved_share)),
    Claim(
        "001",
        "KV heads are broadcast to query heads without copies",
        "",
        _by_study(lambda study: None, "a property of the op: tests/ops measures that gqa.attention allocates no copy"),
    ),
    Claim("002", "2 KV heads of 8 save 37.5 % of the KV projections", "d_model 64", _fixed(_saved_parameters)),
    Claim("002", "The KV cache is 4x smaller at 2 of 8", "", _fixed(_saved_cache)),
    Claim("002", "MQA saves at most 7/8", "8 heads", _fixed(_most_saved)),
    Claim(
        "002", "Llama 2 70B uses 1.25 GB of KV cache, 10 GB as MHA", "context not told; fp16", _fixed(_llama_2_cache)
    ),
    Claim("002", "Mistral 7B uses 1.0 GB at 8K", "fp16", _fixed(_mistral_cache)),
    Claim("002", "FLOPs of the attention core are the same for MHA, GQA and MQA", "", _fixed(_same_core)),
    Claim(
        "002",
        "Gradient norms per KV head grow faster than sqrt(G)",
        "random weights",
        _by_study(lambda study: None, "not arithmetic, and gqa does not measure it yet"),
    ),
    Claim(
        "002",
        "8 KV heads hold 320K+ tokens in 80 GB, 32 about 160K",
        "32 layers, D 128, fp16",
        _fixed(_tokens_in_80_gb),
    ),
    Claim("003", "One 8K sequence: 21 GB as MHA of 64, 2.6 GB with 8", "80 layers, D 128, fp16", _fixed(_eight_k)),
    Claim("003", "It is the difference between 1 user per GPU and 8", "", _fixed(_users_per_gpu)),
    Claim("003", "Over 99 % of MHA's quality is kept", "Meta's ablation", _by_study(_kept, _STUDY)),
    Claim("004", "2048 tokens x batch 32: 20.9 GB as MHA, 2.6 GB as GQA", "Llama 3 70B", _fixed(_batch_of_32)),
    Claim("004", "Llama 2 7B and 13B are MHA; 34B, 70B and all Llama 3 GQA", "", _fixed(_which_are_grouped)),
    Claim("004", "Mistral 7B: 32 query and 8 KV heads, 4x", "", _fixed(_mistral_heads)),
    Claim("004", "The weights are static: you load them once", "", _fixed(_static_weights)),
    Claim("004", "The KV cache, not the weights, binds on a 24 GB GPU", "", _fixed(_binding_constraint)),
    Claim("004", "5 % of the compute recovers near-MHA quality", "T5, Ainslie et al.", _by_study(_recovered, _STUDY)),
)
