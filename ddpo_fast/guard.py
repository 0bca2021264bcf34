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
from typing import Any

import torch
from torch import Tensor

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


class Guard:
    """Keeps the trained weights of the epoch with the best mean reward, in host memory, and the variety to be kept.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, engine: Engine, parameters: Sequence[Tensor]) -> None:
        self.engine = engine
        self.parameters = list(parameters)
        # the rewards, and the numbers in it of the last epochs, of the first ones, and of those with the best rewards
        self.levels = PromptLevels()
        self._recent: list[int] = []
        self._first: list[int] = []
        self._best: list[int] = []
        self._weights: list[Tensor] = []
        self.returns = 0
        # the image spreads of the first epochs, and the one at which the step shrinks next
        self._first_spreads: list[float] = []
        self._least_spread = 0.0
        # whether the weights may differ from those that were kept
        self._has_trained = False

    def watch(self, rewards: Tensor, prompts: Sequence[str], image_spread: Tensor | None = None) -> bool:
        """Looks at an epoch's rewards [images] of all processes; returns whether the weights went back to the best.

        The weights must be those that the images were sampled with. Every process must call it, outside of
        `engine.computing`.

        Args:
            prompts: of the rewards' images.
            image_spread: [], how much the images of a prompt differ (variety.py); None where that is not known.
        """
        if image_spread is not None and self._is_lost(image_spread.item()):
            spreads = f"{image_spread.item():.3f}, and by {self._first_spread:.3f} at the start"
            self._return(f"the images of a prompt differ by {spreads}")
            return True
        self._has_trained = True
        self._watch_variety(image_spread)
        number = self.levels.add(prompts, rewards.double().cpu().numpy(), [*self._first, *self._best])
        self._recent = [*self._recent, number][-AVERAGED_EPOCHS:]
        if len(self._recent) < AVERAGED_EPOCHS:
            return False
        self._first = self._first or self._recent
        fitted = self.levels.fit()
        level = fitted.level(self._recent)
        if not self._best or level > fitted.level(self._best):
            self._best = self._recent
            self._keep()
            return False
        best = fitted.level(self._best)
        gain = best - fitted.level(self._first)
        if best - level <= max(SHARE_OF_GAIN * gain, STANDARD_ERRORS * fitted.error(self._best, self._recent)):
            return False
        self._return(f"the mean reward of two epochs fell from {best:.3f} to {level:.3f}")
        return True

    def _is_lost(self, spread: float) -> bool:
        """Whether the variety of images is lost, by updates since the weights were kept: two can make images blank."""
        return bool(self._weights) and self._has_trained and spread < LEAST_VARIETY * self._first_spread

    @property
    def _first_spread(self) -> float:
        return sum(self._first_spreads) / len(self._first_spreads)

    def _watch_variety(self, image_spread: Tensor | None) -> None:
        if image_spread is None:
            return
        spread = image_spread.item()
        if len(self._first_spreads) < AVERAGED_EPOCHS:
            self._first_spreads.append(spread)
            self._least_spread = VARIETY_TO_KEEP * self._first_spread
        while spread < self._least_spread and self.engine.rate.shrunk > LEAST_STEP:
            self._least_spread *= FURTHER_LOSS
            self.engine.rate.shrink(SHRINKS_BY)

    def _keep(self) -> None:
        with self.engine.exact(write=True):
            self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @torch.no_grad()
    def _return(self, why: str) -> None:
        with self.engine.exact(write=True):
            for parameter, kept in zip(self.parameters, self._weights, strict=True):
                parameter.copy_(kept)
        self.engine.forget_direction()
        self.engine.rate.shrink(SHRINKS_BY)
        self.returns += 1
        logger.warning("%s: training goes on from the best weights, with half the step", why)
        # The largest of many noisy means is likely too large. The next epochs measure the same weights again.
        self._recent, self._best = [], []
        self._has_trained = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "levels": self.levels.state_dict(),
            "recent": self._recent,
            "first": self._first,
            "best": self._best,
            "weights": self._weights,
            "returns": self.returns,
            "first_spreads": self._first_spreads,
            "least_spread": self._least_spread,
            "has_trained": self._has_trained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.levels.load_state_dict(state["levels"])
        self._recent, self._first, self._best = list(state["recent"]), list(state["first"]), list(state["best"])
        self.returns = state["returns"]
        self._weights = list(state["weights"])
        self._first_spreads, self._least_spread = list(state["first_spreads"]), state["least_spread"]
        self._has_trained = state.get("has_trained", True)
