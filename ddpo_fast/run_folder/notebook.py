"""Pictures of a run below a notebook's cell. Elsewhere nothing is shown, and nothing is imported for it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ddpo_fast.run_folder import pictures, sample_files


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which has imported IPython before anything else."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # IPython in a terminal has a shell too, but no kernel
    return getattr(shell, "kernel", None) is not None


def hides_bar(is_inner: bool) -> bool | None:
    """tqdm's `disable` in the process that shows bars: None is a bar on a terminal, and none in a log file.

    A notebook's output is neither, and has bars; without ipywidgets it cannot draw one below another.

    Args:
        is_inner: for a bar that is shown below another one.
    """
    return is_inner and "ipywidgets" not in sys.modules if in_notebook() else None


def show(picture: np.ndarray | Image.Image) -> None:
    """Shows pixels [H, W, 3] in uint8, or an image, below the cell; does nothing where there is no notebook."""
    if in_notebook():
        from IPython.display import display

        display(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))


def show_run(run: Path) -> None:
    """Shows what is in a run's folder: images of fixed prompts and noise before and after, and the reward curve."""
    if in_notebook():
        pictures.attempt(_show_before_and_after, run)
        pictures.attempt(_show_curve, run / "rewards.png")


def _show_before_and_after(run: Path) -> None:
    folders = sample_files.folders_in(run)
    if len(folders) > 1:
        prompts, rows = sample_files.first_and_last(folders)
        show(pictures.grid_pixels(prompts, rows))


def _show_curve(path: Path) -> None:
    if path.exists():
        with Image.open(path) as curve:
            show(curve)
