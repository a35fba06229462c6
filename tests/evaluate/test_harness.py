"""lm-evaluation-harness end to end on local task files, offline; skipped without the extra `gqa[eval]`."""

import importlib
import importlib.util
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers.small import small_parent

from gqa.cli.eval import command
from gqa.errors import GqaError
from gqa.evaluate import load_model
from gqa.evaluate.harness import Tasks
from gqa.model import hf
from gqa.text import load_tokenizer

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra gqa[eval]")

TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["0", "1", "2", "3"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "score": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: byte_perplexity}
""",
}
QUESTIONS = [f"def f{i}(x):\n    return x +" for i in range(12)]


def written(model, tokenizer, question, tokens=5):
    """Greedy, without a cache, with transformers' own attention."""
    ids = torch.tensor([tokenizer.encode(question)])
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, start:]).split("\n\n")[0]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, tokenizer, its folder, the folder of a worse child, a folder of tasks that the parent answers in part)"""
    folder, _ = small_parent(tmp_path_factory.mktemp("parent"))
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    tasks, child = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("child")
    rows = [
        {"question": question, "answer": i % 4, "written": written(model, tokenizer, question) if i % 3 else "no"}
        for i, question in enumerate(QUESTIONS)
    ]
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        data = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")
    worse = load_model(folder, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    worse.save_pretrained(child)
    tokenizer.save_pretrained(child)
    return model, tokenizer, folder, child, tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """Without the hub, as lm-eval's libraries understand it, and with a cache of our own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    if importlib.util.find_spec("datasets"):
        config = importlib.import_module("datasets.config")
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def log_likelihood(model, tokenizer, before, after):
    """log p(after | before) and whether greedy decoding writes it."""
    given, whole = tokenizer.encode(before), tokenizer.encode(before + after)
    assert whole[: len(given)] == given
    logits = model(torch.tensor([whole]), use_cache=False).logits[0, len(given) - 1 : -1].double()
    answer = torch.tensor(whole[len(given) :])
    total = torch.log_softmax(logits, -1).gather(1, answer[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == answer).all())


@needs_lm_eval
@torch.inference_mode()
def test_scores_are_those_of_the_model_and_go_through_our_attention(setting, monkeypatch):
    model, tokenizer, _, _, folder = setting
    calls = []
    op = hf.attention
    monkeypatch.setattr(hf, "attention", lambda *a, **k: calls.append(a[0].shape) or op(*a, **k))
    before = model.config._attn_implementation
    found = Tasks(["score", "choose", "write", "read"], folder).run(model, tokenizer, batch=5)
    assert model.config._attn_implementation == before != "gqa"
    layers = model.config.num_hidden_layers
    assert calls
    assert len(calls) % layers == 0

    calls.clear()
    single = [log_likelihood(model, tokenizer, question, f"{i % 4}") for i, question in enumerate(QUESTIONS)]
    assert found["score", "perplexity", "none"].documents == pytest.approx([total for total, _ in single], abs=1e-4)
    assert found["score", "acc", "none"].documents == [float(greedy) for _, greedy in single]
    chosen = [
        max(range(4), key=lambda n, q=question: log_likelihood(model, tokenizer, q, f" {n}")[0])
        for question in QUESTIONS
    ]
    assert found["choose", "acc", "none"].documents == [float(n == i % 4) for i, n in enumerate(chosen)]
    assert found["write", "exact_match", "none"].documents == [float(i % 3 > 0) for i in range(len(QUESTIONS))]
    start = tokenizer.eos_token
    rolled = [log_likelihood(model, tokenizer, start, question)[0] for question in QUESTIONS]
    read = found["read", "byte_perplexity", "none"]
    assert [total for total, _ in read.documents] == pytest.approx(rolled, abs=1e-3)
    assert not calls, "the model itself is back on its own attention"


@needs_lm_eval
def test_standard_errors(setting):
    mean_stderr = importlib.import_module("lm_eval.api.metrics").mean_stderr
    model, tokenizer, _, _, folder = setting
    found = Tasks(["choose", "score"], folder).run(model, tokenizer)
    accuracy = found["choose", "acc", "none"]
    assert accuracy.standard_error == pytest.approx(mean_stderr(accuracy.documents))
    # exp of minus a mean: the jackknife is near what the delta method gives.
    scores = found["score", "perplexity", "none"]
    assert scores.standard_error == pytest.approx(scores.total * mean_stderr(scores.documents), rel=0.1)


@needs_lm_eval
def test_the_command_compares_with_the_parent(setting):
    _, _, parent, child, folder = setting
    arguments = [str(child), "--parent", str(parent), "--tasks", "write,read", "--include-path", str(folder)]

    def run(*more):
        return CliRunner().invoke(command, [*arguments, *more], catch_exceptions=False, standalone_mode=False)

    passed = run("--json", "--gate", "write:exact_match<=1*parent")
    assert passed.return_value is None
    document = json.loads(passed.stdout)
    assert "lm_eval" in document["versions"]
    assert document["basis"] == {"tasks": "measured", "gates": "measured"}
    assert document["inputs"]["tasks"] == "write,read"
    rows = {row["task"]: row for row in document["results"]["tasks"]}
    assert rows["write"]["documents"] == len(QUESTIONS)
    assert rows["write"]["parent_value"] == pytest.approx(8 / 12)
    assert rows["write"]["above_parent"] == pytest.approx(rows["write"]["value"] - 8 / 12)
    assert rows["write"]["above_parent_standard_error"] > 0
    assert rows["read"]["value"] > rows["read"]["parent_value"]
    assert rows["read"]["p_value"] < 0.01
    assert rows["read"]["above_parent_standard_error"] is None  # no mean of scores
    assert rows["read"]["standard_error"] > 0

    failed = run("--limit", "4", "--gate", "read:byte_perplexity<=1*parent")
    assert failed.return_value == 1
    assert "NOT PASSED: read:byte_perplexity<=1*parent" in failed.stdout
    assert "bootstrap" not in failed.stdout


@needs_lm_eval
def test_what_is_no_task(setting, tmp_path, monkeypatch):
    *_, folder = setting
    with pytest.raises(GqaError, match="no such folder"):
        Tasks(["choose"], tmp_path / "none")
    broken = TASKS["choose"] + "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n"
    (tmp_path / "broken.yaml").write_text(broken + "test_split: test\n")
    with pytest.raises(GqaError, match="does not load"):
        Tasks(["broken"], tmp_path)
    module = importlib.import_module("lm_eval.tasks")
    manager = module.TaskManager  # without lm-eval's own tasks: reading them takes ten seconds
    monkeypatch.setattr(module, "TaskManager", lambda **k: manager(**(k | {"include_defaults": False})))
    with pytest.raises(GqaError, match="knows no such task") as caught:
        Tasks(["choose", "nothing-of-this-name"], folder)
    assert caught.value.got == "nothing-of-this-name"


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(GqaError, match="not installed") as caught:
        Tasks(["choose"], tmp_path)
    assert caught.value.hint == "pip install 'gqa[eval]'"


def test_something_has_to_be_measured_on(setting):
    folder = str(setting[2])
    for arguments, word in (
        ([folder], "nothing to measure on"),
        ([folder, "--tasks", "choose", "--recall", "hops"], "no text to measure on"),
        ([folder, "--tasks", "choose", "--gate", "perplexity<9"], "no text to measure on"),
        ([folder, "--text", "a.txt", "--gate", "choose:acc>0.5"], "a task that is not run"),
    ):
        with pytest.raises(GqaError, match=word):
            CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)
