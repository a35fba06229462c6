"""The one error: four parts, in order, and nothing lost between processes."""

import pickle

import pytest

from gqa.errors import GqaError


def test_all_parts():
    error = GqaError("12 KV heads do not divide 32", got=12, allowed="1, 2", hint="use 8")
    assert str(error) == "12 KV heads do not divide 32\ngot: 12\nallowed: 1, 2\nhint: use 8"
    assert (error.what, error.got, error.allowed, error.hint) == ("12 KV heads do not divide 32", "12", "1, 2", "use 8")


def test_absent_parts_take_no_line():
    assert str(GqaError("wrong")) == "wrong"
    assert str(GqaError("wrong", got=0)) == "wrong\ngot: 0"
    assert str(GqaError("wrong", hint="right")) == "wrong\nhint: right"


def test_it_is_a_value_error():
    with pytest.raises(ValueError, match="wrong"):
        raise GqaError("wrong")


@pytest.mark.parametrize("parts", [{}, {"got": 3}, {"got": 3, "allowed": "4", "hint": "try 4"}])
def test_it_travels_between_processes(parts):
    error = GqaError("wrong", **parts)
    back = pickle.loads(pickle.dumps(error))
    assert isinstance(back, GqaError)
    assert (str(back), back.what, back.hint) == (str(error), error.what, error.hint)
