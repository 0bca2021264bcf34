"""The rewards of each prompt: early, late, and their course."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddpo_fast.report.run_records import RunRecords, number

# Prompts in the table: of more, those with the most images.
MOST_PROMPTS = 100
# a sparkline's size, and its points
WIDTH, HEIGHT, POINTS = 120, 26, 40


@dataclass(frozen=True)
class PromptRow:
    """A prompt's mean reward in the first and in the last third of the epochs (None without an image there).

    Args:
        course: points of a line, as SVG has them; '' for less than two.
    """

    prompt: str
    images: int
    early: float | None
    late: float | None
    course: str

    @property
    def change(self) -> float | None:
        return None if self.early is None or self.late is None else self.late - self.early


def table(run: RunRecords) -> dict[str, Any]:
    """`rows`, those that gained most first, and how many prompts there are in `total`."""
    # by prompt: (place of the epoch from 0 to 1, mean reward, images)
    points: dict[str, list[tuple[float, float, int]]] = {}
    for at, record in enumerate(run.epochs):
        of_epoch = record.get("prompt_rewards")
        for prompt, found in of_epoch.items() if isinstance(of_epoch, dict) else ():
            if isinstance(found, list) and len(found) == 2 and None not in map(number, found):
                points.setdefault(prompt, []).append((at / max(1, len(run.epochs) - 1), found[0], int(found[1])))
    counts = {prompt: sum(images for *_, images in found) for prompt, found in points.items()}
    # nothing can be said of prompts with a single image each
    if not points or max(counts.values()) < 2:
        return {"rows": [], "total": len(points)}
    chosen = sorted(points, key=lambda prompt: -counts[prompt])[:MOST_PROMPTS]
    means = [mean for prompt in chosen for _, mean, _ in points[prompt]]
    scale = min(means), max(means)
    rows = [
        PromptRow(prompt, counts[prompt], *_early_and_late(points[prompt]), _course(points[prompt], *scale))
        for prompt in chosen
    ]
    rows.sort(key=lambda row: -row.change if row.change is not None else float("inf"))
    return {"rows": rows, "total": len(points)}


def _early_and_late(points: list[tuple[float, float, int]]) -> tuple[float | None, float | None]:
    def mean(part: list[tuple[float, float, int]]) -> float | None:
        images = sum(count for *_, count in part)
        return sum(value * count for _, value, count in part) / images if images else None

    return mean([p for p in points if p[0] <= 1 / 3]), mean([p for p in points if p[0] >= 2 / 3])


def _course(points: list[tuple[float, float, int]], lowest: float, highest: float) -> str:
    """The line of a prompt's means, on the scale of all prompts."""
    if len(points) < 2:
        return ""
    size = -(-len(points) // POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    span = (highest - lowest) or 1.0
    found = []
    for block in blocks:
        place = sum(place for place, *_ in block) / len(block)
        mean = sum(mean for _, mean, _ in block) / len(block)
        found.append(f"{2 + place * (WIDTH - 4):.1f},{2 + (highest - mean) / span * (HEIGHT - 4):.1f}")
    return " ".join(found)
