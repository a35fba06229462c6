"""The ONNX Attention operator's own cases, as the `onnx` package generates them: another house's idea of attention.

Where the two conventions differ, `as_ours` translates:

- 3-D inputs (B, T, heads * D) are reshaped to 4-D, and the output back.
- past_key and past_value come before K and V; positions start behind them.
- Without a past, the first query sits at 0 (top-left); with nonpad_kv_seqlen at nonpad_kv_seqlen - T, per sequence.
- A mask shorter than S hides the keys behind its end.
- left_window_size leaves the query out of the count, ours counts it. right_window_size lets a query see that many keys
  behind its position: a causal query that sits that much further on.
"""

# B batch · T query tokens · S key tokens · D head dim

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ops.triton_device import there

import gqa

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    CASES: dict[str, Any] = {case.name: case for case in collect_testcases("Attention")}

EXPANDED = "_expanded"
SKIPPED = {  # name: reason
    name: f"the numbers of {name.removesuffix(EXPANDED)} again, for a graph of smaller operators"
    for name in CASES
    if name.endswith(EXPANDED)
}
RUN = [name for name in CASES if name not in SKIPPED]
# What the op does not return: scores are never kept, and present keys and values are its own inputs.
NOT_OURS = {"qk_matmul_output", "present_key", "present_value"}


def tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def named(case):
    """The case's node as attributes, inputs and outputs by name."""
    (node,) = case.model.graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    ((inputs, outputs),) = case.data_sets
    by_name = (
        {name: tensor(array) for name, array in zip(filter(None, names), arrays, strict=True)}
        for names, arrays in ((node.input, inputs), (node.output, outputs))
    )
    return attributes, *by_name


def heads_first(x, heads):
    return x if x.dim() == 4 else x.unflatten(2, (heads, -1)).transpose(1, 2)


def as_ours(attributes, inputs):
    """(q, k, v, options) of `gqa.attention`."""
    kv_heads = attributes.get("kv_num_heads")
    q = heads_first(inputs["Q"], attributes.get("q_num_heads"))
    k, v = heads_first(inputs["K"], kv_heads), heads_first(inputs["V"], kv_heads)
    T = q.shape[2]
    options = {"q_start": 0, "causal": bool(attributes.get("is_causal", 0)), "scale": attributes.get("scale")}
    if "past_key" in inputs:
        options["q_start"] = inputs["past_key"].shape[2]
        k, v = torch.cat([inputs["past_key"], k], dim=2), torch.cat([inputs["past_value"], v], dim=2)
    if "nonpad_kv_seqlen" in inputs:
        options["kv_lengths"] = inputs["nonpad_kv_seqlen"]
        options["q_start"] = inputs["nonpad_kv_seqlen"] - T
    if "attn_mask" in inputs:
        options["mask"] = inputs["attn_mask"]
        masked = options["mask"].shape[-1]
        k, v = k[:, :, :masked], v[:, :, :masked]
    if attributes.get("softcap"):
        options["softcap"] = attributes["softcap"]
    left, right = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
    if right >= 0:
        options |= {"causal": True, "q_start": options["q_start"] + right}
    if left >= 0:
        options["window"] = left + max(right, 0) + 1
    return q, k, v, options


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", RUN)
def test_case(name, impl):
    attributes, inputs, outputs = named(CASES[name])
    q, k, v, options = as_ours(attributes, inputs)
    if impl == "triton":
        q, k, v, options = there(q, k, v, options)
    out = gqa.attention(q, k, v, impl=impl, **options).cpu()
    want = outputs.pop("Y")
    assert set(outputs) <= NOT_OURS
    if want.dim() == 3:
        out = out.transpose(1, 2).flatten(2)
    assert (out.shape, out.dtype) == (want.shape, want.dtype)
    # What ONNX expects was itself computed in the inputs' dtype: one rounding (half an eps) per term of the two sums.
    terms = q.shape[3] + k.shape[2]
    bound = torch.finfo(q.dtype).eps / 2 * terms * float(v.abs().max())
    assert (out.double() - want.double()).abs().max() <= bound


def test_no_case_disappears():
    assert len(RUN) + len(SKIPPED) == len(CASES)
    assert len(RUN) >= 93  # as many as onnx 1.23 has
    for name in SKIPPED:
        assert name.removesuffix(EXPANDED) in RUN
        for ours, theirs in zip(CASES[name.removesuffix(EXPANDED)].data_sets[0], CASES[name].data_sets[0], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype
                assert a.tobytes() == b.tobytes()
