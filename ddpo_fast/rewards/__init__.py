"""Rewards of images, one module each, and how a reward function is called.

A reward function takes (images [B, 3, H, W] in fp32 in [0, 1], prompts, metadata), the last two as tuples of length B,
and returns (rewards of length B, metadata): TRL's protocol.

    named.py        rewards by name; `load` gives the function
    scoring.py      checked calls, and scoring while the next images are sampled
    several.py      the weighted sum of several rewards
    own_process.py  a reward in a process of its own
    jpeg.py         jpeg_compressibility, jpeg_incompressibility
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
