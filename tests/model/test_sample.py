"""Windows that a model writes: what they are made of, that nothing but the seed decides, and what a folder keeps."""

import re
import signal
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from helpers.talker import BOS, BOT, ENDS, EOS, USER, talker, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.errors import GqaError
from gqa.model import sample
from gqa.model.generate import use_attention
from gqa.model.sample import chat_turns, draw, fingerprint, sample_prompts, sample_windows

T = 40


@pytest.fixture(scope="module")
def model():
    return talker()


def windows(model, count: Any = 6, tokenizer: Any = None, **options: Any):
    return sample_windows(model, tokenizer or word_tokenizer(), windows=count, window_tokens=T, **options)


def letters(ids):
    names = {BOS: "B", USER: "U", BOT: "R", **dict.fromkeys(ENDS, "E")}
    return "".join(names.get(token, "w") for token in ids)


def test_windows_are_texts_and_dialogues(model):
    made = windows(model, 16)
    assert (made.shape, made.dtype) == ((16, T), np.int64)
    texts, chats = made[::2], made[1::2]
    for ids in map(letters, texts):  # every end but one at the window's is followed by a beginning
        assert ids[0] == "B"
        assert re.fullmatch(r"(B[^E]*E)*(B[^E]*)?", ids)
    for ids in map(letters, chats):
        whole = re.match(r"(BU[^E]*ER[^E]*E)*", ids)
        assert whole is not None
        rest = ids[whole.end() :]
        assert re.fullmatch(r"|B|BU[^E]*|BU[^E]*E|BU[^E]*ER[^E]*", rest), ids
    # not in vain: texts end, questions are answered and answers end
    assert sum(letters(ids).count("EB") for ids in texts) > 4
    assert sum(len(re.findall("BU[^E]*ER[^E]*EBU", letters(ids))) for ids in chats) > 4


def test_every_token_is_drawn_from_what_the_model_predicts_there(model):
    """Against the whole window in one forward by transformers' own attention: p(tokens before) <= u < p(up to it)."""
    made, checked = windows(model, 4), 0
    use_attention(model, "eager")
    for number, ids in enumerate(made):
        with torch.inference_mode():
            p = torch.softmax(model(torch.from_numpy(ids)[None], use_cache=False).logits[0].double(), -1).cumsum(-1)
        uniforms = np.random.default_rng([0, number, 0]).random(T)
        chat, due = bool(number % 2), 2 if number % 2 else 1
        for t, token in enumerate(ids.tolist()):
            if due:
                due -= 1
            else:
                asking = chat and letters(ids[:t]).count("BU") > letters(ids[:t]).count("ER")
                # Whatever end a question was drawn, the template's stands there.
                drawn = ENDS if asking and token == EOS else (token,)
                assert any(
                    (p[t - 1, one - 1].item() if one else 0.0) - 1e-9 <= uniforms[t] <= p[t - 1, one].item() + 1e-9
                    for one in drawn
                )
                checked += 1
                if token in ENDS:
                    due = 1 if asking or not chat else 2
    assert checked > 2 * T


def test_neither_the_batch_nor_the_number_of_windows_decides(model):
    want = windows(model, 7)
    for options in ({"batch": 1}, {"batch": 3}):
        np.testing.assert_array_equal(windows(model, 7, **options), want)
    np.testing.assert_array_equal(windows(model, 3), want[:3])
    assert (windows(model, 7, seed=1) != want).any()
    assert len({tuple(row) for row in want.tolist()}) == 7


def test_without_a_template_or_a_bos(model):
    plain = windows(model, 4, word_tokenizer(template=None))
    assert (plain[:, 0] == BOS).all()
    assert (plain[:, 1] != USER).any()
    np.testing.assert_array_equal(windows(model, 4, chat=False), plain)
    assert (windows(model, 4, word_tokenizer(template=None, bos=None))[:, 0] == EOS).all()


def test_the_model_is_left_as_it_was(model):
    use_attention(model, "sdpa")
    model.train()
    windows(model, 1)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    model.eval()


def test_a_low_temperature_and_a_small_top_p_take_the_likeliest(model):
    cold = windows(model, 2, temperature=1e-4)
    np.testing.assert_array_equal(windows(model, 2, top_p=1e-9, seed=5), cold)
    assert (windows(model, 2) != cold).any()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 19),
    entries=st.sampled_from([1, 2, 63, 111]),
    temperature=st.floats(0.1, 3),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    seed=st.integers(0, 99),
)
def test_draw_against_a_loop(rows, entries, temperature, top_p, seed):
    random = np.random.default_rng(seed)
    logits, uniforms = random.normal(size=(rows, entries)).astype(np.float32) * 3, random.random(rows)
    got = draw(torch.from_numpy(logits), torch.from_numpy(uniforms), temperature, top_p).tolist()
    for row, u, token in zip(logits, uniforms, got, strict=True):
        p = np.exp(row.astype(np.float64) / temperature)
        p /= p.sum()
        kept, mass = set(), 0.0
        for i in sorted(range(entries), key=lambda i: -p[i]):
            if mass < top_p:
                kept.add(i)
            mass += p[i]
        assert token in kept
        total = sum(p[i] for i in kept)
        below = sum(p[i] for i in kept if i < token)
        assert below / total - 1e-5 <= u <= (below + p[token]) / total + 1e-5


def test_draw_from_more_than_the_likeliest_of_a_large_vocabulary():
    """Whether the row beside it needs all of its entries sorted or not, a row gets the same token."""
    flat, steep = torch.zeros(3000), torch.linspace(40, 0, 3000)
    flat[:1500] = 1.0  # 0.73 of the probability, more of them than are looked at first
    together = torch.stack([flat, steep])
    for u in (0.0, 0.3, 0.9, 0.999):
        uniforms = torch.tensor([u, u], dtype=torch.float64)
        both = draw(together, uniforms, 1.0, 0.7).tolist()
        assert both == [draw(row[None], uniforms[:1], 1.0, 0.7).item() for row in together]
        assert both[0] == int(u * 1500)  # all that are as likely as the last one needed
    assert max(both) < 1500


def test_draw_takes_no_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert draw(logits, torch.tensor([u], dtype=torch.float64), 1.0).tolist() == [1]
    for wrong in (torch.nan, torch.inf):
        for top_p in (1.0, 0.5):
            with pytest.raises(GqaError, match="not numbers"):
                draw(torch.tensor([[0.0, wrong]]), torch.tensor([0.5], dtype=torch.float64), 1.0, top_p)


def test_a_folder_keeps_windows_for_the_next_child(model, tmp_path, monkeypatch):
    want = windows(model, 9)
    np.testing.assert_array_equal(windows(model, 5, folder=tmp_path / "text", batch=2), want[:5])
    np.testing.assert_array_equal(windows(model, 9, folder=tmp_path / "text", batch=3), want)
    monkeypatch.setattr(sample, "forward", None)  # from here on nothing may be computed
    np.testing.assert_array_equal(windows(model, 9, folder=tmp_path / "text"), want)
    np.testing.assert_array_equal(windows(model, 4, folder=tmp_path / "text"), want[:4])


def test_a_folder_serves_the_model_and_the_settings_that_wrote_it(model, tmp_path):
    windows(model, 2, folder=tmp_path / "text")
    windows(talker(), 2, folder=tmp_path / "text")  # the same weights, loaded again
    others = (
        (talker(seed=1), {}, "model"),
        (model, {"seed": 1}, "seed"),
        (model, {"temperature": 0.5, "top_p": 0.9}, "temperature, top_p"),
        (model, {"chat": False}, "chat"),
    )
    for other, options, different in others:
        with pytest.raises(GqaError, match=f"different {different}$|different {different}\n"):
            windows(other, 2, folder=tmp_path / "text", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(GqaError, match="something else"):
        windows(model, 2, folder=tmp_path / "mine")


@pytest.mark.parametrize("damage", ["cut", "pickle", "shape"])
def test_a_damaged_file_is_named(model, tmp_path, damage):
    windows(model, 2, folder=tmp_path / "text")
    path = tmp_path / "text" / "windows-00000000.npy"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        np.save(path, np.zeros((2, T + 1), np.int32))
    with pytest.raises(GqaError, match="windows-00000000"):
        windows(model, 2, folder=tmp_path / "text")


_KILLED = """
import os, signal, sys
from pathlib import Path
from helpers.talker import talker, word_tokenizer
from gqa.model.sample import sample_windows

def progress(stage, done, total, note=""):
    if done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)

sample_windows(talker(), word_tokenizer(), windows=8, window_tokens=40, batch=2, folder=Path(sys.argv[1]),
               progress=progress)
"""


def test_killed_and_started_again(model, tmp_path):
    folder = tmp_path / "text"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_KILLED}", str(folder)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in folder.glob("*.npy")) == ["windows-00000000.npy", "windows-00000002.npy"]
    np.testing.assert_array_equal(windows(model, 8, folder=folder, batch=2), windows(model, 8))


def test_progress_rises_to_the_end(model):
    seen = []
    windows(model, 5, batch=2, progress=lambda stage, done, total, note="": seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (5, 5)


def test_prompts_end_where_the_answer_begins(model):
    made = sample_prompts(model, word_tokenizer(), prompts=9, max_tokens=20, temperature=1.0)
    assert len(made) == 9
    for ids in made:
        assert ids[:2] == [BOS, USER]
        assert ids[-2:] == [EOS, BOT]
        assert EOS not in ids[2:-2]
        assert len(ids) <= 2 + 20 + 2
    assert len({len(ids) for ids in made}) > 2
    assert max(len(ids) for ids in sample_prompts(model, word_tokenizer(), prompts=9, max_tokens=3)) == 2 + 3 + 2  # cut
    again = sample_prompts(model, word_tokenizer(), prompts=9, max_tokens=20, temperature=1.0, batch=2)
    assert again == made
    chats = windows(model, 18)[1::2].tolist()
    assert not any(chat[: len(ids) - 2] == ids[:-2] for chat in chats for ids in made if len(ids) > 8)


def test_prompts_without_a_template_are_beginnings_of_texts(model):
    made = sample_prompts(model, word_tokenizer(template=None), prompts=3, max_tokens=7)
    assert [len(ids) for ids in made] == [8, 8, 8]
    assert all(ids[0] == BOS for ids in made)


def test_templates():
    turns = chat_turns(word_tokenizer())
    assert (turns.start, turns.reply) == ((BOS, USER), (EOS, BOT))
    shouts = "<user> {{ messages[0]['content'] | upper }} <eos> <bot>"
    twice = "<user> {{ messages[0]['content'] }} <bot> {{ messages[0]['content'] }} <bot>"
    bare = "{{ messages[0]['content'] }}"
    for template in (shouts, twice, bare):
        with pytest.raises(GqaError, match="user's words once"):
            chat_turns(word_tokenizer(template))
    with pytest.raises(GqaError, match="template fails"):
        chat_turns(word_tokenizer("{{ raise_exception('no') }}"))


def test_mistakes(model):
    for options, word in (
        ({"count": 0}, "windows must be positive"),
        ({"batch": 0}, "batch must be positive"),
        ({"temperature": 0.0}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"top_p": 0.0}, "top-p"),
        ({"tokenizer": word_tokenizer(template=None), "chat": True}, "no chat template"),
        ({"tokenizer": word_tokenizer(template=None, bos=None, eos=None)}, "no token for the beginning"),
    ):
        with pytest.raises(GqaError, match=word):
            windows(model, **options)
    with pytest.raises(GqaError, match="no room behind the chat template"):
        sample_windows(model, word_tokenizer(), windows=1, window_tokens=2)


def test_fingerprints_tell_models_apart_and_not_their_dtypes(model):
    half = talker(dtype=torch.bfloat16)
    assert fingerprint(half) == fingerprint(talker(dtype=torch.bfloat16).float()) != fingerprint(model)
    changed = talker()
    with torch.no_grad():
        changed.model.norm.weight[-1] += 1
    assert fingerprint(changed) != fingerprint(model)


def test_a_model_with_one_id_for_the_end():
    settings = types.SimpleNamespace(eos_token_id=EOS)
    assert sample.text_ends(types.SimpleNamespace(generation_config=settings), word_tokenizer(eos=None)) == {EOS}
    assert sample.text_ends(types.SimpleNamespace(), word_tokenizer()) == {EOS}
    assert sample.text_ends(talker(), word_tokenizer(eos=None)) == set(ENDS)
