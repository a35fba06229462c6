"""Masks as transformers' are: finite, and far beyond any score."""

import torch
from ops.core_calls import random_call

import gqa

EXTREMES = [-1e30, 1e30, -torch.finfo(torch.float32).max]


def assert_finite_extremes(value, impl, device="cpu"):
    """What lies far below counts for nothing; a row of nothing else is the mean of its values."""
    mask = torch.zeros(9, 65, device=device)
    mask[:, 30:] = value
    mask[4] = value
    q, k, v = (x.to(device) for x in random_call(T=9))
    out = gqa.attention(q, k, v, mask=mask, impl=impl)
    seen = slice(0, 30) if value < 0 else slice(30, None)
    want = gqa.attention(q, k[:, :, seen], v[:, :, seen], impl="reference")
    rows = [t for t in range(9) if t != 4]
    if value < 0:  # a score added to 1e30 is lost
        torch.testing.assert_close(out[:, :, rows], want[:, :, rows], rtol=1e-5, atol=1e-5)
    mean = v.mean(dim=2, keepdim=True).repeat_interleave(3, dim=1)
    torch.testing.assert_close(out[:, :, 4:5], mean, rtol=1e-5, atol=1e-5)
