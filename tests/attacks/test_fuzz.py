"""Headers and indexes that nobody thought of: read, or refused with the one error, never anything else."""

import contextlib
import copy
import json
from typing import Any

import pytest
from helpers.attacks import complete
from helpers.checkpoints import write_checkpoint
from helpers.headers import header_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqa.errors import GqaError
from gqa.weights.header import read_header
from gqa.weights.reader import INDEX, Checkpoint

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = st.one_of(st.integers(), st.integers(0, 64), st.sampled_from([2**31, 2**32, 2**63, 2**64, -1]), st.floats())
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4))
SIZES = st.lists(st.one_of(st.integers(0, 4), NUMBERS), max_size=4)
DTYPES = st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "F8_E4M3", "f32", ""])
ENTRY = st.fixed_dictionaries(
    {"dtype": DTYPES | JSON, "shape": SIZES | JSON, "data_offsets": SIZES | JSON}, optional={"more": JSON}
)
NAMES = st.sampled_from(["a", "b", "__metadata__", ""]) | st.text(max_size=8)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_a_file(tmp_path, content):
    assert header_of(tmp_path, content) is None  # 8 bytes of length and a sound header do not come by chance


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_a_header(tmp_path, content):
    shard = header_of(tmp_path, header_file(content))
    assert shard is None or shard.tensors == {}  # `{}` is a header, of no tensors


@QUICK
@given(st.dictionaries(NAMES, ENTRY | JSON, max_size=4), st.integers(0, 64))
def test_any_table_as_a_header(tmp_path, header, data_bytes):
    shard = header_of(tmp_path, header_file(json.dumps(header).encode(), data_bytes))
    if shard is not None:  # then it is a sound one
        position = shard.nbytes - data_bytes
        for entry in shard.tensors.values():
            assert entry.start == position
            position += entry.nbytes
        assert position == shard.nbytes


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("fuzz") / "m", shards=2)
    return folder, json.loads((folder / INDEX).read_text())


@QUICK
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_an_index(sharded, content):
    folder, _ = sharded
    (folder / INDEX).write_bytes(content)
    with pytest.raises(GqaError) as caught:
        Checkpoint(folder)
    assert complete(caught.value)


FILES = st.sampled_from(
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", "..", "/"]
)
TENSORS = st.sampled_from(["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]) | st.text(max_size=8)


@QUICK
@given(st.dictionaries(TENSORS, FILES | JSON, min_size=1, max_size=3))
def test_an_index_with_some_places_changed(sharded, changes):
    folder, honest = sharded
    index: dict[str, Any] = copy.deepcopy(honest)
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))
    if index == honest:
        assert set(Checkpoint(folder).names) == set(honest["weight_map"])
        return
    with pytest.raises(GqaError) as caught:
        Checkpoint(folder)
    assert complete(caught.value)


def header_of(folder, content):
    """The header of a file with this content; None where it is refused."""
    (folder / "x.safetensors").write_bytes(content)
    with contextlib.suppress(GqaError):
        return read_header(folder / "x.safetensors")
