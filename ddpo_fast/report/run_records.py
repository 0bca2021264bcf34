"""What a run's folder says about it, read without changing anything and as far as it can be read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddpo_fast.run_folder.metrics_file import records_in

# of all numbers that are read
LARGEST = 1e100
METRICS, SETTINGS = "metrics.jsonl", "config.json"


@dataclass
class RunRecords:
    """A run as its folder has it.

    Args:
        name: what the page calls the run.
        epochs, updates, evaluations: the lines of metrics.jsonl of each kind that have an epoch.
        settings: of config.json, those of `DDPOConfig` and of the command line in one dict.
        lost: lines of metrics.jsonl that are damaged.
        problems: what could not be read, in words.
    """

    name: str
    folder: Path
    epochs: list[dict[str, Any]] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    lost: int = 0
    problems: list[str] = field(default_factory=list)

    def by_size(self) -> list[RunRecords]:
        """The run, or where its epochs' images have several sizes a part of it for each, as only those compare."""
        total = 0.0
        parts: dict[str, list[dict[str, Any]]] = {}
        for record in self.epochs:
            total += number(record.get("images")) or 0
            parts.setdefault(str(record.get("size", "")), []).append({**record, "images_so_far": total})
        if len(parts) < 2:
            return [self]
        return [replace(self, name=f"{self.name}, {size}", epochs=epochs) for size, epochs in parts.items()]

    def values(self, name: str) -> list[float | None]:
        """A metric of every epoch; None where it is missing or not finite."""
        return [number(record.get(name)) for record in self.epochs]

    def known(self, name: str) -> list[float]:
        """A metric of the epochs, or of the updates if epochs have none, where it is known."""
        values = self.values(name) if any(name in record for record in self.epochs) else self.update_values(name)
        return [value for value in values if value is not None]

    def update_values(self, name: str) -> list[float | None]:
        return [number(record.get(name)) for record in self.updates]

    def names(self, kind: str) -> list[str]:
        """The names of the rewards of a kind ('reward' or 'eval') that epochs or evaluations have."""
        records = self.evaluations if kind == "eval" else self.epochs
        found = (key.removesuffix("_mean") for record in records for key in record if key.endswith("_mean"))
        return list(dict.fromkeys(name for name in found if name.startswith(f"{kind}/")))

    @property
    def clip_range(self) -> float | None:
        """The range that the loss clips ratios to; older runs have not recorded it."""
        recorded = [value for value in self.values("clip_range") if value is not None]
        if recorded:
            return recorded[-1]
        return number(self.settings.get("train_clip_range")) if self.settings.get("train_clip_unit") != "step" else None

    @property
    def planned_epochs(self) -> int | None:
        planned = number(self.settings.get("num_epochs"))
        return None if planned is None else int(planned)


def read(folder: Path, name: str = "") -> RunRecords:
    """Reads a run's folder. Raises `ValueError` if it holds no run; what is damaged is left out and named."""
    run = RunRecords(name or folder.resolve().name, folder)
    if not folder.is_dir():
        raise ValueError(f"run is {str(folder)!r}, which is no folder: give the output folder of a run")
    if not any((folder / file).exists() for file in (METRICS, SETTINGS)):
        raise ValueError(f"run is {str(folder)!r}, which has no {METRICS}: give the output folder of a run")
    _read_metrics(run)
    _read_settings(run)
    return run


def read_all(folders: list[Path]) -> list[RunRecords]:
    """Several runs with names of their own: the folders' names, with more of the path where these are the same."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while length < max(map(len, parts)) and len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return [read(folder, "/".join(part[-length:])) for folder, part in zip(folders, parts, strict=True)]


def image_count(record: dict[str, Any]) -> float:
    """The images of an epoch or an evaluation, at least 1."""
    return max(1.0, number(record.get("images")) or 1.0)


def number(value: Any) -> float | None:
    """The value as a float, or None if it is none, or none that can be added up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else None


def _read_metrics(run: RunRecords) -> None:
    path = run.folder / METRICS
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # A run that goes on, or that was killed, may have written a part of its last line.
    records, run.lost = records_in(text[: text.rfind("\n") + 1])
    by_kind = {"epoch": run.epochs, "update": run.updates, "eval": run.evaluations}
    for record in records:
        if str(record["kind"]) in by_kind and number(record.get("epoch")) is not None:
            by_kind[record["kind"]].append(record)
    if run.lost:
        run.problems.append(f"{run.lost} of the lines of {METRICS} are damaged and left out")


def _read_settings(run: RunRecords) -> None:
    path = run.folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError):
        run.problems.append(f"{SETTINGS} is missing or damaged, so that the settings are not known")
        return
    config = found.pop("config", {})
    run.settings = {**found, **(config if isinstance(config, dict) else {})}
