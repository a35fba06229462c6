"""What the user calls MODEL -> a config, and the folder it lives in.

MODEL is a folder with a config.json, such a file itself, a GGUF file, the name of a bundled shape (`llama-3-70b`) or of
a preset (`smollm2-135m`), or a hub id (`meta-llama/Llama-3.1-8B`, `id@revision`).
"""

from gqa.source.bundled import bundled_names
from gqa.source.files import MAX_JSON_BYTES, check_file, read_json
from gqa.source.hub import CHECKPOINT_FILES
from gqa.source.legacy import legacy_tokenizer, write_legacy_keys
from gqa.source.open import Source, open_checkpoint, open_source
from gqa.source.presets import presets

__all__ = [
    "CHECKPOINT_FILES",
    "MAX_JSON_BYTES",
    "Source",
    "bundled_names",
    "check_file",
    "legacy_tokenizer",
    "open_checkpoint",
    "open_source",
    "presets",
    "read_json",
    "write_legacy_keys",
]
