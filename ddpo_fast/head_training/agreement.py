"""How well predicted scores agree with given ones, with intervals that hold 95 % of the time."""

from __future__ import annotations

import math

import numpy as np

# of the normal distribution: 95 % are within this many standard deviations
Z = 1.959964
# rows that are compared with all others at a time
CHUNK = 512


def ranks(values: np.ndarray) -> np.ndarray:
    """The ranks 1 to N of the values [N]; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation; None if all values of one side are equal."""
    a, b = ranks(first), ranks(second)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman_interval(rho: float, count: int) -> tuple[float, float]:
    """By Fisher's transformation with the variance of Bonett and Wright (2000), (1 + rho^2/2) / (N - 3)."""
    if count < 4:
        return -1.0, 1.0
    half = Z * math.sqrt((1 + rho**2 / 2) / (count - 3))
    centre = math.atanh(max(-1 + 1e-12, min(rho, 1 - 1e-12)))
    return math.tanh(centre - half), math.tanh(centre + half)


def ordered_right(predicted: np.ndarray, given: np.ndarray) -> tuple[float, float] | None:
    """The share of two images of different scores that the prediction has in the right order; a tie in it is a half.

    With it comes how many independent cases would have the same variance, by the share's linearisation in the images;
    at least N/2, as that many pairs have no image in common. None if all given scores are equal.
    """
    right, decided = np.zeros(len(given)), np.zeros(len(given))
    for start in range(0, len(given), CHUNK):
        rows = slice(start, start + CHUNK)
        wanted = np.sign(given[rows, None] - given[None])
        agrees = wanted * np.sign(predicted[rows, None] - predicted[None])
        right[rows] = ((agrees + 1) / 2 * (wanted != 0)).sum(1)
        decided[rows] = (wanted != 0).sum(1)
    if not decided.any():
        return None
    share = right.sum() / decided.sum()
    variance = np.square(2 * (right - share * decided) / decided.sum()).sum()
    count = share * (1 - share) / variance if variance > 0 else 0.0
    return float(share), float(max(count, len(given) // 2))


def share_interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent cases."""
    if not count:
        return 0.0, 1.0
    width = 1 + Z**2 / count
    centre = (share + Z**2 / (2 * count)) / width
    half = Z / width * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def of_ratings(predicted: np.ndarray, given: np.ndarray, groups: np.ndarray) -> dict[str, object]:
    """Rank correlation and pairwise accuracy over images [N]; rows of one group are one image, with its mean score."""
    _, inverse = np.unique(groups, return_inverse=True)
    counts = np.bincount(inverse)
    predicted, given = (np.bincount(inverse, values) / counts for values in (predicted, given))
    rho, ordered = spearman(predicted, given), ordered_right(predicted, given)
    return {
        "images": len(given),
        "spearman": rho,
        "spearman_interval": None if rho is None else spearman_interval(rho, len(given)),
        "pairwise_accuracy": None if ordered is None else ordered[0],
        "pairwise_accuracy_interval": None if ordered is None else share_interval(*ordered),
        "mean_squared_error": float(np.square(predicted - given).mean()),
    }


def of_pairs(margins: np.ndarray, preferences: np.ndarray, groups: np.ndarray) -> dict[str, object]:
    """Accuracy over pairs [N] that are no ties, and the Bradley-Terry loss over all.

    Args:
        margins: the first image's score minus the second's.
        preferences: for the first image, in [0, 1].
        groups: pairs that share an image or a caption; the interval counts each group once, as if its pairs were equal.
    """
    decided = preferences != 0.5
    loss = np.logaddexp(0, margins) - preferences * margins
    found: dict[str, object] = {"pairs": len(margins), "ties": int((~decided).sum()), "loss": float(loss.mean())}
    agrees = np.sign(preferences[decided] - 0.5) * np.sign(margins[decided])
    accuracy = float(((agrees + 1) / 2).mean()) if decided.any() else None
    count = len(np.unique(groups[decided]))
    interval = None if accuracy is None else share_interval(accuracy, count)
    return {**found, "pairwise_accuracy": accuracy, "pairwise_accuracy_interval": interval}
