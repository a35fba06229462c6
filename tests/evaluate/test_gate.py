import pytest

from gqa.errors import GqaError
from gqa.evaluate.gate import parse_gate

RESULTS = {"perplexity": 10.1, "parent_perplexity": 10.0, "kl_to_parent_nats": 0.02, "top1_agreement": 0.95}


@pytest.mark.parametrize(
    ("text", "against", "passed"),
    [
        ("perplexity<=1.02*parent", 10.2, True),
        ("perplexity <= 1.005 * parent", 10.05, False),
        ("perplexity<=102%*parent", 10.2, True),
        ("perplexity<10.1", 10.1, False),
        ("perplexity<=10.1", 10.1, True),
        ("kl_to_parent_nats<0.03", 0.03, True),
        ("top1_agreement>=95%", 0.95, True),
        ("top1_agreement>0.95", 0.95, False),
    ],
)
def test_gates(text, against, passed):
    check = parse_gate(text).check(RESULTS)
    assert check["against"] == pytest.approx(against)
    assert check["passed"] is passed


@pytest.mark.parametrize(
    "text",
    ["", "perplexity", "perplexity=1", "speed<1", "kl_to_parent_nats<2*parent", "perplexity<=-1", "perplexity<=x"],
)
def test_what_is_no_gate(text):
    with pytest.raises(GqaError, match="a gate is not understood"):
        parse_gate(text)


def test_which_gates_need_the_parent():
    assert parse_gate("perplexity<=1.02*parent").needs_parent
    assert parse_gate("kl_to_parent_nats<1").needs_parent
    assert not parse_gate("perplexity<12").needs_parent


ROWS = [
    {"task": "sums", "metric": "acc", "filter": "first", "value": 0.49, "parent_value": 0.5},
    {"task": "sums", "metric": "acc", "filter": "second", "value": 0.1, "parent_value": 0.5},
    {"task": "my-task.v2", "metric": "acc_norm", "filter": "none", "value": 0.7, "parent_value": 0.5},
]


@pytest.mark.parametrize(
    ("text", "value", "against", "passed"),
    [
        ("sums:acc>=0.98*parent", 0.49, 0.49, True),
        ("sums:acc>=99%*parent", 0.49, 0.495, False),
        ("my-task.v2:acc_norm > 0.65", 0.7, 0.65, True),
    ],
)
def test_gates_of_tasks(text, value, against, passed):
    check = parse_gate(text).check({"tasks": ROWS})
    assert (check["value"], check["passed"]) == (value, passed)
    assert check["against"] == pytest.approx(against)


def test_a_gate_of_a_task_that_did_not_run():
    with pytest.raises(GqaError, match="what no task gave") as caught:
        parse_gate("sums:f1>0.5").check({"tasks": ROWS})
    assert caught.value.allowed == "sums:acc, my-task.v2:acc_norm"
    assert parse_gate("sums:acc>=0.98*parent").needs_parent
    assert not parse_gate("sums:acc>0.5").needs_parent


ANSWERS = {"answers_equal": 0.6, "right_answers": 0.4, "parent_right_answers": 0.5, "right_answers_kept": None}


def test_gates_of_answers():
    assert parse_gate("answers_equal>=0.5").check(ANSWERS)["passed"]
    assert not parse_gate("right_answers>=90%*parent").check(ANSWERS)["passed"]
    assert parse_gate("right_answers>=0.3").needs_parent  # answers are always measured beside the parent's
    assert (parse_gate("answers_equal>0").of_answers, parse_gate("answers_equal>0").of_text) == (True, False)
    assert (parse_gate("perplexity<9").of_answers, parse_gate("perplexity<9").of_text) == (False, True)
    with pytest.raises(GqaError, match="was not measured") as caught:
        parse_gate("right_answers_kept>=0.8").check(ANSWERS)
    assert caught.value.allowed == "answers_equal, right_answers"
    with pytest.raises(GqaError, match="not understood"):
        parse_gate("answers_equal>=0.9*parent")
