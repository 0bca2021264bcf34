"""A run's folder with made-up records, in the form that runs write, for tests of what reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# what a page or a picture must show as it is
ODD_PROMPTS = ("a cat", "</script><script>alert(1)</script>", "<b>$x$ & 10 %</b>", "a 🐈\u2028on {{ 7 * 7 }} rugs")


def epoch_records(epochs: int = 9, prompts: tuple[str, ...] = ODD_PROMPTS, **changes: Any) -> list[dict[str, Any]]:
    """The lines of a run that learns, with two updates an epoch and an evaluation after every third.

    Args:
        changes: values by name, or functions of the epoch.
    """

    def changed(record: dict[str, Any], epoch: int) -> dict[str, Any]:
        found = {name: value(epoch) if callable(value) else value for name, value in changes.items() if name in record}
        return {**record, **found}

    lines: list[dict[str, Any]] = [_evaluation(0, 0.1)]
    for epoch in range(epochs):
        mean = 1 - 0.9 * math.exp(-epoch / 4)
        for inner in range(2):
            update = {"approx_kl": 1e-4 * inner, "clipfrac": 0.3 * inner, "zero_gradient": 0.1, "loss": 0.01}
            update |= {"grad_norm": 0.5 + 0.1 * inner, "skipped": 0.0}
            if not inner:
                update["ratio_drift"] = 1e-7 * (epoch + 1)
            counts = {"kind": "update", "update": 2 * epoch + inner, "epoch": epoch, "inner_epoch": 0}
            lines.append({**counts, **changed(update, epoch)})
        quantiles = {"reward_min": mean - 0.4, "reward_p25": mean - 0.1, "reward_median": mean}
        quantiles |= {"reward_p75": mean + 0.1, "reward_max": mean + 0.4, "reward_mean": mean, "reward_std": 0.2}
        parts = {"reward/one_mean": 2 * mean, "reward/one_std": 0.3, "reward/two_mean": -0.1, "reward/two_std": 0.1}
        spreads = {"reward_spread": 0.2, "image_spread": 0.25}
        times = {"sample_s": 2.0, "reward_s": 0.1, "train_s": 3.0, "images_per_s": 16 / 5.1, "host_gb": 1.5}
        counts = {"kind": "epoch", "epoch": epoch, "updates": 2 * epoch + 2, "images": 16, "clip_range": 1e-4}
        of_prompts = {prompt: [mean + 0.05 * at, 4] for at, prompt in enumerate(prompts)}
        record = {
            **quantiles,
            **parts,
            **spreads,
            **times,
            "prompt_rewards": of_prompts,
            "elapsed_s": 6.0 * (epoch + 1),
        }
        lines.append({**counts, **changed(record, epoch)})
        if (epoch + 1) % 3 == 0:
            lines.append(_evaluation(epoch + 1, mean))
    return lines


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """Writes config.json with the settings, and metrics.jsonl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"num_epochs": 9, "train_clip_range": 1e-4, "train_learning_rate": 3e-4, **settings}
    command = {"pretrained_model": "", "use_lora": False, "reward": "one:1,two:1", "prompts": "animals"}
    (folder / "config.json").write_text(json.dumps({"config": config, "device": "a test", **command}), "utf-8")
    text = "".join(json.dumps(line) + "\n" for line in (epoch_records() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(text, "utf-8")
    return folder


def write_samples(
    folder: Path, epochs: tuple[int, ...] = (0, 3, 9), prompts: tuple[str, ...] = ODD_PROMPTS, size: int = 16
) -> None:
    """Writes images of the prompts for each of the epochs, with rewards that grow, and the extremes of the last."""
    for epoch in epochs:
        kept = folder / "samples" / f"epoch_{epoch:05d}"
        kept.mkdir(parents=True)
        entries = []
        for at, prompt in enumerate(prompts):
            pixels = np.full((size, size, 3), (20 * epoch + 30, 60 * at, 128), dtype=np.uint8)
            Image.fromarray(pixels).save(kept / f"{at:03d}.jpg")
            rewards = {"one": 0.1 * epoch + at, "two": -0.1}
            entries.append({"file": f"{at:03d}.jpg", "prompt": prompt, "reward": 0.1 * epoch, "rewards": rewards})
        (kept / "samples.json").write_text(json.dumps({"epoch": epoch, "samples": entries}), "utf-8")
    extremes = []
    for kind in ("best", "worst"):
        Image.fromarray(pixels).save(kept / f"{kind}_0.jpg")
        extremes.append(
            {"file": f"{kind}_0.jpg", "prompt": f"{kind} <i>cat</i>", "reward": 1.5, "rewards": {"one": 1.5}}
        )
    (kept / "extremes.json").write_text(json.dumps({"epoch": epochs[-1], "samples": extremes}), "utf-8")


def _evaluation(epochs: int, mean: float) -> dict[str, Any]:
    counts = {"kind": "eval", "epoch": epochs, "updates": 2 * epochs, "images": 8}
    return {**counts, "eval/one_mean": mean, "eval/one_std": 0.1, "elapsed_s": 6.0 * epochs}
