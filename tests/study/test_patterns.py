import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.models import tiny_llama
from transformers import AttentionInterface

import gqa
from gqa.study import patterns
from gqa.study.patterns import ALPHABET, LEVELS, Child, divergence, encode, looks, measure, within_and_between

WINDOWS = torch.randint(0, 97, (3, 17), generator=torch.Generator().manual_seed(0)).numpy()


class Words:
    def decode(self, ids):
        return f"<{ids[0]}>"


def probabilities_by_the_op(model, window):
    """Per layer (H*G, T, S): the reference op's output where the value of key s is the s-th unit vector."""
    found = []

    def keep(module, query, key, value, attention_mask, scaling=None, **others):
        units = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:3], -1)
        found.append(gqa.attention(query, key, units, causal=True, scale=scaling, impl="reference")[0])
        return gqa.attention(query, key, value, causal=True, scale=scaling, impl="reference").transpose(1, 2), None

    AttentionInterface.register("keep", keep)
    before = model.config._attn_implementation
    model.set_attn_implementation("keep")
    with torch.inference_mode():
        model(torch.as_tensor(window)[None], use_cache=False)
    model.set_attn_implementation(before)
    return found


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_figures_are_those_of_the_reference_op(kv_heads):
    model = tiny_llama(kv_heads)
    before = model.config._attn_implementation
    found = looks(model, WINDOWS)
    assert model.config._attn_implementation == before
    assert len(found) == 2
    expected = [probabilities_by_the_op(model, window) for window in WINDOWS]
    for layer, of in enumerate(found):
        p = torch.stack([window[layer] for window in expected]).double()  # (N, H*G, T, S)
        T = p.shape[2]
        distance = torch.zeros(8, dtype=torch.float64)
        entropy, previous = torch.zeros_like(distance), torch.zeros_like(distance)
        for t in range(1, T):
            previous += p[:, :, t, t - 1].mean(0)
            for s in range(t + 1):
                distance += (t - s) * p[:, :, t, s].mean(0)
                entropy -= (p[:, :, t, s] * p[:, :, t, s].log()).mean(0)
        for ours, theirs in ((of.distance, distance), (of.entropy, entropy), (of.previous, previous)):
            torch.testing.assert_close(ours, theirs / (T - 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of.first, p[:, :, 1:, 0].mean((0, 2)), atol=1e-5, rtol=1e-5)


def test_divergence_is_zero_for_twins_and_ln_2_for_strangers():
    rows = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0.5, 0.25, 0.25, 0]])[:, None]
    found = divergence(rows)
    assert found[0, 1] == 0
    assert found[0, 2] == pytest.approx(math.log(2))
    assert 0 < found[0, 3] < math.log(2)
    torch.testing.assert_close(found, found.T)
    within, between = within_and_between(found, [0, 0, 1, 1])
    assert within == pytest.approx((float(found[0, 1]) + float(found[2, 3])) / 2)
    assert between == pytest.approx(float(found[:2, 2:].mean()))
    assert within_and_between(found, [0, 1, 2, 3])[0] is None
    assert within_and_between(found, [0, 0, 0, 0])[1] is None


def test_a_map_can_be_read_back():
    p = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)).tril()
    p /= p.sum(1, keepdim=True)
    text = encode(p)
    assert len(text) == 45
    read = iter(text)
    for t in range(9):
        for s in range(t + 1):
            assert (ALPHABET.index(next(read)) / LEVELS) ** 2 == pytest.approx(float(p[t, s]), abs=1.1 / LEVELS)


def test_heads_that_are_copies_of_each_other_are_alike_where_the_groups_say_so(tmp_path):
    """A parent whose heads 0 and 2, 1 and 3 look at the same; a child that has them side by side."""
    model = tiny_llama(4, query_heads=4)
    child = tiny_llama(2, query_heads=4)
    child.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "k_proj" not in name and "v_proj" not in name},
        strict=False,
    )
    with torch.no_grad():
        for layer, small in zip(model.model.layers, child.model.layers, strict=True):
            for name in ("q_proj", "k_proj"):
                weight = getattr(layer.self_attn, name).weight.view(4, 12, 64)
                weight[2:] = weight[:2]
            q, k, v = (getattr(layer.self_attn, f"{name}_proj").weight.view(4, 12, 64) for name in "qkv")
            small.self_attn.q_proj.weight.copy_(q[[0, 2, 1, 3]].reshape(48, 64))
            small.self_attn.k_proj.weight.copy_(k[:2].reshape(24, 64))
            small.self_attn.v_proj.weight.copy_(v[:2].reshape(24, 64))
    model.float().save_pretrained(tmp_path / "parent")
    child.float().save_pretrained(tmp_path / "child")
    groups = {0: [[0, 2], [1, 3]], 1: [[0, 2], [1, 3]]}
    found = measure(tmp_path / "parent", {2: Child(tmp_path / "child", groups)}, WINDOWS, cast(Any, Words()))
    alike = {(r["weights"], r["kv_heads"], r["layer"], r["grouping"]): r for r in found["attention_alike"]}
    for layer in (0, 1):
        assert alike["parent", 2, layer, "as converted"]["within_nats"] == pytest.approx(0, abs=1e-4)
        assert alike["parent", 2, layer, "neighbours"]["within_nats"] > 0.01
        assert alike["parent", 4, layer, "neighbours"]["within_nats"] is None
        assert alike["child", 2, 0, "as converted"]["within_nats"] == pytest.approx(0, abs=1e-4)
    assert {(r["weights"], r["kv_heads"]) for r in found["attention_maps"]} == {
        ("parent", 4),
        ("child", 2),
        ("random", 4),
    }
    maps = {(r["weights"], r["layer"]): r["maps"] for r in found["attention_maps"]}
    assert maps["parent", 0][0] == maps["parent", 0][2] == maps["child", 0][0] == maps["child", 0][1]
    assert maps["parent", 0][0] != maps["parent", 0][1]
    heads = {(r["weights"], r["layer"]): r for r in found["attention_heads"]}
    assert heads["child", 0]["parent_heads"] == [0, 2, 1, 3]
    assert heads["child", 0]["distance_tokens"] == [heads["parent", 0]["distance_tokens"][n] for n in (0, 2, 1, 3)]
    assert found["attention_text"]["tokens"] == [f"<{i}>" for i in WINDOWS[0]]
    json.dumps(found)


def test_a_random_model_is_seeded_and_leaves_the_generator_alone():
    model = tiny_llama(2, seed=3)
    state = torch.get_rng_state()
    one, same, other = (patterns.random_like(model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.dtype == model.dtype
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (one, same, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize(
    ("models", "layers", "heads", "window"), [(5, 6, 8, 256), (8, 32, 64, 4096), (4, 2, 4, 17), (9, 80, 128, 256)]
)
def test_the_maps_stay_small(models, layers, heads, window):
    drawn, tokens = patterns._extent(models, layers, heads, window)
    assert models * len(drawn) * heads * tokens * (tokens + 1) // 2 <= patterns.MAP_CHARACTERS
    assert drawn == sorted(set(drawn))
    assert 0 <= drawn[0] <= drawn[-1] < layers
    assert 2 <= tokens <= min(window, patterns.MAP_TOKENS)


def test_a_model_without_attention_gives_nothing():
    class Other:
        class config:  # noqa: N801
            _attn_implementation = "sdpa"

        device = "cpu"

        def set_attn_implementation(self, name):
            self.config._attn_implementation = name

        def __call__(self, **asked):
            return type("Output", (), {"attentions": None})

    assert looks(Other(), np.zeros((2, 4), dtype=np.int64)) == []  # type: ignore[arg-type]
