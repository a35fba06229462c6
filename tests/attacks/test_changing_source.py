"""A source that somebody writes to while it is converted: noticed, and never a crash."""

import os
import subprocess
import sys

import pytest
from helpers.attacks import MEAN, complete
from helpers.checkpoints import write_checkpoint

from gqa.convert import run
from gqa.convert.recipe import make_recipe
from gqa.errors import GqaError
from gqa.source import open_checkpoint

SHARD = "model-00001-of-00002.safetensors"


def touch(path):
    path.touch()


def other_bytes_at_the_old_time(path):
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (path.parent / "new").write_bytes(content)
    os.replace(path.parent / "new", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def longer(path):
    before = path.stat()
    with path.open("ab") as stream:
        stream.write(b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shorter(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def gone(path):
    path.unlink()


CHANGES = (touch, other_bytes_at_the_old_time, longer, shorter, empty, gone)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("stage", ["after the headers", "before the last layer", "before the end"])
def test_noticed(tmp_path, monkeypatch, change, stage):
    folder = write_checkpoint(tmp_path / "m", shards=2)
    shard, armed = folder / SHARD, [True]

    def once():
        if armed:
            armed.clear()
            change(shard)

    place = {
        "after the headers": "plan_conversion",
        "before the last layer": "_convert_layers",
        "before the end": "write_text_files",
    }[stage]
    real = getattr(run, place)

    def changing(*arguments):
        if stage == "before the last layer":
            once()
        result = real(*arguments)
        once()
        return result

    monkeypatch.setattr(run, place, changing)
    with pytest.raises(GqaError) as caught:
        run.convert(open_checkpoint(str(folder)), tmp_path / "out", make_recipe(2))
    assert complete(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_cut_short_under_the_reader_is_no_crash(tmp_path):
    """A file that is mapped into memory would end the process with SIGBUS; so this one is a process of its own."""
    write_checkpoint(tmp_path / "m")
    script = """
import os, sys
from gqa.convert import run
from gqa.convert.recipe import make_recipe
from gqa.errors import GqaError
from gqa.source import open_checkpoint
real = run.plan_conversion
def plan(source, recipe):
    job = real(source, recipe)
    name = job.checkpoint.names[0]
    job.checkpoint.read(name)
    os.truncate(source.folder / "model.safetensors", 8192)
    return job
run.plan_conversion = plan
try:
    run.convert(open_checkpoint(sys.argv[1]), sys.argv[2], make_recipe(2))
except GqaError as error:
    print(error)
    sys.exit(2)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "m"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "changed while it was" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_an_unchanged_source_is_taken_as_it_is(tmp_path):
    folder = write_checkpoint(tmp_path / "m", shards=2)
    source = open_checkpoint(str(folder))
    os.chmod(folder / SHARD, 0o444)  # not a change of what it holds
    (folder / SHARD).read_bytes()
    run.convert(source, tmp_path / "out", MEAN)
