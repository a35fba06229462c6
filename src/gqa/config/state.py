"""Layers whose memory does not grow with the context: state-space models, linear attention, short convolutions.

Formulas read off the classes of transformers 5.23; tests/plan/test_states.py counts the caches that these fill.
"""

from __future__ import annotations

from collections.abc import Callable

from gqa.config.shape import State
from gqa.config.values import MAX_HEADS, MAX_WIDTH, Values

_EXPAND = ("mamba_expand", "expand")
_TAPS = ("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim", "conv_L_cache", "conv1d_width")
_STATE = ("mamba_d_state", "ssm_state_size", "state_size")
_GROUPS = ("mamba_n_groups", "mamba_ngroups", "n_groups")


def state_of(kind: str, values: Values, hidden: int, heads: int, head_dim: int) -> State:
    """The state that one layer of this kind (a key of data/model_types.toml) keeps for one request.

    heads, head_dim: of the model's attention, which lightning attention shares."""
    return _KINDS[kind](values, hidden, heads, head_dim)


def _mamba(values: Values, hidden: int, *_: int) -> State:
    """Gu and Dao 2023, arXiv 2312.00752: a state per channel."""
    inner = values.number_or_none(("mamba_intermediate_size",), MAX_WIDTH) or values.number(_EXPAND, 1024) * hidden
    return State(inner, values.number(_TAPS, MAX_HEADS), inner * values.number(_STATE, MAX_WIDTH), _told_fp32(values))


def _mamba2(values: Values, hidden: int, *_: int) -> State:
    """Dao and Gu 2024, arXiv 2405.21060: a state per head; B and C of every group pass the convolution, too."""
    inner = values.number_or_none(("mamba_d_ssm",), MAX_WIDTH)
    if inner is None:
        heads = values.number_or_none(("mamba_num_heads",), MAX_HEADS)
        dim = values.number_or_none(("mamba_head_dim",), MAX_WIDTH)
        inner = heads * dim if heads and dim else values.number(_EXPAND, 1024) * hidden
    state = values.number(_STATE, MAX_WIDTH)
    channels = inner + 2 * values.number(_GROUPS, MAX_HEADS) * state
    return State(channels, values.number(_TAPS, MAX_HEADS), inner * state, _told_fp32(values))


def _told_fp32(values: Values) -> bool:
    """Whether the config asks for Mamba's states in fp32; vLLM and SGLang keep them in the model's dtype otherwise."""
    return any(values.config.get(key) == "float32" for key in ("mamba_ssm_cache_dtype", "mamba_ssm_dtype"))


def _gated_delta(values: Values, *_: int) -> State:
    """Yang et al. 2024, arXiv 2412.06464: a matrix of key by value dims per value head."""
    key_dim = values.number(("linear_key_head_dim",), MAX_WIDTH)
    value_dim = values.number(("linear_value_head_dim",), MAX_WIDTH)
    key_heads = values.number(("linear_num_key_heads",), MAX_HEADS)
    value_heads = values.number(("linear_num_value_heads",), MAX_HEADS)
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return State(channels, values.number(_TAPS, MAX_HEADS), value_heads * key_dim * value_dim)


def _kimi_delta(values: Values, *_: int) -> State:
    """Kimi Delta Attention (arXiv 2510.26692): a matrix per head, and convolutions over q, k and v."""
    dim = values.number(("linear_head_dim",), MAX_WIDTH)
    heads = values.number(("linear_num_heads",), MAX_HEADS)
    return State(3 * heads * dim, values.number(_TAPS, MAX_HEADS), heads * dim * dim)


def _lightning(values: Values, hidden: int, heads: int, head_dim: int) -> State:
    """Lightning attention (MiniMax-01, arXiv 2501.08313): a matrix per head, no convolution."""
    return State(0, 0, heads * head_dim * head_dim)


def _convolution(values: Values, hidden: int, *_: int) -> State:
    """LFM2's short convolution: its last inputs are all it keeps."""
    return State(hidden, values.number(_TAPS, MAX_HEADS), 0)


def _gated_recurrence(values: Values, hidden: int, *_: int) -> State:
    """RG-LRU (Griffin, arXiv 2402.19427): one number per channel, which is kept in fp32, behind a convolution."""
    width = values.number_or_none(("lru_width",), MAX_WIDTH) or hidden
    return State(width, values.number(_TAPS, MAX_HEADS), width)


_KINDS: dict[str, Callable[..., State]] = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "gated_delta": _gated_delta,
    "kimi_delta": _kimi_delta,
    "lightning": _lightning,
    "convolution": _convolution,
    "gated_recurrence": _gated_recurrence,
}
