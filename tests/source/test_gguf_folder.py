"""A GGUF file becomes the checkpoint it was written from, once, and nothing half of it is ever seen."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import pytest
import torch
from helpers.checkpoints import folder_hashes
from helpers.gguf_files import TOKENS, pairs_together, tiny_model, write_gguf
from safetensors.torch import load_file

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.evaluate.load import load_model
from gqa.source import gguf_folder, open_checkpoint, open_source
from gqa.text import load_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": ("llama", {}),
    "llama with one embedding": ("llama", {"tie_word_embeddings": True}),
    "llama of many heads": ("llama", {"num_key_value_heads": 8}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_comes_back(tmp_path, name):
    """As the same model does that was saved as safetensors in bf16: every tensor and every logit is equal."""
    model_type, changes = MODELS[name]
    model = tiny_model(model_type, **changes)
    source = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert source.name == "tiny"
    assert source.folder is not None
    model.bfloat16().save_pretrained(tmp_path / "saved")
    wanted, found = load_model(tmp_path / "saved", device="cpu"), load_model(source.folder, device="cpu")
    assert wanted.state_dict().keys() == found.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in wanted.state_dict().items())
    ids = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        assert torch.equal(wanted(ids).logits, found(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_tensors_are_what_the_gguf_package_makes_of_them(tmp_path, kind):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind)
    folder = open_checkpoint(str(path)).folder
    assert folder is not None
    found = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    own = {names.get_name(name, try_suffixes=(".weight",)): name for name in found}
    tensors = gguf.GGUFReader(path).tensors
    assert {tensor.name for tensor in tensors} == set(own)
    assert {tensor.tensor_type.name for tensor in tensors} == {"F32", kind}
    for tensor in tensors:
        values = found[own[tensor.name]]
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            rows = pairs_together(values.float().numpy(), 8 if "attn_q." in tensor.name else 2)
            values = torch.from_numpy(rows).bfloat16()
        assert torch.equal(values, torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16())


def test_tokenizer_chat_template_and_config(tmp_path):
    source = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", tiny_model())))
    assert source.folder is not None
    tokenizer = load_tokenizer(source.folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the<|end|>")["input_ids"]) == ["t", "he", "<|end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|start|>", "<|end|>", len(TOKENS))
    asked = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "<|start|>hi<|end|>"
    legacy = {"rope_theta": 50000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "head_dim": 8}
    assert legacy.items() <= source.config.items()
    assert source.config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in source.config


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_reads_the_header_only(tmp_path, cache, name):
    """The shape that the header gives is the one that the dequantised folder has."""
    model_type, changes = MODELS[name]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(model_type, **changes))
    planned = open_source(str(path))
    assert planned.folder is None
    assert not cache.exists()
    made = open_checkpoint(str(path))
    assert parse_config(planned.config, "tiny") == parse_config(made.config, "tiny")
    assert open_source(str(path)) == made


def test_a_plan_loads_neither_torch_nor_gguf(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    script = (
        "import sys\n"
        "from gqa.source import open_source\n"
        f"print(open_source({str(path)!r}).config['num_key_value_heads'])\n"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("2\n", "")


def test_files_of_the_same_content_share_a_folder(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    folder = open_checkpoint(str(path)).folder
    copy = tmp_path / "COPY.GGUF"
    copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(gguf_folder, "_convert", None)
    assert open_checkpoint(str(copy)) == open_source(str(copy))
    assert (open_source(str(copy)).name, open_source(str(copy)).folder) == ("COPY", folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert open_source(str(copy)).folder is None


def test_files_beside_it_are_not_read(tmp_path):
    """transformers would take an adapter or a config that lies in the same folder."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    for name in ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
    assert open_checkpoint(str(path)).config["hidden_size"] == 64


def fake_conversion(made, until=None):
    def convert(header, config, working, progress):
        (working / "model").mkdir(parents=True)
        (working / "model" / "half").write_text("")
        made.append(working)
        if until is not None:
            until()
        (working / "model" / "half").rename(working / "model" / "whole")

    return convert


def test_two_at_once_make_one(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    made, second_began = [], threading.Event()
    monkeypatch.setattr(gguf_folder, "_convert", fake_conversion(made, lambda: second_began.wait(10)))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(gguf_folder.dequantised_folder(path))) for _ in "ab"]
    for thread in threads:
        thread.start()
    second_began.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert folders == [folders[0]] * 2
    assert [file.name for file in folders[0].iterdir()] == ["whole"]


def test_what_was_stopped_leaves_nothing_and_what_was_killed_is_cleared_away(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())

    def interrupt():
        raise KeyboardInterrupt

    made = []
    monkeypatch.setattr(gguf_folder, "_convert", fake_conversion(made, interrupt))
    with pytest.raises(KeyboardInterrupt):
        gguf_folder.dequantised_folder(path)
    assert [file.name for file in cache.iterdir()] == ["gguf.lock"]
    (made[0] / "model").mkdir(parents=True)  # as after a kill
    (made[0] / "model" / "other").write_text("")
    monkeypatch.setattr(gguf_folder, "_convert", fake_conversion(made))
    folder = gguf_folder.dequantised_folder(path)
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert sorted(file.name for file in cache.iterdir()) == [folder.name, "gguf.lock"]


def test_a_file_that_changes_meanwhile(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    monkeypatch.setattr(gguf_folder, "_convert", fake_conversion([], lambda: path.write_bytes(b"GGUF")))
    with pytest.raises(GqaError, match="changed while it was read"):
        gguf_folder.dequantised_folder(path)
    assert [file.name for file in cache.iterdir()] == ["gguf.lock"]


def test_without_the_gguf_package(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GqaError, match=r"pip install 'gqa\[gguf\]'"):
        open_checkpoint(str(path))
    assert not cache.exists()
    assert open_source(str(path)).config["hidden_size"] == 64


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(GqaError, match="set GQA_CACHE"):
        open_checkpoint(str(path))


def test_nothing_is_printed_but_our_own_progress(tmp_path, capfd):
    seen = []
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    open_checkpoint(str(path), lambda stage, done, total, note="": seen.append((stage, done, total)))
    assert seen == [("dequantising tiny.gguf", done, 3) for done in range(4)]
    assert capfd.readouterr() == ("", "")


def test_a_converted_model_is_an_ordinary_one(tmp_path):
    from gqa.convert.recipe import make_recipe
    from gqa.convert.run import convert

    source = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", tiny_model(), "Q4_1")))
    convert(source, tmp_path / "out", make_recipe(1, "mean"), None)
    assert {"tokenizer.json", "chat_template.jinja", "model.safetensors"} <= folder_hashes(tmp_path / "out").keys()
    with contextlib.chdir(tmp_path), torch.no_grad():
        assert load_model(Path("out"), device="cpu")(torch.arange(9)[None]).logits.isfinite().all()
