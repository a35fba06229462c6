"""Places that a result must not be written to."""

import os

import pytest
from helpers.attacks import MEAN, complete, everything, refused
from helpers.checkpoints import tiny_source, write_checkpoint

from gqa.convert.journal import work_folder
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint


@pytest.mark.parametrize("place", ["m", "m/out", "m/deep/out", "other/../m/out", "link/out", "link"])
def test_within_the_source(tmp_path, place):
    folder = write_checkpoint(tmp_path / "m")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(folder)
    refused(folder, tmp_path / place, "never touched")


def test_within_a_source_that_is_itself_a_link(tmp_path):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    refused(tmp_path / "link", tmp_path / "m" / "out", "never touched")


def test_a_source_of_the_work_folders_name(tmp_path):
    folder = write_checkpoint(tmp_path / "out.partial")
    refused(folder, tmp_path / "out", "never touched")


def test_a_work_folder_that_is_a_link_to_the_source(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    work_folder(tmp_path / "out").symlink_to(folder)
    refused(folder, tmp_path / "out", "never touched")


def test_a_work_folder_that_is_a_link_elsewhere(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    work_folder(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    refused(folder, tmp_path / "out", "taken by a link")


def test_a_work_folder_that_is_a_file(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    work_folder(tmp_path / "out").write_text("mine")
    refused(folder, tmp_path / "out", "cannot be read or written")


@pytest.mark.parametrize("kind", ["file", "folder", "full folder", "link to it", "link to nothing", "circle", "pipe"])
def test_something_else_is_there(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "link to nothing":
        out.symlink_to(tmp_path / "nothing")
    elif kind == "circle":
        out.symlink_to("out")
    elif kind == "link to it":
        (tmp_path / "there").mkdir()
        out.symlink_to(tmp_path / "there")
    else:
        out.mkdir()
        if kind == "full folder":
            (out / "thesis.txt").write_text("mine")
    folder = write_checkpoint(tmp_path / "m")
    refused(folder, out, "OUT exists and is not this conversion's")


def test_a_pipe_where_the_report_should_be(tmp_path):
    source = tiny_source(tmp_path / "m")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "gqa-conversion.json")
    with pytest.raises(GqaError, match="OUT exists and is not this conversion's"):
        convert(source, tmp_path / "out", MEAN)


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 300, "file/out", "loop/out"], ids=["NUL", "long", "in a file", "in a loop"]
)
def test_names_that_cannot_be(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    refused(folder, tmp_path / name, "no name of a folder|cannot be read or written")


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_names_of_folders_that_are_there(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = write_checkpoint(tmp_path / "m")
    before = everything(tmp_path)
    with pytest.raises(GqaError, match="OUT exists and is not this conversion's") as caught:
        convert(open_checkpoint(str(folder)), name, MEAN)
    assert everything(tmp_path) == before
    assert complete(caught.value)
