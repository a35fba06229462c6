"""The device table."""

import csv
import tomllib
from pathlib import Path

import pytest

import gqa
from gqa.errors import GqaError
from gqa.hardware import devices, find_device


def test_every_number_has_its_source():
    table = tomllib.loads((Path(gqa.__file__).parent / "data" / "hardware.toml").read_text())["device"]
    for row in table:
        for key, figure in row.items():
            if key not in ("name", "driver"):
                assert figure["source"], (row["name"], key)
    assert len(devices()) == len(table) >= 14


def test_memory_is_the_reported_one_where_known():
    h100 = find_device("H100 SXM")
    assert h100.memory_bytes == 81559 * 1024 * 1024
    assert "driver reports" in h100.memory_basis
    mi300x = find_device("MI300X")
    assert mi300x.memory_bytes == 192 * 10**9
    assert "decimal" in mi300x.memory_basis


def test_rates():
    h100 = find_device("H100 SXM")
    assert (h100.bandwidth_bytes_per_second, h100.flops_per_second, h100.flops_dtype) == (3.35e12, 9.89e14, "bf16")
    assert find_device("T4").flops_dtype == "fp16"


@pytest.mark.parametrize("text", ["H100 SXM", "h100 sxm", "h100-sxm", "H100SXM", "NVIDIA H100 SXM", " h100_sxm "])
def test_names_forgive(text):
    assert find_device(text).name == "H100 SXM"


def test_unknown_devices():
    with pytest.raises(GqaError) as caught:
        find_device("h100")
    assert caught.value.hint == '--device "H100 PCIe" or --device "H100 SXM" or --device "H100 NVL"'
    assert "gqa plan --devices" in str(caught.value.allowed)
    assert "MI300X" in devices()
    for text in ("", "abacus", "  "):
        with pytest.raises(GqaError) as caught:
            find_device(text)
        assert caught.value.hint is None


def test_the_model_table_names_its_sources():
    rows = csv.DictReader((Path(gqa.__file__).parent / "data" / "models.csv").read_text().splitlines())
    assert all(row["source"] and row["model_type"] for row in rows)
