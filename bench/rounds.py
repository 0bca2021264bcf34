"""Contenders in turn, each run in a process of its own, and what the rounds say together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import paths
from workloads import Contender

Figures = dict[str, Any]
# what an epoch did: the same work shows in the same figures. `skipped`, ours alone, is a share of the pairs
LEARNED = ("reward_mean", "approx_kl", "clipfrac", "skipped")
Results = dict[str, list[Figures]]
RUNS = paths.ROOT / "bench" / "runs.py"
# how long an optional contender may take: this many times as long as the slowest other one, and its start
PATIENCE, START_S = 4, 60


class RunFailed(RuntimeError):
    pass


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spec_of(
    contender: Contender, model: Path, prompts: list[str], warmup: int, epochs: int, profiled: bool = False
) -> dict[str, Any]:
    """What a run is told: `warmup` epochs that are not counted, then `epochs` that are."""
    return {
        "trainer": contender.trainer,
        "model": str(model),
        "use_lora": contender.use_lora,
        "settings": contender.settings,
        "prompts": prompts,
        "warmup": warmup,
        "epochs": epochs,
        "profiled": profiled,
    }


def run(spec: dict[str, Any], device: str, patience_s: float | None = None) -> Figures:
    """Raises `RunFailed` with the reason if the run ends without figures."""
    command = [sys.executable, str(RUNS), json.dumps(spec)]
    try:
        done = subprocess.run(command, env=environment(device), capture_output=True, text=True, timeout=patience_s)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"stopped after {patience_s:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()
        say("\n".join(said[-15:]))
        raise RunFailed(said[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def environment(device: str) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    # interpreted kernels take thousands of times as long
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # idle threads sleep, as in `make demo`
    return {"OMP_WAIT_POLICY": "PASSIVE"} | ours | offline | hidden


def in_turn(
    contenders: list[Contender],
    run_one: Callable[[Contender, float | None], Figures],
    rounds: int,
    budget_s: float | None = None,
) -> tuple[Results, dict[str, str]]:
    """(figures of each contender in each round, reasons of those that failed).

    The order is turned around from round to round. A contender that failed is left out from then on. No round begins
    that would, at the length of the longest, end beyond `budget_s`.
    """
    results: Results = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    began, lengths, slowest = time.monotonic(), [0.0], 0.0
    for i in range(rounds):
        round_began = time.monotonic()
        if budget_s and i and round_began - began + max(lengths) > budget_s:
            say(f"{i} of {rounds} rounds fit into {budget_s:.0f} s")
            break
        for contender in contenders[:: -1 if i % 2 else 1]:
            if contender.name in failed:
                continue
            patience = PATIENCE * slowest + START_S if contender.optional and slowest else None
            run_began = time.monotonic()
            try:
                results[contender.name].append(run_one(contender, patience))
            except RunFailed as reason:
                failed[contender.name] = str(reason)
            if not contender.optional:
                slowest = max(slowest, time.monotonic() - run_began)
        lengths.append(time.monotonic() - round_began)
    return {name: found for name, found in results.items() if name not in failed}, failed


def figures_of(contender: Contender, result: Figures, flops: dict[str, float]) -> Figures:
    """One run as rates. `flops` are those of a UNet row forward, forward and backward, and of an image's decoding."""
    epochs = result["epochs"]
    count, epoch_s = len(epochs), sum(epoch["epoch_s"] for epoch in epochs)
    parts = {name: sum(e[name] for e in epochs) / count for name in ("sample_s", "reward_s", "train_s")}
    images, sampled, trained = contender.images, contender.sample_rows, contender.train_rows
    done = trained * (1 - sum(epoch.get("skipped", 0.0) for epoch in epochs) / count)
    work = sampled * flops["forward"] + done * flops["trained"] + images * flops["decoded"]
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
        **{
            name: epochs[-1][name] for name in ("reward_mean", "approx_kl", "clipfrac", "skipped") if name in epochs[-1]
        },
    }


def summary(per_round: list[Figures]) -> Figures:
    """Medians of the rounds, the least and most images per second, and the rounds themselves."""
    medians = {name: median(figures[name] for figures in per_round) for name in per_round[0]}
    speeds = [figures["images_per_s"] for figures in per_round]
    return {**medians, "images_per_s_min": min(speeds), "images_per_s_max": max(speeds), "rounds": per_round}


def ratio(mine: list[Figures], other: list[Figures]) -> dict[str, Any]:
    """How many times as many images per second as the other in the same round: median, least and most."""
    pairs = zip(mine, other, strict=True)
    ratios = [a["images_per_s"] / b["images_per_s"] for a, b in pairs]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios), "per_round": ratios}
