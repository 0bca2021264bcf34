"""Rewards of images, one module each, and how a reward function is called.

A reward function takes (images [B, 3, H, W] in fp32 in [0, 1], prompts, metadata), the last two as tuples of length B,
and returns (rewards of length B, metadata): TRL's protocol.

    named.py        rewards by name; `load` gives the function
    scoring.py      checked calls, and scoring while the next images are sampled
    several.py      the weighted sum of several rewards
    own_process.py  a reward in a process of its own
    jpeg.py         jpeg_compressibility, jpeg_incompressibility
    clip_score.py   clip_score: how well an image fits its prompt
    pickscore.py    pickscore: which image of a prompt people prefer
    hps_v2.py       hps_v2, hps_v2.1: the same, trained on other ratings
    aesthetic.py    aesthetic: how much people like an image; its last layers are in head.py
    clip.py         a CLIP in transformers' format, which these are made of; open_clip_layout.py reads another one
    clip_images.py  images as a CLIP takes them
    network.py      weights that are loaded once and move between host memory and the device
    weight_files.py their files, found in a folder or on the Hub and read as nothing but data
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
    from ddpo_fast.rewards.named import REWARDS, is_local, load, load_each, weights_of
    from ddpo_fast.rewards.scoring import WORKER_NAME, PartFailed, RewardFunction, RewardRandom, Scoring, score
    from ddpo_fast.rewards.several import SeveralRewards

__all__ = [
    "REWARDS",
    "WORKER_NAME",
    "PartFailed",
    "RewardFunction",
    "RewardRandom",
    "Scoring",
    "SeveralRewards",
    "is_local",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "load",
    "load_each",
    "score",
    "weights_of",
]

# imported when first used: the names of rewards are needed where torch is not, and a reward may need much to import
_MODULES = {
    **dict.fromkeys(("REWARDS", "is_local", "load", "load_each", "weights_of"), "named"),
    **dict.fromkeys(("WORKER_NAME", "PartFailed", "RewardFunction", "RewardRandom", "Scoring", "score"), "scoring"),
    "SeveralRewards": "several",
    **dict.fromkeys(("jpeg_compressibility", "jpeg_incompressibility"), "jpeg"),
}

__getattr__ = lazy_names(__name__, _MODULES)
