"""The denoising step as a Gaussian, in plain PyTorch: its mean is `c_x * latents + c_m * model_output`.

Shapes: B images; C, H, W channels, height and width of a latent. `ddpo_fast/ddim.py` derives the coefficients.
Everything is computed in fp32, or in fp64 if the latents are fp64. The model's output may be in half precision and is
converted when it is read: with the default clip range of 1e-4, a log-prob needs far more digits than the 8 bits of bf16
or the 11 bits of fp16 hold.
"""

from __future__ import annotations

import math

import torch

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def guided(model_output: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance, `u + s (t - u)`: [2B, ...], unconditional rows u first -> [B, ...], fp32 or fp64."""
    if model_output.dtype in (torch.float16, torch.bfloat16):
        model_output = model_output.float()
    uncond, text = model_output.chunk(2)
    return uncond + guidance_scale * (text - uncond)


def guided_backward(grad: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """The gradient by the model's output, [2B, ...] with guidance, from that by the guided output, [B, ...].

    `g = u + s (t - u)`, so that u's is (1 - s) times and t's is s times the gradient by g.
    """
    if guidance_scale is None:
        return grad
    return torch.cat([(1 - guidance_scale) * grad, guidance_scale * grad])


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
    """The log-density of a Gaussian with std `sigma` [B], averaged over the elements: [B].

    `difference` [B, C, H, W] is the distance from the Gaussian's mean.
    """
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
    """The log-prob of `next_latents` x' after a step from `latents`: [B], averaged over the latent's D elements.

    `mean_d(-(x' - mean)^2 / (2 sigma^2)) - log sigma - log sqrt(2 pi)`. The density of the whole latent (DDPO, arXiv
    2305.13301) is the sum over d. TRL takes the mean, and its default clip range of 1e-4 fits the mean: a ratio here is
    the paper's ratio to the power 1/D, with D = 16,384 for Stable Diffusion. No gradient flows to `next_latents`.
    """
    return log_density(next_latents.detach() - step_mean(model_output, latents, c_x, c_m), sigma)


def per_image(coefficient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes a coefficient [B] (or [1]) so that it multiplies `like` [B, ...] image by image."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def table_rows(
    table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Looks up (c_x, c_m, sigma, credit), [B] each, for `timesteps`, [B] or [] (for all), in the dtype of `like`."""
    # `index_select` and not `[]`: indexing by a 0-dimensional tensor copies its value to the host, which makes the host
    # wait for all work that is queued on the device
    rows = table.index_select(0, timesteps.reshape(-1)).to(like.dtype).expand(len(like), 4)
    c_x, c_m, sigma, credit = rows.unbind(1)
    return c_x, c_m, sigma, credit


def check_step(name: str, model_output: torch.Tensor, latents: torch.Tensor, guidance_scale: float | None) -> None:
    """Raises `ValueError` unless the shapes and dtypes of a UNet's output and the latents fit each other."""
    if latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents are {latents.dtype} but must be float32: a log-prob is that of the stored latents")
    if not model_output.is_floating_point():
        raise ValueError(f"{name} is {model_output.dtype} but must be float16, bfloat16 or float32")
    expected = (len(latents) * (1 if guidance_scale is None else 2), *latents.shape[1:])
    if model_output.shape != expected:
        kind = "without guidance" if guidance_scale is None else "with guidance"
        raise ValueError(f"{name} has shape {tuple(model_output.shape)} but must have {expected} {kind}")


def check_table(table: torch.Tensor, timesteps: torch.Tensor, latents: torch.Tensor) -> None:
    """Raises `ValueError` unless the shapes and dtypes of the table and the timesteps fit the latents."""
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)} but must be float32 [K, 4]")
    if timesteps.shape not in ((), (len(latents),)) or timesteps.dtype != torch.int64:
        raise ValueError(
            f"timesteps are {timesteps.dtype} {tuple(timesteps.shape)} but must be int64 [] or [{len(latents)}]"
        )
