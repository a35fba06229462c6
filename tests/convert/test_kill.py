"""A conversion killed with SIGKILL leaves nothing or a state that it goes on from; OUT is never half written.

The killed processes are forks of this one, so that each need not import torch again; one fresh process is killed too.
"""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.checkpoints import VOCAB, folder_hashes, random_windows, tiny_config, tiny_source, write_checkpoint

from gqa.convert.journal import work_folder
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.source import open_checkpoint
from gqa.uptrain import distill_attentions

DATA_FREE = make_recipe(4, grouping="contiguous")
REFINED = make_recipe(2, calibration_tokens=256, refine_tokens=256, refine_steps=3, window=32)
DISTILLED = make_recipe(
    2,
    calibration_tokens=64,
    measure_tokens=32,
    window=16,
    distill_tokens=192,
    distill_window=8,
    distill_batch=2,
)
# Of the distillation; more by hand.
KILLS = int(os.environ.get("GQA_KILLS", "10"))
# What Python reports before it touches the name of a file.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def test_killed_before_every_single_step(tmp_path):
    config = tiny_config(num_hidden_layers=2, dtype="bfloat16")
    source = tiny_source(tmp_path / "parent", config, shards=2, dtype=torch.bfloat16)
    recipe, expected = DATA_FREE, tmp_path / "undisturbed" / "out"
    assert in_fork(source, expected, recipe) == 0
    whole = folder_hashes(expected)
    resumable = step = 0
    while True:
        step += 1
        out = tmp_path / f"killed-{step}" / "out"
        status = in_fork(source, out, recipe, kill_at_step=step)
        assert not out.exists() or folder_hashes(out) == whole
        if status == 0:
            break
        assert status == -signal.SIGKILL
        resumable += work_folder(out).exists()
        assert in_fork(source, out, recipe) == 0
        assert folder_hashes(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert step > 30
    assert resumable > step / 2


def test_killed_at_twenty_random_moments(tmp_path, monkeypatch):
    monkeypatch.setattr("gqa.convert.memory.available_bytes", lambda device: 0)  # activations in files, too
    # What calibration imports at first use, imported once for all forks.
    import accelerate  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    source = tiny_source(tmp_path / "parent", shards=3)
    recipe, expected = REFINED, tmp_path / "undisturbed" / "out"
    started = time.monotonic()
    assert in_fork(source, expected, recipe) == 0
    seconds = time.monotonic() - started
    whole = folder_hashes(expected)
    moments, kills, attempt = random.Random(0), 0, 0
    while kills < 20:
        attempt += 1
        out = tmp_path / f"killed-{attempt}" / "out"
        status = -signal.SIGKILL
        while status:  # the same command again and again, until it is through
            status = in_fork(source, out, recipe, kill_after=moments.uniform(0, 1.5 * seconds), watch=set(whole))
            assert status in (0, -signal.SIGKILL)
            assert not out.exists() or folder_hashes(out) == whole
            kills += status != 0
        assert folder_hashes(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_distillation_killed_at_random_changes_of_the_disk_and_moments(tmp_path, monkeypatch):
    # Torch's own attention: a fork need not load ours, which has no part in what lies on the disk.
    monkeypatch.setattr("gqa.uptrain.shared_trunk.use_fast_attention", lambda model, layout: None)
    import accelerate  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    source = tiny_source(tmp_path / "parent", tiny_config(num_hidden_layers=2), shards=2)
    expected, log = tmp_path / "undisturbed" / "out", tmp_path / "steps"
    started = time.monotonic()
    assert in_fork(source, expected, DISTILLED, log=log) == 0
    seconds, steps = time.monotonic() - started, log.read_text().splitlines()
    # Where a distillation hands over: its last checkpoint, the files of the trained layers, the journal.
    last = [number for number, path in enumerate(steps, 1) if "distilled-" in path and "result" not in path]
    handing_over = range(min(last) - 3, max(last) + 4)
    whole = folder_hashes(expected)
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}, {len(steps)} changes of the disk, {seconds:.1f} s")
    moments, kills, attempt, trained = random.Random(seed), 0, 0, 0
    while kills < KILLS:
        attempt += 1
        out = tmp_path / f"killed-{attempt}" / "out"
        status = -signal.SIGKILL
        while status:
            kill: dict[str, Any] = {"kill_at_step": moments.randint(1, len(steps))}
            if not out.parent.exists() and attempt % 2:
                kill = {"kill_at_step": moments.choice(handing_over)}
            elif kills % 3 == 2:
                kill = {"kill_after": moments.uniform(0, seconds)}
            status = in_fork(source, out, DISTILLED, watch=set(whole), **({} if kills >= KILLS else kill))
            assert status in (0, -signal.SIGKILL)
            assert not out.exists() or folder_hashes(out) == whole
            trained += (work_folder(out) / "training").exists()
            kills += status != 0
        assert folder_hashes(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    print(f"{kills} kills, {trained} of them with checkpoints of the training on the disk, {attempt} equal results")


def test_a_fresh_process_killed_and_started_again(tmp_path):
    write_checkpoint(tmp_path / "parent", shards=2)
    run = "import sys; from gqa.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", run, "convert", str(tmp_path / "parent"), str(tmp_path / "out"), "--kv-heads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not work_folder(tmp_path / "out").exists() and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    # Unless the kill came late, on a busy machine, in which case all is there.
    assert (tmp_path / "out").exists() or work_folder(tmp_path / "out").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    expected = tmp_path / "undisturbed" / "out"
    convert(open_checkpoint(str(tmp_path / "parent")), expected, make_recipe(2))
    assert folder_hashes(tmp_path / "out") == folder_hashes(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "out", "undisturbed"}


def in_fork(source, out: Path, recipe, *, kill_at_step=None, kill_after=None, watch=None, log=None) -> int:
    """Convert in a process of its own: its exit code, or minus the signal that ended it.

    kill_at_step: it kills itself before the n-th step on files near OUT. kill_after: it is killed after that many
    seconds. watch: the files of a complete OUT, of which OUT must never be seen with less. log: a file that gets the
    path of every step.
    """
    with warnings.catch_warnings():
        # Python warns of forks of a process with threads; the child uses one thread and none of the parent's.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if kill_at_step or log:
                _count_steps(str(out.parent), kill_at_step, log)
            convert(source, out, recipe, random_windows(recipe), **_distillation(recipe))
            code = 0
        finally:
            os._exit(code)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if watch and out.exists():
            assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == watch
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


def _distillation(recipe) -> dict[str, Any]:
    if not recipe.distill_tokens:
        return {}
    shape = (recipe.distill_windows, recipe.distill_window)
    windows = np.random.default_rng(1).integers(0, VOCAB, shape)
    return {"distill": distill_attentions, "distill_windows": windows}


def _count_steps(near: str, kill_at: int | None, log: Path | None) -> None:
    """Count steps on files near a folder: into a file, or until the one at which the process kills itself."""
    written = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT)
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(near):
            seen += 1
            if written is not None:
                os.write(written, f"{arguments[0]}\n".encode())
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
