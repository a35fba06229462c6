"""Sizes and counts: binary and decimal never mixed up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.errors import GqaError
from gqa.units import dtype_bytes, format_bytes, format_seconds, parse_bytes, parse_seconds, parse_tokens


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 25_769_803_776),
        ("80GB", 80_000_000_000),
        ("80 gb", 80_000_000_000),
        ("1.5 MiB", 1_572_864),
        ("512", 512),
        ("7B", 7),
        ("2TiB", 2_199_023_255_552),
        (" 1KB ", 1000),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "24 G", "24Gb/s", "-1GB", "1e9", "1,5GB", "9" * 400, "nan", "24GiBGiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(GqaError, match="a size is not understood"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("131072", 131072),
        ("128k", 131072),
        ("128K", 131072),
        ("1M", 1_048_576),
        ("0.5k", 512),
        ("1_000", 1000),
        (" 8k ", 8192),
    ],
)
def test_tokens(text, count):
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "k", "8kk", "8 tokens", "1e5", "0.2", "9" * 400, "inf", "८"])
def test_tokens_that_are_none(text):
    with pytest.raises(GqaError, match="a token count is not understood"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("60m", 3600), ("1.5 h", 5400), ("0.5", 0.5), (" 2M ", 120)]
)
def test_durations(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "m", "1d", "60 minutes", "inf", "nan", "1e5"])
def test_durations_that_are_none(text):
    with pytest.raises(GqaError, match="a duration is not understood"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (327_680, "320 KiB"),
        (42_949_672_960, "40 GiB"),
        (80_000_000_000, "74.51 GiB"),
        (343_597_383_680, "320 GiB"),
        (1 << 40, "1 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_printed_sizes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5e-7, "0.5 µs"), (0.0123, "12.3 ms"), (45, "45 s"), (200, "3 min 20 s"), (3720, "1 h 02 min")],
)
def test_printed_times(seconds, text):
    assert format_seconds(seconds) == text


@given(st.text(max_size=20))
def test_only_gqa_errors_come_out(text):
    for parse in (parse_bytes, parse_tokens, parse_seconds, dtype_bytes):
        try:
            assert parse(text) >= 0
        except GqaError:
            continue


@given(st.integers(0, 2**50))
def test_plain_bytes_survive(count):
    if count < 10**15:
        assert parse_bytes(str(count)) == count


def test_dtypes():
    assert [dtype_bytes(name) for name in ("fp32", "fp16", "bf16", "int8")] == [4, 2, 2, 1]
    with pytest.raises(GqaError, match="unknown dtype"):
        dtype_bytes("float16")
