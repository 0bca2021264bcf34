"""`DDPOTrainer`: denoising diffusion policy optimization (arXiv 2305.13301), with TRL's interface.

Read `train` and `step` first: a step's first two stages are in `scoring_mixin.py`, the third is below them.

Shapes: B images of an epoch or batch on a process, T denoising steps (S of them trained on), N (image, timestep) pairs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ddpo_fast import ops, rewards
from ddpo_fast.advantages import PerPromptStatTracker
from ddpo_fast.batch_sizes import BatchSizes
from ddpo_fast.bounded_update import BoundedUpdate
from ddpo_fast.checkpoint_mixin import CheckpointMixin
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import make_engine, make_optimizer
from ddpo_fast.evaluation import Evaluation
from ddpo_fast.families import family_of_pipeline, with_family
from ddpo_fast.fixed_images_mixin import FixedImagesMixin
from ddpo_fast.guard import Guard
from ddpo_fast.health import SampleHealth
from ddpo_fast.interruption import Interruption
from ddpo_fast.measured import Measured
from ddpo_fast.metrics import EpochTimer, approx_kl, clip_fraction
from ddpo_fast.objectives import make_objective, refuse_own_loss
from ddpo_fast.pipeline import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline, check_pipeline
from ddpo_fast.placement import compute_precision, fitting_threads, place_networks, trainable_parameters
from ddpo_fast.policy import Policy, ratio_clip_range
from ddpo_fast.ppo import PPO
from ddpo_fast.processes import broadcast_from_main, check_launch, make_accelerator, with_launch_settings
from ddpo_fast.prompts import ListPrompts, PromptFunction, load_prompts
from ddpo_fast.rollout import PipelineRollout, Rollout
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.hub import HubModel
from ddpo_fast.run_folder.progress import Progress
from ddpo_fast.run_folder.resume_checks import base_digest, verify
from ddpo_fast.run_folder.run_log import RunLog, agree_on_folder, output_folder
from ddpo_fast.run_folder.trackers import first_tracker
from ddpo_fast.samples import Samples
from ddpo_fast.scoring_mixin import ScoringMixin
from ddpo_fast.step_values import StepValues
from ddpo_fast.trajectory import Trajectory, in_groups
from ddpo_fast.user_functions import function_name, require_function
from ddpo_fast.worker_threads import WorkerThreads

logger = logging.getLogger(__name__)

# of the run's folder: where `embed_prompts_once` keeps embeddings, of a list at most this many before training
EMBEDDINGS = "prompt_embeddings"
MOST_EMBEDDED = 4096


class DDPOTrainer(ScoringMixin, FixedImagesMixin, CheckpointMixin, HubModel):
    """Fine-tunes a Stable Diffusion pipeline on a reward (arXiv 2305.13301), with TRL 0.23.1's interface.

    Args:
        config: settings.
        reward_function: `(images [B, 3, H, W] in fp32 in [0, 1], prompts, metadata) -> (rewards [B], metadata)`, or
            what `ddpo_fast.rewards.load` takes.
        prompt_function: `() -> (prompt, metadata)`, or what `load_prompts` takes. Either function may have `state_dict`
            and `load_state_dict`: checkpoints then keep its state.
        sd_pipeline: the pipeline to train.
        image_samples_hook: called every epoch with a list of `[images, prompts, metadata, rewards, reward_metadata]`
            (one per sampling batch), the update count and the first tracker.
        eval_reward_function: scores images of fixed prompts and noise before the first epoch and after every
            `eval_freq` epochs; it is not trained on.
        eval_prompt_function: gives the prompts of these images, when the trainer is made (default: `prompt_function`).
        sample_prompt_function: as `eval_prompt_function`, for the images of `sample_freq`.

    Raises `ValueError` for settings that do not fit together and for a `resume_from` that cannot be resumed.
    """

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: rewards.RewardFunction | str,
        prompt_function: PromptFunction | str,
        sd_pipeline: DDPOStableDiffusionPipeline,
        image_samples_hook: Callable[[Any, Any, Any], Any] | None = None,
        eval_reward_function: rewards.RewardFunction | str | None = None,
        eval_prompt_function: PromptFunction | str | None = None,
        sample_prompt_function: PromptFunction | str | None = None,
    ) -> None:
        config.check()
        check_launch()
        self.reward_fn = _function("reward_function", reward_function, rewards.load)
        self.prompt_fn = _function("prompt_function", prompt_function, load_prompts)
        given = {"reward": reward_function, "prompts": prompt_function}
        self.named = {name: spec for name, spec in given.items() if isinstance(spec, str)}
        others = {"eval_prompt_function": eval_prompt_function, "sample_prompt_function": sample_prompt_function}
        eval_prompts, sample_prompts = (
            self.prompt_fn if given is None else _function(name, given, load_prompts) for name, given in others.items()
        )
        eval_reward = None
        if eval_reward_function is not None:
            function = _function("eval_reward_function", eval_reward_function, rewards.load)
            spec = eval_reward_function if isinstance(eval_reward_function, str) else ""
            eval_reward = rewards.SeveralRewards.of(function, spec or function_name(function).rpartition(".")[2])
        check_pipeline(sd_pipeline, config)
        # In one piece, as each part needs those before it: checks, processes, folder, networks, stages, progress.
        self.config = config
        self.image_samples_callback = image_samples_hook
        self.sd_pipeline = sd_pipeline
        self.num_train_timesteps = with_family(config, family_of_pipeline(sd_pipeline)).num_train_timesteps

        # The run's processes, and the checkpoint to resume from, verified before anything is written.
        resume = checkpoint.find(config.resume_from) if config.resume_from else None
        state = checkpoint.read_state(resume) if resume else {}
        # absolute: the user's functions may change the working directory
        folder = output_folder(config).absolute()
        self.accelerator = make_accelerator(config, folder)
        ops.require_backend(config.kernel_backend, self.accelerator.device.type)
        settings = with_family(with_launch_settings(config, self.accelerator), family_of_pipeline(sd_pipeline))
        # raises if settings ask for a loss that an override of the user's is not
        self._own_loss()
        self.base = base_digest(sd_pipeline)
        self.measured = Measured(broadcast_from_main(self.accelerator, Measured.of_run(state, self._run_settings())))
        self.measured.keep_threads(lambda: fitting_threads(sd_pipeline, settings, self.accelerator))
        okay, message = self._config_check()
        if not okay:
            raise ValueError(message)
        verify(resume, self.accelerator)

        # The output folder, created and locked so that no other run can write to it.
        self.output_dir = agree_on_folder(config, self.accelerator, folder)
        self.run_log = RunLog(
            config, self.accelerator, self.output_dir, ratio_clip_range(config, family_of_pipeline(sd_pipeline))
        )
        self.run_log.lock_folder(not checkpoint.continues_in(self.output_dir, config.resume_from))
        self.run_log.start_trackers(state.get("global_step"))
        set_seed(config.seed, device_specific=True)
        sd_pipeline.set_progress_bar_config(
            position=1, disable=self._hides_bar(), leave=False, desc="Timestep", dynamic_ncols=True
        )

        # The networks on the device, the engine (trained weights and optimizer), and the policy, which calls the UNet.
        self.trainable_layers = place_networks(sd_pipeline, settings, self.accelerator, self.measured)
        self.engine = make_engine(
            sd_pipeline.unet,
            self.trainable_parameters(self.trainable_layers),
            self._setup_optimizer,
            compute_precision(sd_pipeline, settings),
            settings,
            self.accelerator,
        )
        self.optimizer = self.engine.optimizer
        self.policy = Policy(sd_pipeline, settings, self.engine, self.accelerator.device, self.output_dir / EMBEDDINGS)
        if config.embed_prompts_once and isinstance(self.prompt_fn, ListPrompts):
            # the other processes read what the main one has written
            with self.accelerator.main_process_first():
                self.policy.embed_prompts.embed_all(list(dict.fromkeys(self.prompt_fn.prompts))[:MOST_EMBEDDED])
        # attributes of TRL's trainer, which its users' subclasses may read
        self.autocast, self.neg_prompt_embed = sd_pipeline.autocast or nullcontext, self.policy.negative_embeds
        self.sizes = BatchSizes(settings, self.policy, self.engine, self.accelerator, self.measured)
        self.sizes.settle_graphs()

        # The stages of an epoch: sampling, scoring, advantages, updates.
        self.rollout: Rollout | PipelineRollout = PipelineRollout(settings, self.policy)
        if type(sd_pipeline).__call__ is DefaultDDPOStableDiffusionPipeline.__call__:
            self.rollout = Rollout(settings, self.policy, self.sizes)
        self.executor = WorkerThreads(config.max_workers, rewards.WORKER_NAME)
        self.reward_random, self.sample_health = rewards.RewardRandom(), SampleHealth()
        self.stat_tracker = PerPromptStatTracker(
            config.per_prompt_stat_tracking_buffer_size,
            config.per_prompt_stat_tracking_min_count,
            config.train_advantages,
        )
        self.step_values = StepValues()
        objective = make_objective(settings, self.policy, self.trainable_parameters(self.trainable_layers))
        bound = None
        if config.train_target_update:
            bound = BoundedUpdate(settings, self.policy, self.engine, self.accelerator)
        self.ppo = PPO(settings, self.policy, self.engine, self.sizes, objective, bound)

        self.evaluation = None
        if eval_reward is not None:
            self.evaluation = Evaluation(settings, self.accelerator, self.policy, eval_reward, eval_prompts)
        self.samples = None
        if config.sample_freq:
            self.samples = Samples(settings, self.accelerator, self.policy, self.reward_fn, sample_prompts)
        self.guard = None
        if config.train_guard:
            self.guard = Guard(self.engine, list(self.trainable_parameters(self.trainable_layers)))

        # The run's counters and, for a resumed run, the checkpoint's state.
        self.interruption = Interruption()
        self.progress = Progress(
            config, self.accelerator, self.output_dir, self.run_log, self.interruption, self.evaluation is not None
        )
        if config.resume_from:
            self.progress.prepare_resume(resume, state, self._trained_part(), self._run_settings())
            if resume is not None:
                self._load(resume, state)
        self.progress.process_begins()
        self.run_settings = {**self._run_settings(), "measured": self.measured}
        self.run_log.write_config(self.run_settings)

    trainable_parameters = staticmethod(trainable_parameters)

    def _setup_optimizer(self, trainable_layers_parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(trainable_layers_parameters, self.config)

    def _config_check(self) -> tuple[bool, str]:
        message = self.config.batch_size_problem(self.accelerator.num_processes)
        return not message, message

    # the algorithm

    def train(self, epochs: int | None = None) -> None:
        """Trains `epochs` epochs (default: `config.num_epochs`); a resumed run trains those that are left of them.

        A second call trains as many epochs as the first, as in TRL. After a call that was stopped (Ctrl-C, a reward
        that raised), the next call trains the rest of its epochs, beginning with the interrupted one. However training
        ends, a checkpoint of the last whole epoch is kept, but see `Progress.keeps_last_epoch` for slow disks. A file
        `stop` in the run's folder ends it after the epoch, and so does `early_stopping_patience`.
        """
        left = self.progress.epochs_to_train(self.config.num_epochs if epochs is None else epochs)
        bar = tqdm(left, initial=left.start, total=left.stop, desc="Epoch", disable=self._hides_bar(is_inner=False))
        with self.executor.abandoned_on_error(), self.progress.guarded():
            self._check_that_it_can_be_saved()
            if self.progress.was_interrupted:
                self._rewind_epoch()
            self.progress.train_begins()
            if self.progress.epochs == 0:
                self._draw_fixed_images(0, self.progress.global_step)
            for epoch in bar:
                self.step(epoch, self.progress.global_step)
                bar.set_postfix_str(self.run_log.summary)
                if bar.disable and self.accelerator.is_main_process:
                    print(f"epoch {epoch + 1}/{left.stop}: {self.run_log.summary}", file=sys.stderr, flush=True)
                ends = self.progress.reason_to_end() if epoch + 1 < left.stop else ""
                if (epoch + 1) % self.config.save_freq:
                    self._save_between(epoch + 1, is_last=bool(ends) or epoch + 1 == left.stop)
                if ends:
                    self.progress.say_ended(ends)
                    break
            self._draw_last_samples()
        self.draw_reports()
        self.accelerator.wait_for_everyone()

    def step(self, epoch: int, global_step: int) -> int:
        """One epoch: samples images, scores them, trains on them, and saves a checkpoint if one is due.

        Returns the number of updates so far, `global_step` plus this epoch's.
        """
        timer = EpochTimer(self.accelerator.device)
        self._use_size_of(epoch)
        # Sample images with the current weights, keeping the latents and log-prob of every denoising step; score them.
        with self.policy.sampling():
            scored, images = self._sample_and_score(timer)
        if self.image_samples_callback is not None:
            self.image_samples_callback(scored.batches, global_step, first_tracker(self.accelerator))
        # An advantage is a reward's distance from those that it is compared with, in units of their spread.
        all_rewards, prompts = self._gathered_rewards(scored.batches), self._gathered_prompts(scored.trajectory.prompts)
        components = self._gathered_components(scored.batches)
        self._note_extremes(scored.batches)
        self.run_log.log_rewards(epoch, global_step, all_rewards)
        # scores are compared with each other, and rewards of images of different sizes cannot be
        if not self.progress.scores.held_out and self.config.size_of(epoch) == self.config.image_sizes[0]:
            self.progress.scores.add(epoch, all_rewards.mean().item())
        advantages = self._advantages(scored.trajectory, prompts, all_rewards)
        variety = self._variety(scored, prompts, all_rewards)
        trajectory = scored.trajectory.with_advantages(advantages)
        timer.ends("scoring")
        # Updates make the steps of images with a positive advantage more likely, those with a negative one less likely.
        # Images of weights that have been given up are not trained on.
        if self.guard is None or not self.guard.watch(all_rewards, prompts, variety.get("image_spread")):
            global_step = self._train_on(trajectory, epoch, global_step)
        timer.ends("training")
        # Log the epoch, then save a checkpoint: it records how much had been logged.
        timings = timer.timings(images * self.accelerator.num_processes)
        self.run_log.log_epoch(epoch, global_step, all_rewards, timings, variety, components, prompts)
        self._draw_fixed_images(epoch + 1, global_step)
        self.progress.epoch_is_whole(epoch + 1, global_step)
        if (epoch + 1) % self.config.save_freq == 0:
            self._save(epoch + 1)
        return global_step

    def _use_size_of(self, epoch: int) -> None:
        """Makes the images of an epoch, counted from 0, of its size, and compares them with others of that size."""
        if self.config.sizes is None:
            return
        self.policy.use_size(*self.config.size_of(epoch))
        size = self.config.size_name(epoch)
        self.run_log.use_size(size, self.policy.clip_range)
        for part in (self.stat_tracker, self.step_values, self.guard, self.reward_fn):
            if isinstance(part, (PerPromptStatTracker, StepValues, Guard, rewards.SeveralRewards)):
                part.use_size(size)

    # stage 3: train

    def _train_on(self, trajectory: Trajectory, epoch: int, global_step: int) -> int:
        """The inner epochs; returns the number of updates so far."""
        self.progress.is_updating = True
        if isinstance(self.rollout, Rollout):
            # since the images were sampled, the user's functions may have drawn others, of another size
            self.policy.set_steps()
        trajectory = trajectory.with_steps(self.policy.config.trainable_steps)
        if self.config.train_recompute_log_probs or self._lacks_pooled_log_probs:
            with self.policy.sampling():
                trajectory = self.ppo.score_again(trajectory)
        self.ppo.begin_epoch()
        inner_epochs = self.ppo.objective.training_batches(trajectory)
        # a reward's module may have turned gradients off for the whole process
        with torch.enable_grad(), self.engine.computing():
            for inner_epoch, batches in enumerate(inner_epochs):
                self.policy.unet.train()
                global_step = self._train_batched_samples(inner_epoch, epoch, global_step, batches)
        return global_step

    def _train_batched_samples(
        self, inner_epoch: int, epoch: int, global_step: int, batched_samples: Iterable[Any]
    ) -> int:
        """Updates the weights from training batches; returns the number of updates so far.

        A training batch is a `TrainingBatch` [b, T, ...], or a dict such as TRL's. Each
        `train_gradient_accumulation_steps` of them make one update, from the first S steps of each image.
        """
        per_epoch = self.config.updates_per_inner_epoch
        own_loss = self._own_loss()
        updates = []
        groups = in_groups(batched_samples, self.config.train_gradient_accumulation_steps)
        bar = tqdm(groups, total=per_epoch, desc="Training", position=1, leave=False, disable=self._hides_bar())
        with self.engine.computing():
            for number, batches in enumerate(bar, start=inner_epoch * per_epoch):
                updates.append(self.ppo.update(batches, number, own_loss))
                self.interruption.check()
        # reading the metrics makes the host wait for the device, so it is done once an inner epoch
        logged = self.run_log.log_updates(updates, epoch, inner_epoch, global_step)
        self.ppo.remember([update.get("zero_gradient", 0.0) for update in logged])
        return global_step + len(updates)

    def calculate_loss(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        next_latents: torch.Tensor,
        log_probs: torch.Tensor,
        advantages: torch.Tensor,
        embeds: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, approximate KL, clip fraction), scalars, of N pairs.

        TRL's method. It is called only where this method, `loss` or the pipeline's `scheduler_step` is overridden;
        otherwise `ops.ppo_loss` computes the same loss together with its gradient.

        Latents are [N, C, H, W]; timesteps, log-probs and advantages [N]; embeds [2N, L, D] with the negative
        prompts first if training is guided, else [N, L, D].
        """
        log_prob = self.policy.log_prob(latents, timesteps, next_latents, embeds)
        limit, clip_range = self.config.train_adv_clip_max, self.policy.clip_range
        ratio = torch.exp(self.policy.credited(log_prob - log_probs, timesteps))
        self.ppo.metrics.add_maximum("ratio_drift", (ratio - 1).detach().abs().max())
        loss = self.loss(advantages.clamp(-limit, limit), clip_range, ratio)
        return loss, approx_kl(log_prob, log_probs), clip_fraction(ratio, clip_range)

    def loss(self, advantages: torch.Tensor, clip_range: float, ratio: torch.Tensor) -> torch.Tensor:
        """The clipped PPO loss of N pairs, a scalar; override it for another objective."""
        return ops.clipped_surrogate(advantages, clip_range, ratio)

    @property
    def _lacks_pooled_log_probs(self) -> bool:
        """Whether sampling gives log-probs of every pixel where training needs those of pooled latents."""
        return self.config.train_pool_latents > 1 and not isinstance(self.rollout, Rollout)

    def _own_loss(self) -> Callable[..., Any] | None:
        """`calculate_loss` if the loss or the pipeline's step is overridden, so that the objective would be another.

        Raises `ValueError` if settings ask for a loss that `calculate_loss` is not.
        """
        is_own = _overrides(self, DDPOTrainer, "loss", "calculate_loss")
        # regression trains on noised images and on no step
        if self.config.objective != "rwr":
            is_own |= _overrides(self.sd_pipeline, DefaultDDPOStableDiffusionPipeline, "scheduler_step")
        if is_own:
            refuse_own_loss(self.config)
        return self.calculate_loss if is_own else None


def _function(name: str, given: Any, load: Callable[[str], Any]) -> Callable[..., Any]:
    """The function that was given, or that the given string names; raises `ValueError` if it is none."""
    function = load(given) if isinstance(given, str) else given
    require_function(name, function)
    return function


def _overrides(holder: Any, kind: type, *names: str) -> bool:
    """Whether `holder` has other methods of these names than the class `kind`, by a subclass or an assignment."""
    return any(getattr(getattr(holder, name), "__func__", None) is not getattr(kind, name) for name in names)
