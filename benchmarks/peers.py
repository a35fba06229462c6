"""Other libraries' attention as contenders: each gets the inputs in the layout it likes, and says why it cannot serve.
What is for a GPU alone lies in gpu_peers.py.

Every peer computes on the same number of threads.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from gqa.bench.kernels import TORCH, Contender, Ready, of_torch, ours
from gqa.bench.problem import Inputs
from gqa.errors import GqaError

# Imported by name where they are used, as types are checked without them too.
LIBRARIES = {"onnxruntime": ("onnxruntime", "onnx"), "jax": ("jax", "jaxlib")}


def peers() -> tuple[dict[str, Contender], dict[str, str]]:
    """(name -> contender of every peer that is installed, name -> what is missing of the others)."""
    found: dict[str, Contender] = {**TORCH, "torch FlexAttention": flex_attention}
    absent = {}
    for name, contender in (("onnxruntime", onnxruntime_gqa), ("jax", jax_attention)):
        missing = [library for library in LIBRARIES[name] if not installed(library)]
        if missing:
            absent[name] = f"{' and '.join(missing)} not installed"
        else:
            found[name] = contender
    return found, absent


def installed(library: str) -> bool:
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def flex_attention(inputs: Inputs) -> Ready:
    """torch's FlexAttention, compiled for the shape."""
    floats_only(inputs)
    device = inputs.q.device.type
    if inputs.grad is not None and device == "cpu":
        raise GqaError("no backward pass on the CPU")
    compiled, block_mask = _flex(inputs.q.shape[2], inputs.problem.causal, device)
    return of_torch(inputs, functools.partial(compiled, block_mask=block_mask, enable_gqa=True))


@functools.cache
def _flex(tokens: int, causal: bool, device: str) -> tuple[Callable[..., torch.Tensor], Any]:
    from torch.nn.attention import flex_attention as flex

    # Beyond this number of shapes torch would go back to an uncompiled one, in silence.
    torch._dynamo.config.recompile_limit = 1000  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    mask = None
    if causal:
        mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=device)
    return torch.compile(flex.flex_attention, dynamic=False), mask


def onnxruntime_gqa(inputs: Inputs) -> Ready:
    """onnxruntime's com.microsoft GroupQueryAttention. Its cache is updated in place: in a decode step it is handed the
    keys and values before the last, and the last token's apart."""
    onnxruntime = importlib.import_module("onnxruntime")
    floats_only(inputs)
    problem = inputs.problem
    if inputs.grad is not None:
        raise GqaError("no backward pass")
    B, S = problem.batch, problem.context_tokens
    session = _onnxruntime_session(problem.query_heads, problem.kv_heads, problem.head_dim, problem.dtype)

    def tokens(x: torch.Tensor) -> Any:  # (B, heads, T, D) -> (B, T, heads * D)
        return x.transpose(1, 2).flatten(2).contiguous().numpy()

    new = slice(0, S) if problem.causal else slice(S - 1, S)
    arrays = {
        "query": tokens(inputs.q),
        "key": tokens(inputs.k[:, :, new]),
        "value": tokens(inputs.v[:, :, new]),
        "past_key": inputs.k.clone().numpy(),
        "past_value": inputs.v.clone().numpy(),
        "seqlens_k": torch.full((B,), S - 1, dtype=torch.int32).numpy(),
        "total_sequence_length": torch.tensor([S], dtype=torch.int32).numpy(),
    }
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    out = onnxruntime.OrtValue.ortvalue_from_numpy(torch.empty(arrays["query"].shape, dtype=inputs.q.dtype).numpy())
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in (("output", out), ("present_key", values["past_key"]), ("present_value", values["past_value"])):
        binding.bind_ortvalue_output(name, value)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return arrays  # alive as long as what is bound to them

    def read(_: Any) -> tuple[torch.Tensor, ...]:
        found = torch.from_numpy(out.numpy()).unflatten(2, (problem.query_heads, -1))
        return (found.transpose(1, 2),)

    return Ready(run, read)


@functools.cache
def _onnxruntime_session(query_heads: int, kv_heads: int, head_dim: int, dtype: str) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    errors = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    helper = importlib.import_module("onnx.helper")
    types = importlib.import_module("onnx").TensorProto
    kinds = {"fp32": types.FLOAT, "fp16": types.FLOAT16, "bf16": types.BFLOAT16}
    cache = ["batch", kv_heads, "capacity", head_dim]

    def infos(shapes: dict[str, list], kind: int) -> list:
        return [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]

    rows = {"query": query_heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
    inputs = infos({name: ["batch", "tokens", width] for name, width in rows.items()}, kinds[dtype])
    inputs += infos({"past_key": cache, "past_value": cache}, kinds[dtype])
    inputs += infos({"seqlens_k": ["batch"], "total_sequence_length": [1]}, types.INT32)
    outputs = infos({"output": ["batch", "tokens", rows["query"]]}, kinds[dtype])
    outputs += infos({"present_key": cache, "present_value": cache}, kinds[dtype])
    node = helper.make_node(
        "GroupQueryAttention",
        [info.name for info in inputs],
        [info.name for info in outputs],
        domain="com.microsoft",
        num_heads=query_heads,
        kv_num_heads=kv_heads,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "gqa", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (errors.NotImplemented, errors.Fail, errors.InvalidGraph, errors.InvalidArgument) as error:
        raise GqaError(f"not in {dtype}: {str(error).splitlines()[0][:120]}") from None


def jax_attention(inputs: Inputs) -> Ready:
    """jax.nn.dot_product_attention under jit, with K and V in its own layout (B, S, H, D)."""
    floats_only(inputs)
    jax = importlib.import_module("jax")
    function = _jax(inputs.problem.causal, inputs.grad is not None)
    tensors = [inputs.q, inputs.k, inputs.v, *([] if inputs.grad is None else [inputs.grad])]
    arrays = [jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous()) for x in tensors]

    def read(found: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_dlpack(x).transpose(1, 2) for x in found)

    return Ready(lambda: jax.block_until_ready(function(*arrays)), read)


@functools.cache
def _jax(causal: bool, backward: bool) -> Callable[..., Any]:
    jax = importlib.import_module("jax")
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    if not backward:
        return jax.jit(lambda q, k, v: (attend(q, k, v),))

    def forward_and_backward(q: Any, k: Any, v: Any, grad: Any) -> tuple[Any, ...]:
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(grad)

    return jax.jit(forward_and_backward)


def ours_in_bf16(inputs: Inputs, impl: str = "auto") -> Ready:
    """`gqa.attention` on the same keys and values in bf16: what int8 saves, measured in the same turns."""
    assert inputs.k_scale is not None
    assert inputs.v_scale is not None
    k, v = (
        (x * scale[..., None]).to(inputs.q.dtype)
        for x, scale in ((inputs.k, inputs.k_scale), (inputs.v, inputs.v_scale))
    )
    return ours(impl)(dataclasses.replace(inputs, k=k, v=v, k_scale=None, v_scale=None))


def floats_only(inputs: Inputs) -> None:
    if inputs.k_scale is not None:
        raise GqaError("no int8 keys and values")
