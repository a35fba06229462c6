"""The soak finds what it looks for: another text, a lost block, a growing process."""

from typing import Any

import pytest
import torch
from helpers.served import served_model

from gqa.bench import alone, soak
from gqa.bench.alone import Difference, Judge, differences
from gqa.bench.density import Memory
from gqa.bench.soak import soak as run
from gqa.cache.pool import BlockPool
from gqa.errors import GqaError
from gqa.model.serve import Batch, Sequence

CONTEXT, SECONDS = 40, 0.5


def memory(sequences, int8=False):
    token = 2 * 2 * ((12 + 12) * 4 if not int8 else 12 + 12 + 8)  # layers, KV heads
    return Memory(sequences * CONTEXT * token, 8, int8=int8)


@pytest.fixture
def model() -> Any:
    return served_model("llama-gqa", "gqa")


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_sequences_come_and_go_and_leave_nothing(model, int8):
    seen = []
    found = run(
        model,
        memory(3, int8),
        CONTEXT,
        SECONDS,
        progress=lambda stage, done, total, note="": seen.append((done, total)),
    )
    assert found["passed"]
    assert found["texts_wrong"] == 0
    assert found["texts_equal"] + found["texts_near_tie"] == found["sequences"] > 3
    assert found["pool_blocks"] == found["pool_blocks_free"] == 15
    assert found["sequences_at_once"] > 1
    assert found["new_tokens"] >= found["sequences"]
    assert found["steps_with_a_queue"] <= found["steps"]
    assert found["seconds"] >= SECONDS
    assert found["seconds"] >= found["seconds_of_steps"] + found["seconds_alone"]
    assert seen[-1] == (1, 1)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_seed_decides_what_is_served(model):
    def drawn(seed, text=()):
        one = soak._Soak(model, BlockPool(9), CONTEXT, soak.random.Random(seed), text)
        return [one._drawn() for _ in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    lengths = {(len(one.prompt), one.stored) for one in drawn(0)}
    assert all(1 <= prompt < CONTEXT and prompt <= stored <= CONTEXT for prompt, stored in lengths)
    assert min(lengths)[0] == 1
    assert max(stored for _, stored in lengths) > 0.9 * CONTEXT
    assert all(0 <= token < 97 for one in drawn(0) for token in one.prompt)
    for one in drawn(0, text := list(range(90))):
        assert text[one.prompt[0] :][: len(one.prompt)] == one.prompt


def test_sequences_share_blocks(model, monkeypatch):
    monkeypatch.setattr(soak, "SHARING", 1.0)
    found = run(model, memory(4), CONTEXT, SECONDS)
    assert found["sequences_shared"] > 0
    assert found["passed"]


def test_a_wrong_text_is_found(model, monkeypatch):
    step = Batch.step

    def wrong_once(self):
        ended = step(self)
        if ended and not hasattr(self, "done"):
            self.done = True
            ended[0].tokens[-1] = (ended[0].tokens[-1] + 1) % 97
        return ended

    monkeypatch.setattr(Batch, "step", wrong_once)
    found = run(model, memory(3), CONTEXT, SECONDS)
    assert (found["texts_wrong"], found["passed"]) == (1, False)
    assert found["texts_equal"] + found["texts_near_tie"] == found["sequences"] - 1


def test_a_lost_block_is_found(model, monkeypatch):
    release = BlockPool.release

    def forgetful(self, sequence):
        if sequence == 3:
            self._sequences.pop(sequence)
        else:
            release(self, sequence)

    monkeypatch.setattr(BlockPool, "release", forgetful)
    found = run(model, memory(4), CONTEXT, SECONDS)
    assert found["texts_wrong"] == 0
    assert found["pool_blocks_free"] < found["pool_blocks"]
    assert not found["passed"]


@pytest.mark.parametrize(("more", "passed"), [(0, True), (1, False)])
def test_a_growing_process_is_found(model, monkeypatch, more, passed):
    figures = soak._Soak._figures

    def grown(self, seconds):
        block = 2 * 2 * (12 + 12) * 4 * 8
        self.resident = [1000, 1000 + soak.ALLOCATOR_BYTES + 5 * block + more]  # 40 tokens are 5 blocks of 8
        return figures(self, seconds)

    monkeypatch.setattr(soak._Soak, "_figures", grown)
    found = run(model, memory(3), CONTEXT, 0.1)
    assert found["passed"] == passed


def test_resident_bytes_are_told_where_linux_tells(monkeypatch, tmp_path):
    before = soak.resident_bytes()
    if before is not None:
        held = torch.ones(8 << 20)
        after = soak.resident_bytes()
        assert after is not None
        assert after - before > held.nbytes / 2

    class Missing:
        def __init__(self, path):
            pass

        def read_text(self):
            raise FileNotFoundError

    monkeypatch.setattr(soak, "Path", Missing)
    assert soak.resident_bytes() is None


def test_alone_follows_the_batch_and_tells_every_difference(model):
    with torch.inference_mode():
        batch = Batch(model, BlockPool(8))
        sequence = Sequence([5, 9, 11], 9)
        batch.admit(sequence)
        while batch.running:
            batch.step()
        assert differences(model, sequence) == []
        right = sequence.tokens[2]
        sequence.tokens[2] = wrong = (right + 1) % 97
        found = differences(model, sequence)
    assert found[0] == Difference([5, 9, 11, *sequence.tokens[:2]], wrong, right)
    assert all(one.before == [5, 9, 11, *sequence.tokens[: len(one.before) - 3]] for one in found)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("before", [[7], [7, 8, 9, 10, 11]])
def test_near_ties_are_told_from_wrong_tokens(model, before, int8):
    twin = alone.copy.deepcopy(model)
    with torch.inference_mode():
        logits = model(torch.tensor([before])).logits[0, -1]
        best, second = logits.topk(2).indices.tolist()
        least = int(logits.argmin())
        head = twin.lm_head.weight
        head[second] = head[best]  # now exactly as likely
        judge = Judge(twin, int8=int8)
        assert judge.exact.dtype == torch.float64
        tie, wrong = (judge.judge(Difference(before, batched, best)) for batched in (second, least))
        assert tie.gap == 0
        assert 0 < tie.allowed == wrong.allowed
        assert tie.is_near_tie
        assert wrong.gap == pytest.approx(float(logits[best] - logits[least]), rel=1e-3)
        assert not wrong.is_near_tie
    assert not alone.Verdict(float("nan"), 1.0).is_near_tie


def test_refusals(model):
    for seconds in (0, float("nan"), float("inf")):
        with pytest.raises(GqaError, match="takes time"):
            run(model, memory(1), CONTEXT, seconds)
    with pytest.raises(GqaError, match="token to come"):
        run(model, memory(1), 1, SECONDS)
    with pytest.raises(GqaError, match="text is too short"):
        run(model, memory(1), CONTEXT, SECONDS, text=[1, 2, 3])
    with pytest.raises(GqaError, match="not even one sequence fits"):
        run(model, memory(1), CONTEXT + 1, SECONDS)
    with pytest.raises(GqaError, match="take no mask"):
        run(served_model("mistral-window", "gqa"), memory(3), CONTEXT, SECONDS)
