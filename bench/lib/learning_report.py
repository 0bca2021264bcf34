"""The comparison of contenders over seeds, as a summary for JSON and as tables to print."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean
from typing import Any

from lib.learning_contenders import KINDS
from lib.learning_statistics import (
    Epochs,
    Interval,
    Point,
    collapse,
    geometric_interval,
    smoothed,
    speed_up,
    t_interval,
)

Row = dict[str, Any]
# what is compared at the end of a run: of training's images, and of the last evaluation's
ENDS = ("training", "trained", "held_out")
# the names of seconds in the records, of a run so far and of an image of TRL's package
CLOCKS = {"wall": ("seconds", "seconds_per_image"), "processor": ("processor_s", "processor_s_per_image")}


def with_seconds(rows: list[Row], clock: str) -> list[Row]:
    """The learning records with the seconds of a clock; TRL's curves that our trainer computed get its package's.

    `seconds_of` says whose seconds a record has. Without a measurement of the same kind and seed, TRL's have none.

    Args:
        clock: `wall`, or `processor`, whose seconds other programs on the machine hardly change.
    """
    name, name_per_image = CLOCKS[clock]
    per_image = {(r["kind"], r["seed"]): r[name_per_image] for r in rows if r["bench"] == "seconds"}
    found = []
    for record in (row for row in rows if row["bench"] == "learning"):
        row = {**record, "epochs": [{**epoch, "seconds": epoch[name]} for epoch in record["epochs"]]}
        if row["contender"] != "trl" or row["trainer"] == "trl":
            found.append({**row, "seconds_of": f"{row['trainer']}, this run"})
            continue
        each = per_image.get((row["kind"], row["seed"]))
        epochs = [{**e, "seconds": each and each * e["images"]} for e in row["epochs"]]
        seconds_of = "trl 0.23.1, epochs measured in turn" if each else "not measured"
        found.append({**row, "epochs": epochs, "seconds_of": seconds_of})
    return found


def grouped(rows: list[Row]) -> dict[tuple[str, str, int], dict[str, list[Row]]]:
    """Records by (reward, kind, images), then by contender, each ordered by seed."""
    found: dict[tuple[str, str, int], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda r: (r["reward"], KINDS.index(r["kind"]), r["images"], r["seed"])):
        found.setdefault((row["reward"], row["kind"], row["images"]), {}).setdefault(row["contender"], []).append(row)
    return found


def window_of(row: Row) -> int:
    """Two epochs of the baseline: 64 images at the demo's settings."""
    return 2 * row["settings"]["sample_batch_size"] * row["settings"]["sample_num_batches_per_epoch"]


def summaries(rows: list[Row], baseline: str) -> list[Row]:
    """A summary of each contender in each reward, kind and number of images.

    Args:
        baseline: the contender that the others are compared with, of the same kind, or `NAME@KIND` of that kind.
    """
    name, _, kind_of_baseline = baseline.partition("@")
    groups, found = grouped(rows), []
    for (reward, kind, images), by_contender in groups.items():
        theirs = baseline_rows(groups, name, (reward, kind_of_baseline or kind, images))
        by_seed = {row["seed"]: row for row in theirs}
        for contender, mine in by_contender.items():
            window = window_of((theirs or mine)[0])
            row = {"reward": reward, "kind": kind, "images": images, "contender": contender, "window": window}
            row |= {"seeds": [r["seed"] for r in mine], "commits": sorted({str(r["commit"])[:9] for r in mine})}
            row |= alone(mine, window)
            itself = mine is theirs
            pairs = [(by_seed[r["seed"]], r) for r in mine if r["seed"] in by_seed]
            if pairs and not itself:
                row |= {"against": baseline, **compared(pairs, window)}
            found.append(row)
    return found


def baseline_rows(groups: dict[Any, dict[str, list[Row]]], name: str, key: tuple[str, str, int]) -> list[Row]:
    """The baseline's records with as many images, or else with the most: contenders may be given fewer."""
    reward, kind, images = key
    others = {count for r, k, count in groups if (r, k) == (reward, kind) and name in groups[r, k, count]}
    chosen = images if images in others else max(others, default=None)
    return groups[reward, kind, chosen][name] if chosen is not None else []


def alone(rows: list[Row], window: int) -> Row:
    """Figures of a contender's runs that need no other contender."""
    checks = [{**collapse(row["epochs"], window), "stopped": row["stopped"]} for row in rows]
    return {
        "trainer": sorted({row["trainer"] for row in rows}),
        "seconds_of": sorted({row["seconds_of"] for row in rows}),
        "first_reward": mean(row["epochs"][0]["reward"] for row in rows),
        "ends": {end: figures for end in ENDS if (figures := _intervals([end_of(row, end, window) for row in rows]))},
        "seconds": _mean([row["epochs"][-1]["seconds"] for row in rows]),
        "diversity_first": _mean([row["epochs"][0]["diversity"] for row in rows]),
        "diversity_last": _mean([last_of(row["epochs"], "diversity", window) for row in rows]),
        "collapses": checks,
        "collapsed": sum(bool(c["reward_collapsed"] or c["diversity_collapsed"] or c["stopped"]) for c in checks),
    }


def end_of(row: Row, end: str, window: int) -> float | None:
    """The last reward: smoothed over training's images, or of the last evaluation (None for TRL's package)."""
    if end == "training":
        return last_of(row["epochs"], "reward", window)
    return row["evaluations"][-1][end]["reward"] if row["evaluations"] else None


def last_of(epochs: Epochs, name: str, window: int) -> float | None:
    points = smoothed(epochs, name, window, whole=False)
    return points[-1].value if points else None


def compared(pairs: list[tuple[Row, Row]], window: int) -> Row:
    """Paired over seeds: images and seconds to the baseline's last reward, and differences of last rewards."""
    curves = [[smoothed(row["epochs"], "reward", window) for row in pair] for pair in pairs]
    speeds = [speed_up(theirs, mine) if theirs and mine else None for theirs, mine in curves]
    known = [speed for speed in speeds if speed is not None]
    drawn = [[evaluated(row) for row in pair] for pair in pairs]
    evaluations = [speed_up(theirs, mine) for theirs, mine in drawn if theirs and mine]
    differences = {
        end: _intervals([_difference(*(end_of(row, end, window) for row in pair)) for pair in pairs]) for end in ENDS
    }
    return {
        "speed_ups": speeds,
        "images_ratio": _ratio([speed["images_ratio"] for speed in known]),
        "images_ratio_of_whole_run": _ratio([speed["images_ratio_of_whole_run"] for speed in known]),
        "seconds_ratio": _ratio([speed["seconds_ratio"] for speed in known]),
        "evaluated": evaluations,
        "evaluated_ratio": _ratio([speed["images_ratio_of_whole_run"] for speed in evaluations]),
        "evaluated_never": sum(speed["never"] for speed in evaluations),
        "never": sum(speed["never"] for speed in known),
        "differences": {end: figures for end, figures in differences.items() if figures},
    }


def evaluated(row: Row) -> list[Point]:
    """The evaluations of a run after its first images: fixed prompts that are trained on, and fixed noise.

    An evaluation is of the weights after so many images. The smoothed curve of training lags behind by the window, as
    it averages images that earlier weights drew.
    """
    return [Point(e["images"], e["seconds"], e["trained"]["reward"]) for e in row["evaluations"] if e["images"]]


def _difference(theirs: float | None, mine: float | None) -> float | None:
    return None if theirs is None or mine is None else mine - theirs


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _ratio(values: list[float | None]) -> Row | None:
    return _summary(values, geometric_interval)


def _intervals(values: list[float | None]) -> Row | None:
    return _summary(values, t_interval)


def _summary(values: list[float | None], interval: Callable[[list[float]], Interval]) -> Row | None:
    """The interval of values that all seeds have, else None: no seed is left out of a mean."""
    if not values or any(value is None for value in values):
        return None
    found = interval([value for value in values if value is not None])
    figures = {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}
    return {**figures, "per_seed": values}


def print_tables(found: list[Row], baseline: str) -> None:
    print(
        f"reward: over the last {found[0]['window']} images of training; difference: from {baseline}, paired over "
        "seeds, with its 95 % interval (Student's t) and p-value\n"
        f"fewer images, fewer seconds: how many times, to {baseline}'s last reward; geometric mean with its 95 % "
        "interval. A seed that never reaches it counts as if it did with its last image, so the mean is at most (<=) "
        "that; by evaluation: the same, of fixed prompts and noise drawn by the weights after so many images\n"
        "last column: seeds with a collapse of reward or diversity, or stopped by an error"
    )
    for key in dict.fromkeys((row["reward"], row["kind"], row["images"]) for row in found):
        rows = [row for row in found if (row["reward"], row["kind"], row["images"]) == key]
        print(f"\n{key[0]}, {'all weights' if key[1] == 'full' else 'LoRA'}, {key[2]} images")
        print(
            f"{'contender':<22}{'seeds':>5}{'reward':>9}{'difference':>25}{'p':>7}{'fewer images':>22}{'never':>6}"
            f"{'by evaluation':>22}{'never':>6}"
            f"{'fewer seconds':>22}{'s':>7}{'diversity':>16}{'held out':>10}{'difference':>25}{'coll.':>6}"
        )
        for row in sorted(rows, key=lambda row: row["contender"] != baseline):
            print(line(row))
    print_seeds(found, baseline)


def line(row: Row) -> str:
    ends, differences = row["ends"], row.get("differences", {})
    first, last = row["diversity_first"], row["diversity_last"]
    diversity = "" if first is None or last is None else f"{first:.3f} > {last:.3f}"
    held_out = f"{ends['held_out']['mean']:.3f}" if "held_out" in ends else ""
    p = differences.get("training", {}).get("p")
    bound, by_evaluation = ("<=" if row.get(name) else "" for name in ("never", "evaluated_never"))
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
    return (
        f"{row['contender']:<22}{len(row['seeds']):>5}{ends['training']['mean']:>9.3f}"
        f"{spread(differences.get('training'), '+.3f'):>25}{p_value(p):>7}"
        f"{spread(row.get('images_ratio'), '.2f', bound):>22}{row.get('never', ''):>6}"
        f"{spread(row.get('evaluated_ratio'), '.2f', by_evaluation):>22}{row.get('evaluated_never', ''):>6}"
        f"{spread(row.get('seconds_ratio'), '.2f', bound):>22}{seconds:>7}{diversity:>16}{held_out:>10}"
        f"{spread(differences.get('held_out'), '+.3f'):>25}{row['collapsed']:>6}"
    )


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "<.001" if p < 0.001 else f"{p:.3f}"


def spread(interval: Row | None, digits: str, bound: str = "") -> str:
    if interval is None:
        return ""
    said = f"{bound}{interval['mean']:{digits}}"
    if interval["low"] is None:
        return said
    return f"{said} ({interval['low']:{digits}}..{interval['high']:{digits}})"


def print_seeds(found: list[Row], baseline: str) -> None:
    """Each seed's images, so that no mean hides a seed."""
    print(f"\nimages of each seed to {baseline}'s last reward (> never reached), {baseline}'s own in brackets")
    for row in found:
        if known := [speed for speed in row.get("speed_ups", []) if speed is not None]:
            each = [f"{'>' if s['never'] else ''}{s['images']:.0f} ({s['baseline_images']:.0f})" for s in known]
            print(f"{row['reward']:<26}{row['kind']:<6}{row['contender']:<22}{', '.join(each)}")
