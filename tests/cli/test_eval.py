import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from helpers.small import small_parent

from gqa.cli.eval import command
from gqa.errors import GqaError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, corpus = small_parent(tmp_path_factory.mktemp("parent"))
    return str(folder), str(corpus.test[0])


def run(*arguments):
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False, standalone_mode=False)


def test_json_is_one_record_with_every_figure_measured(model):
    folder, text = model
    result = run(folder, "--text", text, "--parent", folder, "--tokens", "320", "--json")
    document = json.loads(result.stdout)
    assert document["command"] == "eval"
    assert document["inputs"]["window"] == 32  # the model's context is smaller than 256
    assert document["results"]["windows"] == 10
    assert document["results"]["kl_to_parent_nats"] == 0
    assert set(document["basis"]) == set(document["results"])
    assert set(document["basis"].values()) == {"measured"}
    assert len(document["assumptions"]) == 2


def test_the_table_tells_what_it_is(model):
    folder, text = model
    alone = run(folder, "--text", text, "--text", text, "--window", "16", "--tokens", "160").stdout
    assert "measured on 10 windows, 150 predicted tokens" in alone
    assert "KL" not in alone
    beside = run(folder, "--text", text, "--parent", folder, "--tokens", "320").stdout
    assert "100.0%" in beside
    assert "+0.0000" in beside


def test_a_window_beyond_the_context_is_told(model):
    folder, text = model
    assert "longer than the model's context of 32 tokens" in run(folder, "--text", text, "--window", "64").stderr


def test_mistakes(model, tmp_path):
    folder, text = model
    (tmp_path / "short.txt").write_text("def")
    for arguments, word in (
        ((folder, "--text", str(tmp_path / "none.txt")), "no text file"),
        ((folder, "--text", str(tmp_path / "short.txt")), "shorter than one window"),
        ((str(tmp_path / "none"), "--text", text), "no such model folder"),
        ((folder, "--text", text, "--parent", "llama-3-70b"), "without weights"),
        ((folder, "--text", text, "--batch", "0"), "batch"),
    ):
        with pytest.raises(GqaError, match=word):
            run(*arguments)


def test_gates_decide_the_exit_code(model):
    folder, text = model
    arguments = (folder, "--text", text, "--parent", folder, "--tokens", "320")
    passed = run(*arguments, "--gate", "perplexity<=1.02*parent", "--gate", "top1_agreement>=100%")
    assert passed.return_value is None
    assert passed.stdout.count("passed:") == 2
    failed = run(*arguments, "--gate", "perplexity<=0.98*parent")
    assert failed.return_value == 1
    assert "NOT PASSED: perplexity<=0.98*parent" in failed.stdout
    document = json.loads(run(*arguments, "--gate", "perplexity<=0.98*parent", "--json").stdout)
    assert document["results"]["gates"][0]["passed"] is False
    with pytest.raises(GqaError, match="compares with the parent"):
        run(folder, "--text", text, "--gate", "kl_to_parent_nats<1")


def test_loss_over_the_context(model):
    folder, text = model
    shown = run(folder, "--text", text, "--parent", folder, "--tokens", "320", "--positions").stdout
    assert "by the tokens of context before one" in shown
    assert "16-31" in shown
    assert "p = 1" in shown


def test_recall(model):
    folder, text = model
    arguments = (folder, "--text", text, "--parent", folder, "--recall", "passkey,hops", "--lengths", "64,128")
    shown = run(*arguments, "--samples", "3").stdout
    assert "recall of what is hidden in the text" in shown
    rows = json.loads(run(*arguments, "--samples", "3", "--depths", "0,50%", "--json").stdout)["results"]["recall"]
    assert [(row["task"], row["context_tokens"], row["depth"]) for row in rows] == [
        (task, length, depth) for task in ("passkey", "hops") for length in (64, 128) for depth in (0, 0.5)
    ]
    assert all(row["parent_nats_per_answer_token"] == row["nats_per_answer_token"] for row in rows)
    with pytest.raises(GqaError, match="recall task is not known"):
        run(folder, "--text", text, "--recall", "needles")


@pytest.fixture(scope="module")
def talks(model, tmp_path_factory):
    """The same model with a chat template."""
    folder = tmp_path_factory.mktemp("talks") / "model"
    shutil.copytree(model[0], folder)
    template = "# ask\n{{ messages[0]['content'] }}\n# answer"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_answers_to_prompts_of_the_parents_own(model, talks):
    result = run(talks, "--parent", talks, "--answers", "5", "--answer-tokens", "6", "--json")
    document = json.loads(result.stdout)
    assert document["results"]["prompts"] == 5
    assert document["results"]["answers_equal"] == 1
    assert (document["inputs"]["chat"], document["inputs"]["answers"]) == (True, 5)
    assert all(one["prompt"].startswith("# ask") for one in document["results"]["answer_examples"])
    assert set(document["basis"]) == set(document["results"])
    assert any("greedy" in line for line in document["assumptions"])
    plain = json.loads(run(talks, "--parent", talks, "--answers", "3", "--no-chat", "--json").stdout)["results"]
    assert not any("# ask" in one["prompt"] for one in plain["answer_examples"])
    folder, text = model
    shown = run(folder, "--parent", folder, "--answers", "4", "--text", text, "--tokens", "320").stdout
    assert "greedy answers to 4 prompts, at most 64 tokens each" in shown
    assert "cross-entropy" in shown
    assert "right answers" not in shown


def test_answers_to_a_file(model, talks, tmp_path):
    folder, _ = model
    asked = ["def f3(x):", "    return x + 5"]
    (tmp_path / "q.txt").write_text("\n".join(asked))
    plain = (folder, "--parent", folder, "--prompts", str(tmp_path / "q.txt"), "--answer-tokens", "20")
    said = json.loads(run(*plain, "--json").stdout)["results"]["answer_examples"][0]["parent_answer"]
    lines = [{"prompt": asked[0], "answers": ["nonsense", said]}, {"prompt": asked[1], "answer": "nonsense"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = (*plain[:4], str(tmp_path / "q.jsonl"), *plain[5:])
    results = json.loads(run(*arguments, "--answers", "3", "--json").stdout)["results"]
    assert (results["prompts"], results["questions"], results["parent_right_questions"]) == (5, 2, 1)
    assert (results["right_answers"], results["right_answers_kept"]) == (0.5, 1)
    shown = run(*arguments, "--gate", "right_answers_kept>=0.9", "--gate", "answers_kl_nats<=0.1").stdout
    assert "kept of the parent's 1 right answers" in shown
    assert shown.count("passed:") == 2
    assert run(*arguments, "--gate", "right_answers>0.6").return_value == 1
    chats = json.loads(run(talks, "--parent", talks, "--prompts", str(tmp_path / "q.txt"), "--json").stdout)["results"]
    assert chats["answer_examples"][0]["prompt"] == "# ask\ndef f3(x):\n# answer"


def test_mistakes_about_answers(model, talks, tmp_path):
    folder, text = model
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"answer": "y"}\n')
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments, word in (
        (("--answers", "3"), "compared with those of the parent"),
        (("--parent", folder, "--answers", "0"), "not positive"),
        (("--parent", folder, "--answers", "3", "--chat"), "no chat template"),
        (("--parent", folder, "--prompts", str(tmp_path / "empty.txt")), "no prompts"),
        (("--parent", folder, "--prompts", str(tmp_path / "bad.jsonl")), "line 2"),
        (("--parent", str(other), "--answers", "3"), "another tokenizer"),
        (("--parent", folder, "--text", text, "--gate", "answers_equal>0.5"), "answers that are not compared"),
        (("--parent", folder, "--answers", "2", "--gate", "right_answers_kept>0.5"), "not measured"),
        (("--parent", folder, "--answers", "2", "--gate", "perplexity<9"), "no text to measure on"),
    ):
        with pytest.raises(GqaError, match=word):
            run(folder, *arguments)


@pytest.mark.parametrize("name", ["eval", "uptrain"])
def test_help_loads_nothing_heavy(name):
    program = (
        "import sys, gqa.cli.main as m\n"
        f"try: m.main([{name!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Examples:")
