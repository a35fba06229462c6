"""Growth of gradients, on cases whose exponent is known."""

import math

import pytest
import torch

from gqa.study.gradients import PROJECTIONS, random_growth, rows_of, trained_growth


def logs(exponent, noise, samples=200):
    generator = torch.Generator().manual_seed(0)
    return {
        name: {
            g: exponent * math.log(g) + noise * torch.randn(samples, generator=generator, dtype=torch.float64)
            for g in (1, 2, 4, 8)
        }
        for name in PROJECTIONS
    }


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_known_exponent_is_found_within_its_interval(exponent):
    growth, exponents = rows_of(logs(exponent, 0.3), "made")
    assert len(growth) == 8
    assert len(exponents) == 2
    for row in exponents:
        assert row["exponent_low"] <= exponent <= row["exponent_high"]
        assert row["exponent_high"] - row["exponent_low"] < 0.1
        assert row["samples"] == 200
    exact, _ = rows_of(logs(exponent, 0.0), "made")
    assert {
        row["queries_per_kv_head"]: row["norm_ratio"] for row in exact if row["projection"] == "k"
    } == pytest.approx({g: g**exponent for g in (1, 2, 4, 8)})


def test_random_weights_grow_about_as_the_root():
    # Independent contributions of one size: E|sum|^2 = G E|one|^2.
    _, exponents = rows_of(random_growth(100), "random")
    for row in exponents:
        assert 0.45 < row["exponent"] < 0.6


def test_scaling_keys_up_and_queries_down_changes_nothing(tmp_path):
    import torch
    from helpers.models import tiny_llama

    model = tiny_llama(4)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 8
            layer.self_attn.q_proj.weight /= 8
    model.save_pretrained(tmp_path / "b")
    windows = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0)).numpy()
    found = trained_growth({1: tmp_path / "a", 2: tmp_path / "b"}, windows)
    assert found["k"][1].tolist() == pytest.approx(found["k"][2].tolist(), abs=1e-4)


def test_a_trained_model_and_its_copy_have_the_gradients_that_autograd_gives(tmp_path):
    from helpers.models import tiny_llama

    model = tiny_llama(4)
    model.save_pretrained(tmp_path / "a")
    windows = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0)).numpy()
    found = trained_growth({2: tmp_path / "a"}, windows)
    for name in PROJECTIONS:
        expected = []
        for window in windows:
            model.zero_grad()
            ids = torch.as_tensor(window)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            weights = [getattr(layer.self_attn, f"{name}_proj").weight for layer in model.model.layers]
            norms = [
                (weight.grad.view(4, -1).norm(dim=1) * weight.detach().view(4, -1).norm(dim=1)).log().mean()
                for weight in weights
            ]
            expected.append(sum(map(float, norms)) / len(norms))
        assert found[name][2].tolist() == pytest.approx(expected, rel=1e-5)
