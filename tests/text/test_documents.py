import json

import pytest

from gqa.errors import GqaError
from gqa.text import pieces, read_text
from gqa.text.documents import plain_bytes

DOCUMENTS = ["one\ntwo", "", "ä \u2028 three", "four"]


@pytest.fixture
def folder(tmp_path):
    """The same documents in every form, below one folder."""
    (tmp_path / "b").mkdir()
    lines = [json.dumps({"body": text, "n": n}) for n, text in enumerate(DOCUMENTS)]
    (tmp_path / "b" / "rows.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    return tmp_path


def test_every_line_of_json_is_a_document(folder):
    path = folder / "b" / "rows.jsonl"
    assert list(pieces([path], "body")) == [(text, True) for text in DOCUMENTS]
    assert read_text([path], "body") == "\n".join(DOCUMENTS)


def test_every_row_of_parquet_is_a_document(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    many = DOCUMENTS * 700
    parquet.write_table(pyarrow.table({"n": range(len(many)), "text": many}), path)
    assert [text for text, _ in pieces([path])] == many
    with pytest.raises(GqaError, match="'body'"):
        read_text([path], "body")
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(GqaError, match="parquet file cannot be read"):
        read_text([path])


def test_a_folder_gives_its_files_by_name(folder):
    assert [text for text, _ in pieces([folder], "body")] == ["plain", *DOCUMENTS]
    assert read_text([folder], "body") == "\n".join(["plain", *DOCUMENTS])


def test_a_saved_data_set_and_one_of_the_hub_give_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    rows.save_to_disk(tmp_path / "saved")
    assert [text for text, _ in pieces([tmp_path / "saved"])] == DOCUMENTS
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    assert [text for text, _ in pieces([tmp_path / "splits"])] == DOCUMENTS

    asked = []

    def load_dataset(name, **how):
        asked.append((name, how))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [text for text, _ in pieces(["someone/stories@v2"])] == DOCUMENTS
    assert asked == [("someone/stories", {"revision": "v2", "split": "train", "streaming": True})]


def test_a_long_file_comes_in_pieces_that_end_with_lines(tmp_path):
    path = tmp_path / "long"
    lines = [f"{n} ä\n" * (n % 7) for n in range(150_000)]
    path.write_text("".join(lines), encoding="utf-8")
    parts = list(pieces([path]))
    assert len(parts) > 2
    assert "".join(text for text, _ in parts) == path.read_text(encoding="utf-8") == read_text([path])
    assert all(text.endswith("\n") for text, _ in parts[:-1])
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]


def test_the_offset_of_what_is_no_text_is_that_in_the_file(tmp_path):
    path = tmp_path / "broken"
    path.write_bytes(b"line\n" * 500_000 + b"\xff")
    with pytest.raises(GqaError, match="offset 2500000"):
        read_text([path])


@pytest.mark.parametrize(
    ("line", "word"), [("{", "line 2"), ("[]", "'text'"), ('{"text": 1}', "'text'"), ('{"body": "x"}', "'text'")]
)
def test_a_line_without_text_is_told(tmp_path, line, word):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(GqaError, match=word):
        read_text([path])


def test_what_is_nowhere_is_no_file(tmp_path):
    for path in (tmp_path / "none", tmp_path / "none.jsonl", "none/none.txt"):
        with pytest.raises(GqaError, match="no text file"):
            read_text([path])


def test_only_plain_files_have_a_size(folder):
    assert plain_bytes([folder / "a.txt", folder / "notes.md"]) == len("plain" + "not read")
    assert plain_bytes([folder / "a.txt", folder / "b" / "rows.jsonl"]) is None
    assert plain_bytes([folder]) is None
    assert plain_bytes(["someone/stories"]) is None
