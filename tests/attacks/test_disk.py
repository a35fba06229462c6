"""Disks that are full, become full, or cannot be written: one error, and what is worth keeping is kept."""

import contextlib
import errno
import io
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.attacks import MEAN, complete, everything, refused
from helpers.checkpoints import folder_hashes, tiny_source, write_checkpoint

from gqa.convert.journal import work_folder
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint
from gqa.weights import writer

SVD = make_recipe(2)


def test_no_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    refused(write_checkpoint(tmp_path / "m"), tmp_path / "deep" / "out", "not enough space")


@pytest.mark.parametrize("room", [0, 20_000, 60_000, 150_000, 500_000])
def test_a_disk_that_fills_up_under_way(tmp_path, monkeypatch, room):
    source = tiny_source(tmp_path / "m", shards=2)
    before = everything(tmp_path / "m")
    convert(source, tmp_path / "undisturbed" / "out", SVD)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("gqa.weights.writer.Path.open", _open_on_a_disk_with(room))
        patch.delattr("os.copy_file_range", raising=False)  # copies within the kernel would never see this disk
        with pytest.raises(GqaError, match="the disk is full") as caught:
            convert(source, out, SVD)
    assert "give the same command again" in str(caught.value.hint)
    assert not out.exists()
    assert work_folder(out).exists() == (room > 40_000)  # a layer's file takes 40 KiB
    assert not list(tmp_path.rglob("*.tmp"))
    convert(source, out, SVD)
    assert folder_hashes(out) == folder_hashes(tmp_path / "undisturbed" / "out")
    assert everything(tmp_path / "m") == before


@pytest.mark.parametrize(
    ("recipe", "moment"),
    [(SVD, "convert layers"), (SVD, "write files"), (MEAN, "write files")],
    ids=["svd, layers", "svd, files", "mean, files"],
)
def test_a_real_disk_that_somebody_else_fills(tmp_path, recipe, moment):
    """On a file system of 4 MiB, full from one moment of the conversion on, then free again."""
    source = tiny_source(tmp_path / "m", shards=2)
    with mounted(tmp_path / "disk", "size=4m") as disk:

        def fill(stage, done, total, note=""):
            if stage.startswith(moment) and not (disk / "ballast").exists():
                with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as stream:
                    while True:
                        stream.write(bytes(4096))

        convert(source, tmp_path / "out", recipe)
        with pytest.raises(GqaError, match="the disk is full") as caught:
            convert(source, disk / "out", recipe, progress=fill)
        assert complete(caught.value)
        assert not (disk / "out").exists()
        assert not list(disk.rglob("*.tmp"))
        (disk / "ballast").unlink()
        convert(source, disk / "out", recipe)
        assert folder_hashes(disk / "out") == folder_hashes(tmp_path / "out")


def test_a_file_system_that_is_too_small(tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        refused(write_checkpoint(tmp_path / "m"), disk / "out", "not enough space")
        assert list(disk.iterdir()) == []


def test_a_file_system_that_is_read_only(tmp_path):
    with mounted(tmp_path / "disk", "size=4m,ro") as disk:
        error = refused(write_checkpoint(tmp_path / "m"), disk / "out", "cannot be read or written")
        assert "Read-only file system" in str(error.got)


def test_a_source_that_is_read_only(tmp_path):
    folder = write_checkpoint(tmp_path / "m", shards=2)
    convert(open_checkpoint(str(folder)), tmp_path / "expected" / "out", MEAN)
    with mounted(tmp_path / "disk", "size=4m") as disk:
        folder.rename(tmp_path / "moved")
        subprocess.run(["cp", "-r", str(tmp_path / "moved"), str(disk / "m")], check=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        convert(open_checkpoint(str(disk / "m")), tmp_path / "out", MEAN)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "expected" / "out")


def test_a_folder_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = write_checkpoint(tmp_path / "m")
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(folder, tmp_path / "locked" / "out", "cannot be read or written")


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    folder = write_checkpoint(tmp_path / "m")
    monkeypatch.setattr("gqa.convert.journal.Path.mkdir", refuse)
    error = refused(folder, tmp_path / "out", "cannot be read or written")
    assert error.got == "Permission denied: /somewhere"


def test_a_file_in_the_way(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    refused(folder, tmp_path / "file" / "out", "cannot be read or written")


def test_files_that_may_not_grow(tmp_path):
    """A limit on the size of files, as a batch system sets it, without the signal that would end the process."""
    write_checkpoint(tmp_path / "m")
    command = [sys.executable, "-c", "from gqa.cli.main import main; main()", "convert"]
    command += [str(tmp_path / "m"), str(tmp_path / "out"), "--kv-heads", "2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---- helpers


@contextlib.contextmanager
def mounted(place, options):
    """A file system of its own, in memory; the test is skipped where mounting is not allowed."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "gqa-test", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _open_on_a_disk_with(room):
    """Path.open whose files share `room` bytes: what does not fit ends in ENOSPC, half written, as on a real disk."""
    left = [room]
    real = io.open

    class Full(io.FileIO):
        def write(self, data, /):
            data = memoryview(data).cast("B")
            if len(data) > left[0]:
                super().write(data[: left[0]])
                left[0] = 0
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
            left[0] -= len(data)
            return super().write(data)

    def fake(path, mode="r", *args, **kwargs):
        return io.BufferedWriter(Full(path, "w")) if mode == "wb" else real(path, mode, *args, **kwargs)

    return fake
