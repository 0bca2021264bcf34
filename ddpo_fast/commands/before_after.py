"""Images of the same prompts and noise before and after training, and the file that keeps the first of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.run_folder import checkpoint, pictures
from ddpo_fast.trainer import DDPOTrainer

logger = logging.getLogger(__name__)

BEFORE = "before"
# what images and rewards depend on, beside the weights
SETTINGS = ("sample_num_steps", "sample_guidance_scale", "sample_eta", "negative_prompts")


@dataclass
class Comparison:
    """What was drawn when the comparison began: by the base model as `before`, or by a later one as `epoch_N`.

    Args:
        name: 'before' or 'epoch_N', which names its files.
        images, rewards: [B, 3, H, W] and [B].
    """

    name: str
    images: torch.Tensor
    rewards: torch.Tensor

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def draw(self, folder: Path, prompts: tuple[str, ...], images: torch.Tensor, rewards: torch.Tensor) -> Path:
        """Draws the two rows; returns the picture's path."""
        path = folder / f"{self.name}_after.png"
        rows = [(self.label, self.images, self.rewards), ("after", images, rewards)]
        pictures.draw_grid(prompts, [(name, images, scores.tolist()) for name, images, scores in rows], path)
        return path


def begin(trainer: DDPOTrainer, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Comparison:
    """The comparison that the run has begun with these prompts, reward and settings, or a new one.

    A trained model's images are never called 'before', and no earlier comparison is overwritten.
    """
    settings = {name: getattr(trainer.config, name) for name in SETTINGS}
    settings |= {name: trainer.run_settings.get(name) for name in ("pretrained_model", "reward")}
    wanted = {"prompts": list(prompts), "settings": settings}
    is_main = trainer.accelerator.is_main_process
    # all draw, or none: what they read may differ
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
        aside = path.with_suffix(".partial")
        torch.save({**wanted, "images": images, "rewards": rewards}, aside)
        aside.replace(path)
    return Comparison(name, images, rewards)


def _kept(trainer: DDPOTrainer, wanted: dict[str, Any]) -> Comparison | None:
    """The earliest comparison that fits, in the run's folder or in that of the run that it goes on from."""
    folders = [trainer.output_dir]
    if trainer.config.resume_from:
        folders.append(checkpoint.run_folder_of(trainer.config.resume_from))
    for folder in folders:
        for path in sorted((folder / f"{BEFORE}.pt", *folder.glob("epoch_*.pt")), key=_epoch):
            kept = _read(path) if path.exists() and _epoch(path) <= trainer.first_epoch else None
            if kept is not None and all(kept.get(key) == value for key, value in wanted.items()):
                return Comparison(path.stem, kept["images"], kept["rewards"])
    return None


def _epoch(path: Path) -> float:
    number = path.stem.removeprefix("epoch_")
    return 0 if path.stem == BEFORE else int(number) if number.isdecimal() else float("inf")


def _read(path: Path) -> dict[str, Any] | None:
    """A picture is no reason to stop a run, so that what cannot be read is a warning."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(kept, dict) and {"images", "rewards"} <= kept.keys():
            return kept
        problem = "it holds no images"
    # a damaged file raises whatever its bytes lead to
    except Exception as error:
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
    logger.warning("%s cannot be read (%s): it is not compared with", path, problem)
    return None
