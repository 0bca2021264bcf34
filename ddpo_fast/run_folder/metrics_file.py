"""metrics.jsonl: one line for each update and each epoch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one JSON object in each line, only ever appended to; a resumed run first cuts off later lines.

    Training does not read it. A damaged line is left out of the reward curve, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        records, lost = records_in(self.path.read_text(encoding="utf-8", errors="replace"))
        if lost:
            logger.warning("%s is damaged: %d of its %d lines are left out", self.path, lost, lost + len(records))
        return records

    def size(self) -> int:
        """Bytes so far, which a checkpoint keeps for `truncate`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Removes what was written after the first `size` bytes, and a last line without an end.

        A resumed run writes the lines after its checkpoint again. A file that is shorter than `size`, or missing, is
        left so with a warning: extending it would fill it with zeros.
        """
        if (present := self.size()) < size:
            logger.warning("%s has lost records: %d bytes of %d are left", self.path, present, size)
        if not present:
            return
        with self.path.open("r+b") as file:
            file.truncate(min(size, present))
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def records_in(text: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics file's text, and how many of its lines are none."""
    # not `splitlines`, which also splits at characters that a prompt may have
    lines = text.removesuffix("\n").split("\n") if text else []
    records = [record for record in map(_parsed, lines) if record]
    return records, len(lines) - len(records)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
