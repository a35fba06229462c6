"""Model shapes: the only place that knows Hugging Face's config keys.

`parse_config` turns a config.json into a frozen `ModelShape`; `child_config` edits one for fewer KV heads.
"""

from gqa.config.child import child_config
from gqa.config.legacy import add_legacy_keys
from gqa.config.parse import parse_config, text_part
from gqa.config.shape import (
    Details,
    Experts,
    Latent,
    LayerShape,
    ModelShape,
    State,
    check_kv_heads,
    kv_head_choices,
)
from gqa.config.values import MAX_TOKENS

__all__ = [
    "MAX_TOKENS",
    "Details",
    "Experts",
    "Latent",
    "LayerShape",
    "ModelShape",
    "State",
    "add_legacy_keys",
    "check_kv_heads",
    "child_config",
    "kv_head_choices",
    "parse_config",
    "text_part",
]
