"""Every architecture: copies of heads convert back, and a child with fewer heads loads without a word."""

import contextlib
import io
import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers.architectures import ROWS, TOKENS, VOCAB, Row, logits, tiny_model
from helpers.models import as_scrambled_mha
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from gqa.cli.main import main
from gqa.config import parse_config
from gqa.convert import heads
from gqa.convert.engine import Engine
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.convert.scores import _Fit
from gqa.errors import GqaError
from gqa.source import open_checkpoint
from gqa.weights.layout import load_layout
from gqa.weights.reader import Checkpoint

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


@pytest.mark.parametrize("name", ROWS)
def test_fewer_heads_load_without_a_word_and_svd_loses_less(tmp_path, name):
    row = ROWS[name]
    parent = tiny_model(row, **row.multi_head)
    exact = logits(parent, WINDOWS)
    lost = {}
    for method in ("mean", "svd"):
        recipe = recipe_of(row.kv_heads, method, calibrated=method == "svd")
        child, report = converted(row, parent, tmp_path / method, recipe)
        assert report["kv_heads"] == row.kv_heads
        lost[method] = float((logits(child, WINDOWS) - exact).square().mean())
    assert 0 < lost["svd"] < 0.9 * lost["mean"]


@pytest.mark.parametrize("name", ROWS)
def test_repeated_heads_change_nothing(tmp_path, name):
    row = ROWS[name]
    grouped = tiny_model(row)
    child, _ = converted(row, grouped, tmp_path, recipe_of(4, "svd", calibrated=False))
    torch.testing.assert_close(logits(child), logits(grouped), rtol=0, atol=row.error * float(logits(grouped).std()))


@pytest.mark.parametrize("name", ROWS)
def test_what_the_attention_adds_to_the_residual_stream(name):
    """A block whose attention alone is not zero: what comes out is what went in plus scale * output, or a norm of it
    where the layout names no scale."""
    row = ROWS[name]
    model = tiny_model(row)
    layout = load_layout(row.model_type, model.config.to_dict())
    block = model.get_submodule(layout.in_decoder(layout.layer_prefix(1)).rstrip("."))
    attention = block.get_submodule(layout.attention_path)
    seen = {}
    attention.register_forward_hook(lambda module, args, output: seen.update(attention=output[0]))
    block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(before=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    block.register_forward_hook(
        lambda module, args, output: seen.update(after=output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for other, parameter in block.named_parameters():
            if not other.startswith(layout.attention_path) and "norm" not in other:
                parameter.zero_()
        model(torch.from_numpy(WINDOWS))
    added = seen["after"] - seen["before"]
    scale = layout.residual_scale
    wrong = float((added - (1 if scale is None else scale) * seen["attention"]).norm() / added.norm())
    assert wrong > 0.1 if scale is None else wrong < 1e-6


REFITTED = [name for name, row in ROWS.items() if name != "olmo2" and not row.settings.get("alibi")]


@pytest.mark.parametrize("name", REFITTED)
def test_scores_are_refitted_to_those_of_the_model(tmp_path, name):
    """What the refit takes for a layer's attention, carried on to the output, is what transformers calculates."""
    row = ROWS[name]
    model = tiny_model(row)
    model.save_pretrained(tmp_path)
    config = model.config.to_dict()
    layout, shape = load_layout(row.model_type, config), parse_config(config, name).layers[1]
    engine = Engine(Checkpoint(tmp_path), layout, config, recipe_of(1, "svd", calibrated=True), WINDOWS)
    weights = layout.read_attention(engine.checkpoint, 1)
    block = engine._block(1, config, weights)
    parts = heads.split(weights, shape, layout)
    x = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(engine.dtype)
    fit = _Fit(parts, parts, x, x, block.positions(x, shape))
    values = torch.einsum("hve,nte->nhtv", parts.v.to(x.dtype), fit.inputs[0])
    seen = fit.attention[0].unflatten(1, parts.q.shape[:2]) @ values[:, :, None]
    output = torch.einsum("nhgtv,hgdv->ntd", seen, parts.o.to(x.dtype))
    output = output if weights.o_bias is None else output + weights.o_bias
    torch.testing.assert_close(output, block.attend(x), rtol=0, atol=row.error * 10)


def test_alibi_keeps_query_heads_in_order(tmp_path):
    """Copies that lie apart do not find together: their slopes would change places."""
    row = ROWS["falcon, new decoder"]
    spread = as_scrambled_mha(tiny_model(row), turn=False)  # the search pairs other heads than neighbours
    _, free = converted(row, spread, tmp_path / "rotary", recipe_of(2, "svd", calibrated=False))
    assert [layer["groups"] for layer in free["layers"]] != [[[0, 1], [2, 3]]] * 2
    spread.config.alibi = True
    _, kept = converted(row, spread, tmp_path / "alibi", recipe_of(2, "svd", calibrated=False))
    assert [layer["groups"] for layer in kept["layers"]] == [[[0, 1], [2, 3]]] * 2


def test_what_is_approximate_is_said_before_the_start_and_in_the_card(tmp_path):
    row = ROWS["olmo2"]
    _, report = converted(row, tiny_model(row, **row.multi_head), tmp_path, recipe_of(2, "svd", calibrated=True))
    note = load_layout("olmo2").notes[0]
    assert note in report["approximations"]
    assert note in (tmp_path / "child" / "README.md").read_text()
    assert all("a norm" in layer["not_refitted"] for layer in report["layers"])
    arguments = ["convert", str(tmp_path / "parent"), str(tmp_path / "other"), "--kv-heads", "2", "--dry-run"]
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert note in said.getvalue()


@pytest.mark.parametrize("name", ["phi3", "qwen3", "gpt_oss", "olmo2", "gpt_bigcode"])
def test_refinement_trains_every_kind_of_attention(tmp_path, name):
    row = ROWS[name]
    recipe = make_recipe(
        1, "svd", calibration_tokens=WINDOWS.size, refine_tokens=WINDOWS.size, refine_steps=30, window=TOKENS
    )
    _, report = converted(row, tiny_model(row, **row.multi_head), tmp_path, recipe)
    assert all(layer["output_error"] < 0.9 * layer["closed_form_error"] for layer in report["layers"])


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [("stablelm", r"[kq]_layernorm\.norms\.0\.weight"), ("phi", r"[kq]_layernorm\.(weight|bias)")],
)
def test_options_that_are_not_understood_are_named(tmp_path, model_type, tensor):
    model = tiny_model(Row(model_type, {"qk_layernorm": True}))
    with pytest.raises(GqaError, match=rf"self_attn\.{tensor} is not part of a {model_type} attention"):
        converted(ROWS[model_type], model, tmp_path, recipe_of(1, "svd", calibrated=False))


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_the_text_decoder_of_a_multimodal_model(tmp_path, method):
    row = ROWS["gemma3"]
    text = tiny_model(row, **row.multi_head)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=90,
    )
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(config)
    model.to(row.dtype)
    inner = {name.removeprefix("model."): tensor for name, tensor in text.model.state_dict().items()}
    model.model.language_model.load_state_dict(inner)
    child, report = converted(row, model, tmp_path, recipe_of(2, method, calibrated=method == "svd"))
    assert child.config.text_config.num_key_value_heads == 2
    alone, alone_report = converted(row, text, tmp_path / "alone", recipe_of(2, method, calibrated=method == "svd"))
    torch.testing.assert_close(logits(child), logits(alone), rtol=0, atol=row.error)
    errors = [[layer.get("output_error", 0) for layer in one["layers"]] for one in (report, alone_report)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
