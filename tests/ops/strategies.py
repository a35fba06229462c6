"""Calls of the op for hypothesis: sizes nobody likes, and any mixture of options."""

import torch
from hypothesis import strategies as st


@st.composite
def calls(draw, dtypes=(torch.float64,), everything=True):
    """(q, k, v, options). `everything` adds what only some implementations serve, and Dv != D."""
    B, H, G = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3, 7]))
    T, S = draw(st.sampled_from([1, 2, 9])), draw(st.sampled_from([1, 3, 17, 63]))
    if draw(st.booleans()) and H * G < 4:
        T, S = draw(st.sampled_from([(63, 63), (1, 111), (63, 111), (111, 63)]))
    D = draw(st.sampled_from([4, 60, 100]))
    Dv = draw(st.sampled_from([D, 6])) if everything else D
    dtype = draw(st.sampled_from(dtypes))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    q, k, v = normal(B, H * G, T, D).to(dtype), normal(B, H, S, D).to(dtype), normal(B, H, S, Dv).to(dtype)
    if draw(st.booleans()):  # as a projection leaves it: heads behind tokens in memory
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))

    options = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([None, 1, 5]))}
    start = draw(st.sampled_from(["default", "int", "tensor"]))
    if start == "int":
        options["q_start"] = draw(st.integers(-2, S + 2))
    elif start == "tensor":
        options["q_start"] = torch.randint(-2, S + 2, (B,), generator=random)
    if draw(st.booleans()):
        options["scale"] = 0.3
    kind = draw(st.sampled_from([None, "bool", "float"]))
    if kind:
        shape = draw(st.sampled_from([(T, S), (B, 1, T, S), (1, H * G, T, S), (B, 1, 1, S), (H * G, 1, 1), (T, 1)]))
        mask = torch.rand(*shape, generator=random) > 0.3
        options["mask"] = mask if kind == "bool" else normal(*shape).masked_fill(~mask, -torch.inf).to(dtype)
    if draw(st.booleans()):
        options["kv_lengths"] = torch.randint(0, S + 1, (B,), generator=random)
    if draw(st.booleans()):
        options["kv_starts"] = torch.randint(0, S, (B,), generator=random)
    if everything:
        if draw(st.booleans()):
            options["softcap"] = 1.5
        if draw(st.booleans()):
            options["sinks"] = normal(H * G)
    return q, k, v, options
