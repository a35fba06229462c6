# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""Coverage-guided fuzzing of the config parser and the planner, by hand:

    pip install atheris && python tests/attacks/fuzz_config.py -max_total_time=600 -max_len=512 -len_control=0

Bytes are taken as a config.json, or as edits to one of a known model type. Only GqaError may come out.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["gqa"]):
    from gqa.config import parse_config
    from gqa.config.parse import model_types
    from gqa.errors import GqaError
    from gqa.plan import sweep
    from gqa.plan.engines import ENGINES, find_engine

TYPES = ["llama", "", *sorted(model_types())]
KEYS = sorted(
    {key for row in model_types().values() for key in row.get("defaults", {})}
    | {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim"}
    | {"layer_types", "layers_block_type", "text_config", "block_configs", "per_layer_config", "attn_config", "dtype"}
    | {"hybrid_override_pattern", "attn_type_list", "full_attn_idxs", "no_rope_layers", "quantization_config"}
    | {"intermediate_size", "max_position_embeddings", "rope_parameters", "partial_rotary_factor", "use_cla"}
)
WORDS = [
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "chunked_attention",
    "mamba",
    "hybrid",
    "moe",
    "M*-E",
]


def value(data: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    match data.ConsumeIntInRange(0, 9 if depth < 3 else 6):
        case 0:
            return None
        case 1:
            return data.ConsumeBool()
        case 2 | 3:
            return data.ConsumeIntInRange(-1, 300)
        case 4:
            return data.ConsumeInt(8)
        case 5:
            return data.ConsumeFloat()
        case 6:
            return data.PickValueInList(WORDS) if data.ConsumeBool() else data.ConsumeUnicode(6)
        case 7:
            return [value(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 5))]
        case 8:
            return [data.PickValueInList(WORDS)] * data.ConsumeIntInRange(0, 8)
        case _:
            names = [*KEYS, "0", "1", "attention", "n_heads_in_group", "no_op", "kv_n_heads", "rope_type"]
            return {data.PickValueInList(names): value(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 4))}


def one(content: bytes) -> None:
    data = atheris.FuzzedDataProvider(content)
    if data.ConsumeBool():
        config = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 99}
        config |= {"model_type": data.PickValueInList(TYPES), "intermediate_size": 96}
        config |= {data.PickValueInList(KEYS): value(data) for _ in range(data.ConsumeIntInRange(0, 6))}
    else:
        try:
            config = json.loads(data.ConsumeUnicode(400))
        except (ValueError, RecursionError):
            return
    with contextlib.suppress(GqaError):
        shape = parse_config(config, "fuzzed")
        engine = find_engine(data.PickValueInList(list(ENGINES)))
        sweep.plan(shape, context=data.ConsumeIntInRange(1, 1 << 20), engine=engine).to_json()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
