"""Rated and compared images, read from AVA.txt, CSV, JSONL and parquet files.

A row that cannot be used is kept with its place and the reason, as large data sets have some; how many may be left out
is the caller's decision.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RATING_COLUMNS = ("image", "score")
# of Pick-a-Pic (arXiv 2305.01569)
PAIR_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
NEEDED = f"the columns {', '.join(RATING_COLUMNS)}, or {', '.join(PAIR_COLUMNS)}"
# of AVA.txt: index, image id, counts of the scores 1 to 10, two tags, challenge
AVA_COLUMNS = 15
_READING = threading.Lock()
ENDINGS = (".txt", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Picture:
    """An image file, or an image in a cell of a parquet file.

    Args:
        path: of the image, or of the parquet file.
        cell: row and column in the parquet file; None for an image file.
    """

    path: Path
    cell: tuple[int, str] | None = None

    def read(self) -> bytes:
        """The encoded image. Raises `OSError` if it cannot be read."""
        return self.path.read_bytes() if self.cell is None else _read_cell(self.path, *self.cell)

    @functools.cached_property
    def key(self) -> str:
        """The path with the file's size and time of change, so that a file that was replaced has another key."""
        found = self.path.stat()
        return json.dumps([str(self.path.absolute()), found.st_size, found.st_mtime_ns, self.cell])


@dataclass(frozen=True)
class Row:
    """One image with its score, or two images with the share of preference that the first one has.

    Args:
        pictures: one or two images.
        target: the score, or the preference for the first image in [0, 1]; 0.5 is a tie.
        caption: what both images of a pair were drawn for.
        place: where the row is from, for messages.
    """

    pictures: tuple[Picture, ...]
    target: float
    caption: str
    place: str


@dataclass
class Rows:
    """The rows of a data file that can be used, and what is wrong with the others, a line for each."""

    usable: list[Row] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def are_pairs(self) -> bool:
        return len(self.usable[0].pictures) == 2

    def check(self, max_broken_share: float) -> None:
        """Raises `ValueError` if there are no rows, or more broken ones than allowed."""
        count = len(self.usable) + len(self.broken)
        if len(self.broken) > max_broken_share * count:
            raise ValueError(
                f"{len(self.broken)} of {count} rows cannot be used, and max_broken_share is {max_broken_share}: "
                f"{shown(self.broken)}; correct them or raise it"
            )


def shown(broken: list[str], count: int = 3) -> str:
    """The first of the broken rows, for a message."""
    more = f"; and {len(broken) - count} more" if len(broken) > count else ""
    return "; ".join(broken[:count]) + more


def read_rows(data: Path, images: Path | None) -> Rows:
    """The rows of a file, or of all parquet files in a folder.

    Args:
        data: AVA.txt, or a file whose ending and columns say what it is: `RATING_COLUMNS` or `PAIR_COLUMNS`.
        images: the folder that paths of images are relative to (default: the file's own, or `images` beside AVA.txt).

    Raises `ValueError` for a file that is missing or empty, or of another format.
    """
    files = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    if not files:
        raise ValueError(f"the data {str(data)!r} is a folder without parquet files: give a file")
    if not data.exists():
        raise ValueError(f"the data {str(data)!r} does not exist: give AVA.txt or a file with {NEEDED}")
    if images is not None and not images.is_dir():
        raise ValueError(f"images is {str(images)!r}, and there is no such folder: give the one with the image files")
    rows = Rows()
    for file in files:
        if file.suffix not in ENDINGS:
            raise ValueError(f"the data {str(file)!r} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
        try:
            _READERS[file.suffix](file, images, rows)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"the data {str(file)!r} is no text in UTF-8 with {NEEDED} ({error})") from error
    if not rows.usable and not rows.broken:
        raise ValueError(f"the data {str(data)!r} has no rows: each is a rated image or a compared pair")
    if len({len(row.pictures) for row in rows.usable}) > 1:
        raise ValueError(f"the data {str(data)!r} has both rated images and pairs: train a head on one of them")
    return rows


def _read_ava(file: Path, images: Path | None, rows: Rows) -> None:
    images = images or file.parent / "images"
    if not images.is_dir():
        raise ValueError(f"there is no folder {str(images)!r}: give the images of {file.name} by --images")
    present = set(os.listdir(images))

    def row(words: list[str]) -> tuple[tuple[Picture, ...], float, str]:
        if len(words) != AVA_COLUMNS:
            raise ValueError(f"{len(words)} columns and not AVA's {AVA_COLUMNS}")
        name = f"{words[1]}.jpg"
        if name not in present:
            raise ValueError(f"no image {name} in {images}")
        return (Picture(images / name),), ava_score(words[2:12]), ""

    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                _add(rows, f"{file.name} line {number}", row, line.split())


def ava_score(counts: list[str]) -> float:
    """The mean of the scores 1 to 10, of which `counts` says how often each was given."""
    if not all(count.isascii() and count.isdecimal() for count in counts):
        raise ValueError(f"counts of scores that are no whole numbers: {' '.join(counts):.80}")
    numbers = [int(count) for count in counts]
    if not sum(numbers):
        raise ValueError("nobody gave a score")
    return sum(score * number for score, number in enumerate(numbers, 1)) / sum(numbers)


def _read_csv(file: Path, images: Path | None, rows: Rows) -> None:
    def row(cells: dict[str | None, Any]) -> tuple[tuple[Picture, ...], float, str]:
        # where the number of cells is another than the header's, csv has the key None or the value None
        if None in cells or None in cells.values():
            extra = len(cells.get(None) or ())
            count = sum(value is not None for name, value in cells.items() if name is not None) + extra
            raise ValueError(f"{count} cells and not the header's {len(header)}")
        return _from_cells(cells, file, images)

    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        header = list(reader.fieldnames or ())
        _check_columns(file, header)
        for cells in reader:
            _add(rows, f"{file.name} line {reader.line_num}", row, cells)


def _read_jsonl(file: Path, images: Path | None, rows: Rows) -> None:
    def row(line: str) -> tuple[tuple[Picture, ...], float, str]:
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON ({error})") from error
        if not isinstance(cells, dict):
            raise ValueError(f"no JSON object with {NEEDED}")
        return _from_cells(cells, file, images)

    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                _add(rows, f"{file.name} line {number}", row, line)


def _read_parquet(file: Path, images: Path | None, rows: Rows) -> None:
    table = _parquet(file)
    names = table.schema_arrow.names
    _check_columns(file, names)
    stored = [name for name in ("image", "jpg_0", "jpg_1") if name in names]
    columns = [name for name in (*RATING_COLUMNS, *PAIR_COLUMNS) if name in names]
    number = 0
    # a few rows at a time, as the bytes of all images would not fit into memory
    for part in table.iter_batches(batch_size=64, columns=columns):
        for cells in part.to_pylist():
            for name in stored:
                if _bytes_of(cells[name]) is not None:
                    cells[name] = Picture(file, (number, name))
            number += 1
            _add(rows, f"{file.name} row {number}", functools.partial(_from_cells, file=file, images=images), cells)


_READERS: dict[str, Callable[[Path, Path | None, Rows], None]] = {
    ".txt": _read_ava,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _add(rows: Rows, place: str, read: Callable[[Any], tuple[tuple[Picture, ...], float, str]], given: Any) -> None:
    try:
        rows.usable.append(Row(*read(given), place))
    except ValueError as error:
        rows.broken.append(f"{place}: {error}")


def _check_columns(file: Path, columns: list[str]) -> None:
    if not any(set(needed) <= set(columns) for needed in (RATING_COLUMNS, PAIR_COLUMNS)):
        found = ", ".join(map(str, columns)) or "none"
        raise ValueError(f"the data {str(file)!r} must have {NEEDED}; its columns are: {found:.200}")


def _from_cells(cells: dict[Any, Any], file: Path, images: Path | None) -> tuple[tuple[Picture, ...], float, str]:
    """The pictures, the target and the caption of a row with columns. Raises `ValueError` for a broken one."""
    folder = images or file.parent
    needed = next((columns for columns in (RATING_COLUMNS, PAIR_COLUMNS) if not cells.keys().isdisjoint(columns)), ())
    if not needed:
        raise ValueError(f"none of {NEEDED}")
    for name in needed:
        if name not in cells:
            raise ValueError(f"no {name}")
    if needed == RATING_COLUMNS:
        return (_picture(cells["image"], "image", folder),), _number(cells["score"], "score"), ""
    labels = [_number(cells[name], name) for name in ("label_0", "label_1")]
    if min(labels) < 0 or abs(sum(labels) - 1) > 1e-6:
        raise ValueError(f"label_0 {labels[0]:g} and label_1 {labels[1]:g}, which are not two shares of one preference")
    pictures = tuple(_picture(cells[name], name, folder) for name in ("jpg_0", "jpg_1"))
    return pictures, labels[0], str(cells["caption"] or "")


def _picture(given: Any, name: str, folder: Path) -> Picture:
    if isinstance(given, Picture):
        return given
    # the type that `datasets` writes for an image outside of the file
    path = given.get("path") if isinstance(given, dict) else given
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{name} is {_short(path)} and not the path of an image")
    if not (folder / path).is_file():
        raise ValueError(f"no file {path:.200} in {folder}")
    return Picture(folder / path)


def _number(given: Any, name: str) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(given, bool) or not math.isfinite(number):
        raise ValueError(f"{name} is {_short(given)} and not a finite number")
    return number


def _short(given: Any) -> str:
    """A cell's text in quotes, cut to what fits into a message."""
    return repr(str(given)[:80])


def _parquet(file: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"the data {str(file)!r} needs pyarrow, which is not installed: pip install 'ddpo_fast[datasets]'"
        ) from None
    try:
        return parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"the data {str(file)!r} cannot be read as parquet ({error})") from error


def _bytes_of(cell: Any) -> bytes | None:
    """The encoded image in a cell: its bytes, or those in the type that `datasets` writes."""
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    return found if isinstance(found, bytes) else None


def _read_cell(file: Path, number: int, column: str) -> bytes:
    group, first = _group_of(file, number)
    # one at a time: threads that need the same group must not each read it
    with _READING:
        cells = _column(file, group, column)
    found = _bytes_of(cells[number - first].as_py())
    if found is None:
        raise OSError(f"row {number + 1} of {file.name} has no bytes in {column}")
    return found


@functools.lru_cache(maxsize=4)
def _column(file: Path, group: int, column: str) -> Any:
    """A column of a row group. Rows are read in their order, so that the last two groups of two columns are kept."""
    return _parquet(file).read_row_group(group, columns=[column]).column(0)


@functools.lru_cache(maxsize=4096)
def _group_of(file: Path, number: int) -> tuple[int, int]:
    """The row group that a row is in, and that group's first row."""
    first = 0
    for group, count in enumerate(_group_sizes(file)):
        if number < first + count:
            return group, first
        first += count
    raise OSError(f"{file.name} has no row {number + 1}")


@functools.lru_cache(maxsize=8)
def _group_sizes(file: Path) -> tuple[int, ...]:
    metadata = _parquet(file).metadata
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
