"""Sequences laid end to end: a call with empty ones among them, and what its result has to be."""

import math

import torch
from ops.precision import assert_precise

Q_LENGTHS, K_LENGTHS = [1, 0, 65, 3], [63, 2, 111, 0]


def packed_call(dtype=torch.float32):
    """(q, k, v, cu_seqlens_q, cu_seqlens_k) of four sequences, one without queries and one without keys."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(sum(Q_LENGTHS), 6, 60, generator=random).to(dtype)
    k, v = (torch.randn(sum(K_LENGTHS), 2, d, generator=random).to(dtype) for d in (60, 100))
    return q, k, v, *(torch.tensor([0, *lengths]).cumsum(0) for lengths in (Q_LENGTHS, K_LENGTHS))


def assert_packed_precise(out, lse, q, k, v, cu_q, cu_k, **options):
    """Each sequence of `packed_call` as if it had been called alone."""
    starts = options.pop("q_start", None)
    for i, (queries, keys) in enumerate(zip(Q_LENGTHS, K_LENGTHS, strict=True)):
        if queries == 0:
            continue
        rows, held = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        got_out, got_lse = out[rows][None].transpose(1, 2), lse[rows].T[None]
        if keys == 0:
            blind = torch.full_like(got_lse, -math.inf) if options.get("sinks") is None else None
            assert torch.all(got_out == 0)
            assert blind is None or torch.equal(got_lse, blind)
            continue
        one = [x[None].transpose(1, 2) for x in (q[rows], k[held], v[held])]
        start = {} if starts is None else {"q_start": int(starts[i]) if torch.is_tensor(starts) else starts}
        assert_precise(got_out, got_lse, *one, **start, **options)
