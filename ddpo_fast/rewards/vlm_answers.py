"""What a vision-language model is asked in metadata, and what its answers say."""

from __future__ import annotations

import json
import re
from typing import Any

DIGITS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}


def questions_of(prompt: str, metadata: Any) -> list[tuple[str, str]] | None:
    """The pairs of a question and its answer in an image's metadata, or None. Raises `ValueError` if they are wrong."""
    if not isinstance(metadata, dict) or "questions" not in metadata:
        return None
    questions, answers = metadata["questions"], metadata.get("answers")
    if not (isinstance(questions, (list, tuple)) and isinstance(answers, (list, tuple)) and questions):
        raise ValueError(f'the metadata must have lists as "questions" and "answers", for prompt {prompt!r:.200}')
    if len(questions) != len(answers):
        raise ValueError(
            f"the metadata has {len(questions)} questions but {len(answers)} answers, for prompt {prompt!r:.200}"
        )
    pairs = [(str(question), str(answer)) for question, answer in zip(questions, answers, strict=True)]
    empty = [answer for _, answer in pairs if not _words(answer)]
    if empty:
        raise ValueError(
            f"an answer in the metadata is {empty[0]!r} but must have words in it, for prompt {prompt!r:.200}"
        )
    return pairs


def is_right(answer: str, expected: str) -> bool:
    """Whether the expected words are in the answer, side by side; see `VlmJudge`."""
    return f" {' '.join(_words(expected))} " in f" {' '.join(_words(answer))} "


def _words(text: str) -> list[str]:
    words = (DIGITS.get(word, word) for word in re.findall(r"\w+", text.lower()))
    return [word.removesuffix("s") if len(word) > 3 else word for word in words]


def answer_in(body: str) -> str | None:
    """The model's answer in a response, without its reasoning; None if there is none, or only a part of one."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    if not isinstance(text, str) or choice.get("finish_reason") == "length":
        return None
    answer = text.rpartition("</think>")[2]
    return None if "<think>" in answer else answer.strip()


def grade_in(answer: str, scale: tuple[float, float]) -> float | None:
    """The grade that an answer names: the last "score: N", else the last "N/high", else the whole answer.

    None if there is none, or if it lies outside of the scale.
    """
    low, high = scale
    number = r"(-?\d+(?:\.\d+)?)(?!\.?\d)"
    most = re.escape(f"{high:g}")
    # not the N of a range, or of another scale
    alone = rf"{number}(?!\s*(?:-|\u2013|to)\s*\d)(?!\s*(?:/|out of)\s*(?!{most}\b)\d)"
    patterns = (
        rf"(?:score|rating)(?:\s*\([^)]*\))?(?:\s+(?:is|of))?[\s:=*\"'`\[]*{alone}",
        rf"{number}\s*(?:/|out of)\s*{most}\b",
        rf"^[\s*\"'`\[]*{alone}[\s*\"'`\].]*$",
    )
    for pattern in patterns:
        if found := re.findall(pattern, answer, re.IGNORECASE):
            grade = float(found[-1])
            return grade if low <= grade <= high else None
    return None
