"""Prompts from a Hugging Face dataset that lies on the disk; datasets of the Hub take the same way."""

from __future__ import annotations

import sys

import pytest
from one_sentence import refused

from ddpo_fast.prompts import load_prompts

datasets = pytest.importorskip("datasets")

ROWS = {"caption": ["a cat", " a dog "], "answers": [["cat"], ["dog", "black"]], "n": [1, 2], "title": ["c", "d"]}
OF = {"a cat": {"answers": ["cat"], "n": 1, "title": "c"}, "a dog": {"answers": ["dog", "black"], "n": 2, "title": "d"}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps what `datasets` writes to the user's cache in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def drawn(spec) -> dict:
    prompts = load_prompts(spec)
    return dict(prompts() for _ in range(40))


@pytest.fixture
def data() -> datasets.Dataset:
    return datasets.Dataset.from_dict(ROWS)


def test_a_saved_dataset(tmp_path, data):
    data.save_to_disk(tmp_path / "one")
    assert drawn(f"hf:{tmp_path}/one") == OF
    assert set(drawn(f"hf:{tmp_path}/one#title")) == {"c", "d"}
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "splits")
    assert drawn(f"hf:{tmp_path}/splits") == OF
    assert list(drawn(f"hf:{tmp_path}/splits:test#caption")) == ["a dog"]


def test_parquet_and_a_folder_of_files(tmp_path, data):
    data.to_parquet(tmp_path / "data.parquet")
    assert drawn(f"hf:{tmp_path}/data.parquet") == OF
    assert list(drawn(f"hf:{tmp_path}/data.parquet:train[:1]")) == ["a cat"]
    (tmp_path / "files").mkdir()
    data.to_json(tmp_path / "files" / "train.jsonl")
    assert drawn(f"hf:{tmp_path}/files") == OF


def test_a_column_alone_has_no_metadata(tmp_path):
    datasets.Dataset.from_dict({"text": ["a cat"] * 3}).save_to_disk(tmp_path / "one")
    assert drawn(f"hf:{tmp_path}/one") == {"a cat": {}}


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("prompt", ["a cat", ""], "row 1 has '' in 'prompt'"),
        ("text", ["a cat", "a dog", None], "row 2 has None in 'text'"),
        ("words", ["a cat"], "no column 'prompt', 'caption', 'text' but 'words'"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, column, values, words):
    features = datasets.Features({column: datasets.Value("string")})
    datasets.Dataset.from_dict({column: values}, features=features).save_to_disk(tmp_path / "one")
    with refused(ValueError, "prompts is 'hf:", words):
        load_prompts(f"hf:{tmp_path}/one")


def test_a_wrong_column_or_split_is_named(tmp_path, data):
    # a column that cannot be decoded is not read
    data = data.add_column("image", [b"no image"] * 2).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    data.select([]).to_parquet(tmp_path / "no-row.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for spec, words in {
        "one#nothing": "no column 'nothing': choose one of 'caption', 'answers'",
        "one#n": "'n' is Value(",
        "one#answers": "choose a column of text",
        "one#image": "choose a column of text",
        "one:test": "saved without splits",
        "splits:test": "KeyError: 'test'",
        "empty": "cannot be loaded",
        "no-row.parquet": 'cannot be loaded (ValueError: Instruction "train" corresponds to no data',
        "broken.parquet": "cannot be loaded",
    }.items():
        with refused(ValueError, "prompts is 'hf:", words):
            load_prompts(f"hf:{tmp_path}/{spec}")


@pytest.mark.parametrize("name", ["owner/no_such_dataset", "owner/name/config:train", "no_such_dataset", "", "/"])
def test_a_dataset_that_is_not_there_is_named(name):
    # tests are offline, so that nothing is asked of the Hub
    with refused(ValueError, "cannot be loaded", f"'hf:{name}'", "OWNER/NAME"):
        load_prompts(f"hf:{name}")


def test_the_package_is_named_if_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused(ValueError, "pip install 'ddpo_fast\\[datasets\\]'"):
        load_prompts(f"hf:{tmp_path}")
