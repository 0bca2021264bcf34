"""Rewards by name, each in a module that is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ddpo_fast.user_functions import load_function

# the module of each reward, in this package, and the function in it, or the class whose objects are reward functions
REWARDS = {
    "aesthetic": "aesthetic:AestheticScore",
    "clip_score": "clip_score:ClipScore",
    "hps_v2": "hps_v2:HpsV2",
    "hps_v2.1": "hps_v2:HpsV21",
    "jpeg_compressibility": "jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "jpeg:jpeg_incompressibility",
    "pickscore": "pickscore:PickScore",
}


def load(spec: str) -> Callable[..., Any]:
    """A reward function by its name, or the user's 'module:function'. Raises `ValueError` if there is none."""
    if spec in REWARDS:
        module, _, function = REWARDS[spec].partition(":")
        return getattr(importlib.import_module(f"ddpo_fast.rewards.{module}"), function)
    if ":" not in spec:
        raise ValueError(f"reward is {spec!r}, which is neither 'module:function' nor one of {', '.join(REWARDS)}")
    return load_function("reward", spec)
