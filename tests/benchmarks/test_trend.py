"""The fit of powers: exact on exact powers, intervals as wide as Student's tables say."""

import pytest


@pytest.mark.parametrize(("free", "errors"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (1000, 1.962)])
def test_an_interval_is_as_wide_as_tables_of_student_say(script, free, errors):
    assert script("trend").student_quantile(free) == pytest.approx(errors, abs=6e-4)


def test_exact_powers_are_found(script):
    tokens, size = [1.0, 4.0, 16.0, 64.0], [2.0, 3.0, 2.0, 5.0]
    losses = [0.7 * a**-0.5 * b**0.25 for a, b in zip(tokens, size, strict=True)]
    trend = script("trend").fit_powers({"tokens": tokens, "size": size, "same": [1.0] * 4}, losses)
    assert {name: of["exponent"] for name, of in trend["exponents"].items()} == pytest.approx(
        {"tokens": -0.5, "size": 0.25}
    )
    middle = trend["middle"]
    assert trend["loss_in_the_middle_nats"] == pytest.approx(0.7 * middle["tokens"] ** -0.5 * middle["size"] ** 0.25)


def test_two_rows_have_no_interval(script):
    assert script("trend").fit_powers({"tokens": [1.0, 2.0]}, [1.0, 0.5]) is None
