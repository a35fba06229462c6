"""GGUF files that are damaged or lie: each one error, no memory for what is only claimed, nothing written."""

import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from helpers.attacks import complete
from helpers.gguf_files import key, raw_file, tensor, text, tiny_model, write_gguf

from gqa.errors import GqaError
from gqa.source import open_checkpoint, open_source
from gqa.source.gguf_header import BLOCKS, read_gguf

U32, TEXT, ARRAY = 4, 8, 9
LLAMA = key("general.architecture", TEXT, text("llama"))


def number(name: str, value: int, kind: int = U32) -> bytes:
    return key(name, kind, struct.pack("<I", value))


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


SOUND = raw_file([LLAMA], [tensor("a", (32,)), tensor("b", (64,), 2, 128)], 128 + 36)

ATTACKS = {
    "empty": (b"", "begins with b''"),
    "three bytes": (b"GGU", "begins with"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "begins with"),
    "a page of a web server": (b"<!DOCTYPE html>", "begins with"),
    "four bytes": (b"GGUF", "truncated"),
    "version 1": (raw_file([], [], version=1), "version 1"),
    "big-endian": (raw_file([], [], version=3 << 24), "version 50331648"),
    "2^63 tensors": (raw_file([LLAMA], [], tensor_count=1 << 63), "claims 9223372036854775808 tensors"),
    "a million tensors": (raw_file([LLAMA], [], tensor_count=1_000_000), "claims 1000000 tensors"),
    "one tensor more than there is": (raw_file([LLAMA], [tensor()], 128, tensor_count=2), "dimensions|UTF-8|named|''"),
    "2^64 - 1 keys": (raw_file([], [], key_count=(1 << 64) - 1), "claims 18446744073709551615 metadata"),
    "a key of 2^63 bytes": (raw_file([text("a", 1 << 63)], [], key_count=1, data_bytes=64), "a key of"),
    "a key of 2^64 - 8 bytes": (raw_file([text("a", (1 << 64) - 8)], [], key_count=1, data_bytes=64), "a key of"),
    "a text of 2^62 bytes": (raw_file([key("a", TEXT, text("b", 1 << 62))], []), "truncated"),
    "a text beyond the end": (raw_file([key("a", TEXT, text("b", 500))], []), "truncated"),
    "a text that is not UTF-8": (raw_file([key("a", TEXT, text(b"\xff\xfe"))], []), "not UTF-8"),
    "a key that is not UTF-8": (raw_file([key(b"\xff\xfe", U32, bytes(4))], []), "not UTF-8"),
    "a key that colours the terminal": (raw_file([number("\x1b[31mred", 1)], []), "a key that is"),
    "a key twice": (raw_file([LLAMA, LLAMA], []), "general.architecture twice"),
    "a value of type 13": (raw_file([number("a", 1, 13)], []), "of type 13"),
    "an array of 2^62 numbers": (raw_file([key("a", ARRAY, array(U32, 1 << 62))], []), "elements of a"),
    "an array of 2^62 texts": (raw_file([key("a", ARRAY, array(TEXT, 1 << 62))], []), "elements of a"),
    "an array of a text of 2^62 bytes": (
        raw_file([key("a", ARRAY, array(TEXT, 1, text("b", 1 << 62)))], []),
        "truncated",
    ),
    "an array of arrays": (raw_file([key("a", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))], []), "of type 9"),
    "an alignment of 0": (raw_file([number("general.alignment", 0)], []), "alignment of 0"),
    "an alignment of 3": (raw_file([number("general.alignment", 3)], []), "alignment of 3"),
    "an alignment of 2^31": (raw_file([number("general.alignment", 1 << 31)], []), "alignment"),
    "an alignment that is a text": (raw_file([key("general.alignment", TEXT, text("32"))], []), "alignment"),
    "a tensor twice": (raw_file([], [tensor("a"), tensor("a", offset=128)], 256), "tensor a twice"),
    "a tensor of no name's bytes": (raw_file([], [text("a", 1 << 63)], 64, tensor_count=1), "a tensor name of"),
    "a tensor name of two lines": (raw_file([], [tensor("a\nerror: all is well")], 128), "a tensor name that is"),
    "no dimensions": (raw_file([], [tensor(shape=())], 128), "0 dimensions"),
    "a billion dimensions": (
        raw_file([], [text("a") + struct.pack("<I", 1 << 30)], 64, tensor_count=1),
        "1073741824 dimensions",
    ),
    "a size of 0": (raw_file([], [tensor(shape=(0,))], 128), "shape"),
    "a size of 2^63": (raw_file([], [tensor(shape=(1 << 63,))], 128), "shape"),
    "sizes that overflow to what is there": (raw_file([], [tensor(shape=(1 << 32, 1 << 32, 32))], 128), "shape"),
    "half a block": (raw_file([], [tensor(shape=(16,), kind=2)], 128), "whole blocks of 32"),
    "an unknown type": (raw_file([], [tensor(kind=99)], 128), "quantisation type"),
    "a type that ggml has dropped": (raw_file([], [tensor(kind=4)], 128), "quantisation type"),
    "a type of whole numbers": (raw_file([], [tensor(kind=26)], 128), "quantisation type"),
    "an offset beyond the end": (raw_file([], [tensor(offset=1 << 40)], 128), "begins at 1099511627776"),
    "an offset of 2^64 - 32": (raw_file([], [tensor(offset=(1 << 64) - 32)], 128), "begins at"),
    "the same bytes twice": (raw_file([], [tensor("a"), tensor("b")], 256), "tensor b begins at 0"),
    "overlap": (raw_file([], [tensor("a"), tensor("b", offset=64)], 256), "tensor b begins at 64"),
    "a hole": (raw_file([], [tensor("a"), tensor("b", offset=256)], 512), "tensor b begins at 256"),
    "cut short by one byte": (SOUND[:-1], "is truncated"),
    "no data": (raw_file([LLAMA], [tensor()]), "is truncated"),
    **{
        f"cut short after {n} bytes of the header": (SOUND[:n], "truncated|claims|begins with")
        for n in range(1, 120, 7)
    },
    "no architecture": (raw_file([], []), "architecture that gqa does not read"),
    "an unknown architecture": (raw_file([key("general.architecture", TEXT, text("gpt2"))], []), "got: 'gpt2'"),
    "an architecture that is a number": (raw_file([number("general.architecture", 7)], []), "got: 7"),
    "an architecture that colours the terminal": (
        raw_file([key("general.architecture", TEXT, text("\x1b[31m"))], []),
        "architecture that gqa does not read",
    ),
    "no numbers": (raw_file([LLAMA], []), "llama.block_count is not understood"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_a_raw_file(tmp_path, cache, name, opener):
    content, said = ATTACKS[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(GqaError, match=said) as caught:
            opener(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.what.startswith("x.gguf")
    assert complete(caught.value)
    assert len(str(caught.value)) < 1000
    assert peak < 1 << 20
    assert not cache.exists()


def test_the_sound_file_is_sound(tmp_path):
    (tmp_path / "x.gguf").write_bytes(SOUND)
    header = read_gguf(tmp_path / "x.gguf")
    assert (header.shapes, header.types) == ({"a": (32,), "b": (64,)}, {"a": "F32", "b": "Q4_0"})


def test_block_sizes_are_those_of_the_gguf_package():
    for kind, (name, *sizes) in BLOCKS.items():
        assert gguf.GGMLQuantizationType(kind).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == tuple(sizes)


@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_a_pipe_and_a_device(tmp_path, cache, opener):
    os.mkfifo(tmp_path / "x.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    for name in ("x.gguf", "zero.gguf"):
        with pytest.raises(GqaError, match="not an ordinary file"):
            opener(str(tmp_path / name))
    assert not cache.exists()


@pytest.mark.parametrize("opener", [open_source, open_checkpoint])
def test_no_such_file_and_a_folder_of_that_name(tmp_path, opener):
    with pytest.raises(GqaError, match="no such model"):
        opener(str(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(GqaError, match=r"without config\.json"):
        opener(str(tmp_path / "x.gguf"))


# Sound files of models that are not what they claim, or more than gqa understands.
MODELS = {
    "experts": ({"llama__expert_count": 8}, "llama.expert_count"),
    "scaled rotary embedding": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type"),
    "rotary factors of its own": ({"rope_freqs__weight": np.full(4, 2, np.float32)}, "tensor rope_freqs.weight"),
    "rotary factors that are no numbers": (
        {"rope_freqs__weight": np.full(4, np.nan, np.float32)},
        "tensor rope_freqs.weight",
    ),
    "rotary factors of too many pairs": ({"rope_freqs__weight": np.ones(8, np.float32)}, "tensor rope_freqs.weight"),
    "rotary factors in half precision": ({"rope_freqs__weight": np.ones(4, np.float16)}, "tensor rope_freqs.weight"),
    "a window": ({"llama__attention__sliding_window": 64}, "llama.attention.sliding_window"),
    "a key of tomorrow": ({"llama__attention__new": 1.5}, "llama.attention.new"),
    "a list of tomorrow": ({"llama__new": [1, 2]}, "llama.new"),
    "heads of another width": ({"llama__attention__key_length": 16}, "tensor blk.0.attn_q.weight"),
    "values of another width": ({"llama__attention__value_length": 16}, "llama.attention.value_length"),
    "half of each head turned": ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count"),
    "a tensor more": ({"blk__0__attn_q__bias": np.ones(64, np.float32)}, "tensor blk.0.attn_q.bias"),
    "one part of three": ({"split__count": 3}, "one part of a model"),
    "a token beyond the vocabulary": ({"tokenizer__ggml__padding_token_id": 10**6}, "padding_token_id"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_not_plain(tmp_path, cache, name):
    keys, said = MODELS[name]
    path = write_gguf(tmp_path / "x.gguf", tiny_model(), **keys)
    for opener in (open_source, open_checkpoint):
        with pytest.raises(GqaError, match=said) as caught:
            opener(str(path))
        assert complete(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("own", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 1 << 30),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("hidden_size", 128),
        ("intermediate_size", 1 << 30),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0.0),
    ],
)
def test_numbers_that_are_not_those_of_the_tensors(tmp_path, cache, own, value):
    model = tiny_model()
    before = write_gguf(tmp_path / "sound.gguf", model).read_bytes()
    kind, form = (6, "<f") if own == "rms_norm_eps" else (U32, "<I")
    written = {
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    }[own]
    sound = key(written, kind, struct.pack(form, getattr(model.config, own)))
    assert before.count(sound) == 1
    (tmp_path / "x.gguf").write_bytes(before.replace(sound, key(written, kind, struct.pack(form, value))))
    for opener in (open_source, open_checkpoint):
        with pytest.raises(GqaError, match="is not understood"):
            opener(str(tmp_path / "x.gguf"))
    assert not cache.exists()


@pytest.mark.parametrize("name", ["tokens that are not UTF-8", "an unknown tokenizer"])
def test_what_only_transformers_finds(tmp_path, cache, name):
    path = write_gguf(tmp_path / "x.gguf", tiny_model())
    data = path.read_bytes()
    if name == "an unknown tokenizer":
        data = data.replace(text("tokenizer.ggml.model") + struct.pack("<I", TEXT) + text("gpt2"),
                            text("tokenizer.ggml.model") + struct.pack("<I", TEXT) + text("none"))  # fmt: skip
    else:
        data = data.replace(text("<|start|>"), text(b"\xff" * 9))
    path.write_bytes(data)
    with pytest.raises(GqaError, match="transformers cannot read the GGUF file") as caught:
        open_checkpoint(str(path))
    assert complete(caught.value)
    assert [file.name for file in cache.iterdir()] == ["gguf.lock"]
