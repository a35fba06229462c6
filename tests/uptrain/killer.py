"""Runs one uptraining again and again, each time in a new process that ends with SIGKILL at a random moment.

    killer.py MODEL WINDOWS OUT SEED KILLS

The moments are calls that change the disk (a rename, an fsync, a deletion, ...), where a kill hurts most; every third
is a moment in time. This process forks and never calculates, so that a try costs no start of Python. It prints a line
per kill and ends with 1 if what a kill left is not whole.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gqa.uptrain import Settings, uptrain

LOADED = (AutoModelForCausalLM, LlamaForCausalLM)  # here, and not in every process
CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")
model, windows, out = sys.argv[1], np.load(sys.argv[2]), Path(sys.argv[3])
seed, kills = int(sys.argv[4]), int(sys.argv[5])


def count_calls(die_at, tell):
    """From now on the process dies at that change of the disk: before it, or after it for odd ones."""
    done = 0

    def counted(original):
        def call(*arguments, **how):
            nonlocal done
            done += 1
            tell(done)
            if done == die_at and die_at % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **how)
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def attempt(folder, die_at=0, after=None):
    """Run in a process of its own; returns how that ended, and how many calls it came to."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        count_calls(die_at, lambda done: os.write(write, b"."))
        settings = Settings(batch=4, save_every=3)
        uptrain(model, folder, windows=windows, parent_folder=model, settings=settings)
        os._exit(0)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    calls = 0
    while got := os.read(read, 4096):
        calls += len(got)
    os.close(read)
    return status, calls


def check_whole():
    for checkpoint in out.with_name(out.name + ".partial").glob("checkpoints/checkpoint-*[0-9]"):
        files = list(checkpoint.glob("*.safetensors"))
        assert files, f"{checkpoint} is empty"
        for file in files:
            with safe_open(file, "pt") as tensors:
                assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118


rest = random.Random(seed)
began = time.monotonic()
status, total = attempt(out.with_name("undisturbed"))
seconds = time.monotonic() - began
assert status == 0
expected = (out.with_name("undisturbed") / "model.safetensors").read_bytes()
done = finished = 0
while done < kills or not finished:
    timed = done % 3 == 2
    if done >= kills:
        status, calls = attempt(out)
    elif timed:
        status, calls = attempt(out, after=rest.uniform(0, seconds))
    else:
        status, calls = attempt(out, die_at=rest.randint(1, total))
    done += status != 0
    print(f"{'timed' if timed else 'counted'} kill after {calls} of {total} changes of the disk: {status}", flush=True)
    assert status in (0, signal.SIGKILL), status
    check_whole()
    if out.exists():
        assert (out / "model.safetensors").read_bytes() == expected, "other weights"
        assert sorted(os.listdir(out)) == sorted(os.listdir(out.with_name("undisturbed")))
        if status == 0:
            left = [
                name for name in os.listdir(out.parent) if name.lstrip(".").startswith(out.name) and name != out.name
            ]
            assert not left, left
            shutil.rmtree(out)
            finished += 1
print(f"{done} kills, {finished} results, all of them equal")
