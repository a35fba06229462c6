"""How the claims of claims.py are answered: a text and a verdict each, worked out by the planner when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from gqa.plan.shard import shard
from gqa.plan.training import training_flops_per_token
from gqa.plan.weights import Weights
from gqa.source import bundled_names, open_source
from gqa.units import GIB, format_bytes

FP16 = kv_dtype("fp16")
ABOUT = 0.05  # how far a rounded figure may be off and still hold
_WEIGHT_BYTES = 2  # of a parameter in fp16 or bf16
_GB = 10**9


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the arithmetic gives: the text for the reader, and the verdict: `holds`, `holds in GiB`, `depends`, `wrong`,
    `wrong by a factor of N`, `measured`, or `to be measured`."""

    text: str
    verdict: str


def _model(name: str) -> ModelShape:
    source = open_source(name)
    return parse_config(source.config, source.name)


def _shape(layers: int, query_heads: int, kv_heads: int, head_dim: int = 128) -> ModelShape:
    """A model of which only the attention is told."""
    config = {"hidden_size": query_heads * head_dim, "num_hidden_layers": layers, "head_dim": head_dim}
    return parse_config(config | {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}, "as told")


def judge(quoted: float, computed: float) -> str:
    """Compare two pure numbers."""
    if abs(quoted / computed - 1) <= ABOUT:
        return "holds"
    factor = max(quoted / computed, computed / quoted)
    return f"wrong by a factor of {factor:.2g}"


def judge_gb(*pairs: tuple[float, float]) -> str:
    """Compare quoted GB with computed bytes, all together."""
    if all(judge(quoted, size / _GB) == "holds" for quoted, size in pairs):
        return "holds"
    if all(judge(quoted, size / GIB) == "holds" for quoted, size in pairs):
        return "holds in GiB"
    return judge(pairs[0][0], pairs[0][1] / _GB)


def _size(size: float) -> str:
    return f"{size / _GB:.4g} GB ({format_bytes(size)})"


def _cache(shape: ModelShape, context: int, batch: int = 1) -> int:
    return kv_bytes(shape, context, batch, FP16)


def heads_of_llama_2() -> Answer:
    shape = _model("Llama-2-70B")
    told = (shape.query_heads, shape.kv_heads)
    return Answer(f"{told[0]} query heads, {told[1]} KV heads", "holds" if told == (64, 8) else "wrong")


def width_of_a_head() -> Answer:
    shape = _model("Llama-2-70B")
    quoted, computed = shape.hidden / shape.kv_heads, shape.head_dim
    text = f"Llama 2 70B: {quoted:.0f} by that formula; K and V have the head dim of the queries, {computed}"
    return Answer(text, judge(quoted, computed))


def projections() -> Answer:
    shape = _model("Llama-2-70B")
    computed = (kv_projection_parameters(shape) or 0) / len(shape.layers)
    quoted = 2 * shape.hidden**2
    text = f"Llama 2 70B: {computed / 1e6:.1f} million a layer; 2 * d_model^2 are {quoted / 1e6:.1f} million"
    return Answer(text, judge(quoted, computed))


def what_is_fetched() -> Answer:
    shape = _model("Llama-2-70B")
    projections = (kv_projection_parameters(shape) or 0) * _WEIGHT_BYTES
    token = kv_bytes_per_token(shape, FP16)
    text = (
        f"Llama 2 70B: the projections are {_size(projections)}, read once a step whatever the length; the cache is"
        f" {format_bytes(token)} a token and request, and more than that from {projections // token + 1:,} tokens on"
    )
    return Answer(text, "depends")


def llama_3_request() -> Answer:
    size = _cache(_model("Llama-3-70B"), 128 * 1024)
    return Answer(_size(size), judge_gb((42, size)))


def llama_3_as_mha() -> Answer:
    size = _cache(as_multi_head(_model("Llama-3-70B")), 128 * 1024)
    return Answer(_size(size), "holds" if size > 300 * _GB else "wrong")


def saved_share() -> Answer:
    shape = _model("Llama-3-70B")
    saved = 1 - kv_bytes_per_token(shape, FP16) / kv_bytes_per_token(as_multi_head(shape), FP16)
    return Answer(f"{saved:.1%}", judge(87.5, 100 * saved))


def _toy() -> ModelShape:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    return parse_config(config, "d_model 64 with 8 heads")


def saved_parameters() -> Answer:
    full, grouped = _toy(), _toy().with_kv_heads(2)
    kv = 1 - (kv_projection_parameters(grouped) or 0) / (kv_projection_parameters(full) or 1)
    everything = 1 - (attention_parameters(grouped) or 0) / (attention_parameters(full) or 1)
    text = f"{kv:.1%} of the K and V projections; {everything:.1%} of all four projections"
    return Answer(text, judge(37.5, 100 * kv))


def saved_cache() -> Answer:
    ratio = _cache(_toy(), 1000) / _cache(_toy().with_kv_heads(2), 1000)
    return Answer(f"{ratio:g}x smaller", judge(4, ratio))


def most_saved() -> Answer:
    saved = 1 - _cache(_toy().with_kv_heads(1), 1000) / _cache(_toy(), 1000)
    return Answer(f"{saved:.1%}", judge(7 / 8, saved))


def llama_2_cache() -> Answer:
    shape = _model("Llama-2-70B")
    context = shape.context or 0
    size, mha = _cache(shape, context), _cache(as_multi_head(shape), context)
    text = f"{_size(size)} and {_size(mha)} at its context of {context:,} tokens"
    return Answer(text, judge_gb((1.25, size), (10, mha)))


def mistral_cache() -> Answer:
    shape = _model("Mistral-7B-v0.1")
    full, windowed = _cache(shape.without_windows(), 8192), _cache(shape, 8192)
    text = f"{_size(full)}; {_size(windowed)} where its window of {shape.layers[0].window:,} tokens is used"
    return Answer(text, judge_gb((1.0, full)))


def same_core() -> Answer:
    shape = _model("Llama-2-7B")
    cores = {prefill_core_flops(shape.with_kv_heads(n), 4096) for n in shape.dial}
    most, least = (prefill_work(shape.with_kv_heads(n), 4096, 1) for n in (shape.dial[-1], 1))
    assert most is not None
    assert least is not None
    text = (
        f"Llama 2 7B, 4096 tokens: {min(cores):.3g} at every setting; its projections go from {most.projections:.3g}"
        f" to {least.projections:.3g}"
    )
    return Answer(text, "holds" if len(cores) == 1 else "wrong")


def tokens_in_80_gb() -> Answer:
    budget = 80 * GIB
    grouped, full = (max_context(Contiguous(), _shape(32, 32, n), 1, FP16, budget) or 0 for n in (8, 32))
    text = f"{grouped:,} tokens with 8 KV heads and {full:,} with 32 in 80 GiB: a ratio of {grouped / full:g}, not 2"
    return Answer(text, judge(320 * 1024, grouped))


def eight_k() -> Answer:
    full, grouped = _cache(_shape(80, 64, 64), 8192), _cache(_shape(80, 64, 8), 8192)
    return Answer(f"{_size(full)} and {_size(grouped)}", judge_gb((21, full), (2.6, grouped)))


def users_per_gpu() -> Answer:
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
    return Answer(text, "depends")


def batch_of_32() -> Answer:
    shape = _model("Llama-3-70B")
    full, grouped = _cache(as_multi_head(shape), 2048, 32), _cache(shape, 2048, 32)
    batch = min(range(1, 33), key=lambda n: abs(20.9 * _GB - _cache(as_multi_head(shape), 2048, n)))
    text = f"{_size(full)} and {_size(grouped)}; the quoted figures fit a batch of {batch}"
    return Answer(text, judge_gb((20.9, full), (2.6, grouped)))


def which_are_grouped() -> Answer:
    multi = [name for name in ("Llama-2-7B", "Llama-2-13B") if (s := _model(name)).kv_heads == s.query_heads]
    grouped = [
        name
        for name in ("CodeLlama-34B", "Llama-2-70B", "Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B")
        if (s := _model(name)).kv_heads < s.query_heads
    ]
    text = f"MHA: {', '.join(multi)}. GQA: {', '.join(grouped)}"
    return Answer(text, "holds" if len(multi) == 2 and len(grouped) == 5 else "wrong")


def mistral_heads() -> Answer:
    shape = _model("Mistral-7B-v0.1")
    ratio = shape.query_heads / shape.kv_heads
    return Answer(f"{shape.query_heads} on {shape.kv_heads}: {ratio:g}x", judge(4, ratio))


def static_weights() -> Answer:
    shape = _model("Llama-3-8B")
    weights = (read_parameters(shape, 1) or 0) * _WEIGHT_BYTES
    context = overtaking_context(shape, 1, FP16, _WEIGHT_BYTES)
    batch = overtaking_context(shape, 16, FP16, _WEIGHT_BYTES)
    text = (
        f"every decode step reads them again, shared by the batch: Llama 3 8B {_size(weights)}; its cache is more from"
        f" {context:,} tokens of one request on, from {batch:,} of 16"
    )
    return Answer(text, "depends")


def binding_constraint() -> Answer:
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
    return Answer(text, "depends")


def overshadowed() -> Answer:
    shape = _model("Llama-3.1-70B")
    size, weights = _cache(shape, 128 * 1024), (total_parameters(shape) or 0) * _WEIGHT_BYTES
    requests = weights / size
    text = (
        f"Llama 3.1 70B: {_size(size)} of cache beside {_size(weights)} of weights, {size / weights:.0%}; it takes"
        f" {requests:.1f} such requests to outweigh them"
    )
    return Answer(text, "depends")


def eight_devices() -> Answer:
    shape, context, ranks = _model("Llama-3.1-70B"), 128 * 1024, 8
    told = []
    for name in ("H100 SXM", "H200"):
        device, found = find_device(name), []
        for setting in (as_multi_head(shape), shape):
            weights = Weights(setting, _WEIGHT_BYTES).of_rank(setting, ranks) or 0
            budget = cache_budget_bytes(device.memory_bytes, Contiguous().utilisation, weights)
            found.append(max_concurrent_requests(Contiguous(), shard(setting, ranks), context, FP16, budget))
        told.append(f"{found[0]} as MHA and {found[1]} as it is on 8 {name}")
    return Answer(f"Llama 3.1 70B holds at once {'; '.join(told)}", "depends")


def room_of_eight_groups() -> Answer:
    told = []
    for name in ("Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B"):
        shape = _model(name)
        ratio = kv_bytes_per_token(as_multi_head(shape), FP16) / kv_bytes_per_token(shape, FP16)
        told.append(f"{ratio:g}x for {name} ({shape.query_heads} query heads)")
    return Answer(", ".join(told), "depends")


def whole_step() -> Answer:
    shape = _model("Llama-3-70B")
    told = []
    for context, batch in ((2048, 1), (2048, 32), (128 * 1024, 1)):
        moved = []
        for setting in (as_multi_head(shape), shape):
            weights = (read_parameters(setting, batch) or 0) * _WEIGHT_BYTES
            moved.append(weights + decode_kv_traffic(setting, context, batch, FP16))
        told.append(f"{moved[0] / moved[1]:.2f}x for {batch} of {context:,} tokens")
    return Answer(
        f"the cache is 8x smaller, the bytes of a step of Llama 3 70B, weights included, {', '.join(told)}",
        "depends",
    )


def all_parameters_of_mqa() -> Answer:
    full, single = _toy(), _toy().with_kv_heads(1)
    saved = 1 - (attention_parameters(single) or 0) / (attention_parameters(full) or 1)
    return Answer(f"{saved:.2%} of all four projections, the measure of the 37.5 % beside it", judge(7 / 8, saved))


def converging() -> Answer:
    config = {"model_type": "llama", "hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    shape = parse_config(config | {"vocab_size": 1, "intermediate_size": 1}, "d_model 768 with 12 heads")
    shares = []
    for tokens in (512, 8192, 131072):
        one, full = (prefill_work(shape.with_kv_heads(n), tokens, 1) for n in (1, 12))
        assert one is not None
        assert full is not None
        shares.append((one.projections + one.core) / (full.projections + full.core))
    text = (
        f"attention of MQA over MHA: {', '.join(f'{s:.3f}' for s in shares)} at 512, 8,192 and 131,072 tokens, causal"
    )
    return Answer(text, "holds" if shares == sorted(shares) and shares[-1] > 0.98 else "wrong")


def everybody() -> Answer:
    kinds: dict[str, list[str]] = {"MHA": [], "MQA": [], "latent": []}
    for name in bundled_names():
        shape = _model(name)
        if shape.is_latent:
            kinds["latent"].append(name)
        elif shape.kv_heads == 1:
            kinds["MQA"].append(name)
        elif shape.kv_heads == shape.query_heads:
            kinds["MHA"].append(name)
    total = len(bundled_names())
    others = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
    grouped = total - sum(map(len, kinds.values()))
    return Answer(
        f"of the {total} models that gqa knows {grouped} have GQA; {others}",
        "holds" if grouped == total else "wrong",
    )


def training() -> Answer:
    shape = _model("Llama-3-70B")
    full, grouped = total_parameters(as_multi_head(shape)) or 0, total_parameters(shape) or 0
    work = [training_flops_per_token(setting, 8192) or 0 for setting in (as_multi_head(shape), shape)]
    text = (
        f"Llama 3 70B: {1 - grouped / full:.1%} fewer parameters than its MHA twin, {1 - work[1] / work[0]:.1%} less"
        " work per token at 8,192, if nothing else grows"
    )
    return Answer(text, "holds" if grouped < full else "wrong")


def no_copies() -> Answer:
    text = "a property of the op: tests/ops measures that gqa.attention allocates no copy"
    return Answer(text, "to be measured")


def kept(study: Mapping[str, Any]) -> str | None:
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


def recovered(study: Mapping[str, Any]) -> str | None:
    control = (study.get("control") or {}).get("perplexity")
    told = []
    for n in sorted({row["kv_heads"] for row in study["quality"]}, reverse=True):
        found = [r["perplexity"] for r in study["quality"] if r["kv_heads"] == n and r["stage"] == "uptrained"]
        if found and control:
            told.append(f"{min(found) / control - 1:+.2%} at {n}")
    return f"perplexity against the parent trained on for as long, by KV heads: {', '.join(told)}" if told else None


def grown(study: Mapping[str, Any]) -> str | None:
    """The exponent of G; sqrt(G) is 1/2."""
    told = [
        f"{row['exponent']:.2f} ({row['exponent_low']:.2f} to {row['exponent_high']:.2f}) for W_{row['projection']}"
        f" at {row['weights']} weights"
        for row in study.get("gradient_exponents") or ()
    ]
    return f"norm ~ G^e, sqrt(G) being e = 0.50: e = {', '.join(told)}; 95 % intervals" if told else None
