"""Calls of the op over its whole signature for hypothesis, in memory that is poisoned wherever nothing may be read.

B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v
"""

import math

import torch
from hypothesis import strategies as st

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = [1, 60, 64, 100, 128, 256]
GROUPS = [(1, 1), (2, 1), (3, 3), (2, 5), (1, 7), (2, 7), (1, 12), (1, 71)]  # (H, G)
TOKENS = [(1, 1), (1, 63), (1, 111), (1, 600), (2, 65), (63, 63), (65, 111), (111, 65), (9, 1)]  # (T, S)
LAYOUTS = ["contiguous", "heads behind tokens", "with room", "every second", "dims outermost"]


def poison(dtype):
    """A number that ruins whatever it is added to; int8 has none, its scales have."""
    return math.nan if dtype.is_floating_point else 127


def filled(*size, dtype):
    return torch.full(size, poison(dtype), dtype=dtype)


def laid_out(x, layout):
    """The same numbers in another place: views whose gaps and margins are poisoned."""
    if layout == "heads behind tokens":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "with room":
        a, b, c, d = x.shape
        view = filled(a, b, c + 3, d + 5, dtype=x.dtype)[:, :, 1 : c + 1, :d]
    elif layout == "every second":
        view = filled(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)[..., ::2]
    elif layout == "dims outermost":
        view = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        return x.contiguous()
    return view.copy_(x)


def quantised(x):
    """int8 numbers and their scales (..., S), with scale a power of two apart from token to token."""
    scale = x.abs().amax(dim=-1).clamp(min=1e-6) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def paged(x, table, blocks, block):
    """(B, H, S, ...) cut into the pool's blocks that `table` names; all other blocks are poison."""
    pool = filled(blocks, x.shape[1], block, *x.shape[3:], dtype=x.dtype)
    for b, row in enumerate(table.tolist()):
        for i, page in enumerate(row):
            part = x[b, :, i * block : (i + 1) * block]
            if page >= 0:
                pool[page, :, : part.shape[1]] = part
    return pool


@st.composite
def masks(draw, B, HG, T, S, random, dtype):
    """None, or boolean or floating, of any shape that broadcasts to (B, H*G, T, S)."""
    kind = draw(st.sampled_from([None, "bool", "float", "float32"]))
    if kind is None:
        return None
    shape = [draw(st.sampled_from([1, size])) for size in (B, HG, T, S)]
    shape = shape[draw(st.integers(0, 3)) :]
    visible = torch.rand(*shape, generator=random) > draw(st.sampled_from([0.0, 0.3, 0.9]))
    if len(shape) > 1 and draw(st.booleans()):
        visible[..., -1, :] = False  # rows that see nothing
    if kind == "bool":
        mask = visible
    else:
        mask = torch.randn(*shape, generator=random).to(torch.float32 if kind == "float32" else dtype)
        mask = mask.masked_fill(~visible, -math.inf)
    if mask.dim() > 1 and draw(st.booleans()):  # strided, as a slice of a model's mask is
        mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    return mask


@st.composite
def every_call(draw, kinds=("fp32", "bf16", "fp16", "int8"), small=False):
    """(q, k, v, options) of `gqa.attention`; `small` ones suit a backward, too."""
    H, G = draw(st.sampled_from(GROUPS))
    T, S = draw(st.sampled_from([(1, 63), (9, 65), (65, 9), (3, 111)] if small else TOKENS))
    B = draw(st.sampled_from([1, 2, 3])) if H * G * T < 2000 else 1
    D, Dv = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(HEAD_DIMS))
    kind = draw(st.sampled_from(kinds))
    dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS))) if kind == "int8" else kind]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size):
        return torch.randn(*size, generator=random)

    size = draw(st.sampled_from([1.0, 1.0, 1.0, 100.0]))  # 100 * 100 makes scores of 1e4 and more
    q, k, v = normal(B, H * G, T, D) * size, normal(B, H, S, D) * size, normal(B, H, S, Dv)
    if draw(st.integers(0, 5)) == 0:
        k[:] = k[:, :, :1]  # all keys equal: the mean of the values
    q, v = q.to(dtype), v.to(dtype)
    k = k.to(dtype)

    options = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([None, None, 1, 5, 64]))}
    if draw(st.booleans()):
        options["scale"] = 0.3 * D**-0.5
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.5, 30.0]))
    if draw(st.booleans()):
        options["sinks"] = normal(H * G).to(draw(st.sampled_from([dtype, torch.float32])))

    integers = draw(st.sampled_from([torch.int32, torch.int64]))
    if draw(st.booleans()):
        lengths = st.sampled_from([0, 1, S // 2, S - 1, S])
        options["kv_lengths"] = torch.tensor([draw(lengths) for _ in range(B)], dtype=integers)
    if draw(st.booleans()):
        options["kv_starts"] = torch.tensor([draw(st.integers(0, S)) for _ in range(B)], dtype=integers)

    scales = None
    if kind == "int8":
        (k, k_scale), (v, v_scale) = quantised(k.float()), quantised(v.float())
        scales = [k_scale, v_scale]
    _poison_outside([k, v, *(scales or [])], S, options)

    block = draw(st.sampled_from([None, None, 1, 5, 16, 128]))
    if block is not None:
        most = -(-S // block)
        table = torch.randperm(B * most + 2, generator=random)[: B * most].view(B, most)
        # Past the lengths there may be no block at all, and the last one of S keys may be partly filled.
        lengths = options.setdefault("kv_lengths", torch.full((B,), S)).long()
        options["kv_lengths"] = lengths.to(integers)
        table = table.masked_fill(torch.arange(most) * block >= lengths[:, None], -1)
        k, v = (paged(x, table, B * most + 2, block) for x in (k, v))
        scales = None if scales is None else [paged(x, table, B * most + 2, block) for x in scales]
        options["block_table"] = table.to(integers)
        S = most * block
    if scales is not None:
        options["k_scale"], options["v_scale"] = scales
    options["mask"] = draw(masks(B, H * G, T, S, random, dtype))

    start = draw(st.sampled_from(["default", "int", "tensor"]))
    if start == "int":
        options["q_start"] = draw(st.integers(-3, S + 3))
    elif start == "tensor":
        options["q_start"] = torch.randint(-3, S + 3, (B,), generator=random, dtype=integers)

    q, k, v = (laid_out(x, draw(st.sampled_from(LAYOUTS))) for x in (q, k, v))
    for name in ("sinks", "kv_lengths", "kv_starts", "q_start", "block_table", "k_scale", "v_scale"):
        if torch.is_tensor(options.get(name)) and draw(st.integers(0, 3)) == 0:
            options[name] = options[name].repeat_interleave(2, dim=-1)[..., ::2]
    if H > 1 and block is None and draw(st.integers(0, 4)) == 0:
        k = k[:, :1].expand_as(k)  # one head's memory for all
    return q, k, v, options


def _poison_outside(tensors, S, options):
    """What lies outside kv_starts and kv_lengths becomes poison, in tensors (B, H, S, ...)."""
    key = torch.arange(S)
    outside = torch.zeros(1, S, dtype=torch.bool)
    if "kv_lengths" in options:
        outside = outside | (key >= options["kv_lengths"][:, None])
    if "kv_starts" in options:
        outside = outside | (key < options["kv_starts"][:, None])
    for x in tensors:
        x.masked_fill_(outside.view(-1, 1, S, *(1,) * (x.dim() - 3)), poison(x.dtype))
