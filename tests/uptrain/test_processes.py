"""Real torchrun, real gloo, on the CPU. One start of two processes serves all tests here, as starting them is what
takes the time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.uptraining import noisy_child, parent_and_windows, weights

from gqa.cli.uptrain import command
from gqa.errors import GqaError
from gqa.uptrain import Settings, uptrain
from gqa.uptrain.loop import micro_batch
from gqa.uptrain.processes import Processes

STEPS = 10
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RATE = 3e-3


class Stopped(KeyboardInterrupt):
    pass


def interrupt(step):
    def progress(stage, done, total, note=""):
        if done == step:
            raise Stopped

    return progress


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent, windows = parent_and_windows(folder)
        self.child = noisy_child(self.parent, folder / "child")
        self.windows = windows[: 8 * STEPS]
        np.save(folder / "windows.npy", self.windows)
        with pytest.raises(Stopped):
            self.alone("resumed", progress=interrupt(5))
        lines = "".join(json.dumps({"text": f"def f{n}(x):\n    return x + {n}\n"}) + "\n" for n in range(400))
        (folder / "text.jsonl").write_text(lines)
        jobs = [
            self.job("together"),
            self.job("resumed"),
            self.job("lora", train="lora"),
            {"command": self.command("streamed")},
            self.job("died") | {"die": 7},
        ]
        (folder / "jobs").write_text(json.dumps(jobs))
        self.ended = subprocess.run(
            [*TORCHRUN, str(Path(__file__).with_name("worker.py")), str(folder / "jobs")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        self.seen = [json.loads((folder / f"jobs.{rank}").read_text()) for rank in (0, 1)]

    def job(self, out, **settings):
        folders = {"model_folder": self.child, "out": self.folder / out, "parent_folder": self.parent}
        told = {"windows": self.folder / "windows.npy", **folders}
        return {**{name: str(path) for name, path in told.items()}, "settings": {"learning_rate": RATE, **settings}}

    def command(self, out):
        """Text that is streamed, predictions that are stored and read again, an early stop that is looked for."""
        given = (self.child, self.folder / out, "--parent", self.parent, "--text", self.folder / "text.jsonl")
        stored = ("--teacher-logits", self.folder / f"{out}-logits", "--top-k", 20, "--early-stop", "--micro-batch", 2)
        return [*map(str, given), "--tokens", "2048", "--window", "32", *map(str, stored), "--json"]

    def alone(self, out, progress=lambda *stage: None, **settings):
        arguments = {"windows": self.windows, "parent_folder": self.parent, "progress": progress}
        return uptrain(self.child, self.folder / out, settings=Settings(learning_rate=RATE, **settings), **arguments)

    def steps(self, job, rank=0):
        return {int(step): figures for step, figures in self.seen[rank][job]["steps"].items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def close(one, other):
    # Sums of a few hundred fp32 products in another order, over ten steps.
    return one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_the_weights_are_shards_and_the_losses_those_of_one_process(runs):
    sharded = [job["sharded"] for job in runs.seen[0]]
    assert sharded == [job["sharded"] for job in runs.seen[1]]
    assert sharded == [True, True, False, True, True]  # low-rank updates are in one piece
    from gqa.uptrain import run
    from gqa.uptrain.loop import Loop

    alone = []

    class Watched(Loop):
        def _step(self, step, rate):
            alone.append(super()._step(step, rate))
            return alone[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Loop", Watched)
        runs.alone("alone")
    together = runs.steps(0)
    assert together == runs.steps(0, rank=1)
    assert sorted(together) == list(range(STEPS))
    for step, (entropy, kl) in enumerate(alone):
        assert close(together[step][0], entropy)
        assert close(together[step][1], kl)


def test_the_result_is_that_of_one_process_in_one_ordinary_file(runs):
    one, two = weights(runs.folder / "alone"), weights(runs.folder / "together")
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    start = weights(runs.child)
    for name in one:
        assert (one[name] - two[name]).abs().max() < 0.01 * (one[name] - start[name]).abs().max() + 1e-6, name
    assert {path.name for path in (runs.folder / "together").iterdir()} == {
        path.name for path in (runs.folder / "alone").iterdir()
    }
    assert not (runs.folder / "together.partial").exists()


def test_a_run_of_one_process_goes_on_in_two(runs):
    assert sorted(runs.steps(1)) == list(range(4, STEPS))  # from the checkpoint after 4 steps
    together = runs.steps(0)
    for step, figures in runs.steps(1).items():
        assert close(figures[0], together[step][0])
        assert close(figures[1], together[step][1])


def test_a_worker_that_dies_ends_the_run_and_one_process_goes_on_with_it(runs):
    assert runs.ended.returncode != 0
    assert sorted(runs.steps(4)) == list(range(7))
    partial = runs.folder / "died.partial"
    assert sorted(path.name for path in (partial / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert len(list((partial / "checkpoints" / "checkpoint-6").glob("*.safetensors"))) == 2
    done = []
    runs.alone("died", progress=lambda stage, step, total, note="": done.append(step))
    assert done == list(range(7, STEPS + 1))
    died, together = weights(runs.folder / "died"), weights(runs.folder / "together")
    for name in died:
        torch.testing.assert_close(died[name], together[name], rtol=1e-3, atol=1e-5)


def test_low_rank_updates_are_the_same_in_two_processes(runs):
    pytest.importorskip("peft")
    runs.alone("lora-alone", train="lora")
    one, two = weights(runs.folder / "lora-alone"), weights(runs.folder / "lora")
    start = weights(runs.child)
    for name in one:
        assert torch.equal(one[name], start[name]) == (".self_attn." not in name), name
        assert (one[name] - two[name]).abs().max() <= 0.01 * (one[name] - start[name]).abs().max() + 1e-6, name


def test_the_command_prints_once_and_gives_what_it_gives_alone(runs):
    told = json.loads(runs.ended.stdout)  # one document, of one process
    alone = CliRunner().invoke(command, runs.command("streamed-alone"), catch_exceptions=False, standalone_mode=False)
    expected = json.loads(alone.stdout)["results"]
    assert told["results"]["steps"] == expected["steps"] == 8
    for name in ("final_cross_entropy_nats", "final_kl_to_parent_nats"):
        assert close(told["results"][name], expected[name])
    for one, other in zip(told["results"]["held_out_gaps"], expected["held_out_gaps"], strict=True):
        assert one["step"] == other["step"]
        assert one["kl_to_parent_nats"] == pytest.approx(other["kl_to_parent_nats"], rel=1e-3)
    one, other = (np.load(runs.folder / f"{out}-logits" / "ids.npy") for out in ("streamed", "streamed-alone"))
    assert one.shape == (64 + 64, 31, 20)
    assert (one == other).mean() > 0.99  # predictions that are as likely may change places
    assert "next: gqa eval" in runs.ended.stderr


def test_a_batch_that_cannot_be_shared_out_is_refused():
    for settings, world, word in (
        (Settings(batch=9), Processes(2), "2 processes"),
        (Settings(batch=12, micro_batch=4), Processes(2), "micro-batches"),
        (Settings(batch=8, micro_batch=16), Processes(), "micro-batches"),
    ):
        with pytest.raises(GqaError, match=word):
            micro_batch(settings, world)
    assert micro_batch(Settings(batch=12), Processes(3)) == 4
