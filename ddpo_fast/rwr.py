"""Reward-weighted regression: the denoising loss of diffusion models on an epoch's images, weighted by their rewards.

Peters and Schaal (2007) and Peng et al. (arXiv 1910.00177) maximise the mean of exp(beta r) log p over samples. For
diffusion models, DDPO (arXiv 2305.13301, sections 4.2 and 5) takes the denoising loss for -log p, which bounds it: this
is what its authors compare with DDPO. The formulas are those of github.com/jannerm/ddpo.

Shapes: B images of all processes, b images of a training batch with S timesteps each, C H W latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.config import DDPOConfig
from ddpo_fast.trajectory import TrainingBatch, Trajectory


def image_weights(prompts: Sequence[str], rewards: np.ndarray, config: DDPOConfig) -> np.ndarray:
    """The weights [B] of images from their rewards [B], at least 0 and with a mean of 1.

    `B softmax(rwr_beta * rewards)`, so that beta has the unit of 1 / reward: an image that is 1 / beta better weighs
    e = 2.7 times as much. With `rwr_top_fraction` f instead 1 / f for the best f of the images, of equal ones the
    first, and 0 for the others. With `rwr_per_prompt` both are over the images of each prompt alone.
    """
    values = rewards.astype(np.float64)
    if not config.rwr_per_prompt:
        return _weights(values, config).astype(rewards.dtype)
    weights = np.empty_like(values)
    names = np.asarray(prompts, dtype=object)
    for prompt in dict.fromkeys(prompts):
        mine = names == prompt
        weights[mine] = _weights(values[mine], config)
    return weights.astype(rewards.dtype)


def _weights(rewards: np.ndarray, config: DDPOConfig) -> np.ndarray:
    count = len(rewards)
    if config.rwr_top_fraction > 0:
        # at least one image, and the mean is 1 also where the fraction is of no whole number of images
        kept = max(1, round(config.rwr_top_fraction * count))
        weights = np.zeros(count)
        weights[np.argsort(-rewards, kind="stable")[:kept]] = count / kept
        return weights
    # the largest reward is subtracted to keep exp from overflow
    powers = np.exp(config.rwr_beta * (rewards - rewards.max()))
    return count * powers / powers.sum()


def noised_batches(trajectory: Trajectory, scheduler: Any, config: DDPOConfig) -> Iterator[Iterator[TrainingBatch]]:
    """For each inner epoch, all images in shuffled training batches, each image noised anew at S random timesteps.

    The images' weights take the place of their advantages. The permutation and the noise are drawn from the default
    generator of the trajectory's device, as the batches are asked for.
    """
    device, count = trajectory.timesteps.device, len(trajectory.timesteps)
    # a copy, as diffusers' `add_noise` moves the scheduler's own tensor, from which the noise table's key is read
    alphas = scheduler.alphas_cumprod.to(device=device, dtype=trajectory.trail.dtype, copy=True)
    for _ in range(config.train_num_inner_epochs):
        rows = torch.randperm(count, device=device).split(config.train_batch_size)
        yield (_noised(trajectory, mine, alphas, scheduler.config.prediction_type, config) for mine in rows)


def _noised(
    trajectory: Trajectory, rows: Tensor, alphas: Tensor, prediction_type: str, config: DDPOConfig
) -> TrainingBatch:
    """The images `rows` [b] at S timesteps each: noised in `latents`, and what the UNet should say in `next_latents`.

    By the forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t = `alphas[t]`, where x_0 are the latents
    that were decoded to the image. Timesteps are uniform over those that the model was made with, sampled or not.
    """
    assert trajectory.advantages is not None, "training needs the images' weights: call with_advantages first"
    shape = len(rows), config.num_train_timesteps
    final = trajectory.trail[rows, -1][:, None]
    timesteps = torch.randint(len(alphas), shape, device=rows.device)
    noise = torch.randn((*shape, *final.shape[2:]), device=rows.device, dtype=final.dtype)
    a = alphas.take(timesteps)[..., None, None, None]
    latents = a.sqrt() * final + (1 - a).sqrt() * noise
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = a.sqrt() * noise - (1 - a).sqrt() * final
    else:
        target = final.expand_as(noise)
    flags = trajectory.has_advantage
    return TrainingBatch(
        prompt_embeds=trajectory.prompt_embeds[rows],
        negative_prompt_embeds=trajectory.negative_prompt_embeds[rows],
        timesteps=timesteps,
        latents=latents,
        next_latents=target,
        # not used: the loss knows no log-prob
        log_probs=latents.new_zeros(shape),
        advantages=trajectory.advantages[rows],
        has_advantage=None if flags is None else flags[rows.cpu()],
    )
