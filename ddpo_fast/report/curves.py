"""The charts of a page, as plain data that plotly's script draws: traces, a layout, and three choices of x.

A chart is a dict: `title`, `note` (what is normal), `summary` (the chart in words), `keys` (names and colours of its
parts), `data` and `layout` (plotly's), and `xs`, for each trace its x by epochs, images and minutes, between which the
page switches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ddpo_fast.report.axes import Axes, Values, by_epoch, epoch_axes, evaluation_axes, mean
from ddpo_fast.report.run_records import RunRecords, image_count, number

Chart = dict[str, Any]

# readable on white and on black, and told apart by the colour-blind as far as eight colours can be
COLOURS = ("#3b82c4", "#e07b39", "#2a9d78", "#a86fd0", "#d9578a", "#97892a", "#5f7f95", "#c0504d")
# Points of a curve: of more, blocks are drawn by their mean, or by their largest value.
MOST_POINTS = 800

BY_EPOCH = "The line is an epoch's mean, the band reaches from its lowest to its highest update."

# name in metrics.jsonl, title, what is normal, and whether blocks of updates are drawn by their largest value
UPDATE_CHARTS: tuple[tuple[str, str, str, bool], ...] = (
    (
        "approx_kl",
        "KL from the policy that sampled",
        "Grows within an epoch and starts again near 0 with the next. Values far above 0.1 mean that updates are too "
        "large.",
        False,
    ),
    ("reference_kl", "KL from the model before training", "Rises slowly while the policy learns.", False),
    (
        "clipfrac",
        "Share of clipped ratios",
        "0 in the first update of an epoch, then often 0.1 to 0.6. Near 1 hardly anything is learned.",
        False,
    ),
    (
        "ratio_drift",
        "Ratio drift before the first update",
        "The weights have not changed yet, so this is rounding: it should stay far below the clip range (dashed).",
        True,
    ),
    (
        "grad_norm",
        "Gradient norm, before clipping",
        "May be noisy; a steady climb by factors of ten is not usual.",
        True,
    ),
    (
        "zero_gradient",
        "Share of pairs without a gradient",
        "Pairs whose image has an advantage of 0, or whose ratio is clipped: they cost time and teach nothing.",
        False,
    ),
    ("loss", "Loss", "Says little in reinforcement learning: it does not fall as the reward rises.", False),
    (
        "update_distance",
        "How far updates move a step",
        "In standard deviations of a denoising step; it follows train_target_update.",
        False,
    ),
)
EPOCH_CHARTS: tuple[tuple[str, str, str], ...] = (
    (
        "image_spread",
        "How much a prompt's images differ",
        "The distance of two images of a prompt. A fall below a third of the start means collapse.",
    ),
    (
        "reward_spread",
        "How much a prompt's rewards differ",
        "Without spread among its images a prompt teaches nothing.",
    ),
)
STAGES = (
    ("sample_s", "sampling"),
    ("reward_s", "waiting for the reward"),
    ("train_s", "training"),
    ("other", "evaluating, saving, the rest"),
)


def reward_charts(runs: Sequence[RunRecords]) -> list[Chart]:
    """The reward with its quantiles, each of several rewards, and held-out rewards."""
    parts = [part for run in runs for part in run.by_size()]
    found = [_reward_chart(parts)]
    for kind, title, note in (
        ("reward", "Reward {}", "One of several rewards, as its function returned it; the band is the middle half."),
        (
            "eval",
            "Held-out {}",
            "Images of fixed prompts and noise, which are not trained on; the band is two standard errors.",
        ),
    ):
        names = dict.fromkeys(name for run in runs for name in run.names(kind))
        found += [
            _moments_chart(runs if kind == "eval" else parts, name, title.format(name.partition("/")[2]), note)
            for name in names
        ]
    return [chart for chart in found if chart["data"]]


def always_zero(charts: Sequence[Chart]) -> list[str]:
    """The titles of charts that show zeros alone, as of the KL divergence in runs with one update an epoch."""
    return [chart["title"] for chart in charts if not any(value for trace in chart["data"] for value in trace["y"])]


def update_charts(runs: Sequence[RunRecords]) -> list[Chart]:
    """The metrics of updates that any of the runs has."""
    found = []
    for name, title, note, by_largest in UPDATE_CHARTS:
        chart = _chart(title, note, from_zero=name != "loss")
        for at, run in enumerate(runs):
            values, colour = run.update_values(name), COLOURS[at % 8]
            axes, (low, middle, high) = by_epoch(run, values)
            if len(middle) < len(values):
                chart["note"] = f"{note} {BY_EPOCH}"
                _add_band(chart, axes, low, high, colour, 0.2)
            _add(chart, _thinned(axes, middle, max if by_largest else mean), run.name, colour)
        if name == "ratio_drift" and chart["data"]:
            _add_clip_range(chart, runs)
        found.append(chart)
    return [chart for chart in found if chart["data"]]


def variety_charts(runs: Sequence[RunRecords]) -> list[Chart]:
    found = []
    parts = [part for run in runs for part in run.by_size()]
    for name, title, note in EPOCH_CHARTS:
        chart = _chart(title, note, from_zero=True)
        for at, run in enumerate(parts):
            _add(chart, _thinned(epoch_axes(run.epochs), run.values(name), mean), run.name, COLOURS[at % 8])
        found.append(chart)
    return [chart for chart in found if chart["data"]]


def speed_charts(runs: Sequence[RunRecords]) -> list[Chart]:
    """Images a second, memory, and where the time of each run's epochs goes."""
    speed = _chart("Images per second", "Of whole epochs: sampling, scoring and training.", from_zero=True)
    memory = _chart(
        "Memory, GB",
        "Solid: the most that PyTorch has held on the device. Dashed: what the process holds in host memory.",
        from_zero=True,
    )
    for at, run in enumerate(runs):
        axes, colour = epoch_axes(run.epochs), COLOURS[at % 8]
        _add(speed, _thinned(axes, run.values("images_per_s"), mean), run.name, colour)
        for name, where, dash in (("device_gb", "device", "solid"), ("host_gb", "host", "dash")):
            _add(memory, _thinned(axes, run.values(name), max), f"{run.name} {where}", colour, dash)
    times = [_time_chart(run, len(runs) > 1) for run in runs]
    return [chart for chart in (speed, *times, memory) if chart["data"]]


def stage_seconds(run: RunRecords) -> Axes:
    """Seconds of each stage of every epoch; `other` is the rest of the time between the ends of two epochs."""
    found: Axes = {name: run.values(name) for name, _ in STAGES[:3]}
    ends, found["other"] = run.values("elapsed_s"), []
    for at, end in enumerate(ends):
        before = ends[at - 1] if at else (0.0 if run.epochs and run.epochs[0].get("epoch") == 0 else None)
        stages = [found[name][at] for name, _ in STAGES[:3]]
        if end is None or before is None or None in stages:
            found["other"].append(None)
        else:
            found["other"].append(max(0.0, end - before - sum(stage for stage in stages if stage is not None)))
    return found


# charts


def _reward_chart(runs: Sequence[RunRecords]) -> Chart:
    chart = _chart(
        "Reward",
        "The mean of an epoch's images should rise, with noise. The dark band is the middle half of the images, the "
        "light one reaches from the lowest to the highest."
        if len(runs) == 1
        else "The mean of an epoch's images, and the middle half of them as a band.",
    )
    for at, run in enumerate(runs):
        axes, colour = epoch_axes(run.epochs), COLOURS[at % 8]
        if len(runs) == 1:
            _add_band(chart, axes, run.values("reward_min"), run.values("reward_max"), colour, 0.10)
        low, high = run.values("reward_p25"), run.values("reward_p75")
        if not _any(low):
            # lines from before there were quantiles
            low, high = _around(run.values("reward_mean"), run.values("reward_std"))
        _add_band(chart, axes, low, high, colour, 0.22)
        _add(chart, _thinned(axes, run.values("reward_mean"), mean), run.name, colour)
    return chart


def _moments_chart(runs: Sequence[RunRecords], name: str, title: str, note: str) -> Chart:
    chart = _chart(title, note)
    is_eval = name.startswith("eval/")
    for at, run in enumerate(runs):
        records = run.evaluations if is_eval else run.epochs
        axes = evaluation_axes(run) if is_eval else epoch_axes(records)
        means = [number(record.get(f"{name}_mean")) for record in records]
        stds = [number(record.get(f"{name}_std")) for record in records]
        images = [image_count(record) for record in records]
        # a normal distribution's middle half, or two standard errors
        widths = [
            None if std is None else 2 * std / count**0.5 if is_eval else 0.674 * std
            for std, count in zip(stds, images, strict=True)
        ]
        _add_band(chart, axes, *_around(means, widths), COLOURS[at % 8], 0.2)
        _add(chart, _thinned(axes, means, mean), run.name, COLOURS[at % 8])
    return chart


def _time_chart(run: RunRecords, is_one_of_several: bool) -> Chart:
    name = f": {run.name}" if is_one_of_several else ""
    chart = _chart(
        f"Where the time of an epoch goes, seconds{name}",
        "Scoring runs beside sampling where it can; only the rest of it is waited for.",
    )
    seconds = stage_seconds(run)
    for (stage, title), colour in zip(STAGES, ("#3b82c4", "#d9578a", "#2a9d78", "#8a8f98"), strict=True):
        axes, values = _thinned(epoch_axes(run.epochs), seconds[stage], mean)
        if _any(values):
            trace = {"type": "bar", "name": title, "y": list(values), "marker": {"color": colour}}
            _append(chart, trace, axes)
            chart["keys"].append((title, colour))
    chart["layout"] |= {"barmode": "stack", "bargap": 0.15}
    return chart


def _chart(title: str, note: str, from_zero: bool = False) -> Chart:
    layout: dict[str, Any] = {"showlegend": False}
    if from_zero:
        layout["yaxis"] = {"rangemode": "tozero"}
    return {"title": title, "note": note, "summary": "", "keys": [], "data": [], "xs": [], "layout": layout}


def _add(chart: Chart, points: tuple[dict[str, Values], Values], name: str, colour: str, dash: str = "solid") -> None:
    """Adds a line to the chart, unless it has no points; and says in the summary where it begins and ends."""
    axes, values = points
    known = [value for value in values if value is not None]
    if not known:
        return
    trace = {
        "type": "scatter",
        # a line through one point is invisible
        "mode": "lines+markers" if len(known) < 30 else "lines",
        "name": plain(name),
        "y": list(values),
        # only an epoch's first update has a ratio drift
        "connectgaps": True,
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"size": 4},
        "hovertemplate": "%{y:.4g}<extra>" + plain(name) + "</extra>",
    }
    _append(chart, trace, axes)
    chart["summary"] += f"{name}: from {known[0]:.4g} to {known[-1]:.4g}. "


def _add_band(chart: Chart, axes: Axes, low: Values, high: Values, colour: str, opacity: float) -> None:
    """Adds an area between two curves."""
    if not _any(low) or not _any(high):
        return
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    shared = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    for values, by, fill in ((low, min, {}), (high, max, {"fill": "tonexty"})):
        thin_axes, thin = _thinned(axes, values, by)
        _append(chart, {**shared, "y": thin, **fill, "fillcolor": f"rgba({red},{green},{blue},{opacity})"}, thin_axes)


def _add_clip_range(chart: Chart, runs: Sequence[RunRecords]) -> None:
    ranges = {run.clip_range for run in runs if run.clip_range is not None and run.clip_range > 0}
    if len(ranges) == 1:
        (clip_range,) = ranges
        line = {"color": "#c0504d", "width": 1, "dash": "dash"}
        chart["layout"]["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": clip_range, "y1": clip_range, "line": line}
        ]
        # a logarithmic axis cannot show exact zeros
        shown = [value for trace in chart["data"] for value in trace["y"] if value and value > 0]
        if shown:
            # plotly writes the digits between powers of ten too small to read
            powers = [math.log10(value) for value in (*shown, clip_range)]
            exponents = range(math.floor(min(powers)), math.ceil(max(powers)) + 1)
            chart["layout"]["yaxis"] = {
                "type": "log",
                "range": [exponents[0], exponents[-1] + 0.1],
                "tickvals": [10.0**exponent for exponent in exponents],
                "ticktext": [f"1e{exponent}" for exponent in exponents],
            }
            for trace in chart["data"]:
                trace["y"] = [value if value and value > 0 else None for value in trace["y"]]


def _append(chart: Chart, trace: dict[str, Any], axes: dict[str, Values]) -> None:
    chart["data"].append({**trace, "x": list(axes["epochs"])})
    chart["xs"].append({name: list(values) for name, values in axes.items()})


def _around(middle: Values, width: Values) -> tuple[list[float | None], list[float | None]]:
    pairs = list(zip(middle, width, strict=True))
    low, high = (
        [None if value is None or half is None else value + sign * half for value, half in pairs] for sign in (-1, 1)
    )
    return low, high


def _any(values: Values) -> bool:
    return any(value is not None for value in values)


def _thinned(axes: Axes, values: Values, of_block: Callable[[Any], float]) -> tuple[dict[str, Values], Values]:
    """The curve, by blocks if it has more than `MOST_POINTS` points; a block's x is that of its last point."""
    size = -(-len(values) // MOST_POINTS)
    if size <= 1:
        return dict(axes), values
    blocks = [
        [value for value in values[start : start + size] if value is not None] for start in range(0, len(values), size)
    ]
    ends = [min(start + size, len(values)) - 1 for start in range(0, len(values), size)]
    thin = {name: [axis[end] for end in ends] for name, axis in axes.items()}
    return dict(thin), [of_block(block) if block else None for block in blocks]


def plain(text: str) -> str:
    """Text that plotly shows as it is: it reads tags and entities, and has no MathJax here to read `$`."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
