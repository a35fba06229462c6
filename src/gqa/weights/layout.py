"""Which tensor plays which role: architectures are data, one file in `layouts/` each.

Letters: H KV heads, G queries per KV head, D head dim of q and k, Dv head dim of v.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

import torch

from gqa.config import ModelShape
from gqa.errors import GqaError
from gqa.weights.reader import Checkpoint

# Arithmetic on anything else (integers, fp8 codes) would not be a conversion.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """What tensors are read from: a Checkpoint, or several files seen as one."""

    def __contains__(self, name: object) -> bool: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one attention, as torch.nn.Linear holds them: weight (out, in), bias (out,) or None."""

    q: torch.Tensor  # (H*G*D, hidden)
    k: torch.Tensor  # (H*D, hidden)
    v: torch.Tensor  # (H*Dv, hidden)
    o: torch.Tensor  # (hidden, H*G*Dv)
    q_bias: torch.Tensor | None = None  # (H*G*D,)
    k_bias: torch.Tensor | None = None  # (H*D,)
    v_bias: torch.Tensor | None = None  # (H*Dv,)
    o_bias: torch.Tensor | None = None  # (hidden,)


@dataclass(frozen=True)
class Layout:
    """One architecture. `rotary` says which pairs a frequency f turns: "half" is (f, f + D/2)."""

    model_type: str
    rotary: str
    embedding: str  # the tensor that turns token ids into the first hidden states
    layer: str
    modules: Mapping[str, str]  # role (q, k, v, o) -> module within the layer
    untouched: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with: `model.layers.3.`"""
        return self.layer.format(layer=layer)

    def tensor_name(self, layer: int, field: str) -> str:
        """The tensor of a field of AttentionWeights: `k` -> `....k_proj.weight`, `k_bias` -> `....k_proj.bias`."""
        role, _, bias = field.partition("_")
        return f"{self.layer_prefix(layer)}{self.modules[role]}.{bias or 'weight'}"

    @property
    def attention_path(self) -> str:
        """The attention module within a layer: `self_attn`."""
        return self.modules["q"].rpartition(".")[0]

    def read_attention(self, checkpoint: TensorSource, layer: int) -> AttentionWeights:
        """Read a layer's projections in the dtype they are stored in; only these tensors are in memory.

        Raises GqaError for a missing tensor, one that is not floating point, and NaN or infinite values.
        """
        tensors: dict[str, torch.Tensor | None] = {}
        for field in _FIELDS:
            name = self.tensor_name(layer, field)
            if field.endswith("_bias") and name not in checkpoint:
                tensors[field] = None
                continue
            tensor = checkpoint.read(name)
            if not torch.isfinite(tensor).all():
                raise GqaError(f"tensor {name} holds NaN or infinite values", allowed="finite weights")
            tensors[field] = tensor
        return AttentionWeights(**tensors)  # type: ignore[arg-type]

    def attention_tensors(self, layer: int, weights: AttentionWeights) -> dict[str, torch.Tensor]:
        """The same projections under the names of the checkpoint; absent biases are left out."""
        named = {self.tensor_name(layer, field): getattr(weights, field) for field in _FIELDS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def attention_shapes(self, shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
        """The shape that the configuration gives every projection of a layer, biases included, by tensor name."""
        heads = shape.layers[layer]
        rows = {
            "q": heads.query_heads * heads.head_dim,
            "k": heads.kv_heads * heads.head_dim,
            "v": heads.kv_heads * heads.v_head_dim,
            "o": shape.hidden,
        }
        columns = {**dict.fromkeys("qkv", shape.hidden), "o": heads.query_heads * heads.v_head_dim}
        sizes = {role: (rows[role], columns[role]) for role in rows} | {f"{r}_bias": (rows[r],) for r in rows}
        return {self.tensor_name(layer, field): size for field, size in sizes.items()}

    def check(self, checkpoint: Checkpoint, shape: ModelShape) -> None:
        """Compare every tensor this layout knows with the configuration: names, shapes, dtypes.

        Raises GqaError naming the tensor, its shape and the expected one; also for tensors within an attention
        that the layout does not know, as they would be copied although their meaning has changed.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for layer in range(len(shape.layers)):
            projections = self.attention_shapes(shape, layer)
            expected |= projections
            for name in projections:
                if name in checkpoint and checkpoint.dtype(name) not in _FLOATS:
                    raise GqaError(f"tensor {name} is not floating point", got=checkpoint.entry(name).dtype)
                if name.endswith(".weight") and name not in checkpoint:
                    raise GqaError(
                        f"the checkpoint has no tensor {name}",
                        got=f"{len(checkpoint.names)} tensors in {checkpoint.folder}",
                        allowed=f"the tensors of a {self.model_type} model of {len(shape.layers)} layers",
                    )
            self._refuse_unknown(checkpoint, layer, projections)
        beyond = self.layer_prefix(len(shape.layers))
        if any(name.startswith(beyond) for name in checkpoint.names):
            raise GqaError(
                f"the checkpoint has tensors of {beyond}*", allowed=f"{len(shape.layers)} layers (config.json)"
            )
        expected |= self._other_shapes(shape)
        for name, size in expected.items():
            if name in checkpoint and checkpoint.shape(name) != size:
                raise GqaError(
                    f"tensor {name} has the wrong shape",
                    got=list(checkpoint.shape(name)),
                    allowed=f"{list(size)}, as config.json says",
                )

    def _refuse_unknown(self, checkpoint: Checkpoint, layer: int, known: Mapping[str, object]) -> None:
        prefix = self.layer_prefix(layer)
        parents = {prefix + module.rpartition(".")[0] + "." for module in self.modules.values()}
        untouched = {prefix + name for name in self.untouched}
        for name in checkpoint.names:
            if name.startswith(tuple(parents)) and name not in known and name not in untouched:
                raise GqaError(
                    f"tensor {name} is not part of a {self.model_type} attention",
                    allowed=", ".join(sorted(known)),
                )

    def _other_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        return {
            template.format(layer=layer): tuple(getattr(shape, dimension) for dimension in dimensions)
            for template, dimensions in self.shapes.items()
            for layer in range(len(shape.layers) if "{layer}" in template else 1)
        }


_FIELDS = tuple(AttentionWeights.__dataclass_fields__)


def load_layout(model_type: str) -> Layout:
    """The layout of a `model_type` of config.json. GqaError names the known ones, and why some cannot be."""
    layouts = _layouts()
    if model_type in layouts:
        return layouts[model_type]
    unsupported = tomllib.loads(_data().joinpath("unsupported.toml").read_text(encoding="utf-8"))
    if model_type in unsupported:
        raise GqaError(
            f"{model_type} cannot have fewer KV heads: {unsupported[model_type]}", allowed=", ".join(layouts)
        )
    raise GqaError("an unknown architecture", got=f"model_type {model_type!r}", allowed=", ".join(layouts))


@functools.cache
def _layouts() -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for file in sorted(_data().joinpath("layouts").iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".toml"):
            continue
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        attention = table["attention"]
        for model_type in table["model_types"]:
            found[model_type] = Layout(
                model_type=model_type,
                rotary=attention["rotary"],
                embedding=table["embedding"],
                layer=attention["layer"],
                modules={role[0]: attention[role] for role in ("query", "key", "value", "output")},
                untouched=tuple(attention["untouched"]),
                shapes={name: tuple(dimensions) for name, dimensions in table["shapes"].items()},
                notes=tuple(table["notes"]),
            )
    return found


def _data():
    return resources.files("gqa.weights")
