"""Calibration text passes through a model one decoder block at a time: only that block's weights are in memory.

The blocks are transformers' own, built with a single layer and without weights, so that norms, rotary embeddings,
masks and windows are exactly those of the model that will be served.

Letters: N windows · T tokens per window · d hidden size · E = d, or d + 1 with a bias column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gqa.convert.scores import Positions

# Windows per forward pass: enough to fill two cores, small enough for any hidden size.
BATCH = 8


class _SeenError(Exception):
    """Leaves a forward pass once what was wanted has been seen."""


class Block:
    """Decoder block `layer` of the model that `config` (a raw config.json) describes, with these weights.

    `tensors` are the block's, named as in the checkpoint without the layer's prefix
    (`self_attn.q_proj.weight`); `layer_path` and `attention_path` say where block and attention sit.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        layer: int,
        tensors: Mapping[str, Tensor],
        *,
        layer_path: str,
        attention_path: str,
        output_path: str,
        dtype: torch.dtype,
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = dict(config)
        whole = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
        # Layers may differ (sliding windows): the single layer that is built must be of this layer's kind.
        kinds = getattr(whole, "layer_types", None)
        single = {**config, "num_hidden_layers": 1} | ({"layer_types": [kinds[layer]]} if kinds else {})
        single_config = AutoConfig.for_model(str(single.pop("model_type")), **single)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(single_config, attn_implementation="sdpa", dtype=dtype)
        model.eval()
        self.decoder: nn.Module = model.base_model
        self.block: nn.Module = model.get_submodule(layer_path)
        self.attention: nn.Module = self.block.get_submodule(attention_path)
        output = self.block.get_submodule(output_path)
        assert isinstance(output, nn.Linear)
        self.output = output
        self._arguments: dict[tuple[int, ...], dict[str, Any]] = {}
        missing, unexpected = self.block.load_state_dict(
            {name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False, assign=True
        )
        assert not missing, f"the checkpoint's block lacks {missing}"
        assert not unexpected or all(name.endswith("inv_freq") for name in unexpected), unexpected

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states before the block -> after it: (N, T, d) -> (N, T, d)."""
        return torch.cat([self._run(batch, self.block, before=False)[0] for batch in hidden.split(BATCH)])

    @torch.no_grad()
    def attention_input(self, hidden: Tensor) -> Tensor:
        """Hidden states before the block -> what its attention is given, after the norm: (N, T, d) -> (N, T, d)."""
        return torch.cat([self._run(batch, self.attention, before=True)[0] for batch in hidden.split(BATCH)])

    def attend(self, inputs: Tensor) -> Tensor:
        """The attention alone: (n, T, d) -> (n, T, d), with gradients where the caller wants them."""
        return self.attention(inputs, **self._arguments_of(inputs))[0]

    def positions(self, inputs: Tensor) -> Positions:
        """Rotary turns, visible keys and scale of this attention, for windows like `inputs` (n, T, d)."""
        arguments = self._arguments_of(inputs[:1])
        T = inputs.shape[1]
        cos, sin = (part[0, :, : part.shape[-1] // 2] for part in arguments["position_embeddings"])
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        mask = arguments["attention_mask"]
        if mask is not None:  # without one, sdpa is told to be causal
            visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        scale = self.attention.scaling
        assert isinstance(scale, float)
        return Positions(torch.complex(cos, sin).to(inputs.dtype.to_complex()), visible, scale)

    def _arguments_of(self, inputs: Tensor) -> dict[str, Any]:
        size = inputs.shape[:2]
        if size not in self._arguments:  # masks and rotary angles depend on the batch's size alone
            with torch.no_grad():
                self._arguments[size] = self._run(torch.zeros_like(inputs), self.attention, before=True)[1]
        return self._arguments[size]

    def _run(self, hidden: Tensor, module: nn.Module, *, before: bool) -> tuple[Tensor, dict[str, Any]]:
        """Run the decoder until `module` and return its first input or output and its other keyword arguments."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any], *output: Any) -> None:
            kwargs = dict(kwargs)
            first = args[0] if args else kwargs.pop("hidden_states")
            if output:
                first = output[0][0] if isinstance(output[0], tuple) else output[0]
            seen.append((first, kwargs))
            raise _SeenError

        if before:
            handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        else:
            handle = module.register_forward_hook(catch, with_kwargs=True)
        try:
            self.decoder(inputs_embeds=hidden, use_cache=False)
        except _SeenError:
            return seen[0]
        finally:
            handle.remove()
        raise AssertionError("the decoder never reached the module")


def second_moment(inputs: Tensor, *, biased: bool) -> Tensor:
    """E[x xT] in float64 over all tokens: (N, T, d) -> (E, E); with biases x has a last entry of 1."""
    count, d = inputs.shape[0] * inputs.shape[1], inputs.shape[-1]
    moment = torch.zeros(d + biased, d + biased, dtype=torch.float64)
    for batch in inputs.split(BATCH):
        rows = batch.reshape(-1, d).double()
        if biased:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        moment += rows.T @ rows
    return moment / count
