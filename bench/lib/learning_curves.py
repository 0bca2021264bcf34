"""Reward against wall-clock time on the bundled model: both trainers with the same prompts, seeds and images."""

from __future__ import annotations

from itertools import accumulate
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure

from ddpo_fast.tiny_sd import MODEL
from lib.command_line import print_progress
from lib.trainer_process import Figures, run_in_process, run_spec
from lib.workloads import OURS, TRL, learners, prompts

Row = dict[str, Any]
COLOURS = {OURS: "C0", TRL: "C7"}


def measure(device: str, size: str, seeds: int, epochs: int) -> list[Row]:
    """A row for each seed and trainer, with the seconds at the end of each epoch and the mean reward of its images.

    Ours trains for a quarter more epochs, as it may reach TRL's last reward an epoch late by rounding alone.
    """
    if size == "full":
        # an epoch that is not measured, to compile ops into the cache; otherwise the first run would include that time
        run_in_process(run_spec(learners(size, 0)[0], MODEL, prompts(learning=True), 0, 1), device)
    rows = []
    for seed in range(seeds):
        for contender in learners(size, seed)[:: -1 if seed % 2 else 1]:
            count = epochs + (ceil(epochs / 4) if contender.trainer == OURS else 0)
            result = run_in_process(run_spec(contender, MODEL, prompts(learning=True), 0, count), device)
            row = {"bench": "learning", "contender": contender.trainer, "seed": seed, "settings": contender.settings}
            rows.append({**row, **curve(result["epochs"], contender.images), "peak_bytes": result["peak_bytes"]})
            print_progress(f"seed {seed} {contender.trainer}: {rows[-1]['seconds'][-1]:.1f} s for {count} epochs")
    return rows


def curve(epochs: list[Figures], images: int) -> Row:
    """Rewards, and seconds since the first epoch began: the start of the process is not in them."""
    return {
        "seconds": list(accumulate(epoch["epoch_s"] for epoch in epochs)),
        "reward": [epoch["reward_mean"] for epoch in epochs],
        "images_per_epoch": images,
    }


def smoothed(rewards: list[float]) -> list[float]:
    """The mean of each epoch's reward and the one before."""
    return [mean(rewards[max(0, i - 1) : i + 1]) for i in range(len(rewards))]


def reached_s(row: Row, target: float) -> float | None:
    """Seconds at the end of the first epoch whose smoothed reward reaches the target, None if none does."""
    pairs = zip(row["seconds"][1:], smoothed(row["reward"])[1:], strict=True)
    return next((seconds for seconds, reward in pairs if reward >= target), None)


def comparisons(rows: list[Row]) -> list[Row]:
    """For each seed the seconds that both took to TRL's last smoothed reward, and their ratio (None if not reached)."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        mine, theirs = (next(r for r in rows if r["seed"] == seed and r["contender"] == c) for c in (OURS, TRL))
        target = smoothed(theirs["reward"])[-1]
        ours_s, trl_s = reached_s(mine, target), reached_s(theirs, target)
        assert trl_s is not None, "its own last epoch reaches it"
        ratio = None if ours_s is None else trl_s / ours_s
        found.append({"seed": seed, "target": target, "ours_s": ours_s, "trl_s": trl_s, "ratio": ratio})
    return found


def print_comparisons(found: list[Row]) -> None:
    print("learning: seconds to TRL's last reward (mean of two epochs), start-up and checkpoints left out")
    print(f"{'seed':>5}{'reward':>10}{'ours':>10}{'trl':>10}{'trl / ours':>12}")
    for row in found:
        ours = "never" if row["ours_s"] is None else f"{row['ours_s']:.1f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(f"{row['seed']:>5}{row['target']:>10.3f}{ours:>10}{row['trl_s']:>10.1f}{ratio:>12}")
    ratios = [row["ratio"] for row in found if row["ratio"] is not None]
    if ratios:
        print(f"{median(ratios):.2f} times as fast to the same reward ({min(ratios):.2f}..{max(ratios):.2f})")


def mean_of(curves: list[list[float]]) -> list[float]:
    """The mean over several curves at each epoch."""
    return [mean(values) for values in zip(*curves, strict=True)]


def draw(rows: list[Row], found: list[Row], path: Path) -> None:
    """Plots reward against seconds: a thin line for each seed, a thick one for their mean."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    for contender in (TRL, OURS):
        mine = [row for row in rows if row["contender"] == contender]
        colour = COLOURS[contender]
        for row in mine:
            axis.plot(row["seconds"], row["reward"], color=colour, linewidth=0.8, alpha=0.5)
        seconds, rewards = (mean_of([row[name] for row in mine]) for name in ("seconds", "reward"))
        axis.plot(seconds, rewards, color=colour, linewidth=2.2, marker="o", markersize=3, label=f"{contender}, mean")
    ratios = [row["ratio"] for row in found if row["ratio"] is not None]
    said = f", TRL's last reward reached {median(ratios):.2f} times as fast" if ratios else ""
    what = f"{rows[0]['device']}, {rows[0]['images_per_epoch']} images an epoch, {len(found)} seeds"
    axis.set_title(what + said, fontsize=9)
    axis.set_xlabel("seconds (a point at the end of each epoch), without start-up and checkpoints")
    axis.set_ylabel("mean reward of an epoch's samples (JPEG size in kB, negative)")
    axis.legend()
    figure.savefig(path, dpi=130)
