"""One denoising step in one op: guidance, the DDIM step, its log-prob, and the UNet's next input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpo_fast.ops.backend import Op, csrc_kernel, triton_kernel
from ddpo_fast.ops.gaussian import (
    check_step,
    check_table,
    guided,
    guided_backward,
    log_density,
    per_image,
    step_mean,
    table_rows,
)
from ddpo_fast.ops.operands import dense_rows, laid_out_as


class Step(NamedTuple):
    """What `step_logprob` returns: the next latents [B, C, H, W] in the latents' dtype, their log-prob [B], and the
    UNet's next input [B or 2B, C, H, W] in the UNet's dtype and layout."""

    latents: Tensor
    log_probs: Tensor
    unet_input: Tensor


def step_logprob(
    model_output: Tensor,
    latents: Tensor,
    noise: Tensor,
    table: Tensor,
    timesteps: Tensor,
    guidance_scale: float | None = None,
) -> Step:
    """`x' = c_x x + c_m m + sigma noise`, and the log-prob of x' (`gaussian.score_step`).

    The log-prob is computed from x' as stored, after rounding, and not from the noise. Training computes the log-prob
    of the stored latents, and must get the same value while the policy has not changed.

    Args:
        model_output: [B, C, H, W], or [2B, C, H, W] with guidance, unconditional rows first; fp16, bf16 or fp32,
            contiguous or channels_last.
        latents, noise: [B, C, H, W] fp32 (fp64: everything is fp64).
        table: [K, 4] fp32, (c_x, c_m, sigma, credit) of every timestep; only the loss uses the credit.
        timesteps: [B] or [] int64 on the device, rows of `table`.
        guidance_scale: s in `m = u + s (t - u)`, None for no guidance.

    Model output and latents may require a gradient. The gradient of the log-prob is taken at a fixed x', although x'
    depends on both: the policy gradient needs the derivative of the density at the sampled x'.

    Raises `ValueError` for shapes and dtypes that do not fit.
    """
    check_step("model_output", model_output, latents, guidance_scale)
    if noise.shape != latents.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)} but latents have {tuple(latents.shape)}")
    check_table(table, timesteps, latents)
    wide = torch.float64 in (model_output.dtype, latents.dtype)
    return Step(
        *FORWARD(
            dense_rows(model_output.to(latents.dtype) if wide else model_output),
            latents.contiguous(),
            noise.to(latents.dtype).contiguous(),
            table.to(latents.dtype).contiguous(),
            timesteps.contiguous(),
            guidance_scale,
        )
    )


# the definition


def _reference(
    model_output: Tensor, latents: Tensor, noise: Tensor, table: Tensor, timesteps: Tensor, guidance_scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    c_x, c_m, sigma, _ = table_rows(table, timesteps, latents)
    combined = model_output if guidance_scale is None else guided(model_output, guidance_scale)
    mean = step_mean(combined, latents, c_x, c_m)
    following = mean + per_image(sigma, latents) * noise
    rows = torch.cat([following] * (1 if guidance_scale is None else 2)).to(model_output.dtype)
    return following, log_density(following - mean, sigma), laid_out_as(model_output, rows)


def _reference_backward(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    table: Tensor,
    timesteps: Tensor,
    guidance_scale: float | None,
    grad_next_latents: Tensor,
    grad_log_probs: Tensor,
    grad_next_input: Tensor,
) -> tuple[Tensor, Tensor]:
    c_x, c_m, sigma, _ = table_rows(table, timesteps, latents)
    combined = model_output if guidance_scale is None else guided(model_output, guidance_scale)
    difference = next_latents - step_mean(combined, latents, c_x, c_m)
    # d log_prob / d mean = difference / (sigma^2 D), from the mean over d of -difference^2 / (2 sigma^2)
    slope = grad_log_probs / (sigma.square() * latents.shape[1:].numel())
    grad_input = grad_next_input.to(latents.dtype)
    if guidance_scale is not None:
        # the next input holds the next latents twice
        uncond, text = grad_input.chunk(2)
        grad_input = uncond + text
    grad_mean = grad_next_latents + per_image(slope, latents) * difference + grad_input
    grad_output = guided_backward(per_image(c_m, latents) * grad_mean, guidance_scale)
    grad_latents = per_image(c_x, latents) * grad_mean
    return laid_out_as(model_output, grad_output), grad_latents


# allocate the kernels' outputs; also the ops' fake implementations


def _empty(model_output: Tensor, latents: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = torch.empty(len(latents), dtype=latents.dtype, device=latents.device)
    return torch.empty_like(latents), log_probs, torch.empty_like(model_output)


def _empty_backward(model_output: Tensor, latents: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(model_output), torch.empty_like(latents)


FORWARD, BACKWARD = (
    Op(name, reference, empty, triton_kernel(name, empty), csrc_kernel(name, empty))
    for name, reference, empty in (
        ("step_logprob", _reference, _empty),
        ("step_logprob_backward", _reference_backward, _empty_backward),
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    model_output, latents, _, table, timesteps, ctx.guidance_scale = inputs
    ctx.save_for_backward(model_output, latents, output[0], table, timesteps)


def _differentiate(ctx: Any, grad_next_latents: Tensor, grad_log_probs: Tensor, grad_next_input: Tensor) -> Any:
    model_output, latents, next_latents, table, timesteps = ctx.saved_tensors
    grad_output, grad_latents = BACKWARD(
        model_output,
        latents,
        next_latents,
        table,
        timesteps,
        ctx.guidance_scale,
        grad_next_latents.contiguous(),
        grad_log_probs.contiguous(),
        laid_out_as(model_output, grad_next_input),
    )
    return grad_output, grad_latents, None, None, None, None


FORWARD.register_autograd(_differentiate, setup_context=_save)
