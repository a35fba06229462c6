"""The commit of a checkout, and of nothing else."""

import subprocess

from gqa.bench.commit import commit


def git(folder, *arguments):
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_of_a_checkout(tmp_path):
    source, installed = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    installed.mkdir()
    git(tmp_path, "init")
    (source / "code.py").write_text("1")
    (installed / "code.py").write_text("1")
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-m", "one")
    clean = commit(source)
    assert clean is not None
    assert len(clean) == 12
    assert commit(installed) is None  # inside a checkout, and no part of it
    (source / "code.py").write_text("2")
    assert commit(source) == f"{clean}-dirty"


def test_none_outside(tmp_path):
    assert commit(tmp_path) is None
