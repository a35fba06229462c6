"""Layouts: every file of layouts/ reads a real model of transformers, and what does not fit is named."""

import dataclasses
import tomllib

import pytest
import torch
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.weights import layout as layouts
from gqa.weights.layout import load_layout
from gqa.weights.reader import Checkpoint


def open_tiny(tmp_path, config=None, tensors=None):
    config = config or tiny_config()
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", config, tensors=tensors or tiny_tensors(config)))
    return load_layout(config["model_type"]), checkpoint, parse_config(config, "tiny")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_names_and_shapes_are_those_of_transformers(tmp_path, model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(model_type=model_type, num_key_value_heads=2, head_dim=12)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path)
    layout, checkpoint = load_layout(model_type), Checkpoint(tmp_path)
    shape = parse_config(model.config.to_dict(), "tiny")
    layout.check(checkpoint, shape)
    weights = layout.read_attention(checkpoint, 1)
    attention = model.get_submodule(layout.layer_prefix(1) + layout.attention_path)
    state = attention.state_dict()
    given = {name: tensor for name, tensor in vars(weights).items() if tensor is not None}
    assert len(given) == len(state)
    for field, tensor in given.items():
        role, _, bias = field.partition("_")
        assert torch.equal(tensor, state[f"{role}_proj.{bias or 'weight'}"])
    tensors = layout.attention_tensors(1, weights)
    assert {name: tuple(t.shape) for name, t in tensors.items()}.items() <= layout.attention_shapes(shape, 1).items()
    # Every tensor of the model is known to the layout by its shape.
    known = {*layout._other_shapes(shape)} | {n for i in range(3) for n in layout.attention_shapes(shape, i)}
    assert set(model.state_dict()) <= known


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight"])
def test_a_tensor_of_the_wrong_shape(tmp_path, name):
    full = f"model.layers.1.{name}"
    tensors = tiny_tensors(tiny_config())
    rows, columns = tensors[full].shape
    tensors[full] = torch.zeros(rows, columns + 1)
    layout, checkpoint, shape = open_tiny(tmp_path, tensors=tensors)
    with pytest.raises(GqaError, match=f"{full} has the wrong shape") as caught:
        layout.check(checkpoint, shape)
    assert caught.value.got == f"[{rows}, {columns + 1}]"
    assert caught.value.allowed == f"[{rows}, {columns}], as config.json says"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.2.self_attn.v_proj.weight": None}, "has no tensor model.layers.2.self_attn.v_proj.weight"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, r"tensors of model\.layers\.3\."),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "is not part of a llama attention"),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(64, 64).int()}, "is not floating point"),
        ({"model.layers.0.self_attn.k_proj.bias": torch.ones(1)}, "k_proj.bias has the wrong shape"),
        ({"model.embed_tokens.weight": torch.ones(8, 64)}, "embed_tokens.weight has the wrong shape"),
    ],
)
def test_tensors_that_do_not_fit_the_architecture(tmp_path, change, said):
    tensors = {name: t for name, t in {**tiny_tensors(tiny_config()), **change}.items() if t is not None}
    layout, checkpoint, shape = open_tiny(tmp_path, tensors=tensors)
    with pytest.raises(GqaError, match=said):
        layout.check(checkpoint, shape)


def test_old_checkpoints_with_rotary_frequencies_pass(tmp_path):
    tensors = tiny_tensors(tiny_config()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    layout, checkpoint, shape = open_tiny(tmp_path, tensors=tensors)
    layout.check(checkpoint, shape)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path, value):
    tensors = tiny_tensors(tiny_config())
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = value
    layout, checkpoint, _ = open_tiny(tmp_path, tensors=tensors)
    with pytest.raises(GqaError, match=r"layers\.1\.self_attn\.o_proj\.weight holds NaN or infinite"):
        layout.read_attention(checkpoint, 1)
    layout.read_attention(checkpoint, 0)


def test_unknown_architectures_name_the_known_ones():
    with pytest.raises(GqaError, match="unknown architecture") as caught:
        load_layout("retnet")
    assert {"llama", "mistral", "qwen2", "gpt_oss"} <= set(str(caught.value.allowed).split(", "))


@pytest.mark.parametrize(
    "model_type", ["gpt2", "opt", "gptj", "gpt_neox", "bloom", "codegen", "gpt_neo", "mpt", "deepseek_v3"]
)
def test_architectures_without_kv_heads_are_refused_with_the_reason(model_type):
    with pytest.raises(GqaError, match=f"{model_type} cannot have fewer KV heads: its class"):
        load_layout(model_type)


_ALWAYS = {"model_types", "notes", "embedding", "attention", "shapes"}
_SOMETIMES = {"decoder", "notes_if", "stacked", "positions", "eager"}
_ROLES = {"layer", "query", "key", "value", "output", "rotary", "untouched"}
_MORE_ROLES = {"query_norm", "key_norm", "sinks", "norm", "fused"}


def test_layout_files_say_everything():
    for file in layouts._data().joinpath("layouts").iterdir():
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        assert set(table) - _SOMETIMES == _ALWAYS, file.name
        assert set(table["attention"]) - _MORE_ROLES - {"residual_scale"} == _ROLES, file.name
        normed_behind = file.name.startswith(("gemma2", "gemma3", "olmo2"))
        assert ("residual_scale" in table["attention"]) != normed_behind, file.name
        assert table["attention"]["rotary"] in ("half", "interleaved", "none")
        for model_type in table["model_types"]:
            assert dataclasses.is_dataclass(load_layout(model_type))


def test_notes_that_only_some_models_need():
    assert not load_layout("cohere").notes
    assert "layer norm" in load_layout("cohere", {"use_qk_norm": True}).notes[0]
    assert not load_layout("olmo", {"clip_qkv": None}).notes


def test_the_scale_of_the_residual_stream_may_be_a_key_of_the_config():
    assert load_layout("llama").residual_scale == 1
    assert load_layout("granite", {"residual_multiplier": 0.22}).residual_scale == 0.22
    assert load_layout("granite", {}).residual_scale == 1
    assert load_layout("olmo2").residual_scale is None


def test_experts_are_stacked_as_transformers_holds_them():
    def expert(index, part):
        return torch.full((2, 3), 10.0 * index + part)

    name = "block_sparse_moe.experts.{}.w{}.weight"
    tensors = {name.format(i, part): expert(i, part) for i in range(3) for part in (1, 2, 3)}
    got = load_layout("mixtral").as_module({**tensors, "block_sparse_moe.gate.weight": torch.ones(3, 4)})
    assert set(got) == {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert got["mlp.experts.gate_up_proj"].shape == (3, 4, 3)
    assert got["mlp.experts.gate_up_proj"][1, :, 0].tolist() == [11, 11, 13, 13]
    assert got["mlp.experts.down_proj"][2, 0, 0] == 22
