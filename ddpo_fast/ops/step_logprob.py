"""One denoising step as a Gaussian: its mean is linear in the latents and in the model's output.

B images, C H W latent. Everything is computed in fp32, or in fp64 if the latents are fp64: the model's output may be
half precision, what follows it never is.
"""

from __future__ import annotations

import math

import torch

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def guided(model_output: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: [2B, ...] (unconditional rows first) -> [B, ...] in fp32 or fp64, u + s (t - u)."""
    if model_output.dtype in (torch.float16, torch.bfloat16):
        model_output = model_output.float()
    uncond, text = model_output.chunk(2)
    return uncond + guidance_scale * (text - uncond)


def step_mean(model_output: torch.Tensor, latents: torch.Tensor, c_x: torch.Tensor, c_m: torch.Tensor) -> torch.Tensor:
    """`c_x * latents + c_m * model_output`, [B, C, H, W]; the coefficients are [B]."""
    return _per_image(c_x, latents) * latents + _per_image(c_m, latents) * model_output.to(latents.dtype)


def take_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    c_x: torch.Tensor,
    c_m: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """The next latents, `mean + sigma * noise`: [B, C, H, W] in the latents' dtype."""
    return step_mean(model_output, latents, c_x, c_m) + _per_image(sigma, latents) * noise.to(latents.dtype)


def step_logprob(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    next_latents: torch.Tensor,
    c_x: torch.Tensor,
    c_m: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """Log-density of `next_latents` after a step from `latents`, averaged over the latent's elements: [B].

    `mean(-(x' - mean)^2 / (2 sigma^2)) - log sigma - log sqrt(2 pi)`. TRL averages; the paper's density (arXiv
    2305.13301, eq. 4) is the sum, so ratios here are the paper's to the power 1/D. `next_latents` carry no gradient.
    """
    difference = next_latents.detach() - step_mean(model_output, latents, c_x, c_m)
    scaled = difference.square() / _per_image(2 * sigma.square(), latents)
    return -scaled.flatten(1).mean(1) - sigma.log() - LOG_SQRT_2PI


def _per_image(coefficient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))
