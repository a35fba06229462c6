"""Peers: right on small shapes, or a clear word why not; and absent where they are not installed."""

import importlib.metadata

import pytest

from gqa.bench.check import answer
from gqa.bench.problem import Problem, random_inputs
from gqa.errors import GqaError

DECODE = Problem(6, 2, 16, 63, batch=2, dtype="fp32")
PREFILL = Problem(6, 2, 16, 64, 64, dtype="fp32")
BACKWARD = Problem(6, 2, 16, 64, 64, dtype="fp32", backward=True)
COMPILED = "torch FlexAttention"


@pytest.fixture(scope="module")
def peers(script):
    return script("peers")


def names():
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    found = ["torch enable_gqa", "torch folded"]
    return found + [name for name in ("onnxruntime", "jax") if name in installed]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("problem", [DECODE, PREFILL, BACKWARD], ids=["decode", "prefill", "backward"])
def test_a_peer_is_right_or_says_why_not(peers, name, problem):
    contenders, _ = peers.peers()
    inputs = random_inputs(problem)
    if (name, problem) in (("torch folded", PREFILL), ("torch folded", BACKWARD), ("onnxruntime", BACKWARD)):
        with pytest.raises(GqaError, match="no"):
            contenders[name](inputs)
        return
    ready = contenders[name](inputs)
    ready.run()  # a second run finds what the first one left
    error, allowed = answer(inputs).worst(ready.read(ready.run()))
    assert error <= allowed


def test_no_peer_takes_int8(peers):
    inputs = random_inputs(Problem(6, 2, 16, 63, dtype="int8"))
    for contender in peers.peers()[0].values():
        with pytest.raises(GqaError, match="no int8"):
            contender(inputs)


def test_ours_in_bf16_is_right_by_the_measure_of_int8(peers):
    inputs = random_inputs(Problem(6, 2, 16, 63, dtype="int8"))
    ready = peers.ours_in_bf16(inputs)
    error, allowed = answer(inputs).worst(ready.read(ready.run()))
    assert error <= allowed


def test_flex_attention_has_no_backward(peers):
    with pytest.raises(GqaError, match="no backward"):
        peers.flex_attention(random_inputs(BACKWARD))


def test_what_is_not_installed_is_listed(peers, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda library: library == "jax")
    found, absent = peers.peers()
    assert COMPILED in found
    assert not {"onnxruntime", "jax"} & set(found)
    assert absent == {"onnxruntime": "onnxruntime and onnx not installed", "jax": "jaxlib not installed"}
