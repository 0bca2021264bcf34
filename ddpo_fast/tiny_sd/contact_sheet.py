"""Draws each animal that a bundled model knows: `python -m ddpo_fast.tiny_sd.contact_sheet [--flow] [FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import DiffusionPipeline

from ddpo_fast.tiny_sd import FLOW_MODEL, MODEL
from ddpo_fast.tiny_sd.drawings import ANIMALS, FACES, with_article

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = 11


HERE = Path(__file__).parent
# Of each model: its sheet, what diffusers must be told to open it, and how it samples. T5 is left out of the
# flow-matching model, and with it the rows of zeros that would stand for it.
SHEETS: dict[Path, tuple[str, dict[str, Any], dict[str, Any]]] = {
    MODEL: ("contact_sheet.png", {}, {"eta": 1.0}),
    FLOW_MODEL: (
        "flow_contact_sheet.png",
        {"text_encoder_3": None, "tokenizer_3": None},
        {"max_sequence_length": 0},
    ),
}


def draw(model: Path, path: Path, seed: int = 0) -> None:
    """One image per prompt, with guidance 3 and 20 steps; all are from one seed, none is selected."""
    _, absent, settings = SHEETS[model]
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, **absent)
    prompts = [with_article(name) for name in [*ANIMALS, *(f"{name} face" for name in FACES)]]
    images = pipeline(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        **settings,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--flow", action="store_true", help="the flow-matching model")
    args = parser.parse_args()
    chosen = FLOW_MODEL if args.flow else MODEL
    draw(chosen, args.file or HERE / SHEETS[chosen][0])
