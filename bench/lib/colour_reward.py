"""A reward that depends on the prompt and whose optimum is known: each prompt has a colour.

    PYTHONPATH=bench ddpo-fast train --reward lib.colour_reward:colour --prompts demo_animals ...

Its gradient says nothing about detail, unlike the JPEG rewards, and one direction for all prompts does not reach it.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch

# red, green and blue in [0, 1]
COLOURS = {
    "lion": (0.9, 0.3, 0.3),
    "penguin": (0.3, 0.8, 0.3),
    "panda": (0.3, 0.4, 0.9),
    "owl": (0.9, 0.8, 0.3),
}


def colour_of(prompt: str) -> tuple[float, float, float]:
    """The colour of the first word that has one, else one that a checksum of the prompt chooses."""
    for word in re.findall(r"\w+", prompt.lower()):
        if word in COLOURS:
            return COLOURS[word]
    return list(COLOURS.values())[zlib.crc32(prompt.encode()) % len(COLOURS)]


def colour(images: torch.Tensor, prompts: tuple[str, ...], metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """-10 times the rms distance between an image's mean colour and its prompt's: 0 is the optimum, -10 the bound.

    Images are [B, 3, H, W] in [0, 1]; returns (rewards [B] on the CPU, {}).
    """
    wanted = torch.tensor([colour_of(prompt) for prompt in prompts])
    found = images.detach().float().mean((2, 3)).cpu()
    return -10 * (found - wanted).square().mean(1).sqrt(), {}
