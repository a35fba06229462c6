"""The op as torch knows it: `torch.ops.gqa.attention` and `torch.ops.gqa.attention_with_lse`.

They are composite: torch.compile, fake tensors, autograd and export look through them to the implementation that
`impl` names. So no gradient is recomputed, and there is one formula to keep right. An implementation that torch
cannot look into is an op of its own, with its own fake kernel, and is called from here: `torch.ops.gqa.cpu_forward`
and `cpu_backward`. An autograd.Function connects these two where a gradient is wanted: an op that knows its backward
costs every call 4 us more.
"""

from __future__ import annotations

from typing import Any

import torch

from gqa.ops import cpu, cpu_grad, reference, sdpa

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
    if impl == "cpu":
        return cpu_attention(q, k, v, options, False)[0]
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
    if impl == "cpu":
        return cpu_attention(q, k, v, options, True)
    assert impl == "reference"
    return reference.attention(q, k, v, **dict(zip(_NAMES, options, strict=True)))


def cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: list[Any], want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by the CPU kernels, differentiable where that is asked for."""
    sinks, table = options[_SINKS], options[_TABLE]
    if not torch.is_grad_enabled() or not (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        return cpu_forward(q, k, v, *options, want_lse)
    if table is not None:  # for a backward, pages are gathered once; still H heads
        k, v = (x[table.clamp(min=0)].transpose(1, 2).flatten(2, 3) for x in (k, v))
        options[_TABLE] = None
    return cpu_grad.Differentiable.apply(q, k, v, *options)


def _cpu_backward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> cpu_grad.Gradients:
    return cpu_grad.gradients(q, k, v, arguments[-3])


def _cpu_forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return cpu.outputs(q, v, arguments[-1])


# The library lives as long as this module: torch forgets the ops when it is collected.
_LIBRARY = torch.library.Library("gqa", "DEF")
_LIBRARY.define(f"attention({_OPTIONS}, str impl) -> Tensor")
_LIBRARY.define(f"attention_with_lse({_OPTIONS}, str impl) -> (Tensor, Tensor)")
_LIBRARY.define(f"cpu_forward({_OPTIONS}, bool want_lse) -> (Tensor, Tensor)")
_LIBRARY.define(
    "cpu_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, bool causal, "
    "SymInt q_start, Tensor? q_starts, int? window, float scale, float? softcap, Tensor? mask, Tensor? sinks, "
    "Tensor? kv_lengths, Tensor? kv_starts) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention", _attention, "CompositeImplicitAutograd")
_LIBRARY.impl("attention_with_lse", _attention_with_lse, "CompositeImplicitAutograd")
_LIBRARY.impl("cpu_forward", cpu.forward, "CPU")
_LIBRARY.impl("cpu_backward", cpu_grad.backward, "CPU")
torch.library.register_fake("gqa::cpu_forward", _cpu_forward_fake, lib=_LIBRARY)
torch.library.register_fake("gqa::cpu_backward", _cpu_backward_fake, lib=_LIBRARY)

attention = torch.ops.gqa.attention.default
attention_with_lse = torch.ops.gqa.attention_with_lse.default
cpu_forward = torch.ops.gqa.cpu_forward.default
