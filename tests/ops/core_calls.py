"""Calls of the op that every kernel has to get right, a row per idea; each is made when it is run."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

import functools
import math

import torch
from ops.every_call import FLOATS, paged, quantised


def random_call(B=1, H=2, G=3, T=1, S=65, D=64, Dv=None, dtype=torch.float32):
    random = torch.Generator().manual_seed(B + 2 * H + 3 * G + 5 * T + 7 * S + 11 * D)
    sizes = ((B, H * G, T, D), (B, H, S, D), (B, H, S, Dv or D))
    return [torch.randn(*size, generator=random).to(dtype) for size in sizes]


OPTIONS = {
    "window": {"window": 5},
    "causal window": {"window": 5, "causal": True},
    "top-left": {"causal": True, "q_start": 0},
    "before the keys": {"causal": True, "q_start": -2},
    "starts": {"causal": True, "q_start": torch.tensor([40, 90])},
    "softcap": {"softcap": 1.5},
    "softcap and scale": {"softcap": 30.0, "scale": 3.0},
    "no scale": {"scale": 0.0, "causal": True},
    "negative scale": {"scale": -0.3, "causal": True},
    "sinks": {"sinks": torch.linspace(-3, 3, 6)},
    "lengths": {"kv_lengths": torch.tensor([0, 64])},
    "lengths and starts": {"kv_lengths": torch.tensor([111, 65]).int(), "kv_starts": torch.tensor([64, 64])},
    "bool mask": {"mask": torch.arange(111) % 3 > 0},
    "float mask": {"mask": torch.linspace(-4, 4, 111).masked_fill(torch.arange(111) < 70, -math.inf)},
    "mask of heads": {"mask": torch.arange(12).view(2, 6, 1, 1) % 4 > 0},
}


def of_size(H, G, T, S, D, Dv, dtype):
    return *random_call(2, H, G, T, S, D, Dv, dtype), {"causal": True}


def of_group(G):
    return *random_call(G=G, S=130, D=60), {}


def of_int8(T, dtype):
    q, k, v = random_call(2, 2, 3, T, 111, 100, 60)
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    return q.to(dtype), k, v, {"k_scale": k_scale, "v_scale": v_scale, "causal": True}


def of_option(T, name):
    return *random_call(2, T=T, S=111), OPTIONS[name]


def of_pages(T, block):
    q, k, v = random_call(2, T=T, S=111)
    lengths, most = torch.tensor([111, 17]), -(-111 // block)
    table = torch.arange(2 * most).flip(0).view(2, most)
    table = table.masked_fill(torch.arange(most) * block >= lengths[:, None], -1)
    k, v = (paged(x, table, 2 * most + 1, block) for x in (k, v))
    return q, k, v, {"block_table": table, "kv_lengths": lengths, "q_start": lengths - T, "causal": True}


def of_large_scores(T, dtype):
    q, k, v = random_call(2, T=T, dtype=dtype)
    return q * 100, k * 100, v, {}


def of_many_keys(G, dtype, **options):
    return *random_call(1, 1, G, 1, 5000, dtype=dtype), options


def of_uneven_lengths(**options):
    q, k, v = random_call(3, T=2, S=5000)
    k[1, :, 1:] = v[1, :, 1:] = k[2] = v[2] = math.nan
    return q, k, v, {"kv_lengths": torch.tensor([5000, 1, 0])} | options


def of_splits(**options):
    return *random_call(1, 1, 2, 1, 5000), options


def core_calls():
    """name -> function that makes (q, k, v, options)."""
    made = {}
    for name, dtype in FLOATS.items():
        for H, G, D, Dv in [(2, 1, 64, 64), (1, 3, 60, 100), (2, 5, 1, 60), (1, 12, 128, 256)]:
            for T in (1, 2, 63, 111):
                for S in (1, 63, 111):
                    size = f"size H{H} G{G} T{T} S{S} D{D} Dv{Dv} {name}"
                    made[size] = functools.partial(of_size, H, G, T, S, D, Dv, dtype)
        for T in (1, 9):
            made[f"int8 T{T} {name}"] = functools.partial(of_int8, T, dtype)
            made[f"large scores T{T} {name}"] = functools.partial(of_large_scores, T, dtype)
        made[f"many keys {name}"] = functools.partial(of_many_keys, 1, dtype)
        made[f"many keys G7 {name}"] = functools.partial(
            of_many_keys, 7, dtype, window=2000, causal=True, sinks=torch.ones(7)
        )
    for G in (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 71):
        made[f"group G{G}"] = functools.partial(of_group, G)
    for name in OPTIONS:
        for T in (1, 65):
            made[f"{name} T{T}"] = functools.partial(of_option, T, name)
    for block in (1, 5, 16, 128):
        for T in (1, 9):
            made[f"pages of {block} T{T}"] = functools.partial(of_pages, T, block)
    made["uneven lengths"] = of_uneven_lengths
    made["uneven lengths causal"] = functools.partial(
        of_uneven_lengths, q_start=torch.tensor([4998, -1, -2]), causal=True
    )
    made["one key in a split"] = functools.partial(of_splits, mask=torch.arange(5000) == 4321)
    made["no key in any split"] = functools.partial(of_splits, mask=torch.zeros(5000, dtype=torch.bool))
    made["sinks and few keys"] = functools.partial(
        of_splits, kv_starts=torch.tensor([4990]), sinks=torch.tensor([-50.0, 50.0])
    )
    return made


CORE = core_calls()
