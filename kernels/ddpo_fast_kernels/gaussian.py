"""The Gaussian denoising step inside kernels.

Sampling and training share these functions, and every product with a sum is an explicit `fma`: the compiler has no
choice left, so both compute the same log-prob to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG_SQRT_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def place(d, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Where element d of a row (in NCHW order) lies: rows are contiguous (CHANNELS = 0) or channels_last."""
    if CHANNELS > 0:
        return (d % PIXELS) * CHANNELS + d // PIXELS
    return d


@triton.jit
def load_fp32(rows, row, D, at, mask):
    return tl.load(rows + row * D + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_guided(output, image, images, D, at, mask, guidance, GUIDED: tl.constexpr):
    """The model's output for an image in fp32; GUIDED: from 2 * images rows, the unconditional ones first."""
    uncond = load_fp32(output, image, D, at, mask)
    if GUIDED:
        text = load_fp32(output, image + images, D, at, mask)
        return tl.fma(guidance, text - uncond, uncond)
    return uncond


@triton.jit
def store_guided(rows, image, images, D, at, mask, grad, guidance, GUIDED: tl.constexpr):
    """The gradient to the model's output from that to the guided one: what `load_guided` combines."""
    kind = rows.dtype.element_ty
    if GUIDED:
        tl.store(rows + image * D + at, ((1.0 - guidance) * grad).to(kind), mask=mask)
        tl.store(rows + (image + images) * D + at, (guidance * grad).to(kind), mask=mask)
    else:
        tl.store(rows + image * D + at, grad.to(kind), mask=mask)


@triton.jit
def coefficients(table, timesteps, image, PER_IMAGE: tl.constexpr):
    """(c_x, c_m, sigma) of an image's timestep; without PER_IMAGE there is one timestep for all."""
    row = tl.load(timesteps + image) if PER_IMAGE else tl.load(timesteps)
    entry = table + row.to(tl.int64) * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def mean(model_output, latents, c_x, c_m):
    return tl.fma(c_m, model_output, c_x * latents)


@triton.jit
def log_density(sum_of_squares, D, sigma):
    """Mean over D elements of a Gaussian's log-density, from the squared differences to its mean."""
    return -(sum_of_squares / D) / (2.0 * sigma * sigma) - tl.log(sigma) - LOG_SQRT_2PI
