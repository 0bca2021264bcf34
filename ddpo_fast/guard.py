"""Watches an epoch's rewards and images: goes back when the reward falls or images become alike, and steps less there.

A bounded update cannot run away, but many of them can wander: where the gradient is mostly noise, each moves the policy
as far as a good one would. The mean reward of an epoch's images shows it, at no cost, once the differences between
prompts are taken out (prompt_levels.py). It is noisy, so two epochs are averaged, and a fall counts if it is larger
than a fifth of what was gained, and than 2.5 times the standard error of plain means.

Where images that are all alike score best, the reward does not fall. So their variety is watched as well: the step
shrinks as it is lost, and where an epoch has lost most of it the weights go back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.by_size import BySize
from ddpo_fast.engine import Engine
from ddpo_fast.prompt_levels import PromptLevels
from ddpo_fast.warning_limits import LEAST_VARIETY

logger = logging.getLogger(__name__)

# Two epochs are averaged: one alone, of 32 images, is often a standard error away from its expected reward.
AVERAGED_EPOCHS = 2
# A fall is at least this share of the reward gained since the start, and as many standard errors of the difference.
SHARE_OF_GAIN = 0.2
STANDARD_ERRORS = 2.5
# What the target of a bounded update (and the learning rate) is multiplied by at each return.
SHRINKS_BY = 0.5
# Below this share of the start's, the variety of images is being lost: the step shrinks, and again for each further
# tenth that is lost, so that it comes to rest before a third: 0.9^5 of 0.6 is 0.35, after five halvings.
VARIETY_TO_KEEP = 0.6
FURTHER_LOSS = 0.9
# For lost variety the step shrinks no further than this: a run whose images are all alike must be able to leave them.
LEAST_STEP = 1 / 64


@dataclass
class Watched:
    """What is remembered of the images of one size."""

    levels: PromptLevels = field(default_factory=PromptLevels)
    # numbers of epochs in `levels`: the last ones, the first ones, and those with the best rewards
    recent: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    # those of the best epoch
    weights: list[Tensor] = field(default_factory=list)
    # the image spreads of the first epochs, and the one at which the step shrinks next
    first_spreads: list[float] = field(default_factory=list)
    least_spread: float = 0.0

    @property
    def first_spread(self) -> float:
        return sum(self.first_spreads) / len(self.first_spreads)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "levels": self.levels.state_dict()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Watched:
        levels = PromptLevels()
        levels.load_state_dict(state["levels"])
        lists = {name: list(state[name]) for name in ("recent", "first", "best", "weights", "first_spreads")}
        return cls(levels, **lists, least_spread=state["least_spread"])


class Guard:
    """Keeps the trained weights of the epoch with the best mean reward, in host memory, and the variety to be kept.

    Where a run has images of several sizes, epochs are compared within a size, and each size has best weights.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, engine: Engine, parameters: Sequence[Tensor]) -> None:
        self.engine = engine
        self.parameters = list(parameters)
        self.returns = 0
        self._by_size: BySize[Watched] = BySize(Watched)
        # whether the weights may differ from those that were kept
        self._has_trained = False

    def use_size(self, size: str) -> None:
        """Compares with epochs of images of this size from here on; see `BySize`."""
        self._by_size.use(size)

    def watch(self, rewards: Tensor, prompts: Sequence[str], image_spread: Tensor | None = None) -> bool:
        """Looks at an epoch's rewards [images] of all processes; returns whether the weights went back to the best.

        The weights must be those that the images were sampled with. Every process must call it, outside of
        `engine.computing`.

        Args:
            prompts: of the rewards' images.
            image_spread: [], how much the images of a prompt differ (variety.py); None where that is not known.
        """
        now = self._by_size.now
        if image_spread is not None and self._is_lost(image_spread.item()):
            spreads = f"{image_spread.item():.3f}, and by {now.first_spread:.3f} at the start"
            self._return(f"the images of a prompt differ by {spreads}")
            return True
        self._has_trained = True
        self._watch_variety(image_spread)
        number = now.levels.add(prompts, rewards.double().cpu().numpy(), [*now.first, *now.best])
        now.recent = [*now.recent, number][-AVERAGED_EPOCHS:]
        if len(now.recent) < AVERAGED_EPOCHS:
            return False
        now.first = now.first or now.recent
        fitted = now.levels.fit()
        level = fitted.level(now.recent)
        if not now.best or level > fitted.level(now.best):
            now.best = now.recent
            self._keep()
            return False
        best = fitted.level(now.best)
        gain = best - fitted.level(now.first)
        if best - level <= max(SHARE_OF_GAIN * gain, STANDARD_ERRORS * fitted.error(now.best, now.recent)):
            return False
        self._return(f"the mean reward of two epochs fell from {best:.3f} to {level:.3f}")
        return True

    def _is_lost(self, spread: float) -> bool:
        """Whether the variety of images is lost, by updates since the weights were kept: two can make images blank."""
        now = self._by_size.now
        return bool(now.weights) and self._has_trained and spread < LEAST_VARIETY * now.first_spread

    def _watch_variety(self, image_spread: Tensor | None) -> None:
        if image_spread is None:
            return
        spread, now = image_spread.item(), self._by_size.now
        if len(now.first_spreads) < AVERAGED_EPOCHS:
            now.first_spreads.append(spread)
            now.least_spread = VARIETY_TO_KEEP * now.first_spread
        while spread < now.least_spread and self.engine.rate.shrunk > LEAST_STEP:
            # of all sizes, as images of all of them lose their variety together, and the step is one
            for watched in self._by_size.all:
                watched.least_spread *= FURTHER_LOSS
            self.engine.rate.shrink(SHRINKS_BY)

    def _keep(self) -> None:
        with self.engine.exact(write=True):
            self._by_size.now.weights = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @torch.no_grad()
    def _return(self, why: str) -> None:
        best = self._by_size.now.weights
        with self.engine.exact(write=True):
            for parameter, kept in zip(self.parameters, best, strict=True):
                parameter.copy_(kept)
        self.engine.forget_direction()
        self.engine.rate.shrink(SHRINKS_BY)
        self.returns += 1
        logger.warning("%s: training goes on from the best weights, with half the step", why)
        # The largest of many noisy means is likely too large. The next epochs measure the same weights again. What
        # epochs of other sizes had come to is given up as well.
        for watched in self._by_size.all:
            watched.recent, watched.best = [], []
            watched.weights = best if watched.weights else []
        self._has_trained = False

    def state_dict(self) -> dict[str, Any]:
        watched = self._by_size.packed(Watched.state_dict)
        return {**watched, "returns": self.returns, "has_trained": self._has_trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._by_size.unpack(state, Watched.of_state)
        self.returns, self._has_trained = state["returns"], state.get("has_trained", True)
