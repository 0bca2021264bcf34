from __future__ import annotations

import json

import pytest

from ddpo_fast.rewards.vlm_answers import answer_in, grade_in, is_right


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("4", 4),
        (" 4.25. ", 4.25),
        ("**4**", 4),
        ("Final Score: 4.33", 4.33),
        ("**Final Score:** 3", 3),
        ("Final Score: [2]", 2),
        ('{"score": 4, "reason": "3 cats of 5"}', 4),
        ("Alignment Score (1-5): 3.5", 3.5),
        ("I give it a score of 3, as the 2 cats are there.", 3),
        ("My first score: 2. After a second look, the final score is 4.", 4),
        ("I would say 4 out of 5", 4),
        ("4/5", 4),
        ("Score: 4 / 5", 4),
        ("rating: 1", 1),
        ("", None),
        ("good", None),
        ("The image shows 3 cats.", None),
        ("A score from 1 to 5 is hard to give.", None),
        ("Score 1-5", None),
        ("Score: 4/10", None),
        ("8/10", None),
        ("Score: 0", None),
        ("Score: 6", None),
        ("Score: -3", None),
        ("Score: nan", None),
        ("Score: 3 or 4? Score: 55", None),
    ],
)
def test_grades(answer, grade):
    assert grade_in(answer, (1, 5)) == grade


def test_grades_below_zero_and_of_other_scales():
    assert grade_in("Score: -3", (-5, 0)) == -3
    assert grade_in("7/10", (0, 10)) == 7
    assert grade_in("Score: 0.35", (0, 0.5)) == 0.35


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("Two", "2", True),
        ("There are 2 dogs", "two dogs", True),
        ("A dog.", "dogs", True),
        ("a polar bear", "Polar Bear", True),
        ("a bear at the polar circle", "polar bear", False),
        ("eighteen", "eight", False),
        ("none", "one", False),
        ("twenty", "2", False),
        ("Yes", "yes", True),
        ("", "yes", False),
        ("Æsop's ñandú", "ñandú", True),
    ],
)
def test_answers_that_are_right(answer, expected, right):
    assert is_right(answer, expected) is right


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (" yes ", "yes"),
        ("<think>Is it 3? No.</think>\n4", "4"),
        ("no opening tag</think>4", "4"),
        ("<think>It may be 3", None),
        (["yes"], None),
        (None, None),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(content, answer):
    assert answer_in(json.dumps({"choices": [{"message": {"content": content}}]})) == answer
