"""Reads prompts from a file of lines or from a table, whose other columns are the prompts' metadata."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddpo_fast.prompts.drawing import is_text

# The prompts are in the first of these columns that a table has.
COLUMNS = ("prompt", "caption", "text")
# a row in JSON
OBJECT = '{"prompt": "a cat"}'

Read = tuple[list[str], Sequence[dict[str, Any]] | None]


def existing(spec: str) -> Path | None:
    """The path of the file or folder that `spec` names, or None if there is none."""
    try:
        path = Path(spec).expanduser()
        return path if spec and path.exists() else None
    # a name that is too long for a file, or '~name' without such a user
    except (OSError, RuntimeError, ValueError):
        return None


def read_file(path: Path, spec: str) -> Read:
    """The prompts of a file, and their metadata, None if it can hold none.

    A file with the ending .csv, .tsv, .jsonl, .ndjson or .json is a table, any other a prompt on each line that is not
    empty. It is in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises `ValueError` naming the file, and the
    line that is wrong if there is one.
    """
    if path.is_dir():
        raise ValueError(f"prompts is {spec!r}, which is a folder: name a file in it, or 'hf:{spec}' for a dataset")
    kind = path.suffix.lower()
    if kind == ".parquet":
        raise ValueError(f"prompts is {spec!r}, a file of a dataset: write 'hf:{spec}'")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"prompts is {spec!r}, which cannot be read: {error.strerror}") from error
    text = _decoded(data, spec)
    read = _TABLES.get(kind)
    return (_lines(path, text, spec), None) if read is None else _columns(read(text, spec), spec)


# text


def _lines(path: Path, text: str, spec: str) -> list[str]:
    if problem := _table_problem(path, text):
        raise ValueError(
            f"prompts is {spec!r}, which is {problem}: write the prompts to a text file, one on each line, or to a "
            "table whose name ends in .csv, .tsv, .jsonl or .json"
        )
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
    """What kind of data a text file holds in place of lines of prompts, for a message, or ''."""
    if path.suffix.lower() in (".yaml", ".yml", ".toml", ".xml", ".html"):
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


# tables

# where a row is, for messages, and its values by the names of their columns
Row = tuple[str, dict[str, Any]]


def _columns(rows: Iterable[Row], spec: str) -> Read:
    prompts, metadata, column = [], [], ""
    for where, row in rows:
        column = column or prompt_column(row, spec)
        prompts.append(checked(row.pop(column, None), column, where, spec))
        metadata.append(row)
    if not prompts:
        raise ValueError(f"prompts is {spec!r}, and that table has no row: write a prompt to each")
    return prompts, metadata


def prompt_column(columns: Iterable[str], spec: str) -> str:
    """The first of `COLUMNS` that a table has. Raises `ValueError` if it has none."""
    found = list(columns)
    column = next((name for name in COLUMNS if name in found), None)
    if column is None:
        raise ValueError(
            f"prompts is {spec!r}, which has no column {', '.join(map(repr, COLUMNS))} but "
            f"{', '.join(map(repr, found)):.200}: call the column of the prompts 'prompt'"
        )
    return column


def checked(prompt: Any, column: str, where: str, spec: str) -> str:
    """The prompt without white space around it. Raises `ValueError` naming the row if it is empty or no text."""
    if isinstance(prompt, str) and prompt.strip() and is_text(prompt):
        return prompt.strip()
    raise ValueError(
        f"prompts is {spec!r}, whose {where} has {prompt!r:.80} in {column!r}: write a prompt there, or remove the row"
    )


def _separated(text: str, spec: str, separator: str) -> Iterator[Row]:
    # the reader joins the lines of a quoted cell by itself
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"line {reader.line_num}"
            if not header:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header):
                    raise ValueError(f"prompts is {spec!r}, whose {where} names a column twice: rename one of them")
                prompt_column(header, spec)
            elif cells and len(cells) != len(header):
                raise ValueError(
                    f"prompts is {spec!r}, whose {where} has {len(cells)} cells where the header has {len(header)}: "
                    f'put a cell that holds {separator!r} between "quotes"'
                )
            elif cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"prompts is {spec!r}, whose line {reader.line_num} is damaged: {error}") from None


def _json_lines(text: str, spec: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number}"
            yield where, _object(_parsed(line, spec, where), spec, where)


def _json_list(text: str, spec: str) -> Iterator[Row]:
    entries = _parsed(text, spec, "text")
    if not isinstance(entries, list):
        raise ValueError(f"prompts is {spec!r}, which is not a list: write {OBJECT}s between [ and ]")
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number}"
        yield where, _object(entry, spec, where)


def _parsed(text: str, spec: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(
            f"prompts is {spec!r}, whose {where} is not JSON ({error}): a .json file holds one list, and a .jsonl file "
            "an object on each line"
        ) from None


def _object(entry: Any, spec: str, where: str) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    # a list of prompts alone
    if isinstance(entry, str):
        return {COLUMNS[0]: entry}
    raise ValueError(f"prompts is {spec!r}, whose {where} is {entry!r:.80}: write {OBJECT} in its place")


_TABLES = {
    ".csv": lambda text, spec: _separated(text, spec, ","),
    ".tsv": lambda text, spec: _separated(text, spec, "\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
}
