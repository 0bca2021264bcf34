"""Is this run slower than a record? Beyond what the rounds of both differ among themselves."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# rows that differ in one of these did other work, or did it elsewhere
SAME = ("bench", "case", "contender", "device", "threads", "model", "use_lora", "settings", "epochs")
# a loss that is too small to matter, and one that a single round can show
LEAST, LEAST_OF_ONE_ROUND = 0.02, 0.10


def match(row: Row, record: list[Row]) -> Row | None:
    """The newest row of a record with the same work on the same device."""
    same = [old for old in record if all(old.get(name) == row.get(name) for name in SAME) and "failed" not in old]
    return max(same, key=lambda old: old["date"], default=None)


def speeds(row: Row) -> list[float]:
    return [figures["images_per_s"] for figures in row["rounds"]]


def slower(row: Row, old: Row) -> bool:
    """Whether every round was slower than every one of the old row, and the median by more than a negligible share."""
    now, then = speeds(row), speeds(old)
    least = LEAST if min(len(now), len(then)) > 1 else LEAST_OF_ONE_ROUND
    return max(now) < min(then) and row["images_per_s"] < (1 - least) * old["images_per_s"]


def compare(rows: list[Row], record: list[Row]) -> tuple[list[str], bool]:
    """(a line for each row, whether one got slower)."""
    lines, any_slower = [], False
    for row in rows:
        name = f"{row['bench']} {row['case']} {row['contender']}"
        if "failed" in row:
            continue
        if (old := match(row, record)) is None:
            lines.append(f"{name}: nothing to compare with")
            continue
        worse = slower(row, old)
        any_slower |= worse
        lines.append(
            f"{name}: {row['images_per_s']:.3g} images/s, {row['images_per_s'] / old['images_per_s']:.2f}x of "
            f"{old['images_per_s']:.3g} ({old['date']}, {str(old['commit'])[:9]}); rounds {spread(row)} and "
            f"{spread(old)}{' SLOWER' if worse else ''}"
        )
    return lines, any_slower


def spread(row: Row) -> str:
    found = speeds(row)
    return f"{min(found):.3g}..{max(found):.3g}"
