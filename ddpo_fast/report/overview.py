"""A run in a sentence, and its main figures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from ddpo_fast.report.axes import epoch_axes
from ddpo_fast.report.run_records import METRICS, RunRecords, number
from ddpo_fast.report.settings import shown

BUNDLED = {"": "The bundled tiny Stable Diffusion", "bundled-flow": "The bundled tiny flow-matching model"}


def sentence(run: RunRecords) -> str:
    """What was trained for what, and how it went, for a reader who knows nothing of the run."""
    done = len(run.epochs)
    whole = bool(done) and run.planned_epochs is not None and run.epochs[-1]["epoch"] + 1 >= run.planned_epochs
    said = f"{_model(run)} {'was' if whole else 'is'} trained ({_part(run)}) to make images of higher reward"
    reward, prompts = run.settings.get("reward"), run.settings.get("prompts")
    said += f", {shown(reward).replace(',', ', ')}" if reward else ""
    said += f", for prompts from {_short(shown(prompts))}" if prompts else ""
    compared = run.by_size()[0]
    means = compared.known("reward_mean")
    if len(means) < 2:
        return f"{said}."
    over = f"all {done} epochs" if whole else f"the {done} epochs so far"
    first, last = (figure(mean, means) for mean in (means[0], means[-1]))
    size = compared.epochs[0].get("size") if compared is not run else None
    of_size = f" of images of {size}" if size else ""
    return f"{said}. Over {over} the mean reward{of_size} went from {first} to {last}."


def tiles(run: RunRecords) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the main figures."""
    found = []
    compared = run.by_size()[0]
    if means := compared.known("reward_mean"):
        first, last, highest = (figure(mean, means) for mean in (means[0], means[-1], max(means)))
        best = next(int(r["epoch"]) + 1 for r in compared.epochs if r.get("reward_mean") == max(means))
        found.append(("Reward", f"{first} → {last}", f"best {highest}, in epoch {best}"))
    for name in run.names("eval"):
        points = [mean for record in run.evaluations if (mean := number(record.get(f"{name}_mean"))) is not None]
        if points:
            what = f"Held-out {name.partition('/')[2]}"
            found.append((what, f"{points[0]:.4g} → {points[-1]:.4g}", f"{len(points)} evaluations"))
    planned = f"of {run.planned_epochs} planned" if run.planned_epochs else ""
    last = f"{int(run.epochs[-1]['epoch']) + 1}" if run.epochs else "0"
    found.append(("Epochs", last, planned))
    axes = epoch_axes(run.epochs)
    if run.epochs:
        found.append(("Images", f"{axes['images'][-1]:,.0f}", f"{len(run.updates)} updates"))
    if minutes := [value for value in axes["minutes"] if value is not None]:
        found.append(("Time", _duration(minutes[-1]), _written(run)))
    if speeds := run.known("images_per_s"):
        device = run.settings.get("device")
        found.append(("Images per second", f"{median(speeds):.3g}", f"{device}" if device else "median of the epochs"))
    return found


def figure(value: float, others: Sequence[float]) -> str:
    """A value in four digits; 0 for what is rounding beside the others, as the first sum of rewards in their units."""
    return "0" if abs(value) < 1e-5 * max(map(abs, others)) else f"{value:.4g}"


def _model(run: RunRecords) -> str:
    if "pretrained_model" not in run.settings:
        return "A model"
    name = shown(run.settings["pretrained_model"])
    return BUNDLED.get(name) or _short(name)


def _part(run: RunRecords) -> str:
    if run.settings.get("use_lora"):
        rank = run.settings.get("lora_rank")
        return f"a LoRA of rank {rank}" if rank else "a LoRA"
    return "all weights" if "use_lora" in run.settings else "weights"


def _short(text: object) -> str:
    """The last part of a path, or the text itself."""
    return Path(text).name if isinstance(text, str) and text.startswith("/") else str(text)


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    if minutes < 60:
        return f"{minutes:.3g} min"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"


def _written(run: RunRecords) -> str:
    try:
        return f"until {datetime.fromtimestamp((run.folder / METRICS).stat().st_mtime):%Y-%m-%d %H:%M}"
    except OSError:
        return ""
