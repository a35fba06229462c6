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
