"""Reads prompts from a Hugging Face dataset, on the Hub or on the disk, by the package `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ddpo_fast.prompts.files import checked, existing, prompt_column
from ddpo_fast.user_functions import error_line

PREFIX = "hf:"


class Source(NamedTuple):
    """What 'hf:NAME[:SPLIT][#COLUMN]' says."""

    name: str  # OWNER/NAME or OWNER/NAME/CONFIG on the Hub, a folder, or a parquet file
    split: str
    column: str

    @classmethod
    def of(cls, spec: str) -> Source:
        rest, _, column = spec.removeprefix(PREFIX).partition("#")
        name, _, split = rest.partition(":")
        return cls(name, split, column)


def read_dataset(spec: str) -> tuple[list[str], Sequence[dict[str, Any]] | None]:
    """The prompts of a dataset and its other columns, None if it has no other.

    No code of a dataset runs: `datasets` has none of its own to run since version 4. Raises `ValueError` for a dataset
    that cannot be loaded, for a column that is missing or holds no text, and naming the row that has no prompt.
    """
    source = Source.of(spec)
    dataset = _loaded(source, spec)
    column = source.column or prompt_column(dataset.column_names, spec)
    if column not in dataset.column_names:
        names = ", ".join(map(repr, dataset.column_names))
        raise ValueError(f"prompts is {spec!r}, but that dataset has no column {column!r}: choose one of {names:.200}")
    if not _holds_text(dataset.features[column]):
        raise ValueError(f"prompts is {spec!r}, but {column!r} is {dataset.features[column]}: choose a column of text")
    texts = dataset.select_columns(column)[:][column]
    prompts = [checked(text, column, f"row {row}", spec) for row, text in enumerate(texts)]
    others = dataset.remove_columns(column)
    return prompts, others if others.column_names else None


def _holds_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _loaded(source: Source, spec: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"prompts is {spec!r}, which needs the package datasets: pip install 'ddpo_fast[datasets]'"
        ) from error
    path = existing(source.name)
    split = source.split or "train"
    try:
        if path is None:
            owner, name, config = [*source.name.split("/", 2), "", ""][:3]
            return datasets.load_dataset(f"{owner}/{name}".rstrip("/"), config or None, split=split)
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split=split)
        if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), split=split)
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            return saved[split]
        if source.split:
            raise ValueError("it was saved without splits")
        return saved
    # LookupError is of a saved dataset without the split, and of an empty name
    except (LookupError, OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"prompts is {spec!r}, a dataset that cannot be loaded ({error_line(error)}): write "
            f"{PREFIX}OWNER/NAME[/CONFIG][:SPLIT][#COLUMN], or a folder or a parquet file in place of the name"
        ) from error
