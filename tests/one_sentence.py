"""A user's mistake is answered by one sentence: its message has one line and no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ddpo_fast import cli


def is_one_sentence(message: str, *words: str) -> None:
    """Fails unless `message` is one line of fewer than 700 characters with all of `words` in it."""
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 700
    for word in words:
        assert word in message


@contextmanager
def refused(kinds: Any, match: str, *words: str) -> Iterator[pytest.ExceptionInfo]:
    """`pytest.raises` for an error whose message is one sentence with all of `words` in it."""
    with pytest.raises(kinds, match=match or None) as caught:
        yield caught
    is_one_sentence(str(caught.value), *words)


def error_of_command(arguments: list[str]) -> str:
    """The sentence with which a `ddpo-fast` command ends; it must end with status 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    sentence = str(caught.value)
    assert sentence.startswith(f"ddpo-fast {arguments[0]}: error: ")
    is_one_sentence(sentence)
    return sentence


def ends_with_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture, *words: str) -> None:
    """Fails unless the command ends with a sentence with `words` in it, which is the last line on stderr."""
    sentence = error_of_command(arguments)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1] == sentence
    is_one_sentence(sentence, *words)
