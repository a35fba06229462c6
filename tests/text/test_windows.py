from typing import Any

import numpy as np
import pytest

from gqa.errors import GqaError
from gqa.text import load_tokenizer, read_text, token_windows


class _Letters:
    def encode(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return [ord(letter) for letter in text]


LETTERS: Any = _Letters()  # one token per character


def test_read_text_joins_files_in_the_order_given(tmp_path):
    (tmp_path / "a").write_text("ä one")
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbftwo")
    assert read_text([tmp_path / "b", tmp_path / "a"]) == "two\nä one"


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"ab\0c", "NUL"), (b"abc\xff", "UTF-8"), (None, "no text file")],
)
def test_text_that_is_none_is_refused(tmp_path, content, word):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GqaError, match=word):
        read_text([path])


def test_no_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(GqaError, match="no text file was given"):
        read_text([])
    with pytest.raises(GqaError, match="folder"):
        read_text([tmp_path])


def test_windows_cover_the_text_in_order_without_overlap():
    text = "".join(map(chr, range(100, 133)))
    windows = token_windows(text, LETTERS, 8)
    assert windows.dtype == np.int64
    assert windows.tolist() == np.arange(100, 132).reshape(4, 8).tolist()


def test_fewer_windows_are_a_seeded_choice_without_replacement():
    text = "".join(map(chr, range(1000)))
    first = token_windows(text, LETTERS, 10, count=30, seed=1)
    starts = first[:, 0]
    assert first.shape == (30, 10)
    assert len(set(starts.tolist())) == 30
    assert (first == starts[:, None] + np.arange(10)).all()
    assert (token_windows(text, LETTERS, 10, count=30, seed=1) == first).all()
    assert (token_windows(text, LETTERS, 10, count=30, seed=2) != first).any()
    assert starts.tolist() != sorted(starts)


def test_more_windows_than_there_are_gives_all():
    assert token_windows("abcdefgh", LETTERS, 2, count=50).shape == (4, 2)


def test_a_short_text_says_how_many_tokens_it_has():
    with pytest.raises(GqaError, match="one window of 8 tokens") as caught:
        token_windows("abcdefg", LETTERS, 8)
    assert caught.value.got == "7 tokens"
    assert "--window" in str(caught.value)


@pytest.mark.parametrize(("length", "count"), [(1, None), (0, None), (4, 0)])
def test_absurd_windows_are_refused(length, count):
    with pytest.raises(GqaError):
        token_windows("abcdefgh", LETTERS, length, count)


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(GqaError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(GqaError, match="no model folder"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GqaError, match="cannot be read"):
        load_tokenizer(tmp_path)
