"""gqa: grouped-query attention as a dial. Plan, convert, uptrain, measure and run models with fewer KV heads.

Importing gqa loads neither torch nor transformers; the names below load what they need at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gqa.errors import GqaError

if TYPE_CHECKING:
    from gqa.model import hf
    from gqa.model.module import GroupedQueryAttention
    from gqa.ops.api import attention, attention_impl, attention_packed

__version__ = "0.1.0"

# public name -> where it lives
_LAZY = {
    "attention": "gqa.ops.api:attention",
    "attention_impl": "gqa.ops.api:attention_impl",
    "attention_packed": "gqa.ops.api:attention_packed",
    "GroupedQueryAttention": "gqa.model.module:GroupedQueryAttention",
    "hf": "gqa.model.hf",
}

__all__ = [
    "GqaError",
    "GroupedQueryAttention",
    "__version__",
    "attention",
    "attention_impl",
    "attention_packed",
    "hf",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gqa' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    value = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
