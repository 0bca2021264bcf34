"""Random generators around a user's reward: what it does to torch's must not change what is sampled next."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


class RewardRandom:
    """Gives torch's generators back as they were before an epoch's rewards: one that calls `torch.manual_seed` would
    have every epoch sample from the same noise. Python's and NumPy's are left to prompts and rewards."""

    def __init__(self) -> None:
        self._torch: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._others_before: Any = None
        self._others_after: Any = None
        self._warned = False

    def begin(self) -> None:
        """Before the first reward of an epoch, when all that samples has been drawn; later calls do nothing."""
        if self._torch is None:
            on_device = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
            self._torch = torch.get_rng_state(), on_device
            self._others_before = _others()

    def end(self) -> None:
        """After an epoch's rewards, or what was made of them."""
        if self._torch is None:
            return
        on_host, on_device = self._torch
        torch.set_rng_state(on_host)
        for state in on_device:
            torch.cuda.set_rng_state(state)
        self._torch = None
        after = _others()
        if after == self._others_after != self._others_before and not self._warned:
            self._warned = True
            logger.warning(
                "the reward function seeds Python's or NumPy's random generator, so that prompts drawn with it repeat "
                "every epoch: give the reward a generator of its own (random.Random, numpy.random.default_rng)"
            )
        self._others_after = after


def _others() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest)
