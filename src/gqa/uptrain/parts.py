"""Which weights an uptraining moves, and how they come back into the model that is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gqa.errors import GqaError
from gqa.uptrain.processes import Processes
from gqa.uptrain.settings import Settings
from gqa.weights.layout import load_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose(model: PreTrainedModel, config: dict[str, Any], settings: Settings) -> None:
    """Leave `requires_grad` on what settings.train says; for `lora`, put low-rank updates beside the projections.

    config: the raw config.json. Raises GqaError where the architecture's attention is not known, or without `peft`.
    """
    if settings.train == "all":
        return
    modules = tuple(load_layout(model.config.model_type, config).modules.values())
    if settings.train == "attention":
        for name, parameter in model.named_parameters():
            # Named from the layer on: what stands before it depends on how a model is wrapped.
            parameter.requires_grad_(any(f".{module}." in f"{name}." for module in modules))
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise GqaError("low-rank updates need the package peft", hint="pip install peft") from None
    projections = [module for module in modules if _is_projection(model, module)]
    rank = settings.lora_rank
    torch.manual_seed(settings.seed)  # the same first values in every process
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections), model)


def average_gradients(model: torch.nn.Module, world: Processes) -> None:
    """The mean over processes of the gradients that FSDP does not average: those of weights that it does not shard,
    such as low-rank updates."""
    if world.count == 1:
        return
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad = world.mean(parameter.grad)


@torch.no_grad()
def write_back(model: PreTrainedModel, fresh: PreTrainedModel | None) -> None:
    """Put what was trained into `fresh`, the model as it was loaded, whole: one weight after another, so that no
    second model is needed. All processes call this, and the first one alone has a `fresh`.

    Low-rank updates are added up: `W' = W + scale * B A`.
    """
    from torch.distributed.tensor import DTensor

    for name, part in model.named_modules():
        if fresh is not None and hasattr(part, "get_delta_weight"):
            fresh.get_submodule(name).weight += part.get_delta_weight("default")  # pyright: ignore
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if fresh is not None:
                fresh.get_parameter(name).copy_(whole)


def _is_projection(model: PreTrainedModel, module: str) -> bool:
    return any(
        name.endswith(f".{module}") and isinstance(part, torch.nn.Linear) for name, part in model.named_modules()
    )
