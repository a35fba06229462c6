"""Runs uptrainings in the process that torchrun started: `worker.py JOBS`, a JSON list of what to call `uptrain` with.

Each process writes what it saw of every step, and whether all its weights were shards, to JOBS.RANK. A job with `die`
ends with SIGKILL in the last process before that step. A job with `command` is arguments of `gqa uptrain`.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from torch.distributed.tensor import DTensor

from gqa.cli.uptrain import command
from gqa.uptrain import Settings, run
from gqa.uptrain.loop import Loop

seen = []


class Watched(Loop):
    die: int | None = None

    def run(self):
        seen.append({"sharded": all(isinstance(p, DTensor) for p in self.model.parameters()), "steps": {}})
        return super().run()

    def _step(self, step, rate):
        if step == self.die and self.world.rank == self.world.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        figures = super()._step(step, rate)
        seen[-1]["steps"][step] = figures
        Path(f"{sys.argv[1]}.{self.world.rank}").write_text(json.dumps(seen))
        return figures


run.Loop = Watched
for job in json.loads(Path(sys.argv[1]).read_text()):
    if "command" in job:
        command.main(job["command"], standalone_mode=False)
        continue
    Watched.die = job.pop("die", None)
    windows, settings = np.load(job.pop("windows")), Settings(**job.pop("settings"))
    run.uptrain(**job, windows=windows, settings=settings)
