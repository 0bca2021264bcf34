"""What a person looks at after a run: the reward curve, and images before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, GRAY = "#1f5fa8", "#9aa5b1"


def draw_rewards(records: Sequence[dict[str, Any]], path: Path, label: str = "reward") -> None:
    """Mean reward with a band of two standard errors against images and against time, from metrics.jsonl's lines."""
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        return
    mean = np.array([r["reward_mean"] for r in epochs])
    band = 2 * np.array([r["reward_std"] / r["images"] ** 0.5 for r in epochs])
    images = np.cumsum([r["images"] for r in epochs])
    minutes = np.array([r["elapsed_s"] for r in epochs]) / 60
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, x, name in zip(axes, (images, minutes), ("images", "minutes"), strict=True):
        axis.fill_between(x, mean - band, mean + band, color=BLUE, alpha=0.2, linewidth=0)
        axis.plot(x, mean, color=BLUE)
        axis.set_xlabel(name)
        axis.grid(color=GRAY, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(label)
    _save(figure, path)


def draw_before_after(
    prompts: Sequence[str],
    rows: Sequence[tuple[str, torch.Tensor, Sequence[float] | None]],
    path: Path,
) -> None:
    """One row for each (name, images [B, 3, H, W] in [0, 1], rewards [B] or None), one column for each prompt."""
    figure, axes = plt.subplots(
        len(rows),
        len(prompts),
        figsize=(1.5 * len(prompts), 1.75 * len(rows) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for line, (name, images, rewards) in zip(axes, rows, strict=True):
        captions = [f"{reward:.3g}" for reward in rewards] if rewards else [""] * len(images)
        for axis, image, caption in zip(line, images, captions, strict=True):
            axis.imshow(image.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xlabel(caption, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(f"{name}\nmean {np.mean(rewards):.3g}" if rewards else name, fontsize=10)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(prompt if len(prompt) <= 24 else prompt[:23] + "…", fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=120, format="png")
    plt.close(figure)
    aside.replace(path)
