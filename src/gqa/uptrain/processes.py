"""The processes that `torchrun` started: how many, which one this is, and how they come to one decision."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gqa.device import default_device

T = TypeVar("T")

# How long the others wait while the first process writes a result or cuts a text into windows. Communication within
# a step has torch's own, much shorter limit, which finds a machine that hangs.
_PATIENCE = timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Processes:
    """count of them and the rank of this one; alone (1 and 0) without torchrun."""

    count: int = 1
    rank: int = 0
    group: Any = None  # for decisions, not for tensors

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, in all of them; its error too. The others do not run it."""
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told = [work(), None]
            except Exception as error:  # raised below, in every process: none may wait for one that has left
                told = [None, error]
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over processes of a small tensor."""
        if self.count == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values / self.count

    def share(self, values: Any) -> Any:
        """This process's equal share of something with a length."""
        each = len(values) // self.count
        return values[self.rank * each : (self.rank + 1) * each]


@functools.cache
def processes() -> Processes:
    """Join the processes that torchrun started, if it did; once, as torchrun's store is for one group, and until this
    process ends."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    if default_device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if default_device() == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(count, dist.get_rank(), dist.new_group(backend="gloo", timeout=_PATIENCE))
