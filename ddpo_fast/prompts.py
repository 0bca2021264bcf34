"""Where prompts come from: named lists, text files, or the user's function `() -> (prompt, metadata)`."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ddpo_fast.interruption import Signalled
from ddpo_fast.tiny_sd.drawings import ANIMALS, FACES, with_article
from ddpo_fast.user_functions import describe_value, error_line, function_name, load_function, where_raised

PromptFunction = Callable[[], tuple[str, Any]]

# the list of TRL's example script
TRL_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
).split()

PROMPT_LISTS: dict[str, list[str]] = {
    "animals": TRL_ANIMALS,
    # the first 45 names of the bundled model's list are the animals of the DDPO paper
    "simple_animals": [with_article(name) for name in ANIMALS[:45]],
    "tiny_animals": [with_article(name) for name in [*ANIMALS, *(f"{name} face" for name in FACES)]],
    "demo_animals": [with_article(name) for name in ("lion", "penguin", "panda", "owl")],
}


def load_prompts(spec: str) -> PromptFunction:
    """A prompt function from a named list, a text file (one prompt per line) or 'module:function'.

    Prompts of a list are drawn by Python's global generator, whose state a checkpoint keeps: a resumed run draws the
    same as one that was not interrupted. Raises `ValueError` if there is no such list, file or function.
    """
    if spec in PROMPT_LISTS:
        return ListPrompts(PROMPT_LISTS[spec])
    if (path := existing(spec)) is not None:
        return ListPrompts(read_prompts(path, spec))
    if ":" not in spec:
        raise ValueError(
            f"prompts is {spec!r:.200}, which is neither a file nor 'module:function' nor one of "
            f"{', '.join(PROMPT_LISTS)}"
        )
    return load_function("prompts", spec)


def existing(spec: str) -> Path | None:
    """The path of the file or folder that `spec` names, or None if there is none."""
    try:
        path = Path(spec).expanduser()
        return path if spec and path.exists() else None
    # a name that is too long for a file, or '~name' without such a user
    except (OSError, RuntimeError, ValueError):
        return None


def read_prompts(path: Path, spec: str) -> list[str]:
    """The prompts of a text file, one on each line that is not empty.

    The file is in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises `ValueError` naming the file, and the
    line that is wrong if there is one.
    """
    if path.is_dir():
        raise ValueError(f"prompts is {spec!r}, which is a folder: name a text file in it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"prompts is {spec!r}, which cannot be read: {error.strerror}") from error
    text = _decoded(data, spec)
    if problem := _table_problem(path, text):
        raise ValueError(f"prompts is {spec!r}, which is {problem}: write the prompts to a text file, one on each line")
    # `splitlines` would split at other characters too, such as U+2028, which may be part of a prompt
    lines = [line.strip("\ufeff \t\v\f") for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"prompts is {spec!r}, and that file has no prompt in it: write one per line")
    return prompts


# byte order marks; UTF-32's begins with the bytes of UTF-16's, and is therefore tried first
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _decoded(data: bytes, spec: str) -> str:
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="replace")
        raise ValueError(
            f"prompts is {spec!r}, whose line {before.count(chr(10)) + 1} is not text in "
            f"{encoding.removesuffix('-sig').upper()} ({error.reason} at byte {error.start}): save the file as text in "
            "UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"prompts is {spec!r}, whose line {line} has NUL bytes, as no text in UTF-8 has: save the file as text in "
            "UTF-8"
        )
    return text


def _table_problem(path: Path, text: str) -> str:
    """What kind of data the file holds in place of lines of prompts, for a message, or ''."""
    if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".toml", ".xml", ".html"):
        return f"a {path.suffix} file"
    first = text.strip().partition("\n")[0].strip()
    for part in (first, text):
        if part.lstrip()[:1] in ("[", "{") and _is_json(part):
            return "JSON"
    fields = [field.strip(" \"'").lower() for field in re.split("[,;\t]", first)]
    if _HEADERS & set(fields) and all(re.fullmatch(r"\w*", field) for field in fields):
        return f"a table with the header {first!r}"
    return ""


_HEADERS = {"prompt", "prompts", "caption", "captions"}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    # brackets nested too deep for Python's parser
    except RecursionError:
        return True
    return True


class ListPrompts:
    """A prompt function that draws from a list at random; the metadata is empty."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def __call__(self) -> tuple[str, dict[str, Any]]:
        return random.choice(self.prompts), {}


def draw_prompts(prompt_function: PromptFunction, count: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """`count` draws of the function, as (prompts, metadata).

    Raises `ValueError` if the function raises, or returns anything but a prompt and its metadata.
    """
    return PromptGroups(prompt_function, 1).draw(count)


class PromptGroups:
    """Draws prompts of which each is used `size` times in a row, also across calls of `draw`."""

    def __init__(self, prompt_function: PromptFunction, size: int) -> None:
        self._repeated = (pair for pair in _draws(prompt_function) for _ in range(size))

    def draw(self, count: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """The next `count` prompts as (prompts, metadata); raises what `draw_prompts` raises."""
        prompts, metadata = zip(*islice(self._repeated, count), strict=True)
        return prompts, metadata


def _draws(prompt_function: PromptFunction) -> Iterator[tuple[str, Any]]:
    while True:
        yield _draw(prompt_function)


def _draw(prompt_function: PromptFunction) -> tuple[str, Any]:
    try:
        pair = prompt_function()
    except Signalled:
        raise
    # a function that calls `sys.exit` would end the run without a message
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the prompt function raised {error_line(error)} ({where_raised(error, prompt_function)})"
        ) from error
    name = function_name(prompt_function)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(
            "the prompt function must return (prompt, metadata) with a string first, "
            f"got {describe_value(pair)} ({name})"
        )
    # checkpoints keep plain strings only: this makes one of NumPy's strings and of members of an enumeration
    prompt = str.__str__(pair[0])
    if not prompt.isprintable() and any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(
            f"the prompt function returned {prompt!r:.80} ({name}), which is no text: it has a NUL, or half of a "
            "character that UTF-16 writes as two"
        )
    return prompt, pair[1]
