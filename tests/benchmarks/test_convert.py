"""The conversion benchmark: its synthetic checkpoint, its check, and a run on a tiny shape."""

import pytest
import torch

from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert as run_convert
from gqa.record import read_record
from gqa.source import open_checkpoint
from gqa.weights.reader import Checkpoint

TINY = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50}


@pytest.fixture
def convert(script, monkeypatch):
    module = script("convert")
    shapes = {name: shape | TINY for name, shape in module.SHAPES.items()}
    monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr("gqa.bench.document.commit", lambda: "0123456789ab")
    return module


def test_weights_are_finite_moderate_and_sharded(convert, tmp_path):
    convert.write_checkpoint(tmp_path / "m", convert.SHAPES["7b"], shard_bytes=200_000)
    checkpoint = Checkpoint(tmp_path / "m")
    assert len(checkpoint.shards) > 2
    for name in checkpoint.names:
        sizes = checkpoint.read(name).float().abs()
        low, high = (1, 1) if "norm" in name else (2**-8, 2**-4)
        assert low <= sizes.min() <= sizes.max() <= high, name


def test_a_wrong_result_gets_no_time(convert, tmp_path):
    convert.write_checkpoint(tmp_path / "m", convert.SHAPES["7b"])
    run_convert(open_checkpoint(str(tmp_path / "m")), tmp_path / "out", make_recipe(8, "mean"))
    convert.check(tmp_path / "m", tmp_path / "out", "mean")
    entry = Checkpoint(tmp_path / "out").entry("model.layers.2.self_attn.v_proj.weight")
    with (tmp_path / "out" / "model-00001-of-00001.safetensors").open("r+b") as stream:
        stream.seek(entry.start + 7)
        stream.write(b"\x3b")
    with pytest.raises(AssertionError, match=r"layers\.2\.self_attn\.v_proj"):
        convert.check(tmp_path / "m", tmp_path / "out", "mean")


def test_a_run_writes_a_record_and_leaves_no_files(convert, tmp_path, capsys):
    (tmp_path / "place").mkdir()
    path = tmp_path / "record.json"
    convert.main(["--only", "mean", "--turns", "1", "--place", str(tmp_path / "place"), "--out", str(path)])
    (row,) = read_record(path, convert.COMMAND).results["conversions"]
    assert row["what"] == "mean"
    assert row["share_of_cp"] == pytest.approx(row["cp_seconds"] / row["seconds"])
    assert row["peak_rss_bytes"] > 100 << 20  # a process with torch in it
    assert list((tmp_path / "place").iterdir()) == []
    assert "mean: " in capsys.readouterr().err


def test_the_calibrated_conversion_is_what_it_says(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "WINDOWS", 2)
    monkeypatch.setattr(convert, "WINDOW", 16)
    convert.write_checkpoint(tmp_path / "m", convert.SHAPES["1b"])
    convert.calibrated(str(tmp_path / "m"), str(tmp_path / "out"), 0)
    convert.check(tmp_path / "m", tmp_path / "out", "calibrated svd")
    assert Checkpoint(tmp_path / "out").read("model.layers.0.self_attn.k_proj.weight").dtype == torch.bfloat16
