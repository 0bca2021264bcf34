"""The policy: a UNet whose output gives the mean of each denoising step, a Gaussian with a known density.

Sampling and training both call the UNet through this module.

Shapes: R rows of a UNet call, B images, N (image, timestep) pairs, C H W latent, L tokens, D width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ddpo_fast import ops
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import Engine
from ddpo_fast.families import Family, family_of_pipeline
from ddpo_fast.ops.gaussian import LOG_SQRT_2PI, table_rows
from ddpo_fast.prompt_embeddings import PromptEmbeddings
from ddpo_fast.prompt_store import PromptStore, key_of
from ddpo_fast.unet import shares_halves


def ratio_clip_range(config: DDPOConfig, family: Family) -> float:
    """`train_clip_range` in units of the ratio, which is what the loss clips.

    With `train_clip_unit='step'` it is set in standard deviations of a step. A log-prob is a mean over a latent's D
    elements: if the step's mean moves by `delta` standard deviations (root mean square), in a direction that does not
    depend on the step's noise, then the log-ratio is normal with a standard deviation of `delta / sqrt(D)` and a mean
    of `-delta^2 / 2`. The mean is the smaller of the two up to `delta = 2 / sqrt(D)`; there a range of
    `train_clip_range / sqrt(D)` clips the same share of the ratios for latents of any size. Further moves are clipped
    sooner in larger latents, by the mean.
    """
    if config.train_clip_unit == "ratio":
        return config.train_clip_range
    channels, height, width = family.latent_shape
    pool = config.train_pool_latents
    return config.train_clip_range / math.sqrt(channels * (height // pool) * (width // pool))


class Policy:
    """A pipeline's UNet as a run calls it: with the run's negative prompt, guidance, noise table and precision.

    Args:
        pipeline: a `DDPOStableDiffusionPipeline`.
        engine: provides the trained weights in the precision that the UNet computes in.
        prompt_folder: where `embed_prompts_once` keeps embeddings.
    """

    def __init__(
        self,
        pipeline: Any,
        config: DDPOConfig,
        engine: Engine,
        device: torch.device,
        prompt_folder: Path | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.engine = engine
        self.device = device
        self.family = family_of_pipeline(pipeline)
        self.family.use_settings(config)
        store = None
        if config.embed_prompts_once and prompt_folder is not None:
            key = key_of(self.family.text_encoders.values(), f"{config.mixed_precision} {config.quantize_frozen}")
            store = PromptStore(prompt_folder, key)
        self.embed_prompts = PromptEmbeddings(self.family, device, config.sample_cache, store)
        # [1, L, D]
        self.negative_embeds = self.embed_prompts.negative(config.negative_prompts)

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        return self.family.latent_shape

    def use_size(self, height: int | None, width: int | None) -> None:
        """Makes images of another size the present ones: those of the next epoch, in pixels."""
        self.family.use_size(height, width)

    @property
    def size(self) -> dict[str, int]:
        """The arguments of a pipeline's call for images of another size than the model's own."""
        return _arguments(self.family.height, self.family.width)

    @property
    def largest_latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of the run's largest images."""
        return self.family.latent_shape_of(self.family.parts_configs(), *self.config.largest_size)

    def set_steps(self) -> None:
        """Makes the sampled steps those of the run, for images of the present size."""
        family, steps = self.family, self.config.sample_num_steps
        if family.num_steps != steps or family.keys.device.type != self.device.type:
            # only if they differ: this copies the timesteps to the device, and the host waits for that
            family.set_steps(steps, self.device)

    @property
    def noise_table(self) -> Tensor:
        """(c_x, c_m, sigma, credit) of the step from each timestep (see `Family.table`): [K, 4]."""
        return self.family.table(self.config.sample_eta, self.device, self.config.step_credit)

    @property
    def clip_range(self) -> float:
        """The range of the ratio's clip, in units of the ratio."""
        return ratio_clip_range(self.config, self.family)

    def credited(self, log_ratios: Tensor, timesteps: Tensor) -> Tensor:
        """Log-ratios [N] times the credit of their steps, as `ops.ppo_loss` takes them; `timesteps` are [N]."""
        if self.config.step_credit == "none":
            return log_ratios
        return self.noise_table[:, 3].take(timesteps) * log_ratios

    @property
    def loss_table(self) -> Tensor:
        """`noise_table` for pooled latents: their noise is a mean of k^2 independent values, so sigma / k."""
        pool = self.config.train_pool_latents
        if pool == 1:
            return self.noise_table
        # A tensor made of Python's numbers would be copied from the host at each UNet call, and no CUDA graph could
        # record that.
        c_x, c_m, sigma, credit = self.noise_table.unbind(1)
        return torch.stack([c_x, c_m, sigma / pool, credit], dim=1)

    def pooled(self, latents: Tensor) -> Tensor:
        """Means over squares of `train_pool_latents` pixels: [R, C, H, W] -> [R, C, H / k, W / k] in fp32 or fp64.

        A denoising step is linear, so pooled latents take the same step with the pooled output, and the step's density
        is again a Gaussian (`loss_table`): the marginal of the step's for these means.
        """
        pool = self.config.train_pool_latents
        if pool == 1:
            return latents
        # a mean that is rounded to half precision would be the largest error of the log-ratio
        return avg_pool2d(latents if latents.dtype == torch.float64 else latents.float(), pool)

    def log_probs_of_noise(self, pooled_noise: Sequence[Tensor], timesteps: Tensor) -> Tensor:
        """Log-probs of pooled steps, [B, T], from their noise, T tensors [B, C, H / k, W / k], at `timesteps` [T]."""
        # a mean of k^2 standard normal values has the standard deviation 1 / k
        pool = self.config.train_pool_latents
        squares = [(pool * noise).square().flatten(1).mean(1) for noise in pooled_noise]
        sigma = self.loss_table[timesteps, 2]
        return -torch.stack(squares, dim=1) / 2 - sigma.log() - LOG_SQRT_2PI

    def step_weights(self, timesteps: Tensor) -> Tensor:
        """`credit * |c_m| / sigma` of the steps from `timesteps` [N], pooled as in the loss: [N].

        How far a step's mean moves, in standard deviations of the step and times the step's credit, where the (pooled)
        output moves by 1. 0 for a step without noise, which has no density.
        """
        rows = self.loss_table[timesteps]
        weights = rows[:, 3] * rows[:, 1].abs() / rows[:, 2]
        return torch.where(rows[:, 2] > 0, weights, 0.0)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A context in which the networks compute in the run's precision.

        The UNet has the engine's copies of the trained weights. A pipeline's own autocast, if it has one, is on.
        """
        with self.engine.computing(), (self.pipeline.autocast or nullcontext)():
            yield

    def sampling(self) -> AbstractContextManager[None]:
        """A context in which the UNet has the weights to sample with: with `ema_sampling` their moving average."""
        return self.engine.computing_averages() if self.config.ema_sampling else nullcontext()

    def negatives_of(self, embeds: Tensor) -> Tensor:
        """The negative prompt's embedding for each of `embeds` [B, L, D].

        Without tokens, [B, 0, D], for a network that has no use for it: FLUX's would take 4 MB an image.
        """
        return self.negative_embeds.expand_as(embeds) if self.family.guides_by_rows else embeds[:, :0]

    @torch.no_grad()
    def embeds_for_sampling(self, embeds: Tensor) -> Tensor:
        """A sampling call's embeddings from those of its prompts [B, L, D], in the UNet's precision.

        [2B, L, D] with guidance, where the negative prompt's come first; else [B, L, D].
        """
        if self.config.rows_per_image == 2:
            embeds = torch.cat([self.negative_embeds.expand_as(embeds), embeds])
        return embeds.to(self.unet.dtype)

    def output(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The UNet's output for N pairs as training calls it, [N, C, H, W], or [2N, C, H, W] with guidance in training.

        Latents are [N, C, H, W], timesteps [N], and embeds have as many rows as the output, the negative prompts first.
        """
        # guidance needs each pair twice: a row with the negative prompt and a row with the prompt. A UNet that shares
        # halves makes the second row itself.
        copies = self.config.rows_per_pair
        with self.computing():
            if copies == 2 and not shares_halves(self.unet):
                latents, timesteps = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
            return self.family.call(latents.to(self.unet.dtype), timesteps, embeds.to(self.unet.dtype))

    def log_prob(self, latents: Tensor, timesteps: Tensor, next_latents: Tensor, embeds: Tensor) -> Tensor:
        """Log-density of the steps from `latents` to `next_latents` [N, C, H, W] by the pipeline's own step, [N].

        Averaged over the elements of a latent, as in TRL, and not summed, and without the step's credit. Carries a
        gradient to the UNet's weights.
        """
        output = self.output(latents, timesteps, embeds)
        if self.config.guides_training:
            output = ops.guided(output, self.config.sample_guidance_scale)
        if self.config.train_pool_latents > 1:
            output, latents, next_latents = self.pooled(output), self.pooled(latents), self.pooled(next_latents)
            c_x, c_m, sigma, _ = table_rows(self.loss_table, timesteps, latents)
            return ops.score_step(output, latents, next_latents, c_x, c_m, sigma)
        scored = self.pipeline.scheduler_step(
            output, timesteps, latents, eta=self.config.sample_eta, prev_sample=next_latents
        )
        assert scored.log_probs is not None, "sample_eta is above 0, so every step has a density"
        return scored.log_probs

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """One image per prompt from noise that `seed` fixes: (images [B, 3, height, width], latents [B, C, H, W]).

        Where the run has several sizes, they are of the first, whichever is the present one.
        With a seed for each image its noise does not depend on the others of the batch.
        """
        self.unet.eval()
        negative = self.family.negatives(self.config.negative_prompts, len(prompts))
        given: dict[str, Any] = {"prompt": list(prompts), "negative_prompt": negative}
        seeds = [seed] if isinstance(seed, int) else seed
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        with self.computing():
            if self.embed_prompts.store is not None:
                given = {"prompt_embeds": self.embed_prompts(prompts)[1]}
                if self.config.rows_per_image == 2:
                    given["negative_prompt_embeds"] = self.negative_embeds.expand_as(given["prompt_embeds"])
            drawn = self.pipeline(
                **given,
                num_inference_steps=self.config.sample_num_steps,
                guidance_scale=self.config.sample_guidance_scale,
                eta=self.config.sample_eta,
                generator=generators[0] if isinstance(seed, int) else generators,
                output_type="pt",
                **_arguments(*self.config.image_sizes[0]),
            )
        return drawn.images.detach().float(), drawn.latents[-1]


def _arguments(height: int | None, width: int | None) -> dict[str, int]:
    """A pipeline's arguments for images of a size in pixels; none for a side of the model's own."""
    return {name: pixels for name, pixels in (("height", height), ("width", width)) if pixels is not None}
