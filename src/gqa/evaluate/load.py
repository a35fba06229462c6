"""A checkpoint folder -> a loaded transformers model that is what the folder says, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gqa.device import check_device, default_device
from gqa.errors import GqaError
from gqa.quiet import quiet_transformers
from gqa.weights.reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: str | None = None, processes: int = 1
) -> PreTrainedModel:
    """Load a causal language model for measuring, in eval mode, from local safetensors only.

    device: `cuda` where there is one, else `cpu`. dtype: as stored on a GPU; fp32 on a CPU, where half precision is
    slower and its rounding would add to what is measured. processes: of a torch.distributed group that all call this;
    each then holds a shard of every weight (FSDP2).
    Raises GqaError for a device that is not here or too small, for what Checkpoint refuses (no folder, pickles, missing
    or truncated shards, quantised), for an architecture that transformers does not know, and for weights that do not
    fill the model: transformers would only warn and go on with random numbers.
    """
    device = device or default_device()
    check_device(device)
    Checkpoint(folder)
    from transformers import AutoModelForCausalLM

    sharded = {} if processes == 1 else _sharded(processes)
    wanted = dtype or (torch.float32 if device == "cpu" else "auto")
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=wanted,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in the report, and refused below
                **sharded,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise GqaError("transformers cannot load the model", got=f"{folder}: {error}") from error
    model, report = loaded
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    if missing or mismatched:
        raise GqaError(
            "the weights do not fit the config",
            got=f"{folder}: {len(missing)} tensors missing, {len(mismatched)} of another shape, "
            f"the first {(missing + mismatched)[0]}",
            allowed="every tensor of the architecture, in the shape that config.json gives",
        )
    try:
        return (model if sharded else model.to(device)).eval()
    except torch.OutOfMemoryError as error:
        raise GqaError("the model does not fit on the device", got=str(error).splitlines()[0]) from None


def _sharded(processes: int) -> dict[str, Any]:
    from transformers import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes)}
