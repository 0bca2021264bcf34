"""Images of the same prompts and noise before and after training, and the file that keeps those from before.

Shapes: B prompts, C channels, H x W pixels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpo_fast.config import SAMPLING_FIELDS
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import checkpoint, pictures
from ddpo_fast.trainer import DDPOTrainer

logger = logging.getLogger(__name__)

# the name of images of the base model; those of a model after N epochs are named epoch_N
BEFORE = "before"


@dataclass
class Comparison:
    """Images from before training, which are drawn beside those from after it.

    Args:
        name: 'before' for the base model or 'epoch_N' for a later one; the files are `<name>.pt`, `<name>_after.png`.
        images, rewards: [B, C, H, W] and [B].
    """

    name: str
    images: torch.Tensor
    rewards: torch.Tensor

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def draw(self, folder: Path, prompts: tuple[str, ...], images: torch.Tensor, rewards: torch.Tensor) -> Path:
        """Draws the images from before training above `images` [B, C, H, W] with `rewards` [B]; returns the path."""
        path = folder / f"{self.name}_after.png"
        rows = [(self.label, self.images, self.rewards), ("after", images, rewards)]
        pictures.draw_grid(prompts, [(name, images, scores.tolist()) for name, images, scores in rows], path)
        return path


def find_or_draw(trainer: DDPOTrainer, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Comparison:
    """The images that this run has saved for these prompts, reward and settings, else new ones, saved in a file.

    Every process calls it. A resumed run draws new images only for other prompts, another reward or other settings.
    They are named by the epoch, as they are not of the base model. Existing files are kept.
    """
    settings = {name: getattr(trainer.config, name) for name in SAMPLING_FIELDS}
    # files of runs from before there were these settings do not have them
    new = {"height": None, "width": None, "sizes": None, "sampler": "auto", "sde_window": None}
    settings = {name: value for name, value in settings.items() if name not in new or value != new[name]}
    settings |= {name: trainer.run_settings.get(name) for name in ("pretrained_model", "reward")}
    # files of runs whose reward had no arguments do not have these
    made = {name: trainer.run_settings.get(name) for name in ("reward_model", "reward_options")}
    settings |= {name: value for name, value in made.items() if value}
    wanted = {"prompts": list(prompts), "settings": settings}
    is_main = trainer.accelerator.is_main_process
    # The main process decides for all, as all must take part in drawing and may see different files on other machines.
    found = broadcast_from_main(trainer.accelerator, _kept(trainer, wanted) if is_main else None)
    if found is not None:
        return found

    name = BEFORE if trainer.first_epoch == 0 else f"epoch_{trainer.first_epoch}"
    if name != BEFORE and is_main:
        logger.warning(
            "no images of the base model with these prompts, reward and settings are kept: %s_after.png will compare "
            "with the model after %d epochs",
            name,
            trainer.first_epoch,
        )
    images, rewards = trainer.evaluate(prompts, metadata)
    if is_main:
        path = trainer.output_dir / f"{name}.pt"
        # renamed when complete, so that a kill leaves no half-written file
        partial = path.with_suffix(".partial")
        torch.save({**wanted, "images": images, "rewards": rewards}, partial)
        partial.replace(path)
    return Comparison(name, images, rewards)


def _kept(trainer: DDPOTrainer, wanted: dict[str, Any]) -> Comparison | None:
    """The earliest kept images of the `wanted` prompts and settings, in this run's folder or the resumed run's."""
    folders = [trainer.output_dir]
    if trainer.config.resume_from:
        folders.append(checkpoint.run_folder_of(trainer.config.resume_from))
    for folder in folders:
        for path in sorted((folder / f"{BEFORE}.pt", *folder.glob("epoch_*.pt")), key=_epoch):
            # a run resumed from an earlier checkpoint has not reached the later files' epochs
            kept = _read(path) if path.exists() and _epoch(path) <= trainer.first_epoch else None
            if kept is not None and all(kept.get(key) == value for key, value in wanted.items()):
                return Comparison(path.stem, kept["images"], kept["rewards"])
    return None


def _epoch(path: Path) -> float:
    """The epoch in the name of a kept file; infinity for a name that has none."""
    number = path.stem.removeprefix("epoch_")
    return 0 if path.stem == BEFORE else int(number) if number.isdecimal() else float("inf")


def _read(path: Path) -> dict[str, Any] | None:
    """What a kept file holds, or None with a warning if it is damaged: pictures are no reason to stop a run."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(kept, dict) and {"images", "rewards"} <= kept.keys():
            return kept
        problem = "it holds no images"
    # torch, zipfile and pickle raise errors of many types for damaged bytes
    except Exception as error:
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
    logger.warning("%s cannot be read (%s): it is not compared with", path, problem)
    return None
