"""Where the lines of metrics.jsonl lie on the axes of charts: by epochs, images and minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddpo_fast.report.run_records import RunRecords, number

Axes = dict[str, list[float | None]]
Values = Sequence[float | None]

# Updates up to which each is a point of its own: what rises within every epoch would fill the chart with saw teeth.
MOST_UPDATES = 120


def epoch_axes(records: Sequence[dict[str, Any]]) -> Axes:
    """x of the lines of epochs: the number of epochs, of images and of minutes at their ends."""
    images, total = [], 0.0
    for record in records:
        # a part of a run says how many there were in all epochs
        total = number(record.get("images_so_far")) or total + (number(record.get("images")) or 0)
        images.append(total)
    return {
        "epochs": [number(record["epoch"] + 1) for record in records],
        "images": list(images),
        "minutes": [_minutes(record) for record in records],
    }


def update_axes(run: RunRecords) -> Axes:
    """x of the lines of updates, which share their epoch evenly."""
    ends = epoch_axes(run.epochs)
    indices = {record["epoch"]: at for at, record in enumerate(run.epochs)}
    counts: dict[Any, int] = {}
    for record in run.updates:
        counts[record["epoch"]] = counts.get(record["epoch"], 0) + 1
    seen: dict[Any, int] = {}
    found: Axes = {"epochs": [], "images": [], "minutes": []}
    for record in run.updates:
        epoch = record["epoch"]
        seen[epoch] = seen.get(epoch, 0) + 1
        share = seen[epoch] / counts[epoch]
        found["epochs"].append(epoch + share)
        at = indices.get(epoch)
        for name in ("images", "minutes"):
            found[name].append(_between(ends[name], at, share))
    return found


def by_epoch(run: RunRecords, values: Values) -> tuple[Axes, tuple[Values, Values, Values]]:
    """The lowest, the mean and the highest value of an epoch's updates; of a run with few updates, each by itself."""
    axes = update_axes(run)
    if len(values) <= MOST_UPDATES:
        return axes, (values, values, values)
    places: dict[Any, list[int]] = {}
    for at, record in enumerate(run.updates):
        places.setdefault(record["epoch"], []).append(at)
    ends = [found[-1] for found in places.values()]
    known = [[value for at in found if (value := values[at]) is not None] for found in places.values()]
    low, middle, high = ([by(part) if part else None for part in known] for by in (min, mean, max))
    return {name: [axis[end] for end in ends] for name, axis in axes.items()}, (low, middle, high)


def _between(ends: Values, at: int | None, share: float) -> float | None:
    """The value at a share of the way from one epoch's end to the next; None in an epoch that has not ended."""
    if at is None or (end := ends[at]) is None:
        return None
    start = (ends[at - 1] if at else 0.0) or 0.0
    return start + share * (end - start)


def _minutes(record: dict[str, Any]) -> float | None:
    seconds = number(record.get("elapsed_s"))
    return None if seconds is None else seconds / 60


def evaluation_axes(run: RunRecords) -> Axes:
    """x of evaluations: their `epoch` counts whole epochs, and their images are those trained on by then."""
    images = dict(zip((record["epoch"] + 1 for record in run.epochs), epoch_axes(run.epochs)["images"], strict=True))
    return {
        "epochs": [number(record["epoch"]) for record in run.evaluations],
        "images": [images.get(record["epoch"], 0.0 if record["epoch"] == 0 else None) for record in run.evaluations],
        "minutes": [_minutes(record) for record in run.evaluations],
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
