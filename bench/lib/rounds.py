"""Runs contenders in turns, round by round, and computes rates, medians and ratios of what the rounds measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from lib.command_line import print_progress
from lib.trainer_process import Figures, RunFailed
from lib.workloads import LEARNING_FIGURES, Contender

Results = dict[str, list[Figures]]
# the time limit of an optional contender: this many times the slowest run of the others, plus seconds for its start
TIMEOUT_FACTOR, START_S = 4, 60


def take_turns(
    contenders: list[Contender],
    run_one: Callable[[Contender, float | None], Figures],
    rounds: int,
    budget_s: float | None = None,
) -> tuple[Results, dict[str, str]]:
    """(figures of each contender in each round, reasons of those that failed).

    `run_one` gets a contender and its limit in seconds, None for no limit. The order is reversed in every second round,
    so that a machine that slows down steadily favours nobody. A contender that fails is left out of all rounds after,
    and of the results. No round begins that would end beyond `budget_s` if it took as long as the longest one.
    """
    results: Results = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    began, lengths, slowest = time.monotonic(), [0.0], 0.0
    for i in range(rounds):
        round_began = time.monotonic()
        if budget_s and i and round_began - began + max(lengths) > budget_s:
            print_progress(f"{i} of {rounds} rounds fit into {budget_s:.0f} s")
            break
        for contender in contenders[:: -1 if i % 2 else 1]:
            if contender.name in failed:
                continue
            timeout_s = TIMEOUT_FACTOR * slowest + START_S if contender.optional and slowest else None
            run_began = time.monotonic()
            try:
                results[contender.name].append(run_one(contender, timeout_s))
            except RunFailed as reason:
                failed[contender.name] = str(reason)
            if not contender.optional:
                slowest = max(slowest, time.monotonic() - run_began)
        lengths.append(time.monotonic() - round_began)
    return {name: found for name, found in results.items() if name not in failed}, failed


def rates(contender: Contender, result: Figures, flops: dict[str, float]) -> Figures:
    """A run's figures per second and per epoch.

    `flops` are those of a UNet row's forward pass, of its forward and backward pass, and of decoding an image. Rows
    count as trained even where their pair is skipped for its zero gradient; FLOPs count only those that were computed.
    """
    epochs = result["epochs"]
    count, epoch_s = len(epochs), sum(epoch["epoch_s"] for epoch in epochs)
    parts = {name: sum(e[name] for e in epochs) / count for name in ("sample_s", "reward_s", "train_s")}
    images, sampled, trained = contender.images, contender.sample_rows, contender.train_rows
    computed = trained * (1 - sum(epoch.get("skipped", 0.0) for epoch in epochs) / count)
    work = sampled * flops["forward"] + computed * flops["trained"] + images * flops["decoded"]
    return {
        "images_per_s": images * count / epoch_s,
        "epoch_s": epoch_s / count,
        **parts,
        "rows_per_s": (sampled + trained) * count / epoch_s,
        "sample_rows_per_s": sampled / parts["sample_s"],
        "train_rows_per_s": trained / parts["train_s"],
        "tflop_per_s": work * count / epoch_s / 1e12,
        "peak_bytes": result["peak_bytes"],
        "startup_s": result["startup_s"],
        "warmup_s": result["warmup_s"],
        **{name: epochs[-1][name] for name in LEARNING_FIGURES if name in epochs[-1]},
    }


def speeds(rounds: list[Figures]) -> list[float]:
    return [figures["images_per_s"] for figures in rounds]


def speed_range(rounds: list[Figures]) -> str:
    """The least and the most images per second."""
    return f"{min(speeds(rounds)):.3f}..{max(speeds(rounds)):.3f}"


def summary(rounds: list[Figures]) -> Figures:
    """Medians of the rounds, the least and most images per second, and the rounds themselves."""
    medians = {name: median(figures[name] for figures in rounds) for name in rounds[0]}
    measured = speeds(rounds)
    return {**medians, "images_per_s_min": min(measured), "images_per_s_max": max(measured), "rounds": rounds}


def speed_ratio(rounds: list[Figures], other: list[Figures]) -> dict[str, Any]:
    """Images per second over the other's in the same round: median, least, most, and each round's."""
    ratios = [a / b for a, b in zip(speeds(rounds), speeds(other), strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios), "per_round": ratios}
