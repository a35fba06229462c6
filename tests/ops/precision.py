"""How precise an implementation has to be, measured against the reference in float64 on the same rounded inputs."""

import torch

import gqa

EXACT = ("mask", "sinks", "k_scale", "v_scale")  # options that are numbers to compute with


def in_float64(q, k, v, options):
    """The call with every floating tensor in float64; int8 stays, its scales do not."""
    q, k, v = (x.double() if x.is_floating_point() else x for x in (q, k, v))
    numbers = {name: options[name] for name in EXACT if options.get(name) is not None}
    exact = {name: x.double() for name, x in numbers.items() if x.is_floating_point()}
    return q, k, v, options | exact


def oracle(q, k, v, **options):
    """(out, lse) of the reference in float64."""
    q, k, v, options = in_float64(q, k, v, options)
    return gqa.attention(q, k, v, return_lse=True, impl="reference", **options)


def largest_value(v, v_scale=None):
    """The largest magnitude among the values that are not poison."""
    v = v.double() if v_scale is None else v.double() * v_scale.double()[..., None]
    return float(v.nan_to_num(0).abs().max())


def largest_score(q, k, options):
    """What the magnitudes in a row's scores add up to at most, before they cancel (Cauchy and Schwarz)."""
    k_scale = options.get("k_scale")
    k = k.double() if k_scale is None else k.double() * k_scale.double()[..., None]
    scale = q.shape[3] ** -0.5 if options.get("scale") is None else abs(options["scale"])
    largest = float(q.double().norm(dim=-1).max() * k.nan_to_num(0).norm(dim=-1).max()) * scale
    for name in ("mask", "sinks"):
        x = options.get(name)
        if x is not None and x.is_floating_point():
            largest += float(x.double().nan_to_num(neginf=0).abs().max())
    return largest


def assert_precise(got_out, got_lse, q, k, v, **options):
    """`got` errs at most twice as much as the reference in q's dtype does, beside a few roundings.

    Those are: two of a value in q's dtype, and four in float32 of the scores, each of which moves the weights by as
    much relatively. Rows without a visible key are exactly zero, and lse is -inf exactly where it should be.
    """
    want, want_lse = oracle(q, k, v, **options)
    plain, plain_lse = gqa.attention(q, k, v, return_lse=True, impl="reference", **options)
    assert (got_out.shape, got_out.dtype) == (plain.shape, plain.dtype)
    assert not got_out.isnan().any(), "nan in the output: something was read that is not there, or not written"
    of_scores = 4 * torch.finfo(torch.float32).eps * (1 + largest_score(q, k, options))
    rounding = largest_value(v, options.get("v_scale")) * (torch.finfo(q.dtype).eps + of_scores)
    _assert_close("out", got_out, plain, want, rounding)
    blind = want_lse == -torch.inf
    assert torch.all(got_out[blind] == 0)
    if got_lse is not None:
        assert (got_lse.shape, got_lse.dtype) == (plain_lse.shape, plain_lse.dtype)
        assert torch.equal(got_lse == -torch.inf, blind)
        got, plain, want = (x.masked_fill(blind, 0) for x in (got_lse, plain_lse, want_lse))
        _assert_close("lse", got, plain, want, of_scores)


def _assert_close(name, got, plain, want, rounding):
    error, of_plain = ((x.double() - want).abs().max() for x in (got, plain))
    assert error <= 2 * of_plain + rounding, f"{name}: error {error:.3g}, plain {of_plain:.3g}, rounding {rounding:.3g}"
