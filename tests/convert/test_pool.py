"""Pooling group by group is the method as it is defined on all heads in float64."""

import dataclasses

import pytest
import torch

from gqa.config import parse_config
from gqa.convert import heads
from gqa.convert.grouping import contiguous
from gqa.convert.merge import METHODS
from gqa.convert.pool import pool
from gqa.convert.recipe import make_recipe
from gqa.weights.layout import AttentionWeights, Norm, load_layout

H, G, D, HIDDEN = 6, 2, 4, 10
WIDTH, SHARED = Norm("rms", "width", shared=False), Norm("rms", "head", shared=True, offset=1)
# Which projections have biases, the norm of queries and keys, and the sizes of its factors.
MODELS = {
    "plain": ("", None, {}),
    "biased": ("qkv", None, {}),
    "norm of all heads": ("", WIDTH, {"k_norm": (H * D,), "q_norm": (H * G * D,)}),
    "norm of a head": ("k", SHARED, {"k_norm": (D,), "q_norm": (D,)}),
}


def layer_of(model, dtype):
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": H * G,
        "num_key_value_heads": H,
        "head_dim": D,
        "vocab_size": 20,
    }
    biases, norm, extra = MODELS[model]
    sizes = {"q": (H * G * D, HIDDEN), "k": (H * D, HIDDEN), "v": (H * D, HIDDEN), "o": (HIDDEN, H * G * D)}
    sizes |= {f"{role}_bias": sizes[role][:1] for role in biases} | extra
    generator = torch.Generator().manual_seed(0)
    weights = AttentionWeights(**{n: torch.randn(s, generator=generator).to(dtype) for n, s in sizes.items()})
    return weights, parse_config(config, "tiny").layers[0], dataclasses.replace(load_layout("llama"), norm=norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("method", "kv_heads"), [("mean", 1), ("mean", 2), ("mean", 3), ("first", 2)])
def test_as_defined(model, method, kv_heads, dtype):
    weights, shape, layout = layer_of(model, dtype)
    pooled = pool(weights, shape, layout, make_recipe(kv_heads, method), 0)
    parent = heads.split(weights, shape, layout)
    groups = contiguous(H, kv_heads)
    merged = [METHODS[method](parent.select(group), None, torch.Generator()) for group in groups]
    child = heads.join(heads.together(merged), weights, shape, layout)
    # One rounding to 16 bits of a sum that float32 holds; for wide dtypes the same float64 on both sides.
    for field in dataclasses.fields(pooled):
        wanted, got = getattr(child, field.name), getattr(pooled, field.name)
        assert (wanted is None) == (got is None), field.name
        if got is not None:
            assert torch.equal(got, wanted.to(dtype)), field.name


def test_what_is_not_pooled_is_not_copied():
    weights, shape, layout = layer_of("biased", torch.bfloat16)
    pooled = pool(weights, shape, layout, make_recipe(2, "mean"), 0)
    assert pooled.q is weights.q
    assert pooled.o is weights.o


def test_random_heads_have_the_parents_deviation_and_depend_on_seed_and_layer():
    weights, shape, layout = layer_of("plain", torch.float32)
    weights = dataclasses.replace(weights, k=3 * weights.k)

    def drawn(seed, layer):
        return pool(weights, shape, layout, make_recipe(3, "random", seed=seed), layer)

    assert torch.equal(drawn(0, 0).k, drawn(0, 0).k)
    assert not torch.equal(drawn(0, 0).k, drawn(1, 0).k)
    assert not torch.equal(drawn(0, 0).k, drawn(0, 1).k)
    # 120 draws: their deviation is within 4 / sqrt(2 * 120) = 26 % of the parent's with near certainty.
    assert float(drawn(0, 0).k.std() / weights.k.std()) == pytest.approx(1, abs=0.26)
    assert float(drawn(0, 0).v.std() / weights.v.std()) == pytest.approx(1, abs=0.26)
