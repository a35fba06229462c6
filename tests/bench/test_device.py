"""Where things are timed: a GPU where there is one, and a clear word where the one asked for is not."""

import pytest
import torch

from gqa.bench.device import choose_device
from gqa.errors import GqaError


@pytest.mark.parametrize(
    ("asked", "present", "chosen"),
    [(None, True, "cuda"), (None, False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, asked, present, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert choose_device(asked) == chosen


@pytest.mark.parametrize(
    ("asked", "says"), [("cuda", "device cuda is not available"), ("tpu", "an unknown device\ngot: tpu")]
)
def test_what_is_not_there_is_refused(monkeypatch, asked, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GqaError, match=says):
        choose_device(asked)
