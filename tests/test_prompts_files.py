"""Prompts from text files and tables: what they hold, and how a mistake in one is named."""

from __future__ import annotations

import codecs
import json

import pytest
from one_sentence import refused

from ddpo_fast.prompts import load_prompts

# text

TEXT = "a cat\nein Käse\n"
BAD_FILES = {
    "latin.txt": (TEXT.encode("latin-1"), "line 2 is not text in UTF-8"),
    "cp1252.txt": ("a cat\n\n“quoted”".encode("cp1252"), "line 3 is not text in UTF-8"),
    "shift-jis.txt": ("猫".encode("shift-jis"), "line 1 is not text in UTF-8"),
    "cut-utf8.txt": ("a cat\nein K\u00e4".encode()[:-1], "line 2 is not text in UTF-8"),
    "cut-utf16.txt": (TEXT.encode("utf-16")[:-1], "line 2 is not text in UTF-16"),
    "utf16-without-mark.txt": ("a cat".encode("utf-16-le"), "line 1 has NUL bytes"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 1 is not text in UTF-8"),
    "packed.txt": (b"\x1f\x8b\x08\0abc", "line 1 is not text in UTF-8"),
    "nul.txt": (b"a cat\na dog\0", "line 2 has NUL bytes"),
    "empty.txt": (b"", "no prompt in it"),
    "blank.txt": (b" \r\n\t\n", "no prompt in it"),
    "mark-only.txt": (codecs.BOM_UTF8, "no prompt in it"),
    "list.yaml": (b"- a cat", "a .yaml file"),
    "header.txt": (b"prompt,score\na cat,3\n", "the header 'prompt,score'"),
    "tabs.txt": (b"id\tcaption\n1\ta cat\n", "a table with the header"),
    "column.txt": (b'"prompt"\na cat\n', "a table with the header"),
    "json.txt": (b'["a cat", "a dog"]', "JSON"),
    "json-pretty.txt": (b'[\n  "a cat",\n  "a dog"\n]\n', "JSON"),
    "json-lines.txt": (b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_prompts_is_refused(name, tmp_path):
    data, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with refused(ValueError, "prompts is", name, words) as caught:
        load_prompts(str(tmp_path / name))
    assert any(remedy in str(caught.value) for remedy in ("UTF-8", "one per line", "one on each line, or to a table"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompt_files_in_any_unicode_encoding(tmp_path, encoding, end):
    lines = ["ein Käse", "一只猫", "", "a\u2028b", "a cat 🐱", "ein Käse", '"quoted", [x], {y}', "# tag", "logo, text"]
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (tmp_path / "prompts.txt").write_bytes(mark + end.join(lines).encode(encoding))
    assert load_prompts(str(tmp_path / "prompts.txt")).prompts == [line for line in lines if line]


# tables

HARD = 'a cat, "real"\nwith a hat'
ROWS = [{"prompt": "a dog", "id": "1", "style": "oil"}, {"id": "2", "prompt": HARD, "style": ""}]
TABLES = {
    "prompts.csv": 'id,prompt,style\r\n1,a dog,oil\r\n\r\n2," a cat, ""real""\nwith a hat",\r\n',
    "prompts.tsv": 'id\tprompt\tstyle\n1\ta dog\toil\n2\t"a cat, ""real""\nwith a hat"\t\n',
    "prompts.jsonl": "\n".join(
        json.dumps(row)
        for row in ({"prompt": "a dog", "id": "1", "style": "oil"}, {"id": "2", "prompt": HARD, "style": ""})
    ),
    "PROMPTS.JSON": json.dumps(
        [{"prompt": "a dog", "id": "1", "style": "oil"}, {"id": "2", "prompt": HARD, "style": ""}]
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_prompts_and_metadata(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(TABLES[name].encode(encoding))
    drawn = [load_prompts(str(tmp_path / name))() for _ in range(40)]
    assert {prompt for prompt, _ in drawn} == {"a dog", HARD}
    of = {"a dog": {"id": "1", "style": "oil"}, HARD: {"id": "2", "style": ""}}
    assert all(metadata == of[prompt] for prompt, metadata in drawn)


def test_metadata_is_of_any_kind_in_json_and_each_draw_has_its_own(tmp_path):
    row = {"text": "a title", "caption": "three cats", "questions": ["How many?"], "answers": ["three"], "weight": 0.5}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    prompts = load_prompts(str(tmp_path / "one.jsonl"))
    del row["caption"]
    prompt, metadata = prompts()
    assert (prompt, metadata) == ("three cats", row)
    metadata.clear()
    assert prompts()[1] == row
    (tmp_path / "plain.json").write_text('["a cat", "a cat"]')
    assert load_prompts(str(tmp_path / "plain.json"))() == ("a cat", {})


BAD_TABLES = {
    "no-column.csv": ("a cat,1\n", "no column 'prompt', 'caption', 'text' but 'a cat', '1'"),
    "semicolons.csv": ("prompt;style\na cat;oil\n", "but 'prompt;style'"),
    "twice.csv": ("prompt,prompt\na,b\n", "line 1 names a column twice"),
    "cells.csv": ("prompt,style\na cat,oil\na dog, black, oil\n", "line 3 has 3 cells where the header has 2"),
    "short.tsv": ("prompt\tstyle\na cat\n", "line 2 has 1 cells"),
    "quote.csv": ('prompt\na cat\n"a dog\n', "line 3 is damaged"),
    "no-prompt.csv": ("prompt,style\na cat,oil\n,oil\n", "line 3 has '' in 'prompt'"),
    "blank.tsv": ("caption\tn\n \t1\n", "line 2 has ' ' in 'caption'"),
    "header.csv": ("prompt,style\n", "no row"),
    "empty.csv": ("", "no row"),
    "empty.jsonl": ("\n", "no row"),
    "empty.json": ("[]", "no row"),
    "cut.jsonl": ('{"prompt": "a cat"}\n\n{"prompt": "a d', "line 3 is not JSON"),
    "null.jsonl": ('{"prompt": "a cat"}\n{"prompt": null}\n', "line 2 has None"),
    "missing.jsonl": ('{"prompt": "a cat"}\n{"caption": "a dog"}\n', "line 2 has None"),
    "number.jsonl": ('{"prompt": 3}\n', "line 1 has 3"),
    "list.jsonl": ('["a cat"]\n', "line 1 is ['a cat']: write {"),
    "half.jsonl": ('{"prompt": "half \\ud83d of it"}\n', "line 1 has 'half"),
    "nul.json": ('[{"prompt": "a\\u0000cat"}]', "entry 1 has"),
    "object.json": ('{"prompt": "a cat"}', "is not a list"),
    "lines.json": ('{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "a .jsonl file an object on each line"),
    "deep.json": ("[" * 100_000, "is not JSON"),
    "row.json": ('["a cat", 3]', "entry 2 is 3"),
    "nul.csv": ("prompt\na\0cat\n", "line 2 has NUL bytes"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_wrong_row_is_named(name, tmp_path):
    text, words = BAD_TABLES[name]
    (tmp_path / name).write_text(text)
    with refused(ValueError, "prompts is", name, words):
        load_prompts(str(tmp_path / name))


def test_a_cell_that_is_too_long_is_named(tmp_path):
    (tmp_path / "long.csv").write_text("prompt\na cat\n" + "x" * 200_000 + "\n")
    with refused(ValueError, "long.csv', whose line 3 is damaged: field larger"):
        load_prompts(str(tmp_path / "long.csv"))


def test_folders_and_files_of_datasets_are_pointed_to_their_option(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for path in (tmp_path, tmp_path / "x.parquet"):
        with refused(ValueError, f"'hf:{path}'"):
            load_prompts(str(path))
