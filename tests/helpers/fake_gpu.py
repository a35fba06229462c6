"""A GPU that computes nothing, to see on any machine what our code would do on one.

    python tests/helpers/fake_gpu.py        prints a JSON object: what each of SCENARIOS found

Tensors are torch's fake ones: they have shape, dtype and device only. So an operation whose operands lie on different
devices raises, and so does all that would make the host wait for a value (`item`, `tolist`, `bool`, `torch.equal`,
masks as indices); `Copies` counts what goes from one device to another. The device is torch's slot for foreign ones:
a torch without CUDA refuses to index even a fake tensor on CUDA. As the slot once taken is taken for good, this runs in
a process of its own. transformers treats fake tensors as it does a CUDA graph's capture: it reads no mask.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers.served import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

import gqa
from gqa.cache.contiguous import ContiguousCache
from gqa.cache.int8 import Int8Cache
from gqa.cache.paged import PagedCache
from gqa.cache.pool import BlockPool

DEVICE = "gpu"
FAMILIES = ("llama-gqa", "mistral-window", "gemma2-softcap-window", "gpt-oss-sinks-window")
CACHES = {
    "contiguous": ContiguousCache,
    "int8": Int8Cache,
    "paged": PagedCache,
    "paged-int8": lambda: PagedCache(pool=int8_blocks()),
}


class Copies(TorchDispatchMode):
    """Counts the operations whose result lies elsewhere than their operands."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = {x.device for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and devices and result.device not in devices:
            self.count += 1
        return result


@contextmanager
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def int8_blocks() -> BlockPool:
    return BlockPool(0, grows=True, dtype=torch.int8)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=DEVICE)


def moved(module: torch.nn.Module) -> Any:
    """The module with its parameters and buffers on the GPU, as `.to(DEVICE)` leaves it."""
    for part in module.modules():
        part._parameters.update(
            {n: torch.nn.Parameter(on_gpu(x)) for n, x in part._parameters.items() if x is not None}
        )
        part._buffers.update({n: on_gpu(x) for n, x in part._buffers.items() if x is not None})
    return module.eval()


def model(name: str) -> Any:
    gqa.hf.register()
    config = copy.deepcopy(MODELS[name])
    # bf16: for a GPU, the meta functions of grouped products know nothing else
    return AutoModelForCausalLM.from_config(config, attn_implementation="gqa", dtype=torch.bfloat16)


def copies_of_a_step(step: Callable[[], torch.Tensor]) -> int:
    with Copies() as copies:
        out = step()
    assert out.device.type == DEVICE
    return copies.count


def cache_step(kind: str) -> int:
    """Two layers: a prompt, changes between forwards, and the copies of a step."""
    cache, k = CACHES[kind](), torch.empty(2, 3, 20, 8, dtype=torch.bfloat16, device=DEVICE)

    def step(tokens: int) -> torch.Tensor:
        for layer in range(2):
            keys, values = cache.update(layer, k[:, :, :tokens], k[:, :, :tokens])
        for part in (keys, values):
            tensors = (part,) if isinstance(part, torch.Tensor) else (part.data, part.scale, part.block_table)
            assert {x.device.type for x in tensors if x is not None} == {DEVICE}
        return keys if isinstance(keys, torch.Tensor) else keys.data

    for tokens in (20, 1, 13):
        step(tokens)
    cache.crop(30)
    if not isinstance(cache, PagedCache):  # whose blocks change hands on the host, which has to know the sequences
        cache.select(torch.zeros(2, dtype=torch.int64, device=DEVICE))
    step(20)
    return copies_of_a_step(lambda: step(1))


def module_step(kind: str) -> int:
    layer = gqa.GroupedQueryAttention(24, 6, 2)
    with fake():
        layer, cache = moved(layer), CACHES[kind]()
        x = torch.empty(2, 6, 24, device=DEVICE)
        layer(x, cache=cache)
        return copies_of_a_step(lambda: layer(x[:, :1], cache=cache))


def model_step(name: str, kind: Any) -> int:
    """A prompt with padding, then two steps."""
    loaded = model(name)
    options = {"kind": "paged", "pool": int8_blocks()} if kind == "paged-int8" else {"kind": kind}
    with fake():
        loaded, cache = moved(loaded), gqa.hf.GqaCache(config=MODELS[name], **options)

        def step(tokens: int, seen: int) -> torch.Tensor:
            ids, padding = (torch.ones(2, n, dtype=torch.int64, device=DEVICE) for n in (tokens, seen))
            return loaded(ids, attention_mask=padding, past_key_values=cache).logits

        step(9, 9)
        step(1, 10)
        return copies_of_a_step(lambda: step(1, 11))


def mistake(make: Callable[[], Any]) -> str:
    """What a mistake is answered with: the name of the error."""
    try:
        with fake():
            make()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def in_fake(run: Callable[[], int]) -> int:
    with fake():
        return run()


SCENARIOS: dict[str, Callable[[], Any]] = {
    "a value read": lambda: mistake(lambda: torch.ones(3, device=DEVICE).sum().item()),
    "a comparison": lambda: mistake(lambda: torch.equal(*[torch.ones(3, device=DEVICE)] * 2)),
    "copies there and back": lambda: (
        in_fake(lambda: copies_of_a_step(lambda: torch.ones(3).to(DEVICE).cpu().to(DEVICE))) - 1
    ),
    "three copies": lambda: in_fake(lambda: copies_of_a_step(lambda: torch.ones(3).to(DEVICE).cpu().to(DEVICE))),
    "two devices": lambda: mistake(lambda: torch.ones(3, device=DEVICE) + torch.ones(3)),
    **{f"cache {kind}": lambda kind=kind: in_fake(lambda: cache_step(kind)) for kind in CACHES},
    **{f"module {kind}": lambda kind=kind: module_step(kind) for kind in CACHES},
    **{f"{name} {kind}": lambda name=name, kind=kind: model_step(name, kind) for name in FAMILIES for kind in CACHES},
}

if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    print(json.dumps({name: run() for name, run in SCENARIOS.items()}))
