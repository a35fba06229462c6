"""What a converted folder is for: transformers loads it without a word, and every attention gives the same text."""

import json
import logging
import warnings
from typing import Any

import pytest
import torch
from helpers.small import small_parent
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import gqa
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.source import open_checkpoint
from gqa.text import load_tokenizer, read_text, token_windows


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return small_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def said():
    """Everything that transformers' logger says."""
    records: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record):
            records.append(record)

    listener, logger = Listener(logging.WARNING), transformers_logging.get_logger("transformers")
    logger.addHandler(listener)
    yield records
    logger.removeHandler(listener)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("method", ["mean", "svd", "svd+refine"])
def test_a_converted_folder_serves_the_same_text_everywhere(parent, tmp_path, said, method, kv_heads):
    folder, corpus = parent
    windows = token_windows(read_text(corpus.calibration), load_tokenizer(folder), 32, 16)
    name, _, refined = method.partition("+")
    tokens = 0 if name == "mean" else windows.size
    recipe = make_recipe(
        kv_heads, name, calibration_tokens=tokens, refine_tokens=tokens if refined else 0, refine_steps=10, window=32
    )
    convert(open_checkpoint(str(folder)), tmp_path / "child", recipe, windows)

    gqa.hf.register()
    texts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "child")
        prompt = tokenizer("def f7(x):\n    return", return_tensors="pt", return_token_type_ids=False)
        for attention in ("eager", "sdpa", "gqa"):
            model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "child", attn_implementation=attention)
            assert model.config.num_key_value_heads == kv_heads
            assert model.model.layers[0].self_attn.k_proj.weight.shape == (kv_heads * 8, 32)
            with torch.no_grad():
                texts[attention] = model.generate(**prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert texts["eager"].shape[1] == prompt["input_ids"].shape[1] + 24
    assert torch.equal(texts["eager"], texts["sdpa"])
    assert torch.equal(texts["eager"], texts["gqa"])
    assert [record.getMessage() for record in said] == []

    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["head_dim"] == 8
    assert method.partition("+")[0] in (tmp_path / "child" / "README.md").read_text()
