"""The articles' claims: every verdict here was reached by hand (the calculation stands beside it)."""

from pathlib import Path

import pytest

from gqa.plan.claims import CLAIMS, claims
from gqa.record import read_record

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"

BY_HAND = {
    "LLaMA-2 70B has 64 query heads and 8 KV heads": "holds",
    "d_kv = d_model / n_kv_heads": "wrong by a factor of 8",  # 8192 / 8 = 1024, and a head has 128
    "K and V projections stay at about 2 * d_model^2 weights under GQA": "wrong by a factor of 8",  # 2 * 8192 * 1024
    "The bottleneck is fetching K and V parameters": "depends",
    "A Llama 3 70B request takes about 42 GB of KV cache": "holds",  # 80 * 8 * 256 * 2 * 131072 = 42.9e9
    "Standard MHA would take over 300 GB": "holds",  # eight times that: 343.6e9
    "Sharing 1 KV head across 8 query heads saves 87.5 %": "holds",
    "KV heads are broadcast to query heads without copies": "to be measured",
    "From 8K to 128K the cache overshadows the weights": "depends",  # 42.9 of 141.1 GB
    "MHA rules out concurrent requests of 128K on 8 GPUs": "depends",  # 1 and 11 on H100, 2 and 21 on H200
    "2 KV heads of 8 save 37.5 % of the KV projections": "wrong by a factor of 2",  # 6 of 8 heads: 75 %
    "The KV cache is 4x smaller at 2 of 8": "holds",
    "MQA saves at most 7/8; of the cache": "holds",
    "MQA saves at most 7/8; of the parameters": "wrong by a factor of 2",  # 16,384 -> 9216: 43.75 %
    "All modern production models use GQA": "wrong",
    "MHA, GQA and MQA cost the same at long contexts": "holds",
    "Llama 2 70B uses 1.25 GB of KV cache, 10 GB as MHA": "holds in GiB",  # 4096 * 327,680 = 1.25 * 2**30
    "Mistral 7B uses 1.0 GB at 8K": "holds in GiB",  # 8192 * 131,072 = 2**30
    "FLOPs of the attention core are the same for MHA, GQA and MQA": "holds",
    "Gradient norms per KV head grow faster than sqrt(G)": "to be measured",
    "8 KV heads hold 320K+ tokens in 80 GB, 32 about 160K": "wrong by a factor of 2",  # 80 GiB / 131,072 = 655,360
    "One 8K sequence: 21 GB as MHA of 64, 2.6 GB with 8": "holds",  # 21.5e9 and 2.68e9
    "It is the difference between 1 user per GPU and 8": "depends",
    "Training gets slightly cheaper": "holds",
    "Over 99 % of MHA's quality is kept": "to be measured",
    "2048 tokens x batch 32: 20.9 GB as MHA, 2.6 GB as GQA": "wrong by a factor of 8.2",  # 65,536 * 2,621,440 = 171.8e9
    "8 groups give 8x more room for the cache": "depends",
    "Decode latency follows the cache: 8x": "depends",
    "Llama 2 7B and 13B are MHA; 34B, 70B and all Llama 3 GQA": "holds",
    "Mistral 7B: 32 query and 8 KV heads, 4x": "holds",
    "The weights are static: you load them once": "depends",
    "The KV cache, not the weights, binds on a 24 GB GPU": "depends",
    "5 % of the compute recovers near-MHA quality": "to be measured",
}


def _key(row):
    _, _, of = row["conditions"].partition("; of the ")
    return f"{row['claim']}; of the {of}" if of else row["claim"]


def test_verdicts():
    rows = claims().results["claims"]
    assert {_key(row): row["verdict"] for row in rows} == BY_HAND
    assert all(row["computed"] for row in rows)


@pytest.mark.parametrize(
    ("claim", "figures"),
    [
        ("A Llama 3 70B request", "42.95 GB (40 GiB)"),
        ("Standard MHA would", "343.6 GB (320 GiB)"),
        ("2 KV heads of 8 save", "75.0% of the K and V projections; 37.5% of all four"),
        ("8 KV heads hold 320K+", "655,360 tokens with 8 KV heads and 163,840 with 32"),
        ("2048 tokens x batch 32", "171.8 GB (160 GiB) and 21.47 GB (20 GiB); the quoted figures fit a batch of 4"),
        ("Mistral 7B uses 1.0 GB", "512 MiB"),
        ("MHA rules out", "1 as MHA and 11 as it is on 8 H100 SXM; 2 as MHA and 21 as it is on 8 H200"),
        ("From 8K to 128K", "30%; it takes 3.3 such requests"),
        ("8 groups give", "4x for Llama-3-8B (32 query heads), 8x for Llama-3-70B (64 query heads), 16x"),
        # Weights 159.9 - 2.1 GB and caches of 171.8 GB, against 141.1 - 2.1 and 21.5: 329.6 over 160.5.
        ("Decode latency", "1.17x for 1 of 2,048 tokens, 2.05x for 32 of 2,048 tokens, 2.76x"),
        ("Training gets", "11.8% fewer parameters"),  # 80 * 2 * 8192 * 7168 of 79.9 billion
        ("The bottleneck", "8,193 tokens"),  # 2.5 GiB / 320 KiB = 8192
    ],
)
def test_figures_worked_by_hand(claim, figures):
    (row,) = [row for row in claims().results["claims"] if row["claim"].startswith(claim)]
    assert figures in row["computed"]


def test_a_study_answers_what_needs_measuring():
    record = read_record(next(RECORDS.glob("*-study.json")), "study")
    rows = {row["claim"]: row for row in claims(record).results["claims"]}
    for claim in ("Over 99 % of MHA's quality is kept", "5 % of the compute recovers near-MHA quality"):
        assert rows[claim]["verdict"] == "measured"
        assert "%" in rows[claim]["computed"]


def test_a_figure_that_does_not_follow_is_found():
    # Every claim is computed: the verdict of a wrong quote must differ.
    from gqa.plan.answers import judge, judge_gb

    assert judge(42, 42.9) == "holds"
    assert judge(38, 42.9) == "wrong by a factor of 1.1"
    assert judge_gb((1.25, 1.25 * 2**30), (10, 10 * 2**30)) == "holds in GiB"
    assert judge_gb((1.25, 1.25 * 2**30), (12, 10 * 2**30)).startswith("wrong")
    assert len(CLAIMS) == 33
