"""What a conversion is estimated to take, against what is counted."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.checkpoints import VOCAB, tiny_config, tiny_source
from torch.utils.flop_counter import FlopCounterMode

from gqa.convert.effort import distill_flops
from gqa.convert.job import plan_conversion
from gqa.convert.memory import distill_bytes, keeps_states_in_files, peak_memory_bytes
from gqa.convert.recipe import make_recipe
from gqa.errors import GqaError
from gqa.uptrain import shared_trunk
from gqa.uptrain.shared_trunk import SharedTrunk

B, T = 4, 32
RECIPE = make_recipe(2, "mean", distill_tokens=B * T, distill_window=T, distill_batch=B)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied embeddings"])
def test_operations_of_a_distillation_are_those_that_torch_counts(tmp_path, monkeypatch, tied):
    # Eager attention, whose products torch's counter sees: all T^2 scores, of which half are hidden, and no second time
    # in the backward pass, where the estimate counts half of a forward pass for them.
    monkeypatch.setattr(
        shared_trunk, "use_fast_attention", lambda model, layout: model.set_attn_implementation("eager")
    )
    source = tiny_source(tmp_path / "parent", tiny_config(tie_word_embeddings=tied))
    job = plan_conversion(source, RECIPE)
    attention = {
        name: torch.zeros(shape)
        for layer in range(len(job.child.layers))
        for name, shape in job.layout.attention_shapes(job.child, layer).items()
        if name in job.checkpoint
    }
    trunk = SharedTrunk(job.checkpoint, source.config, 2, job.layout, attention, half=False, device="cpu")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB, (B, T)))
    with FlopCounterMode(display=False) as counter:
        trunk.backward(None, ids, 1.0)
    counted = {"matrices": 0, "attention": 0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        counted["attention" if "bmm" in str(operation) else "matrices"] += flops
    scores = sum(2 * layer.query_heads * T * layer.head_dim for layer in job.parent.layers) * B * T
    assert counted["attention"] == pytest.approx(4 * 2 * scores, rel=0.05)
    assert distill_flops(job) == pytest.approx(counted["matrices"] + 4.5 * scores, rel=0.05)


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_memory_includes_the_training_whatever_comes_before_it(tmp_path, method):
    """Pooling without text has next to no peak of its own."""
    job = plan_conversion(tiny_source(tmp_path / "parent"), dataclasses.replace(RECIPE, method=method))
    alone = dataclasses.replace(job, recipe=job.recipe.without_distillation)
    assert peak_memory_bytes(alone, streamed=False) < peak_memory_bytes(job, streamed=False)
    assert peak_memory_bytes(job, streamed=False) > distill_bytes(job)
    with pytest.raises(GqaError, match="does not fit the memory") as caught:
        keeps_states_in_files(job, distill_bytes(job))
    assert "--distill-batch" in str(caught.value)


def test_a_distillations_memory_grows_with_its_batch_and_shrinks_with_bf16(tmp_path):
    source = tiny_source(tmp_path / "parent")
    small, large, half = (
        distill_bytes(plan_conversion(source, dataclasses.replace(RECIPE, distill_tokens=64 * B * T, **change)))
        for change in ({}, {"distill_batch": 64}, {"distill_precision": "bf16", "distill_batch": 64})
    )
    assert small < half < large
