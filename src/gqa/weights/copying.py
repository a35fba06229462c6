"""Copy a tensor's bytes from file to file without leading them through this process, where the system can."""

from __future__ import annotations

import errno
import os
from typing import BinaryIO

from gqa.errors import GqaError
from gqa.weights.header import Shard
from gqa.weights.reader import copy_tensor

# Short enough that Ctrl-C is not kept waiting.
_CHUNK_BYTES = 256 << 20

# What copy_file_range says of two files that it cannot copy between: of different file systems, old kernels, pipes.
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def append_tensor(shard: Shard, name: str, target: BinaryIO) -> None:
    """Append one tensor's bytes, as they lie in the shard, to a file open for writing.

    GqaError if the shard is shorter than it was; OSError (a full disk) passes through.
    """
    if not _copied_in_kernel(shard, name, target):
        copy_tensor(shard, name, target)


def _copied_in_kernel(shard: Shard, name: str, target: BinaryIO) -> bool:
    """Whether the kernel has copied the tensor; if not, nothing of it was."""
    if not hasattr(os, "copy_file_range"):  # Linux alone has it
        return False
    entry = shard.tensors[name]
    target.flush()
    copied = 0
    with shard.path.open("rb", buffering=0) as source:
        while copied < entry.nbytes:
            wanted = min(entry.nbytes - copied, _CHUNK_BYTES)
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), wanted, entry.start + copied)
            except OSError as error:
                if copied or error.errno not in _CANNOT:
                    raise
                return False
            if not count:
                if not copied:
                    return False  # the plain copy tells what is wrong with the file, if anything is
                raise GqaError(f"{shard.name} changed while it was read", got="fewer bytes than before")
            copied += count
    return True
