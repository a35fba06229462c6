"""Converts a checkpoint layer by layer; with calibration text, parent and child walk through it side by side.

Every layer of the child is fitted on the child's own hidden states, so that it also makes up for what the layers
before it have lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gqa.config import child_config, parse_config
from gqa.convert import grouping, heads, refine, scores
from gqa.convert.calibrate import BATCH, Block, first_hidden, second_moment
from gqa.convert.merge import METHODS
from gqa.convert.recipe import Recipe
from gqa.progress import Progress, silent
from gqa.weights.layout import AttentionWeights, Layout, TensorsInMemory
from gqa.weights.reader import Checkpoint

# Methods whose closed form is weighted by the calibration activations.
_WEIGHTED = ("svd", "procrustes")

# Why a layer's W_q and W_k were not fitted to the parent's scores.
_NO_SCORES = "W_q and W_k: between them and the scores stands a norm, or ALiBi"


class Engine:
    """`convert(layer)` for every layer in order; `replay(layer, weights)` for those that a former run finished.

    `windows` (N, T) are token ids of calibration text, or None for a data-free conversion.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        config: Mapping[str, Any],
        recipe: Recipe,
        windows: np.ndarray | None,
        progress: Progress = silent,
    ) -> None:
        self.checkpoint, self.layout, self.recipe, self.progress = checkpoint, layout, recipe, progress
        self.parent_config = dict(config)
        self.child_config = child_config(config, recipe.kv_heads)
        self.shapes = parse_config(config, layout.model_type).layers
        self.hidden: tuple[Tensor, Tensor] | None = None  # before the next layer: the parent's, the child's
        if windows is not None and (recipe.method in _WEIGHTED or recipe.refit or recipe.refine_tokens):
            before = {name: checkpoint.read_finite(name) for name in layout.before}
            # float64 checkpoints stay exact; everything else is calibrated in float32.
            self.dtype = torch.float64 if before[layout.embedding].dtype == torch.float64 else torch.float32
            embedded = first_hidden(config, before, windows, layer_path=self._layer_path, dtype=self.dtype)
            self.hidden = (embedded, embedded)

    def convert(self, layer: int) -> tuple[AttentionWeights, dict[str, Any]]:
        """The child's attention of this layer, and a report: the groups and, with calibration text, the relative mean
        squared error of the attention's output in closed form and at the end."""
        weights = self.layout.read_attention(self.checkpoint, layer)
        shape = self.shapes[layer]
        parent = heads.split(weights, shape, self.layout)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + layer)
        if self.hidden is None:
            child, groups = self._merge(parent, None, generator, ordered=shape.alibi)
            return heads.join(child, weights, shape, self.layout), {"layer": layer, "groups": groups}

        parent_hidden, child_hidden = self.hidden
        block = self._block(layer, self.parent_config, weights)
        targets = _attention_output(block, block.attention_input(parent_hidden))
        inputs = block.attention_input(child_hidden)
        moment = second_moment(inputs, biased=parent.k.shape[-1] > inputs.shape[-1])
        child, groups = self._merge(parent, moment, generator, ordered=shape.alibi)
        report: dict[str, Any] = {"layer": layer, "groups": groups}

        if self.recipe.refit and (parent.norm is not None or shape.alibi):
            report["not_refitted"] = _NO_SCORES
        elif self.recipe.refit:
            some = slice(0, max(1, scores.SCORE_TOKENS // inputs.shape[1]))
            parent_inputs = block.attention_input(parent_hidden[some])
            child = self._refit_scores(
                child, parent, groups, inputs[some], parent_inputs, block.positions(inputs, shape)
            )
        student = self._block(layer, self.child_config, heads.join(child, weights, shape, self.layout))
        if self.recipe.refit:
            refine.refit(student, inputs, targets)
        report["closed_form_error"] = report["output_error"] = refine.output_error(student, inputs, targets)
        if self.recipe.refine_tokens:
            some = slice(0, max(BATCH, self.recipe.refine_tokens // inputs.shape[1]))
            refine.refine(
                student,
                inputs[some],
                targets[some],
                steps=self.recipe.refine_steps,
                learning_rate=self.recipe.refine_learning_rate,
                generator=generator,
                progress=self.progress,
                stage=f"refine layer {layer + 1}/{len(self.shapes)}",
            )
            refine.refit(student, inputs, targets)
            report["output_error"] = refine.output_error(student, inputs, targets)
        converted = self._as_stored(layer, self._attention_of(layer, student))
        self.replay(layer, converted)
        return converted, report

    def replay(self, layer: int, weights: AttentionWeights) -> None:
        """Advance the calibration activations through a layer that is converted already."""
        if self.hidden is not None:
            parent_hidden, child_hidden = self.hidden
            block = self._block(layer, self.parent_config, self.layout.read_attention(self.checkpoint, layer))
            student = self._block(layer, self.child_config, weights)
            self.hidden = (block.forward(parent_hidden), student.forward(child_hidden))

    def _merge(
        self, parent: heads.Heads, moment: Tensor | None, generator: torch.Generator, *, ordered: bool
    ) -> tuple[heads.Heads, grouping.Groups]:
        """ordered: query heads must keep their numbers, to which something belongs that no tensor holds."""
        if self.recipe.grouping == "search" and not ordered:
            groups = grouping.search(parent, moment, self.recipe.kv_heads, generator)
        else:
            groups = grouping.contiguous(len(parent.k), self.recipe.kv_heads)
        method = METHODS[self.recipe.method]
        return heads.together([method(parent.select(group), moment, generator) for group in groups]), groups

    def _refit_scores(
        self,
        child: heads.Heads,
        parent: heads.Heads,
        groups: grouping.Groups,
        inputs: Tensor,
        parent_inputs: Tensor,
        where: scores.Positions,
    ) -> heads.Heads:
        fitted = [
            scores.refit_scores(child.select([index]), parent.select(group), inputs, parent_inputs, where)
            for index, group in enumerate(groups)
        ]
        return heads.together(fitted)

    def _block(self, layer: int, config: Mapping[str, Any], attention: AttentionWeights) -> Block:
        prefix = self.layout.layer_prefix(layer)
        tensors = {
            n.removeprefix(prefix): self.checkpoint.read_finite(n)
            for n in self.checkpoint.names
            if n.startswith(prefix)
        }
        attention_tensors = self.layout.attention_tensors(layer, attention)
        tensors |= {n.removeprefix(prefix): tensor for n, tensor in attention_tensors.items()}
        return Block(
            config,
            layer,
            self.layout.as_module(tensors),
            layer_path=self._layer_path,
            attention_path=self.layout.attention_path,
            output_path=self.layout.modules["o"],
            dtype=self.dtype,
        )

    @property
    def _layer_path(self) -> str:
        return self.layout.layer_prefix(0).rstrip(".")

    def _attention_of(self, layer: int, block: Block) -> AttentionWeights:
        prefix = self.layout.layer_prefix(layer)
        state = {prefix + name: tensor for name, tensor in block.block.state_dict().items()}
        return self.layout.read_attention(TensorsInMemory(state), layer)

    def _as_stored(self, layer: int, weights: AttentionWeights) -> AttentionWeights:
        """The weights rounded to the checkpoint's dtypes: later layers make up for the rounding too, and are fitted on
        the same numbers when a former run's layers are replayed."""
        fields = {
            field: None if tensor is None else tensor.to(self.checkpoint.dtype(self.layout.tensor_name(layer, field)))
            for field, tensor in vars(weights).items()
        }
        return AttentionWeights(**fields)  # type: ignore[arg-type]


@torch.no_grad()
def _attention_output(block: Block, inputs: Tensor) -> Tensor:
    return torch.cat([block.attend(batch) for batch in inputs.split(BATCH)])
