"""The page itself: one file of HTML with its style, its scripts, plotly's script and the images inside."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ddpo_fast.report import curves, images, overview, prompts, settings
from ddpo_fast.report.remarks import remarks_on
from ddpo_fast.report.run_records import RunRecords, read_all
from ddpo_fast.version import __version__

REPORT, COMPARISON = "report.html", "comparison.html"
# by which a page is known, so that no other file is ever replaced by one
GENERATOR = "ddpo-fast report"
TEMPLATES = Path(__file__).parent / "templates"
# digits of the numbers in charts
DIGITS = 6


def write(folders: Sequence[Path], path: Path) -> Path:
    """Writes the page about the runs in `folders` and returns its path.

    An older page is replaced when the new one is complete. Raises `ValueError` for a folder that holds no run, and if
    `path` is a file that is no page of this kind.
    """
    check_replaceable(path)
    text = render(folders)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_replaceable(path: Path) -> None:
    """Raises `ValueError` if a page must not be written to `path`, before the work is done."""
    if path.is_dir():
        raise ValueError(f"output is {str(path)!r}, which is a folder: add a file's name")
    if not path.parent.is_dir():
        raise ValueError(f"output is {str(path)!r}, and there is no folder {str(path.parent)!r}: make it first")
    if path.exists():
        with path.open("rb") as file:
            if GENERATOR.encode() not in file.read(2000):
                raise ValueError(f"output is {str(path)!r}, which exists and is no report: choose another name")


def render(folders: Sequence[Path], is_live: bool = False, version: str = "") -> str:
    """The text of the page about the runs in `folders`.

    Args:
        is_live: whether the page asks its server for news, and reloads itself when `version` is no longer the present
            one.
    """
    # plotly's Python is needed for its script alone
    from plotly.offline import get_plotlyjs

    runs = read_all(list(folders))
    groups = [
        ("reward", "Reward", curves.reward_charts(runs)),
        ("updates", "Updates of the policy", curves.update_charts(runs)),
        ("variety", "Variety", curves.variety_charts(runs)),
        ("speed", "Speed and memory", curves.speed_charts(runs)),
    ]
    zeros = {id: curves.always_zero(charts) for id, _, charts in groups}
    groups = [(id, name, [chart for chart in charts if chart["title"] not in zeros[id]]) for id, name, charts in groups]
    views = [_view(run, at) for at, run in enumerate(runs)]
    data = {
        "charts": [chart for _, _, charts in groups for chart in charts],
        "samples": [view["samples"] for view in views],
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # keys stay in their order, and `tojson` escapes what could end a script
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["with_options"] = _with_options
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        version=version,
        is_live=is_live,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        package_version=__version__,
        views=views,
        groups=groups,
        zeros=zeros,
        differences=settings.differences(runs),
        data=_rounded(data),
        # scripts run only with this, so that nothing in a run's files could be taken for one
        nonce=secrets.token_urlsafe(16),
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text("utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def _view(run: RunRecords, at: int) -> dict[str, Any]:
    """What the template says about one run."""
    epochs, kept = images.sample_epochs(run.folder)
    return {
        "name": run.name,
        "colour": curves.COLOURS[at % len(curves.COLOURS)],
        "sentence": overview.sentence(run),
        "tiles": overview.tiles(run),
        "remarks": remarks_on(run),
        "samples": epochs,
        "kept": kept,
        "extremes": images.extremes(run.folder),
        "before_after": None if epochs else images.before_after(run.folder),
        "prompts": prompts.table(run.by_size()[0]),
        "changed": settings.changed(run),
        "all": settings.listed(run),
    }


def _with_options(text: str) -> Markup:
    """A text in which the options of a command line are set as code."""
    return Markup(re.sub(r"--\w+", r"<code>\g<0></code>", str(escape(text))))


def _rounded(value: Any) -> Any:
    """Nested data with fewer digits, as a page has thousands of numbers."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def default_path(folders: Sequence[Path]) -> Path:
    """Where a page goes: into its run's folder, that of several runs into the first one's."""
    return folders[0] / (REPORT if len(folders) == 1 else COMPARISON)
