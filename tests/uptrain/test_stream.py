import dataclasses
import json

import numpy as np
import pytest
from helpers.small import RECIPE
from helpers.uptraining import parent_and_windows, weights

from gqa.errors import GqaError
from gqa.progress import silent
from gqa.text import load_tokenizer
from gqa.uptrain import Settings, StreamedText, training_text, uptrain

T = RECIPE.window


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return parent_and_windows(tmp_path_factory.mktemp("parent"))[0]


@pytest.fixture
def rows(tmp_path):
    """Documents of 1 to 60 lines, one a line."""
    path = tmp_path / "rows.jsonl"
    texts = [f"def f{n}(x):\n    return x + {n}\n" * (n % 60 + 1) for n in range(200)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path, texts


def streamed(path, parent, tokens=64 * T, batch=4, **more):
    return StreamedText((str(path),), "body", parent, T, tokens, batch, seed=0, **more)


def test_windows_are_the_documents_with_an_end_between_them(rows, parent, tmp_path):
    path, texts = rows
    tokenizer = load_tokenizer(parent)
    expected = []
    for text in texts:
        expected += [*tokenizer.encode(text), tokenizer.eos_token_id]
    text = streamed(path, parent)
    text.pack(tmp_path, silent)
    read = text.open(tmp_path)
    assert read.windows.shape == (64, T)  # as many as are trained on, and no more of the text
    assert read.windows.ravel().tolist() == expected[: 64 * T]
    assert sorted(read.order) == list(range(64))
    text = streamed(path, parent, tokens=10**9, held_out=10)
    (tmp_path / "all").mkdir()
    text.pack(tmp_path / "all", silent)
    assert (tmp_path / "all" / "tokens.int32").stat().st_size == 4 * len(expected)


def test_held_out_windows_are_not_trained_on():
    windows = np.arange(40).reshape(20, 2)
    text = training_text(windows, tokens=80, batch=4, seed=1, held_out=5)
    assert len(text.held_out) == 5
    trained = {tuple(row) for piece in text.pieces() for row in piece}
    assert len(text.order) == 40
    assert len(trained) == 15
    assert not trained & {tuple(row) for row in text.held_out}
    assert (text.ids(np.array([20, 3, 24])).numpy() == [text.held_out[0], windows[3], text.held_out[4]]).all()
    with pytest.raises(GqaError, match="too short"):
        training_text(windows, 80, 4, held_out=20)


def test_an_interrupted_run_goes_on_without_the_text(rows, parent, tmp_path):
    path, _ = rows
    text, settings = streamed(path, parent), Settings(batch=4)
    straight = uptrain(parent, tmp_path / "straight", windows=text, settings=settings)

    def interrupt(stage, done, total, note=""):
        if stage == "uptraining" and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uptrain(parent, tmp_path / "out", windows=text, settings=settings, progress=interrupt)
    steps = []
    told = lambda stage, done, total, note="": steps.append((stage, done))  # noqa: E731
    report = uptrain(parent, tmp_path / "out", windows=text, settings=settings, progress=told)
    assert steps == [("uptraining", step) for step in range(10, 17)]
    assert report["final_cross_entropy_nats"] == straight["final_cross_entropy_nats"]
    one, other = weights(tmp_path / "out"), weights(tmp_path / "straight")
    assert all((one[name] == other[name]).all() for name in other)
    with path.open("a") as stream:
        stream.write('{"body": "more"}\n')
    with pytest.raises(GqaError, match="not the result of this uptraining"):
        uptrain(parent, tmp_path / "out", windows=text, settings=settings)


def test_what_decides_the_windows_is_in_the_identity(rows, parent):
    text = streamed(rows[0], parent)
    others = ({"length": 16}, {"tokens": 1}, {"seed": 1}, {"held_out": 1}, {"field": "text"}, {"batch": 2})
    assert len({text.identity(), *(dataclasses.replace(text, **other).identity() for other in others)}) == 7


def test_too_little_text_is_told(rows, parent, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"body": "a"}\n')
    with pytest.raises(GqaError, match="too short"):
        streamed(path, parent).pack(tmp_path, silent)


def test_an_early_stop_needs_windows_that_are_held_out(rows, parent, tmp_path):
    settings = Settings(batch=4, early_stop=True)
    with pytest.raises(GqaError, match="held out"):
        uptrain(parent, tmp_path / "out", windows=streamed(rows[0], parent), parent_folder=parent, settings=settings)
    assert not (tmp_path / "out.partial").exists()
