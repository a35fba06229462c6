"""What MODEL may be, and what each wrong one says. No test touches the network."""

import json
import os
import subprocess
import sys

import pytest

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.source import bundled_names, open_checkpoint, open_source

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_folder(folder):
    source = open_source(str(folder))
    assert (source.name, source.config, source.folder) == ("my-model", CONFIG, folder)
    assert open_checkpoint(str(folder)) == source


def test_a_folder_from_inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_source(".").name == "my-model"
    monkeypatch.chdir(folder.parent)
    assert open_source("my-model").config == CONFIG


def test_a_file(folder):
    source = open_source(str(folder / "config.json"))
    assert (source.name, source.config, source.folder) == ("my-model", CONFIG, folder)
    (folder / "variant.json").write_text(json.dumps(CONFIG))
    assert open_source(str(folder / "variant.json")).name == "variant"


@pytest.mark.parametrize(
    "text", ["llama-3-70b", "Llama-3-70B", "LLAMA 3 70b", "llama3-70b", "llama_3_70b", "Llama-3-70B "]
)
def test_bundled_names_forgive(text):
    source = open_source(text)
    assert (source.name, source.folder) == ("Llama-3-70B", None)
    assert source.config["num_key_value_heads"] == 8


def test_every_bundled_shape_parses():
    assert len(bundled_names()) == len({name.lower() for name in bundled_names()}) == 51
    for name in bundled_names():
        source = open_source(name)
        assert parse_config(source.config, source.name).details is not None


def test_a_folder_comes_before_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-2").mkdir()
    (tmp_path / "gpt-2" / "config.json").write_text(json.dumps(CONFIG))
    assert open_source("gpt-2").config == CONFIG


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", ""),
        ("config.json", "[" * 100_000),
        ("config.json", "\x00\xff"),
        ("config.json", '{"a": ' + "9" * 5000 + "}"),
        ("config.json", "[1, 2]"),
        ("config.json", '"text"'),
        ("other.txt", "{}"),
    ],
    ids=["half", "empty", "deep", "binary", "huge number", "list", "text", "no config"],
)
@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_folders_that_cannot_be_read(tmp_path, name, text, opener):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(GqaError):
        opener(str(tmp_path))


def test_files_that_are_no_config(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(GqaError, match=r"not a config\.json"):
        open_source(str(folder / "model.safetensors"))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    source = open_source(str(folder / "tokenizer.json"))
    with pytest.raises(GqaError, match="has no hidden_size"):
        parse_config(source.config, source.name)


@pytest.mark.parametrize(
    "model", ["", " ", "no such model", "./nowhere", "/nowhere", "x.json", "a/b/c", "x" * 9999, "a\0b"]
)
def test_nothing_of_that_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for opener in (open_source, open_checkpoint):
        with pytest.raises(GqaError, match=r"an unknown model|no such model folder"):
            opener(model)


def test_close_names_are_offered():
    with pytest.raises(GqaError) as caught:
        open_source("lama-3-70")
    assert caught.value.hint is not None
    assert "Llama-3-70B" in caught.value.hint


def test_a_bundled_shape_has_no_weights():
    with pytest.raises(GqaError, match="without weights"):
        open_checkpoint("llama-3-8b")


# The hub: in a process of its own, as huggingface_hub reads its settings when it is imported.


def open_offline(model, home, opener="open_source"):
    code = (
        "import sys\n"
        f"from gqa.source import {opener}\n"
        "from gqa.errors import GqaError\n"
        "try:\n"
        f"    source = {opener}({model!r})\n"
        "    print(source.name, source.config['num_attention_heads'], source.folder)\n"
        "except GqaError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return done.stdout


def fill_cache(home, repository, commit="0123456789abcdef0123456789abcdef01234567"):
    """What a download leaves behind: a snapshot, and the commit that `main` means."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("opener", ["open_source", "open_checkpoint"])
def test_a_hub_model_in_the_cache_needs_no_network(tmp_path, opener):
    snapshot = fill_cache(tmp_path, "someone/small")
    assert open_offline("someone/small", tmp_path, opener) == f"someone/small 8 {snapshot}\n"


def test_a_revision_of_a_hub_model(tmp_path):
    commit = "89abcdef0123456789abcdef0123456789abcdef"
    snapshot = fill_cache(tmp_path, "someone/small", commit)
    assert open_offline(f"someone/small@{commit}", tmp_path) == f"someone/small@{commit} 8 {snapshot}\n"
    assert "cannot be reached" in open_offline("someone/small@v2", tmp_path)


def test_a_hub_model_without_network(tmp_path):
    said = open_offline("meta-llama/Llama-3.1-8B", tmp_path)
    assert said.startswith("no such folder here, and the model hub cannot be reached\ngot: meta-llama/Llama-3.1-8B: ")
    assert "gqa plan Llama-3.1-8B" in said


def test_downloads_take_no_pickles_and_no_code(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(repository, *, revision, allow_patterns):
        asked[repository] = (revision, allow_patterns)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_source("someone/small@v1").name == "someone/small@v1"
    assert asked.pop("someone/small") == ("v1", ["config.json"])
    assert open_checkpoint("someone/small").folder == tmp_path
    revision, patterns = asked["someone/small"]
    assert revision is None
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt"]
    refused = ["pytorch_model.bin", "consolidated.00.pth", "model.pkl", "modeling_small.py", "README.md", "x.gguf"]
    assert list(filter_repo_objects(wanted + refused, allow_patterns=patterns)) == wanted


def test_a_hub_that_refuses(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def snapshot_download(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(GqaError, match="does not give this model"):
        open_source("someone/gated")
