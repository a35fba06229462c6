"""Links that lead out of a model folder, and pipes and devices where files should be."""

import os
import socket

import pytest
from helpers.attacks import MEAN, everything, refused
from helpers.checkpoints import folder_hashes, tiny_source, write_checkpoint

from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint, open_source
from gqa.weights.reader import INDEX, Checkpoint

SHARD = "model-00002-of-00002.safetensors"
TEMPLATE = "additional_chat_templates/tool.jinja"


def with_templates(folder, shards=2):
    write_checkpoint(folder, shards=shards)
    (folder / "tokenizer.json").write_text("{}")
    (folder / TEMPLATE).parent.mkdir()
    (folder / TEMPLATE).write_text("{{ tool }}")
    return folder


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.json", TEMPLATE, "additional_chat_templates"])
@pytest.mark.parametrize("how", ["absolute", "relative", "over another link"])
def test_a_link_out_of_the_folder(tmp_path, name, how):
    folder = with_templates(tmp_path / "m")
    secret = tmp_path / "secret"
    (folder / name).rename(secret)
    target = secret
    if how == "relative":
        target = os.path.relpath(secret, (folder / name).parent)
    if how == "over another link":
        (folder / "link").symlink_to(secret)
        target = folder / "link"
    (folder / name).symlink_to(target)
    error = refused(folder, tmp_path / "out", "a link out of the model folder")
    assert str(secret) in str(error.got)


def test_links_within_the_folder_are_followed(tmp_path):
    folder = with_templates(tmp_path / "m")
    (folder / "data").mkdir()
    for name in (SHARD, "config.json", "tokenizer.json"):
        (folder / name).rename(folder / "data" / name)
        (folder / name).symlink_to(f"data/{name}")
    convert(open_checkpoint(str(folder)), tmp_path / "out", MEAN)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("linked", [False, True], ids=["the snapshot", "a link to it"])
def test_the_links_of_the_hubs_cache_are_followed(tmp_path, linked):
    expected = with_templates(tmp_path / "models--a--b" / "snapshots" / "plain")
    folder = with_templates(tmp_path / "models--a--b" / "snapshots" / "0123abcd")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, name in enumerate((SHARD, INDEX, "config.json", "tokenizer.json", TEMPLATE)):
        (folder / name).rename(blobs / str(number))
        (folder / name).symlink_to(os.path.relpath(blobs / str(number), (folder / name).parent))
    if linked:
        (tmp_path / "mine").symlink_to(folder)
        folder = tmp_path / "mine"
    for place, source in (("a", folder), ("b", expected)):
        convert(open_checkpoint(str(source)), tmp_path / place / "out", MEAN)
    a, b = folder_hashes(tmp_path / "a" / "out"), folder_hashes(tmp_path / "b" / "out")
    assert {name for name in a if a[name] != b[name]} == {"README.md", "gqa-conversion.json"}  # which name the model
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))


def test_a_link_out_of_the_hubs_cache(tmp_path):
    folder = with_templates(tmp_path / "models--a--b" / "snapshots" / "0123abcd")
    (tmp_path / "blobs").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "blobs" / "secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blobs" / "secret")
    refused(folder, tmp_path / "out", "a link out of the model folder")


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.json", TEMPLATE])
@pytest.mark.parametrize("kind", ["to nothing", "in a circle"])
def test_a_link_that_leads_nowhere(tmp_path, name, kind):
    folder = with_templates(tmp_path / "m")
    (folder / name).unlink()
    (folder / name).symlink_to("nothing" if kind == "to nothing" else (folder / name).name)
    refused(folder, tmp_path / "out", "cannot be read")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def endpoint(path):
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's address has little room
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def folder_instead(path):
    path.mkdir()


KINDS = {pipe: "a pipe", device: "a device", endpoint: "a socket", folder_instead: "a folder"}


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.json", TEMPLATE])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_is_no_file(tmp_path, name, make):
    if make is folder_instead and name == "tokenizer.json":
        return  # a folder beside the weights is none of ours, whatever its name
    folder = with_templates(tmp_path / "m")
    (folder / name).unlink()
    make(folder / name)
    error = refused(folder, tmp_path / "out", "not an ordinary file")
    assert str(error.got).endswith(KINDS[make])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_is_told_to_whoever_reads_weights_alone(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m")
    (folder / name).unlink()
    pipe(folder / name)
    before = everything(tmp_path)
    with pytest.raises(GqaError, match="not an ordinary file"):
        Checkpoint(folder)
    assert everything(tmp_path) == before


def test_a_config_named_by_itself(tmp_path):
    tiny_source(tmp_path / "m")
    (tmp_path / "mine.json").symlink_to(tmp_path / "m" / "config.json")
    assert open_checkpoint(str(tmp_path / "mine.json")).config["model_type"] == "llama"  # the user's own link
    pipe(tmp_path / "x.json")
    for opener in (open_source, open_checkpoint):
        with pytest.raises(GqaError, match="not an ordinary file"):
            opener(str(tmp_path / "x.json"))
