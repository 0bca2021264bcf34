"""Samples an epoch's images: draws prompts and noise in TRL's order, denoises sampling batches together, decodes them.

Shapes: B images of a sampling batch, or of several that are denoised together, T denoising steps, C H W latent, L
tokens, D width of the text embedding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ddpo_fast import ops
from ddpo_fast.batch_sizes import BatchSizes
from ddpo_fast.config import DDPOConfig
from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.families import Family
from ddpo_fast.image_credit import similarities, step_credit
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import PromptFunction, PromptGroups
from ddpo_fast.sample_ahead import Stopped, ahead
from ddpo_fast.sampler import DenoisingChain, decode
from ddpo_fast.step_table import Prediction
from ddpo_fast.step_values import predicted_features
from ddpo_fast.trajectory import Trajectory
from ddpo_fast.unet import UNetCache, cache_problem


@dataclass(frozen=True)
class Draw:
    """The random draws of a sampling batch."""

    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    noise: list[torch.Tensor]  # T + 1 tensors [B, C, H, W]: the initial latents, then the noise of each step


class SampledBatch(NamedTuple):
    """A sampling batch: what training reads, and what a reward function is given."""

    trajectory: Trajectory
    images: torch.Tensor  # [B, 3, height, width] fp32 in [0, 1]
    metadata: tuple[Any, ...]  # of the prompts


class Rollout:
    """Samples with the diffusers pipeline of a `DefaultDDPOStableDiffusionPipeline`.

    Args:
        sizes: says how many sampling batches are denoised together.
    """

    def __init__(self, config: DDPOConfig, policy: Policy, sizes: BatchSizes) -> None:
        self.config = config
        self.policy = policy
        self.sizes = sizes
        self.family = policy.family
        # set from another thread to end the sampling at the next denoising step
        self.stop = threading.Event()
        self._chains: dict[tuple[Any, ...], RolloutChain] = {}
        # counts the steps of an epoch's chains
        self._bar: Any = None

    def batches(self, prompt_function: PromptFunction, iterations: int, batch_size: int) -> Iterator[SampledBatch]:
        """`iterations` sampling batches, one after the other; all prompts and noise are drawn before this returns.

        A reward function may use the same random generators while later batches are sampled, and the prompt function
        may work only in the thread that calls the trainer.

        Each `sample_group_size` consecutive images are of one draw of the prompt function; the last group may be cut.
        """
        groups = PromptGroups(prompt_function, self.config.sample_group_size)
        draws = [self.draw(groups, batch_size) for _ in range(iterations)]
        if self.config.sample_group_noise == "shared":
            _share_first_noise(draws, self.config.sample_group_size)
        if self.policy.embed_prompts.remembers:
            # All prompts are encoded here, before sampling is queued on the device: copying a batch's token ids to the
            # device later would wait for the batches before it.
            with self.policy.computing():
                self.policy.embed_prompts.keep([prompt for draw in draws for prompt in draw.prompts])
        return self._sampled(draws)

    def _sampled(self, draws: list[Draw]) -> Iterator[SampledBatch]:
        """Yields the samples of the draws in order, and denoises `merged_batches` of them together."""
        # one bar for all of them, so that the time that it says is what is left of the epoch's sampling
        calls = -(-len(draws) // self.sizes.merged_batches)
        shown = getattr(self.family.pipe, "_progress_bar_config", {}) | {"desc": "Sampling", "unit": "step"}
        with tqdm(total=calls * self.config.sample_num_steps, **shown) as self._bar:
            for start in range(0, len(draws), self.sizes.merged_batches):
                merged = draws[start : start + self.sizes.merged_batches]
                for draw, (trajectory, images) in zip(merged, self.sample(merged), strict=True):
                    yield SampledBatch(trajectory, images, draw.metadata)
        self._bar = None

    def ahead(
        self, batches: Iterator[SampledBatch]
    ) -> AbstractContextManager[Iterator[tuple[SampledBatch, torch.cuda.Event | None]]]:
        """A context in which another thread samples the batches; see `sample_ahead`."""
        return ahead(batches, self.policy.device, self.stop)

    def draw(self, groups: PromptGroups, batch_size: int) -> Draw:
        """Draws for a batch what TRL draws, in its order: the prompts, the latents, the noise of each step."""
        prompts, metadata = groups.draw(batch_size)
        shape = (batch_size, *self.policy.latent_shape)
        noise = [randn_tensor(shape, device=self.policy.device) for _ in range(self.config.sample_num_steps + 1)]
        return Draw(prompts, metadata, noise)

    def sample(self, draws: Sequence[Draw]) -> Iterator[tuple[Trajectory, torch.Tensor]]:
        """The trajectories and images [B, 3, height, width] of batches that are denoised together."""
        for trajectory in self._trajectories(draws).split([len(draw.prompts) for draw in draws]):
            with torch.no_grad(), self.policy.computing():
                images = decode(self.family, trajectory.trail[:, -1], "pt")
            yield trajectory, images

    @torch.no_grad()
    def _trajectories(self, draws: Sequence[Draw]) -> Trajectory:
        """The trajectories of batches that are denoised together, as one; empties the draws' noise."""
        prompts = tuple(prompt for draw in draws for prompt in draw.prompts)
        noise = [torch.cat(step) for step in zip(*(draw.noise for draw in draws), strict=True)]
        for draw in draws:
            # freed, as `torch.cat` has copied it: it is as large as all latents of the rollout
            draw.noise.clear()
        # sampling empties `noise`; pooled, it is small enough to be kept until the steps' log-probs are made of it
        pools = self.config.train_pool_latents > 1
        pooled_noise = [self.policy.pooled(step) for step in noise[1:]] if pools else []
        with self.policy.computing():
            ids, embeds = self.policy.embed_prompts(prompts)
            trail, log_probs, credit, features = self._denoise(noise, embeds)
        by_step = torch.stack(log_probs, dim=1)
        if pools:
            by_step = self.policy.log_probs_of_noise(pooled_noise, self.family.keys)
            silent = [i for i in range(len(pooled_noise)) if not self.family.has_noise(i)]
            by_step[:, silent] = 0
        return Trajectory(
            prompts=prompts,
            prompt_ids=ids,
            prompt_embeds=embeds,
            negative_prompt_embeds=self.policy.negatives_of(embeds),
            timesteps=self.family.keys.repeat(len(prompts), 1),
            trail=torch.stack(trail, dim=1),
            log_probs=by_step,
            credit=credit,
            features=features,
        )

    def _denoise(self, noise: list[torch.Tensor], embeds: torch.Tensor) -> Denoised:
        """The trajectories from `noise`, a list that is emptied, and `embeds` [B, L, D]."""
        self.policy.set_steps()
        embeds = self.policy.embeds_for_sampling(embeds)
        key = embeds.shape, embeds.dtype
        if key not in self._chains:
            self._chains[key] = RolloutChain(self.family, self.config, embeds, self.stop)
        self._chains[key].bar = self._bar
        return self._chains[key].sample(noise, embeds)


def _share_first_noise(draws: Sequence[Draw], size: int) -> None:
    """Gives each `size` consecutive images the initial latents of the first of them."""
    own = torch.cat([draw.noise[0] for draw in draws])
    shared = own[::size].repeat_interleave(size, dim=0)[: len(own)]
    for draw, part in zip(draws, shared.split([len(draw.prompts) for draw in draws]), strict=True):
        draw.noise[0] = part


class Denoised(NamedTuple):
    """What a `RolloutChain` returns."""

    trail: list[torch.Tensor]  # T + 1 latents [B, C, H, W]
    log_probs: list[torch.Tensor]  # T, [B] each
    credit: torch.Tensor | None = None  # [B, T] with `train_image_credit='coca'`
    features: torch.Tensor | None = None  # [B, T, F] with `train_image_credit='value'`


class RolloutChain(DenoisingChain):
    """A denoising chain for embeddings of one shape, which keeps its buffers from rollout to rollout.

    A recorded CUDA graph reads the embeddings and the cached layers at the addresses that they had when it was
    recorded, so new values are copied into the same tensors.

    Args:
        stop: set from another thread to end the sampling at the next step.
    """

    def __init__(self, family: Family, config: DDPOConfig, embeds: torch.Tensor, stop: threading.Event) -> None:
        guidance_scale = config.sample_guidance_scale if config.rows_per_image == 2 else None
        super().__init__(family, embeds.clone(), guidance_scale, config.sample_eta)
        self.stop, self.eta = stop, config.sample_eta
        uses_cache = config.sample_cache and not cache_problem(family.denoiser)
        self.cache = UNetCache(family.denoiser) if uses_cache else None
        self.recorded = Recorded(self._step) if config.cuda_graphs else None
        # How each step's prediction of the final latents is found, for advantages of single steps.
        self.image_credit, self.predictions = config.train_image_credit, list[Prediction]()
        # Of each step: the final latents that it predicts, for CoCA's credit, or their features. Latents of all steps
        # are as large as the noise of the steps, which is freed meanwhile, so that the peak of memory does not rise.
        self._predicted: list[torch.Tensor] = []

    def sample(self, noise: list[torch.Tensor], embeds: torch.Tensor) -> Denoised:
        """The trajectories from the `noise` of a `Draw`, a list that is emptied, and `embeds`."""
        self.embeds.copy_(embeds)
        # those of the present size of images; where nothing has changed it is the same tensor
        table = self.family.table(self.eta, self.family.denoiser.device)
        # not in each rollout: the timesteps are read on the host, which waits for the device
        if self.image_credit != "none" and (table is not self.table or not self.predictions):
            self.predictions = self.family.predictions(self.eta)
        self.table = table
        self._predicted.clear()
        if self.cache is not None:
            self.cache.fill(self.embeds, self.family.keys)
        # reversed to be taken from the end of the list: each step's noise is freed once it is used
        noise.reverse()
        with self.cache.in_use() if self.cache is not None else nullcontext():
            trail, log_probs = self.run(noise.pop(), noise.pop)
        found = Denoised(trail, log_probs)
        if self.image_credit == "coca":
            found = found._replace(credit=step_credit(similarities(self._predicted, trail[-1])))
        elif self.image_credit == "value":
            found = found._replace(features=torch.stack(self._predicted, dim=1))
        self._predicted.clear()
        return found

    def take_step(
        self, rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, i: int
    ) -> ops.Step:
        step = self._cached_step(rows, latents, noise, t, i)
        if self.predictions:
            predicted = self.predictions[i].of(latents, step.latents, noise)
            self._predicted.append(predicted if self.image_credit == "coca" else predicted_features(predicted))
        return step

    def _cached_step(
        self, rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, i: int
    ) -> ops.Step:
        """A step with the cached layers and as a CUDA graph, where these are on."""
        if self.stop.is_set():
            raise Stopped
        if self.cache is not None:
            self.cache.at(i)
        if self.recorded is None:
            return self._step(rows, latents, noise, t)
        next_latents, log_probs, unet_input = self.recorded(rows, latents, noise, t)
        # The next replay overwrites the graph's outputs. The latents and log-probs are kept, so they are cloned;
        # `unet_input` is copied into the graph's inputs before the replay.
        return ops.Step(next_latents.clone(), log_probs.clone(), unet_input)

    def _step(self, rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> ops.Step:
        # a graph takes tensors only, and `predict` does not use the step's index here
        return super().take_step(rows, latents, noise, t, 0)


class PipelineRollout:
    """Samples by calling a `DDPOStableDiffusionPipeline` that has a `__call__` of its own, one batch at a time."""

    def __init__(self, config: DDPOConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy

    def batches(self, prompt_function: PromptFunction, iterations: int, batch_size: int) -> Iterator[SampledBatch]:
        """`iterations` sampling batches, one after the other, in groups as `Rollout.batches` has them."""
        pipeline = self.policy.pipeline
        groups = PromptGroups(prompt_function, self.config.sample_group_size)
        first_noise = self._first_noise()
        for _ in range(iterations):
            prompts, metadata = groups.draw(batch_size)
            shared = {}
            if self.config.sample_group_noise == "shared":
                shared["latents"] = torch.cat(list(islice(first_noise, batch_size)))
            ids, embeds = self.policy.embed_prompts(prompts)
            negative_embeds = self.policy.negatives_of(embeds)
            with self.policy.computing():
                output = pipeline(
                    prompt_embeds=embeds,
                    negative_prompt_embeds=negative_embeds,
                    num_inference_steps=self.config.sample_num_steps,
                    guidance_scale=self.config.sample_guidance_scale,
                    eta=self.config.sample_eta,
                    output_type="pt",
                    **self.policy.size,
                    **shared,
                )
            trajectory = Trajectory(
                prompts=prompts,
                prompt_ids=ids,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative_embeds,
                timesteps=self.policy.family.keys.repeat(batch_size, 1),
                trail=torch.stack(output.latents, dim=1).float(),
                log_probs=torch.stack(output.log_probs, dim=1).float(),
            )
            images = output.images
            if isinstance(images, torch.Tensor):
                # a reward function may convert them to NumPy, which has no bf16 and refuses a tensor with a graph
                images = images.detach().float()
            yield SampledBatch(trajectory, images, metadata)

    def _first_noise(self) -> Iterator[torch.Tensor]:
        """Yields the initial latents of each image, [1, C, H, W], the same ones for all images of a group."""
        while True:
            latents = randn_tensor((1, *self.policy.latent_shape), device=self.policy.device)
            yield from repeat(latents, self.config.sample_group_size)
