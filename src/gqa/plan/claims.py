"""Published figures about grouped-query attention, each beside what the planner gives.

The claims are those of five articles (000 to 004). Here stand what each quotes and how to compute it; no result does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gqa.plan import answers
from gqa.plan.answers import ABOUT, Answer
from gqa.record import Record


@dataclasses.dataclass(frozen=True)
class Claim:
    """article, what it says, under which conditions, and how that is answered: `computed`, or, where only a measurement
    tells, `measured`, which reads the results of a study and gives None where they do not have it."""

    article: str
    claim: str
    conditions: str
    computed: Callable[[], Answer] | None = None
    measured: Callable[[Mapping[str, Any]], str | None] | None = None

    def answer(self, study: Mapping[str, Any] | None) -> Answer:
        """study: the results of `gqa study`, or None."""
        if self.computed is not None:
            return self.computed()
        found = self.measured(study) if self.measured is not None and study is not None else None
        return Answer(found, "measured") if found else Answer(_NO_STUDY, "to be measured")


_NO_STUDY = "gqa study measures it: give its record (--study study.json)"


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
            f"A figure holds if it is what the arithmetic gives within {ABOUT:.0%}; it holds in GiB if it does once"
            " its GB are read as GiB.",
            "Caches are in fp16 unless a claim says otherwise, without block rounding or padding.",
        ),
    )


CLAIMS = (
    Claim("000", "LLaMA-2 70B has 64 query heads and 8 KV heads", "", answers.heads_of_llama_2),
    Claim("000", "d_kv = d_model / n_kv_heads", "", answers.width_of_a_head),
    Claim(
        "000",
        "K and V projections stay at about 2 * d_model^2 weights under GQA",
        "",
        answers.projections,
    ),
    Claim("000", "The bottleneck is fetching K and V parameters", "", answers.what_is_fetched),
    Claim(
        "001",
        "A Llama 3 70B request takes about 42 GB of KV cache",
        "fp16, 128K tokens",
        answers.llama_3_request,
    ),
    Claim("001", "Standard MHA would take over 300 GB", "fp16, 128K tokens", answers.llama_3_as_mha),
    Claim("001", "Sharing 1 KV head across 8 query heads saves 87.5 %", "", answers.saved_share),
    Claim(
        "001",
        "KV heads are broadcast to query heads without copies",
        "",
        answers.no_copies,
    ),
    Claim("001", "From 8K to 128K the cache overshadows the weights", "70B", answers.overshadowed),
    Claim(
        "001",
        "MHA rules out concurrent requests of 128K on 8 GPUs",
        "70B, GPU not told",
        answers.eight_devices,
    ),
    Claim(
        "002",
        "2 KV heads of 8 save 37.5 % of the KV projections",
        "d_model 64",
        answers.saved_parameters,
    ),
    Claim("002", "The KV cache is 4x smaller at 2 of 8", "", answers.saved_cache),
    Claim("002", "MQA saves at most 7/8", "8 heads; of the cache", answers.most_saved),
    Claim("002", "MQA saves at most 7/8", "8 heads; of the parameters", answers.all_parameters_of_mqa),
    Claim("002", "All modern production models use GQA", "", answers.everybody),
    Claim(
        "002",
        "MHA, GQA and MQA cost the same at long contexts",
        "d_model 768, 12 heads",
        answers.converging,
    ),
    Claim(
        "002",
        "Llama 2 70B uses 1.25 GB of KV cache, 10 GB as MHA",
        "context not told; fp16",
        answers.llama_2_cache,
    ),
    Claim("002", "Mistral 7B uses 1.0 GB at 8K", "fp16", answers.mistral_cache),
    Claim("002", "FLOPs of the attention core are the same for MHA, GQA and MQA", "", answers.same_core),
    Claim(
        "002",
        "Gradient norms per KV head grow faster than sqrt(G)",
        "random weights",
        measured=answers.grown,
    ),
    Claim(
        "002",
        "8 KV heads hold 320K+ tokens in 80 GB, 32 about 160K",
        "32 layers, D 128, fp16",
        answers.tokens_in_80_gb,
    ),
    Claim(
        "003",
        "One 8K sequence: 21 GB as MHA of 64, 2.6 GB with 8",
        "80 layers, D 128, fp16",
        answers.eight_k,
    ),
    Claim("003", "It is the difference between 1 user per GPU and 8", "", answers.users_per_gpu),
    Claim("003", "Training gets slightly cheaper", "", answers.training),
    Claim("003", "Over 99 % of MHA's quality is kept", "Meta's ablation", measured=answers.kept),
    Claim(
        "004",
        "2048 tokens x batch 32: 20.9 GB as MHA, 2.6 GB as GQA",
        "Llama 3 70B",
        answers.batch_of_32,
    ),
    Claim("004", "8 groups give 8x more room for the cache", "", answers.room_of_eight_groups),
    Claim("004", "Decode latency follows the cache: 8x", "Llama 3 70B", answers.whole_step),
    Claim("004", "Llama 2 7B and 13B are MHA; 34B, 70B and all Llama 3 GQA", "", answers.which_are_grouped),
    Claim("004", "Mistral 7B: 32 query and 8 KV heads, 4x", "", answers.mistral_heads),
    Claim("004", "The weights are static: you load them once", "", answers.static_weights),
    Claim("004", "The KV cache, not the weights, binds on a 24 GB GPU", "", answers.binding_constraint),
    Claim(
        "004",
        "5 % of the compute recovers near-MHA quality",
        "T5, Ainslie et al.",
        measured=answers.recovered,
    ),
)
