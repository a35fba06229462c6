import copy
import math

import numpy as np
import pytest
import torch
from helpers.models import tiny_llama
from torch.nn.functional import log_softmax

from gqa.errors import GqaError
from gqa.evaluate import evaluate, remember
from gqa.evaluate.fidelity import window_fidelity
from gqa.evaluate.perplexity import mean_and_error, paired_p_value, perplexity, token_losses
from gqa.evaluate.position import by_position

WINDOWS = np.random.default_rng(0).integers(0, 97, (5, 11))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(2).double()


@pytest.fixture(scope="module")
def parent():
    return tiny_llama(4, seed=1).double()


def by_hand(model, parent):
    """Token by token, in float64, without any of the package's functions."""
    losses, parent_losses, divergences, same = [], [], [], []
    for window in WINDOWS:
        ids = torch.tensor(window)[None]
        with torch.no_grad():
            q = log_softmax(model(ids).logits[0].double(), -1)
            p = log_softmax(parent(ids).logits[0].double(), -1)
        for t in range(len(window) - 1):
            losses.append(-q[t, window[t + 1]].item())
            parent_losses.append(-p[t, window[t + 1]].item())
            divergences.append(sum(math.exp(p[t, v]) * (p[t, v] - q[t, v]).item() for v in range(97)))
            same.append(p[t].argmax().item() == q[t].argmax().item())
    return map(np.array, (losses, parent_losses, divergences, same))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_all_figures_against_a_loop_in_float64(model, parent, batch):
    losses, parent_losses, divergences, same = by_hand(model, parent)
    results = evaluate(model, WINDOWS, parent, batch)
    per_window = losses.reshape(5, 10).mean(1)
    difference = per_window - parent_losses.reshape(5, 10).mean(1)
    expected = {
        "windows": 5,
        "tokens": 50,
        "cross_entropy_nats_per_token": losses.mean(),
        "standard_error_nats": per_window.std(ddof=1) / math.sqrt(5),
        "perplexity": math.exp(losses.mean()),
        "parent_cross_entropy_nats_per_token": parent_losses.mean(),
        "parent_perplexity": math.exp(parent_losses.mean()),
        "kl_to_parent_nats": divergences.mean(),
        "kl_standard_error_nats": divergences.reshape(5, 10).mean(1).std(ddof=1) / math.sqrt(5),
        "top1_agreement": same.mean(),
        "loss_above_parent_nats": difference.mean(),
        "loss_above_parent_standard_error_nats": difference.std(ddof=1) / math.sqrt(5),
    }
    assert results.keys() == {*expected, "loss_above_parent_p_value"}
    assert results["loss_above_parent_p_value"] == paired_p_value(torch.tensor(difference))
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-10, abs=1e-12), name


def test_a_model_beside_itself_differs_in_nothing(model):
    results = evaluate(model, WINDOWS, copy.deepcopy(model))
    assert results["kl_to_parent_nats"] == 0
    assert results["top1_agreement"] == 1
    assert results["loss_above_parent_nats"] == 0


def test_remembered_logits_give_the_same_figures(model, parent):
    assert evaluate(model, WINDOWS, remember(parent, WINDOWS, 2), 3) == pytest.approx(
        evaluate(model, WINDOWS, parent, 3), rel=1e-10
    )


def test_without_a_parent_there_is_nothing_about_one(model):
    assert list(evaluate(model, WINDOWS)) == [
        "windows",
        "tokens",
        "cross_entropy_nats_per_token",
        "standard_error_nats",
        "perplexity",
    ]


def test_the_models_come_back_in_the_mode_they_came_in(model, parent):
    model.train()
    evaluate(model, WINDOWS, parent)
    assert model.training
    assert not parent.training
    model.eval()


def test_progress_ends_at_the_number_of_windows(model):
    seen = []
    evaluate(model, WINDOWS, batch=2, progress=lambda stage, done, total, note="": seen.append((stage, done, total)))
    assert seen == [("evaluating", done, 5) for done in (2, 4, 5)]


def test_pieces_of_the_log_softmax_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, parent_logits = (torch.randn(3, 9, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 50, (3, 9), generator=generator)
    whole = (token_losses(logits, ids), *window_fidelity(logits, parent_logits))
    monkeypatch.setattr("gqa.evaluate.perplexity.ROWS", 7)
    monkeypatch.setattr("gqa.evaluate.fidelity.ROWS", 7)
    pieces = (token_losses(logits, ids), *window_fidelity(logits, parent_logits))
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


def test_half_precision_logits_are_measured_in_fp32():
    logits = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    exact = token_losses(logits.double(), ids)
    assert (token_losses(logits, ids) - exact).abs().max() < 1e-6


def test_one_window_has_no_standard_error(model):
    assert evaluate(model, WINDOWS[:1])["standard_error_nats"] is None
    assert mean_and_error(torch.tensor([2.0, 4.0]).double()) == pytest.approx((3.0, 1.0))


def test_a_hopeless_model_has_infinite_perplexity():
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize(
    ("windows", "word"),
    [([[1, 97]], "does not know"), ([[-1, 3]], "does not know"), ([1, 2], "shape"), ([[1], [2]], "shape")],
)
def test_windows_that_do_not_fit_are_refused(model, windows, word):
    with pytest.raises(GqaError, match=word):
        evaluate(model, np.array(windows))


def test_a_parent_of_another_vocabulary_is_refused(model):
    other = tiny_llama(2)
    other.resize_token_embeddings(101)
    with pytest.raises(GqaError, match="vocabulary"):
        evaluate(model, WINDOWS, other)
    with pytest.raises(GqaError, match="batch"):
        evaluate(model, WINDOWS, batch=0)


def test_loss_over_position_against_the_loop(model, parent):
    losses, parent_losses, _, _ = by_hand(model, parent)
    losses, parent_losses = losses.reshape(5, 10), parent_losses.reshape(5, 10)
    rows = evaluate(model, WINDOWS, parent, 2, positions=True)["by_position"]
    assert [(row["context_from"], row["context_to"]) for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 10)]
    for row in rows:
        here = slice(row["context_from"] - 1, row["context_to"])
        own, theirs = losses[:, here].mean(1), parent_losses[:, here].mean(1)
        assert row["cross_entropy_nats_per_token"] == pytest.approx(own.mean())
        assert row["standard_error_nats"] == pytest.approx(own.std(ddof=1) / math.sqrt(5))
        assert row["parent_perplexity"] == pytest.approx(math.exp(theirs.mean()))
        assert row["loss_above_parent_nats"] == pytest.approx((own - theirs).mean())
        error = (own - theirs).std(ddof=1) / math.sqrt(5)
        assert row["loss_above_parent_standard_error_nats"] == pytest.approx(error)
    weighted = sum(row["cross_entropy_nats_per_token"] * (row["context_to"] - row["context_from"] + 1) for row in rows)
    assert weighted / 10 == pytest.approx(losses.mean())


def test_positions_of_one_predicted_token():
    assert len(by_position(torch.ones(3, 1))) == 1
    assert "parent_perplexity" not in by_position(torch.ones(3, 1))[0]


def test_the_paired_test_by_enumeration():
    # Of the 16 choices of signs of 4 differences, count those whose mean is as far from zero.
    differences = torch.tensor([0.5, 0.1, -0.2, 0.7]).double()
    means = [abs(sum(d if sign >> k & 1 else -d for k, d in enumerate(differences.tolist()))) for sign in range(16)]
    exact = sum(mean >= abs(sum(differences.tolist())) - 1e-12 for mean in means) / 16
    assert paired_p_value(differences) == pytest.approx(exact, abs=0.02)
    assert paired_p_value(torch.ones(30)) == 1 / 10_000  # all of one sign: only the true choice, and its opposite
    assert paired_p_value(torch.zeros(5)) == 1
    assert paired_p_value(torch.ones(1)) is None
