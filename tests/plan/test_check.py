"""The planner against engines' logs."""

import pytest

from gqa.errors import GqaError
from gqa.plan.check import check

CASE = """
[[case]]
engine = "vllm@0.10"
model = "Llama-3-8B"
context = 8192
budget_gib = "11.12"
logged = {{ {logged} }}
source = "a test"
"""


def written(folder, logged):
    path = folder / "cases.toml"
    path.write_text(CASE.format(logged=logged))
    return path


def test_every_logged_case_is_reproduced():
    record = check()
    wrong = [row for row in record.results["figures"] if not row["agrees"]]
    assert not wrong
    assert len(record.results["figures"]) >= 60
    assert {row["engine"].partition("@")[0] for row in record.results["figures"]} == {
        *("vllm", "sglang", "llama.cpp", "decode")
    }
    # A speed is told as a share of its bound.
    shares = [row["efficiency"] for row in record.results["figures"] if row["efficiency"]]
    assert shares == [pytest.approx(0.68, abs=0.02)] * 2


@pytest.mark.parametrize(
    ("logged", "agrees"),
    [
        ("blocks = 5691", [True]),
        ("blocks = 5690", [True]),
        ("blocks = 5689", [False]),  # 11.12 GiB is at least 11.115 GiB, which holds 5690 blocks of 2 MiB
        ("blocks = 5697", [False]),
        ('blocks = 5691, concurrency = "11.12"', [True, True]),
        ('blocks = 5691, concurrency = "11.11"', [True, False]),  # 5691 * 16 / 8192 = 11.115
        ('needed_gib = "1.00"', [True]),  # 131,072 bytes * 8192 tokens
        ('needed_gib = "1.01"', [False]),
    ],
)
def test_a_wrong_figure_is_told(tmp_path, logged, agrees):
    record = check(written(tmp_path, logged))
    assert [row["agrees"] for row in record.results["figures"]] == agrees
    assert record.results["wrong"] == agrees.count(False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "case = 3",
        "[[case]]\nengine = 'vllm'",
        CASE.format(logged="blocks = 1").replace("context", "contexts"),
        CASE.format(logged="blocks = 1").replace('"11.12"', '"much"'),
        CASE.format(logged="cows = 1"),
        "\x00",
    ],
)
def test_files_that_are_not_understood(tmp_path, text):
    path = tmp_path / "cases.toml"
    path.write_text(text)
    with pytest.raises(GqaError):
        check(path)
    with pytest.raises(GqaError):
        check(tmp_path / "none.toml")
