"""Images of fixed prompts and noise, which rewards that are not trained on score in the course of a run.

Shapes: N images.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddpo_fast import rewards
from ddpo_fast.config import DDPOConfig
from ddpo_fast.health import check_images
from ddpo_fast.policy import Policy
from ddpo_fast.processes import broadcast_from_main, run_or_raise_on_all
from ddpo_fast.prompts import PromptFunction, draw_prompts
from ddpo_fast.random_state import unchanged_random_state

# images [B, 3, H, W] with their prompts and metadata
Batch = tuple[torch.Tensor, tuple[str, ...], tuple[Any, ...]]


class Evaluation:
    """Scores images of `eval_num_images` prompts, which are drawn once; every process calls its methods.

    All processes draw all images, as a network whose weights they share needs all of them. The main process scores.

    Args:
        reward_function: each of its parts is logged by its name; the weights play a role in `mean_of` alone.
    """

    def __init__(
        self,
        config: DDPOConfig,
        accelerator: Accelerator,
        policy: Policy,
        reward_function: rewards.SeveralRewards,
        prompt_function: PromptFunction,
    ) -> None:
        self.config, self.accelerator, self.policy = config, accelerator, policy
        self.reward_function = reward_function
        self.prompts, self.metadata = fixed_prompts(config.seed, accelerator, prompt_function, config.eval_num_images)

    def is_due(self, epochs: int) -> bool:
        """Whether images are scored after so many epochs."""
        return epochs % self.config.eval_freq == 0

    @torch.no_grad()
    def scores(self) -> dict[str, np.ndarray]:
        """The scores [N] by each reward's name, the same on every process.

        The random generators are restored afterwards. Raises what `rewards.score` raises.
        """
        with unchanged_random_state():
            batches = drawn_batches(self.policy, self.prompts, self.metadata)
            found = run_or_raise_on_all(self.accelerator, lambda: self._scored(batches))
        return broadcast_from_main(self.accelerator, found)

    def mean_of(self, scores: Mapping[str, np.ndarray]) -> float:
        """One number for `scores`: the mean over images of the rewards' weighted sum."""
        return float(sum(self.reward_function.weights[name] * values.mean() for name, values in scores.items()))

    def _scored(self, batches: list[Batch]) -> dict[str, np.ndarray]:
        """The scores of the batches in the main process; nothing in the others."""
        if not self.accelerator.is_main_process:
            return {}
        found: dict[str, list[np.ndarray]] = {}
        for images, prompts, metadata in batches:
            _, info = rewards.score(self.reward_function, images, prompts, metadata)
            for name, part in info["components"].items():
                found.setdefault(name, []).append(part.numpy())
        return {name: np.concatenate(parts) for name, parts in found.items()}


def drawn_batches(
    policy: Policy, prompts: tuple[str, ...], metadata: tuple[Any, ...], own_seeds: bool = False
) -> list[Batch]:
    """Images of the prompts in batches of `sample_batch_size`, from noise that the run's seed fixes.

    Args:
        own_seeds: gives each image a seed of its own, so that its noise does not depend on the batch's size.

    Raises what `check_images` raises.
    """
    size, batches = policy.config.sample_batch_size, []
    for start in range(0, len(prompts), size):
        some, seed = prompts[start : start + size], policy.config.seed + start
        images, latents = policy.draw(some, [seed + i for i in range(len(some))] if own_seeds else seed)
        check_images(images, some, latents)
        batches.append((images, some, metadata[start : start + size]))
    return batches


def fixed_prompts(
    seed: int, accelerator: Accelerator, prompt_function: PromptFunction, count: int
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """`count` prompts with their metadata, the same in all processes and in a resumed run.

    They are drawn from the run's `seed`, and the random generators are restored. An object's own state stays as it was:
    a copy of it draws. Only a function that keeps a state elsewhere, an iterator for instance, goes on.
    """
    with unchanged_random_state():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            own = copy.deepcopy(prompt_function)
        # of an object with a lock, a file or a connection
        except Exception:
            own = prompt_function
        drawn = distinct_prompts(own, count)
    # fewer distinct ones are repeated, each time with other noise
    pairs = list(islice(cycle(zip(*drawn, strict=True)), count))
    prompts, metadata = zip(*broadcast_from_main(accelerator, pairs), strict=True)
    return prompts, metadata


def distinct_prompts(prompt_function: PromptFunction, count: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Up to `count` different prompts with their metadata: the first of 8 times as many draws, in the order drawn."""
    # A dict keeps a key's first position but its last value. Built in reverse order of the draws, it has each prompt's
    # first metadata; the order is then reversed back.
    drawn = dict(reversed(list(zip(*draw_prompts(prompt_function, 8 * count), strict=True))))
    chosen = list(reversed(drawn.items()))[:count]
    prompts, metadata = zip(*chosen, strict=True)
    return prompts, metadata
