"""One conversion worked out before it begins: what is read, what is written, and the room that takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gqa.config import ModelShape, child_config, kv_head_choices, parse_config
from gqa.convert.memory import peak_memory_bytes
from gqa.convert.recipe import Recipe
from gqa.errors import GqaError
from gqa.source import Source
from gqa.weights.header import TensorEntry
from gqa.weights.layout import Layout, load_layout
from gqa.weights.reader import Checkpoint
from gqa.weights.writer import file_bytes, in_file_order


@dataclass(frozen=True)
class Job:
    """A checked conversion. `changes` maps a layer to the tensors that may differ from the parent's; `shards` maps a
    file of the result to its tensors, in the order of their bytes."""

    source: Source
    recipe: Recipe
    checkpoint: Checkpoint
    layout: Layout
    parent: ModelShape
    child: ModelShape
    config: Mapping[str, Any]  # config.json of the result
    changes: Mapping[int, tuple[TensorEntry, ...]]
    shards: Mapping[str, tuple[TensorEntry, ...]]

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def identity(self) -> bool:
        """The parent has that many KV heads already: every tensor is copied."""
        return not self.changes

    @property
    def repeats(self) -> bool:
        """More KV heads are wanted than the parent has: each is repeated, and nothing is lost or looked at."""
        return self.recipe.kv_heads > self.parent.kv_heads

    @property
    def exact(self) -> bool:
        """The result computes what its parent computes, whatever the method."""
        return self.identity or self.repeats

    @property
    def pooled(self) -> bool:
        """Layers are computed while they are written: nothing of them waits in the work folder."""
        looks = self.recipe.measure_tokens or self.recipe.distill_tokens
        return (self.recipe.baseline and not looks) or self.repeats

    @property
    def distills(self) -> bool:
        """All attentions are trained together once their layers are converted."""
        return bool(self.recipe.distill_tokens) and not self.exact

    def metadata(self, shard: str) -> dict[str, str]:
        """What the header of a file says beside its tensors; transformers wants the format told."""
        parent = next(one for one in self.checkpoint.shards if one.name == shard)
        return {**parent.metadata, "format": "pt"}

    def shard_bytes(self, shard: str) -> int:
        return file_bytes(self.shards[shard], self.metadata(shard))

    def work_bytes(self, layer: int) -> int:
        """Upper bound of a layer's files in the work folder: before a distillation, and after it."""
        return 0 if self.pooled else file_bytes(self.changes[layer], {}) * (2 if self.distills else 1)

    @property
    def output_bytes(self) -> int:
        return sum(map(self.shard_bytes, self.shards))

    @property
    def peak_disk_bytes(self) -> int:
        """The most that lies on the disk at one time: a layer's file goes once the shards it feeds are complete."""
        waiting = {layer: {entry.name for entry in entries} for layer, entries in self.changes.items()}
        files = sum(map(self.work_bytes, waiting))
        peak = done = 0
        for shard, entries in self.shards.items():
            done += self.shard_bytes(shard)
            peak = max(peak, done + files)
            for layer in list(waiting):
                waiting[layer] -= {entry.name for entry in entries}
                if not waiting[layer]:
                    del waiting[layer]
                    files -= self.work_bytes(layer)
        return peak

    def describe(self) -> dict[str, Any]:
        """The plan as data, for `--dry-run`."""
        recipe = self.recipe
        steps = [] if self.identity else self._steps()
        return {
            "model": self.source.name,
            "layers": [
                {
                    "layer": layer,
                    "kv_heads_parent": self.parent.layers[layer].kv_heads,
                    "kv_heads": self.child.layers[layer].kv_heads,
                    "steps": steps,
                    "bytes_read": sum(entry.nbytes for entry in self.attention(layer)),
                    "bytes_written": sum(entry.nbytes for entry in entries),
                    "tensors": [entry.name for entry in entries],
                }
                for layer, entries in self.changes.items()
            ],
            "tensors": len(self.checkpoint.names),
            "tensors_copied": len(self.checkpoint.names) - sum(map(len, self.changes.values())),
            "bytes_parent": self.checkpoint.nbytes,
            "bytes": self.output_bytes,
            "free_space_needed_bytes": self.peak_disk_bytes,
            "peak_memory_bytes_estimate": peak_memory_bytes(self, streamed=False),
            "peak_memory_bytes_streamed_estimate": peak_memory_bytes(self, streamed=True),
            "shards": {shard: self.shard_bytes(shard) for shard in self.shards},
            "recipe": recipe.to_dict(),
        }

    def identify(self, windows: Any, distill_windows: Any = None) -> dict[str, Any]:
        """What decides the result: the recipe, the parent's files, the calibration text and that of a distillation."""
        config = json.dumps(self.source.config, sort_keys=True)
        identity = {
            "recipe": self.recipe.to_dict(),
            "source": {"config_sha256": _sha256(config.encode()), "shards": self.checkpoint.fingerprint()},
            "calibration": _describe_windows(windows),
        }
        return identity if distill_windows is None else identity | {"distillation": _describe_windows(distill_windows)}

    def attention(self, layer: int) -> list[TensorEntry]:
        """The parent's tensors of an attention."""
        names = self.layout.attention_shapes(self.parent, layer)
        return [self.checkpoint.entry(name) for name in names if name in self.checkpoint]

    def _steps(self) -> list[str]:
        recipe = self.recipe
        if self.repeats:
            return [f"repeat each KV head {recipe.kv_heads // self.parent.kv_heads} times"]
        steps = [f"group heads ({recipe.grouping})", f"merge ({recipe.method})"]
        if recipe.refit:
            steps += ["refit W_q and W_k", "refit W_o"]
        if recipe.refine_tokens:
            steps += [f"refine on {recipe.refine_tokens} tokens, {recipe.refine_steps} steps", "refit W_o"]
        if recipe.distill_tokens:
            steps.append(f"distill all attentions together on {recipe.distill_tokens} tokens")
        if recipe.answers:
            steps.append(f"compare the answers to {recipe.answers} prompts with the parent's")
        if recipe.measure_tokens:
            steps.append(f"compare with the parent on {recipe.measure_tokens} further tokens")
        return steps


def plan_conversion(source: Source, recipe: Recipe) -> Job:
    """Check everything that can be checked without touching a weight, and work out the conversion.

    Raises GqaError for a configuration, checkpoint or recipe that cannot be converted. Writes nothing.
    """
    assert source.folder is not None, "a source with weights: open_checkpoint"
    parent = parse_config(source.config, source.name)
    layout = load_layout(parent.model_type, source.config)
    _check_kv_heads(parent, recipe.kv_heads)
    checkpoint = Checkpoint(source.folder)
    layout.check(checkpoint, parent)

    config = child_config(source.config, recipe.kv_heads)
    # Remote code is never copied, and a folder that names it would ask for it.
    config.pop("auto_map", None)
    child = parse_config(config, source.name)
    changes: dict[int, tuple[TensorEntry, ...]] = {}
    if recipe.kv_heads != parent.kv_heads:
        for layer in range(len(child.layers)):
            shapes = layout.attention_shapes(child, layer)
            pooled = (recipe.baseline and not recipe.distill_tokens) or recipe.kv_heads > parent.kv_heads
            names = layout.changing(layer, pooled=pooled)
            changes[layer] = tuple(
                replace(checkpoint.entry(name), shape=shapes[name]) for name in names if name in checkpoint
            )
    changed = {entry.name: entry for entries in changes.values() for entry in entries}
    shards = {
        shard.name: tuple(in_file_order(changed.get(name, entry) for name, entry in shard.tensors.items()))
        for shard in checkpoint.shards
    }
    return Job(source, recipe, checkpoint, layout, parent, child, config, changes, shards)


def _check_kv_heads(parent: ModelShape, kv_heads: int) -> None:
    """Heads are merged or repeated, never made: a divisor of the parent's KV heads, or a multiple of them that divides
    the query heads."""
    have, queries = parent.kv_heads, parent.query_heads
    choices = kv_head_choices(have) + tuple(n for n in kv_head_choices(queries) if n > have and not n % have)
    if kv_heads in choices:
        return
    if kv_heads > queries:
        what = f"{kv_heads} KV heads are more than the {queries} query heads"
    elif queries % kv_heads:
        what = f"{kv_heads} KV heads do not divide {queries} query heads"
    elif kv_heads > have:
        what = f"{kv_heads} KV heads are no multiple of the {have} there are"
    else:
        what = f"{kv_heads} KV heads do not divide the {have} there are"
    nearest = min(choices, key=lambda choice: abs(choice - kv_heads))
    raise GqaError(
        what,
        allowed=", ".join(map(str, choices)),
        hint=f"gqa convert <the same arguments> --kv-heads {nearest}",
    )


def _describe_windows(windows: Any) -> dict[str, Any] | None:
    return None if windows is None else {"windows": list(windows.shape), "sha256": _sha256(windows.tobytes())}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
