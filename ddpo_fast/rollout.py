"""An epoch's images: prompts and noise drawn in TRL's order, sampling batches drawn together, each handed on decoded.

Shapes: B images of a sampling batch or of the batches drawn together, T denoising steps, C H W latent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ddpo_fast import ops, sampler
from ddpo_fast.batch_sizes import Sizes
from ddpo_fast.config import DDPOConfig
from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.prompt_embeddings import PromptEmbeddings
from ddpo_fast.prompts import PromptFunction, draw_prompts
from ddpo_fast.sample_ahead import Stopped
from ddpo_fast.trajectory import Trajectory
from ddpo_fast.unet import UNetCache, cache_problem


@dataclass(frozen=True)
class Draw:
    """All that is random about a sampling batch."""

    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    noise: list[torch.Tensor]  # T + 1 of [B, C, H, W], the initial latents first


# trajectories, images [B, 3, height, width] in fp32, the prompts' metadata
Batch = tuple[Trajectory, torch.Tensor, tuple[Any, ...]]


class Rollout:
    """Samples from a diffusers pipeline `pipe`, as `DefaultDDPOStableDiffusionPipeline` has one.

    Args:
        embed: the text embeddings.
        negative_embed: [1, L, D], those of the negative prompt.
        computing: the context of the networks' calls.
        sizes: how many batches are drawn together.
    """

    def __init__(
        self,
        pipe: Any,
        config: DDPOConfig,
        embed: PromptEmbeddings,
        negative_embed: torch.Tensor,
        computing: Callable[[], AbstractContextManager[Any]],
        sizes: Sizes,
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.embed = embed
        self.negative_embed = negative_embed
        self.computing = computing
        self.sizes = sizes
        # set from another thread to be called off at the next step
        self.stop = threading.Event()
        self._chains: dict[tuple[Any, ...], Chain] = {}

    def batches(self, prompt_function: PromptFunction, iterations: int, batch_size: int) -> Iterator[Batch]:
        """`iterations` batches, one after the other; all prompts and noise are drawn before this returns.

        A reward may use the same random generators, and the prompt function may be bound to its thread.
        """
        draws = [self.draw(prompt_function, batch_size) for _ in range(iterations)]
        if self.embed.remembers:
            # new prompts go to the device before anything is queued there
            with self.computing():
                self.embed([prompt for draw in draws for prompt in draw.prompts])
        return self._sampled(draws)

    def _sampled(self, draws: list[Draw]) -> Iterator[Batch]:
        for start in range(0, len(draws), self.sizes.merged_batches):
            together = draws[start : start + self.sizes.merged_batches]
            for draw, sampled in zip(together, self.sample(together), strict=True):
                yield *sampled, draw.metadata

    def draw(self, prompt_function: PromptFunction, batch_size: int) -> Draw:
        """Draws for a batch what TRL draws, in its order: the prompts, the latents, the noise of each step."""
        prompts, metadata = draw_prompts(prompt_function, batch_size)
        shape = (batch_size, *sampler.latent_shape(self.pipe.unet))
        noise = [randn_tensor(shape, device=self.embed.device) for _ in range(self.config.sample_num_steps + 1)]
        return Draw(prompts, metadata, noise)

    def sample(self, draws: Sequence[Draw]) -> Iterator[tuple[Trajectory, torch.Tensor]]:
        """The trajectories and images [B, 3, height, width] of batches that are denoised together."""
        for trajectory in self._trajectories(draws).split([len(draw.prompts) for draw in draws]):
            with torch.no_grad(), self.computing():
                images = sampler.decode(self.pipe, trajectory.trail[:, -1], "pt")
            yield trajectory, images

    @torch.no_grad()
    def _trajectories(self, draws: Sequence[Draw]) -> Trajectory:
        prompts = tuple(prompt for draw in draws for prompt in draw.prompts)
        noise = [torch.cat(step) for step in zip(*(draw.noise for draw in draws), strict=True)]
        for draw in draws:
            # it becomes latents, and both would be as large as all of the rollout's
            draw.noise.clear()
        with self.computing():
            ids, embeds = self.embed(prompts)
            trail, log_probs = self._denoise(noise, embeds)
        return Trajectory(
            prompts=prompts,
            prompt_ids=ids,
            prompt_embeds=embeds,
            negative_prompt_embeds=self.negative_embed.expand_as(embeds),
            timesteps=self.pipe.scheduler.timesteps.repeat(len(prompts), 1),
            trail=torch.stack(trail, dim=1),
            log_probs=torch.stack(log_probs, dim=1),
        )

    def _denoise(
        self, noise: list[torch.Tensor], embeds: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        scheduler, device = self.pipe.scheduler, self.embed.device
        if (
            scheduler.num_inference_steps != self.config.sample_num_steps
            or scheduler.timesteps.device.type != device.type
        ):
            # it copies to the device, for which the host waits
            scheduler.set_timesteps(self.config.sample_num_steps, device=device)
        if self.config.sample_guidance_scale > 1:
            embeds = torch.cat([self.negative_embed.expand_as(embeds), embeds])
        embeds = embeds.to(self.pipe.unet.dtype)
        key = embeds.shape, embeds.dtype
        if key not in self._chains:
            self._chains[key] = Chain(self.pipe, self.config, embeds, self.stop)
        return self._chains[key].run(noise, embeds)


class Chain:
    """The denoising chain for one number of rows, with what stays in place from rollout to rollout.

    A recorded step reads the embeddings and the cached layers where they were when it was recorded.
    """

    def __init__(self, pipe: Any, config: DDPOConfig, embeds: torch.Tensor, stop: threading.Event) -> None:
        self.pipe = pipe
        self.stop = stop
        self.guidance = config.sample_guidance_scale if config.sample_guidance_scale > 1 else None
        self.embeds = embeds.clone()
        # a compiled UNet would be compiled anew for every rollout's answers
        uses_cache = config.sample_cache and not config.compile_unet and not cache_problem(pipe.unet)
        self.cache = UNetCache(pipe.unet) if uses_cache else None
        self.recorded = Recorded(self._step) if config.cuda_graphs else None
        self._sampler_step = sampler.step_taker(pipe, self._predict, self.guidance, 0.0, config.sample_eta)

    def run(self, noise: list[torch.Tensor], embeds: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(T + 1 latents [B, C, H, W], T log-probs [B]) from T + 1 of noise, the initial latents first; empties it."""
        self.embeds.copy_(embeds)
        if self.cache is not None:
            self.cache.fill(self.embeds, self.pipe.scheduler.timesteps)
        # taken from the end, and freed when it has been added
        noise.reverse()
        latents = noise.pop()
        with self.cache.in_use() if self.cache is not None else nullcontext():
            copies = 1 if self.guidance is None else 2
            return sampler.denoise(self.pipe, self._take_step, latents, lambda _i: noise.pop(), copies)

    def _take_step(
        self, rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, i: int
    ) -> ops.Step:
        if self.stop.is_set():
            raise Stopped
        if self.cache is not None:
            self.cache.at(i)
        if self.recorded is None:
            return self._step(rows, latents, noise, t)
        following, log_probs, unet_input = self.recorded(rows, latents, noise, t)
        # the next replay writes over what stays
        return ops.Step(following.clone(), log_probs.clone(), unet_input)

    def _step(self, rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> ops.Step:
        return self._sampler_step(rows, latents, noise, t, 0)

    def _predict(self, rows: torch.Tensor, t: torch.Tensor, _i: int) -> torch.Tensor:
        return self.pipe.unet(rows, t, encoder_hidden_states=self.embeds, return_dict=False)[0]


class PipelineRollout:
    """Samples by the call of a `DDPOStableDiffusionPipeline` that has one of its own, a batch at a time."""

    def __init__(
        self,
        pipeline: Any,
        config: DDPOConfig,
        embed: PromptEmbeddings,
        negative_embed: torch.Tensor,
        computing: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.embed = embed
        self.negative_embed = negative_embed
        self.computing = computing

    def batches(self, prompt_function: PromptFunction, iterations: int, batch_size: int) -> Iterator[Batch]:
        """`iterations` batches, one after the other."""
        for _ in range(iterations):
            prompts, metadata = draw_prompts(prompt_function, batch_size)
            ids, embeds = self.embed(prompts)
            negative_embeds = self.negative_embed.expand_as(embeds)
            with self.computing():
                output = self.pipeline(
                    prompt_embeds=embeds,
                    negative_prompt_embeds=negative_embeds,
                    num_inference_steps=self.config.sample_num_steps,
                    guidance_scale=self.config.sample_guidance_scale,
                    eta=self.config.sample_eta,
                    output_type="pt",
                )
            trajectory = Trajectory(
                prompts=prompts,
                prompt_ids=ids,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative_embeds,
                timesteps=self.pipeline.scheduler.timesteps.repeat(batch_size, 1),
                trail=torch.stack(output.latents, dim=1).float(),
                log_probs=torch.stack(output.log_probs, dim=1).float(),
            )
            yield trajectory, _as_fp32(output.images), metadata


def _as_fp32(images: Any) -> Any:
    """A pipeline of one's own may give its network's precision, which NumPy may not know, or a graph."""
    return images.detach().float() if isinstance(images, torch.Tensor) else images
