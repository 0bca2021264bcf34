"""Turns rewards into advantages: how far each reward is from those that it is compared with, in units of their spread.

A reward is compared with all rewards of the epoch, with the last rewards of its prompt (`PerPromptStatTracker`), or
with its group, the images of one drawn prompt (`group_advantages`). In each comparison the distance of a reward r from
the rewards `others`, among which it is, is one of three (`train_advantages`):

    std     (r - mean) / (std + epsilon), as in TRL and in GRPO (arXiv 2402.03300, section 4.1.1)
    robust  (r - median) / (1.4826 MAD + epsilon), MAD = median|others - median|: outliers do not shrink the others'
    rank    Phi^-1((rank - 1/2) / n): only the order of the rewards counts

1.4826 times the median absolute deviation is the standard deviation of a normal distribution (Rousseeuw and
Croux, 1993); where more than half of the rewards are equal it is 0, and the standard deviation takes its place. The
quantiles of the normal distribution Phi are taken at Hazen's plotting positions, (rank - 1/2) / n; equal rewards share
the average of their ranks. Rewards that are all equal have advantages of 0.

Shapes: B images of all processes, S denoising steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ddpo_fast.by_size import BySize

# TRL's constants, of the epoch's comparison and of a prompt's
EPSILON, EPSILON_OF_PROMPT = 1e-8, 1e-6
NORMAL_STD_OVER_MAD = 1.4826


def distances(rewards: np.ndarray, others: np.ndarray, kind: str = "std", epsilon: float = EPSILON) -> np.ndarray:
    """How far `rewards` [n] are from `others` [m], in the unit that `kind` names (see the top of this module)."""
    if kind == "std":
        return (rewards - others.mean()) / (others.std() + epsilon)
    wide, wide_others = rewards.astype(np.float64), others.astype(np.float64)
    found = _ranks(wide, wide_others) if kind == "rank" else _robust(wide, wide_others, epsilon)
    return found.astype(rewards.dtype)


def _robust(rewards: np.ndarray, others: np.ndarray, epsilon: float) -> np.ndarray:
    middle = np.median(others)
    spread = NORMAL_STD_OVER_MAD * np.median(np.abs(others - middle))
    return (rewards - middle) / ((spread if spread > 0 else others.std()) + epsilon)


def _ranks(rewards: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Normal quantiles of the average ranks of `rewards` among `others`."""
    ordered, count = np.sort(others), len(others)
    below, not_above = (np.searchsorted(ordered, rewards, side) for side in ("left", "right"))
    # (average rank - 1/2) / n, as the ranks of equal rewards are below + 1, ..., not_above
    share = (below + not_above) / (2 * count)
    # a reward that a short memory has dropped may be beyond all of the others
    share = share.clip(0.5 / count, 1 - 0.5 / count)
    return torch.special.ndtri(torch.from_numpy(share)).numpy()


def batch_advantages(rewards: np.ndarray, kind: str = "std") -> np.ndarray:
    """Advantages among all rewards [B]; for 'std' with the population's std (divided by B), as in TRL."""
    return distances(rewards, rewards, kind)


def group_advantages(rewards: np.ndarray, size: int, kind: str = "std") -> np.ndarray:
    """Advantages [B] within groups of `size` consecutive rewards; exactly 0 in a group whose rewards are equal.

    GRPO's (arXiv 2402.03300): the std of a group of few images is taken as it is, without shrinkage.
    """
    groups = rewards.reshape(-1, size)
    found = np.stack([distances(group, group, kind) for group in groups])
    # not left to the formula: the mean of equal numbers may be rounded to another number
    found[np.ptp(groups, axis=1) == 0] = 0
    return found.reshape(-1)


class PerPromptStatTracker:
    """Compares a prompt's rewards with its last ones (arXiv 2305.13301, appendix D.4).

    Args:
        buffer_size: rewards to remember for each prompt.
        min_count: rewards that a prompt needs before its own statistics replace the batch's.
        kind: the unit of advantages, `train_advantages`.
    """

    def __init__(self, buffer_size: int, min_count: int, kind: str = "std") -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.kind = kind
        self._by_size: BySize[dict[str, deque[float]]] = BySize(dict)

    @property
    def stats(self) -> dict[str, deque[float]]:
        """The remembered rewards of each prompt, of images of the present size."""
        return self._by_size.now

    def use_size(self, size: str) -> None:
        """Compares with rewards of images of this size from here on; see `BySize`."""
        self._by_size.use(size)

    def update(self, prompts: Sequence[str], rewards: Any) -> np.ndarray:
        """Remembers `rewards` [B] of `prompts` and returns their advantages [B]."""
        rewards = np.asarray(rewards, dtype=np.float32)
        names = np.asarray(prompts, dtype=object)
        advantages = np.empty_like(rewards)
        for prompt in dict.fromkeys(prompts):
            mine = names == prompt
            seen = self.stats.setdefault(prompt, deque(maxlen=self.buffer_size))
            seen.extend(rewards[mine])
            others = rewards if len(seen) < self.min_count else np.array(seen, dtype=np.float32)
            advantages[mine] = distances(rewards[mine], others, self.kind, EPSILON_OF_PROMPT)
        return advantages

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """The mean, std and count of each prompt's remembered rewards."""
        arrays = {prompt: np.array(seen, dtype=np.float32) for prompt, seen in self.stats.items()}
        return {prompt: {"mean": a.mean(), "std": a.std(), "count": len(a)} for prompt, a in arrays.items()}

    def state_dict(self) -> dict[str, Any]:
        """Each prompt's rewards as Python's strings and floats, also of NumPy's strings, as a checkpoint keeps them."""
        return self._by_size.packed(
            lambda stats: {str.__str__(prompt): [float(reward) for reward in seen] for prompt, seen in stats.items()}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._by_size.unpack(
            state, lambda packed: {prompt: deque(seen, maxlen=self.buffer_size) for prompt, seen in packed.items()}
        )


def step_advantages(advantages: np.ndarray, credit: np.ndarray, sets: Sequence[np.ndarray], steps: int) -> np.ndarray:
    """Advantages of denoising steps [B, T] from those of images [B] and each step's `credit` [B, T].

    The products are standardised over the images and the trained steps of each set of images that are compared: as the
    credit differs from step to step, the advantages of a set would else be of another size than without it.

    Args:
        sets: which images belong to each set, [B] bool each.
        steps: how many of the T steps, the first ones, are trained.
    """
    shared = advantages[:, None].astype(np.float64) * credit
    found = np.zeros_like(shared)
    for mine in sets:
        trained = shared[mine, :steps]
        # equal products, as of images whose advantages are all 0, stay 0
        if trained.size and np.ptp(trained) > 0:
            found[mine] = (shared[mine] - trained.mean()) / (trained.std() + EPSILON)
    return found.astype(np.float32)


def strongest(advantages: np.ndarray, share: float, steps: range) -> np.ndarray:
    """The advantages of images [B], or of their steps [B, T], with 0 in place of all but the largest by amount.

    An update's gradient is the sum of A s over pairs, where s is the gradient of a pair's log-prob. The mean of s over
    pairs with the same A is proportional to A where both are normally distributed. So what a pair says of the direction
    grows with A^2, as does the variance that it adds. The half of the pairs with the largest |A| have 93 % of the sum
    of A^2 of a normal distribution, and more of one with heavier tails, and take half of the time.

    Args:
        share: of the images, or of the pairs of an image and one of the trained `steps`, that keep theirs, above 0.
        steps: the steps of the T that are trained; the others keep what they have.
    """
    if share >= 1:
        return advantages
    found = advantages.copy()
    # a view, through which the rest is set to 0
    trained = found if found.ndim == 1 else found[:, steps.start : steps.stop]
    sizes = np.abs(trained)
    left_out = sizes.size - max(1, round(share * sizes.size))
    trained[sizes < np.partition(sizes, left_out, axis=None)[left_out]] = 0
    return found


def compared_sets(prompts: Sequence[str], group_size: int, min_count: int | None) -> list[np.ndarray]:
    """The sets of images that are compared with each other, [B] bool each: groups, prompts, or all images.

    Args:
        prompts: of all images, B.
        min_count: images that a prompt needs to be a set of its own, the others being one set together; None without
            per-prompt statistics.
    """
    count, numbers = len(prompts), np.arange(len(prompts))
    if group_size > 1:
        return [numbers // group_size == group for group in range(count // group_size)]
    if min_count is None:
        return [np.ones(count, dtype=bool)]
    names = np.asarray(prompts, dtype=object)
    own = [mine for prompt in dict.fromkeys(prompts) if (mine := names == prompt).sum() >= min_count]
    rest = ~np.any(own, axis=0) if own else np.ones(count, dtype=bool)
    return [*own, rest] if rest.any() else own
