"""Rewards of images, one module each, and how a reward function is called.

A reward function takes (images [B, 3, H, W] in fp32 in [0, 1], prompts, metadata), the last two as tuples of length B,
and returns (rewards of length B, metadata): TRL's protocol.

    named.py        rewards by name; `load` gives the function
    scoring.py      checked calls, and scoring while the next images are sampled
    jpeg.py         jpeg_compressibility, jpeg_incompressibility
    ocr.py          ocr: the prompt's quoted text in the image
    nsfw.py         nsfw: a penalty for images that are not safe for work
    vlm.py          vlm: a vision-language model behind a server; vlm_answers.py reads its answers
    remote.py       http: scores that a server computes
    servers.py      what rewards behind servers share
    pixels.py       images as bytes
    optional_packages.py    checks that the packages of a reward are installed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpo_fast.lazy_names import lazy_names

if TYPE_CHECKING:
    from ddpo_fast.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
    from ddpo_fast.rewards.named import REWARDS, load
    from ddpo_fast.rewards.scoring import WORKER_NAME, RewardFunction, RewardRandom, Scoring, score

__all__ = [
    "REWARDS",
    "WORKER_NAME",
    "RewardFunction",
    "RewardRandom",
    "Scoring",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "load",
    "score",
]

# imported when first used: the names of rewards are needed where torch is not, and a reward may need much to import
_MODULES = {
    "REWARDS": "named",
    "load": "named",
    **dict.fromkeys(("WORKER_NAME", "RewardFunction", "RewardRandom", "Scoring", "score"), "scoring"),
    **dict.fromkeys(("jpeg_compressibility", "jpeg_incompressibility"), "jpeg"),
}

__getattr__ = lazy_names(__name__, _MODULES)
