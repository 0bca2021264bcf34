"""The denoising step as a Gaussian whose mean is linear in the latents and in the model's output, in plain PyTorch.

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
    return per_image(c_x, latents) * latents + per_image(c_m, latents) * model_output.to(latents.dtype)


def take_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    c_x: torch.Tensor,
    c_m: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """The next latents, `mean + sigma * noise`: [B, C, H, W] in the latents' dtype."""
    return step_mean(model_output, latents, c_x, c_m) + per_image(sigma, latents) * noise.to(latents.dtype)


def log_density(difference: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean log-density of a Gaussian with std `sigma` [B] at `difference` [B, C, H, W] from its mean: [B]."""
    scaled = difference.square() / per_image(2 * sigma.square(), difference)
    return -scaled.flatten(1).mean(1) - sigma.log() - LOG_SQRT_2PI


def score_step(
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
    return log_density(next_latents.detach() - step_mean(model_output, latents, c_x, c_m), sigma)


def per_image(coefficient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A coefficient [B] (or [1]) that multiplies `like` [B, ...]."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def table_rows(
    table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_x, c_m, sigma), each [B], of `timesteps` ([B] or [] for all) in the dtype of the latents `like`."""
    # `index_select`, as indexing by a tensor without dimensions would wait for its value
    rows = table.index_select(0, timesteps.reshape(-1)).to(like.dtype).expand(len(like), 3)
    c_x, c_m, sigma = rows.unbind(1)
    return c_x, c_m, sigma


def check_step(name: str, model_output: torch.Tensor, latents: torch.Tensor, guidance_scale: float | None) -> None:
    """Raises `ValueError` unless an output of the UNet fits the latents."""
    if latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents are {latents.dtype} but must be float32: a log-prob is that of the stored latents")
    if not model_output.is_floating_point():
        raise ValueError(f"{name} is {model_output.dtype} but must be float16, bfloat16 or float32")
    expected = (len(latents) * (1 if guidance_scale is None else 2), *latents.shape[1:])
    if model_output.shape != expected:
        kind = "without guidance" if guidance_scale is None else "with guidance"
        raise ValueError(f"{name} has shape {tuple(model_output.shape)} but must have {expected} {kind}")


def check_table(table: torch.Tensor, timesteps: torch.Tensor, latents: torch.Tensor) -> None:
    """Raises `ValueError` unless the coefficients and the timesteps fit the latents."""
    if table.ndim != 2 or table.shape[1] != 3 or table.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)} but must be float32 [K, 3]")
    if timesteps.shape not in ((), (len(latents),)) or timesteps.dtype != torch.int64:
        raise ValueError(
            f"timesteps are {timesteps.dtype} {tuple(timesteps.shape)} but must be int64 [] or [{len(latents)}]"
        )
