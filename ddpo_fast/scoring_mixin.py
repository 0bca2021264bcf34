"""The part of the trainer that samples images, scores them and compares their rewards: an epoch's first two stages.

Shapes: B images of an epoch on a process, T denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ddpo_fast import rewards, rwr, variety
from ddpo_fast.advantages import batch_advantages, compared_sets, group_advantages, step_advantages, strongest
from ddpo_fast.config import DDPOConfig
from ddpo_fast.groups import ScoredImages
from ddpo_fast.health import SampleHealth
from ddpo_fast.metrics import EpochTimer
from ddpo_fast.processes import all_reduce_max, run_or_raise_on_all
from ddpo_fast.rollout import PipelineRollout, Rollout
from ddpo_fast.run_folder.notebook import hides_bar
from ddpo_fast.step_values import StepValues
from ddpo_fast.trajectory import Trajectory

# The share of its time that sampling takes longer in a thread of its own, on a CPU whose operators have two threads.
SLOWER_BESIDE = 0.5


class ScoringMixin:
    """The methods of `DDPOTrainer` from prompts to advantages; `_generate_samples` and `compute_rewards` are TRL's."""

    accelerator: Accelerator
    config: DDPOConfig
    executor: Any
    interruption: Any
    policy: Any
    prompt_fn: Callable[..., Any]
    reward_fn: rewards.RewardFunction
    reward_random: rewards.RewardRandom
    rollout: Rollout | PipelineRollout
    sample_health: SampleHealth
    stat_tracker: Any
    step_values: StepValues
    # whether the last scoring that was not overlapped waited for longer than overlapping it would slow sampling
    _scoring_waits = False

    def _hides_bar(self, is_inner: bool = True) -> bool | None:
        """tqdm's `disable`: None means a bar on a terminal and none in a log file."""
        return hides_bar(is_inner) if self.accelerator.is_local_main_process else True

    # stage 1: sample and score

    def _sample_and_score(self, timer: EpochTimer) -> tuple[ScoredImages, int]:
        """An epoch's images of this process, and how many were scored for them.

        With `sample_redraws`, groups without spread are replaced by further ones. All processes sample the same number
        of these, as many as the one that lacks most.
        """
        config, size = self.config, self.config.sample_group_size
        found = self._sampled_and_scored(config.sample_num_batches_per_epoch, timer)
        self._weigh_components(found.batches, is_first=True)
        images = found.number
        for _ in range(config.sample_redraws):
            missing = all_reduce_max(self.accelerator, int((~found.has_spread(size)).sum()))
            if not missing:
                break
            # -(-a // b) is a / b rounded up
            further = self._sampled_and_scored(-(-missing * size // config.sample_batch_size), timer)
            self._weigh_components(further.batches)
            images += further.number
            found = found.with_groups_of(further, size)
        return found, images

    def _sampled_and_scored(self, iterations: int, timer: EpochTimer) -> ScoredImages:
        """`iterations` batches; each is `[images, prompts, metadata, rewards, reward metadata]`."""
        sizes = iterations, self.config.sample_batch_size
        is_async, alone = self.config.async_reward_computation, self.accelerator.num_processes == 1
        try:
            if self._overlaps_rewards:
                # as in TRL, the reward function runs in the caller's thread unless worker threads are asked for
                executor = self.executor if is_async else None
                scoring = rewards.Scoring(self.reward_fn, executor, raises_early=alone)
                shown = {"desc": "Scoring", "unit": "batch", "position": 2, "leave": False, "dynamic_ncols": True}
                with tqdm(total=iterations, disable=self._hides_bar(), **shown) as scoring.bar:
                    samples, batches = self._generate_samples(*sizes, scoring, timer)
                    found = run_or_raise_on_all(self.accelerator, lambda: self._on_device(scoring.results(batches)))
            else:
                started = time.perf_counter()
                samples, batches = self._generate_samples(*sizes)
                timer.ends("sampling")
                sampled, computed = time.perf_counter(), time.process_time()
                self.reward_random.begin()
                found = run_or_raise_on_all(self.accelerator, lambda: self.compute_rewards(batches, is_async))
                waited = time.perf_counter() - sampled - (time.process_time() - computed)
                self._scoring_waits = waited > SLOWER_BESIDE * (sampled - started)
        except Exception:
            # if the reward function failed because the images are not finite, raise that cause instead
            self.sample_health.check()
            raise
        finally:
            self.reward_random.end()
        run_or_raise_on_all(self.accelerator, self.sample_health.check)
        self.interruption.check()
        # the old one would keep the trajectories, the largest tensors of an epoch, in memory
        self.sample_health = SampleHealth()
        for batch, *reward_and_metadata in zip(batches, *found, strict=True):
            batch.extend(reward_and_metadata)
        return ScoredImages(Trajectory.cat(samples), batches)

    def _generate_samples(
        self,
        iterations: int,
        batch_size: int,
        scoring: rewards.Scoring | None = None,
        timer: EpochTimer | None = None,
    ) -> tuple[list[Trajectory], list[list[Any]]]:
        """`iterations` batches of trajectories, and for each `[images, prompts, metadata]`.

        With `scoring`, each batch is scored once its images are complete, while another thread samples the next one;
        that thread also ends the `timer`'s sampling stage after the last batch.
        """
        self.policy.unet.eval()
        self.sample_health = SampleHealth()
        # prompts and noise are drawn here, in the thread that calls the trainer
        batches = self.rollout.batches(self.prompt_fn, iterations, batch_size)
        made: AbstractContextManager[Any] = nullcontext((batch, None) for batch in batches)
        if scoring is not None and timer is not None:
            assert isinstance(self.rollout, Rollout), "a thread can only sample what can be stopped between two steps"
            made = self.rollout.ahead(timer.at_end_of(batches, "sampling"))
        samples, prompt_image_pairs = [], []
        with made as batches_and_events:
            for (trajectory, images, metadata), ready in batches_and_events:
                self.sample_health.add(trajectory, images)
                samples.append(trajectory)
                prompt_image_pairs.append([images, trajectory.prompts, metadata])
                if scoring is not None:
                    self.reward_random.begin()
                    scoring.begin(prompt_image_pairs[-1], ready)
        return samples, prompt_image_pairs

    @property
    def _overlaps_rewards(self) -> bool:
        """Whether a batch is scored while the next is sampled: where it pays, and no user code overrides either.

        Sampling then has a thread of its own. On a CPU with several threads for each operator it has as many of them
        again. There are more than the processor has cores, so that those of OpenMP sleep between operators and have to
        be woken. That takes longer than a fast reward, so the first epoch finds out whether the reward is slow.
        """
        # by the class, as a profiler may wrap the methods of one trainer and must not change what it measures
        kind, ours = type(self), ScoringMixin
        is_ours = kind.compute_rewards is ours.compute_rewards and kind._generate_samples is ours._generate_samples
        pays = self.policy.device.type != "cpu" or torch.get_num_threads() == 1 or self._scoring_waits
        return self.config.reward_overlap and pays and is_ours and isinstance(self.rollout, Rollout)

    def compute_rewards(self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool = False) -> Any:
        """An iterator of two tuples: rewards [B] and metadata of each batch; in worker threads if `is_async`."""
        if is_async:
            return self._on_device(rewards.Scoring(self.reward_fn, self.executor).results(prompt_image_pairs))
        return self._on_device([rewards.score(self.reward_fn, *batch[:3]) for batch in prompt_image_pairs])

    def _on_device(self, scores: list[tuple[torch.Tensor, Any]]) -> Any:
        return zip(*[(reward.to(self.accelerator.device), metadata) for reward, metadata in scores], strict=True)

    def _weigh_components(self, batches: list[list[Any]], is_first: bool = False) -> None:
        """With several rewards, sets each image's reward to the sum of its components in units of their spread.

        The first images of an epoch are counted in the statistics. Further ones of the same epoch are not, so that all
        of its rewards can be compared.
        """
        if isinstance(self.reward_fn, rewards.SeveralRewards):
            if is_first:
                self.reward_fn.observe(self._gathered_components(batches))
            for batch in batches:
                batch[3] = self.reward_fn.weighted(batch[4]["components"]).to(self.accelerator.device)

    # stage 2: advantages

    def _gathered_components(self, batches: list[list[Any]]) -> dict[str, np.ndarray]:
        """With several rewards, the components [N] of the images of all processes by name, as `_gathered_rewards`."""
        if not isinstance(self.reward_fn, rewards.SeveralRewards):
            return {}
        names = list(self.reward_fn.parts)
        # [B, K], as processes are gathered along the first dimension
        mine = [torch.stack([batch[4]["components"][name] for name in names], dim=1) for batch in batches]
        of_all = self.accelerator.gather(torch.cat(mine).to(self.accelerator.device)).cpu().numpy()
        return dict(zip(names, of_all.T, strict=True))

    def _gathered_rewards(self, scored: list[list[Any]]) -> torch.Tensor:
        """The rewards of all processes, in order of the process and then of its images."""
        return self.accelerator.gather(torch.cat([batch[3] for batch in scored]))

    def _gathered_prompts(self, prompts: tuple[str, ...]) -> list[str]:
        """The prompts of all processes, in the order of `_gathered_rewards`."""
        return list(prompts) if self.accelerator.num_processes == 1 else gather_object(list(prompts))

    def _advantages(self, trajectory: Trajectory, prompts: list[str], all_rewards: torch.Tensor) -> torch.Tensor:
        """Advantages of this process's images [B], or with `train_image_credit` of their steps [B, T], on the CPU.

        Args:
            prompts, all_rewards: of all processes.
        """
        config, values = self.config, all_rewards.cpu().numpy()
        if config.objective == "rwr":
            found = rwr.image_weights(prompts, values, config)
        elif config.per_prompt_stat_tracking:
            found = self.stat_tracker.update(prompts, values)
        elif config.sample_group_size > 1:
            found = group_advantages(values, config.sample_group_size, config.train_advantages)
        else:
            found = batch_advantages(values, config.train_advantages)
        if config.train_image_credit != "none":
            min_count = config.per_prompt_stat_tracking_min_count if config.per_prompt_stat_tracking else None
            sets = compared_sets(prompts, config.sample_group_size, min_count)
            if config.train_image_credit == "coca":
                assert trajectory.credit is not None
                credit = self.accelerator.gather(trajectory.credit).cpu().numpy()
                found = step_advantages(found, credit, sets, config.num_trainable_steps)
            else:
                features = self.accelerator.gather(trajectory.features).cpu()
                found = self.step_values.advantages(features, values, prompts, sets, self.policy.config.trainable_steps)
        found = strongest(found, config.train_strongest_share, self.policy.config.trainable_steps)
        of_processes = np.split(np.ascontiguousarray(found), self.accelerator.num_processes)
        return torch.as_tensor(of_processes[self.accelerator.process_index])

    def _variety(self, scored: ScoredImages, prompts: list[str], all_rewards: torch.Tensor) -> dict[str, torch.Tensor]:
        """`reward_spread` over all processes, and `image_spread` within each process, averaged over them.

        With values of steps also `value_explained`, how much of the rewards' spread they foretold in this epoch.
        """
        found = {"reward_spread": torch.tensor(variety.reward_spread(prompts, all_rewards.cpu().numpy()))}
        spread = variety.image_spread(scored.trajectory.prompts, [batch[0] for batch in scored.batches])
        if spread is not None:
            found["image_spread"] = self.accelerator.reduce(spread.to(self.accelerator.device), reduction="mean")
        if self.config.train_image_credit == "value":
            found["value_explained"] = torch.tensor(self.step_values.explained)
        return found
