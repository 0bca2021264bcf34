"""Whether a run is slower than an earlier record of the same work, by more than the rounds of both differ."""

from __future__ import annotations

from typing import Any

from lib.rounds import speed_range, speeds

Row = dict[str, Any]
# a row is compared only with earlier rows that agree in these: the same work on the same machine
SAME = ("bench", "case", "contender", "device", "threads", "model", "use_lora", "settings", "epochs")
# The smallest loss of speed that is reported, as a share of the earlier speed. The second value is for a single round
# in either run, which does not show by how much rounds differ.
NEGLIGIBLE_LOSS, NEGLIGIBLE_LOSS_OF_ONE_ROUND = 0.02, 0.10


def newest_match(row: Row, record: list[Row]) -> Row | None:
    """The newest row of a record with the same work on the same device."""
    same = [old for old in record if all(old.get(name) == row.get(name) for name in SAME) and "failed" not in old]
    return max(same, key=lambda old: old["date"], default=None)


def is_slower(row: Row, old: Row) -> bool:
    """Whether every round was slower than every earlier round, and the median by more than a negligible share."""
    current, earlier = speeds(row["rounds"]), speeds(old["rounds"])
    negligible = NEGLIGIBLE_LOSS if min(len(current), len(earlier)) > 1 else NEGLIGIBLE_LOSS_OF_ONE_ROUND
    return max(current) < min(earlier) and row["images_per_s"] < (1 - negligible) * old["images_per_s"]


def compare(rows: list[Row], record: list[Row]) -> tuple[list[str], bool]:
    """(a line of text for each row that ran, whether any of them is slower than its record)."""
    lines, any_slower = [], False
    for row in rows:
        name = f"{row['bench']} {row['case']} {row['contender']}"
        if "failed" in row:
            continue
        if (old := newest_match(row, record)) is None:
            lines.append(f"{name}: nothing to compare with")
            continue
        slower = is_slower(row, old)
        any_slower |= slower
        lines.append(
            f"{name}: {row['images_per_s']:.3g} images/s, {row['images_per_s'] / old['images_per_s']:.2f}x of "
            f"{old['images_per_s']:.3g} ({old['date']}, {str(old['commit'])[:9]}); rounds {speed_range(row['rounds'])} "
            f"and {speed_range(old['rounds'])}{' SLOWER' if slower else ''}"
        )
    return lines, any_slower
