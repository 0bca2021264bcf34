"""The pictures of a run: the reward curve, and grids of images.

Figures are made without pyplot, so that the user's backend and open figures stay as they are. Prompts are drawn as
plain text: they may contain `$`, which matplotlib would read as TeX, line ends, or letters that no installed font has.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import functools
import io
import logging
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

logger = logging.getLogger(__name__)

T = TypeVar("T")
# a row of a grid: name, images [B, 3, H, W] in [0, 1], rewards [B] or None
Row = tuple[str, torch.Tensor, Sequence[float] | None]

BLUE, GRAY = "#1f5fa8", "#9aa5b1"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
# fonts, where installed, for letters that matplotlib's own DejaVu Sans lacks
MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Arial Unicode MS", "Noto Emoji")
# Dots per inch, lowered where a picture of many blocks would be higher than this many pixels: JPEG's limit is 2^16.
DPI, MAX_PIXELS = 120, 30_000
# in inches: the edge of an image, the gap beside it, the height of a line, and the margin for the rows' names
CELL, GAP, LINE, MARGIN = 1.5, 0.08, 0.14, 0.75
# a title's letters per line, and its lines
LETTERS, LINES = 22, 3
# images side by side
COLUMNS = 8


def attempt(draw: Callable[..., T], *args: Any) -> T | None:
    """Returns `draw(*args)`, or None after a warning if it raises: a run must not fail because of a picture."""
    try:
        return draw(*args)
    except Exception as error:
        logger.warning("a picture could not be drawn (%s: %s)", type(error).__name__, error)
        return None


@contextmanager
def _plain_text() -> Iterator[None]:
    """Text is drawn without TeX, whatever the user's style says, and without a warning for each missing letter."""
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": False}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


@_plain_text()
def draw_rewards(records: Sequence[dict[str, Any]], path: Path, label: str = "reward") -> None:
    """Mean rewards with a band of two standard errors against images and against time, from metrics.jsonl's lines.

    Below the reward that is trained on, each of several rewards has a row of its own, and each one of an evaluation.
    """
    curves = reward_curves(records)
    if not curves:
        return
    figure = Figure(figsize=(10, 3.6 + 2.6 * (len(curves) - 1)), layout="constrained")
    rows = figure.subplots(len(curves), 2, sharex="col", sharey="row", squeeze=False)
    for axes, (name, curve) in zip(rows, curves.items(), strict=True):
        images, minutes, mean, error = np.array(curve).T
        for axis, x in zip(axes, (images, minutes), strict=True):
            axis.fill_between(x, mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.2, linewidth=0)
            # a line through one point is invisible, so a single epoch needs a marker
            axis.plot(x, mean, color=BLUE, marker="o" if len(curve) == 1 else "")
            axis.grid(color=GRAY, alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        shown = label if name == "reward" else name
        axes[0].set_ylabel(plain(shown)[:60], parse_math=False, family=_fonts())
    for axis, x_name in zip(rows[-1], ("images", "minutes"), strict=True):
        axis.set_xlabel(x_name)
    _save(figure, path)


def reward_curves(records: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float, float]]]:
    """The points (images, minutes, mean, its standard error) of each reward by its name, from metrics.jsonl's lines."""
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    images = 0
    for record in records:
        if record["kind"] not in ("epoch", "eval"):
            continue
        images += record["images"] if record["kind"] == "epoch" else 0
        for key in record:
            name = key.removesuffix("_mean")
            if name != key and (name == "reward" or name.startswith(("reward/", "eval/"))):
                error = record[f"{name}_std"] / record["images"] ** 0.5
                # a curve for each size of images, as those of different sizes cannot be compared
                name += f", {record['size']}" if "size" in record else ""
                curves.setdefault(name, []).append((images, record["elapsed_s"] / 60, record[key], error))
    # an evaluation comes before the first epoch
    return dict(sorted(curves.items(), key=lambda curve: curve[0].startswith("eval/")))


@_plain_text()
def draw_grid(prompts: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Draws rows of images with a column for each prompt, the prompt above it and the rewards as captions.

    After `COLUMNS` prompts the rows go on in a block below.
    """
    figure = _grid(prompts, rows)
    _save(figure, path, dpi=_dpi(figure))


@_plain_text()
def grid_pixels(prompts: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """What `draw_grid` draws, as pixels [H, W, 3] in uint8."""
    figure, buffer = _grid(prompts, rows), io.BytesIO()
    figure.savefig(buffer, dpi=_dpi(figure), format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def _grid(prompts: Sequence[str], rows: Sequence[Row]) -> Figure:
    # The layout, in inches: a block is its titles' lines, then for each row an image, a gap and a caption.
    columns = min(len(prompts), COLUMNS)
    titles = [wrapped(prompt) for prompt in prompts]
    blocks = [range(start, min(start + columns, len(prompts))) for start in range(0, len(prompts), columns)]
    below = [LINE if scores is not None else 0.0 for _, _, scores in rows]
    heads = [LINE * max(1, *(titles[at].count("\n") + 1 for at in block)) + GAP for block in blocks]
    block_height = sum(below) + len(rows) * (CELL + GAP) + GAP
    width = MARGIN + columns * (CELL + GAP)
    height = sum(heads) + len(blocks) * block_height
    # one axis over the whole figure, in inches from its upper left corner
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    y = 0.0
    for block, head in zip(blocks, heads, strict=True):
        y += head
        for column, at in enumerate(block):
            _write(axis, MARGIN + column * (CELL + GAP) + CELL / 2, y - GAP / 2, titles[at], 7.5, va="bottom")
        for (name, images, scores), room in zip(rows, below, strict=True):
            mean = f"\nmean {np.mean(scores):.3g}" if scores is not None else ""
            _write(axis, MARGIN / 2, y + CELL / 2, wrapped(name, 10) + mean, 8, va="center")
            for column, at in enumerate(block):
                x = MARGIN + column * (CELL + GAP)
                # `extent` is left, right, bottom, top, and the y axis points down
                axis.imshow(_pixels(images[at]), extent=(x, x + CELL, y + CELL, y))
                if scores is not None:
                    _write(axis, x + CELL / 2, y + CELL + 0.02, f"{scores[at]:.3g}", 8, va="top")
            y += CELL + GAP + room
        y += GAP
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _dpi(figure: Figure) -> float:
    return min(DPI, MAX_PIXELS / figure.get_figheight())


def _pixels(image: torch.Tensor) -> np.ndarray:
    """An image [3, H, W] as matplotlib takes it, [H, W, 3] in [0, 1]."""
    return image.float().nan_to_num().clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def _write(axis: Any, x: float, y: float, text: str, size: float, va: str) -> None:
    axis.text(x, y, text, fontsize=size, ha="center", va=va, parse_math=False, family=_fonts(), linespacing=1.1)


@functools.cache
def _fonts() -> list[str]:
    known = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in MORE_FONTS if name in known)]


def plain(text: str) -> str:
    """The text in one line, with a space for each control or format character, which could not be seen."""
    kept = (" " if unicodedata.category(c).startswith(("C", "Z")) else c for c in str(text))
    return " ".join("".join(kept).split())


def wrapped(text: str, letters: int = LETTERS, lines: int = LINES) -> str:
    """The text in at most `lines` lines as wide as `letters` average letters; '…' stands for what is left out."""
    rest, done = plain(text), list[str]()
    while rest and len(done) < lines:
        end = _fitting(rest, letters)
        if end < len(rest) and " " in rest[1 : end + 1]:
            end = rest.rindex(" ", 1, end + 1)
        done.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = done[-1]
        done[-1] = last[: _fitting(last, letters - 1)] + "…"
    return "\n".join(done)


def _fitting(text: str, letters: int) -> int:
    """How many characters of the text are as wide as `letters` average letters; at least one."""
    # widths in DejaVu Sans, roughly: an East Asian wide character takes two letters
    room = 0.0
    for at, character in enumerate(text):
        if unicodedata.east_asian_width(character) in "WF":
            room += 2
        else:
            room += 1.7 if character in "MW@%—" else 1.3 if character.isupper() or character in "mw" else 1
        if room > letters:
            return max(1, at)
    return len(text)


def check_ending(path: Path, option: str) -> None:
    """Raises `ValueError`, naming the option, for a path whose ending is no format of pictures."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{option} is {str(path)!r} but must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")


def _save(figure: Figure, path: Path, dpi: float = DPI) -> None:
    # renamed when complete, so that a kill leaves no half-written picture
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=dpi, format=path.suffix.lower()[1:])
    partial.replace(path)
