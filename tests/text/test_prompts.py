import pytest

from gqa.errors import GqaError
from gqa.text import Prompt, read_prompts


def test_lines_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne?\n\n  Two: é? \r\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [Prompt("One?"), Prompt("Two: é?")]


def test_json_lines(tmp_path):
    lines = [
        '{"prompt": "2 + 2?", "answer": "4", "answers": ["four", "4"]}',
        "",
        '{"prompt": " Hello", "kind": "any"}',
        '{"prompt": "Blue?", "answers": ["sky", "sea"]}',
        '{"prompt": "One?", "answers": "yes"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "a.jsonl") == [
        Prompt("2 + 2?", ("4", "four")),
        Prompt(" Hello"),
        Prompt("Blue?", ("sky", "sea")),
        Prompt("One?", ("yes",)),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{'prompt': 1}",
        '"prompt"',
        '{"question": "x"}',
        '{"prompt": 3}',
        '{"prompt": " "}',
        '{"prompt": "x", "answer": 4}',
        '{"prompt": "x", "answer": ""}',
        '{"prompt": "x", "answers": {"a": 1}}',
        "[" * 5000,
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(GqaError, match=r"line of the prompts is wrong\ngot: .*a\.jsonl, line 3"):
        read_prompts(tmp_path / "a.jsonl")


def test_files_without_prompts(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("\n \n")
        with pytest.raises(GqaError, match="no prompts"):
            read_prompts(tmp_path / name)
    with pytest.raises(GqaError, match="no file of prompts"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GqaError, match="cannot be read"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(GqaError, match="cannot be read"):
        read_prompts(tmp_path)
