import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.uptraining import noisy_child, parent_and_windows, weights
from torch.nn.functional import log_softmax

from gqa.errors import GqaError
from gqa.evaluate import evaluate, load_model
from gqa.uptrain import Settings, run, training_text, uptrain
from gqa.uptrain.distill import distillation_loss, top_predictions
from gqa.uptrain.gap import stalled
from gqa.uptrain.loop import Loop
from gqa.uptrain.schedule import factor, final_rate

RATE = 3e-3


def settings_of(chosen: dict[str, Any]) -> Settings:
    return Settings(**chosen)


class Case:
    def __init__(self, folder):
        self.folder = folder
        self.parent, self.windows = parent_and_windows(folder)
        self.child = noisy_child(self.parent, folder / "child")

    def run(self, out, windows=None, **settings):
        settings = settings_of({"learning_rate": RATE, **settings})
        windows = self.windows[:40] if windows is None else windows
        return uptrain(self.child, out, windows=windows, parent_folder=self.parent, settings=settings)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def plain(case):
    """(report, weights) of a run without options."""
    return case.run(case.folder / "plain"), weights(case.folder / "plain")


@pytest.fixture
def loops(monkeypatch):
    """The loops that were run, and the largest number of windows that went through a model at once."""
    made = []

    class Watched(Loop):
        def __init__(self, *arguments, **options: Any):
            super().__init__(*arguments, **options)
            made.append(self)
            self.most = 0
            self.model.register_forward_pre_hook(self._note, with_kwargs=True)

        def _note(self, module, arguments, keywords):
            self.most = max(self.most, len(keywords["input_ids"]))

    monkeypatch.setattr(run, "Loop", Watched)
    return made


def moved_alike(one, other, start, tolerance=0.01):
    """Whether two trainings moved every weight to the same place, within a share of the way that it went."""
    return all((one[n] - other[n]).abs().max() <= tolerance * (one[n] - start[n]).abs().max() + 1e-6 for n in one)


def test_micro_batches_add_up_to_the_batch(case, plain, loops, tmp_path):
    report = case.run(tmp_path / "out", micro_batch=2)
    assert loops[0].most == 2
    assert report["final_cross_entropy_nats"] == pytest.approx(plain[0]["final_cross_entropy_nats"], rel=1e-5)
    assert report["final_kl_to_parent_nats"] == pytest.approx(plain[0]["final_kl_to_parent_nats"], rel=1e-4)
    assert moved_alike(weights(tmp_path / "out"), plain[1], weights(case.child))


def test_an_interrupted_run_goes_on_with_smaller_micro_batches_and_gradient_checkpointing(case, plain, loops, tmp_path):
    def interrupt(stage, done, total, note=""):
        if done == 3:
            raise KeyboardInterrupt

    settings = Settings(learning_rate=RATE)
    with pytest.raises(KeyboardInterrupt):
        uptrain(
            case.child,
            tmp_path / "out",
            windows=case.windows[:40],
            parent_folder=case.parent,
            settings=settings,
            progress=interrupt,
        )
    case.run(tmp_path / "out", micro_batch=4, gradient_checkpointing=True)
    assert [loop.most for loop in loops] == [8, 4]
    assert all(layer.gradient_checkpointing for layer in loops[1].model.model.layers)
    assert moved_alike(weights(tmp_path / "out"), plain[1], weights(case.child))


def test_gradient_checkpointing_computes_the_same(case, plain, tmp_path):
    case.run(tmp_path / "out", gradient_checkpointing=True)
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in weights(tmp_path / "out").items())


def test_bf16_products_leave_fp32_weights(case, plain, loops, tmp_path):
    report = case.run(tmp_path / "out", precision="bf16")
    assert {p.dtype for p in loops[0].model.parameters()} == {torch.float32}
    assert report["precision"] == "bf16"
    expected = plain[0]["final_cross_entropy_nats"]
    assert report["final_cross_entropy_nats"] != expected
    assert report["final_cross_entropy_nats"] == pytest.approx(expected, rel=2**-8)
    one, other, start = weights(tmp_path / "out"), plain[1], weights(case.child)
    assert all((one[name] - other[name]).norm() < 0.3 * (one[name] - start[name]).norm() for name in one)


@pytest.mark.parametrize("train", ["attention", "lora"])
def test_only_the_attention_moves_and_comes_closer(case, train, tmp_path):
    if train == "lora":
        pytest.importorskip("peft")
    case.run(tmp_path / "out", case.windows[:120], train=train)
    start, end = weights(case.child), weights(tmp_path / "out")
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        name for name in start if ".self_attn." in name
    }
    assert start.keys() == end.keys()
    teacher = load_model(case.parent)
    before, after = (evaluate(load_model(f), case.windows[120:160], teacher) for f in (case.child, tmp_path / "out"))
    assert after["kl_to_parent_nats"] < before["kl_to_parent_nats"]


def test_low_rank_updates_have_that_rank_and_go_on_after_a_kill(case, tmp_path):
    pytest.importorskip("peft")

    def interrupt(stage, done, total, note=""):
        if done == 3:
            raise KeyboardInterrupt

    settings = Settings(learning_rate=RATE, train="lora", lora_rank=3)
    arguments = {"windows": case.windows[:40], "parent_folder": case.parent, "settings": settings}
    with pytest.raises(KeyboardInterrupt):
        uptrain(case.child, tmp_path / "out", progress=interrupt, **arguments)
    for out in ("out", "straight"):
        uptrain(case.child, tmp_path / out, **arguments)
    start, end, straight = (weights(f) for f in (case.child, tmp_path / "out", tmp_path / "straight"))
    assert all(torch.equal(end[name], straight[name]) for name in straight)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank((end[name] - start[name]).double(), rtol=1e-3) == 3


def test_the_schedules_warm_up_and_end_as_they_say():
    ends: list[tuple[Any, float, float]] = [("constant", 1, 1), ("linear", 0.5, 1 / 90), ("cosine", 0.5, 0)]
    for kind, middle, last in ends:
        rates = [factor(kind, step, 100) for step in range(100)]
        assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
        assert rates[55] == pytest.approx(middle)
        assert rates[99] == pytest.approx(last, abs=1e-3)
    assert [factor("cosine", step, 1) for step in range(1)] == [0]


def test_the_parents_final_rate_is_followed_if_it_is_told(tmp_path):
    def state(*rates):
        history = [{"learning_rate": rate, "step": n} for n, rate in enumerate(rates)] + [{"eval_loss": 2.0}]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return final_rate(tmp_path)

    assert final_rate(tmp_path) is None
    assert final_rate(None) is None
    assert state(1e-5, 1e-3, 1e-4) == 1e-4
    assert state(1e-5, 1e-3, 1e-7) is None  # decayed to nothing: no rate to go on with
    assert state(1e-5, "nan", 1e-5) == 1e-5
    assert state() is None
    (tmp_path / "gqa_training.json").write_text('{"final_learning_rate": 0.002}')
    assert state(1e-3) == 0.002
    for broken in ("[", "[]", '{"final_learning_rate": -1}', '{"final_learning_rate": "x"}'):
        (tmp_path / "gqa_training.json").write_text(broken)
        (tmp_path / "trainer_state.json").write_text(broken)
        assert final_rate(tmp_path) is None


def test_the_loss_with_all_predictions_is_that_with_the_logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator) * 3 for _ in range(2))
    ids = torch.randint(0, 11, (2, 5), generator=generator)
    gradients = []
    for target in (teacher, top_predictions(teacher, 11)):
        logits = student.clone().requires_grad_()
        loss, _, kl = distillation_loss(logits, ids, target, 0.7)
        loss.backward()
        assert kl is not None
        gradients.append((loss.item(), kl.item(), logits.grad))
    assert gradients[0][:2] == pytest.approx(gradients[1][:2], rel=1e-6)
    torch.testing.assert_close(gradients[0][2], gradients[1][2], rtol=1e-5, atol=1e-7)


def test_the_loss_with_few_predictions_is_that_over_them_and_the_rest():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    k = 4
    expected = []
    for q, p in zip(student[:, :-1].reshape(-1, 11), teacher[:, :-1].reshape(-1, 11), strict=True):
        q, p = log_softmax(q, -1).exp(), log_softmax(p, -1).exp()
        top = p.argsort(descending=True)[:k]
        p = torch.cat([p[top], 1 - p[top].sum().reshape(1)])
        q = torch.cat([q[top], 1 - q[top].sum().reshape(1)])
        expected.append((p * (p / q).log()).sum().item())
    logits = student.clone().requires_grad_()
    loss, _, kl = distillation_loss(logits, torch.zeros(2, 5, dtype=torch.int64), top_predictions(teacher, k), 1.0)
    assert kl is not None
    assert kl.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_run_with_all_stored_predictions_is_that_with_the_parent(case, plain, tmp_path, monkeypatch):
    vocabulary = load_model(case.child).config.vocab_size
    stored = {"teacher_logits": tmp_path / "logits", "top_k": vocabulary}
    first = case.run(tmp_path / "first", **stored)
    assert first["final_kl_to_parent_nats"] == pytest.approx(plain[0]["final_kl_to_parent_nats"], rel=1e-4)
    assert moved_alike(weights(tmp_path / "first"), plain[1], weights(case.child))

    # Another run reads them, and does not load the parent.
    loaded = []
    monkeypatch.setattr(run, "load_model", lambda folder, **how: loaded.append(folder) or load_model(folder, **how))
    case.run(tmp_path / "second", train="attention", **stored)
    assert loaded == [case.child]
    for other in ({"windows": case.windows[1:41]}, {"top_k": 5}):
        with pytest.raises(GqaError, match="has not the parent's predictions"):
            case.run(tmp_path / "third", **{**stored, **other})


def test_an_interrupted_writing_of_predictions_goes_on(case, tmp_path, monkeypatch):
    from gqa.uptrain import teacher

    monkeypatch.setattr(teacher, "_MARK_EVERY", 1)
    stored = Settings(learning_rate=RATE, teacher_logits=tmp_path / "logits", top_k=5)
    seen = []

    def progress(stage, done, total, note=""):
        seen.append((stage, done))
        if stage != "uptraining" and done == 24 and not again:
            raise KeyboardInterrupt

    arguments = {"windows": case.windows[:40], "parent_folder": case.parent, "settings": stored, "progress": progress}
    again = False
    with pytest.raises(KeyboardInterrupt):
        uptrain(case.child, tmp_path / "out", **arguments)
    again = True
    seen.clear()
    uptrain(case.child, tmp_path / "out", **arguments)
    assert seen[0] == ("the parent's predictions", 24)  # of which 16 were marked as done
    values = np.load(tmp_path / "logits" / "log_probabilities.npy")
    assert values.shape == (40, case.windows.shape[1] - 1, 6)
    assert np.exp(values.astype(np.float64)).sum(-1) == pytest.approx(1, abs=1e-5)


def test_the_gap_stalls_when_three_in_a_row_are_no_progress():
    assert not stalled([])
    assert stalled([3, 2, 2, 2, 2])
    assert not stalled([3, 2, 2, 2])
    assert not stalled([3, 2, 2, 2, 1.9])
    assert stalled([1, 2, 3, 4])
    assert stalled([1, 0.995, 0.992, 0.991])


def test_it_stops_when_the_gap_no_longer_closes_and_says_where(case, tmp_path):
    text = training_text(case.windows, tokens=160 * case.windows.shape[1], batch=4, held_out=8)
    stop = {"early_stop": True, "save_every": 2, "batch": 4}
    # A rate that does harm: the first gap is the best.
    report = case.run(tmp_path / "out", text, learning_rate=0.3, schedule="constant", **stop)
    gaps = [gap["kl_to_parent_nats"] for gap in report["held_out_gaps"]]
    assert report["stopped_early"]
    assert report["steps"] == 2 * len(gaps) < 40
    assert stalled(gaps)
    assert not stalled(gaps[:-1])
    assert report["tokens"] == report["steps"] * 4 * text.length
    teacher = load_model(case.parent)
    measured = evaluate(load_model(tmp_path / "out"), text.held_out, teacher)
    assert gaps[-1] == pytest.approx(measured["kl_to_parent_nats"], rel=1e-4)
    with pytest.raises(GqaError, match="early stop needs"):
        case.run(tmp_path / "other", early_stop=True)


def test_tensorboard_gets_the_figures_of_every_step(case, plain, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = case.run(tmp_path / "out", tensorboard=tmp_path / "board")
    assert report["final_cross_entropy_nats"] == plain[0]["final_cross_entropy_nats"]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    entropies = [scalar.value for scalar in events.Scalars("uptrain/cross_entropy")]
    assert [scalar.step for scalar in events.Scalars("uptrain/learning_rate")] == [1, 2, 3, 4, 5]
    assert sum(entropies) / 5 == pytest.approx(report["final_cross_entropy_nats"], rel=1e-6)


def test_settings_that_decide_the_result_are_told_apart():
    default = Settings()
    assert default.asked(teacher=True) == {
        "distill_weight": 0.7,
        "batch": 8,
        "learning_rate": 2e-4,
        "seed": 0,
    }
    changes = (
        {"schedule": "linear"},
        {"train": "attention"},
        {"train": "lora"},
        {"train": "lora", "lora_rank": 4},
        {"precision": "bf16"},
        {"early_stop": True},
        {"early_stop": True, "save_every": 3},
        {"teacher_logits": "folder"},
        {"teacher_logits": "folder", "top_k": 3},
    )
    asked = [json.dumps(settings_of(change).asked(teacher=True), sort_keys=True) for change in changes]
    assert len({*asked, json.dumps(default.asked(teacher=True), sort_keys=True)}) == len(changes) + 1
    for same in ({"micro_batch": 2}, {"gradient_checkpointing": True}, {"save_every": 2}, {"tensorboard": "folder"}):
        assert settings_of(same).asked(teacher=True) == default.asked(teacher=True)
    for wrong in ({"train": "most"}, {"schedule": "steps"}, {"precision": "fp16"}, {"top_k": 0}, {"micro_batch": 0}):
        with pytest.raises(GqaError):
            settings_of(wrong)
