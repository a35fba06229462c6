"""Gradients of a kernel against the reference's float64 ones, and how far they may be off."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

import torch
from ops.precision import in_float64, largest_score, oracle

import gqa


def random_call(B=2, H=2, G=3, T=9, S=65, D=60, Dv=100, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    sizes = ((B, H * G, T, D), (B, H, S, D), (B, H, S, Dv))
    return [torch.randn(*size, generator=random).to(dtype) for size in sizes]


def incoming(output, seed):
    """Weights of an output's elements, the same numbers in every dtype."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=random).bfloat16().to(output.device, output.dtype)


def gradients(q, k, v, options, impl, *, leaves=(), with_lse=False):
    """Of a weighted sum of out, and of lse where asked for, in q, k, v and the options named by `leaves`."""
    options = dict(options)
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    for name in leaves:
        options[name] = options[name].detach().requires_grad_()
        tensors.append(options[name])
    outputs = gqa.attention(*tensors[:3], impl=impl, return_lse=with_lse, **options)
    total = torch.zeros((), dtype=torch.float64, device=q.device)
    for seed, output in enumerate(outputs if with_lse else (outputs,)):
        seen = output.detach() > -torch.inf  # an lse of -inf is no function of anything
        total = total + (output.masked_fill(~seen, 0) * incoming(output, seed)).sum().double()
    return torch.autograd.grad(total, tensors)


def roundings(q, k, v, options, of_weights=0.0):
    """By name: what float32 sums and an `out` stored in q's dtype may cost each gradient, however its terms cancel.

    dS = p (dP - delta) with dP = dO V and delta = out dO; then dQ = scale dS K, dK = scale dS^T Q, dV = p^T dO. A
    score's rounding moves p by as much relatively; roundings of many rows are independent and grow as their root.
    of_weights: the relative rounding of p and dS where they are stored to be multiplied.
    """
    out, _ = oracle(q, k, v, **options)
    weights = incoming(out, 0)
    largest_q, largest_k, largest_v = (float(x.double().nan_to_num(0).abs().max()) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if options.get("scale") is None else abs(options["scale"])
    of_scores = 4 * torch.finfo(torch.float32).eps * (1 + largest_score(q, k, options)) + of_weights
    norm = float(weights.norm(dim=-1).max())
    ds = of_scores * (norm * largest_v + 1)  # 1: as much again where lse has a gradient
    ds += torch.finfo(q.dtype).eps * float(out.abs().max()) * norm
    many = (q.shape[1] // k.shape[1] * q.shape[2]) ** 0.5
    return {
        "q": scale * largest_k * ds,
        "k": scale * largest_q * ds * many,
        "v": of_scores * float(weights.abs().max()) * many,
        "sinks": ds * (q.shape[0] * q.shape[2]) ** 0.5,
    }


def check_gradients(q, k, v, *, impl, of_weights=0.0, with_lse=False, **options):
    """As precise as the reference's gradients in the same dtype, twice, beside roundings."""
    leaves = ("sinks",) if "sinks" in options else ()
    names = {"leaves": leaves, "with_lse": with_lse}
    want = gradients(*in_float64(q, k, v, options), "reference", **names)
    plain = gradients(q, k, v, options, "reference", **names)
    got = gradients(q, k, v, options, impl, **names)
    rounding = roundings(q, k, v, options, of_weights)
    for which, a, b, c in zip(("q", "k", "v", *leaves), got, plain, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not a.isnan().any(), f"d{which}: nan: something was read that is not there, or not written"
        error, of_plain = (float((x.double() - c).abs().max()) for x in (a, b))
        bound = 2 * of_plain + 2 * torch.finfo(a.dtype).eps * float(c.abs().max()) + rounding[which]
        assert error <= bound, f"d{which}: error {error:.3g}, plain {of_plain:.3g}, bound {bound:.3g}"


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": 5},
    "window": {"window": 5, "q_start": 30},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-2, 2, 6)},
    "ragged": {"kv_lengths": torch.tensor([0, 63]), "kv_starts": torch.tensor([0, 5])},
    "mask": {"mask": torch.arange(65) % 3 > 0},
    "lse": {"with_lse": True},
    "lse and more": {"with_lse": True, "causal": True, "sinks": torch.linspace(-2, 2, 6), "softcap": 2.0},
}
