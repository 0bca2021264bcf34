"""Statistics of learning curves, paired over seeds: images to a reward, final rewards, intervals, collapse.

A curve is a list of epochs, each a dict with `images` and `seconds` so far and the figures of the epoch.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import mean, stdev
from typing import Any, NamedTuple

Epochs = list[dict[str, Any]]
# a collapse: this share of the gain is lost for longer than this many epochs of the baseline
LOST_SHARE, LOST_EPOCHS = 0.2, 3
# or images of a prompt differ by less than this share of what they did at the start
LEAST_DIVERSITY = 1 / 3


class Interval(NamedTuple):
    """A mean with its 95 % interval and the p-value of a mean of 0; nan where one value says nothing of its spread."""

    mean: float
    low: float
    high: float
    p: float


class Point(NamedTuple):
    images: float
    seconds: float | None
    value: float


def smoothed(epochs: Epochs, name: str, window: int, whole: bool = True) -> list[Point]:
    """The figure's mean over the last `window` images at the end of each epoch, whatever the sizes of epochs.

    An epoch that the window cuts counts by the share of its images that are inside. Points without a whole window are
    left out, unless `whole` is False. Epochs without the figure are left out of the mean.
    """
    points, before = [], [0, *(epoch["images"] for epoch in epochs)]
    for i, epoch in enumerate(epochs):
        begin = epoch["images"] - window
        if begin < 0 and whole:
            continue
        weights = [max(0, epochs[j]["images"] - max(before[j], begin)) for j in range(i + 1)]
        pairs = [(w, e[name]) for w, e in zip(weights, epochs, strict=False) if e[name] is not None]
        if total := sum(weight for weight, _ in pairs):
            value = sum(weight * figure for weight, figure in pairs) / total
            points.append(Point(epoch["images"], epoch["seconds"], value))
    return points


def reached(points: list[Point], target: float) -> Point | None:
    """The first point whose value reaches the target."""
    return next((point for point in points if point.value >= target), None)


def speed_up(baseline: list[Point], curve: list[Point]) -> dict[str, Any]:
    """How many times fewer images and seconds a curve needs for the last value of the baseline's curve.

    The baseline's own images are those at which it first reaches that value, which may be before its end. A curve that
    never reaches it is censored: it needs more than all its images, so its ratio is at most what it says here.
    """
    target = baseline[-1].value
    own, found = reached(baseline, target), reached(curve, target)
    assert own is not None, "its own last point reaches it"
    end = found or curve[-1]
    seconds = None if own.seconds is None or end.seconds is None else own.seconds / end.seconds
    return {
        "target": target,
        "baseline_images": own.images,
        "images": end.images,
        "baseline_seconds": own.seconds,
        "seconds": end.seconds,
        "never": found is None,
        "images_ratio": own.images / end.images,
        "images_ratio_of_whole_run": baseline[-1].images / end.images,
        "seconds_ratio": seconds,
    }


def student_t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's distribution for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan2(t, math.sqrt(df))
    cos, sin = math.cos(theta), math.sin(theta)
    term, total = (1.0, 1.0) if df % 2 == 0 else (cos, cos)
    for k in range(2 + df % 2, df, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if df % 2 == 0:
        return 0.5 + sin * total / 2
    return 0.5 + (theta + (sin * total if df > 1 else 0.0)) / math.pi


@cache
def student_t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for p from 0.5 to below 1, by bisection."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_interval(values: list[float]) -> Interval:
    """The mean, its 95 % interval by Student's t, and the two-sided p-value of a mean of 0."""
    centre = mean(values)
    if len(values) < 2:
        return Interval(centre, math.nan, math.nan, math.nan)
    df, error = len(values) - 1, stdev(values) / math.sqrt(len(values))
    if error == 0:
        return Interval(centre, centre, centre, 1.0 if centre == 0 else 0.0)
    half = student_t_quantile(0.975, df) * error
    return Interval(centre, centre - half, centre + half, 2 * student_t_cdf(-abs(centre) / error, df))


def geometric_interval(ratios: list[float]) -> Interval:
    """The geometric mean, its 95 % interval, and the p-value of a mean ratio of 1."""
    found = t_interval([math.log(ratio) for ratio in ratios])
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.p)


def collapse(epochs: Epochs, window: int) -> dict[str, Any]:
    """Whether a run collapsed, and the largest share of its gain that it ever lost.

    The reward collapses if its smoothed curve stays more than `LOST_SHARE` of the gain so far below its best so far
    for longer than `LOST_EPOCHS` epochs of `window / 2` images. Less than twice the standard error of the window's mean
    is noise. Diversity collapses if it falls below `LEAST_DIVERSITY` of the first epoch's.
    """
    points = smoothed(epochs, "reward", window)
    start, spread = epochs[0]["reward"], epochs[0]["reward_std"] or 0.0
    noise = 2 * spread / math.sqrt(window)
    best, lost, longest_images, since = start, 0.0, 0.0, None
    for before, point in zip([Point(window / 2, None, start), *points], points, strict=False):
        best = max(best, point.value)
        margin = max(LOST_SHARE * (best - start), noise)
        lost = max(lost, best - point.value)
        if best - point.value <= margin:
            since = None
            continue
        since = before.images if since is None else since
        longest_images = max(longest_images, point.images - since)
    first = epochs[0]["diversity"]
    shares = [p.value / first for p in smoothed(epochs, "diversity", window)] if first else []
    least = min(shares, default=None)
    return {
        "reward_collapsed": longest_images > LOST_EPOCHS * window / 2,
        "diversity_collapsed": least is not None and least < LEAST_DIVERSITY,
        "images_below_best": longest_images,
        "largest_loss": lost,
        "gain": best - start,
        "least_diversity_share": least,
    }
