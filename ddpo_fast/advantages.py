"""Turns rewards into advantages: distances from the mean of the epoch, or of the prompt, in standard deviations."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np


def batch_advantages(rewards: np.ndarray) -> np.ndarray:
    """`(r - mean) / (std + 1e-8)` over all rewards [B], with the population's std (divided by B), as in TRL."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


class PerPromptStatTracker:
    """Mean and std of each prompt's last rewards (arXiv 2305.13301, appendix D.4).

    Args:
        buffer_size: rewards to remember for each prompt.
        min_count: rewards that a prompt needs before its own statistics replace the batch's.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.stats: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Any) -> np.ndarray:
        """Remembers `rewards` [B] of `prompts` and returns their advantages [B]."""
        rewards = np.asarray(rewards, dtype=np.float32)
        names = np.asarray(prompts, dtype=object)
        advantages = np.empty_like(rewards)
        for prompt in dict.fromkeys(prompts):
            mine = names == prompt
            seen = self.stats.setdefault(prompt, deque(maxlen=self.buffer_size))
            seen.extend(rewards[mine])
            reference = rewards if len(seen) < self.min_count else np.array(seen, dtype=np.float32)
            # TRL's constant here, which differs from the one of `batch_advantages`
            advantages[mine] = (rewards[mine] - reference.mean()) / (reference.std() + 1e-6)
        return advantages

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """The mean, std and count of each prompt's remembered rewards."""
        arrays = {prompt: np.array(seen, dtype=np.float32) for prompt, seen in self.stats.items()}
        return {prompt: {"mean": a.mean(), "std": a.std(), "count": len(a)} for prompt, a in arrays.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """Each prompt's rewards as Python's strings and floats, also of NumPy's strings, as a checkpoint keeps them."""
        return {str.__str__(prompt): [float(reward) for reward in seen] for prompt, seen in self.stats.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.stats = {prompt: deque(seen, maxlen=self.buffer_size) for prompt, seen in state.items()}
