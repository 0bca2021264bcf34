"""A waterfall chart: TRL, our trainer without any of its techniques, then with one more of them in each bar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.command_line import print_progress
from lib.rounds import speed_range, speed_ratio
from lib.workloads import OUR_FIELDS, Case, Technique

Row = dict[str, Any]


def bars(case: Case, listed: list[Technique], chosen: list[str] | None) -> tuple[list, list[Technique]]:
    """(contenders, their techniques): TRL, then ours with all techniques up to each of the chosen ones.

    Prints which techniques are left out because this version of the trainer lacks their settings.
    """
    ours, theirs = case.contenders[0], case.contenders[1]
    settings = {**ours.settings, "mixed_precision": theirs.settings["mixed_precision"]}
    contenders, shown = [replace(theirs, name="trl")], [Technique("trl", "TRL 0.23.1")]
    for technique in listed:
        if technique.missing:
            print_progress(f"{technique.title}: this version has no {', '.join(technique.missing)}")
        known = {name: value for name, value in technique.settings.items() if name in OUR_FIELDS}
        if not known:
            print_progress(f"{technique.title}: skipped")
            continue
        settings = {**settings, **known}
        contenders.append(replace(ours, name=technique.name, settings=settings))
        shown.append(technique)
    kept = [i for i, technique in enumerate(shown) if not chosen or technique.name in chosen]
    return [contenders[i] for i in kept], [shown[i] for i in kept]


def with_gains(rows: list[Row]) -> list[Row]:
    """The rows, each with its gain over the one before, whose contender `over` names."""
    ran = [row for row in rows if "failed" not in row]
    for i, row in enumerate(ran):
        row["over"] = ran[i - 1]["contender"] if i else None
        row["gain"] = speed_ratio(row["rounds"], ran[i - 1]["rounds"]) if i else None
    return rows


def print_bars(rows: list[Row]) -> None:
    print(f"{'waterfall: ' + rows[0]['case']:<30}{'images/s':>10}{'least..most':>20}{'gain over the bar before':>34}")
    for row in rows:
        if "failed" in row:
            print(f"{row['title']:<30} FAILED: {row['failed']}")
            continue
        gain = row["gain"]
        over = "" if gain is None else f"{gain['median']:.3f}x ({gain['min']:.3f}..{gain['max']:.3f}) {row['over']}"
        print(f"{row['title']:<30}{row['images_per_s']:>10.3f}{speed_range(row['rounds']):>20}{over:>34}")


def totals(rows: list[Row]) -> dict[str, float]:
    """The products of the gains from the first bar to each one, also where parts of a chart were measured apart."""
    found: dict[str, float] = {}
    for row in rows:
        if not found:
            found[row["contender"]] = 1.0
        elif row["gain"] and row["over"] in found:
            found[row["contender"]] = found[row["over"]] * row["gain"]["median"]
    return found


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each row that ran, from top to bottom, with the least and most of its rounds."""
    shown = [row for row in rows if "failed" not in row][::-1]
    total = totals(shown[::-1])
    figure = Figure(figsize=(9, 0.42 * len(shown) + 1.4), layout="constrained")
    axis = figure.subplots()
    values = [row["images_per_s"] for row in shown]
    errors = [
        [row["images_per_s"] - row["images_per_s_min"] for row in shown],
        [row["images_per_s_max"] - row["images_per_s"] for row in shown],
    ]
    colours = ["C7" if row["contender"] == "trl" else "C0" for row in shown]
    axis.barh(range(len(shown)), values, xerr=errors, color=colours, ecolor="black", capsize=2)
    axis.set_yticks(range(len(shown)), [row["title"] for row in shown])
    for place, row in enumerate(shown):
        text = f" {row['images_per_s']:.3g}"
        if row["gain"] is not None:
            in_all = f", {total[row['contender']]:.2f} in all" if row["contender"] in total else ""
            text += f"  (x {row['gain']['median']:.2f}{in_all})"
        axis.text(row["images_per_s_max"], place, text, va="center", fontsize=8)
    axis.set_xlim(0, 1.4 * max(row["images_per_s_max"] for row in shown))
    count = len(shown[0]["rounds"])
    axis.set_xlabel(f"images per second, median of {count} round{'s' if count > 1 else ''}; lines: least and most")
    what = [shown[0][name] for name in ("case", "model", "device")]
    axis.set_title(", ".join([*what, f"torch {shown[0]['torch']}"]), fontsize=9)
    figure.savefig(path, dpi=130)
