"""The Gaussian denoising step inside kernels; `ddpo_fast/ops/gaussian.py` is its definition.

Sampling and training must compute the same log-prob in every bit for the same UNet output, so that ratios are exactly 1
while the policy has not changed. Both kernels therefore call these functions, use tiles of the same size and add up in
the same order. A sum with a product is an explicit `fma`, so that the compiler cannot decide differently in each
kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log(sqrt(2 pi))
LOG_SQRT_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def place(d, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """The offset in memory of element d of a row, counted in NCHW order.

    Rows are contiguous (CHANNELS = 0) or channels_last. Latents are always contiguous and the UNet's output may be
    channels_last, so the same element has different offsets in the two.
    """
    if CHANNELS > 0:
        return (d % PIXELS) * CHANNELS + d // PIXELS
    return d


@triton.jit
def load_fp32(rows, row, D, at, mask):
    """Elements of a row in fp32, zero where masked. `row` is int64: rows * D may exceed what an int32 counts."""
    return tl.load(rows + row * D + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_guided(output, image, images, D, at, mask, guidance, GUIDED: tl.constexpr):
    """The model's output for an image in fp32; GUIDED: combined from 2 * images rows, the unconditional ones first."""
    uncond = load_fp32(output, image, D, at, mask)
    if GUIDED:
        text = load_fp32(output, image + images, D, at, mask)
        return tl.fma(guidance, text - uncond, uncond)
    return uncond


@triton.jit
def store_guided(rows, image, images, D, at, mask, grad, guidance, GUIDED: tl.constexpr):
    """Stores the gradient of the model's output, given that of the guided output: (1 - s) and s times `grad`."""
    kind = rows.dtype.element_ty
    if GUIDED:
        tl.store(rows + image * D + at, ((1.0 - guidance) * grad).to(kind), mask=mask)
        tl.store(rows + (image + images) * D + at, (guidance * grad).to(kind), mask=mask)
    else:
        tl.store(rows + image * D + at, grad.to(kind), mask=mask)


@triton.jit
def coefficients(table, timesteps, image, PER_IMAGE: tl.constexpr):
    """(c_x, c_m, sigma, credit) of an image's timestep; without PER_IMAGE there is one timestep for all."""
    row = tl.load(timesteps + image) if PER_IMAGE else tl.load(timesteps)
    entry = table + row.to(tl.int64) * 4
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def mean(model_output, latents, c_x, c_m):
    """c_m * model_output + c_x * latents."""
    return tl.fma(c_m, model_output, c_x * latents)


@triton.jit
def log_density(sum_of_squares, D, sigma):
    """A Gaussian's log-density averaged over D elements, given the sum of their squared distances from its mean."""
    return -(sum_of_squares / D) / (2.0 * sigma * sigma) - tl.log(sigma) - LOG_SQRT_2PI
