"""A second device on a machine that has only a CPU: tensors that say they lie on `meta`, with numbers on the CPU.

As on a GPU, what lies there meets nothing that lies on the CPU, but for single numbers and indexes, and is read only
after `.cpu()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "meta"
# These take indexes from the CPU on every device.
_INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_")


class There(torch.Tensor):
    """A tensor of the other device. inner: its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME), requires_grad=inner.requires_grad,
        )  # fmt: skip
        self.inner = inner
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Within it, what is made on `meta` is made there. ops: how many calculations ran on it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        self.ops += any(isinstance(leaf, There) for leaf in tree_flatten((args, kwargs))[0])
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, shape = tree_flatten((args, kwargs))
    there = any(isinstance(leaf, There) for leaf in leaves)
    # torch itself makes these of lists of indexes, and their numbers are lost.
    assert not any(type(leaf) is not There and isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves), func
    packet = str(func.overloadpacket)
    if there and packet not in (*_INDEXING, "aten.copy_"):
        strangers = [
            leaf for leaf in leaves if type(leaf) is not There and isinstance(leaf, torch.Tensor) and leaf.ndim
        ]
        assert not strangers, f"{func} meets tensors of two devices"
    wanted = kwargs.get("device")
    goes_there = wanted is not None and torch.device(wanted).type == NAME
    args, kwargs = tree_unflatten([leaf.inner if isinstance(leaf, There) else leaf for leaf in leaves], shape)
    if goes_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*args, **kwargs)
    if goes_there and packet == "aten._to_copy" and result is args[0]:
        result = result.clone()
    if not (goes_there if wanted is not None else there):
        return result
    known = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, There)}  # in place: the tensor that came in

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # A conjugate that is only noted would not be noted on the outside.
        return known[id(value)] if id(value) in known else There(value.resolve_conj().resolve_neg())

    return tree_map(wrapped, result)
