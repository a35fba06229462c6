"""Contenders on a GPU: ours over pages, and the layouts in which other libraries are handed the tensors. Those are
stood in for by functions that expect what their documentation says."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa.bench.check import answer
from gqa.bench.kernels import OURS
from gqa.bench.problem import Problem, random_inputs
from gqa.errors import GqaError

DECODE = Problem(6, 2, 16, 64, batch=2, dtype="fp32")
PREFILL = Problem(6, 2, 16, 64, 64, batch=2, dtype="fp32")
BACKWARD = Problem(6, 2, 16, 64, 64, dtype="fp32", backward=True)
INT8 = Problem(6, 2, 16, 64, batch=2, dtype="int8")


@pytest.fixture(scope="module")
def peers(script):
    return script("gpu_peers")


def is_right(problem, contender):
    inputs = random_inputs(problem)
    ready = contender(inputs)
    ready.run()
    error, allowed = answer(inputs).worst(ready.read(ready.run()))
    return error <= allowed


@pytest.mark.parametrize("problem", [DECODE, INT8, PREFILL], ids=["decode", "int8", "prefill"])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_pages_hold_the_same_keys(peers, problem, impl):
    assert is_right(problem, lambda inputs: peers.ours_paged(inputs, impl=impl))


def test_pages_of_the_gpu_kernels(peers):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the inputs here lie on the CPU")
    assert is_right(DECODE, lambda inputs: peers.ours_paged(inputs, impl="triton"))


@pytest.mark.parametrize("problem", [Problem(6, 2, 16, 63), BACKWARD], ids=["ragged", "backward"])
def test_what_pages_do_not_do_is_said(peers, problem):
    with pytest.raises(GqaError, match="whole pages"):
        peers.ours_paged(random_inputs(problem), impl="reference")


@pytest.mark.parametrize("problem", [DECODE, INT8, PREFILL], ids=["decode", "int8", "prefill"])
@pytest.mark.parametrize("name", ["torch flash", "torch cuDNN"])
def test_a_backend_says_what_it_does_not_take(peers, name, problem):
    if torch.cuda.is_available():
        pytest.skip("the inputs here lie on the CPU")
    with pytest.raises(GqaError, match="no int8" if problem == INT8 else "does not take"):
        peers.peers()[0][name](random_inputs(problem))


def flash_like():
    """FlashAttention's functions: (B, tokens, heads, D), q of any number of heads that k's divides."""

    def flash_attn_func(q, k, v, causal=False):
        assert q.is_contiguous()
        assert k.is_contiguous()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def flash_attn_with_kvcache(q, k_cache, v_cache):
        assert q.shape[1] == 1
        return flash_attn_func(q, k_cache, v_cache), "lse"

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


@pytest.mark.parametrize("problem", [DECODE, PREFILL, BACKWARD], ids=["decode", "prefill", "backward"])
def test_flash_attention_gets_its_layout(peers, monkeypatch, problem):
    monkeypatch.setitem(sys.modules, "flash_attn_like", flash_like())
    assert is_right(problem, peers.flash_attention("flash_attn_like"))


class Paged:
    """FlashInfer's decode wrapper: pages (pages, page, H, D), q (B, H*G, D)."""

    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert kv_layout == "NHD"

    def plan(self, indptr, indices, last_page_len, qo_heads, kv_heads, head_dim, page_size, q_data_type, kv_data_type):
        assert last_page_len.tolist() == [page_size] * (len(indptr) - 1)
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.indptr, self.indices, self.heads = indptr.tolist(), indices.tolist(), (qo_heads, kv_heads, head_dim)

    def run(self, q, pages):
        outs = []
        for b, (start, end) in enumerate(zip(self.indptr, self.indptr[1:], strict=False)):
            k, v = (x[self.indices[start:end]].flatten(0, 1).transpose(0, 1)[None] for x in pages)
            assert (q.shape[1], k.shape[1], k.shape[3]) == self.heads
            outs.append(scaled_dot_product_attention(q[b][None, :, None], k, v, enable_gqa=True)[0, :, 0])
        return torch.stack(outs)


class Ragged:
    """FlashInfer's prefill wrapper: (tokens, heads, D), sequences end to end."""

    def __init__(self, workspace, kv_layout):
        assert kv_layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, qo_heads, kv_heads, head_dim, causal, q_data_type):
        assert causal
        self.indptr = qo_indptr.tolist()

    def run(self, q, k, v):
        outs = []
        for start, end in zip(self.indptr, self.indptr[1:], strict=False):
            one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            outs.append(scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)


@pytest.mark.parametrize("problem", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_flashinfer_gets_its_layout(peers, monkeypatch, problem):
    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Paged, BatchPrefillWithRaggedKVCacheWrapper=Ragged)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    assert is_right(problem, peers.flashinfer)


def test_flashinfer_has_no_backward(peers):
    with pytest.raises(GqaError, match="no backward"):
        peers.flashinfer(random_inputs(BACKWARD))


def test_no_library_takes_int8(peers):
    for contender in (peers.flashinfer, peers.flash_attention("flash_attn")):
        with pytest.raises(GqaError, match="no int8"):
            contender(random_inputs(INT8))


def test_what_is_not_installed_is_listed(peers, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda library: library == "flash-attn")
    found, absent = peers.peers()
    assert list(found) == ["torch flash", "torch cuDNN", "torch folded", "flash-attn 2"]
    assert absent == {"flash-attn 3": "flash-attn-3 not installed", "FlashInfer": "flashinfer-python not installed"}


def test_who_takes_part(peers):
    found = {"torch flash": lambda inputs: None}
    assert list(peers.contenders(DECODE, found, "auto", compiled=False, paged=False)) == [OURS, "torch flash"]
    chosen = peers.contenders(INT8, found, "reference", compiled=True, paged=True)
    assert list(chosen) == [OURS, "torch flash", peers.FLEX, peers.PAGED, "gqa in bf16"]
    for name in (OURS, peers.PAGED, "gqa in bf16"):
        assert is_right(INT8, chosen[name])
