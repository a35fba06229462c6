"""Every architecture: copies of heads convert back, and a child with fewer heads loads without a word."""

import logging
import warnings

import numpy as np
import pytest
import torch
from helpers.architectures import ROWS, TOKENS, VOCAB, logits, tiny_model
from helpers.models import as_scrambled_mha
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.source import open_checkpoint

WINDOWS = np.random.default_rng(0).integers(3, VOCAB, (6, TOKENS))


def converted(row, model, folder, recipe):
    """Save, convert, load again."""
    model.save_pretrained(folder / "parent")
    windows = WINDOWS if recipe.calibration_tokens else None
    report = convert(open_checkpoint(str(folder / "parent")), folder / "child", recipe, windows)
    said: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record)

    listener, logger = Listener(logging.WARNING), transformers_logging.get_logger("transformers")
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            child = AutoModelForCausalLM.from_pretrained(
                folder / "child", dtype=row.dtype, attn_implementation=row.attention
            )
    finally:
        logger.removeHandler(listener)
    assert [record.getMessage() for record in said] == []
    return child.eval(), report


def recipe_of(kv_heads, method, *, calibrated):
    return make_recipe(kv_heads, method, calibration_tokens=WINDOWS.size if calibrated else 0, window=TOKENS)


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("name", ROWS)
def test_copies_convert_back(tmp_path, name, calibrated):
    row = ROWS[name]
    grouped = tiny_model(row)
    parent = as_scrambled_mha(grouped, turn=row.free, shuffle=not row.settings.get("alibi"))
    wanted = logits(grouped)
    scale = wanted.std()
    assert (logits(parent) - wanted).abs().max() < row.error * scale  # the scrambling is free
    child, _ = converted(row, parent, tmp_path, recipe_of(row.kv_heads, "svd", calibrated=calibrated))
    assert (logits(child) - wanted).abs().max() < row.error * scale
    if row.free and not calibrated:
        shutil = tmp_path / "mean"
        pooled, _ = converted(row, parent, shutil, recipe_of(row.kv_heads, "mean", calibrated=False))
        assert (logits(pooled) - wanted).abs().max() > 0.1 * scale


@pytest.mark.parametrize("method", ["mean", "svd", "procrustes"])
@pytest.mark.parametrize("name", ROWS)
def test_fewer_heads_load_without_a_word(tmp_path, name, method):
    row = ROWS[name]
    parent = tiny_model(row, **row.multi_head)
    child, report = converted(row, parent, tmp_path, recipe_of(1, method, calibrated=method == "svd"))
    assert report["kv_heads"] == 1
    assert torch.isfinite(logits(child)).all()
    assert (logits(child) - logits(parent)).abs().max() > 0.01  # different heads do share
