"""The questions for `gqa eval --prompts`: each has a short answer that is not given away."""

from pathlib import Path

from gqa.evaluate.answers import is_right
from gqa.text import read_prompts

QUESTIONS = Path(__file__).parents[2] / "benchmarks" / "quality" / "questions.jsonl"


def test_every_question_has_an_answer_that_it_does_not_contain():
    questions = read_prompts(QUESTIONS)
    assert len(questions) >= 300
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert question.answers, question
        assert all(len(answer) <= 30 for answer in question.answers), question
        assert not is_right(question.text, question.answers), question  # else repeating it would be an answer
        assert is_right(f"It is {question.answers[0]}.", question.answers)
        # ... and no answer is a word that stands in any English text
        assert not is_right("I am sure that he or she has a question to ask, as it is.", question.answers)
