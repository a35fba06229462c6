"""Converts a checkpoint layer by layer; with calibration text, parent and child walk through it side by side.

Every layer of the child is fitted on the child's own hidden states, so that it also makes up for what the layers
before it have lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gqa.config import child_config, parse_config, text_part
from gqa.convert import grouping, heads, refine, scores
from gqa.convert.calibrate import BATCH, Block, first_hidden, hidden_errors, second_moment, token_weights
from gqa.convert.merge import METHODS
from gqa.convert.pool import groups_of, layer_seed, pool
from gqa.convert.recipe import Recipe
from gqa.convert.states import States, Store, head, tail
from gqa.progress import Progress, silent
from gqa.weights.layout import AttentionWeights, Layout, TensorsInMemory
from gqa.weights.reader import Checkpoint

# Methods whose closed form is weighted by the calibration activations.
_WEIGHTED = ("svd", "procrustes")

# Why a layer's W_q and W_k were not fitted to the parent's scores.
_NO_SCORES = "W_q and W_k: between them and the scores stands a norm of all heads together, or ALiBi"


class Engine:
    """`convert(layer)` for every layer in order; `replay(layer, weights)` for those that a former run finished.

    `windows` (N, T) are token ids of calibration text, or None for a data-free conversion. Its activations are kept
    in the memory of `device`, which calculates, or in files of the folder `states`. `at` is the layer that comes next:
    `finished`, the count of layers that a former run has converted, or 0 where the activations before that layer are
    not there any more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        config: Mapping[str, Any],
        recipe: Recipe,
        windows: np.ndarray | None,
        progress: Progress = silent,
        states: Path | None = None,
        finished: int = 0,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.checkpoint, self.layout, self.recipe, self.progress = checkpoint, layout, recipe, progress
        self.parent_config = dict(text_part(config))
        self.child_config = dict(text_part(child_config(config, recipe.kv_heads)))
        self.shapes = parse_config(config, layout.model_type).layers
        self.hidden: tuple[States, ...] = ()  # before the next layer: the parent's, the child's
        self.at = finished  # without calibration text no layer depends on another
        self._others: tuple[int, dict[str, Tensor]] = (-1, {})
        # float64 checkpoints stay exact; everything else is calibrated in float32.
        self.dtype = torch.float64 if checkpoint.dtype(layout.embedding) == torch.float64 else torch.float32
        self.windows = windows
        fitted = recipe.method in _WEIGHTED or recipe.refit or recipe.refine_tokens
        if windows is not None and (fitted or recipe.measure_tokens):
            self.store = Store(states, device)
            shape = torch.Size((*windows.shape, checkpoint.shape(layout.embedding)[1]))
            self.hidden = self.store.before(finished, ("parent", "child"), shape, self.dtype) if finished else ()
            if not self.hidden:
                self.at = 0
                embedded = self._embedded(windows)
                self.hidden = (embedded, embedded)

    def convert(self, layer: int) -> tuple[AttentionWeights, dict[str, Any]]:
        """The child's attention of this layer, and a report: the groups and, with calibration text, the relative mean
        squared error of the attention's output against what was asked of it, in closed form and at the end, and the
        errors of the hidden states behind the layer."""
        weights = self.layout.read_attention(self.checkpoint, layer)
        shape = self.shapes[layer]
        if self.recipe.baseline:
            pooled = pool(weights, shape, self.layout, self.recipe, layer)
            self.replay(layer, pooled)
            report = {"layer": layer, "groups": groups_of(shape, self.recipe)}
            return pooled, report | (hidden_errors(*self.hidden) if self.hidden else {})
        parent = heads.split(weights.to(self.device), shape, self.layout)
        generator = torch.Generator().manual_seed(layer_seed(self.recipe, layer))
        if not self.hidden:
            child, groups = self._merge(parent, None, generator, ordered=shape.alibi)
            return heads.join(child, weights, shape, self.layout), {"layer": layer, "groups": groups}

        parent_hidden, child_hidden = (head(hidden, self.recipe.windows) for hidden in self.hidden)
        block = self._block(layer, self.parent_config, weights)
        targets = self._keep("targets", self._targets(block, parent_hidden, child_hidden))
        inputs = self._keep("inputs", map(block.attention_input, child_hidden.split(BATCH)))
        token_weight = token_weights(parent_hidden, child_hidden)
        moment = second_moment(inputs, biased=parent.k.shape[-1] > inputs.shape[-1])
        child, groups = self._merge(parent, moment, generator, ordered=shape.alibi)
        report: dict[str, Any] = {"layer": layer, "groups": groups}

        if self.recipe.refit and not scores.can_refit(parent.norm, shape):
            report["not_refitted"] = _NO_SCORES
        elif self.recipe.refit:
            some = slice(0, max(1, scores.score_tokens(inputs.shape[2]) // inputs.shape[1]))
            parent_inputs = block.attention_input(parent_hidden[some])
            child = self._refit_scores(
                child, parent, groups, inputs[some], parent_inputs, block.positions(inputs[:1], shape)
            )
        student = self._block(layer, self.child_config, heads.join(child, weights, shape, self.layout))
        del parent, child, moment  # float64, and not needed any more
        if self.recipe.refit:
            refine.refit(student, inputs, targets, token_weight)
        error = refine.output_error(student, inputs, targets, token_weight)
        report["closed_form_error"] = report["output_error"] = error
        if self.recipe.refine_tokens:
            some = max(BATCH, self.recipe.refine_tokens // inputs.shape[1])
            refine.refine(
                student,
                head(inputs, some),
                head(targets, some),
                token_weight[:some],
                head_dim=shape.head_dim,
                steps=self.recipe.refine_steps,
                learning_rate=self.recipe.refine_learning_rate,
                generator=generator,
                progress=self.progress,
                stage=f"refine layer {layer + 1}/{len(self.shapes)}",
            )
            refine.refit(student, inputs, targets, token_weight)
            report["output_error"] = refine.output_error(student, inputs, targets, token_weight)
        converted = self._as_stored(layer, self._attention_of(layer, student))
        del student, inputs, targets
        self._advance(layer, block, self._block(layer, self.child_config, converted))
        return converted, report | hidden_errors(*self.hidden)

    def replay(self, layer: int, weights: AttentionWeights) -> None:
        """Advance the calibration activations through a layer that is converted already."""
        if self.hidden:
            block = self._block(layer, self.parent_config, self.layout.read_attention(self.checkpoint, layer))
            self._advance(layer, block, self._block(layer, self.child_config, weights))

    def measure(self) -> dict[str, Any]:
        """Parent and child compared on the windows that no fit has seen, once all layers are converted."""
        assert self.windows is not None
        windows = self.windows[self.recipe.windows :]
        last = len(self.shapes) - 1
        block = self._block(last, self.parent_config, self.layout.read_attention(self.checkpoint, last))
        layers = tuple(self.layout.layer_prefix(layer) for layer in range(len(self.shapes)))
        known = block.model.state_dict().keys()
        others = {
            own: self._read(name)
            for name in self.checkpoint.names
            if not name.startswith(layers) and (own := self.layout.in_decoder(name)) in known
        }
        parent, child = (block.next_token_losses(others, tail(hidden, len(windows)), windows) for hidden in self.hidden)
        difference = child - parent
        return {
            "tokens": int(windows.shape[0] * (windows.shape[1] - 1)),
            "perplexity_parent": math.exp(float(parent.mean())),
            "perplexity": math.exp(float(child.mean())),
            "loss_above_parent_nats": float(difference.mean()),
            "loss_above_parent_standard_error_nats": float(difference.std() / len(difference) ** 0.5)
            if len(difference) > 1
            else None,
        }

    def _advance(self, layer: int, block: Block, student: Block) -> None:
        parent_hidden, child_hidden = self.hidden
        after = {
            "parent": map(block.forward, parent_hidden.split(BATCH)),
            "child": map(student.forward, child_hidden.split(BATCH)),
        }
        self.store.forget_before(layer - 1)
        self.hidden = self.store.keep_before(layer + 1, after, len(parent_hidden))
        self.at = layer + 1

    @torch.no_grad()
    def _targets(self, block: Block, parent: States, child: States) -> Iterator[Tensor]:
        """What the child's attention is to give: the parent's output, and what the child's hidden states lack of the
        parent's, where it can be given back: where nothing stands between the attention and the residual stream."""
        scale = self.layout.residual_scale
        for before, own in zip(parent.split(BATCH), child.split(BATCH), strict=True):
            output = block.attend(block.attention_input(before))
            yield output if scale is None else output + (before - own) / scale

    def _keep(self, name: str, batches: Iterable[Tensor]) -> States:
        return self.store.keep(name, batches, self.recipe.windows)

    def _embedded(self, windows: np.ndarray) -> Tensor:
        before = {self.layout.in_decoder(name): self._read(name) for name in self.layout.before}
        return first_hidden(self.parent_config, before, windows, layer_path=self._layer_path, dtype=self.dtype)

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
        own = self.layout.attention_tensors(layer, attention)
        if self._others[0] != layer:  # parent and child share what is not attention
            names = [name for name in self.checkpoint.names if name.startswith(prefix) and name not in own]
            self._others = (-1, {})  # before the next layer's come, not beside them
            self._others = (layer, {name: self._read(name).to(self.dtype) for name in names})
        own = {name: tensor.to(self.device) for name, tensor in own.items()}
        tensors = {name.removeprefix(prefix): tensor for name, tensor in (own | self._others[1]).items()}
        return Block(
            config,
            layer,
            self.layout.as_module(tensors),
            layer_path=self._layer_path,
            attention_path=self.layout.attention_path,
            output_path=self.layout.modules["o"],
            dtype=self.dtype,
            eager=self.layout.eager,
        )

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read_finite(name).to(self.device)

    @property
    def _layer_path(self) -> str:
        return self.layout.in_decoder(self.layout.layer_prefix(0)).rstrip(".")

    def _attention_of(self, layer: int, block: Block) -> AttentionWeights:
        prefix = self.layout.layer_prefix(layer)
        state = {prefix + name: tensor for name, tensor in block.block.state_dict().items()}
        return self.layout.read_attention(TensorsInMemory(state), layer)

    def _as_stored(self, layer: int, weights: AttentionWeights) -> AttentionWeights:
        """The weights rounded to the checkpoint's dtypes: later layers make up for the rounding too, and are fitted on
        the same numbers when a former run's layers are replayed."""
        fields = {
            field: tensor.to("cpu", self.checkpoint.dtype(self.layout.tensor_name(layer, field)))
            for field, tensor in vars(weights).items()
            if tensor is not None
        }
        return AttentionWeights(**fields)  # type: ignore[arg-type]
