"""Which tensor plays which role: architectures are data, one file in `layouts/` each.

Letters: H KV heads, G queries per KV head, D head dim of q and k, Dv head dim of v.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Protocol

import torch

from gqa.config import LayerShape, ModelShape, parse_config, text_part
from gqa.errors import GqaError
from gqa.weights.finite import all_finite
from gqa.weights.reader import Checkpoint

# Arithmetic on anything else (integers, fp8 codes) would not be a conversion.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """What tensors are read from: a Checkpoint, or several files seen as one."""

    def __contains__(self, name: object, /) -> bool: ...

    def read(self, name: str) -> torch.Tensor: ...


class TensorsInMemory(dict[str, torch.Tensor]):
    """A TensorSource of tensors that are in memory."""

    def read(self, name: str) -> torch.Tensor:
        return self[name]


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one attention, as torch.nn.Linear holds them: weight (out, in), bias (out,) or None; and
    what else belongs to a head."""

    q: torch.Tensor  # (H*G*D, hidden)
    k: torch.Tensor  # (H*D, hidden)
    v: torch.Tensor  # (H*Dv, hidden)
    o: torch.Tensor  # (hidden, H*G*Dv)
    q_bias: torch.Tensor | None = None  # (H*G*D,)
    k_bias: torch.Tensor | None = None  # (H*D,)
    v_bias: torch.Tensor | None = None  # (H*Dv,)
    o_bias: torch.Tensor | None = None  # (hidden,)
    q_norm: torch.Tensor | None = None  # (D,), (H*G*D,) or (H*G, D): see Norm
    k_norm: torch.Tensor | None = None  # (D,), (H*D,) or (H, D)
    sinks: torch.Tensor | None = None  # (H*G,)

    def to(self, device: str) -> AttentionWeights:
        """The same in the memory of a device."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Norm:
    """A norm of queries and keys between projection and rotary embedding.

    kind: `rms`, or `layer` (which also takes off the mean). over: `head`, each head by itself, or `width`, all heads
    as one vector. shared: all heads have one weight (D,). The norm multiplies by the stored weight plus `offset`.
    """

    kind: Literal["rms", "layer"]
    over: Literal["head", "width"]
    shared: bool
    offset: int = 0
    optional: bool = False  # only some checkpoints have it


@dataclass(frozen=True)
class Layout:
    """One architecture. The meaning of every key is told in docs/ARCHITECTURES.md."""

    model_type: str
    rotary: Literal["half", "interleaved", "none"]  # which rows of a head make the pair that a frequency turns
    embedding: str  # the tensor that turns token ids into the first hidden states
    layer: str
    modules: Mapping[str, str]  # role (q, k, v, o) -> module within the layer
    untouched: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    norm: Norm | None = None
    positions: str | None = None  # the tensor of learned positions, added to the embeddings
    stacked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fused: Literal["", "roles", "groups"] = ""  # how q, k and v lie in one tensor, if they do
    heads: LayerShape | None = None  # of a fused layout: without it rows could not be told apart
    decoder: str = ""  # of a multimodal model: what stands before the names of its text decoder's tensors
    residual_scale: float | None = None  # of the attention's output on its way there; None: it meets a norm first
    eager: bool = False  # scores meet something that torch's own attention cannot do: soft caps, sinks

    @property
    def before(self) -> tuple[str, ...]:
        """The tensors that make the hidden states before the first layer."""
        return (self.embedding,) if self.positions is None else (self.embedding, self.positions)

    def in_decoder(self, name: str) -> str:
        """A name of the checkpoint as the text decoder alone would have it."""
        return name.removeprefix(self.decoder)

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with: `model.layers.3.`"""
        return self.layer.format(layer=layer)

    def tensor_name(self, layer: int, field: str) -> str:
        """The tensor of a field of AttentionWeights: `k` -> `....k_proj.weight`, `k_bias` -> `....k_proj.bias`."""
        if field in self.modules and field not in "qkvo":
            suffix = "" if field == "sinks" else ".weight"
            return f"{self.layer_prefix(layer)}{self.modules[field]}{suffix}"
        role, _, bias = field.partition("_")
        return f"{self.layer_prefix(layer)}{self.modules[role]}.{bias or 'weight'}"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of AttentionWeights that this architecture may have."""
        return tuple(field for field in _FIELDS if field not in _EXTRAS or field in self.modules)

    @property
    def attention_path(self) -> str:
        """The attention module within a layer: `self_attn`."""
        return self.modules["q"].rpartition(".")[0]

    def changing(self, layer: int, *, pooled: bool) -> list[str]:
        """The tensors of a layer that a conversion may change; one that only pools leaves queries and output alone."""
        kept = {"q", "q_bias", "o", "o_bias", "q_norm", "sinks"} if pooled else set()
        if pooled and self.norm is not None and self.norm.shared:
            kept.add("k_norm")
        return list(dict.fromkeys(self.tensor_name(layer, field) for field in self.fields if field not in kept))

    def as_module(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A layer's tensors, named without its prefix, as transformers' module holds them: experts that lie one by one
        in the checkpoint are one tensor there (experts, out, in), those of several projections one above the other."""
        rest = dict(tensors)
        for target, templates in self.stacked.items():
            experts = []
            while (names := [template.format(expert=len(experts)) for template in templates])[0] in rest:
                experts.append(torch.cat([rest.pop(name) for name in names]))
                if names == list(templates):  # renamed, not stacked
                    break
            if experts:
                rest[target] = experts[0] if templates[0].format(expert=0) == templates[0] else torch.stack(experts)
        return rest

    def read_attention(self, checkpoint: TensorSource, layer: int) -> AttentionWeights:
        """Read a layer's projections in the dtype they are stored in; only these tensors are in memory.

        Raises GqaError for a missing tensor, one that is not floating point, and NaN or infinite values.
        """
        tensors: dict[str, torch.Tensor | None] = {}
        for name, fields in self._fields_of(layer).items():
            if name not in checkpoint and fields[0] not in "qkvo":
                continue
            tensor = checkpoint.read(name)
            if not all_finite(tensor):
                raise GqaError(f"tensor {name} holds NaN or infinite values", allowed="finite weights")
            parts = (tensor,) if len(fields) == 1 else self._parted(tensor)
            tensors |= dict(zip(fields, parts, strict=True))
        return AttentionWeights(**tensors)  # type: ignore[arg-type]

    def attention_tensors(self, layer: int, weights: AttentionWeights) -> dict[str, torch.Tensor]:
        """The same projections under the names of the checkpoint; absent biases are left out."""
        tensors: dict[str, torch.Tensor] = {}
        for name, fields in self._fields_of(layer).items():
            parts = [tensor for tensor in (getattr(weights, field) for field in fields) if tensor is not None]
            if parts:
                tensors[name] = parts[0] if len(fields) == 1 else self._joined(*parts)
        return tensors

    def _fields_of(self, layer: int) -> dict[str, list[str]]:
        """Tensor name -> the fields of AttentionWeights that it holds, q before k before v."""
        found: dict[str, list[str]] = {}
        for field in self.fields:
            found.setdefault(self.tensor_name(layer, field), []).append(field)
        return found

    def _parted(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v out of their common tensor, whose rows tell how many KV heads there are."""
        assert self.heads is not None, "a fused layout is loaded with its config"
        D, queries = self.heads.head_dim, self.heads.query_heads
        H = (len(fused) // D - queries) // 2
        if self.fused == "roles":
            return fused.split([queries * D, H * D, H * D])
        rest = fused.shape[1:]
        groups = fused.view(H, queries // H + 2, D, *rest)
        return tuple(part.reshape(-1, *rest) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))

    def _joined(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Inverse of `_parted`."""
        if self.fused == "roles":
            return torch.cat([q, k, v])
        assert self.heads is not None, "a fused layout is loaded with its config"
        H = len(k) // self.heads.head_dim
        return torch.cat([part.reshape(H, -1, *part.shape[1:]) for part in (q, k, v)], 1).flatten(0, 1)

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
        sizes: dict[str, tuple[int, ...]] = {role: (rows[role], columns[role]) for role in rows}
        sizes |= {f"{role}_bias": (rows[role],) for role in rows} | {"sinks": (heads.query_heads,)}
        for role, count in (("q", heads.query_heads), ("k", heads.kv_heads)):
            if self.norm is not None and self.norm.over == "width":
                sizes[f"{role}_norm"] = (rows[role],)
            elif self.norm is not None:
                sizes[f"{role}_norm"] = (heads.head_dim,) if self.norm.shared else (count, heads.head_dim)
        named = {name: [sizes[field] for field in fields] for name, fields in self._fields_of(layer).items()}
        return {name: (sum(size[0] for size in parts), *parts[0][1:]) for name, parts in named.items()}

    def check(self, checkpoint: Checkpoint, shape: ModelShape) -> None:
        """Compare every tensor this layout knows with the configuration: names, shapes, dtypes.

        Raises GqaError naming the tensor, its shape and the expected one; also for tensors within an attention
        that the layout does not know, as they would be copied although their meaning has changed.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for layer in range(len(shape.layers)):
            projections = self.attention_shapes(shape, layer)
            expected |= projections
            required = {self.tensor_name(layer, field) for field in self.fields if self._is_required(field)}
            for name in projections:
                if name in checkpoint and checkpoint.dtype(name) not in _FLOATS:
                    raise GqaError(f"tensor {name} is not floating point", got=checkpoint.entry(name).dtype)
                if name in required and name not in checkpoint:
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

    def _is_required(self, field: str) -> bool:
        if field.endswith("_norm"):
            return self.norm is not None and not self.norm.optional
        return not field.endswith("_bias")

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
# Roles in a layout file -> fields of AttentionWeights. Some architectures have the first four alone.
_ROLES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "output": "o",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "sinks": "sinks",
}
_EXTRAS = ("q_norm", "k_norm", "sinks")


def load_layout(model_type: str, config: Mapping[str, object] | None = None) -> Layout:
    """The layout of a `model_type` of config.json. GqaError names the known ones, and why some cannot be.

    config: the raw config.json, which decides the notes that not every model needs and how a fused tensor is parted.
    """
    tables = _tables()
    outer = (config or {}).get("model_type")
    if isinstance(outer, str) and outer in tables:  # a multimodal model: its parts have types of their own
        model_type = outer
    if model_type in tables:
        return _layout(model_type, tables[model_type], config or {})
    unsupported = tomllib.loads(_data().joinpath("unsupported.toml").read_text(encoding="utf-8"))
    if model_type in unsupported:
        raise GqaError(f"{model_type} cannot have fewer KV heads: {unsupported[model_type]}", allowed=", ".join(tables))
    raise GqaError("an unknown architecture", got=f"model_type {model_type!r}", allowed=", ".join(tables))


def _layout(model_type: str, table: Mapping[str, Any], config: Mapping[str, object]) -> Layout:
    attention = table["attention"]
    fused = attention.get("fused", "")
    notes_if: Mapping[str, str] = table.get("notes_if", {})
    return Layout(
        model_type=model_type,
        rotary=attention["rotary"],
        embedding=table["embedding"],
        layer=attention["layer"],
        modules={field: attention[role] for role, field in _ROLES.items() if role in attention},
        untouched=tuple(attention["untouched"]),
        shapes={name: tuple(dimensions) for name, dimensions in table["shapes"].items()},
        notes=(*table["notes"], *(note for key, note in notes_if.items() if text_part(config).get(key))),
        norm=Norm(**attention["norm"]) if "norm" in attention else None,
        positions=table.get("positions"),
        decoder=table.get("decoder", ""),
        fused=fused,
        heads=parse_config(config, model_type).layers[0] if fused and config else None,
        residual_scale=_residual_scale(attention, config),
        eager=table.get("eager", False),
        stacked={name: tuple(parts) for name, parts in table.get("stacked", {}).items()},
    )


def _residual_scale(attention: Mapping[str, Any], config: Mapping[str, object]) -> float | None:
    scale = attention.get("residual_scale")
    return float(text_part(config).get(scale, 1)) if isinstance(scale, str) else scale  # type: ignore[arg-type]


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    """model_type -> the layout file that describes it."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(_data().joinpath("layouts").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            table = tomllib.loads(file.read_text(encoding="utf-8"))
            found |= dict.fromkeys(table["model_types"], table)
    return found


def _data():
    return resources.files("gqa.weights")
