"""A picture of what a head predicts against what was given, for validation rows."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

BLUE, GRAY = "#1f5fa8", "#9aa5b1"
# points up to this many are drawn one by one, more as a density
POINTS = 3000
# bins of predicted chances
BINS = 10


def draw(predicted: np.ndarray, given: np.ndarray, are_pairs: bool, path: Path) -> None:
    """Scores [N] against scores [N]; of pairs, how often the first image was preferred against the predicted chance."""
    with matplotlib.rc_context({"text.usetex": False}):
        figure = Figure(figsize=(4.8, 4.4), layout="constrained")
        axis = figure.subplots()
        if are_pairs:
            _chances(axis, 1 / (1 + np.exp(-predicted)), given)
        else:
            _scores(axis, predicted, given)
        axis.grid(color=GRAY, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        # renamed when complete, so that a kill leaves no half-written picture
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)


def _scores(axis: matplotlib.axes.Axes, predicted: np.ndarray, given: np.ndarray) -> None:
    if len(given) <= POINTS:
        axis.scatter(given, predicted, s=9, color=BLUE, alpha=0.5, linewidths=0)
    else:
        axis.hexbin(given, predicted, gridsize=50, cmap="Blues", mincnt=1, bins="log")
    ends = [min(given.min(), predicted.min()), max(given.max(), predicted.max())]
    axis.plot(ends, ends, color=GRAY, linewidth=1)
    axis.set(xlabel="given score", ylabel="predicted score")


def _chances(axis: matplotlib.axes.Axes, predicted: np.ndarray, given: np.ndarray) -> None:
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    filled = np.unique(bins)
    counts = np.array([(bins == at).sum() for at in filled])
    shares = np.array([given[bins == at].mean() for at in filled])
    means = np.array([predicted[bins == at].mean() for at in filled])
    axis.plot([0, 1], [0, 1], color=GRAY, linewidth=1)
    axis.errorbar(means, shares, 2 * np.sqrt(shares * (1 - shares) / counts), fmt="o", color=BLUE, capsize=2)
    axis.set(xlabel="predicted chance of the first image", ylabel="its share of preference", xlim=(0, 1), ylim=(0, 1))
