"""The part of the trainer that draws images of fixed prompts and noise: to show them, and to evaluate the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddpo_fast import rewards
from ddpo_fast.evaluation import Evaluation
from ddpo_fast.health import check_images
from ddpo_fast.policy import Policy
from ddpo_fast.random_state import unchanged_random_state
from ddpo_fast.run_folder import pictures, sample_files
from ddpo_fast.run_folder.progress import Progress
from ddpo_fast.run_folder.run_log import RunLog
from ddpo_fast.samples import Samples


class FixedImagesMixin:
    """The methods of `DDPOTrainer` whose images are not trained on, and which leave no trace in the training."""

    accelerator: Accelerator
    evaluation: Evaluation | None
    output_dir: Path
    policy: Policy
    progress: Progress
    reward_fn: rewards.RewardFunction
    run_log: RunLog
    samples: Samples | None

    def _draw_fixed_images(self, epochs: int, global_step: int) -> None:
        """Draws what is due after `epochs` whole epochs: images to look at, and those of the held-out reward."""
        if self.samples is not None and self.samples.is_due(epochs):
            self._draw_samples(epochs, global_step)
        if self.evaluation is not None and self.evaluation.is_due(epochs):
            scores = self.evaluation.scores()
            self.run_log.log_evaluation(epochs, global_step, scores)
            self.progress.scores.add(epochs, self.evaluation.mean_of(scores))

    def _draw_last_samples(self) -> None:
        """Draws the images of a run's end, if that is no epoch at which they are drawn anyway."""
        epochs, samples = self.progress.epochs, self.samples
        if samples is not None and self.progress.has_trained and samples.drawn_after != epochs:
            self._draw_samples(epochs, self.progress.global_step)

    def _draw_samples(self, epochs: int, global_step: int) -> None:
        assert self.samples is not None, "sample_freq is 0"
        drawn, extremes = self.samples.draw(), self.samples.extremes()
        if self.accelerator.is_main_process:
            # as for every picture, a run does not fail because of it
            pictures.attempt(sample_files.write, self.output_dir, epochs, drawn.samples, *extremes)
            scores = [sample.reward for sample in drawn.samples]
            self.run_log.show_images(epochs, global_step, self.samples.prompts, drawn.images, scores)
        self.samples.drawn_after = epochs

    def _note_extremes(self, scored: Sequence[Sequence[Any]]) -> None:
        if self.samples is not None:
            self.samples.note_extremes(scored)

    @torch.no_grad()
    def evaluate(
        self, prompts: tuple[str, ...], metadata: tuple[Any, ...], seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws and scores one image per prompt from noise that `seed` fixes: (images [B, 3, H, W], rewards [B]).

        The random generators are restored afterwards, so that training draws the same as without this call.
        """
        with unchanged_random_state():
            images, latents = self.policy.draw(prompts, seed)
            check_images(images, prompts, latents)
            scores, _ = rewards.score(self.reward_fn, images, prompts, metadata)
        return images.cpu(), scores.cpu()
