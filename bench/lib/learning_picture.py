"""The picture of learning curves: a column for each reward and kind; reward by images, by seconds, and diversity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lib.learning_contenders import BASELINE
from lib.learning_report import grouped, window_of
from lib.learning_statistics import smoothed

Row = dict[str, Any]
# (what is drawn, over what, label of the axes)
PANELS = (
    ("reward", "images", "images scored", "reward"),
    ("reward", "seconds", "seconds", "reward"),
    ("diversity", "images", "images scored", "distance between images of a prompt"),
)
POINTS = 200


def draw(rows: list[Row], path: Path) -> None:
    """Means over seeds of the smoothed curves, in bands from the least to the most of all seeds."""
    groups = columns(rows)
    names = sorted({row["contender"] for row in rows}, key=lambda name: (name != BASELINE, name))
    colours = {name: "C7" if name == BASELINE else f"C{(i - 1) % 7}" for i, name in enumerate(names)}
    figure = Figure(figsize=(4.4 * len(groups), 3.1 * len(PANELS)), layout="constrained")
    axes = figure.subplots(len(PANELS), len(groups), squeeze=False)
    for column, ((reward, kind), by_contender) in enumerate(groups.items()):
        window = window_of(by_contender.get(BASELINE, next(iter(by_contender.values())))[0])
        for axis, (value, over, below, left) in zip(axes[:, column], PANELS, strict=True):
            for name in (name for name in names if name in by_contender):
                draw_contender(axis, by_contender[name], value, over, window, colours[name])
            axis.set_xlabel(below, fontsize=8)
            axis.set_ylabel(left, fontsize=8)
            axis.tick_params(labelsize=7)
        seeds = max(len(found) for found in by_contender.values())
        weights = "all weights" if kind == "full" else "LoRA"
        axes[0, column].set_title(f"{reward}, {weights}, {seeds} seeds", fontsize=9)
        axes[0, column].legend(fontsize=7)
    figure.suptitle(f"mean over seeds of the mean over {window} images, and the range over seeds", fontsize=9)
    figure.savefig(path, dpi=130)


def columns(rows: list[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Records by (reward, kind), then by contender: those of its longest runs, as contenders may score fewer images."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    # ordered by the number of images, so that longer runs take the place of shorter ones
    for (reward, kind, _), by_contender in grouped(rows).items():
        found.setdefault((reward, kind), {}).update(by_contender)
    return found


def draw_contender(axis: Any, rows: list[Row], value: str, over: str, window: int, colour: str) -> None:
    """A contender's curve as far as all its seeds go; nothing where a seed has no seconds or no diversity."""
    curves = [smoothed(row["epochs"], value, window, whole=False) for row in rows]
    if not all(curves) or any(getattr(point, over) is None for curve in curves for point in curve):
        return
    places = [[getattr(point, over) for point in curve] for curve in curves]
    grid = np.linspace(max(x[0] for x in places), min(x[-1] for x in places), POINTS)
    values = [np.interp(grid, x, [p.value for p in curve]) for x, curve in zip(places, curves, strict=True)]
    axis.plot(grid, np.mean(values, 0), color=colour, linewidth=1.8, label=rows[0]["contender"])
    axis.fill_between(grid, np.min(values, 0), np.max(values, 0), color=colour, alpha=0.18, linewidth=0)
