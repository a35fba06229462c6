"""`verify` finds whatever is not as it was written, and names it."""

import json
import random
import shutil

import pytest
import torch
from helpers.checkpoints import folder_hashes, tiny_source, write_checkpoint
from safetensors.torch import load_file, save_file

from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.convert.verify import verify
from gqa.errors import GqaError
from gqa.source import open_checkpoint

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
KEY = "model.layers.1.self_attn.k_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A parent, its conversion, and copies of it to spoil."""
    place = tmp_path_factory.mktemp("made")
    source = tiny_source(place / "parent", shards=2, dtype=torch.bfloat16)
    convert(source, place / "out", make_recipe(2, "mean"))
    return place


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


def differences(out, source=None):
    report = verify(out, source)
    assert report["sound"] == (not report["differences"])
    return {row["where"]: row["what"] for row in report["differences"]}


def test_a_sound_folder(made):
    seen = []

    def progress(stage, done, total, note=""):
        seen.append((done, total))

    before = folder_hashes(made)
    report = verify(made / "out", open_checkpoint(str(made / "parent")), progress)
    assert report["sound"]
    assert (report["tensors"], report["tensors_compared_with_parent"]) == (30, 30 - 6)
    assert report["files"] == len([path for path in (made / "out").rglob("*") if path.is_file()])
    assert seen == [(done, 30) for done in range(1, 31)]
    assert folder_hashes(made) == before


@pytest.mark.parametrize("recipe", [make_recipe(2), make_recipe(8)], ids=["svd", "copied"])
def test_other_recipes(made, tmp_path, recipe):
    source = open_checkpoint(str(made / "parent"))
    convert(source, tmp_path / "out", recipe)
    assert differences(tmp_path / "out", source) == {}


def noticed(out):
    try:
        return bool(differences(out))
    except GqaError:  # the record itself cannot be read any more
        return True


def test_a_byte_flipped_anywhere(made, out):
    """Every file; in the large ones the first, the last and some bytes between, headers included."""
    chance = random.Random(0)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        places = {0, 8, 100, len(content) - 1, *(chance.randrange(len(content)) for _ in range(12))}
        for place in sorted(place for place in places if place < len(content)):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << chance.randrange(8)
            path.write_bytes(spoilt)
            assert noticed(out), f"byte {place} of {path.name}"
        path.write_bytes(content)
    assert differences(out) == {}


def test_a_record_that_says_the_same_in_other_bytes(out):
    path = out / "gqa-conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert differences(out) == {path.name: "not as it was written"}


def test_the_tensor_is_named(out):
    tensors = load_file(out / FIRST)
    name = next(name for name in tensors if "mlp" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, out / FIRST, metadata={"format": "pt"})
    assert differences(out)[name] == f"other bytes than were written, in {FIRST}"


@pytest.mark.parametrize("name", [FIRST, "config.json", "model.safetensors.index.json", "generation_config.json"])
def test_a_missing_file(out, name):
    (out / name).unlink()
    assert differences(out)[name] == "missing"


def test_a_missing_tensor_and_one_too_many(out):
    tensors = load_file(out / FIRST)
    gone = next(iter(tensors))
    tensors["model.more"] = tensors.pop(gone)
    save_file(tensors, out / FIRST, metadata={"format": "pt"})
    found = differences(out)
    assert found[gone] == "missing"
    assert found["model.more"] == "a tensor that the conversion did not write"
    assert found[FIRST] == "another header than was written"


def test_a_weight_file_too_many(out):
    save_file({"a": torch.ones(2)}, out / "adapter.safetensors")
    assert differences(out) == {"adapter.safetensors": "a weight file that the conversion did not write"}
    (out / "adapter.safetensors").unlink()
    (out / "notes.txt").write_text("mine")  # which loads nowhere
    assert differences(out) == {}


@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"rms_norm_eps": 1e-6}, {"head_dim": None}], ids=str)
def test_a_changed_config(out, change):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}, indent=2) + "\n")
    assert differences(out)["config.json"] == "not as it was written"
    if "num_key_value_heads" in change:
        assert f"{KEY.replace('.1.', '.0.')} has the wrong shape" in differences(out)["out"]


def record_anew(out):
    """A record whose hashes are those of the files that are there: only the parent tells what is wrong."""
    from gqa.convert.result import record_sha256
    from gqa.weights.hashes import hash_shard
    from gqa.weights.header import read_header

    path = out / "gqa-conversion.json"
    document = json.loads(path.read_text())
    for name in document["hashes"]["shards"]:
        shard = read_header(out / name)
        with (out / name).open("rb") as stream:
            first = min(entry.start for entry in shard.tensors.values())
            document["hashes"]["shards"][name] = hash_shard(stream, first, shard.tensors.values())
    document["hashes"]["record"] = record_sha256(document)
    path.write_text(json.dumps(document, indent=2) + "\n")


def test_only_the_parent_tells(made, out):
    file = FIRST if OTHER in load_file(out / FIRST) else SECOND
    tensors = load_file(out / file)
    tensors[OTHER][0, 0] += 1
    save_file(tensors, out / file, metadata={"format": "pt"})
    record_anew(out)
    assert differences(out) == {}
    assert differences(out, open_checkpoint(str(made / "parent"))) == {OTHER: "other bytes than the parent's"}


def test_numbers_that_are_none_are_told_of_a_copied_tensor_too(tmp_path):
    from helpers.checkpoints import tiny_config, tiny_tensors

    tensors = tiny_tensors(tiny_config())
    tensors[OTHER][0, 0] = float("nan")
    source = tiny_source(tmp_path / "parent", tensors=tensors)
    convert(source, tmp_path / "out", make_recipe(2, "mean"))
    assert differences(tmp_path / "out", source) == {OTHER: "NaN or infinite values"}


def test_another_parent(made, tmp_path):
    other = tiny_source(tmp_path / "other", shards=2, dtype=torch.bfloat16, seed=1)
    with pytest.raises(GqaError, match="not the parent that OUT was converted from"):
        verify(made / "out", other)


def test_folders_that_no_conversion_made(made, out, tmp_path):
    with pytest.raises(GqaError, match="no converted folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(GqaError, match=r"gqa-conversion\.json"):
        verify(write_checkpoint(tmp_path / "plain"))
    document = json.loads((out / "gqa-conversion.json").read_text())
    del document["hashes"]
    (out / "gqa-conversion.json").write_text(json.dumps(document))
    with pytest.raises(GqaError, match="records no hashes"):
        verify(out)
