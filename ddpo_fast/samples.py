"""Images while a run trains: of fixed prompts and noise, and the best and worst of an epoch's own.

Shapes: B images of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpo_fast import rewards
from ddpo_fast.config import DDPOConfig
from ddpo_fast.evaluation import Batch, drawn_batches, fixed_prompts
from ddpo_fast.policy import Policy
from ddpo_fast.processes import run_or_raise_on_all
from ddpo_fast.prompts import PromptFunction
from ddpo_fast.random_state import unchanged_random_state
from ddpo_fast.rewards.pixels import as_uint8
from ddpo_fast.run_folder.sample_files import Sample, as_jpeg

# images of an epoch that are kept because they are the best, and as many because they are the worst
EXTREMES = 4


class Drawn(NamedTuple):
    """Images of the fixed prompts, [B, 3, height, width] in [0, 1] on the CPU, and the same as they are kept."""

    images: torch.Tensor
    samples: list[Sample]


class Samples:
    """Images of `sample_num_images` prompts, which are drawn once; every process calls its methods.

    All processes draw all images, as a network whose weights they share needs all of them. The main process scores.
    Image i has the noise of the seed `seed + i` in every epoch, and of a run that was resumed with other batch sizes.
    """

    def __init__(
        self,
        config: DDPOConfig,
        accelerator: Accelerator,
        policy: Policy,
        reward_function: rewards.RewardFunction,
        prompt_function: PromptFunction,
    ) -> None:
        self.config, self.accelerator, self.policy = config, accelerator, policy
        self.reward_function = reward_function
        self.prompts, self.metadata = fixed_prompts(config.seed, accelerator, prompt_function, config.sample_num_images)
        # the whole epochs of the last images
        self.drawn_after = -1
        self._best: list[Sample] = []
        self._worst: list[Sample] = []

    def is_due(self, epochs: int) -> bool:
        """Whether images are drawn after so many epochs; they also are when training ends."""
        return epochs % self.config.sample_freq == 0

    @torch.no_grad()
    def draw(self) -> Drawn:
        """Draws the images with the weights that the run samples with, and scores them.

        Without a trace in the run: the random generators are restored, and the reward's own state is. Raises what
        `rewards.score` raises, in all processes. Only the main process has `samples`.
        """
        with unchanged_random_state():
            with self.policy.sampling():
                batches = drawn_batches(self.policy, self.prompts, self.metadata, own_seeds=True)
            samples = run_or_raise_on_all(self.accelerator, lambda: self._scored(batches))
        return Drawn(torch.cat([images.cpu() for images, _, _ in batches]), samples)

    def _scored(self, batches: list[Batch]) -> list[Sample]:
        """The batches' images with their scores in the main process; nothing in the others."""
        if not self.accelerator.is_main_process:
            return []
        found = []
        with _same_state(self.reward_function):
            for images, prompts, metadata in batches:
                # as many rewards change what they are told, they get a copy
                scores, info = rewards.score(self.reward_function, images, prompts, _copied(metadata))
                found += kept(images, prompts, scores, info, range(len(prompts)))
        return found

    # the best and worst images of training

    def note_extremes(self, scored: Sequence[Sequence[Any]]) -> None:
        """Keeps this process's best and worst images of an epoch, for the case that they are written.

        Args:
            scored: batches `[images, prompts, metadata, rewards, reward metadata]`.
        """
        if not all(isinstance(batch[0], torch.Tensor) for batch in scored):
            return
        all_rewards = torch.cat([batch[3] for batch in scored]).cpu()
        count = max(1, min(EXTREMES, len(all_rewards) // 2))
        order = torch.argsort(all_rewards, stable=True).tolist()
        self._worst, self._best = _of_batches(scored, order[:count]), _of_batches(scored, order[::-1][:count])

    def extremes(self) -> tuple[list[Sample], list[Sample]]:
        """The best and the worst images of the last epoch of all processes, the most extreme first."""
        found = [self._best], [self._worst]
        if self.accelerator.num_processes > 1:
            found = gather_object([self._best]), gather_object([self._worst])
        best = sorted((one for part in found[0] for one in part), key=lambda one: -one.reward)
        worst = sorted((one for part in found[1] for one in part), key=lambda one: one.reward)
        return best[:EXTREMES], worst[:EXTREMES]


def kept(
    images: torch.Tensor, prompts: Sequence[str], scores: torch.Tensor, info: Any, at: Sequence[int]
) -> list[Sample]:
    """The images [B, 3, H, W] with the indices `at` as they are kept, with their scores [B].

    Args:
        info: what the reward function returned beside the scores; of several rewards it has the components.
    """
    components = info.get("components", {}) if isinstance(info, dict) else {}
    components = components if isinstance(components, dict) else {}
    by_name = {name: part for name, part in components.items() if isinstance(part, torch.Tensor)}
    pixels = as_uint8(images[list(at)])
    return [
        Sample(as_jpeg(one), prompts[i], float(scores[i]), {name: float(part[i]) for name, part in by_name.items()})
        for one, i in zip(pixels, at, strict=True)
    ]


def _of_batches(scored: Sequence[Sequence[Any]], numbers: Sequence[int]) -> list[Sample]:
    """The images of these numbers, counted over all batches."""
    places = [(batch, i) for batch in scored for i in range(len(batch[1]))]
    found = []
    for batch, i in (places[number] for number in numbers):
        images, prompts, _, scores, info = batch
        found += kept(images, prompts, scores, info, [i])
    return found


def _copied(metadata: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        return copy.deepcopy(metadata)
    # of something that cannot be copied, a file for instance
    except Exception:
        return metadata


@contextmanager
def _same_state(function: Any) -> Iterator[None]:
    """A context after which an object that checkpoints keep the state of has the state from before it.

    A network's state is its weights, which scoring leaves alone.
    """
    has_state = hasattr(function, "state_dict") and hasattr(function, "load_state_dict")
    if not has_state or isinstance(function, torch.nn.Module):
        yield
        return
    state = copy.deepcopy(function.state_dict())
    try:
        yield
    finally:
        function.load_state_dict(state)
