"""The op as torch knows it: `torch.ops.gqa.attention` and `torch.ops.gqa.attention_with_lse`.

They are composite: torch.compile, fake tensors, autograd and export look through them to the implementation that
`impl` names. So no gradient is recomputed, and there is one formula to keep right. An implementation that torch
cannot look into is an op of its own, with its own fake kernel, and is called from here: `torch.ops.gqa.cpu_forward`
and `cpu_backward`, `triton_forward` and `triton_backward`. An autograd.Function connects two of these where a gradient
is wanted: an op that knows its backward costs every call 4 us more.
"""

from __future__ import annotations

from typing import Any

import torch

from gqa.ops import cpu, cpu_grad, gpu, gpu_grad, grad, reference, sdpa

# All ops take these, in this order; `impl` is never "auto".
_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, bool causal, SymInt q_start, Tensor? q_starts, int? window, float scale, "
    "float? softcap, Tensor? mask, Tensor? sinks, Tensor? kv_lengths, Tensor? kv_starts, Tensor? block_table, "
    "Tensor? k_scale, Tensor? v_scale"
)
_NAMES = tuple(argument.split()[-1] for argument in _OPTIONS.split(", "))[3:]
_SINKS, _TABLE = _NAMES.index("sinks"), _NAMES.index("block_table")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *options, impl = arguments
    if impl in KERNELS:
        return KERNELS[impl](q, k, v, options, False)[0]
    named = dict(zip(_NAMES, options, strict=True))
    if impl == "sdpa":
        for absent in ("softcap", "sinks", "block_table", "k_scale", "v_scale"):
            assert named.pop(absent) is None, absent
        return sdpa.attention(q, k, v, **named)
    return reference.attention(q, k, v, **named)[0]


def _attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *options, impl = arguments
    if impl in KERNELS:
        return KERNELS[impl](q, k, v, options, True)
    assert impl == "reference"
    return reference.attention(q, k, v, **dict(zip(_NAMES, options, strict=True)))


def cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: list[Any], want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by the CPU kernels, differentiable where that is asked for."""
    if not _wants_gradient(q, k, v, options):
        return cpu_forward(q, k, v, *options, want_lse)
    return grad.Differentiable.apply("cpu", *_gathered(q, k, v, options))


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: list[Any],
    want_lse: bool,
    q_offsets: torch.Tensor | None = None,
    k_offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the Triton kernels; with offsets, q (1, H*G, tokens, D), k and v are sequences laid end to end."""
    if not _wants_gradient(q, k, v, options):
        return triton_forward(q, k, v, *options, q_offsets, k_offsets, want_lse)
    return grad.Differentiable.apply("triton", *_gathered(q, k, v, options), q_offsets, k_offsets)


KERNELS = {"cpu": cpu_attention, "triton": triton_attention}


def _wants_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: list[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    sinks = options[_SINKS]
    return q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: list[Any]) -> list[Any]:
    """What a differentiable op takes. For a backward, pages are gathered once; still H heads."""
    table = options[_TABLE]
    if table is not None:
        k, v = (x[table.clamp(min=0)].transpose(1, 2).flatten(2, 3) for x in (k, v))
        options = [*options[:_TABLE], None, *options[_TABLE + 1 :]]
    return [q, k, v, *options]


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return cpu.outputs(q, v, arguments[-1])


def _cpu_backward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> cpu_grad.Gradients:
    return cpu_grad.gradients(q, k, v, arguments[_BACKWARD_SINKS])


def _triton_backward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> gpu_grad.Gradients:
    return gpu_grad.gradients(q, k, v, arguments[_BACKWARD_SINKS])


# The library lives as long as this module: torch forgets the ops when it is collected.
_LIBRARY = torch.library.Library("gqa", "DEF")
_BACKWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, bool causal, "
    "SymInt{} q_start, Tensor? q_starts, int? window, float scale, float? softcap, Tensor? mask, Tensor? sinks, "
    "Tensor? kv_lengths, Tensor? kv_starts"
)
_OFFSETS = "Tensor? q_offsets, Tensor? k_offsets"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_BACKWARD_SINKS = [argument.split()[-1] for argument in _BACKWARD.split(", ")].index("sinks") - 3
_LIBRARY.define(f"attention({_OPTIONS}, str impl) -> Tensor")
_LIBRARY.define(f"attention_with_lse({_OPTIONS}, str impl) -> (Tensor, Tensor)")
_LIBRARY.define(f"cpu_forward({_OPTIONS}, bool want_lse) -> (Tensor, Tensor)")
_LIBRARY.define(f"cpu_backward({_BACKWARD.format('')}) -> {_FOUR}")
# Without q_start, each of the sequences of a ragged batch is aligned bottom-right.
_RAGGED = _OPTIONS.replace("SymInt q_start", "SymInt? q_start")
_LIBRARY.define(f"triton_forward({_RAGGED}, {_OFFSETS}, bool want_lse) -> (Tensor, Tensor)")
_LIBRARY.define(f"triton_backward({_BACKWARD.format('?')}, {_OFFSETS}) -> {_FOUR}")
_LIBRARY.impl("attention", _attention, "CompositeImplicitAutograd")
_LIBRARY.impl("attention_with_lse", _attention_with_lse, "CompositeImplicitAutograd")
_LIBRARY.impl("cpu_forward", cpu.forward, "CPU")
_LIBRARY.impl("cpu_backward", cpu_grad.backward, "CPU")
for _key in ("CUDA", "CPU"):  # on the CPU in Triton's interpreter only
    _LIBRARY.impl("triton_forward", gpu.forward, _key)
    _LIBRARY.impl("triton_backward", gpu_grad.backward, _key)
for _name in KERNELS:
    torch.library.register_fake(f"gqa::{_name}_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("gqa::cpu_backward", _cpu_backward_fake, lib=_LIBRARY)
torch.library.register_fake("gqa::triton_backward", _triton_backward_fake, lib=_LIBRARY)

attention = torch.ops.gqa.attention.default
attention_with_lse = torch.ops.gqa.attention_with_lse.default
cpu_forward = torch.ops.gqa.cpu_forward.default
triton_forward = torch.ops.gqa.triton_forward.default
