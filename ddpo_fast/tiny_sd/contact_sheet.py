"""Draws each animal that the bundled model knows: `python -m ddpo_fast.tiny_sd.contact_sheet [FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from diffusers import StableDiffusionPipeline

from ddpo_fast.tiny_sd import MODEL
from ddpo_fast.tiny_sd.drawings import ANIMALS, FACES, with_article

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = 11


def draw(path: Path, seed: int = 0) -> None:
    """One image per prompt, with guidance 3 and 20 DDIM steps; all are from one seed, none is selected."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    prompts = [with_article(name) for name in [*ANIMALS, *(f"{name} face" for name in FACES)]]
    images = pipeline(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(seed),
    ).images
    rows = -(-len(prompts) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS, 1.2 * rows), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, prompt in zip(axes.flat, images, prompts, strict=False):
        axis.imshow(image)
        axis.set_title(prompt, fontsize=6, pad=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "contact_sheet.png")
