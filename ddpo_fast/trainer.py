"""`DDPOTrainer`: TRL's trainer, composed of the package's parts.

Shapes: B images of an epoch on this process, T denoising steps, S of them trained on, N pairs in a UNet call.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from ddpo_fast import cuda_graphs, ops, rewards
from ddpo_fast.advantages import PerPromptStatTracker, batch_advantages
from ddpo_fast.batch_sizes import Sizes
from ddpo_fast.config import DDPOConfig
from ddpo_fast.ddim import NoiseSchedule
from ddpo_fast.device_memory import is_out_of_memory
from ddpo_fast.engine import make_engine, make_optimizer
from ddpo_fast.health import SampleHealth, check_images
from ddpo_fast.hub import HubModel
from ddpo_fast.interruption import Interruption
from ddpo_fast.measured import Measured, device_name
from ddpo_fast.pipeline import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline, check_sampling
from ddpo_fast.placement import place_networks, trainable_parameters
from ddpo_fast.ppo import LOOKING_PAYS, PPO
from ddpo_fast.processes import (
    all_reduce_min,
    broadcast_from_main,
    launch_problem,
    make_accelerator,
    run_or_raise_on_all,
    with_launch_settings,
)
from ddpo_fast.prompt_embeddings import PromptEmbeddings
from ddpo_fast.prompts import PromptFunction
from ddpo_fast.resumption import Resumption, base_digest, described
from ddpo_fast.reward_random import RewardRandom
from ddpo_fast.rollout import Batch, PipelineRollout, Rollout
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.run_log import RunLog, agree_on_folder, output_folder
from ddpo_fast.run_folder.trackers import first_tracker
from ddpo_fast.sample_ahead import ahead
from ddpo_fast.sampler import latent_shape
from ddpo_fast.trajectory import Trajectory, micro_batches, pair_index, training_batches
from ddpo_fast.user_functions import require_function
from ddpo_fast.worker_threads import WorkerThreads

logger = logging.getLogger(__name__)


class DDPOTrainer(Resumption, HubModel):
    """Fine-tunes a Stable Diffusion pipeline on a reward (arXiv 2305.13301), with TRL 0.23.1's interface.

    Args:
        config: settings.
        reward_function: `(images [B, 3, H, W] in fp32 in [0, 1], prompts, metadata) -> (rewards [B], metadata)`.
        prompt_function: `() -> (prompt, metadata)`. Either function may have `state_dict` and `load_state_dict`:
            checkpoints then keep its state.
        sd_pipeline: the pipeline to train.
        image_samples_hook: called every epoch with a list of `[images, prompts, metadata, rewards, reward_metadata]`
            (one per sampling batch), the update count and the first tracker.

    Raises `ValueError` for settings that do not fit together and for a `resume_from` that cannot be resumed.
    """

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: rewards.RewardFunction,
        prompt_function: PromptFunction,
        sd_pipeline: DDPOStableDiffusionPipeline,
        image_samples_hook: Callable[[Any, Any, Any], Any] | None = None,
    ) -> None:
        config.check()
        if problem := launch_problem():
            raise ValueError(problem)
        require_function("reward_function", reward_function)
        require_function("prompt_function", prompt_function)
        check_sampling(sd_pipeline, config.sample_num_steps, config.sample_eta)
        self.config = config
        self.reward_fn = reward_function
        self.prompt_fn = prompt_function
        self.image_samples_callback = image_samples_hook
        self.sd_pipeline = sd_pipeline
        self.num_train_timesteps = config.num_train_timesteps
        resume = checkpoint.find(config.resume_from) if config.resume_from else None
        state = checkpoint.read_state(resume) if resume else {}
        # functions of the user's may change the working directory
        folder = output_folder(config).absolute()
        self.accelerator = make_accelerator(config, folder)
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        ops.require_backend(config.kernel_backend, self.accelerator.device.type)
        self.settings = with_launch_settings(config, self.accelerator)
        self.base = base_digest(sd_pipeline)
        self.measured = Measured(broadcast_from_main(self.accelerator, Measured.of_run(state, self._run_settings())))
        self.measured.keep_threads()
        self._check_launch()
        okay, message = self._config_check()
        if not okay:
            raise ValueError(message)
        self._verified(resume)
        self.output_dir = agree_on_folder(config, self.accelerator, folder)
        self.run_log = RunLog(config, self.accelerator, self.output_dir)
        self.run_log.lock_folder(not checkpoint.continues_in(self.output_dir, config.resume_from))
        self.run_log.start_trackers(state.get("global_step"))
        set_seed(config.seed, device_specific=True)
        sd_pipeline.set_progress_bar_config(
            position=1, disable=self._hides_bars, leave=False, desc="Timestep", dynamic_ncols=True
        )
        layers = place_networks(sd_pipeline, self.settings, self.accelerator, self.measured)
        trained = self.trainable_parameters(layers)
        # a pipeline with an autocast of its own computes in that, from fp32 weights
        precision = "no" if sd_pipeline.autocast is not None else self.settings.mixed_precision
        self.engine = make_engine(
            sd_pipeline.unet, trained, self._setup_optimizer, precision, self.settings, self.accelerator
        )
        self.optimizer = self.engine.optimizer
        self.trainable_layers = layers
        self.autocast = sd_pipeline.autocast or nullcontext
        self.embed_prompts = PromptEmbeddings(
            sd_pipeline.tokenizer, sd_pipeline.text_encoder, self.accelerator.device, config.sample_cache
        )
        self.neg_prompt_embed = self.embed_prompts([config.negative_prompts or ""])[1]
        self.stat_tracker = PerPromptStatTracker(
            config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
        )
        # for rewards that may be called from several threads
        self.executor = WorkerThreads(config.max_workers, rewards.WORKER_NAME)
        self.interruption, self.reward_random, self.sample_health = Interruption(), RewardRandom(), SampleHealth()
        self._sampled_at = 0.0
        self.sizes = self._make_sizes()
        self.rollout = self._make_rollout()
        self._check_parts()
        self.ppo = PPO(config, self.engine, self.accelerator.device, self._unet_output, self._noise_table)
        # shares of pairs without a gradient in each update of the epoch, and of the one before it
        self._dead_shares: list[float] = []
        self._known_dead: list[float] = []
        if config.resume_from:
            self._resume(resume, state)
        self._started_at, self._whole_bytes = self.first_epoch, self.run_log.metrics.size()
        self.run_settings = {**self._run_settings(), "measured": self.measured}
        self.run_log.write_config(self.run_settings)

    # set-up

    def _check_launch(self) -> None:
        """What the settings can be checked against only where it is known how accelerate was launched."""
        known = self.settings
        if self.config.seed + self.accelerator.num_processes > 2**32:
            raise ValueError(f"seed is {self.config.seed}, and every process adds its number: use a smaller one")
        if known.optimizer_in_backward and self.accelerator.num_processes > 1:
            raise ValueError("optimizer_in_backward is True, which is for one process: leave it out")
        if known.cuda_graphs:
            problem = cuda_graphs.problem(self.accelerator.device)
            if self.sd_pipeline.autocast is not None:
                problem = "this pipeline has an autocast, whose casts are forgotten before a graph reads them"
            if problem:
                raise ValueError(f"cuda_graphs is True, but {problem}: leave it out")

    trainable_parameters = staticmethod(trainable_parameters)

    def _setup_optimizer(self, trainable_layers_parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(trainable_layers_parameters, self.config)

    def _config_check(self) -> tuple[bool, str]:
        message = self.config.batch_size_problem(self.accelerator.num_processes)
        return not message, message

    def _check_parts(self) -> None:
        """What can be known of settings only with the networks at hand."""
        if self.config.offload_frozen and isinstance(self.rollout, PipelineRollout):
            raise ValueError("offload_frozen is True, but the pipeline's own __call__ wants its networks on the device")
        if not self.config.optimizer_in_backward:
            return
        calls = -(-self.config.pairs_per_update // self.sizes.micro_batch_size)
        if calls > 1:
            raise ValueError(
                f"optimizer_in_backward is True, but an update takes {calls} UNet calls, and it must be one: leave it "
                "out, or make updates smaller"
            )

    # sampling

    def _computing(self) -> ExitStack:
        """The precision of the networks: the engine's, in the pipeline's own context."""
        stack = ExitStack()
        stack.enter_context(self.engine.computing())
        stack.enter_context(self.autocast())
        return stack

    def _make_sizes(self) -> Sizes:
        unet, copies = self.sd_pipeline.unet, 2 if self.config.guides_training else 1
        shape = (1, *latent_shape(unet))

        def forward() -> torch.Tensor:
            latents = torch.zeros(shape, device=self.accelerator.device)
            timesteps = torch.zeros(1, dtype=torch.int64, device=self.accelerator.device)
            return self._unet_output(latents, timesteps, self.neg_prompt_embed.repeat(copies, 1, 1))

        return Sizes(
            self.config,
            self.accelerator.device,
            self.accelerator.num_processes,
            unet,
            forward,
            self._computing,
            self.engine.bytes_before_first_step,
            self.measured,
            lambda value: all_reduce_min(self.accelerator, value),
        )

    def _make_rollout(self) -> Rollout | PipelineRollout:
        common = (self.config, self.embed_prompts, self.neg_prompt_embed, self._computing)
        if type(self.sd_pipeline).__call__ is DefaultDDPOStableDiffusionPipeline.__call__:
            return Rollout(self.sd_pipeline.sd_pipeline, *common, self.sizes)
        return PipelineRollout(self.sd_pipeline, *common)

    def _generate_samples(
        self, iterations: int, batch_size: int, scoring: rewards.Scoring | None = None
    ) -> tuple[list[Trajectory], list[list[Any]]]:
        """`iterations` batches of trajectories, and for each `[images, prompts, metadata]`.

        With `scoring` each of the latter is scored as soon as its images are there, while a thread samples the next.
        """
        self.sd_pipeline.unet.eval()
        self.sample_health = SampleHealth()
        samples, prompt_image_pairs = [], []
        with self._sampled(self.rollout.batches(self.prompt_fn, iterations, batch_size), scoring) as batches:
            for (trajectory, images, metadata), ready in batches:
                self.sample_health.add(trajectory, images)
                samples.append(trajectory)
                prompt_image_pairs.append([images, trajectory.prompts, metadata])
                if scoring is not None:
                    self.reward_random.begin()
                    scoring.begin(prompt_image_pairs[-1], ready)
        return samples, prompt_image_pairs

    def _sampled(self, batches: Iterator[Batch], scoring: rewards.Scoring | None) -> AbstractContextManager[Any]:
        """Batches with the events that they are behind: made by a thread if they are scored meanwhile."""

        def timed() -> Iterator[Batch]:
            yield from batches
            self._sampled_at = self._now()

        if scoring is None or not isinstance(self.rollout, Rollout):
            return nullcontext((batch, None) for batch in timed())
        return ahead(timed(), self.accelerator.device, self.rollout.stop)

    @torch.no_grad()
    def evaluate(
        self, prompts: tuple[str, ...], metadata: tuple[Any, ...], seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws and scores one image per prompt from noise that `seed` fixes: (images [B, 3, H, W], rewards [B]).

        Training goes on afterwards as if nothing had been drawn.
        """
        random_state = checkpoint.random_state()
        self.sd_pipeline.unet.eval()
        with self._computing():
            drawn = self.sd_pipeline(
                prompt=list(prompts),
                negative_prompt=[self.config.negative_prompts or ""] * len(prompts),
                num_inference_steps=self.config.sample_num_steps,
                guidance_scale=self.config.sample_guidance_scale,
                eta=self.config.sample_eta,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            )
        images = drawn.images.detach().float()
        check_images(images, prompts, drawn.latents[-1])
        scores, _ = rewards.score(self.reward_fn, images, prompts, metadata)
        checkpoint.restore_random_state(random_state)
        return images.cpu(), scores.cpu()

    # rewards and advantages

    def compute_rewards(self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool = False) -> Any:
        """(rewards [B] of each batch, their metadata), as two tuples; in worker threads if `is_async`."""
        if is_async:
            return self._collected(rewards.Scoring(self.reward_fn, self.executor).results(prompt_image_pairs))
        return self._collected([rewards.score(self.reward_fn, *batch[:3]) for batch in prompt_image_pairs])

    def _collected(self, scored: list[tuple[torch.Tensor, Any]]) -> Any:
        return zip(*[(reward.to(self.accelerator.device), metadata) for reward, metadata in scored], strict=True)

    def _sample_and_score(self) -> tuple[list[Trajectory], list[list[Any]], Any, float]:
        """Trajectories, `[images, prompts, metadata]`, what `compute_rewards` returns, and the time between the two."""
        try:
            found = self._sampled_and_scored()
        except Exception:
            # a reward may have failed on what is no image
            self.sample_health.check()
            raise
        finally:
            self.reward_random.end()
        run_or_raise_on_all(self.accelerator, self.sample_health.check)
        self.interruption.check()
        return found

    def _sampled_and_scored(self) -> tuple[list[Trajectory], list[list[Any]], Any, float]:
        sizes = self.config.sample_num_batches_per_epoch, self.config.sample_batch_size
        if not self._overlaps_rewards:
            samples, batches = self._generate_samples(*sizes)
            sampled = self._now()
            is_async = self.config.async_reward_computation
            self.reward_random.begin()
            scored = run_or_raise_on_all(self.accelerator, lambda: self.compute_rewards(batches, is_async))
            return samples, batches, scored, sampled
        # TRL calls rewards in the caller's thread, and so do we unless they may be called from several
        executor = self.executor if self.config.async_reward_computation else None
        scoring = rewards.Scoring(self.reward_fn, executor, self.accelerator.num_processes == 1)
        samples, batches = self._generate_samples(*sizes, scoring)
        scored = run_or_raise_on_all(self.accelerator, lambda: scoring.results(batches))
        return samples, batches, self._collected(scored), self._sampled_at

    @property
    def _overlaps_rewards(self) -> bool:
        """Whether batches are scored while others are sampled: not if either is somebody's own way of doing it."""
        ours = all(
            getattr(type(self), name) is getattr(DDPOTrainer, name) for name in ("compute_rewards", "_generate_samples")
        )
        return self.config.reward_overlap and ours and isinstance(self.rollout, Rollout)

    def _now(self) -> float:
        """Seconds, when the device is done with what this thread gave it; what others gave it goes on."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.current_stream(self.accelerator.device).synchronize()
        return time.monotonic()

    def _advantages(self, prompts: tuple[str, ...], all_rewards: torch.Tensor) -> torch.Tensor:
        """Advantages of this process's images from the rewards of all processes, on the CPU."""
        values = all_rewards.cpu().numpy()
        if self.config.per_prompt_stat_tracking:
            gathered = list(prompts) if self.accelerator.num_processes == 1 else gather_object(list(prompts))
            advantages = self.stat_tracker.update(gathered, values)
        else:
            advantages = batch_advantages(values)
        return torch.as_tensor(advantages).reshape(self.accelerator.num_processes, -1)[self.accelerator.process_index]

    # one epoch

    def step(self, epoch: int, global_step: int) -> int:
        """Samples, scores and trains for one epoch; saves a checkpoint if one is due.

        Returns the number of updates so far, `global_step` plus this epoch's.
        """
        started = time.monotonic()
        samples, prompt_image_data, (batch_rewards, rewards_metadata), sampled = self._sample_and_score()
        for data, reward, metadata in zip(prompt_image_data, batch_rewards, rewards_metadata, strict=True):
            data.extend([reward, metadata])
        if self.image_samples_callback is not None:
            self.image_samples_callback(prompt_image_data, global_step, first_tracker(self.accelerator))
        trajectory = Trajectory.cat(samples)
        # the latents are the largest thing that an epoch leaves, and now they are there twice
        del samples
        all_rewards = self.accelerator.gather(torch.cat(batch_rewards))
        self.run_log.log_rewards(epoch, global_step, all_rewards)
        trajectory = trajectory.with_advantages(self._advantages(trajectory.prompts, all_rewards))
        scored = time.monotonic()
        global_step = self._train_on(trajectory, epoch, global_step)
        ended = self._now()
        timings = {
            "sample_s": sampled - started,
            "reward_s": scored - sampled,
            "train_s": ended - scored,
            "images_per_s": len(all_rewards) / (ended - started),
        }
        self.run_log.log_epoch(epoch, global_step, all_rewards, timings)
        self._epoch_is_whole(epoch + 1, global_step)
        if (epoch + 1) % self.config.save_freq == 0:
            self._save(epoch + 1)
        return global_step

    def _train_on(self, trajectory: Trajectory, epoch: int, global_step: int) -> int:
        """The inner epochs; returns the number of updates so far."""
        self._is_updating = True
        if self.config.train_recompute_log_probs:
            trajectory = self._rescored(trajectory)
        self._dead_shares, self._known_dead = [], self._dead_shares
        inner_epochs = training_batches(trajectory, self.config.train_batch_size, self.config.train_num_inner_epochs)
        # a reward's module may have turned gradients off for the whole process
        with torch.enable_grad(), self.engine.computing():
            for inner_epoch, batches in enumerate(inner_epochs):
                self.sd_pipeline.unet.train()
                global_step = self._train_batched_samples(inner_epoch, epoch, global_step, batches)
        return global_step

    def _train_batched_samples(
        self, inner_epoch: int, epoch: int, global_step: int, batched_samples: Iterable[Any]
    ) -> int:
        """Updates the weights from training batches [b, T, ...]; returns the number of updates so far.

        Every `train_gradient_accumulation_steps` batches make one update, from the first S steps of each image.
        """
        updates = []
        first = inner_epoch * self.config.updates_per_inner_epoch
        groups = _grouped(iter(batched_samples), self.config.train_gradient_accumulation_steps)
        bar = tqdm(
            groups,
            total=self.config.updates_per_inner_epoch,
            desc="Training",
            position=1,
            leave=False,
            disable=self._hides_bars,
        )
        with self.engine.computing():
            for at, batches in enumerate(bar, start=first):
                metrics = self._update(batches, self._looks_first(at))
                if at > 0:
                    # a distance from 1 is drift only while the weights are still those that sampled
                    metrics.pop("ratio_drift", None)
                updates.append(metrics)
                self.interruption.check()
        infos = self.run_log.log_updates(updates, epoch, inner_epoch, global_step)
        self._dead_shares += [info.get("dead", 0.0) for info in infos]
        return global_step + len(updates)

    def _looks_first(self, at: int) -> bool:
        """Whether so many pairs were dead in the last epoch, after as many updates, that looking for them pays."""
        shares = self._known_dead[at : at + 1]
        return self.config.train_skip_dead_pairs and any(share > LOOKING_PAYS for share in shares)

    def _update(self, batches: list[Any], looks_first: bool = False) -> dict[str, torch.Tensor]:
        """One optimizer step from the pairs of `batches`; its metrics, still on the device."""
        trained = [_first_steps(batch, self.num_train_timesteps) for batch in batches]
        own_loss = self.calculate_loss if self._has_own_objective() else None
        while True:
            try:
                self.ppo.add_gradients(trained, self.sizes.micro_batch_size, looks_first, own_loss)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            self._take_smaller_steps(problem)
        return self.ppo.step()

    def _take_smaller_steps(self, problem: str) -> None:
        """Halves the micro-batch, for an update to be begun again. Raises `RuntimeError` if that cannot be done."""
        size = self.sizes.micro_batch_size
        if not self.engine.can_begin_again or not self.sizes.halve():
            raise RuntimeError(
                f"out of memory with a micro-batch of {size}: set a smaller train_micro_batch_size, "
                f"gradient_checkpointing='blocks', train_use_8bit_adam or offload='optimizer' ({problem})"
            )
        self.ppo.forget_recordings()
        self.engine.zero_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: micro-batches of %d instead of %d from here on", self.sizes.micro_batch_size, size
        )

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

        Latents are [N, C, H, W]; timesteps, log-probs and advantages [N]; embeds [2N, L, D] with the negative
        prompts first if training is guided, else [N, L, D].
        """
        log_prob = self._log_prob(latents, timesteps, next_latents, embeds)
        limit = self.config.train_adv_clip_max
        ratio = torch.exp(log_prob - log_probs)
        self.ppo.metrics.at_least("ratio_drift", (ratio - 1).detach().abs().max())
        loss = self.loss(advantages.clamp(-limit, limit), self.config.train_clip_range, ratio)
        approx_kl = 0.5 * (log_prob - log_probs).square().mean()
        clipfrac = ((ratio - 1).abs() > self.config.train_clip_range).float().mean()
        return loss, approx_kl, clipfrac

    def _has_own_objective(self) -> bool:
        """Whether the loss or the pipeline's step are someone's own, which the fused loss knows nothing of."""
        steps = getattr(self.sd_pipeline.scheduler_step, "__func__", None)
        return (
            getattr(self.loss, "__func__", None) is not DDPOTrainer.loss
            or getattr(self.calculate_loss, "__func__", None) is not DDPOTrainer.calculate_loss
            or steps is not DefaultDDPOStableDiffusionPipeline.scheduler_step
        )

    def _noise_table(self) -> torch.Tensor:
        scheduler, device = self.sd_pipeline.scheduler, self.accelerator.device
        return NoiseSchedule.of(scheduler, self.config.sample_eta, device).table

    def _unet_output(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        copies = 2 if self.config.guides_training else 1
        with self._computing():
            unet = self.sd_pipeline.unet
            rows = torch.cat([latents] * copies).to(unet.dtype)
            return unet(rows, torch.cat([timesteps] * copies), embeds.to(unet.dtype)).sample

    def _log_prob(
        self, latents: torch.Tensor, timesteps: torch.Tensor, next_latents: torch.Tensor, embeds: torch.Tensor
    ) -> torch.Tensor:
        output = self._unet_output(latents, timesteps, embeds)
        if self.config.guides_training:
            output = ops.guided(output, self.config.sample_guidance_scale)
        scored = self.sd_pipeline.scheduler_step(
            output, timesteps, latents, eta=self.config.sample_eta, prev_sample=next_latents
        )
        assert scored.log_probs is not None, "eta is above 0"
        return scored.log_probs

    @torch.no_grad()
    def _rescored(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the log-probs that training's forward pass gives it under the current weights."""
        scores = []
        with self.engine.computing():
            for pairs in micro_batches([trajectory], pair_index([trajectory]), self.sizes.micro_batch_size):
                embeds = pairs.embeds(self.config.guides_training)
                scores.append(self._log_prob(pairs.latents, pairs.timesteps, pairs.next_latents, embeds))
        return replace(trajectory, log_probs=torch.cat(scores).reshape(trajectory.log_probs.T.shape).T.contiguous())

    def loss(self, advantages: torch.Tensor, clip_range: float, ratio: torch.Tensor) -> torch.Tensor:
        """The clipped PPO loss of N pairs; override it for another objective."""
        return ops.clipped_surrogate(advantages, clip_range, ratio)

    def train(self, epochs: int | None = None) -> None:
        """Trains `epochs` epochs (default: `config.num_epochs`), a resumed run the rest of them.

        A second call trains as many again, as TRL does; one after a call that was stopped (Ctrl-C, a reward that
        raised) trains the rest of that one, from the start of the epoch it was in. However it ends, there is a
        checkpoint of the last whole epoch.
        """
        left = self._epochs_to_train(self.config.num_epochs if epochs is None else epochs)
        bar = tqdm(left, initial=left.start, total=left.stop, desc="Epoch", disable=self._hides_bars)
        with self._attended():
            for epoch in bar:
                self.step(epoch, self._global_step)
                bar.set_postfix_str(self.run_log.summary)
                if bar.disable and self.accelerator.is_main_process:
                    print(f"epoch {epoch + 1}/{left.stop}: {self.run_log.summary}", file=sys.stderr, flush=True)
                if (epoch + 1) % self.config.save_freq:
                    self._save_between(epoch + 1, epoch + 1 == left.stop)
        self.run_log.draw_reward_curve()
        self.accelerator.wait_for_everyone()

    # records

    @property
    def _hides_bars(self) -> bool | None:
        """tqdm's `disable`: None means a bar on a terminal and none in a log file."""
        return None if self.accelerator.is_local_main_process else True

    def _run_settings(self) -> dict[str, Any]:
        settings = {
            "config": vars(self.config),
            "num_processes": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device),
            "base": self.base,
            **described(self.sd_pipeline),
        }
        if settings.get("use_lora") and hasattr(self.sd_pipeline, "lora_config"):
            lora = self.sd_pipeline.lora_config
            settings |= {
                "lora_rank": lora.r,
                "lora_alpha": lora.lora_alpha,
                "lora_target_modules": sorted(lora.target_modules),
            }
        return settings

    # checkpoints and models

    def _save(self, epochs: int, name: str = "") -> None:
        """A checkpoint after `epochs` finished epochs, or what lies under another `name` beside them."""
        # with what has been measured since the last one
        self.run_log.write_config(self.run_settings)
        state = {
            "epochs": epochs,
            "global_step": self._global_step,
            "elapsed_s": self.run_log.elapsed_s(),
            "metrics_bytes": self.run_log.metrics.size(),
            "trained": self._trained_part(),
            "healthy": self.run_log.health.good,
            **json.loads(json.dumps(self.run_settings, default=str)),
        }
        training = {
            "engine": self.engine.state_dict(),
            "dead_shares": self._dead_shares,
            **checkpoint.function_states({"stat_tracker": self.stat_tracker, **self._stateful_functions()}),
        }
        with self.interruption.deferred(), self.engine.exact():
            checkpoint.save(
                self._checkpoints,
                self.accelerator,
                state,
                training,
                self.engine.process_state(),
                self._write_weights,
                self.config.project_kwargs.get("total_limit") or self.config.num_checkpoint_limit,
                name,
            )


def _grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(batches, size)):
        yield group


def _first_steps(batch: Any, count: int) -> dict[str, Any]:
    per_step = {name: batch[name][:, :count] for name in ("timesteps", "latents", "next_latents", "log_probs")}
    per_image = {name: batch[name] for name in ("prompt_embeds", "negative_prompt_embeds", "advantages")}
    return {**per_image, **per_step, "live": batch.get("live")}
