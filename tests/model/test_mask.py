"""Masks of transformers' models: when there is none, and when it is told in the op's own terms."""

from typing import Any

import pytest
import torch
from helpers.served import WINDOW, eager_tokens, greedy, prompts, served_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import gqa
from gqa.model import hf
from gqa.model import mask as mask_module
from gqa.model.mask import attention_mask, plain


def mask_of(*, tokens: int, keys: int, seen: int, **options: Any) -> Any:
    """The mask for queries that follow on `seen` tokens, of which the last `keys - tokens` are kept."""
    return attention_mask(
        batch_size=2, q_length=tokens, kv_length=keys, q_offset=seen, kv_offset=seen + tokens - keys, **options
    )


def noted(mask):
    """The note on a mask that leaves nothing to a mask."""
    known: Any = plain(mask)
    assert known.seen is None
    return known.kv_starts.tolist(), known.kv_lengths.tolist(), known.q_start


def meaning(known: Any, shape):
    """The mask of this shape (B, 1, T, S) that a note describes."""
    key, position = torch.arange(shape[3]), (known.q_start or 0) + torch.arange(shape[2])[:, None]
    seen = torch.ones(shape, dtype=torch.bool)
    if known.kv_starts is not None:
        seen &= (key >= known.kv_starts[:, None, None, None]) & (key < known.kv_lengths[:, None, None, None])
    if known.q_start is not None:
        seen &= key <= position
    if known.window is not None:
        seen &= key > position - known.window
    return seen if known.seen is None else seen & known.seen


@pytest.fixture(params=["read", "not read"])
def unread(request, monkeypatch):
    """Also as on a device where the host would have to wait for a mask's values."""
    monkeypatch.setattr(mask_module, "_readable", lambda mask: request.param == "read")
    return request.param == "not read"


def test_a_single_query_that_sees_every_key_needs_no_mask():
    window = {"mask_function": sliding_window_causal_mask_function(WINDOW), "local_size": WINDOW}
    assert mask_of(tokens=1, keys=20, seen=19) is None
    assert mask_of(tokens=1, keys=WINDOW, seen=19, **window) is None
    padding = torch.ones(2, 20, dtype=torch.bool)
    assert mask_of(tokens=1, keys=20, seen=19, attention_mask=padding) is None
    padding[:, :3] = False
    assert mask_of(tokens=1, keys=WINDOW, seen=19, attention_mask=padding, **window) is None  # it has left the window


def test_what_is_hidden_in_front_and_behind_is_noted():
    window = {"mask_function": sliding_window_causal_mask_function(WINDOW), "local_size": WINDOW}
    mask = mask_of(tokens=1, keys=WINDOW + 1, seen=19, **window)
    assert noted(mask) == ([1, 1], [WINDOW + 1] * 2, None)
    assert mask[1, 0, 0].tolist() == [False] + [True] * WINDOW

    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :3] = False
    mask = mask_of(tokens=1, keys=20, seen=19, attention_mask=padding)
    assert noted(mask) == ([0, 3], [20, 20], None)
    assert torch.equal(mask[:, 0, 0], padding)

    mask = mask_of(tokens=20, keys=20, seen=0, attention_mask=padding)
    assert noted(mask) == ([0, 3], [20, 20], 0)
    assert torch.equal(mask, padding[:, None, None] & torch.ones(20, 20, dtype=torch.bool).tril())
    later = mask_of(tokens=6, keys=20, seen=14, attention_mask=padding)
    assert noted(later) == ([0, 3], [20, 20], 14)
    assert torch.equal(later, mask[:, :, 14:])

    padding[0, 16:] = False
    assert noted(mask_of(tokens=20, keys=20, seen=0, attention_mask=padding)) == ([0, 3], [16, 20], 0)
    # a static cache: places behind the last token
    mask = attention_mask(2, 1, 20, torch.tensor(9), attention_mask=torch.arange(20).expand(2, 20) < 10)
    assert noted(mask) == ([0, 0], [10, 10], None)


SLIDING = {"mask_function": sliding_window_causal_mask_function(WINDOW), "local_size": WINDOW}


@pytest.mark.parametrize("pattern", [{}, SLIDING], ids=["causal", "sliding"])
@pytest.mark.parametrize("keys", [20, 13])
@pytest.mark.parametrize("tokens", [1, 6, 13])
def test_a_note_means_its_mask(tokens, keys, pattern, unread):
    """Of keys from the first on or of the latest, with holes, with a row that is all padding, without padding."""
    torch.manual_seed(0)
    holes = torch.rand(2, 20) < 0.7
    holes[1] = False
    left = torch.ones(2, 20, dtype=torch.bool)
    left[0, :9] = False
    for padding in (None, holes, left):
        mask = mask_of(tokens=tokens, keys=keys, seen=20 - tokens, attention_mask=padding, **pattern)
        if mask is None:  # causal without padding: told from the shapes
            assert padding is None
            assert not pattern
            assert tokens in (1, keys)
            continue
        known = plain(mask)
        assert known is not None
        assert torch.equal(meaning(known, mask.shape), mask)
        assert known.window == (WINDOW if pattern and tokens > 1 else None)
        if padding is not None:
            assert (known.seen is not None) == (unread or padding is holes)


def test_a_compiled_graph_tells_a_single_query_s_mask_by_itself():
    seen = torch.zeros(3, 1, 1, 20, dtype=torch.bool)
    seen[0, ..., 3:12] = seen[1, ..., 5:7] = seen[1, ..., 9] = True
    tell: Any = torch.compile(plain, fullgraph=True, backend="eager")
    known = tell(seen)
    assert known.kv_starts.tolist() == [3, 5, 0]
    assert known.kv_lengths.tolist() == [12, 10, 20]
    assert torch.equal(meaning(known, seen.shape), seen)
    for other in (torch.ones(3, 1, 2, 20, dtype=torch.bool), torch.zeros(3, 1, 1, 20)):
        assert tell(other) is None


def test_no_other_pattern_is_noted():
    left = torch.ones(2, 20, dtype=torch.bool)
    left[0, :2] = False

    def of_function(function):
        return mask_of(tokens=20, keys=20, seen=0, mask_function=function, local_size=3)

    for mask in (
        mask_of(tokens=20, keys=20, seen=0, attention_mask=left, allow_is_causal_skip=False),
        attention_mask(2, 6, 20, torch.tensor(0), attention_mask=left),  # a static cache
        attention_mask(2, 6, 20, 0, attention_mask=left[:, :6]),
        of_function(chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64))),
        of_function(and_masks(sliding_window_overlay(3), bidirectional_mask_function)),
        of_function(and_masks(causal_mask_function, sliding_window_overlay(3))),
        of_function(or_masks(sliding_window_overlay(3), causal_mask_function)),
        of_function(and_masks(sliding_window_causal_mask_function(3), causal_mask_function)),
    ):
        assert mask is not None
        assert plain(mask) is None
    assert plain(None) is None


def test_a_changed_mask_has_no_note():
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :3] = False
    mask = mask_of(tokens=1, keys=20, seen=19, attention_mask=padding)
    for changed in (mask & True, mask[..., 1:], mask.clone(), ~mask):
        assert plain(changed) is None


def test_chunks_that_hide_keys_in_front():
    chunk = {"mask_function": chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)), "local_size": 8}
    chunked = mask_of(tokens=1, keys=8, seen=19, **chunk)  # position 19 is the fourth of its chunk
    assert noted(chunked) == ([4, 4], [8, 8], None)
    assert chunked[0, 0, 0].tolist() == [False] * 4 + [True] * 4


def test_a_caller_that_wants_a_mask_gets_one():
    mask = mask_of(tokens=1, keys=20, seen=19, allow_is_causal_skip=False)
    assert mask is not None
    assert bool(mask.all())


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt-oss-sinks-window"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
def test_no_mask_of_many_queries_reaches_the_op(name, options, unread, monkeypatch):
    masked = []

    def spy(query, *args, mask=None, **others):
        if mask is not None:
            masked.append(mask.shape[2])
        return gqa.attention(query, *args, mask=mask, **others)

    monkeypatch.setattr(hf, "attention", spy)
    assert torch.equal(greedy(served_model(name, "gqa"), prompts(), **options), eager_tokens(name, True))
    # The first chunk of four holds nothing but padding of a prompt, which no range of keys says.
    assert set(masked) == ({1} if unread or options else set())


def test_the_host_looks_at_no_step_on_another_device():
    for device, readable in (("cpu", True), ("meta", False)):
        assert mask_module._readable(torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)) == readable
    assert mask_module._readable(torch.ones(2, 1, 4, 9, dtype=torch.bool, device="meta"))  # a prompt's
    with FakeTensorMode():
        assert not mask_module._readable(torch.ones(2, 1, 4, 9, dtype=torch.bool))
