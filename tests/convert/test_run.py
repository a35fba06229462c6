"""The executor: what a conversion writes, and that it can be repeated, resumed and recognised."""

import json
import logging
import warnings
from typing import Any

import pytest
import torch
from helpers.checkpoints import folder_hashes, random_windows, tiny_config, tiny_source, tiny_tensors, write_checkpoint
from safetensors.torch import load_file

from gqa.convert import memory, run
from gqa.convert.job import plan_conversion
from gqa.convert.journal import locked, work_folder
from gqa.convert.recipe import make_recipe
from gqa.errors import GqaError
from gqa.source import open_checkpoint
from gqa.units import format_bytes
from gqa.weights.header import DTYPE_BYTES
from gqa.weights.layout import Layout
from gqa.weights.reader import Checkpoint

MEAN = make_recipe(2, "mean")
CALIBRATED = make_recipe(2, calibration_tokens=256, window=32)


def convert(source, out, recipe=MEAN, **kwargs):
    return run.convert(source, out, recipe, random_windows(recipe), **kwargs)


def all_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pooled(weight, groups=2, heads=8):
    return weight.double().view(groups, heads // groups, -1, *weight.shape[1:]).mean(1).flatten(0, 1).to(weight.dtype)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mean_pools_k_and_v_and_copies_the_rest(tmp_path, shards, dtype):
    source = tiny_source(tmp_path / "parent", dtype=dtype, shards=shards)
    before = folder_hashes(tmp_path / "parent")
    report = convert(source, tmp_path / "out")
    parent, child = all_tensors(tmp_path / "parent"), all_tensors(tmp_path / "out")
    assert parent.keys() == child.keys()
    for name, tensor in parent.items():
        pools = "k_proj" in name or "v_proj" in name
        torch.testing.assert_close(child[name], pooled(tensor) if pools else tensor, rtol=0, atol=0)
        assert child[name].dtype == dtype
    assert folder_hashes(tmp_path / "parent") == before
    assert {p.name for p in (tmp_path / "parent").iterdir()} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not work_folder(tmp_path / "out").exists()

    assert report["tensors_changed"] == 6
    assert [layer["tensors_changed"] for layer in report["layers"]] == [2, 2, 2]
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    width = dtype.itemsize
    assert report["kv_bytes_per_token_parent"] == 3 * 2 * 8 * 8 * width
    assert report["kv_bytes_per_token"] == 3 * 2 * 2 * 8 * width


def test_sharded_index_names_every_tensor_and_its_bytes(tmp_path):
    convert(tiny_source(tmp_path / "parent", shards=3), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = all_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_tokenizer_class_of_transformers_5_gets_its_older_name(tmp_path):
    source = tiny_source(tmp_path / "parent")
    path = tmp_path / "parent" / "tokenizer_config.json"
    for name, wanted in (("TokenizersBackend", "PreTrainedTokenizerFast"), ("LlamaTokenizer", "LlamaTokenizer")):
        path.write_text(json.dumps({"tokenizer_class": name, "model_max_length": 7}))
        convert(source, tmp_path / name)
        copied = (tmp_path / name / "tokenizer_config.json").read_text()
        assert json.loads(copied) == {"tokenizer_class": wanted, "model_max_length": 7}
        assert (copied == path.read_text()) == (name == wanted)
    path.write_text("{not json")  # for others to complain of
    convert(source, tmp_path / "strange")
    assert (tmp_path / "strange" / "tokenizer_config.json").read_text() == "{not json"


def test_config_has_the_new_head_count_and_the_legacy_spellings(tmp_path):
    convert(tiny_source(tmp_path / "parent"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"num_key_value_heads": 2, "num_attention_heads": 8, "head_dim": 8}
    assert config.items() >= {**expected, "rope_theta": 500000.0, "torch_dtype": "float32"}.items()


def test_identity_copies_every_byte(tmp_path):
    source = tiny_source(tmp_path / "parent", shards=2, dtype=torch.bfloat16)
    report = convert(source, tmp_path / "out", make_recipe(8, calibration_tokens=64, window=32))
    before, after = folder_hashes(tmp_path / "parent"), folder_hashes(tmp_path / "out")
    shards = [name for name in before if name.endswith(".safetensors")]
    assert len(shards) == 2
    assert [before[name] for name in shards] == [after[name] for name in shards]
    assert report["layers"] == []
    assert report["tensors_changed"] == 0


def test_a_grouped_parent_is_grouped_further(tmp_path):
    convert(tiny_source(tmp_path / "parent", tiny_config(num_key_value_heads=4)), tmp_path / "out")
    parent, child = all_tensors(tmp_path / "parent"), all_tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(child[name], pooled(parent[name], heads=4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("biased", [False, True], ids=["llama", "qwen2"])
@pytest.mark.parametrize(("have", "want"), [(2, 4), (2, 8), (1, 8)])
def test_repeated_heads_are_the_parents_and_compute_the_same(tmp_path, have, want, biased):
    from transformers import AutoModelForCausalLM

    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]} if biased else {}
    source = tiny_source(tmp_path / "parent", tiny_config(num_key_value_heads=have, **names), shards=2)
    report = convert(source, tmp_path / "out", make_recipe(want, calibration_tokens=256, window=32))
    assert report["approximations"] == [
        "Nothing: every KV head is repeated, and the model computes what its parent computes."
    ]
    assert report["layers"][0]["groups"] == [[head * have // want] for head in range(want)]
    child = all_tensors(tmp_path / "out")
    for name, tensor in all_tensors(tmp_path / "parent").items():
        if "k_proj" in name or "v_proj" in name:
            by_head = tensor.view(have, 8, -1)
            tensor = torch.stack([by_head[head * have // want] for head in range(want)]).view(
                want * 8, *tensor.shape[1:]
            )
        assert torch.equal(child[name], tensor), name
    tokens = torch.arange(20).view(2, 10)
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager") for name in ("parent", "out")
    ]
    before, after = (model(tokens).logits.detach() for model in models)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert f"repeated {want // have} times" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["svd", "mean"])
@pytest.mark.parametrize("want", [4, 2, 1])
def test_a_grouped_parent_loads_with_fewer_heads(tmp_path, method, want):
    from transformers import AutoModelForCausalLM

    config = tiny_config(num_attention_heads=16, num_key_value_heads=8, head_dim=4)
    source = tiny_source(tmp_path / "parent", config)
    convert(source, tmp_path / "out", make_recipe(want, method))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[2].self_attn.k_proj.weight.shape == (want * 4, 64)
    assert torch.isfinite(model(torch.arange(20).view(2, 10)).logits).all()


def test_mixed_dtypes_are_kept(tmp_path):
    tensors = tiny_tensors(tiny_config(), torch.bfloat16)
    for name in tensors:
        if "norm" in name or "v_proj" in name:
            tensors[name] = tensors[name].float()
    source = tiny_source(tmp_path / "parent", tensors=tensors)
    convert(source, tmp_path / "out", make_recipe(4))
    child = Checkpoint(tmp_path / "out")
    assert {name: child.dtype(name) for name in child.names} == {name: t.dtype for name, t in tensors.items()}
    # Each tensor lies aligned to its elements, although a narrow type's bytes may come in odd numbers.
    assert all(e.start % DTYPE_BYTES[e.dtype] == 0 for shard in child.shards for e in shard.tensors.values())


def test_only_what_describes_the_model_travels(tmp_path):
    folder = write_checkpoint(tmp_path / "parent")
    stay = (
        "pytorch_model.bin",
        "optimizer.pt",
        "x.pth",
        "m.ckpt",
        "tf_model.h5",
        "f.msgpack",
        "m.onnx",
        "modeling.py",
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        ".gitattributes",
    )
    travel = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "LICENSE")
    for name in (*stay, *travel, "README.md"):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    convert(open_checkpoint(str(folder)), tmp_path / "out")
    out = tmp_path / "out"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    ours = {"config.json", "model.safetensors", "README.md", "gqa-conversion.json", "generation_config.json"}
    assert names == {*travel, *ours, "README.parent.md", "additional_chat_templates/tools.jinja"}
    assert (out / "README.parent.md").read_text() == "README.md"
    assert all((out / name).read_text() == name for name in travel)


def test_the_card_says_how_to_repeat_it(tmp_path):
    convert(tiny_source(tmp_path / "parent"), tmp_path / "out", CALIBRATED, texts=["corpus with space.txt"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "gqa convert parent out --kv-heads 2 --calibrate 'corpus with space.txt' --calibration-tokens 256 --window 32"
        in card
    )
    assert "2 KV heads instead of 8" in card
    assert card.startswith("---\n")


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    source = tiny_source(tmp_path / "parent", shards=2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    convert(source, tmp_path / "a" / "out", CALIBRATED)
    convert(source, tmp_path / "b" / "out", CALIBRATED)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")


# ---- an OUT that exists, and work that was begun


def test_done_already(tmp_path):
    source = tiny_source(tmp_path / "parent")
    first = convert(source, tmp_path / "out")
    before = folder_hashes(tmp_path / "out")
    second = convert(source, tmp_path / "out")
    assert not first["already_done"]
    assert second["already_done"]
    assert {**first, "already_done": True, "seconds": None} == second
    assert folder_hashes(tmp_path / "out") == before


def test_work_left_after_the_last_rename_is_tidied_up(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "parent")
    with monkeypatch.context() as patch:
        patch.setattr("gqa.convert.journal.Journal.discard", _die)
        with pytest.raises(_KilledError):
            convert(source, tmp_path / "out")
    assert work_folder(tmp_path / "out").exists()
    assert convert(source, tmp_path / "out")["already_done"]
    assert not work_folder(tmp_path / "out").exists()


def test_out_moved_away_after_such_a_kill_is_made_again(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "parent")
    with monkeypatch.context() as patch:
        patch.setattr("gqa.convert.journal.Journal.discard", _die)
        with pytest.raises(_KilledError):
            convert(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert not convert(source, tmp_path / "out")["already_done"]
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", ["nothing", "a file", "a conversion by another recipe", "of another source"])
def test_out_that_is_something_else_is_left_alone(tmp_path, content):
    source = tiny_source(tmp_path / "parent")
    out = tmp_path / "out"
    if content == "a file":
        out.write_text("mine")
    elif content == "nothing":
        out.mkdir()
    elif content == "of another source":
        convert(tiny_source(tmp_path / "other", seed=1), out)
    else:
        convert(source, out, make_recipe(4, "mean"))
    before = folder_hashes(tmp_path)
    with pytest.raises(GqaError, match="OUT exists and is not this conversion's"):
        convert(source, out)
    assert folder_hashes(tmp_path) == before


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16],
    ids=["fp32", "bf16"],
)
def test_finished_layers_are_not_converted_again(tmp_path, monkeypatch, dtype):
    source = tiny_source(tmp_path / "parent", dtype=dtype)
    undisturbed = tmp_path / "undisturbed" / "out"
    convert(source, undisturbed, CALIBRATED)
    calls = _interrupt(monkeypatch, source, tmp_path / "out", CALIBRATED, layer=2)
    assert calls == [("convert", 0), ("convert", 1), ("convert", 2)]
    assert {p.name for p in work_folder(tmp_path / "out").glob("layer-*")} == {
        "layer-0000.safetensors",
        "layer-0001.safetensors",
    }
    calls.clear()
    convert(source, tmp_path / "out", CALIBRATED)
    assert calls == [("replay", 0), ("replay", 1), ("convert", 2)]
    assert folder_hashes(tmp_path / "out") == folder_hashes(undisturbed)


@pytest.mark.parametrize("intact", [True, False])
def test_activations_in_files_need_no_replay(tmp_path, monkeypatch, intact):
    source = tiny_source(tmp_path / "parent")
    convert(source, tmp_path / "undisturbed" / "out", CALIBRATED)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    calls = _interrupt(monkeypatch, source, tmp_path / "out", CALIBRATED, layer=2)
    states = work_folder(tmp_path / "out") / "states"
    assert {"before-0002-parent", "before-0002-child"} <= {path.name for path in states.iterdir()}
    if not intact:
        (states / "before-0002-child").unlink()
    calls.clear()
    convert(source, tmp_path / "out", CALIBRATED)
    assert calls == [("convert", 2)] if intact else [("replay", 0), ("replay", 1), ("convert", 2)]
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "undisturbed" / "out")
    assert not work_folder(tmp_path / "out").exists()


def test_data_free_layers_are_not_even_read_again(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "parent")
    calls = _interrupt(monkeypatch, source, tmp_path / "out", make_recipe(2), layer=1)
    calls.clear()
    convert(source, tmp_path / "out", make_recipe(2))
    assert calls == [("convert", 1), ("convert", 2)]


def test_a_refined_conversion_in_files_is_the_one_in_memory(tmp_path):
    source = tiny_source(tmp_path / "parent")
    recipe = make_recipe(2, calibration_tokens=512, refine_tokens=320, refine_steps=3, window=32)
    job = plan_conversion(source, recipe)
    least, most = (memory.peak_memory_bytes(job, streamed=streamed) for streamed in (True, False))
    assert least < most
    with pytest.raises(GqaError, match="does not fit the memory") as caught:
        convert(source, tmp_path / "out", recipe, memory_bytes=least - 1)
    assert caught.value.allowed == f"about {format_bytes(least)} or more"
    assert not work_folder(tmp_path / "out").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    convert(source, tmp_path / "a" / "out", recipe, memory_bytes=least)
    convert(source, tmp_path / "b" / "out", recipe, memory_bytes=most)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")


def test_another_recipe_does_not_go_on_with_begun_work(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "parent")
    _interrupt(monkeypatch, source, tmp_path / "out", CALIBRATED, layer=1)
    before = folder_hashes(tmp_path)
    with pytest.raises(GqaError, match="unfinished conversion") as caught:
        convert(source, tmp_path / "out", make_recipe(4, calibration_tokens=256, window=32))
    assert caught.value.got == "kv heads 2 there, 4 here"
    assert f"rm -r {tmp_path / 'out.partial'}" in str(caught.value.hint)
    assert folder_hashes(tmp_path) == before


def test_another_text_or_source_does_not_go_on_with_begun_work(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "parent")
    _interrupt(monkeypatch, source, tmp_path / "out", CALIBRATED, layer=1)
    with pytest.raises(GqaError, match="another calibration sha256"):
        run.convert(source, tmp_path / "out", CALIBRATED, random_windows(CALIBRATED, seed=1))
    (tmp_path / "parent" / "model.safetensors").touch()
    with pytest.raises(GqaError, match=r"another modified model\.safetensors"):
        convert(source, tmp_path / "out", CALIBRATED)


def test_a_folder_of_the_work_folders_name_is_left_alone(tmp_path):
    source = tiny_source(tmp_path / "parent")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    before = folder_hashes(tmp_path)
    with pytest.raises(GqaError, match="taken by something else"):
        convert(source, tmp_path / "out")
    assert folder_hashes(tmp_path) == before


def test_one_process_at_a_time(tmp_path):
    source = tiny_source(tmp_path / "parent")
    with locked(tmp_path / "out"), pytest.raises(GqaError, match="another process is writing"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")  # a lock file without a living owner keeps nobody out


@pytest.mark.parametrize("recipe", [MEAN, make_recipe(2)], ids=["mean", "svd"])
def test_a_source_that_changes_under_way_is_noticed(tmp_path, monkeypatch, recipe):
    source = tiny_source(tmp_path / "parent")
    real = Layout.read_attention

    def touching(layout, checkpoint, layer):
        if layer == 1:
            (tmp_path / "parent" / "model.safetensors").touch()
        return real(layout, checkpoint, layer)

    monkeypatch.setattr(Layout, "read_attention", touching)
    with pytest.raises(GqaError, match="the source changed while it was"):
        convert(source, tmp_path / "out", recipe)
    assert {path.name for path in tmp_path.iterdir()} == {"parent"}


def test_values_that_a_narrow_dtype_cannot_hold_are_an_error(tmp_path):
    tensors = tiny_tensors(tiny_config(), torch.float16)
    for name in tensors:
        if "v_proj" in name:
            tensors[name] = tensors[name].sign() * 60000
    source = tiny_source(tmp_path / "parent", tensors=tensors)
    with pytest.raises(GqaError, match="does not fit float16"):
        convert(source, tmp_path / "out", make_recipe(2))
    assert {path.name for path in tmp_path.iterdir()} == {"parent"}


# ---- transformers


@pytest.mark.parametrize(
    ("model_type", "bias", "dtype", "tied", "shards"),
    [
        ("llama", False, "float32", False, 1),
        ("llama", True, "bfloat16", True, 3),
        ("mistral", False, "bfloat16", False, 2),
        ("qwen2", True, "float32", True, 1),
    ],
)
def test_transformers_loads_it_without_a_word(tmp_path, caplog, model_type, bias, dtype, tied, shards):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    config = tiny_config(
        model_type=model_type,
        architectures=[names[model_type]],
        attention_bias=bias and model_type == "llama",
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    source = tiny_source(tmp_path / "parent", config, dtype=getattr(torch, dtype), shards=shards)
    convert(source, tmp_path / "out", make_recipe(2))
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
            model, info = loaded
            ids = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=3, do_sample=False)
    finally:
        transformers_logging.disable_propagation()
    assert not any(info.values()), info
    assert caplog.records == []
    assert [str(w.message) for w in caught] == []
    assert ids.shape == (1, 6)
    assert model.dtype == getattr(torch, dtype)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 64)


# ---- helpers


class _KilledError(Exception):
    """Stands for SIGKILL: nothing catches it."""


def _die(*args):
    raise _KilledError


def _interrupt(monkeypatch, source, out, recipe, layer):
    """Run a conversion that dies when it begins `layer`; from then on every call of the engine is noted."""
    calls = []
    armed = [True]
    real = run.Engine

    class Noting:
        def __init__(self, *args):
            self.engine = real(*args)
            self.at = self.engine.at

        def convert(self, index):
            calls.append(("convert", index))
            if armed and index == layer:
                armed.clear()
                raise _KilledError
            return self.engine.convert(index)

        def replay(self, index, weights):
            calls.append(("replay", index))
            self.engine.replay(index, weights)

    monkeypatch.setattr(run, "Engine", Noting)
    with pytest.raises(_KilledError):
        convert(source, out, recipe)
    return calls
