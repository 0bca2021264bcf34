"""One denoising step in one launch: guidance, the DDIM step, its log-prob, and the UNet's next input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ddpo_fast_kernels.gaussian import coefficients, load_fp32, load_guided, log_density, mean, place, store_guided
from ddpo_fast_kernels.launch import block_and_warps, row_layout


@triton.jit
def step_logprob_fwd_kernel(
    output,
    latents,
    noise,
    table,
    timesteps,
    next_latents,
    log_probs,
    next_input,
    guidance,
    D,
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    images = tl.num_programs(0)
    c_x, c_m, sigma, _ = coefficients(table, timesteps, image, PER_IMAGE)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = d < D
        at = place(d, CHANNELS, PIXELS)
        guided = load_guided(output, image, images, D, at, mask, guidance, GUIDED)
        mu = mean(guided, load_fp32(latents, image, D, d, mask), c_x, c_m)
        following = tl.fma(sigma, load_fp32(noise, image, D, d, mask), mu)
        tl.store(next_latents + image * D + d, following, mask=mask)
        as_input = following.to(next_input.dtype.element_ty)
        tl.store(next_input + image * D + at, as_input, mask=mask)
        if GUIDED:
            tl.store(next_input + (image + images) * D + at, as_input, mask=mask)
        # The log-prob is that of the stored latents. `following` is rounded, so this is not exactly sigma * noise.
        difference = tl.where(mask, following - mu, 0.0)
        squares = tl.fma(difference, difference, squares)
    tl.store(log_probs + image, log_density(tl.sum(squares, axis=0), D, sigma))


@triton.jit
def step_logprob_bwd_kernel(
    output,
    latents,
    next_latents,
    table,
    timesteps,
    grads,
    grad_output,
    grad_latents,
    guidance,
    D,
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    grad_next_latents, grad_log_probs, grad_next_input = grads
    image = tl.program_id(0).to(tl.int64)
    images = tl.num_programs(0)
    c_x, c_m, sigma, _ = coefficients(table, timesteps, image, PER_IMAGE)
    # d log_prob / d mean = difference / (sigma^2 D), at fixed next latents
    slope = tl.load(grad_log_probs + image) / (sigma * sigma * D)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = d < D
        at = place(d, CHANNELS, PIXELS)
        guided = load_guided(output, image, images, D, at, mask, guidance, GUIDED)
        mu = mean(guided, load_fp32(latents, image, D, d, mask), c_x, c_m)
        difference = load_fp32(next_latents, image, D, d, mask) - mu
        # the mean affects three outputs: the log-prob, the next latents, and their copies in the UNet's next input
        grad_mean = tl.fma(slope, difference, load_fp32(grad_next_latents, image, D, d, mask))
        grad_mean += load_fp32(grad_next_input, image, D, at, mask)
        if GUIDED:
            grad_mean += load_fp32(grad_next_input, image + images, D, at, mask)
        tl.store(grad_latents + image * D + d, c_x * grad_mean, mask=mask)
        store_guided(grad_output, image, images, D, at, mask, c_m * grad_mean, guidance, GUIDED)


def step_logprob(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    table: torch.Tensor,
    timesteps: torch.Tensor,
    guidance_scale: float | None,
    next_latents: torch.Tensor,
    log_probs: torch.Tensor,
    next_input: torch.Tensor,
) -> None:
    """Fills `next_latents` [B, ...], `log_probs` [B] and `next_input`, which is laid out as `model_output`."""
    _launch(
        step_logprob_fwd_kernel,
        latents,
        (model_output, latents, noise, table, timesteps, next_latents, log_probs, next_input),
        guidance_scale,
    )


def step_logprob_backward(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    next_latents: torch.Tensor,
    table: torch.Tensor,
    timesteps: torch.Tensor,
    guidance_scale: float | None,
    grad_next_latents: torch.Tensor,
    grad_log_probs: torch.Tensor,
    grad_next_input: torch.Tensor,
    grad_output: torch.Tensor,
    grad_latents: torch.Tensor,
) -> None:
    """Fills `grad_output`, which is laid out as `model_output`, and `grad_latents` [B, ...]."""
    grads = grad_next_latents, grad_log_probs, grad_next_input
    _launch(
        step_logprob_bwd_kernel,
        latents,
        (model_output, latents, next_latents, table, timesteps, grads, grad_output, grad_latents),
        guidance_scale,
    )


def _launch(kernel: Any, latents: torch.Tensor, arguments: tuple[Any, ...], guidance_scale: float | None) -> None:
    model_output, timesteps = arguments[0], arguments[4]
    elements = latents[0].numel()
    block, warps = block_and_warps(elements)
    channels, pixels = row_layout(model_output)
    with torch.cuda.device_of(latents):
        kernel[(len(latents),)](
            *arguments,
            1.0 if guidance_scale is None else guidance_scale,
            elements,
            GUIDED=guidance_scale is not None,
            PER_IMAGE=timesteps.ndim > 0,
            CHANNELS=channels,
            PIXELS=pixels,
            BLOCK=block,
            num_warps=warps,
        )


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int]]:
    """Yields (name, kernel, signature, constants, warps) of the launches for Stable Diffusion's latents."""
    block, warps = block_and_warps(4 * 64 * 64)
    for dtype in ("fp16", "bf16", "fp32"):
        for guided, channels in ((True, 0), (True, 4), (False, 0)):
            constants = {
                "GUIDED": guided,
                "PER_IMAGE": not guided,
                "CHANNELS": channels,
                "PIXELS": 4096 if channels else 0,
                "BLOCK": block,
            }
            shared = {"guidance": "fp32", "D": "i32", **dict.fromkeys(constants, "constexpr")}
            given = {"output": f"*{dtype}", "latents": "*fp32"}
            step = {"table": "*fp32", "timesteps": "*i64"}
            name = f"{dtype} {'guided' if guided else 'plain'} {'channels_last' if channels else 'contiguous'}"
            made = {"next_latents": "*fp32", "log_probs": "*fp32", "next_input": f"*{dtype}"}
            forward = {**given, "noise": "*fp32", **step, **made, **shared}
            yield f"fwd {name}", step_logprob_fwd_kernel, forward, constants, warps
            grads = {
                "grads": ("*fp32", "*fp32", f"*{dtype}"),
                "grad_output": f"*{dtype}",
                "grad_latents": "*fp32",
            }
            backward = {**given, "next_latents": "*fp32", **step, **grads, **shared}
            yield f"bwd {name}", step_logprob_bwd_kernel, backward, constants, warps
